-- Lost attempts, and payloads and results as the text that they were given as: jsonb prints 1e308 with 309 digits.

ALTER TABLE jobledger.job
    -- Whoever created the jobs that are there counted on each expired lease as a failure.
    ADD COLUMN max_lost_attempts INTEGER NOT NULL DEFAULT 0,
    ADD COLUMN lost_attempts     INTEGER NOT NULL DEFAULT 0;    -- expired leases that did not count as failures
ALTER TABLE jobledger.job ALTER COLUMN max_lost_attempts SET DEFAULT 3;
ALTER TABLE jobledger.org_series ADD COLUMN lost BIGINT NOT NULL DEFAULT 0;
ALTER TABLE jobledger.job_payload ALTER COLUMN payload TYPE TEXT USING payload::text;
-- Exact. detail_json has a result of up to 64 KiB too, for those who read the table.
ALTER TABLE jobledger.job_event ADD COLUMN result TEXT;

-- What is there already. Row-level security hides it from the owner too, but for this.
ALTER TABLE jobledger.job_event NO FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.org_batch NO FORCE ROW LEVEL SECURITY;
UPDATE jobledger.job_event SET result = (detail_json -> 'result')::text WHERE detail_json ? 'result';
UPDATE jobledger.job_event SET detail_json = detail_json - 'result' WHERE octet_length(result) > 65536;
-- From here on org_batch.counts has `lost` between `canceled` and the durations.
UPDATE jobledger.org_batch b SET counts = (
    SELECT jsonb_object_agg(change.key,
        CASE WHEN jsonb_array_length(change.value) > 13 THEN jsonb_insert(change.value, '{13}', '0') ELSE change.value END)
    FROM jsonb_each(b.counts) change)
WHERE b.counts <> '{}';
ALTER TABLE jobledger.job_event FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.org_batch FORCE ROW LEVEL SECURITY;

-- As get_job, with payload and result as text.
CREATE FUNCTION jobledger.job_of(p_org UUID, p_id UUID)
RETURNS TABLE (job jobledger.job, stage TEXT, progress INTEGER, payload TEXT, result TEXT)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    SELECT j, e.detail_json ->> 'stage', (e.detail_json ->> 'progress')::integer, p.payload, r.result
    FROM jobledger.job j
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_event e
        WHERE e.org_id = p_org AND e.seq = j.last_seq AND e.recorded_at = j.last_recorded_at OFFSET 0) e ON true
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_event e
        WHERE e.org_id = p_org AND e.seq = j.result_seq AND e.recorded_at = j.result_recorded_at OFFSET 0) r ON true
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_payload p WHERE p.org_id = p_org AND p.job_id = j.id OFFSET 0) p ON true
    WHERE j.org_id = p_org AND j.id = p_id;
END $$;

-- As read_contents, with the same.
CREATE FUNCTION jobledger.contents_of(p_org UUID, p_ids UUID[])
RETURNS TABLE (id UUID, payload TEXT, result TEXT)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    SELECT j.id, p.payload, r.result
    FROM unnest(p_ids) AS wanted (id)
    CROSS JOIN LATERAL (SELECT * FROM jobledger.job j WHERE j.org_id = p_org AND j.id = wanted.id OFFSET 0) j
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_event e
        WHERE e.org_id = p_org AND e.seq = j.result_seq AND e.recorded_at = j.result_recorded_at OFFSET 0) r ON true
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_payload p WHERE p.org_id = p_org AND p.job_id = j.id OFFSET 0) p ON true;
END $$;

-- As read_jobs, with the same and the job's new columns.
CREATE FUNCTION jobledger.jobs_of(p_orgs UUID[], p_ends INTEGER[], p_ids UUID[], p_most INTEGER)
RETURNS TABLE (
    n BIGINT, is_large BOOLEAN, org_id UUID, id UUID, type VARCHAR, max_attempts INTEGER,
    max_lost_attempts INTEGER, priority INTEGER,
    idempotency_key VARCHAR, request_digest BYTEA, requested_by VARCHAR, labels TEXT, retry_initial BIGINT,
    retry_multiplier FLOAT8, retry_max BIGINT, run_timeout BIGINT, payload_bytes INTEGER, created_at TIMESTAMPTZ,
    created_seq BIGINT, status VARCHAR, attempt INTEGER, failures INTEGER,
    lost_attempts INTEGER, updated_at TIMESTAMPTZ, started_at TIMESTAMPTZ,
    attempt_started_at TIMESTAMPTZ, finished_at TIMESTAMPTZ, scheduled_at TIMESTAMPTZ, ready_at TIMESTAMPTZ,
    cancel_requested BOOLEAN, outcome_digest BYTEA, outcome_epoch BIGINT, lease_worker VARCHAR, lease_granted BIGINT,
    lease_expires_at TIMESTAMPTZ, lease_request VARCHAR, lease_confirmed BOOLEAN, lease_epoch BIGINT, retry_request VARCHAR,
    due_at TIMESTAMPTZ, last_error_code VARCHAR, last_error_message TEXT, result_seq BIGINT, result_recorded_at TIMESTAMPTZ,
    last_job_seq BIGINT, last_seq BIGINT, last_recorded_at TIMESTAMPTZ, stage TEXT, progress INTEGER, payload TEXT,
    result TEXT
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
#variable_conflict use_column
DECLARE
    org UUID;
    first INTEGER := 1;
BEGIN
    FOR i IN 1 .. cardinality(p_orgs) LOOP
        org := p_orgs[i];
        PERFORM set_config('app.current_org_id', org::text, true);
        RETURN QUERY
        SELECT first + wanted.n - 2, size.is_large, j.org_id, j.id, j.type, j.max_attempts, j.max_lost_attempts, j.priority, j.idempotency_key,
            j.request_digest, j.requested_by, j.labels::text, j.retry_initial, j.retry_multiplier, j.retry_max, j.run_timeout,
            j.payload_bytes, j.created_at, j.created_seq, j.status, j.attempt, j.failures, j.lost_attempts, j.updated_at, j.started_at,
            j.attempt_started_at, j.finished_at, j.scheduled_at, j.ready_at, j.cancel_requested, j.outcome_digest,
            j.outcome_epoch, j.lease_worker, j.lease_granted, j.lease_expires_at, j.lease_request, j.lease_confirmed,
            j.lease_epoch, j.retry_request, j.due_at, j.last_error_code, j.last_error_message, j.result_seq,
            j.result_recorded_at, j.last_job_seq, j.last_seq, j.last_recorded_at, e.detail_json ->> 'stage',
            (e.detail_json ->> 'progress')::integer,
            CASE WHEN NOT size.is_large THEN p.payload END, CASE WHEN NOT size.is_large THEN r.result END
        FROM unnest(p_ids[first : p_ends[i]]) WITH ORDINALITY AS wanted (id, n)
        CROSS JOIN LATERAL (SELECT * FROM jobledger.job j WHERE j.org_id = org AND j.id = wanted.id OFFSET 0) j
        LEFT JOIN LATERAL (SELECT * FROM jobledger.job_event e
            WHERE e.org_id = org AND e.seq = j.last_seq AND e.recorded_at = j.last_recorded_at OFFSET 0) e ON true
        LEFT JOIN LATERAL (SELECT * FROM jobledger.job_event e
            WHERE e.org_id = org AND e.seq = j.result_seq AND e.recorded_at = j.result_recorded_at OFFSET 0) r ON true
        LEFT JOIN LATERAL (SELECT * FROM jobledger.job_payload p
            WHERE p.org_id = org AND p.job_id = j.id AND j.payload_bytes > 0 OFFSET 0) p ON true
        CROSS JOIN LATERAL (SELECT j.payload_bytes + coalesce(r.bytes, 0) > p_most) AS size (is_large);
        first := p_ends[i] + 1;
    END LOOP;
END $$;

-- As summarize, with lost attempts.
CREATE FUNCTION jobledger.summary_of(p_org UUID, p_types TEXT[], p_window INTERVAL, p_width SMALLINT, p_by_type BOOLEAN)
RETURNS TABLE (
    head_seq BIGINT, clock TIMESTAMPTZ, since TIMESTAMPTZ, type TEXT, bucket TIMESTAMPTZ,
    queued BIGINT, running BIGINT, succeeded BIGINT, failed BIGINT, canceled BIGINT, dead_letter BIGINT,
    scheduled BIGINT, oldest_ready_at TIMESTAMPTZ,
    flow_created BIGINT, flow_started BIGINT, flow_succeeded BIGINT, flow_failed BIGINT, flow_retried BIGINT, flow_canceled BIGINT,
    flow_lost BIGINT,
    waits BIGINT[], runs BIGINT[]
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    v_now TIMESTAMPTZ := clock_timestamp();
    v_first INTERVAL := CASE WHEN p_window > interval '1 day' THEN interval '1 hour' ELSE interval '1 minute' END;
    v_since TIMESTAMPTZ := date_bin(v_first, v_now - p_window, 'epoch');
    v_told_since TIMESTAMPTZ := greatest(v_since, (SELECT l.series_since FROM jobledger.ledger l));
    v_hours_since TIMESTAMPTZ := date_bin(interval '1 hour', v_since + interval '1 hour' - interval '1 microsecond', 'epoch');
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    WITH batch AS MATERIALIZED (
        SELECT b.seq, b.recorded_at, change.key, change.value
        FROM jobledger.org_head h
        JOIN jobledger.org_batch b ON b.org_id = p_org AND b.seq > h.seq
        CROSS JOIN LATERAL jsonb_each(b.counts) change
        WHERE h.org_id = p_org
    ), added AS MATERIALIZED (
        SELECT batch.key, coalesce(sum((batch.value ->> 0)::bigint), 0)::bigint AS queued,
            coalesce(sum((batch.value ->> 1)::bigint), 0)::bigint AS running,
            coalesce(sum((batch.value ->> 2)::bigint), 0)::bigint AS succeeded,
            coalesce(sum((batch.value ->> 3)::bigint), 0)::bigint AS failed,
            coalesce(sum((batch.value ->> 4)::bigint), 0)::bigint AS canceled,
            coalesce(sum((batch.value ->> 5)::bigint), 0)::bigint AS dead_letter,
            coalesce(sum((batch.value ->> 6)::bigint), 0)::bigint AS scheduled
        FROM batch GROUP BY batch.key
    ), counter AS (
        SELECT c.type, c.queued + coalesce(a.queued, 0) AS queued,
            c.running + coalesce(a.running, 0) AS running,
            c.succeeded + coalesce(a.succeeded, 0) AS succeeded,
            c.failed + coalesce(a.failed, 0) AS failed,
            c.canceled + coalesce(a.canceled, 0) AS canceled,
            c.dead_letter + coalesce(a.dead_letter, 0) AS dead_letter,
            c.scheduled + coalesce(a.scheduled, 0) AS scheduled
        FROM jobledger.org_counter c LEFT JOIN added a ON a.key = c.type
        WHERE c.org_id = p_org AND (p_types IS NULL OR c.type = ANY (p_types))
    ), happened AS MATERIALIZED (
        SELECT s.width, s.start, s.type, s.created, s.started, s.succeeded, s.failed, s.retried, s.canceled, s.lost,
            CASE WHEN s.start < v_hours_since THEN s.waits END AS waits,
            CASE WHEN s.start < v_hours_since THEN s.runs END AS runs
        FROM jobledger.org_series s
        WHERE s.org_id = p_org AND s.width = 60 AND s.start >= v_since AND NOT s.removed
            AND (s.start < v_hours_since OR p_width = 60) AND (p_types IS NULL OR s.type = ANY (p_types))
        UNION ALL
        SELECT s.width, s.start, s.type, s.created, s.started, s.succeeded, s.failed, s.retried, s.canceled, s.lost, s.waits, s.runs
        FROM jobledger.org_series s
        WHERE s.org_id = p_org AND s.width = 3600 AND s.start >= v_hours_since AND NOT s.removed
            AND (p_types IS NULL OR s.type = ANY (p_types))
        UNION ALL
        SELECT w.width, date_bin(w.width * interval '1 second', batch.recorded_at, 'epoch'), batch.key,
            coalesce((batch.value ->> 7)::bigint, 0),
            coalesce((batch.value ->> 8)::bigint, 0),
            coalesce((batch.value ->> 9)::bigint, 0),
            coalesce((batch.value ->> 10)::bigint, 0),
            coalesce((batch.value ->> 11)::bigint, 0),
            coalesce((batch.value ->> 12)::bigint, 0),
            coalesce((batch.value ->> 13)::bigint, 0),
            jobledger.to_counts(batch.value -> 14), jobledger.to_counts(batch.value -> 15)
        FROM batch CROSS JOIN (VALUES (60::smallint), (3600::smallint)) w (width)
        WHERE jsonb_array_length(batch.value) > 7 AND batch.recorded_at >= v_since
            AND (p_types IS NULL OR batch.key = ANY (p_types))
            AND (w.width = 3600 OR batch.recorded_at < v_hours_since OR p_width = 60)
            AND (w.width = 60 OR batch.recorded_at >= v_hours_since)
    ), flow AS (
        SELECT f.type,
            sum(f.created)::bigint AS created,
            sum(f.started)::bigint AS started,
            sum(f.succeeded)::bigint AS succeeded,
            sum(f.failed)::bigint AS failed,
            sum(f.retried)::bigint AS retried,
            sum(f.canceled)::bigint AS canceled,
            sum(f.lost)::bigint AS lost,
            jobledger.sum_counts(f.waits) AS waits, jobledger.sum_counts(f.runs) AS runs
        FROM happened f WHERE f.width = 3600 OR f.start < v_hours_since GROUP BY f.type
    ), series AS (
        SELECT f.start, CASE WHEN p_by_type THEN f.type END AS type,
            sum(f.created)::bigint AS created,
            sum(f.started)::bigint AS started,
            sum(f.succeeded)::bigint AS succeeded,
            sum(f.failed)::bigint AS failed,
            sum(f.retried)::bigint AS retried,
            sum(f.canceled)::bigint AS canceled,
            sum(f.lost)::bigint AS lost
        FROM happened f WHERE f.width = p_width GROUP BY 1, 2
    ), log AS (
        SELECT greatest(h.seq, (SELECT max(b.seq) FROM jobledger.org_batch b
                                WHERE b.org_id = p_org AND b.seq > h.seq)) AS head_seq
        FROM jobledger.org_head h WHERE h.org_id = p_org
    )
    SELECT log.head_seq, clock_timestamp(), v_told_since, c.type::text, NULL::timestamptz,
        c.queued, c.running, c.succeeded, c.failed, c.canceled, c.dead_letter, c.scheduled,
        CASE WHEN c.queued > c.scheduled THEN (
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
        f.created, f.started, f.succeeded, f.failed, f.retried, f.canceled, f.lost, f.waits, f.runs
    FROM log LEFT JOIN counter c ON true LEFT JOIN flow f ON f.type = c.type
    UNION ALL
    SELECT log.head_seq, clock_timestamp(), v_told_since, s.type::text, s.start, NULL, NULL, NULL, NULL, NULL, NULL,
        NULL, NULL, s.created, s.started, s.succeeded, s.failed, s.retried, s.canceled, s.lost, NULL, NULL
    FROM log JOIN series s ON true;
END $$;

-- As read_series, with lost attempts.
CREATE FUNCTION jobledger.series_of(p_org UUID, p_types TEXT[])
RETURNS TABLE (
    head_seq BIGINT, recorded_at TIMESTAMPTZ, width SMALLINT, start TIMESTAMPTZ, type TEXT, removed BOOLEAN,
    flow_created BIGINT, flow_started BIGINT, flow_succeeded BIGINT, flow_failed BIGINT, flow_retried BIGINT, flow_canceled BIGINT,
    flow_lost BIGINT,
    waits BIGINT[], runs BIGINT[]
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    WITH batch AS MATERIALIZED (
        SELECT b.seq, b.recorded_at, change.key, change.value
        FROM jobledger.org_head h
        JOIN jobledger.org_batch b ON b.org_id = p_org AND b.seq > h.seq
        CROSS JOIN LATERAL jsonb_each(b.counts) change
        WHERE h.org_id = p_org
    ), log AS (
        SELECT greatest(h.seq, last.seq) AS head_seq, greatest(h.recorded_at, last.recorded_at) AS recorded_at
        FROM jobledger.org_head h LEFT JOIN LATERAL (
            SELECT b.seq, b.recorded_at FROM jobledger.org_batch b
            WHERE b.org_id = p_org AND b.seq > h.seq ORDER BY b.seq DESC LIMIT 1) last ON true
        WHERE h.org_id = p_org
    ), happened AS (
        SELECT s.width, s.start, s.type, s.removed, s.created, s.started, s.succeeded, s.failed, s.retried, s.canceled, s.lost, s.waits,
            s.runs
        FROM jobledger.org_series s WHERE s.org_id = p_org AND s.type = ANY (p_types)
        UNION ALL
        SELECT w.width, date_bin(w.width * interval '1 second', batch.recorded_at, 'epoch'), batch.key, false,
            coalesce((batch.value ->> 7)::bigint, 0),
            coalesce((batch.value ->> 8)::bigint, 0),
            coalesce((batch.value ->> 9)::bigint, 0),
            coalesce((batch.value ->> 10)::bigint, 0),
            coalesce((batch.value ->> 11)::bigint, 0),
            coalesce((batch.value ->> 12)::bigint, 0),
            coalesce((batch.value ->> 13)::bigint, 0),
            jobledger.to_counts(batch.value -> 14), jobledger.to_counts(batch.value -> 15)
        FROM batch CROSS JOIN (VALUES (60::smallint), (3600::smallint)) w (width)
        WHERE jsonb_array_length(batch.value) > 7 AND batch.key = ANY (p_types)
    ), series AS (
        SELECT f.width, f.start, f.type::text AS type, f.removed,
            sum(f.created)::bigint AS created,
            sum(f.started)::bigint AS started,
            sum(f.succeeded)::bigint AS succeeded,
            sum(f.failed)::bigint AS failed,
            sum(f.retried)::bigint AS retried,
            sum(f.canceled)::bigint AS canceled,
            sum(f.lost)::bigint AS lost,
            jobledger.sum_counts(f.waits) AS waits, jobledger.sum_counts(f.runs) AS runs
        FROM happened f GROUP BY f.width, f.start, f.type, f.removed
    )
    SELECT log.head_seq, log.recorded_at, s.width, s.start, s.type, s.removed, s.created, s.started, s.succeeded, s.failed,
        s.retried, s.canceled, s.lost, s.waits, s.runs
    FROM log LEFT JOIN series s ON true;
END $$;

-- As read_histories, with a null for each result.
CREATE FUNCTION jobledger.histories_of(
    p_org UUID, p_jobs UUID[], p_after BIGINT, p_last BIGINT, p_limit BIGINT
)
RETURNS TABLE (
    org_id UUID, seq BIGINT, job_id UUID, job_seq BIGINT, ts TIMESTAMPTZ, recorded_at TIMESTAMPTZ, kind VARCHAR,
    prev_status VARCHAR, next_status VARCHAR, attempt INTEGER, actor VARCHAR, job_type VARCHAR, detail_json TEXT, labels TEXT,
    result TEXT
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    SELECT e.org_id, e.seq, e.job_id, e.job_seq, e.ts, e.recorded_at, e.kind, e.prev_status, e.next_status, e.attempt, e.actor,
        e.job_type, (e.detail_json - 'result')::text, e.labels::text, CASE WHEN e.result IS NOT NULL THEN 'null' END
    FROM unnest(p_jobs) WITH ORDINALITY AS wanted (id, n)
    CROSS JOIN LATERAL (SELECT * FROM jobledger.job j WHERE j.org_id = p_org AND j.id = wanted.id OFFSET 0) j
    CROSS JOIN LATERAL (
        SELECT * FROM jobledger.job_event e
        WHERE e.org_id = p_org AND e.job_id = j.id AND e.seq > CASE WHEN wanted.n = 1 THEN p_after ELSE 0 END AND e.seq <= p_last
            AND e.recorded_at >= j.created_at AND e.recorded_at <= j.last_recorded_at
        ORDER BY e.seq LIMIT p_limit
    ) e ORDER BY wanted.n, e.seq LIMIT p_limit;
END $$;

-- As page_of_log, with results as text.
CREATE FUNCTION jobledger.log_page(
    p_org UUID, p_after BIGINT, p_last BIGINT, p_types TEXT[], p_statuses TEXT[], p_leaving BOOLEAN, p_labels JSONB,
    p_limit BIGINT, p_max_bytes BIGINT
)
RETURNS TABLE (
    head_seq BIGINT, floor_seq BIGINT, job_status VARCHAR, bytes_through BIGINT, org_id UUID, seq BIGINT, job_id UUID,
    job_seq BIGINT, ts TIMESTAMPTZ, recorded_at TIMESTAMPTZ, kind VARCHAR, prev_status VARCHAR, next_status VARCHAR, attempt INTEGER, actor VARCHAR,
    job_type VARCHAR, detail_json TEXT, labels TEXT, result TEXT
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    WITH log AS MATERIALIZED (
        SELECT coalesce((SELECT b.seq FROM jobledger.org_batch b
                         WHERE b.org_id = p_org AND b.seq > h.seq ORDER BY b.seq DESC LIMIT 1), h.seq) AS head_seq,
            h.floor_seq,
            coalesce((SELECT m.month FROM jobledger.org_month m
                      WHERE m.org_id = p_org AND m.first_seq - 1 <= p_after ORDER BY m.month DESC LIMIT 1), '-infinity') AS since,
            coalesce((SELECT m.month FROM jobledger.org_month m
                      WHERE m.org_id = p_org AND m.first_seq > p_last ORDER BY m.month LIMIT 1), 'infinity') AS until
        FROM jobledger.org_head h WHERE h.org_id = p_org
    )
    SELECT log.head_seq, log.floor_seq, NULL::varchar, page.bytes_through, page.org_id, page.seq, page.job_id,
        page.job_seq, page.ts, page.recorded_at, page.kind, page.prev_status, page.next_status, page.attempt, page.actor,
        page.job_type, (page.detail_json - 'result')::text, page.labels::text, page.result
    FROM log LEFT JOIN LATERAL (
        SELECT found.*, sum(found.bytes) OVER (ORDER BY found.seq) AS bytes_through
        FROM (
            SELECT e.* FROM jobledger.job_event e
            WHERE e.org_id = p_org AND e.seq > p_after AND e.seq <= p_last
                AND e.recorded_at >= log.since AND e.recorded_at < log.until
                AND (p_types IS NULL OR e.job_type = ANY (p_types))
                AND (p_statuses IS NULL OR e.next_status = ANY (p_statuses) OR p_leaving AND e.prev_status = ANY (p_statuses))
                AND (p_labels IS NULL OR e.labels @> p_labels)
            ORDER BY e.seq LIMIT p_limit
        ) found
    ) page ON page.bytes_through - page.bytes <= p_max_bytes
    ORDER BY page.seq;
END $$;

-- As page_of_job, with results as text.
CREATE FUNCTION jobledger.job_page(
    p_org UUID, p_job UUID, p_after BIGINT, p_types TEXT[], p_statuses TEXT[], p_leaving BOOLEAN, p_labels JSONB,
    p_limit BIGINT, p_max_bytes BIGINT
)
RETURNS TABLE (
    head_seq BIGINT, floor_seq BIGINT, job_status VARCHAR, bytes_through BIGINT, org_id UUID, seq BIGINT, job_id UUID,
    job_seq BIGINT, ts TIMESTAMPTZ, recorded_at TIMESTAMPTZ, kind VARCHAR, prev_status VARCHAR, next_status VARCHAR, attempt INTEGER, actor VARCHAR,
    job_type VARCHAR, detail_json TEXT, labels TEXT, result TEXT
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    WITH log AS MATERIALIZED (
        SELECT coalesce((SELECT b.seq FROM jobledger.org_batch b
                         WHERE b.org_id = p_org AND b.seq > h.seq ORDER BY b.seq DESC LIMIT 1), h.seq) AS head_seq,
            h.floor_seq, j.status, j.created_at AS since, j.last_recorded_at AS until
        FROM jobledger.org_head h LEFT JOIN jobledger.job j ON j.org_id = p_org AND j.id = p_job
        WHERE h.org_id = p_org
    )
    SELECT log.head_seq, log.floor_seq, log.status, page.bytes_through, page.org_id, page.seq, page.job_id,
        page.job_seq, page.ts, page.recorded_at, page.kind, page.prev_status, page.next_status, page.attempt, page.actor,
        page.job_type, (page.detail_json - 'result')::text, page.labels::text, page.result
    FROM log LEFT JOIN LATERAL (
        SELECT found.*, sum(found.bytes) OVER (ORDER BY found.seq) AS bytes_through
        FROM (
            SELECT e.* FROM jobledger.job_event e
            WHERE e.org_id = p_org AND e.job_id = p_job AND e.seq > p_after
                AND e.recorded_at >= log.since AND e.recorded_at <= log.until
                AND (p_types IS NULL OR e.job_type = ANY (p_types))
                AND (p_statuses IS NULL OR e.next_status = ANY (p_statuses) OR p_leaving AND e.prev_status = ANY (p_statuses))
                AND (p_labels IS NULL OR e.labels @> p_labels)
            ORDER BY e.seq LIMIT p_limit
        ) found
    ) page ON page.bytes_through - page.bytes <= p_max_bytes
    ORDER BY page.seq;
END $$;
