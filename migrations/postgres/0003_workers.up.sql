-- Leases, what time does to jobs, the queue of jobs that are ready, and lists of jobs in the order of their creation.

ALTER TABLE jobledger.job
    ADD COLUMN run_timeout      BIGINT,                         -- microseconds
    ADD COLUMN payload_bytes    INTEGER NOT NULL DEFAULT 0,     -- on the wire
    ADD COLUMN created_seq      BIGINT  NOT NULL DEFAULT 0,     -- the first event
    ADD COLUMN outcome_epoch    BIGINT,                         -- of the lease under which the last attempt ended
    ADD COLUMN lease_worker     VARCHAR(255),                   -- null where nobody holds the job
    ADD COLUMN lease_granted    BIGINT,                         -- microseconds
    ADD COLUMN lease_expires_at TIMESTAMPTZ,
    ADD COLUMN lease_request    VARCHAR(255) COLLATE "C",       -- request_id of the claim
    ADD COLUMN lease_confirmed  BOOLEAN NOT NULL DEFAULT false, -- the holder was heard of since
    ADD COLUMN lease_epoch      BIGINT  NOT NULL DEFAULT 0,     -- rises with every claim and expiry
    ADD COLUMN retry_request    VARCHAR(255),                   -- request_id of the last RetryJob
    ADD COLUMN due_at           TIMESTAMPTZ;                    -- when time itself may change the job, or earlier

DROP INDEX jobledger.idx_job_status;
DROP INDEX jobledger.idx_job_type;
ALTER TABLE jobledger.job_label ADD COLUMN created_seq BIGINT;

ALTER TABLE jobledger.org_head ADD COLUMN ready_gen BIGINT NOT NULL DEFAULT 0;  -- raised by every batch that makes a job ready
ALTER TABLE jobledger.org_batch ADD COLUMN ready_gen BIGINT NOT NULL DEFAULT 0; -- as of this batch

-- next_due_at is retention's; this is that of leases, run time-outs and schedules. Null: there are none.
ALTER TABLE jobledger.org_due ADD COLUMN work_due_at TIMESTAMPTZ;
CREATE INDEX idx_org_due_work ON jobledger.org_due (work_due_at) WHERE work_due_at IS NOT NULL;

-- What is there already. Row-level security hides it from the owner too, but for this. A JSON text grows sevenfold on the
-- wire at most, and to a mebibyte.
ALTER TABLE jobledger.job NO FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.job_event NO FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.job_payload NO FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.job_label NO FORCE ROW LEVEL SECURITY;
UPDATE jobledger.job j SET
    created_seq = e.seq,
    payload_bytes = coalesce((SELECT least(7 * octet_length(p.payload::text), 1048576)
                              FROM jobledger.job_payload p WHERE p.org_id = j.org_id AND p.job_id = j.id), 0),
    due_at = CASE WHEN j.status = 'queued' AND j.scheduled_at IS NOT NULL THEN j.ready_at END
FROM jobledger.job_event e WHERE e.org_id = j.org_id AND e.job_id = j.id AND e.job_seq = 1;
UPDATE jobledger.job_label l SET created_seq = j.created_seq FROM jobledger.job j WHERE j.org_id = l.org_id AND j.id = l.job_id;
UPDATE jobledger.org_due d SET work_due_at = (SELECT min(j.due_at) FROM jobledger.job j WHERE j.org_id = d.org_id);
ALTER TABLE jobledger.job FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.job_event FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.job_payload FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.job_label FORCE ROW LEVEL SECURITY;

ALTER TABLE jobledger.job_label DROP CONSTRAINT job_label_pkey, ADD PRIMARY KEY (org_id, key, value, created_seq);

-- Jobs that may be claimed, in the order in which they are. It also finds what has been ready longest, for statistics.
DROP INDEX jobledger.idx_job_queued;
CREATE INDEX idx_job_ready ON jobledger.job (org_id, type, priority DESC, ready_at, created_seq) WHERE status = 'queued' AND due_at IS NULL;
-- Apart from an extended lease's end, which moves with every heartbeat: nothing here does.
CREATE INDEX idx_job_due ON jobledger.job (org_id, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX idx_job_lease_request ON jobledger.job (org_id, lease_request) WHERE lease_request IS NOT NULL;
CREATE INDEX idx_job_status ON jobledger.job (org_id, status, created_seq);
CREATE INDEX idx_job_type ON jobledger.job (org_id, type, status, created_seq);

-- While a table has no statistics, PostgreSQL takes an org's rows for one, and of the indexes that then cost the same the one
-- that was made last. Those shall be the primary keys: the plans that are made at first are kept for a while.
ALTER TABLE jobledger.job DROP CONSTRAINT job_pkey, ADD PRIMARY KEY (org_id, id);
ALTER TABLE jobledger.job_event DROP CONSTRAINT job_event_pkey, ADD PRIMARY KEY (org_id, seq, recorded_at);

-- As open_batch, with the generation of what is ready. Servers that know nothing of this migration have to be stopped before
-- it: what they write lacks what it added.
CREATE FUNCTION jobledger.begin_batch(p_org UUID)
RETURNS TABLE (
    seq BIGINT, floor_seq BIGINT, recorded_at TIMESTAMPTZ, types BIGINT, ready_gen BIGINT, folded_seq BIGINT, clock TIMESTAMPTZ
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    head jobledger.org_head;
    last RECORD;
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    SELECT h.* INTO head FROM jobledger.org_head h WHERE h.org_id = p_org FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO jobledger.org_head (org_id) VALUES (p_org) ON CONFLICT DO NOTHING;
        SELECT h.* INTO head FROM jobledger.org_head h WHERE h.org_id = p_org FOR UPDATE;
    END IF;
    SELECT b.seq, b.recorded_at, b.ready_gen INTO last FROM jobledger.org_batch b
    WHERE b.org_id = p_org AND b.seq > head.seq ORDER BY b.seq DESC LIMIT 1;
    RETURN QUERY SELECT coalesce(last.seq, head.seq), head.floor_seq, coalesce(last.recorded_at, head.recorded_at),
        head.types, greatest(last.ready_gen, head.ready_gen), head.seq, clock_timestamp();
END $$;

-- As read_statistics, with the job that has been ready longest found among the first of each priority.
CREATE FUNCTION jobledger.count_jobs(p_org UUID, p_types TEXT[])
RETURNS TABLE (
    head_seq BIGINT, type TEXT, queued BIGINT, running BIGINT, succeeded BIGINT, failed BIGINT, canceled BIGINT,
    dead_letter BIGINT, oldest_ready_at TIMESTAMPTZ, clock TIMESTAMPTZ
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    WITH batch AS MATERIALIZED (
        SELECT b.seq, b.counts FROM jobledger.org_head h JOIN jobledger.org_batch b ON b.org_id = p_org AND b.seq > h.seq
        WHERE h.org_id = p_org
    ), added AS MATERIALIZED (
        SELECT change.key, sum((change.value ->> 0)::bigint)::bigint AS queued, sum((change.value ->> 1)::bigint)::bigint AS running,
            sum((change.value ->> 2)::bigint)::bigint AS succeeded, sum((change.value ->> 3)::bigint)::bigint AS failed,
            sum((change.value ->> 4)::bigint)::bigint AS canceled, sum((change.value ->> 5)::bigint)::bigint AS dead_letter
        FROM batch, jsonb_each(batch.counts) change GROUP BY change.key
    ), counter AS (
        SELECT c.type, c.queued + coalesce(a.queued, 0) AS queued, c.running + coalesce(a.running, 0) AS running,
            c.succeeded + coalesce(a.succeeded, 0) AS succeeded, c.failed + coalesce(a.failed, 0) AS failed,
            c.canceled + coalesce(a.canceled, 0) AS canceled, c.dead_letter + coalesce(a.dead_letter, 0) AS dead_letter
        FROM jobledger.org_counter c LEFT JOIN added a ON a.key = c.type
        WHERE c.org_id = p_org AND (p_types IS NULL OR c.type = ANY (p_types))
    )
    SELECT greatest(h.seq, (SELECT max(batch.seq) FROM batch)), c.type::text, c.queued, c.running, c.succeeded, c.failed,
        c.canceled, c.dead_letter,
        CASE WHEN c.queued > 0 THEN (
            WITH RECURSIVE first (priority, ready_at) AS (
                (SELECT j.priority, j.ready_at FROM jobledger.job j
                 WHERE j.org_id = p_org AND j.type = c.type AND j.status = 'queued' AND j.due_at IS NULL
                 ORDER BY j.priority DESC, j.ready_at LIMIT 1)
                UNION ALL
                SELECT lower.priority, lower.ready_at FROM first CROSS JOIN LATERAL (
                    SELECT j.priority, j.ready_at FROM jobledger.job j
                    WHERE j.org_id = p_org AND j.type = c.type AND j.status = 'queued' AND j.due_at IS NULL
                        AND j.priority < first.priority
                    ORDER BY j.priority DESC, j.ready_at LIMIT 1) lower
            ) SELECT min(first.ready_at) FROM first)
        END,
        clock_timestamp()
    FROM jobledger.org_head h LEFT JOIN counter c ON true
    WHERE h.org_id = p_org ORDER BY c.type;
END $$;

-- As read_heads, with the generation of what is ready.
CREATE FUNCTION jobledger.read_reaches(p_orgs UUID[])
RETURNS TABLE (org_id UUID, seq BIGINT, ready_gen BIGINT)
LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    org UUID;
BEGIN
    FOREACH org IN ARRAY p_orgs LOOP
        PERFORM set_config('app.current_org_id', org::text, true);
        RETURN QUERY
        SELECT org, coalesce(b.seq, h.seq), greatest(b.ready_gen, h.ready_gen)
        FROM jobledger.org_head h LEFT JOIN LATERAL (
            SELECT last.seq, last.ready_gen FROM jobledger.org_batch last
            WHERE last.org_id = org AND last.seq > h.seq ORDER BY last.seq DESC LIMIT 1
        ) b ON true
        WHERE h.org_id = org;
    END LOOP;
END $$;

-- As read_job. Here and below, OFFSET 0 has PostgreSQL look rows up by their whole keys: left free, it plans while the tables
-- are empty to walk an org's rows for the wanted ones, and keeps to that until they have been analysed.
CREATE FUNCTION jobledger.get_job(p_org UUID, p_id UUID)
RETURNS TABLE (job jobledger.job, stage TEXT, progress INTEGER, payload TEXT, result_detail TEXT)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    SELECT j, e.detail_json ->> 'stage', (e.detail_json ->> 'progress')::integer, p.payload::text, r.detail_json::text
    FROM jobledger.job j
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_event e
        WHERE e.org_id = p_org AND e.seq = j.last_seq AND e.recorded_at = j.last_recorded_at OFFSET 0) e ON true
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_event e
        WHERE e.org_id = p_org AND e.seq = j.result_seq AND e.recorded_at = j.result_recorded_at OFFSET 0) r ON true
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_payload p WHERE p.org_id = p_org AND p.job_id = j.id OFFSET 0) p ON true
    WHERE j.org_id = p_org AND j.id = p_id;
END $$;

-- What jobs carry: their payloads and results.
CREATE FUNCTION jobledger.read_contents(p_org UUID, p_ids UUID[])
RETURNS TABLE (id UUID, payload TEXT, result_detail TEXT)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    SELECT j.id, p.payload::text, r.detail_json::text
    FROM unnest(p_ids) AS wanted (id)
    CROSS JOIN LATERAL (SELECT * FROM jobledger.job j WHERE j.org_id = p_org AND j.id = wanted.id OFFSET 0) j
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_event e
        WHERE e.org_id = p_org AND e.seq = j.result_seq AND e.recorded_at = j.result_recorded_at OFFSET 0) r ON true
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_payload p WHERE p.org_id = p_org AND p.job_id = j.id OFFSET 0) p ON true;
END $$;

-- A page of jobs, newest first: those created before p_before that match. Where they are found by: a label, where one is
-- asked for (p_key); else each of the statuses and, if any, types asked for. Of each way in no more than p_scan are looked
-- at; examined is how many were, and reached the last of them. The head comes in a row of its own where nothing was found.
CREATE FUNCTION jobledger.list_jobs(
    p_org UUID, p_before BIGINT, p_key TEXT, p_value TEXT, p_types TEXT[], p_statuses TEXT[], p_labels JSONB,
    p_requested_by TEXT, p_created_after TIMESTAMPTZ, p_created_before TIMESTAMPTZ, p_scan BIGINT, p_limit BIGINT
)
RETURNS TABLE (
    head_seq BIGINT, examined BIGINT, reached BIGINT, is_match BOOLEAN, job jobledger.job, stage TEXT, progress INTEGER
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    head BIGINT;
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    -- Before the jobs are looked for: what is streamed from here on misses nothing of what they became.
    SELECT coalesce((SELECT b.seq FROM jobledger.org_batch b
                     WHERE b.org_id = p_org AND b.seq > h.seq ORDER BY b.seq DESC LIMIT 1), h.seq)
    INTO head FROM jobledger.org_head h WHERE h.org_id = p_org;
    RETURN QUERY
    WITH candidate AS MATERIALIZED (
        SELECT found.created_seq, found.id FROM (
            (SELECT l.created_seq, l.job_id AS id FROM jobledger.job_label l
             WHERE p_key IS NOT NULL AND l.org_id = p_org AND l.key = p_key AND l.value = p_value AND l.created_seq < p_before
             ORDER BY l.created_seq DESC LIMIT p_scan)
            UNION ALL
            (SELECT of_status.created_seq, of_status.id FROM unnest(p_statuses) AS wanted (status) CROSS JOIN LATERAL (
                SELECT j.created_seq, j.id FROM jobledger.job j
                WHERE j.org_id = p_org AND j.status = wanted.status AND j.created_seq < p_before
                ORDER BY j.created_seq DESC LIMIT p_scan) of_status
             WHERE p_key IS NULL AND p_types IS NULL)
            UNION ALL
            (SELECT of_type.created_seq, of_type.id
             FROM unnest(p_types) AS wanted (type)
             CROSS JOIN unnest(p_statuses) AS with_status (status)
             CROSS JOIN LATERAL (
                SELECT j.created_seq, j.id FROM jobledger.job j
                WHERE j.org_id = p_org AND j.type = wanted.type AND j.status = with_status.status AND j.created_seq < p_before
                ORDER BY j.created_seq DESC LIMIT p_scan) of_type
             WHERE p_key IS NULL)
        ) found ORDER BY found.created_seq DESC LIMIT p_scan
    ), looked AS (
        SELECT c.created_seq, found.j, (found.j).last_seq, (found.j).last_recorded_at,
            (p_types IS NULL OR (found.j).type = ANY (p_types)) AND (found.j).status = ANY (p_statuses)
            AND (p_labels IS NULL OR (found.j).labels @> p_labels)
            AND (p_requested_by IS NULL OR (found.j).requested_by = p_requested_by)
            AND (p_created_after IS NULL OR (found.j).created_at >= p_created_after)
            AND (p_created_before IS NULL OR (found.j).created_at < p_created_before) AS matches
        FROM candidate c
        CROSS JOIN LATERAL (SELECT j FROM jobledger.job j WHERE j.org_id = p_org AND j.id = c.id OFFSET 0) found
    ), seen AS (
        SELECT count(*) AS examined, min(c.created_seq) AS reached FROM candidate c
    ), page AS (
        SELECT looked.* FROM looked WHERE looked.matches ORDER BY looked.created_seq DESC LIMIT p_limit
    )
    SELECT coalesce(head, 0), seen.examined, seen.reached, page.created_seq IS NOT NULL, page.j,
        e.detail_json ->> 'stage', (e.detail_json ->> 'progress')::integer
    FROM seen LEFT JOIN page ON true
    LEFT JOIN LATERAL (SELECT event.detail_json FROM jobledger.job_event event
        WHERE event.org_id = p_org AND event.seq = page.last_seq AND event.recorded_at = page.last_recorded_at OFFSET 0) e ON true
    ORDER BY page.created_seq DESC;
END $$;
