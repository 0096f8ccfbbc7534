-- Several jobs of one or more orgs in one call: of each org those between the ends of the last and its own. n is a job's place
-- among p_ids, from 0. Of what is larger than p_most the payload and the result are left out.
CREATE FUNCTION jobledger.read_jobs(p_orgs UUID[], p_ends INTEGER[], p_ids UUID[], p_most INTEGER)
RETURNS TABLE (
    n BIGINT, is_large BOOLEAN, org_id UUID, id UUID, type VARCHAR, max_attempts INTEGER, priority INTEGER,
    idempotency_key VARCHAR, request_digest BYTEA, requested_by VARCHAR, labels TEXT, retry_initial BIGINT,
    retry_multiplier FLOAT8, retry_max BIGINT, run_timeout BIGINT, payload_bytes INTEGER, created_at TIMESTAMPTZ,
    created_seq BIGINT, status VARCHAR, attempt INTEGER, failures INTEGER, updated_at TIMESTAMPTZ, started_at TIMESTAMPTZ,
    attempt_started_at TIMESTAMPTZ, finished_at TIMESTAMPTZ, scheduled_at TIMESTAMPTZ, ready_at TIMESTAMPTZ,
    cancel_requested BOOLEAN, outcome_digest BYTEA, outcome_epoch BIGINT, lease_worker VARCHAR, lease_granted BIGINT,
    lease_expires_at TIMESTAMPTZ, lease_request VARCHAR, lease_confirmed BOOLEAN, lease_epoch BIGINT, retry_request VARCHAR,
    due_at TIMESTAMPTZ, last_error_code VARCHAR, last_error_message TEXT, result_seq BIGINT, result_recorded_at TIMESTAMPTZ,
    last_job_seq BIGINT, last_seq BIGINT, last_recorded_at TIMESTAMPTZ, stage TEXT, progress INTEGER, payload TEXT,
    result_detail TEXT
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
        SELECT first + wanted.n - 2, size.is_large, j.org_id, j.id, j.type, j.max_attempts, j.priority, j.idempotency_key,
            j.request_digest, j.requested_by, j.labels::text, j.retry_initial, j.retry_multiplier, j.retry_max, j.run_timeout,
            j.payload_bytes, j.created_at, j.created_seq, j.status, j.attempt, j.failures, j.updated_at, j.started_at,
            j.attempt_started_at, j.finished_at, j.scheduled_at, j.ready_at, j.cancel_requested, j.outcome_digest,
            j.outcome_epoch, j.lease_worker, j.lease_granted, j.lease_expires_at, j.lease_request, j.lease_confirmed,
            j.lease_epoch, j.retry_request, j.due_at, j.last_error_code, j.last_error_message, j.result_seq,
            j.result_recorded_at, j.last_job_seq, j.last_seq, j.last_recorded_at, e.detail_json ->> 'stage',
            (e.detail_json ->> 'progress')::integer,
            CASE WHEN NOT size.is_large THEN p.payload::text END, CASE WHEN NOT size.is_large THEN r.detail_json::text END
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

-- As begin_batch, for a batch that begins where its server has left the log: an error unless it still ends there, and no claim could
-- have been served since. The clock.
CREATE FUNCTION jobledger.resume_batch(p_org UUID, p_seq BIGINT, p_ready_gen BIGINT)
RETURNS TIMESTAMPTZ LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    head jobledger.org_head;
    last RECORD;
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    SELECT h.* INTO head FROM jobledger.org_head h WHERE h.org_id = p_org FOR UPDATE;
    SELECT b.seq, b.ready_gen INTO last FROM jobledger.org_batch b
    WHERE b.org_id = p_org AND b.seq > head.seq ORDER BY b.seq DESC LIMIT 1;
    -- In another isolation the lock would be won, and what was committed meanwhile not be seen.
    IF current_setting('transaction_isolation') <> 'read committed' OR coalesce(last.seq, head.seq) IS DISTINCT FROM p_seq
        OR greatest(last.ready_gen, head.ready_gen) IS DISTINCT FROM p_ready_gen THEN
        RAISE EXCEPTION 'the log has moved on' USING ERRCODE = 'JL001';
    END IF;
    RETURN clock_timestamp();
END $$;
