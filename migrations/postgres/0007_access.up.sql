-- API tokens, and jobs and logs that are compared by when they were written, too.

-- Who may call: the SHA-256 of each token's secret. A token carries its org's id, so that it is looked up as of that org.
CREATE TABLE jobledger.api_token (
    org_id     UUID        NOT NULL,                -- ffffffff-ffff-ffff-ffff-ffffffffffff: of no org, for operators
    id         UUID        NOT NULL,
    digest     BYTEA       NOT NULL CHECK (length(digest) = 32),
    name       VARCHAR(255) NOT NULL,
    roles      TEXT        NOT NULL,                -- separated by commas
    created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    expires_at TIMESTAMPTZ,
    revoked_at TIMESTAMPTZ,
    PRIMARY KEY (org_id, id),
    UNIQUE (org_id, digest)
);
ALTER TABLE jobledger.api_token ENABLE ROW LEVEL SECURITY;
ALTER TABLE jobledger.api_token FORCE ROW LEVEL SECURITY;
CREATE POLICY org ON jobledger.api_token
    USING (org_id = (SELECT nullif(current_setting('app.current_org_id', true), '')::uuid));
-- Whoever owns the tables makes tokens, lists and revokes them; who serves only looks them up.
CREATE POLICY owner ON jobledger.api_token TO CURRENT_USER USING (true);

-- Raised whenever a token is made or revoked, so that servers know when to look again. 0: there has never been one.
ALTER TABLE jobledger.ledger ADD COLUMN credentials BIGINT NOT NULL DEFAULT 0;

CREATE FUNCTION jobledger.read_token(p_org UUID, p_digest BYTEA)
RETURNS SETOF jobledger.api_token LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY SELECT t.* FROM jobledger.api_token t WHERE t.org_id = p_org AND t.digest = p_digest;
END $$;

-- As those of the same names, which compare less: a log that was lost in part with its server, and has come as far again, is not the
-- same. The others stay for servers of before.
CREATE FUNCTION jobledger.resume_batch(p_org UUID, p_seq BIGINT, p_recorded_at TIMESTAMPTZ, p_ready_gen BIGINT)
RETURNS TIMESTAMPTZ LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    head jobledger.org_head;
    last RECORD;
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    SELECT h.* INTO head FROM jobledger.org_head h WHERE h.org_id = p_org FOR UPDATE;
    SELECT b.seq, b.recorded_at, b.ready_gen INTO last FROM jobledger.org_batch b
    WHERE b.org_id = p_org AND b.seq > head.seq ORDER BY b.seq DESC LIMIT 1;
    -- In another isolation the lock would be won, and what was committed meanwhile not be seen.
    IF current_setting('transaction_isolation') <> 'read committed' OR coalesce(last.seq, head.seq) IS DISTINCT FROM p_seq
        OR coalesce(last.recorded_at, head.recorded_at) IS DISTINCT FROM p_recorded_at
        OR greatest(last.ready_gen, head.ready_gen) IS DISTINCT FROM p_ready_gen THEN
        RAISE EXCEPTION 'the log has moved on' USING ERRCODE = 'JL001';
    END IF;
    RETURN clock_timestamp();
END $$;

CREATE FUNCTION jobledger.resume_batch(
    p_org UUID, p_seq BIGINT, p_recorded_at TIMESTAMPTZ, p_ready_gen BIGINT,
    p_jobs UUID[], p_expire TIMESTAMPTZ[], p_confirmed BOOLEAN[], p_due TIMESTAMPTZ[])
RETURNS TIMESTAMPTZ LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    clock TIMESTAMPTZ := jobledger.resume_batch(p_org, p_seq, p_recorded_at, p_ready_gen);
BEGIN
    IF cardinality(p_jobs) IS DISTINCT FROM (
        SELECT count(*) FROM unnest(p_jobs, p_expire, p_confirmed, p_due) AS wanted (id, expires_at, is_confirmed, due_at)
        CROSS JOIN LATERAL (SELECT FROM jobledger.job j WHERE j.org_id = p_org AND j.id = wanted.id
            AND j.lease_expires_at IS NOT DISTINCT FROM wanted.expires_at
            AND j.lease_confirmed = wanted.is_confirmed
            AND j.due_at IS NOT DISTINCT FROM wanted.due_at OFFSET 0) same
    ) THEN
        RAISE EXCEPTION 'a job is not as it was left' USING ERRCODE = 'JL001';
    END IF;
    RETURN clock;
END $$;

CREATE FUNCTION jobledger.unchanged_jobs(
    p_orgs UUID[], p_ends INTEGER[], p_jobs UUID[], p_seqs BIGINT[], p_recorded TIMESTAMPTZ[],
    p_expire TIMESTAMPTZ[], p_confirmed BOOLEAN[], p_due TIMESTAMPTZ[])
RETURNS SETOF BIGINT LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    org UUID;
    first INTEGER := 1;
BEGIN
    FOR i IN 1 .. cardinality(p_orgs) LOOP
        org := p_orgs[i];
        PERFORM set_config('app.current_org_id', org::text, true);
        RETURN QUERY
        SELECT first + wanted.n - 2
        FROM unnest(p_jobs[first : p_ends[i]], p_seqs[first : p_ends[i]], p_recorded[first : p_ends[i]],
            p_expire[first : p_ends[i]], p_confirmed[first : p_ends[i]], p_due[first : p_ends[i]])
            WITH ORDINALITY AS wanted (id, last_seq, last_recorded_at, expires_at, is_confirmed, due_at, n)
        CROSS JOIN LATERAL (SELECT FROM jobledger.job j WHERE j.org_id = org AND j.id = wanted.id
            AND j.last_seq = wanted.last_seq
            AND j.last_recorded_at = wanted.last_recorded_at
            AND j.lease_expires_at IS NOT DISTINCT FROM wanted.expires_at
            AND j.lease_confirmed = wanted.is_confirmed
            AND j.due_at IS NOT DISTINCT FROM wanted.due_at OFFSET 0) same;
        first := p_ends[i] + 1;
    END LOOP;
END $$;
