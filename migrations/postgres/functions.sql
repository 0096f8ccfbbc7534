-- Functions that name the org to row-level security and then read or write, in one round trip.
--
-- `jobledger migrate up`, and a server at its start, apply this file if it has changed. Every change has to raise its version
-- (FUNCTIONS in store/migrations.rs). All functions are dropped first, except those that run with their owner's rights. These are
-- only replaced, so that the grants to call them stay.

-- The row type of jobs that are read: the position among the wanted jobs, whether the job is large, its last event, its row, and
-- its stage, progress, payload and result. Nothing selects from the view.
CREATE VIEW jobledger.found_job AS
SELECT NULL::bigint AS n, NULL::boolean AS is_large, e.image AS event_image, e.next_status::text AS event_status, e.attempt AS event_attempt,
    e.ts AS event_ts, e.job_seq AS event_job_seq, e.seq AS event_seq, e.recorded_at AS event_recorded_at, NULL::text AS extension, j.*, NULL::text AS stage,
    NULL::integer AS progress, NULL::text AS payload, NULL::text AS result
FROM jobledger.job j, jobledger.job_event e WHERE false;

-- The last lease extension of a running job since its last event, in a record beyond the base (store/extension.rs). Not a
-- subquery of the statements that call it: most find no extension, and its setup would take longer than the rest of them.
CREATE OR REPLACE FUNCTION jobledger.last_extension(p_org UUID, p_job UUID, p_seq BIGINT)
RETURNS TEXT LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
DECLARE
    digits TEXT := encode(uuid_send(p_job), 'hex');
BEGIN
    RETURN (
        SELECT substr(x.extensions, strpos(x.extensions, digits) + 35, 64) FROM jobledger.org_record x
        WHERE x.org_id = p_org AND x.seq >= p_seq AND x.extensions IS NOT NULL AND strpos(x.extensions, digits) > 0
            AND x.n > (SELECT h.base_n FROM jobledger.org_head h WHERE h.org_id = p_org)
        ORDER BY x.seq DESC, x.n DESC LIMIT 1);
END $$;

-- The same for reads that other reads wait for: '?' if the search takes more than 64 records or 64 KiB. The job is then read in a
-- turn of its own (store/extension.rs).
CREATE OR REPLACE FUNCTION jobledger.near_extension(p_org UUID, p_job UUID, p_seq BIGINT)
RETURNS TEXT LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
DECLARE
    records BIGINT;
    bytes BIGINT;
BEGIN
    SELECT count(*), sum(near.bytes) INTO records, bytes FROM (
        SELECT octet_length(x.extensions) AS bytes FROM jobledger.org_record x
        WHERE x.org_id = p_org AND x.seq >= p_seq AND x.extensions IS NOT NULL
            AND x.n > (SELECT h.base_n FROM jobledger.org_head h WHERE h.org_id = p_org)
        ORDER BY x.seq DESC, x.n DESC LIMIT 65) near;
    RETURN CASE WHEN records > 64 OR bytes > 65536 THEN '?' WHEN records > 0 THEN jobledger.last_extension(p_org, p_job, p_seq) END;
END $$;

-- The last event of a job from p_seq on. If a running job's row is behind, the image of this event has the job's state, and the
-- last lease extension since changes it. A finished job has no event after p_recorded_at. PostgreSQL inlines the function.
CREATE OR REPLACE FUNCTION jobledger.last_event(p_org UUID, p_job UUID, p_seq BIGINT, p_recorded_at TIMESTAMPTZ, p_finished_at TIMESTAMPTZ)
RETURNS TABLE (
    image TEXT, next_status TEXT, attempt INTEGER, ts TIMESTAMPTZ, job_seq BIGINT, seq BIGINT, recorded_at TIMESTAMPTZ,
    detail_json JSONB, extension TEXT
)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT e.image, e.next_status::text, e.attempt, e.ts, e.job_seq, e.seq, e.recorded_at, e.detail_json,
        CASE WHEN e.next_status = 'running' THEN jobledger.last_extension(p_org, p_job, e.seq) END
    FROM jobledger.job_event e
    WHERE e.org_id = p_org AND e.job_id = p_job AND e.seq >= p_seq AND e.recorded_at >= p_recorded_at
        AND e.recorded_at <= CASE WHEN p_finished_at IS NULL THEN 'infinity' ELSE p_recorded_at END
    ORDER BY e.seq DESC LIMIT 1
$$;

-- True of a ready job. PostgreSQL inlines the function, so the body has to be the condition of the indexes over ready jobs.
CREATE OR REPLACE FUNCTION jobledger.is_ready(p_status VARCHAR, p_due_at TIMESTAMPTZ)
RETURNS BOOLEAN LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT p_status = 'queued' AND p_due_at IS NULL $$;

-- A lower bound of recorded_at for an org's events after the seq p_after, by which a read skips earlier partitions.
CREATE OR REPLACE FUNCTION jobledger.month_before(p_org UUID, p_after BIGINT)
RETURNS TIMESTAMPTZ LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT m.month FROM jobledger.org_month m
                     WHERE m.org_id = p_org AND m.first_seq - 1 <= p_after ORDER BY m.month DESC LIMIT 1), '-infinity')
$$;

-- Names the transaction's orgs to row-level security.
CREATE OR REPLACE FUNCTION jobledger.name_orgs(p_orgs UUID[])
RETURNS VOID LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', CASE WHEN cardinality(p_orgs) = 1 THEN p_orgs[1]::text ELSE '' END, true),
        set_config('app.current_org_ids', CASE WHEN cardinality(p_orgs) = 1 THEN '' ELSE array_to_string(p_orgs, ',') END, true);
END $$;

-- Names the transaction's orgs and locks their heads. For one org it waits for the lock, and makes a missing head. For several it
-- locks the heads that exist and are free, and only these orgs stay named. Then it reads the clock and the ends of the logs, in
-- statements whose snapshots are taken after the locks were won. is_other: the log has another record, or none, where the caller
-- expects its own. If no head was locked, the row has only the clock.
CREATE OR REPLACE FUNCTION jobledger.begin_batch(p_orgs UUID[], p_n BIGINT[], p_records BIGINT[])
RETURNS TABLE (
    clock TIMESTAMPTZ, org_id UUID, is_other BOOLEAN, seq BIGINT, floor_seq BIGINT, recorded_at TIMESTAMPTZ, types BIGINT, ready_gen BIGINT,
    jobs BIGINT, bytes BIGINT, org_seq BIGINT, n BIGINT, record BIGINT, folded_seq BIGINT, folded_n BIGINT, removals BIGINT, base_seq BIGINT, base_n BIGINT
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    held UUID[] := p_orgs;
    now TIMESTAMPTZ;
BEGIN
    PERFORM jobledger.name_orgs(p_orgs);
    IF cardinality(p_orgs) = 1 THEN
        PERFORM FROM jobledger.org_head h WHERE h.org_id = p_orgs[1] FOR UPDATE;
        IF NOT FOUND THEN
            INSERT INTO jobledger.org_head (org_id) VALUES (p_orgs[1]) ON CONFLICT DO NOTHING;
            PERFORM FROM jobledger.org_head h WHERE h.org_id = p_orgs[1] FOR UPDATE;
        END IF;
    ELSE
        held := ARRAY(SELECT head.org_id FROM unnest(p_orgs) AS wanted (org_id) CROSS JOIN LATERAL (
            SELECT h.org_id FROM jobledger.org_head h WHERE h.org_id = wanted.org_id FOR UPDATE SKIP LOCKED) head);
        PERFORM jobledger.name_orgs(held);
    END IF;
    now := clock_timestamp();
    RETURN QUERY SELECT now, h.org_id, wanted.n > coalesce(last.n, h.n) OR wanted.n = h.n AND wanted.record <> h.record OR EXISTS (
            SELECT FROM jobledger.org_record r WHERE r.org_id = wanted.org_id AND r.n = wanted.n AND r.id <> wanted.record),
        coalesce(last.seq, h.seq), h.floor_seq, coalesce(last.recorded_at, h.recorded_at), h.types,
        coalesce(last.ready_gen, h.ready_gen), coalesce(last.jobs, h.jobs), coalesce(last.bytes, h.bytes), h.org_seq, coalesce(last.n, h.n), coalesce(last.id, h.record), h.seq, h.n, h.removals,
        coalesce(last.base_seq, h.base_seq), coalesce(last.base_n, h.base_n)
    FROM (VALUES (1)) one LEFT JOIN (
        unnest(p_orgs, p_n, p_records) AS wanted (org_id, n, record)
        CROSS JOIN LATERAL (
            SELECT * FROM jobledger.org_head h WHERE h.org_id = wanted.org_id AND h.org_id = ANY (held) OFFSET 0) h
        LEFT JOIN LATERAL (
            SELECT r.seq, r.recorded_at, r.ready_gen, r.jobs, r.bytes, r.n, r.id, r.base_seq, r.base_n FROM jobledger.org_record r
            WHERE r.org_id = wanted.org_id AND r.n > h.n ORDER BY r.n DESC LIMIT 1) last ON true
    ) ON true;
END $$;

-- Like begin_batch, for a batch that begins from cached states: fails with JL001 unless these are the last records of the logs.
-- For several orgs it waits for no head. Returns the clock.
CREATE OR REPLACE FUNCTION jobledger.resume_batch(p_orgs UUID[], p_n BIGINT[], p_records BIGINT[])
RETURNS TIMESTAMPTZ LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    held UUID[] := p_orgs;
    moved_on UUID[];
BEGIN
    PERFORM jobledger.name_orgs(p_orgs);
    IF cardinality(p_orgs) = 1 THEN
        PERFORM FROM jobledger.org_head h WHERE h.org_id = p_orgs[1] FOR UPDATE;
    ELSE
        held := ARRAY(SELECT head.org_id FROM unnest(p_orgs) AS wanted (org_id) CROSS JOIN LATERAL (
            SELECT h.org_id FROM jobledger.org_head h WHERE h.org_id = wanted.org_id FOR UPDATE SKIP LOCKED) head);
    END IF;
    moved_on := ARRAY(
        SELECT wanted.org_id FROM unnest(p_orgs, p_n, p_records) AS wanted (org_id, n, record)
        LEFT JOIN LATERAL (
            SELECT h.n, h.record FROM jobledger.org_head h WHERE h.org_id = wanted.org_id AND h.org_id = ANY (held) OFFSET 0) h ON true
        LEFT JOIN LATERAL (
            SELECT r.n, r.id FROM jobledger.org_record r
            WHERE r.org_id = wanted.org_id AND r.n > h.n ORDER BY r.n DESC LIMIT 1) last ON true
        WHERE (coalesce(last.n, h.n), coalesce(last.id, h.record)) IS DISTINCT FROM (wanted.n, wanted.record));
    -- At another isolation level the query above would not see what was committed while it waited for the lock.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        moved_on := p_orgs;
    END IF;
    IF cardinality(moved_on) > 0 THEN
        RAISE EXCEPTION 'the log has moved on: %', array_to_string(moved_on, ', ') USING ERRCODE = 'JL001';
    END IF;
    RETURN clock_timestamp();
END $$;

-- The running jobs of some orgs whose rows are behind. If the server has a cached state of an org, and the log has its record
-- (p_n, p_records), only the jobs that changed since, finished ones included. The first row of an org says whether the log has
-- that record (is_known), and which rows were written without an event since (quiet). Then come the jobs, each with the record of
-- its last lease extension, if that counts, and the first event that its row lacks, if any.
CREATE OR REPLACE FUNCTION jobledger.read_unfolded(
    p_orgs UUID[], p_base_seqs BIGINT[], p_base_ns BIGINT[], p_n BIGINT[], p_records BIGINT[], p_seqs BIGINT[])
RETURNS TABLE (
    org UUID, is_known BOOLEAN, quiet UUID[], extended_n BIGINT, extended_at TIMESTAMPTZ, first_seq BIGINT, first_recorded_at TIMESTAMPTZ, first_prev_status VARCHAR,
    found jobledger.found_job
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
#variable_conflict use_column
DECLARE
    is_known BOOLEAN;
    after BIGINT;
    after_n BIGINT;
    since TIMESTAMPTZ;
BEGIN
    FOR place IN 1 .. cardinality(p_orgs) LOOP
        -- Not a state from long before the base: everything since its record would be read, folded or not.
        is_known := p_n[place] > 0 AND p_seqs[place] > p_base_seqs[place] - 16384 AND p_n[place] > p_base_ns[place] - 4096 AND (
            EXISTS (SELECT FROM jobledger.org_record r WHERE r.org_id = p_orgs[place] AND r.n = p_n[place] AND r.id = p_records[place])
            OR EXISTS (SELECT FROM jobledger.org_head h WHERE h.org_id = p_orgs[place] AND h.n = p_n[place] AND h.record = p_records[place]));
        after := CASE WHEN is_known THEN p_seqs[place] ELSE p_base_seqs[place] END;
        after_n := CASE WHEN is_known THEN p_n[place] ELSE p_base_ns[place] END;
        since := jobledger.month_before(p_orgs[place], after);
        RETURN QUERY SELECT p_orgs[place], is_known, ARRAY(
            SELECT unnest(r.quiet) FROM jobledger.org_record r
            WHERE r.org_id = p_orgs[place] AND r.n > p_n[place] AND r.quiet IS NOT NULL AND is_known), NULL::bigint, NULL::timestamptz,
            NULL::bigint, NULL::timestamptz, NULL::varchar, NULL::jobledger.found_job;
        RETURN QUERY
        SELECT p_orgs[place], NULL::boolean, NULL::uuid[], CASE WHEN x.n > p_base_ns[place] THEN x.n END, x.written_at, lacks.seq, lacks.recorded_at, lacks.prev_status::varchar, ROW(
            NULL, NULL, e.image, e.next_status, e.attempt, e.ts, e.job_seq, e.seq, e.recorded_at,
            CASE WHEN x.n IS NOT NULL THEN changed.said || '"' END, (j.whole).*, e.detail_json ->> 'stage', (e.detail_json ->> 'progress')::integer, NULL, NULL)::jobledger.found_job
        FROM (
            SELECT i.job_id, max(i.n) AS n, (array_agg(i.said ORDER BY i.n DESC) FILTER (WHERE i.said IS NOT NULL))[1] AS said FROM (
                (SELECT i.job_id, NULL::bigint AS n, NULL::text AS said FROM jobledger.job_event i
                 WHERE i.org_id = p_orgs[place] AND i.seq > after AND i.recorded_at >= since AND (is_known OR i.image IS NOT NULL)
                 ORDER BY i.seq OFFSET 0)
                UNION ALL
                (SELECT u.key::uuid, r.n, u.value FROM jobledger.org_record r CROSS JOIN LATERAL json_each_text(r.extensions::json) u
                 WHERE r.org_id = p_orgs[place] AND r.n > after_n AND r.extensions IS NOT NULL)) i
            GROUP BY i.job_id) changed
        CROSS JOIN LATERAL (
            SELECT j AS whole, j.* FROM jobledger.job j WHERE j.org_id = p_orgs[place] AND j.id = changed.job_id OFFSET 0) j
        CROSS JOIN LATERAL jobledger.last_event(p_orgs[place], j.id, j.last_seq, j.last_recorded_at, j.finished_at) e
        LEFT JOIN LATERAL (
            SELECT l.seq, l.recorded_at, l.prev_status FROM jobledger.job_event l
            WHERE l.org_id = p_orgs[place] AND l.job_id = j.id AND l.seq > j.last_seq AND l.recorded_at >= j.last_recorded_at
                AND j.finished_at IS NULL ORDER BY l.seq LIMIT 1) lacks ON true
        LEFT JOIN LATERAL (
            SELECT r.n, r.written_at FROM jobledger.org_record r
            WHERE r.org_id = p_orgs[place] AND r.n = changed.n AND r.seq >= e.seq AND e.next_status = 'running' OFFSET 0) x ON true;
    END LOOP;
END $$;

-- One job with its stage, progress, payload and result. The joins with events name job and seq: if a month was empty at planning,
-- PostgreSQL takes either index, so both have to find the event fast. A running job has no result, even if its row, which is
-- behind, names one.
CREATE OR REPLACE FUNCTION jobledger.read_job(p_org UUID, p_id UUID)
RETURNS SETOF jobledger.found_job
LANGUAGE plpgsql SECURITY INVOKER AS $$
#variable_conflict use_column
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    SELECT NULL::bigint, NULL::boolean, e.image, e.next_status, e.attempt, e.ts, e.job_seq, e.seq, e.recorded_at, e.extension, j.*,
        e.detail_json ->> 'stage', (e.detail_json ->> 'progress')::integer, coalesce(c.payload, p.payload), r.result
    FROM jobledger.job j
    LEFT JOIN LATERAL jobledger.last_event(p_org, j.id, j.last_seq, j.last_recorded_at, j.finished_at) e ON true
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_event r
        WHERE r.org_id = p_org AND r.job_id = j.id AND r.seq = j.result_seq AND r.recorded_at = j.result_recorded_at
            AND e.seq = j.last_seq OFFSET 0) r ON true
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_event e
        WHERE e.org_id = p_org AND e.job_id = j.id AND e.seq = j.created_seq AND e.recorded_at = j.payload_recorded_at OFFSET 0) c ON true
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_payload p
        WHERE p.org_id = p_org AND p.job_id = j.id AND j.payload_bytes > 0 AND j.payload_recorded_at IS NULL OFFSET 0) p ON true
    WHERE j.org_id = p_org AND j.id = p_id;
END $$;

-- Payloads and results of some jobs.
CREATE OR REPLACE FUNCTION jobledger.read_contents(p_org UUID, p_ids UUID[])
RETURNS TABLE (id UUID, payload TEXT, result TEXT)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    SELECT j.id, coalesce(c.payload, p.payload), r.result
    FROM unnest(p_ids) AS wanted (id)
    CROSS JOIN LATERAL (SELECT * FROM jobledger.job j WHERE j.org_id = p_org AND j.id = wanted.id OFFSET 0) j
    LEFT JOIN LATERAL jobledger.last_event(p_org, j.id, j.last_seq, j.last_recorded_at, j.finished_at) e ON true
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_event r
        WHERE r.org_id = p_org AND r.job_id = j.id AND r.seq = j.result_seq AND r.recorded_at = j.result_recorded_at
            AND e.seq = j.last_seq OFFSET 0) r ON true
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_event e
        WHERE e.org_id = p_org AND e.job_id = j.id AND e.seq = j.created_seq AND e.recorded_at = j.payload_recorded_at OFFSET 0) c ON true
    LEFT JOIN LATERAL (SELECT * FROM jobledger.job_payload p
        WHERE p.org_id = p_org AND p.job_id = j.id AND j.payload_bytes > 0 AND j.payload_recorded_at IS NULL OFFSET 0) p ON true;
END $$;

-- Several jobs of one or more orgs. The jobs of the i-th org are in p_ids after p_ends[i - 1] and up to p_ends[i]. Payload and
-- result are left out if they take more than p_most bytes, or if the job's lease extension takes long to find.
CREATE OR REPLACE FUNCTION jobledger.read_jobs(p_orgs UUID[], p_ends INTEGER[], p_ids UUID[], p_most INTEGER)
RETURNS SETOF jobledger.found_job
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
        SELECT first + wanted.n - 2, size.is_large, e.image, e.next_status, e.attempt, e.ts, e.job_seq, e.seq, e.recorded_at, x.extension, j.*,
            e.detail_json ->> 'stage', (e.detail_json ->> 'progress')::integer,
            CASE WHEN NOT size.is_large THEN coalesce(c.payload, p.payload) END, CASE WHEN NOT size.is_large THEN r.result END
        FROM unnest(p_ids[first : p_ends[i]]) WITH ORDINALITY AS wanted (id, n)
        CROSS JOIN LATERAL (SELECT * FROM jobledger.job j WHERE j.org_id = org AND j.id = wanted.id OFFSET 0) j
        LEFT JOIN LATERAL jobledger.last_event(org, j.id, j.last_seq, j.last_recorded_at, j.finished_at) e ON true
        LEFT JOIN LATERAL (SELECT * FROM jobledger.job_event r
            WHERE r.org_id = org AND r.job_id = j.id AND r.seq = j.result_seq AND r.recorded_at = j.result_recorded_at
                AND e.seq = j.last_seq OFFSET 0) r ON true
        LEFT JOIN LATERAL (SELECT * FROM jobledger.job_event e
            WHERE e.org_id = org AND e.job_id = j.id AND e.seq = j.created_seq AND e.recorded_at = j.payload_recorded_at OFFSET 0) c ON true
        LEFT JOIN LATERAL (SELECT * FROM jobledger.job_payload p
            WHERE p.org_id = org AND p.job_id = j.id AND j.payload_bytes > 0 AND j.payload_recorded_at IS NULL OFFSET 0) p ON true
        CROSS JOIN LATERAL (
            SELECT CASE WHEN e.next_status = 'running' THEN jobledger.near_extension(org, j.id, e.seq) END OFFSET 0) x (extension)
        CROSS JOIN LATERAL (
            SELECT j.payload_bytes + coalesce(r.bytes, 0) > p_most OR coalesce(x.extension = '?', false)) AS size (is_large);
        first := p_ends[i] + 1;
    END LOOP;
END $$;

-- The positions in p_jobs, from 0, of the jobs that are unchanged. p_orgs and p_ends are as in read_jobs. A job is unchanged if
-- its last event and its lease are. The lease is compared with the last extension (p_extensions), else with the row if that has
-- the last event. A job whose extension takes long to find counts as changed.
CREATE OR REPLACE FUNCTION jobledger.unchanged_jobs(
    p_orgs UUID[], p_ends INTEGER[], p_jobs UUID[], p_seqs BIGINT[], p_recorded TIMESTAMPTZ[],
    p_expire TIMESTAMPTZ[], p_confirmed BOOLEAN[], p_due TIMESTAMPTZ[], p_extensions TEXT[])
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
            p_expire[first : p_ends[i]], p_confirmed[first : p_ends[i]], p_due[first : p_ends[i]], p_extensions[first : p_ends[i]])
            WITH ORDINALITY AS wanted (id, last_seq, last_recorded_at, expires_at, is_confirmed, due_at, extension, n)
        CROSS JOIN LATERAL (SELECT * FROM jobledger.job j WHERE j.org_id = org AND j.id = wanted.id OFFSET 0) j
        CROSS JOIN LATERAL jobledger.last_event(org, j.id, j.last_seq, j.last_recorded_at, j.finished_at) e
        -- A job with the same last event is still leased, or still not leased.
        CROSS JOIN LATERAL (SELECT CASE WHEN wanted.expires_at IS NOT NULL THEN jobledger.near_extension(org, j.id, e.seq) END OFFSET 0) x (extension)
        WHERE e.seq = wanted.last_seq AND e.recorded_at = wanted.last_recorded_at
            AND CASE WHEN x.extension IS NOT NULL THEN starts_with(x.extension, wanted.extension)
                ELSE e.seq > j.last_seq OR j.lease_expires_at IS NOT DISTINCT FROM wanted.expires_at
                AND j.lease_confirmed = wanted.is_confirmed
                AND j.due_at IS NOT DISTINCT FROM wanted.due_at END;
        first := p_ends[i] + 1;
    END LOOP;
END $$;

-- Jobs that may match a list's filters, those after the position p_after in the list's order, at most p_scan. They are found by
-- their key if p_idempotency_key is given, by a label if p_key names one, else by status, and finished ones by type too if p_types
-- names any. p_since is given if running jobs whose rows say queued are wanted, but queued ones are not: their events have been
-- recorded since then, and come after p_base. There is a function for each order.
DO $do$
DECLARE
    list_order RECORD;
BEGIN
    FOR list_order IN SELECT * FROM (VALUES ('newest_candidates', '<', 'DESC'), ('oldest_candidates', '>', 'ASC')) v (name, beyond, sort) LOOP
        EXECUTE replace(replace(replace($make$
CREATE FUNCTION jobledger.NAME(
    p_org UUID, p_after BIGINT, p_idempotency_key TEXT, p_key TEXT, p_value TEXT, p_types TEXT[], p_statuses TEXT[],
    p_base BIGINT, p_since TIMESTAMPTZ, p_scan BIGINT
)
RETURNS TABLE (created_seq BIGINT, id UUID) LANGUAGE plpgsql STABLE SECURITY INVOKER AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT found.created_seq, found.id FROM (
        (SELECT j.created_seq, j.id FROM jobledger.job j
         WHERE p_idempotency_key IS NOT NULL AND j.org_id = p_org AND j.idempotency_key = p_idempotency_key
             AND j.created_seq BEYOND p_after)
        UNION ALL
        (SELECT l.created_seq, l.job_id AS id FROM jobledger.job_label l
         WHERE p_idempotency_key IS NULL AND p_key IS NOT NULL
             AND l.org_id = p_org AND l.key = p_key AND l.value = p_value AND l.created_seq BEYOND p_after
         ORDER BY l.created_seq SORT LIMIT p_scan)
        UNION ALL
        (SELECT of_status.created_seq, of_status.id FROM unnest(p_statuses) AS wanted (status) CROSS JOIN LATERAL (
            SELECT j.created_seq, j.id FROM jobledger.job j
            WHERE j.org_id = p_org AND j.status = wanted.status AND j.created_seq BEYOND p_after
            ORDER BY j.created_seq SORT LIMIT p_scan) of_status
         WHERE p_idempotency_key IS NULL AND p_key IS NULL AND (p_types IS NULL OR wanted.status IN ('queued', 'running')))
        UNION ALL
        (SELECT of_type.created_seq, of_type.id
         FROM unnest(p_types) AS wanted (type)
         CROSS JOIN unnest(p_statuses) AS with_status (status)
         CROSS JOIN LATERAL (
            SELECT j.created_seq, j.id FROM jobledger.job j
            WHERE j.org_id = p_org AND j.type = wanted.type AND j.status = with_status.status AND j.finished_at IS NOT NULL
                AND j.created_seq BEYOND p_after
            ORDER BY j.created_seq SORT LIMIT p_scan) of_type
         WHERE p_idempotency_key IS NULL AND p_key IS NULL AND with_status.status NOT IN ('queued', 'running'))
        UNION ALL
        -- Running jobs whose rows are behind and say queued.
        (SELECT behind.created_seq, behind.id
         FROM (SELECT DISTINCT i.job_id FROM (
            SELECT i.job_id FROM jobledger.job_event i
            WHERE i.org_id = p_org AND i.seq > p_base AND i.recorded_at >= p_since
                AND i.prev_status = 'queued' AND i.next_status = 'running'
            ORDER BY i.seq OFFSET 0) i) i
         CROSS JOIN LATERAL (
            SELECT j.created_seq, j.id FROM jobledger.job j
            WHERE j.org_id = p_org AND j.id = i.job_id AND j.status = 'queued' AND j.created_seq BEYOND p_after OFFSET 0) behind
         WHERE p_idempotency_key IS NULL AND p_key IS NULL AND p_since IS NOT NULL
         ORDER BY behind.created_seq SORT LIMIT p_scan)
    ) found ORDER BY found.created_seq SORT LIMIT p_scan;
END $$
        $make$, 'NAME', list_order.name), 'BEYOND', list_order.beyond), 'SORT', list_order.sort);
    END LOOP;
END $do$;

-- A page of the matching jobs after the position p_after in the order that p_oldest chooses. At most p_scan candidates are
-- examined: examined is their number, and reached the created_seq of the last one. If no job matches, one row has these and the
-- head. A running job whose row is behind passes p_worker whatever worker it has.
CREATE OR REPLACE FUNCTION jobledger.list_jobs(
    p_org UUID, p_after BIGINT, p_oldest BOOLEAN, p_key TEXT, p_value TEXT, p_types TEXT[], p_statuses TEXT[], p_labels JSONB,
    p_requested_by TEXT, p_created_after TIMESTAMPTZ, p_created_before TIMESTAMPTZ, p_idempotency_key TEXT, p_error_code TEXT,
    p_worker TEXT, p_finished_after TIMESTAMPTZ, p_finished_before TIMESTAMPTZ, p_scan BIGINT, p_limit BIGINT
)
RETURNS TABLE (head_seq BIGINT, examined BIGINT, reached BIGINT, is_match BOOLEAN, found jobledger.found_job)
LANGUAGE plpgsql SECURITY INVOKER AS $$
#variable_conflict use_column
DECLARE
    head BIGINT;
    base BIGINT;
    base_n BIGINT;
    since TIMESTAMPTZ;
    sign BIGINT := CASE WHEN p_oldest THEN 1 ELSE -1 END;
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    -- The head is read before the jobs, so that a stream from the head on misses no later change of them.
    SELECT coalesce(last.seq, h.seq), coalesce(last.base_seq, h.base_seq), h.base_n INTO head, base, base_n
    FROM jobledger.org_head h LEFT JOIN LATERAL (
        SELECT r.seq, r.base_seq FROM jobledger.org_record r
        WHERE r.org_id = p_org AND r.n > h.n ORDER BY r.n DESC LIMIT 1) last ON true
    WHERE h.org_id = p_org;
    IF base < head AND 'running' = ANY (p_statuses) AND NOT 'queued' = ANY (p_statuses) THEN
        since := jobledger.month_before(p_org, base);
    END IF;
    RETURN QUERY
    WITH candidate AS MATERIALIZED (
        SELECT * FROM jobledger.newest_candidates(
            p_org, p_after, p_idempotency_key, p_key, p_value, p_types, p_statuses, base, since, p_scan) WHERE NOT p_oldest
        UNION ALL
        SELECT * FROM jobledger.oldest_candidates(
            p_org, p_after, p_idempotency_key, p_key, p_value, p_types, p_statuses, base, since, p_scan) WHERE p_oldest
    ), looked AS (
        SELECT c.created_seq, c.id, found.whole, e.image, e.next_status, e.attempt, e.ts, e.job_seq, e.seq, e.recorded_at, e.detail_json
        FROM candidate c
        CROSS JOIN LATERAL (SELECT j AS whole, j.* FROM jobledger.job j WHERE j.org_id = p_org AND j.id = c.id OFFSET 0) found
        LEFT JOIN LATERAL jobledger.last_event(p_org, found.id, found.last_seq, found.last_recorded_at, found.finished_at) e ON true
        WHERE (p_types IS NULL OR found.type = ANY (p_types))
            AND CASE WHEN e.seq > found.last_seq THEN 'running' ELSE found.status END = ANY (p_statuses)
            AND (p_labels IS NULL OR found.labels @> p_labels)
            AND (p_requested_by IS NULL OR found.requested_by = p_requested_by)
            AND (p_created_after IS NULL OR found.created_at >= p_created_after)
            AND (p_created_before IS NULL OR found.created_at < p_created_before)
            AND (p_error_code IS NULL OR found.last_error_code = p_error_code)
            AND (p_worker IS NULL OR e.seq > found.last_seq OR found.lease_worker = p_worker)
            AND (p_finished_after IS NULL OR found.finished_at >= p_finished_after)
            AND (p_finished_before IS NULL OR found.finished_at < p_finished_before)
    ), seen AS (
        SELECT count(*) AS examined, sign * max(sign * c.created_seq) AS reached FROM candidate c
    ), page AS MATERIALIZED (
        SELECT looked.* FROM looked ORDER BY sign * looked.created_seq LIMIT p_limit
    ), size AS MATERIALIZED (
        SELECT count(*) > 32 AS is_long FROM page WHERE page.next_status = 'running'
    ), extended AS MATERIALIZED (
        -- The last lease extension of each job, with the seq of its record. A long page reads all of them once, not once a job.
        SELECT jsonb_object_agg(said.key, r.seq || ':' || said.value ORDER BY r.n) AS by_job
        FROM jobledger.org_record r CROSS JOIN LATERAL json_each_text(r.extensions::json) said
        WHERE (SELECT size.is_long FROM size) AND r.org_id = p_org AND r.n > base_n AND r.extensions IS NOT NULL
    ), kept AS (
        SELECT page.*, CASE WHEN page.next_status IS DISTINCT FROM 'running' THEN NULL
            WHEN NOT (SELECT size.is_long FROM size) THEN jobledger.last_extension(p_org, page.id, page.seq)
            WHEN split_part(extended.by_job ->> encode(uuid_send(page.id), 'hex'), ':', 1)::bigint >= page.seq
            THEN split_part(extended.by_job ->> encode(uuid_send(page.id), 'hex'), ':', 2) || '"' END AS extension
        FROM page CROSS JOIN extended
    )
    SELECT coalesce(head, 0), seen.examined, seen.reached, page.created_seq IS NOT NULL, ROW(
        NULL, NULL, page.image, page.next_status, page.attempt, page.ts, page.job_seq, page.seq, page.recorded_at, page.extension,
        (page.whole).*,
        page.detail_json ->> 'stage', (page.detail_json ->> 'progress')::integer, NULL, NULL)::jobledger.found_job
    FROM seen LEFT JOIN kept page ON true
    ORDER BY sign * page.created_seq;
END $$;

-- A page of the log: at most p_limit matching events after p_after up to p_last. The page ends with the event that exceeds
-- p_max_bytes. Head and floor are of the same snapshot. If no event matches, one row has them alone.
CREATE OR REPLACE FUNCTION jobledger.read_log(
    p_org UUID, p_after BIGINT, p_last BIGINT, p_types TEXT[], p_statuses TEXT[], p_leaving BOOLEAN, p_labels JSONB,
    p_limit BIGINT, p_max_bytes BIGINT
)
RETURNS TABLE (
    head_seq BIGINT, floor_seq BIGINT, org_seq BIGINT, job_status VARCHAR, bytes_through BIGINT, org_id UUID, seq BIGINT, job_id UUID,
    job_seq BIGINT, ts TIMESTAMPTZ, recorded_at TIMESTAMPTZ, kind VARCHAR, prev_status VARCHAR, next_status VARCHAR, attempt INTEGER, actor VARCHAR,
    job_type VARCHAR, detail_json TEXT, labels TEXT, result TEXT
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    WITH log AS MATERIALIZED (
        SELECT coalesce((SELECT r.seq FROM jobledger.org_record r
                         WHERE r.org_id = p_org AND r.n > h.n ORDER BY r.n DESC LIMIT 1), h.seq) AS head_seq,
            h.floor_seq, h.org_seq,
            coalesce((SELECT m.month FROM jobledger.org_month m
                      WHERE m.org_id = p_org AND m.first_seq - 1 <= p_after ORDER BY m.month DESC LIMIT 1), '-infinity') AS since,
            coalesce((SELECT m.month FROM jobledger.org_month m
                      WHERE m.org_id = p_org AND m.first_seq > p_last ORDER BY m.month LIMIT 1), 'infinity') AS until
        FROM jobledger.org_head h WHERE h.org_id = p_org
    )
    SELECT log.head_seq, log.floor_seq, log.org_seq, NULL::varchar, page.bytes_through, page.org_id, page.seq, page.job_id,
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
                AND (p_labels IS NULL OR e.labels @> p_labels OR e.kind = 'erased'
                    OR e.kind = 'edited' AND e.detail_json -> 'edit' -> 'before' -> 'labels' @> p_labels)
            ORDER BY e.seq LIMIT p_limit
        ) found
    ) page ON page.bytes_through - page.bytes <= p_max_bytes
    ORDER BY page.seq;
END $$;

-- The events after p_after up to p_last that are about no single job.
CREATE OR REPLACE FUNCTION jobledger.read_org_events(p_org UUID, p_after BIGINT, p_last BIGINT)
RETURNS TABLE (org_id UUID, seq BIGINT, ts TIMESTAMPTZ, recorded_at TIMESTAMPTZ, kind VARCHAR, actor VARCHAR, detail_json TEXT)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    SELECT e.org_id, e.seq, e.ts, e.recorded_at, e.kind, e.actor, e.detail_json::text FROM jobledger.org_event e
    WHERE e.org_id = p_org AND e.seq > p_after AND e.seq <= p_last ORDER BY e.seq;
END $$;

-- A bulk operation.
CREATE OR REPLACE FUNCTION jobledger.read_bulk_operation(p_org UUID, p_id UUID)
RETURNS SETOF jobledger.bulk_operation LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY SELECT b.* FROM jobledger.bulk_operation b WHERE b.org_id = p_org AND b.id = p_id;
END $$;

-- Bulk operations before a time and id, or all if these are null, the newest first.
CREATE OR REPLACE FUNCTION jobledger.read_bulk_operations(p_org UUID, p_created_at TIMESTAMPTZ, p_id UUID, p_limit BIGINT)
RETURNS SETOF jobledger.bulk_operation LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY SELECT b.* FROM jobledger.bulk_operation b
    WHERE b.org_id = p_org
        AND (b.created_at, b.id) < (coalesce(p_created_at, 'infinity'), coalesce(p_id, 'ffffffff-ffff-ffff-ffff-ffffffffffff'))
    ORDER BY b.created_at DESC, b.id DESC LIMIT p_limit;
END $$;

-- Workers of an org after an id that were heard of within p_known_for microseconds.
CREATE OR REPLACE FUNCTION jobledger.read_workers(p_org UUID, p_after TEXT, p_known_for BIGINT, p_limit BIGINT)
RETURNS SETOF jobledger.worker LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY SELECT w.* FROM jobledger.worker w
    WHERE w.org_id = p_org AND w.id > p_after
        AND w.heard_at BETWEEN clock_timestamp() - p_known_for * interval '1 microsecond' AND clock_timestamp() + interval '1 minute'
    ORDER BY w.id LIMIT p_limit;
END $$;

-- A page of the log of one job, by the index over the events of jobs, and with the job's status.
CREATE OR REPLACE FUNCTION jobledger.read_job_log(
    p_org UUID, p_job UUID, p_after BIGINT, p_types TEXT[], p_statuses TEXT[], p_leaving BOOLEAN, p_labels JSONB,
    p_limit BIGINT, p_max_bytes BIGINT
)
RETURNS TABLE (
    head_seq BIGINT, floor_seq BIGINT, org_seq BIGINT, job_status VARCHAR, bytes_through BIGINT, org_id UUID, seq BIGINT, job_id UUID,
    job_seq BIGINT, ts TIMESTAMPTZ, recorded_at TIMESTAMPTZ, kind VARCHAR, prev_status VARCHAR, next_status VARCHAR, attempt INTEGER, actor VARCHAR,
    job_type VARCHAR, detail_json TEXT, labels TEXT, result TEXT
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    WITH log AS MATERIALIZED (
        SELECT coalesce((SELECT r.seq FROM jobledger.org_record r
                         WHERE r.org_id = p_org AND r.n > h.n ORDER BY r.n DESC LIMIT 1), h.seq) AS head_seq,
            h.floor_seq, h.org_seq, j.status, j.created_at AS since,
            CASE WHEN j.finished_at IS NULL THEN 'infinity' ELSE j.last_recorded_at END AS until
        FROM jobledger.org_head h LEFT JOIN jobledger.job j ON j.org_id = p_org AND j.id = p_job
        WHERE h.org_id = p_org
    )
    SELECT log.head_seq, log.floor_seq, log.org_seq, log.status, page.bytes_through, page.org_id, page.seq, page.job_id,
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
                AND (p_labels IS NULL OR e.labels @> p_labels OR e.kind = 'erased'
                    OR e.kind = 'edited' AND e.detail_json -> 'edit' -> 'before' -> 'labels' @> p_labels)
            ORDER BY e.seq LIMIT p_limit
        ) found
    ) page ON page.bytes_through - page.bytes <= p_max_bytes
    ORDER BY page.seq;
END $$;

-- The events of some jobs up to p_last, job by job; of the first job only those after p_after. Any result is returned as 'null'.
CREATE OR REPLACE FUNCTION jobledger.read_histories(
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
            AND e.recorded_at >= j.created_at
            AND e.recorded_at <= CASE WHEN j.finished_at IS NULL THEN 'infinity' ELSE j.last_recorded_at END
        ORDER BY e.seq LIMIT p_limit
    ) e ORDER BY wanted.n, e.seq LIMIT p_limit;
END $$;

-- The heads of some orgs' logs, and their ready_gen.
CREATE OR REPLACE FUNCTION jobledger.read_reaches(p_orgs UUID[])
RETURNS TABLE (org_id UUID, seq BIGINT, ready_gen BIGINT)
LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    org UUID;
BEGIN
    FOREACH org IN ARRAY p_orgs LOOP
        PERFORM set_config('app.current_org_id', org::text, true);
        RETURN QUERY
        SELECT org, coalesce(last.seq, h.seq), coalesce(last.ready_gen, h.ready_gen)
        FROM jobledger.org_head h LEFT JOIN LATERAL (
            SELECT r.seq, r.ready_gen FROM jobledger.org_record r
            WHERE r.org_id = org AND r.n > h.n ORDER BY r.n DESC LIMIT 1
        ) last ON true
        WHERE h.org_id = org;
    END LOOP;
END $$;

-- The token of an org with this digest.
CREATE OR REPLACE FUNCTION jobledger.read_token(p_org UUID, p_digest BYTEA)
RETURNS SETOF jobledger.api_token LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY SELECT t.* FROM jobledger.api_token t WHERE t.org_id = p_org AND t.digest = p_digest;
END $$;

-- Adds two arrays element by element. The shorter one counts as padded with zeros.
CREATE OR REPLACE FUNCTION jobledger.add_counts(a BIGINT[], b BIGINT[])
RETURNS BIGINT[]
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT CASE WHEN b = '{}' THEN a WHEN a = '{}' THEN b
        ELSE ARRAY(SELECT coalesce(pair.x, 0) + coalesce(pair.y, 0) FROM unnest(a, b) AS pair (x, y)) END
$$;

CREATE AGGREGATE jobledger.sum_counts(BIGINT[]) (SFUNC = jobledger.add_counts, STYPE = BIGINT[], INITCOND = '{}');

-- Converts a JSON array of numbers by its text: PostgreSQL inlines that, but would run a function with a SELECT for each row.
CREATE OR REPLACE FUNCTION jobledger.to_counts(p_json JSONB)
RETURNS BIGINT[]
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN p_json IS NULL THEN '{}' ELSE translate(p_json::text, '[] ', '{}')::bigint[] END
$$;

-- Counters, with the records that are not folded, and what happened within a window that ends now. The window begins at a whole
-- minute, or at a whole hour if it is longer than a day. Hours are added up, and the minutes before the first whole hour. With
-- p_width there is also a row for each bucket of that width (bucket is not null): for all types together or, with p_by_type, for
-- each. All rows are of one snapshot, and so of one head.
CREATE OR REPLACE FUNCTION jobledger.read_statistics(p_org UUID, p_types TEXT[], p_window INTERVAL, p_width SMALLINT, p_by_type BOOLEAN)
RETURNS TABLE (
    head_seq BIGINT, org_seq BIGINT, clock TIMESTAMPTZ, since TIMESTAMPTZ, type TEXT, bucket TIMESTAMPTZ,
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
    v_hours_since TIMESTAMPTZ := date_bin(interval '1 hour', v_since + interval '1 hour' - interval '1 microsecond', 'epoch');
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    WITH RECURSIVE log AS MATERIALIZED (
        SELECT h.n, coalesce((SELECT r.seq FROM jobledger.org_record r
                              WHERE r.org_id = p_org AND r.n > h.n ORDER BY r.n DESC LIMIT 1), h.seq) AS head_seq, h.org_seq
        FROM jobledger.org_head h WHERE h.org_id = p_org
    ), batch AS MATERIALIZED (
        SELECT r.recorded_at, change.key AS type, change.value
        -- ORDER BY has PostgreSQL search the index from log.n on. A join might walk all records of the org.
        FROM log CROSS JOIN LATERAL (
            SELECT r.recorded_at, r.counts FROM jobledger.org_record r WHERE r.org_id = p_org AND r.n > log.n ORDER BY r.n) r
        CROSS JOIN LATERAL jsonb_each(r.counts) change
        WHERE p_types IS NULL OR change.key = ANY (p_types)
    ), happened AS MATERIALIZED (
        SELECT s.width, s.start, s.type::text, s.created, s.started, s.succeeded, s.failed, s.retried, s.canceled, s.lost,
            CASE WHEN s.start < v_hours_since THEN s.waits END AS waits,
            CASE WHEN s.start < v_hours_since THEN s.runs END AS runs
        FROM jobledger.org_series s
        WHERE s.org_id = p_org AND s.width = 60 AND s.start >= v_since AND NOT s.removed
            AND (s.start < v_hours_since OR p_width = 60) AND (p_types IS NULL OR s.type = ANY (p_types))
        UNION ALL
        SELECT s.width, s.start, s.type::text, s.created, s.started, s.succeeded, s.failed, s.retried, s.canceled, s.lost, s.waits,
            s.runs
        FROM jobledger.org_series s
        WHERE s.org_id = p_org AND s.width = 3600 AND s.start >= v_hours_since AND NOT s.removed
            AND (p_types IS NULL OR s.type = ANY (p_types))
        UNION ALL
        SELECT w.width, date_bin(w.width * interval '1 second', batch.recorded_at, 'epoch'), batch.type,
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
            AND (w.width = 3600 OR batch.recorded_at < v_hours_since OR p_width = 60)
            AND (w.width = 60 OR batch.recorded_at >= v_hours_since)
    ), waiting AS MATERIALIZED (
        -- Types with ready jobs.
        SELECT of_type.type FROM (
            SELECT c.type::text, c.queued - c.scheduled AS ready
            FROM jobledger.org_counter c WHERE c.org_id = p_org AND (p_types IS NULL OR c.type = ANY (p_types))
            UNION ALL
            SELECT b.type, coalesce((b.value ->> 0)::bigint, 0) - coalesce((b.value ->> 6)::bigint, 0) FROM batch b
        ) of_type GROUP BY of_type.type HAVING sum(of_type.ready) > 0
    ), first_ready (type, priority, ready_at) AS (
        -- For each type and priority, the job that has been ready longest: one search of the index for each priority. Running
        -- jobs whose rows are behind and say queued are skipped.
        SELECT waiting.type, first.priority, first.ready_at
        FROM waiting CROSS JOIN LATERAL (
            SELECT j.priority, j.ready_at FROM jobledger.job j
            -- The range of types and the order by type make PostgreSQL use the index that begins with the type.
            WHERE j.org_id = p_org AND j.type >= waiting.type AND j.type <= waiting.type AND jobledger.is_ready(j.status, j.due_at)
                AND NOT EXISTS (SELECT FROM jobledger.last_event(p_org, j.id, j.last_seq + 1, j.last_recorded_at, NULL))
            ORDER BY j.type, j.priority DESC, j.ready_at LIMIT 1) first
        UNION ALL
        SELECT f.type, lower.priority, lower.ready_at FROM first_ready f CROSS JOIN LATERAL (
            SELECT j.priority, j.ready_at FROM jobledger.job j
            WHERE j.org_id = p_org AND j.type = f.type AND jobledger.is_ready(j.status, j.due_at) AND j.priority < f.priority
                AND NOT EXISTS (SELECT FROM jobledger.last_event(p_org, j.id, j.last_seq + 1, j.last_recorded_at, NULL))
            ORDER BY j.priority DESC, j.ready_at LIMIT 1) lower
    ), part (type, count_queued, count_running, count_succeeded, count_failed, count_canceled, count_dead_letter, count_scheduled, oldest, flow_created, flow_started, flow_succeeded, flow_failed, flow_retried, flow_canceled, flow_lost, waits, runs, is_counted) AS (
        -- A union that is added up, not a join: without statistics a join might compare each row with each.
        SELECT c.type::text, c.queued, c.running, c.succeeded, c.failed, c.canceled, c.dead_letter, c.scheduled, NULL::timestamptz, 0, 0, 0, 0, 0, 0, 0, NULL::bigint[], NULL::bigint[], true
        FROM jobledger.org_counter c WHERE c.org_id = p_org AND (p_types IS NULL OR c.type = ANY (p_types))
        UNION ALL
        SELECT b.type, coalesce((b.value ->> 0)::bigint, 0), coalesce((b.value ->> 1)::bigint, 0), coalesce((b.value ->> 2)::bigint, 0), coalesce((b.value ->> 3)::bigint, 0), coalesce((b.value ->> 4)::bigint, 0), coalesce((b.value ->> 5)::bigint, 0), coalesce((b.value ->> 6)::bigint, 0),
            NULL, 0, 0, 0, 0, 0, 0, 0, NULL, NULL, false
        FROM batch b
        UNION ALL
        SELECT f.type, 0, 0, 0, 0, 0, 0, 0, f.ready_at, 0, 0, 0, 0, 0, 0, 0, NULL, NULL, false FROM first_ready f
        UNION ALL
        SELECT f.type, 0, 0, 0, 0, 0, 0, 0, NULL, f.created, f.started, f.succeeded, f.failed, f.retried, f.canceled, f.lost, f.waits, f.runs, false
        FROM happened f WHERE f.width = 3600 OR f.start < v_hours_since
    ), summed AS (
        -- Adds histograms up by position: an aggregate over arrays would run a function for each row.
        SELECT one.type, array_agg(one.waits ORDER BY one.place) AS waits, array_agg(one.runs ORDER BY one.place) AS runs
        FROM (
            SELECT p.type, counted.place, coalesce(sum(counted.waits), 0)::bigint AS waits, coalesce(sum(counted.runs), 0)::bigint AS runs
            FROM part p CROSS JOIN LATERAL unnest(p.waits, p.runs) WITH ORDINALITY AS counted (waits, runs, place)
            GROUP BY p.type, counted.place
        ) one GROUP BY one.type
    ), summary AS (
        SELECT p.type, sum(p.count_queued)::bigint AS count_queued, sum(p.count_running)::bigint AS count_running, sum(p.count_succeeded)::bigint AS count_succeeded, sum(p.count_failed)::bigint AS count_failed, sum(p.count_canceled)::bigint AS count_canceled, sum(p.count_dead_letter)::bigint AS count_dead_letter, sum(p.count_scheduled)::bigint AS count_scheduled,
            min(p.oldest) AS oldest, sum(p.flow_created)::bigint AS flow_created, sum(p.flow_started)::bigint AS flow_started, sum(p.flow_succeeded)::bigint AS flow_succeeded, sum(p.flow_failed)::bigint AS flow_failed, sum(p.flow_retried)::bigint AS flow_retried, sum(p.flow_canceled)::bigint AS flow_canceled, sum(p.flow_lost)::bigint AS flow_lost,
            max(p.waits) AS waits, max(p.runs) AS runs
        FROM (
            SELECT part.type, part.count_queued, part.count_running, part.count_succeeded, part.count_failed, part.count_canceled, part.count_dead_letter, part.count_scheduled, part.oldest, part.flow_created, part.flow_started, part.flow_succeeded, part.flow_failed, part.flow_retried, part.flow_canceled, part.flow_lost,
                NULL::bigint[] AS waits, NULL::bigint[] AS runs, part.is_counted
            FROM part
            UNION ALL
            SELECT summed.type, 0, 0, 0, 0, 0, 0, 0, NULL, 0, 0, 0, 0, 0, 0, 0, summed.waits, summed.runs, false FROM summed
        ) p GROUP BY p.type
        -- The window may include what happened to a type whose last job was removed.
        HAVING bool_or(p.is_counted)
            OR sum(p.flow_created + p.flow_started + p.flow_succeeded + p.flow_failed + p.flow_retried + p.flow_canceled + p.flow_lost) > 0
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
    )
    SELECT log.head_seq, log.org_seq, clock_timestamp(), v_since, s.type, NULL::timestamptz,
        s.count_queued, s.count_running, s.count_succeeded, s.count_failed, s.count_canceled, s.count_dead_letter, s.count_scheduled, s.oldest,
        s.flow_created, s.flow_started, s.flow_succeeded, s.flow_failed, s.flow_retried, s.flow_canceled, s.flow_lost, s.waits, s.runs
    FROM log LEFT JOIN summary s ON true
    UNION ALL
    SELECT log.head_seq, log.org_seq, clock_timestamp(), v_since, s.type, s.start, NULL, NULL, NULL, NULL, NULL, NULL,
        NULL, NULL, s.created, s.started, s.succeeded, s.failed, s.retried, s.canceled, s.lost, NULL, NULL
    FROM log JOIN series s ON true;
END $$;

-- The settings of an org's types.
CREATE OR REPLACE FUNCTION jobledger.read_settings(p_org UUID)
RETURNS SETOF jobledger.org_type LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY SELECT t.* FROM jobledger.org_type t WHERE t.org_id = p_org;
END $$;

-- The stored series of some types, with the records that are not folded.
CREATE OR REPLACE FUNCTION jobledger.read_series(p_org UUID, p_types TEXT[])
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
        SELECT r.recorded_at, change.key, change.value
        FROM jobledger.org_head h CROSS JOIN LATERAL (
            SELECT r.recorded_at, r.counts FROM jobledger.org_record r WHERE r.org_id = p_org AND r.n > h.n ORDER BY r.n) r
        CROSS JOIN LATERAL jsonb_each(r.counts) change
        WHERE h.org_id = p_org
    ), log AS (
        SELECT coalesce(last.seq, h.seq) AS head_seq, coalesce(last.recorded_at, h.recorded_at) AS recorded_at
        FROM jobledger.org_head h LEFT JOIN LATERAL (
            SELECT r.seq, r.recorded_at FROM jobledger.org_record r
            WHERE r.org_id = p_org AND r.n > h.n ORDER BY r.n DESC LIMIT 1) last ON true
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

-- The number of events of jobs after p_after up to p_last, of different seqs that they have (places), and of their bytes; and the
-- number and bytes of events that are about no single job. In a whole log events and places equal p_last - p_after - org_events.
CREATE OR REPLACE FUNCTION jobledger.count_events(p_org UUID, p_after BIGINT, p_last BIGINT)
RETURNS TABLE (events BIGINT, places BIGINT, bytes BIGINT, org_events BIGINT, org_bytes BIGINT)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    WITH bounds AS MATERIALIZED (
        SELECT coalesce((SELECT m.month FROM jobledger.org_month m
                         WHERE m.org_id = p_org AND m.first_seq - 1 <= p_after ORDER BY m.month DESC LIMIT 1), '-infinity') AS
                             since,
            coalesce((SELECT m.month FROM jobledger.org_month m
                      WHERE m.org_id = p_org AND m.first_seq > p_last ORDER BY m.month LIMIT 1), 'infinity') AS until
    )
    SELECT count(e.seq), count(DISTINCT e.seq), coalesce(sum(e.bytes), 0)::bigint,
        (SELECT count(*) FROM jobledger.org_event o WHERE o.org_id = p_org AND o.seq > p_after AND o.seq <= p_last),
        (SELECT coalesce(sum(o.bytes), 0)::bigint FROM jobledger.org_event o WHERE o.org_id = p_org AND o.seq > p_after AND o.seq <= p_last)
    FROM bounds CROSS JOIN LATERAL (
        SELECT e.seq, e.bytes FROM jobledger.job_event e
        WHERE e.org_id = p_org AND e.seq > p_after AND e.seq <= p_last
            AND e.recorded_at >= bounds.since AND e.recorded_at < bounds.until
    ) e;
END $$;

-- The number of events of removed jobs that are still to be removed.
CREATE OR REPLACE FUNCTION jobledger.count_remaining(p_org UUID)
RETURNS SETOF BIGINT
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    SELECT count(*) FROM jobledger.job_remains r CROSS JOIN LATERAL (
        SELECT FROM jobledger.job_event e WHERE e.org_id = p_org AND e.job_id = r.job_id AND e.seq <= r.last_seq
            AND e.recorded_at >= r.since AND e.recorded_at <= r.until OFFSET 0) e
    WHERE r.org_id = p_org;
END $$;

-- Types whose counter of scheduled jobs differs from the number of their queued jobs that wait for their time, in one snapshot.
CREATE OR REPLACE FUNCTION jobledger.miscounted(p_org UUID)
RETURNS TABLE (type TEXT, stored BIGINT, counted BIGINT)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    WITH part (type, stored, counted) AS (
        SELECT c.type::text, c.scheduled, 0 FROM jobledger.org_counter c WHERE c.org_id = p_org
        UNION ALL
        SELECT of_type.key, (of_type.value ->> 6)::bigint, 0
        FROM jobledger.org_head h CROSS JOIN LATERAL (
            SELECT r.counts FROM jobledger.org_record r WHERE r.org_id = p_org AND r.n > h.n ORDER BY r.n) r
        CROSS JOIN LATERAL jsonb_each(r.counts) of_type
        WHERE h.org_id = p_org
        UNION ALL
        SELECT j.type::text, 0, 1 FROM jobledger.job j
        WHERE j.org_id = p_org AND j.due_at IS NOT NULL AND j.status = 'queued'
            AND NOT EXISTS (SELECT FROM jobledger.last_event(p_org, j.id, j.last_seq + 1, j.last_recorded_at, NULL))
    )
    SELECT part.type, coalesce(sum(part.stored), 0)::bigint, sum(part.counted)::bigint
    FROM part GROUP BY part.type HAVING coalesce(sum(part.stored), 0) <> sum(part.counted);
END $$;

-- The number of kept records that do not follow on the one before, or have the number but not the id of the head's record.
CREATE OR REPLACE FUNCTION jobledger.count_broken_records(p_org UUID)
RETURNS BIGINT
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN (
        SELECT count(*) FROM jobledger.org_head h CROSS JOIN (
            SELECT r.n, r.id, r.prev, lag(r.n) OVER chain AS before_n, lag(r.id) OVER chain AS before_id
            FROM jobledger.org_record r WHERE r.org_id = p_org WINDOW chain AS (ORDER BY r.n)
        ) kept
        WHERE h.org_id = p_org AND ((kept.before_n, kept.before_id) <> (kept.n - 1, kept.prev) OR kept.n = h.n AND kept.id <> h.record));
END $$;

-- The number of rows that lack an event up to base_seq, or the last lease extension up to base_n. Of extensions it checks the
-- last thousand records that have any. OFFSET 0 keeps PostgreSQL from joining all events of an org without statistics.
CREATE OR REPLACE FUNCTION jobledger.count_early_rows(p_org UUID)
RETURNS BIGINT
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN (
        WITH log AS MATERIALIZED (
            SELECT coalesce(last.base_seq, h.base_seq) AS base_seq, coalesce(last.base_n, h.base_n) AS base_n
            FROM jobledger.org_head h LEFT JOIN LATERAL (
                SELECT r.base_seq, r.base_n FROM jobledger.org_record r
                WHERE r.org_id = p_org AND r.n > h.n ORDER BY r.n DESC LIMIT 1) last ON true
            WHERE h.org_id = p_org
        ), extended AS MATERIALIZED (
            SELECT DISTINCT ON (said.key) said.key::uuid AS job_id, r.n, r.seq, split_part(said.value, ',', 1)::bigint AS expires_at
            FROM (
                SELECT * FROM jobledger.org_record r WHERE r.org_id = p_org AND r.extensions IS NOT NULL
                ORDER BY r.seq DESC, r.n DESC LIMIT 1000) r
            CROSS JOIN LATERAL json_each_text(r.extensions::json) said
            ORDER BY said.key, r.n DESC
        )
        SELECT (
            SELECT count(*) FROM log CROSS JOIN jobledger.job j
            WHERE j.org_id = p_org AND j.status IN ('queued', 'running') AND EXISTS (
                -- seq + 0 makes PostgreSQL search by job: the range of seqs may have all events of the org.
                SELECT FROM jobledger.job_event e WHERE e.org_id = p_org AND e.job_id = j.id AND e.seq + 0 > j.last_seq
                    AND e.seq + 0 <= log.base_seq AND e.recorded_at >= j.last_recorded_at OFFSET 0)
        ) + (
            SELECT count(*) FROM log CROSS JOIN extended x
            CROSS JOIN LATERAL (SELECT * FROM jobledger.job j WHERE j.org_id = p_org AND j.id = x.job_id OFFSET 0) j
            WHERE x.n <= log.base_n AND j.status = 'running' AND j.last_seq <= x.seq
                AND x.expires_at IS DISTINCT FROM (extract(epoch FROM j.lease_expires_at) * 1000000)::bigint
                AND NOT EXISTS (
                    SELECT FROM jobledger.job_event e WHERE e.org_id = p_org AND e.job_id = j.id AND e.seq + 0 > j.last_seq
                        AND e.recorded_at >= j.last_recorded_at OFFSET 0)
        ));
END $$;

-- Notes that these tokens were used just now. Each token's org has the same position in p_orgs.
CREATE OR REPLACE FUNCTION jobledger.use_tokens(p_orgs UUID[], p_digests BYTEA[])
RETURNS VOID
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM jobledger.name_orgs(ARRAY(SELECT DISTINCT unnest(p_orgs)));
    INSERT INTO jobledger.api_token_use AS u (org_id, digest, used_at)
    SELECT used.org_id, used.digest, clock_timestamp() FROM unnest(p_orgs, p_digests) AS used (org_id, digest)
    ON CONFLICT (org_id, digest) DO UPDATE SET used_at = greatest(u.used_at, excluded.used_at);
END $$;

-- A page of an org's tokens, in the order of their ids, with the time of their last use.
CREATE OR REPLACE FUNCTION jobledger.list_tokens(p_org UUID, p_after UUID, p_limit BIGINT)
RETURNS TABLE (id UUID, org_id UUID, digest BYTEA, name VARCHAR, roles TEXT, created_at TIMESTAMPTZ, expires_at TIMESTAMPTZ,
    revoked_at TIMESTAMPTZ, used_at TIMESTAMPTZ)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY SELECT t.id, t.org_id, t.digest, t.name, t.roles, t.created_at, t.expires_at, t.revoked_at, u.used_at
        FROM jobledger.api_token t
        LEFT JOIN jobledger.api_token_use u ON u.org_id = t.org_id AND u.digest = t.digest
        WHERE t.org_id = p_org AND t.id > p_after ORDER BY t.id LIMIT p_limit;
END $$;

-- Makes a token of an org that has fewer than p_most, else of none. At that number tokens make room that ended an hour ago: every
-- server has noticed that since. It runs with its owner's rights, since the serving role may only read tokens; it makes none of
-- operators.
CREATE OR REPLACE FUNCTION jobledger.create_token(
    p_org UUID, p_id UUID, p_digest BYTEA, p_name TEXT, p_roles TEXT, p_expires_at TIMESTAMPTZ, p_most BIGINT
) RETURNS SETOF jobledger.api_token
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF p_org = 'ffffffff-ffff-ffff-ffff-ffffffffffff' OR 'operator' = ANY (string_to_array(p_roles, ',')) THEN
        RAISE EXCEPTION 'servers make no tokens of operators';
    END IF;
    -- Unlike other writes beside batches it waits for a synchronous standby.
    PERFORM set_config('synchronous_commit', 'on', true);
    -- One at a time, so that the count is exact.
    PERFORM pg_advisory_xact_lock(hashtextextended('jobledger.create_token ' || p_org, 0));
    -- A call whose answer was lost is run again.
    RETURN QUERY SELECT t.* FROM jobledger.api_token t WHERE t.org_id = p_org AND t.id = p_id;
    IF FOUND THEN
        RETURN;
    END IF;
    IF (SELECT count(*) FROM jobledger.api_token t WHERE t.org_id = p_org) >= p_most THEN
        WITH gone AS (
            DELETE FROM jobledger.api_token t
            WHERE t.org_id = p_org AND least(t.revoked_at, t.expires_at) < clock_timestamp() - interval '1 hour' RETURNING t.digest
        )
        DELETE FROM jobledger.api_token_use u USING gone WHERE u.org_id = p_org AND u.digest = gone.digest;
    END IF;
    RETURN QUERY INSERT INTO jobledger.api_token AS made (org_id, id, digest, name, roles, expires_at)
        SELECT p_org, p_id, p_digest, p_name, p_roles, p_expires_at
        WHERE (SELECT count(*) FROM jobledger.api_token t WHERE t.org_id = p_org) < p_most
        RETURNING made.*;
    -- A server without other credentials starts once there was a token.
    UPDATE jobledger.ledger SET credentials = 1 WHERE credentials = 0;
END $$;

-- Revokes a token of an org, unless it was revoked before, and returns it. It runs with its owner's rights, as create_token does.
CREATE OR REPLACE FUNCTION jobledger.revoke_token(p_org UUID, p_id UUID)
RETURNS SETOF jobledger.api_token
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    revision BIGINT;
BEGIN
    IF p_org = 'ffffffff-ffff-ffff-ffff-ffffffffffff' THEN
        RAISE EXCEPTION 'servers revoke no tokens of operators';
    END IF;
    PERFORM set_config('synchronous_commit', 'on', true);
    IF EXISTS (SELECT FROM jobledger.api_token t WHERE t.org_id = p_org AND t.id = p_id AND t.revoked_at IS NULL) THEN
        -- First, as `jobledger token revoke` does it.
        UPDATE jobledger.ledger SET credentials = credentials + 1 RETURNING credentials INTO revision;
        UPDATE jobledger.api_token t SET revoked_at = clock_timestamp(), revoked_revision = revision
            WHERE t.org_id = p_org AND t.id = p_id AND t.revoked_at IS NULL;
    END IF;
    RETURN QUERY SELECT t.* FROM jobledger.api_token t WHERE t.org_id = p_org AND t.id = p_id;
END $$;

-- The tokens that were revoked after the revision p_since, at most p_limit. It runs with its owner's rights, since they are of all
-- orgs; a digest is no secret.
CREATE OR REPLACE FUNCTION jobledger.revoked_tokens(p_since BIGINT, p_limit BIGINT)
RETURNS TABLE (org_id UUID, digest BYTEA)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY SELECT t.org_id, t.digest FROM jobledger.api_token t
        WHERE t.revoked_revision > p_since ORDER BY t.revoked_revision LIMIT p_limit;
END $$;

-- Writes workers that were heard of so many microseconds ago, in the order in which they come, and removes those of p_orgs that
-- were silent for longer than p_known_for, or were heard of by a clock that was set back. An empty about leaves the stored one. A row
-- that another server is writing is left to it.
CREATE OR REPLACE FUNCTION jobledger.note_workers(
    p_orgs UUID[], p_of UUID[], p_ids TEXT[], p_abouts TEXT[], p_ages BIGINT[], p_known_for BIGINT
) RETURNS VOID
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM jobledger.name_orgs(p_orgs);
    INSERT INTO jobledger.worker AS w (org_id, id, about, heard_at)
    SELECT h.org_id, h.id, h.about, clock_timestamp() - h.age * interval '1 microsecond'
    FROM unnest(p_of, p_ids, p_abouts, p_ages) AS h (org_id, id, about, age)
    ON CONFLICT (org_id, id) DO UPDATE SET heard_at = excluded.heard_at,
        about = CASE excluded.about WHEN '' THEN w.about ELSE excluded.about END
    WHERE excluded.heard_at >= w.heard_at OR w.heard_at > clock_timestamp();
    DELETE FROM jobledger.worker w USING (
        SELECT s.org_id, s.id FROM jobledger.worker s
        WHERE s.org_id = ANY (p_orgs) AND s.heard_at
            NOT BETWEEN clock_timestamp() - p_known_for * interval '1 microsecond' AND clock_timestamp() + interval '1 minute'
        FOR UPDATE SKIP LOCKED
    ) silent WHERE w.org_id = silent.org_id AND w.id = silent.id;
END $$;

-- The head of an org's log, and the org's jobs and bytes as of it.
CREATE OR REPLACE FUNCTION jobledger.read_stock(p_org UUID)
RETURNS TABLE (seq BIGINT, jobs BIGINT, bytes BIGINT)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY SELECT coalesce(last.seq, h.seq), coalesce(last.jobs, h.jobs), coalesce(last.bytes, h.bytes)
    FROM jobledger.org_head h LEFT JOIN LATERAL (
        SELECT r.seq, r.jobs, r.bytes FROM jobledger.org_record r
        WHERE r.org_id = p_org AND r.n > h.n ORDER BY r.n DESC LIMIT 1) last ON true
    WHERE h.org_id = p_org;
END $$;

-- The number of batches that have removed jobs of an org.
CREATE OR REPLACE FUNCTION jobledger.count_removals(p_org UUID)
RETURNS BIGINT
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN (SELECT h.removals FROM jobledger.org_head h WHERE h.org_id = p_org);
END $$;

-- Makes the missing partitions of this month and the next p_ahead ones. It runs with its owner's rights, since the serving role
-- may not create tables. It attaches each partition after building it apart, which blocks no reader or writer.
CREATE OR REPLACE FUNCTION jobledger.make_partitions(p_ahead INTEGER)
RETURNS VOID
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    this_month TIMESTAMP := date_trunc('month', now() AT TIME ZONE 'UTC');
    month TIMESTAMP;
    partition TEXT;
BEGIN
    FOR n IN 0..least(greatest(p_ahead, 0), 24) LOOP
        month := this_month + make_interval(months => n);
        partition := 'job_event_' || to_char(month, 'YYYY_MM');
        CONTINUE WHEN to_regclass('jobledger.' || partition) IS NOT NULL;
        PERFORM pg_advisory_xact_lock(hashtext('jobledger.make_partitions'));
        CONTINUE WHEN to_regclass('jobledger.' || partition) IS NOT NULL;
        EXECUTE format('CREATE TABLE jobledger.%I (LIKE jobledger.job_event INCLUDING DEFAULTS)', partition);
        EXECUTE format('ALTER TABLE jobledger.job_event ATTACH PARTITION jobledger.%I FOR VALUES FROM (%L) TO (%L)',
            partition, month AT TIME ZONE 'UTC', (month + interval '1 month') AT TIME ZONE 'UTC');
    END LOOP;
END $$;

-- Drops the partitions of past months that retention has emptied. It reads the partition itself to see whether that is empty:
-- through the parent, row-level security hides every row. It locks the parent first, as readers do. If a lock is not free within
-- 100 ms, the remaining partitions wait for the next call.
CREATE OR REPLACE FUNCTION jobledger.drop_empty_partitions()
RETURNS INTEGER
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '100ms' AS $$
DECLARE
    this_month TEXT := 'job_event_' || to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM');
    partition TEXT;
    is_empty BOOLEAN;
    dropped INTEGER := 0;
BEGIN
    FOR partition IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'jobledger.job_event'::regclass AND c.relname < this_month COLLATE "C" ORDER BY c.relname
    LOOP
        EXECUTE format('SELECT NOT EXISTS (SELECT FROM jobledger.%I)', partition) INTO is_empty;
        CONTINUE WHEN NOT is_empty;
        BEGIN
            LOCK TABLE ONLY jobledger.job_event IN ACCESS EXCLUSIVE MODE;
            EXECUTE format('LOCK TABLE jobledger.%I IN ACCESS EXCLUSIVE MODE', partition);
            -- Nothing writes to a past month. Under the lock, the second check can rely on that.
            EXECUTE format('SELECT NOT EXISTS (SELECT FROM jobledger.%I)', partition) INTO is_empty;
            IF is_empty THEN
                EXECUTE format('DROP TABLE jobledger.%I', partition);
                dropped := dropped + 1;
            END IF;
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            RETURN dropped;
        END;
    END LOOP;
    RETURN dropped;
END $$;

-- Gives the log a new id, so that cursors of the old one are refused. False, and no change, if the id is not p_was. It runs with
-- its owner's rights, since only the owner may write the id.
CREATE OR REPLACE FUNCTION jobledger.renew_log_id(p_was UUID, p_id UUID)
RETURNS BOOLEAN
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE jobledger.ledger SET log_id = p_id WHERE log_id = p_was;
    RETURN FOUND;
END $$;

REVOKE ALL ON FUNCTION jobledger.make_partitions(INTEGER), jobledger.drop_empty_partitions(), jobledger.renew_log_id(UUID, UUID),
    jobledger.create_token(UUID, UUID, BYTEA, TEXT, TEXT, TIMESTAMPTZ, BIGINT), jobledger.revoke_token(UUID, UUID),
    jobledger.revoked_tokens(BIGINT, BIGINT) FROM PUBLIC;
