-- As resume_batch, for a batch that rests on jobs that its server remembers: an error, too, unless they are as it has left them. Of
-- what the log tells its end does; a lease may have been extended besides.
CREATE FUNCTION jobledger.resume_batch(
    p_org UUID, p_seq BIGINT, p_ready_gen BIGINT, p_jobs UUID[], p_expire TIMESTAMPTZ[], p_confirmed BOOLEAN[], p_due TIMESTAMPTZ[])
RETURNS TIMESTAMPTZ LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    clock TIMESTAMPTZ := jobledger.resume_batch(p_org, p_seq, p_ready_gen);
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

-- Which of several jobs, of one or more orgs, are as they are here: the place of each among p_jobs, from 0. Of each org they are those
-- between the ends of the last and its own.
CREATE FUNCTION jobledger.unchanged_jobs(
    p_orgs UUID[], p_ends INTEGER[], p_jobs UUID[], p_seqs BIGINT[], p_expire TIMESTAMPTZ[], p_confirmed BOOLEAN[], p_due TIMESTAMPTZ[])
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
        FROM unnest(p_jobs[first : p_ends[i]], p_seqs[first : p_ends[i]], p_expire[first : p_ends[i]],
            p_confirmed[first : p_ends[i]], p_due[first : p_ends[i]])
            WITH ORDINALITY AS wanted (id, last_seq, expires_at, is_confirmed, due_at, n)
        CROSS JOIN LATERAL (SELECT FROM jobledger.job j WHERE j.org_id = org AND j.id = wanted.id
            AND j.last_seq = wanted.last_seq
            AND j.lease_expires_at IS NOT DISTINCT FROM wanted.expires_at
            AND j.lease_confirmed = wanted.is_confirmed
            AND j.due_at IS NOT DISTINCT FROM wanted.due_at OFFSET 0) same;
        first := p_ends[i] + 1;
    END LOOP;
END $$;
