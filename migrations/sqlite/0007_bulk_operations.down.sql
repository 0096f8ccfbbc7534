-- loses: bulk operations, and with them those that are under way; the log's events about them; cursors from before the last of these expire
UPDATE org_head SET
    floor_seq = max(floor_seq, 1 + (SELECT max(e.seq) FROM org_event e WHERE e.org_id = org_head.org_id AND e.kind IN ('bulk_started', 'bulk_ended'))),
    org_seq = (SELECT coalesce(max(e.seq), 0) FROM org_event e WHERE e.org_id = org_head.org_id AND e.kind NOT IN ('bulk_started', 'bulk_ended')),
    bytes = bytes - (SELECT sum(e.bytes) FROM org_event e WHERE e.org_id = org_head.org_id AND e.kind IN ('bulk_started', 'bulk_ended'))
WHERE org_id IN (SELECT e.org_id FROM org_event e WHERE e.kind IN ('bulk_started', 'bulk_ended'));
DELETE FROM org_event WHERE kind IN ('bulk_started', 'bulk_ended');
DROP TABLE bulk_operation;
