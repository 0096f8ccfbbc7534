-- loses: descriptions and pauses of types, and the log's events about them; cursors from before the last of these expire
UPDATE org_head SET floor_seq = max(floor_seq, org_seq + 1),
    bytes = bytes - (SELECT coalesce(sum(e.bytes), 0) FROM org_event e WHERE e.org_id = org_head.org_id)
WHERE org_seq > 0;
DROP TABLE org_type;
DROP TABLE org_event;
ALTER TABLE org_head DROP COLUMN org_seq;
