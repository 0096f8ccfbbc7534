-- First brings rows up to date with the log. Org by org: row-level security shows even the owner only the org that is named.
DO $$
DECLARE
    org UUID;
BEGIN
    FOR org IN SELECT d.org_id FROM jobledger.org_due d LOOP
        PERFORM set_config('app.current_org_id', org::text, true);
        CREATE TEMPORARY TABLE last ON COMMIT DROP AS
        SELECT DISTINCT ON (e.job_id) e.job_id, e.next_status, e.attempt, e.ts, e.job_seq, e.seq, e.recorded_at,
            CASE WHEN e.image LIKE '[%' THEN e.image::jsonb END AS image, rtrim(nullif(e.image, ''), '"') AS said
        FROM jobledger.job_event e
        WHERE e.org_id = org AND e.image IS NOT NULL AND e.seq > (
            SELECT coalesce((SELECT r.base_seq FROM jobledger.org_record r
                             WHERE r.org_id = org AND r.n > h.n ORDER BY r.n DESC LIMIT 1), h.base_seq)
            FROM jobledger.org_head h WHERE h.org_id = org)
        ORDER BY e.job_id, e.seq DESC;
        -- Full images. If the last image is empty, these columns are as in the row.
        UPDATE jobledger.job j SET
            failures = coalesce((last.image ->> 1)::integer, 0),
            lost_attempts = coalesce((last.image ->> 2)::integer, 0),
            started_at = last.ts + (last.image ->> 3)::bigint * interval '1 microsecond',
            attempt_started_at = last.ts + (last.image ->> 4)::bigint * interval '1 microsecond',
            finished_at = last.ts + (last.image ->> 5)::bigint * interval '1 microsecond',
            scheduled_at = last.ts + (last.image ->> 6)::bigint * interval '1 microsecond',
            ready_at = last.ts + (last.image ->> 7)::bigint * interval '1 microsecond',
            cancel_requested = coalesce(last.image ->> 8, '0') <> '0',
            outcome_digest = decode(last.image ->> 9, 'hex'),
            outcome_nonce = (last.image ->> 10)::bigint,
            lease_worker = last.image ->> 11,
            lease_granted = (last.image ->> 12)::bigint,
            lease_expires_at = last.ts + (last.image ->> 13)::bigint * interval '1 microsecond',
            lease_request = last.image ->> 14,
            lease_confirmed = coalesce(last.image ->> 15, '0') <> '0',
            lease_nonce = coalesce((last.image ->> 16)::bigint, 0),
            retry_request = last.image ->> 17,
            due_at = last.ts + (last.image ->> 18)::bigint * interval '1 microsecond',
            last_error_code = last.image ->> 19,
            last_error_message = last.image ->> 20,
            result_seq = (last.image ->> 21)::bigint,
            result_recorded_at = last.ts + (last.image ->> 22)::bigint * interval '1 microsecond'
        FROM last WHERE j.org_id = org AND j.id = last.job_id AND j.last_seq < last.seq AND last.image IS NOT NULL;
        -- Images that have only the lease.
        UPDATE jobledger.job j SET
            lease_expires_at = 'epoch'::timestamptz + split_part(last.said, ',', 1)::bigint * interval '1 microsecond',
            lease_confirmed = split_part(last.said, ',', 3) <> '0',
            due_at = 'epoch'::timestamptz + nullif(split_part(last.said, ',', CASE WHEN last.said LIKE '%,%' THEN 2 ELSE 1 END), '')::bigint
                * interval '1 microsecond'
        FROM last WHERE j.org_id = org AND j.id = last.job_id AND j.last_seq < last.seq AND last.said NOT LIKE '[%';
        UPDATE jobledger.job j SET
            status = last.next_status,
            attempt = last.attempt,
            updated_at = last.ts,
            last_job_seq = last.job_seq,
            last_seq = last.seq,
            last_recorded_at = last.recorded_at
        FROM last WHERE j.org_id = org AND j.id = last.job_id AND j.last_seq < last.seq;
        -- Then the lease extensions in records since.
        UPDATE jobledger.job j SET
            lease_expires_at = 'epoch'::timestamptz + split_part(last.said, ',', 1)::bigint * interval '1 microsecond',
            lease_confirmed = split_part(last.said, ',', 3) <> '0',
            due_at = 'epoch'::timestamptz + nullif(split_part(last.said, ',', CASE WHEN last.said LIKE '%,%' THEN 2 ELSE 1 END), '')::bigint
                * interval '1 microsecond'
        FROM (
            SELECT DISTINCT ON (x.key) x.key::uuid AS job_id, r.seq, x.value AS said FROM jobledger.org_head h
            JOIN jobledger.org_record r ON r.org_id = h.org_id AND r.n > h.base_n AND r.extensions IS NOT NULL
            CROSS JOIN LATERAL json_each_text(r.extensions::json) x
            WHERE h.org_id = org ORDER BY x.key, r.n DESC
        ) last
        WHERE j.org_id = org AND j.id = last.job_id AND j.last_seq <= last.seq AND j.lease_worker IS NOT NULL;
        DROP TABLE last;
    END LOOP;
END $$;
ALTER TABLE jobledger.org_record DROP COLUMN base_seq, DROP COLUMN base_n, DROP COLUMN quiet, DROP COLUMN extensions;
ALTER TABLE jobledger.org_head DROP COLUMN base_seq, DROP COLUMN base_n;
ALTER TABLE jobledger.job_event DROP COLUMN image;
