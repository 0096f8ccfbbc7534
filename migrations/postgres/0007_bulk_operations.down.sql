-- loses: bulk operations, and with them those that are under way; the log's events about them; cursors from before the last of these expire
DO $$
DECLARE
    org UUID;
    removed BIGINT;
    last BIGINT;
    remaining BIGINT;
BEGIN
    FOR org IN SELECT d.org_id FROM jobledger.org_due d LOOP
        PERFORM set_config('app.current_org_id', org::text, true);
        SELECT sum(e.bytes), max(e.seq) INTO removed, last FROM jobledger.org_event e
        WHERE e.org_id = org AND e.kind IN ('bulk_started', 'bulk_ended');
        CONTINUE WHEN removed IS NULL;
        DELETE FROM jobledger.org_event e WHERE e.org_id = org AND e.kind IN ('bulk_started', 'bulk_ended');
        SELECT coalesce(max(e.seq), 0) INTO remaining FROM jobledger.org_event e WHERE e.org_id = org;
        UPDATE jobledger.org_head SET floor_seq = greatest(floor_seq, last + 1), org_seq = remaining, bytes = bytes - removed
        WHERE org_id = org;
        UPDATE jobledger.org_record SET bytes = bytes - removed WHERE org_id = org;
    END LOOP;
END $$;
DROP TABLE jobledger.bulk_operation;
