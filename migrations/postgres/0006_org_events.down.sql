-- loses: descriptions and pauses of types, and the log's events about them; cursors from before the last of these expire
DO $$
DECLARE
    org UUID;
    removed BIGINT;
BEGIN
    FOR org IN SELECT d.org_id FROM jobledger.org_due d LOOP
        PERFORM set_config('app.current_org_id', org::text, true);
        SELECT coalesce(sum(e.bytes), 0) INTO removed FROM jobledger.org_event e WHERE e.org_id = org;
        UPDATE jobledger.org_head SET floor_seq = greatest(floor_seq, org_seq + 1), bytes = bytes - removed
        WHERE org_id = org AND org_seq > 0;
        UPDATE jobledger.org_record SET bytes = bytes - removed WHERE org_id = org AND removed > 0;
    END LOOP;
END $$;
DROP TABLE jobledger.org_type;
DROP TABLE jobledger.org_event;
ALTER TABLE jobledger.org_head DROP COLUMN org_seq;
