-- What streams and statistics need: the log's identity, labels in the log, jobs that wait for their time, and a series of what
-- happened, by the minute and by the hour.

-- One row, of the whole database. It says nothing of any org.
CREATE TABLE jobledger.ledger (
    id                     SMALLINT    NOT NULL PRIMARY KEY CHECK (id = 1),
    log_id                 UUID        NOT NULL,                        -- another after a restore: cursors of before are void
    series_since           TIMESTAMPTZ NOT NULL,                        -- what happened before is not in the series
    retention_paused_until TIMESTAMPTZ NOT NULL DEFAULT '-infinity'     -- while a verification runs
);
-- Row-level security hides what is there from the owner too, but for this.
ALTER TABLE jobledger.org_head NO FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.org_batch NO FORCE ROW LEVEL SECURITY;
-- Never before what is in a log already, whatever the clock says.
INSERT INTO jobledger.ledger (id, log_id, series_since)
SELECT 1, gen_random_uuid(), coalesce(greatest(clock_timestamp(), max(log.recorded_at)), 'epoch') FROM (
    SELECT h.recorded_at FROM jobledger.org_head h UNION ALL SELECT b.recorded_at FROM jobledger.org_batch b
) log HAVING count(*) > 0 UNION ALL
SELECT 1, gen_random_uuid(), 'epoch' WHERE NOT EXISTS (SELECT FROM jobledger.org_head);
ALTER TABLE jobledger.org_head FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.org_batch FORCE ROW LEVEL SECURITY;

-- How many batches have removed jobs.
ALTER TABLE jobledger.org_head ADD COLUMN removals BIGINT NOT NULL DEFAULT 0;

ALTER TABLE jobledger.job_event ADD COLUMN labels JSONB;                -- the job's, an object, null when empty
-- Queued jobs whose time is still to come.
ALTER TABLE jobledger.org_counter ADD COLUMN scheduled BIGINT NOT NULL DEFAULT 0;

-- What is there already.
ALTER TABLE jobledger.job NO FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.job_event NO FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.org_counter NO FORCE ROW LEVEL SECURITY;
UPDATE jobledger.job_event e SET labels = j.labels FROM jobledger.job j
WHERE j.labels IS NOT NULL AND e.org_id = j.org_id AND e.job_id = j.id;
UPDATE jobledger.org_counter c SET scheduled = waiting.n FROM (
    SELECT j.org_id, j.type, count(*) AS n FROM jobledger.job j
    WHERE j.status = 'queued' AND j.due_at IS NOT NULL GROUP BY j.org_id, j.type
) waiting WHERE c.org_id = waiting.org_id AND c.type = waiting.type;
ALTER TABLE jobledger.job FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.job_event FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.org_counter FORCE ROW LEVEL SECURITY;

-- What happened in each minute and each hour, by type, as of org_head.seq. A row that is removed has what retention took away
-- of it: what is in the log and what was removed make up the row beside it.
CREATE TABLE jobledger.org_series (
    org_id    UUID         NOT NULL,
    width     SMALLINT     NOT NULL CHECK (width IN (60, 3600)), -- seconds
    start     TIMESTAMPTZ  NOT NULL,
    type      VARCHAR(100) COLLATE "C" NOT NULL,
    removed   BOOLEAN      NOT NULL,
    created   BIGINT       NOT NULL,
    started   BIGINT       NOT NULL,
    succeeded BIGINT       NOT NULL,
    failed    BIGINT       NOT NULL,
    retried   BIGINT       NOT NULL,
    canceled  BIGINT       NOT NULL,
    waits     BIGINT[]     NOT NULL,                             -- how many there were of each size
    runs      BIGINT[]     NOT NULL,
    PRIMARY KEY (org_id, width, start, type, removed)
) WITH (fillfactor = 50);
ALTER TABLE jobledger.org_series ENABLE ROW LEVEL SECURITY;
ALTER TABLE jobledger.org_series FORCE ROW LEVEL SECURITY;
CREATE POLICY org ON jobledger.org_series USING (org_id = (SELECT nullif(current_setting('app.current_org_id', true), '')::uuid));

-- From here on org_batch.counts has for each type: [queued, running, succeeded, failed, canceled, dead_letter, scheduled, created,
-- started, succeeded, failed, retried, canceled, [waits], [runs]], the last six counts and the durations being what happened;
-- zeros at the end are left out.

CREATE FUNCTION jobledger.add_counts(a BIGINT[], b BIGINT[])
RETURNS BIGINT[]
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT CASE WHEN b = '{}' THEN a WHEN a = '{}' THEN b
        ELSE ARRAY(SELECT coalesce(pair.x, 0) + coalesce(pair.y, 0) FROM unnest(a, b) AS pair (x, y)) END
$$;
CREATE AGGREGATE jobledger.sum_counts(BIGINT[]) (SFUNC = jobledger.add_counts, STYPE = BIGINT[], INITCOND = '{}');

CREATE FUNCTION jobledger.to_counts(p_json JSONB)
RETURNS BIGINT[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN p_json IS NULL THEN '{}' ELSE ARRAY(SELECT n::bigint FROM jsonb_array_elements_text(p_json) AS n) END
$$;

-- The counters, with what the batches since the last fold add to them, and what happened within a window that ends now: it
-- begins with a whole minute, or hour where it is longer than a day, and is added up by the hour but for the minutes before the
-- first whole one. With p_width, a row for each bucket of that width too (bucket is not null), of all types together or, with
-- p_by_type, of each. All of one snapshot, and so of one place in the log.
CREATE FUNCTION jobledger.summarize(p_org UUID, p_types TEXT[], p_window INTERVAL, p_width SMALLINT, p_by_type BOOLEAN)
RETURNS TABLE (
    head_seq BIGINT, clock TIMESTAMPTZ, since TIMESTAMPTZ, type TEXT, bucket TIMESTAMPTZ,
    queued BIGINT, running BIGINT, succeeded BIGINT, failed BIGINT, canceled BIGINT, dead_letter BIGINT,
    scheduled BIGINT, oldest_ready_at TIMESTAMPTZ,
    flow_created BIGINT, flow_started BIGINT, flow_succeeded BIGINT, flow_failed BIGINT, flow_retried BIGINT, flow_canceled BIGINT,
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
        SELECT s.width, s.start, s.type, s.created, s.started, s.succeeded, s.failed, s.retried, s.canceled,
            CASE WHEN s.start < v_hours_since THEN s.waits END AS waits,
            CASE WHEN s.start < v_hours_since THEN s.runs END AS runs
        FROM jobledger.org_series s
        WHERE s.org_id = p_org AND s.width = 60 AND s.start >= v_since AND NOT s.removed
            AND (s.start < v_hours_since OR p_width = 60) AND (p_types IS NULL OR s.type = ANY (p_types))
        UNION ALL
        SELECT s.width, s.start, s.type, s.created, s.started, s.succeeded, s.failed, s.retried, s.canceled, s.waits, s.runs
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
            jobledger.to_counts(batch.value -> 13), jobledger.to_counts(batch.value -> 14)
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
            jobledger.sum_counts(f.waits) AS waits, jobledger.sum_counts(f.runs) AS runs
        FROM happened f WHERE f.width = 3600 OR f.start < v_hours_since GROUP BY f.type
    ), series AS (
        SELECT f.start, CASE WHEN p_by_type THEN f.type END AS type,
            sum(f.created)::bigint AS created,
            sum(f.started)::bigint AS started,
            sum(f.succeeded)::bigint AS succeeded,
            sum(f.failed)::bigint AS failed,
            sum(f.retried)::bigint AS retried,
            sum(f.canceled)::bigint AS canceled
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
        f.created, f.started, f.succeeded, f.failed, f.retried, f.canceled, f.waits, f.runs
    FROM log LEFT JOIN counter c ON true LEFT JOIN flow f ON f.type = c.type
    UNION ALL
    SELECT log.head_seq, clock_timestamp(), v_told_since, s.type::text, s.start, NULL, NULL, NULL, NULL, NULL, NULL,
        NULL, NULL, s.created, s.started, s.succeeded, s.failed, s.retried, s.canceled, NULL, NULL
    FROM log JOIN series s ON true;
END $$;

-- The series of some types, with what the batches since the last fold add to it, as of one place in the log. Without any, that
-- place.
CREATE FUNCTION jobledger.read_series(p_org UUID, p_types TEXT[])
RETURNS TABLE (
    head_seq BIGINT, recorded_at TIMESTAMPTZ, width SMALLINT, start TIMESTAMPTZ, type TEXT, removed BOOLEAN,
    flow_created BIGINT, flow_started BIGINT, flow_succeeded BIGINT, flow_failed BIGINT, flow_retried BIGINT, flow_canceled BIGINT,
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
        SELECT s.width, s.start, s.type, s.removed, s.created, s.started, s.succeeded, s.failed, s.retried, s.canceled, s.waits,
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
            jobledger.to_counts(batch.value -> 13), jobledger.to_counts(batch.value -> 14)
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
            jobledger.sum_counts(f.waits) AS waits, jobledger.sum_counts(f.runs) AS runs
        FROM happened f GROUP BY f.width, f.start, f.type, f.removed
    )
    SELECT log.head_seq, log.recorded_at, s.width, s.start, s.type, s.removed, s.created, s.started, s.succeeded, s.failed,
        s.retried, s.canceled, s.waits, s.runs
    FROM log LEFT JOIN series s ON true;
END $$;

-- How many batches have removed jobs.
CREATE FUNCTION jobledger.count_removals(p_org UUID)
RETURNS BIGINT
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN (SELECT h.removals FROM jobledger.org_head h WHERE h.org_id = p_org);
END $$;

-- How many queued jobs wait for their time, by the counter and by counting: of one type, in one snapshot.
CREATE FUNCTION jobledger.count_scheduled(p_org UUID, p_type TEXT)
RETURNS TABLE (stored BIGINT, counted BIGINT)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    SELECT coalesce((SELECT c.scheduled FROM jobledger.org_counter c WHERE c.org_id = p_org AND c.type = p_type), 0)
        + coalesce((SELECT sum((b.counts -> p_type ->> 6)::bigint)::bigint
                    FROM jobledger.org_head h JOIN jobledger.org_batch b ON b.org_id = p_org AND b.seq > h.seq
                    WHERE h.org_id = p_org), 0),
        (SELECT count(*) FROM jobledger.job j
         WHERE j.org_id = p_org AND j.type = p_type AND j.status = 'queued' AND j.due_at IS NOT NULL);
END $$;

-- How many events there are between two places in the log, and how many places they take: for an org's log to be whole, both
-- have to be as many as there are places.
CREATE FUNCTION jobledger.count_events(p_org UUID, p_after BIGINT, p_last BIGINT)
RETURNS TABLE (events BIGINT, places BIGINT)
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
    SELECT count(e.seq), count(DISTINCT e.seq)
    FROM bounds CROSS JOIN LATERAL (
        SELECT e.seq FROM jobledger.job_event e
        WHERE e.org_id = p_org AND e.seq > p_after AND e.seq <= p_last
            AND e.recorded_at >= bounds.since AND e.recorded_at < bounds.until
    ) e;
END $$;

-- Events of some jobs up to p_last, those of each in order, from the first job's events after p_after on. A result is told by a
-- null in its place.
CREATE FUNCTION jobledger.read_histories(
    p_org UUID, p_jobs UUID[], p_after BIGINT, p_last BIGINT, p_limit BIGINT
)
RETURNS TABLE (
    org_id UUID, seq BIGINT, job_id UUID, job_seq BIGINT, ts TIMESTAMPTZ, recorded_at TIMESTAMPTZ, kind VARCHAR,
    prev_status VARCHAR, next_status VARCHAR, attempt INTEGER, actor VARCHAR, job_type VARCHAR, detail_json TEXT, labels TEXT
)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    SELECT e.org_id, e.seq, e.job_id, e.job_seq, e.ts, e.recorded_at, e.kind, e.prev_status, e.next_status, e.attempt, e.actor,
        e.job_type, (CASE WHEN e.detail_json ? 'result' THEN e.detail_json || '{"result": null}' ELSE e.detail_json END)::text,
        e.labels::text
    FROM unnest(p_jobs) WITH ORDINALITY AS wanted (id, n)
    CROSS JOIN LATERAL (SELECT * FROM jobledger.job j WHERE j.org_id = p_org AND j.id = wanted.id OFFSET 0) j
    CROSS JOIN LATERAL (
        SELECT * FROM jobledger.job_event e
        WHERE e.org_id = p_org AND e.job_id = j.id AND e.seq > CASE WHEN wanted.n = 1 THEN p_after ELSE 0 END AND e.seq <= p_last
            AND e.recorded_at >= j.created_at AND e.recorded_at <= j.last_recorded_at
        ORDER BY e.seq LIMIT p_limit
    ) e ORDER BY wanted.n, e.seq LIMIT p_limit;
END $$;

-- As read_org_events, with labels; and with p_leaving statuses match the one that is left too. It is a page of the log: at
-- most p_limit matching events after p_after up to p_last, and no more once p_max_bytes are exceeded.
-- Head and floor are of the same snapshot, and come in a row of their own where no event matches.
CREATE FUNCTION jobledger.page_of_log(
    p_org UUID, p_after BIGINT, p_last BIGINT, p_types TEXT[], p_statuses TEXT[], p_leaving BOOLEAN, p_labels JSONB, p_limit
        BIGINT, p_max_bytes BIGINT
)
RETURNS TABLE (
    head_seq BIGINT, floor_seq BIGINT, job_status VARCHAR, bytes_through BIGINT, org_id UUID, seq BIGINT, job_id UUID, job_seq
        BIGINT, ts TIMESTAMPTZ,
    recorded_at TIMESTAMPTZ, kind VARCHAR, prev_status VARCHAR, next_status VARCHAR, attempt INTEGER, actor VARCHAR,
    job_type VARCHAR, detail_json TEXT, labels TEXT
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
        page.job_type, page.detail_json::text, page.labels::text
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

-- The same for one job, whose events have an index of their own, with the job's status.
CREATE FUNCTION jobledger.page_of_job(
    p_org UUID, p_job UUID, p_after BIGINT, p_types TEXT[], p_statuses TEXT[], p_leaving BOOLEAN, p_labels JSONB, p_limit BIGINT,
        p_max_bytes BIGINT
)
RETURNS TABLE (
    head_seq BIGINT, floor_seq BIGINT, job_status VARCHAR, bytes_through BIGINT, org_id UUID, seq BIGINT, job_id UUID, job_seq
        BIGINT, ts TIMESTAMPTZ,
    recorded_at TIMESTAMPTZ, kind VARCHAR, prev_status VARCHAR, next_status VARCHAR, attempt INTEGER, actor VARCHAR,
    job_type VARCHAR, detail_json TEXT, labels TEXT
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
        page.job_type, page.detail_json::text, page.labels::text
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
