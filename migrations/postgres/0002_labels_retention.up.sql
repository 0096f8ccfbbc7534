-- Labels to find jobs by, what retention looks for, and when an org has background work; then the statements that run in
-- the database, since under row-level security a call that sets the org and reads is one round trip.

CREATE INDEX idx_job_status ON jobledger.job (org_id, status, id);
CREATE INDEX idx_job_type ON jobledger.job (org_id, type, status, id);
CREATE INDEX idx_job_finished ON jobledger.job (org_id, status, finished_at) WHERE finished_at IS NOT NULL;

CREATE TABLE jobledger.job_label (
    org_id UUID NOT NULL,
    key    TEXT COLLATE "C" NOT NULL,
    value  TEXT COLLATE "C" NOT NULL,
    job_id UUID NOT NULL,
    PRIMARY KEY (org_id, key, value, job_id)
);
ALTER TABLE jobledger.job_label ENABLE ROW LEVEL SECURITY;
ALTER TABLE jobledger.job_label FORCE ROW LEVEL SECURITY;
CREATE POLICY org ON jobledger.job_label USING (org_id = (SELECT nullif(current_setting('app.current_org_id', true), '')::uuid));

-- A row for each org; next_due_at is when its background work is to be looked at again. It leads every replica from org
-- to org, so it has no row-level security, and says nothing of an org but that it is there.
CREATE TABLE jobledger.org_due (
    org_id      UUID        NOT NULL PRIMARY KEY,
    next_due_at TIMESTAMPTZ NOT NULL
);
CREATE INDEX idx_org_due ON jobledger.org_due (next_due_at);

-- What is there already. Row-level security hides it from the owner too, but for this.
ALTER TABLE jobledger.job NO FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.org_head NO FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.job_label NO FORCE ROW LEVEL SECURITY;
INSERT INTO jobledger.job_label
SELECT j.org_id, label.key, label.value, j.id FROM jobledger.job j, jsonb_each_text(j.labels) label WHERE j.labels IS NOT NULL;
INSERT INTO jobledger.org_due SELECT org_id, '-infinity' FROM jobledger.org_head;
ALTER TABLE jobledger.job FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.org_head FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.job_label FORCE ROW LEVEL SECURITY;

-- Sets the org for the transaction, makes sure that its head row is there, locks it, and only then, in statements whose
-- snapshots are taken after the lock was won, reads where the log ends and the clock.
CREATE FUNCTION jobledger.open_batch(p_org UUID)
RETURNS TABLE (seq BIGINT, floor_seq BIGINT, recorded_at TIMESTAMPTZ, types BIGINT, folded_seq BIGINT, clock TIMESTAMPTZ)
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
    SELECT b.seq, b.recorded_at INTO last FROM jobledger.org_batch b
    WHERE b.org_id = p_org AND b.seq > head.seq ORDER BY b.seq DESC LIMIT 1;
    RETURN QUERY SELECT coalesce(last.seq, head.seq), head.floor_seq, coalesce(last.recorded_at, head.recorded_at),
        head.types, head.seq, clock_timestamp();
END $$;

CREATE FUNCTION jobledger.read_job(p_org UUID, p_id UUID)
RETURNS TABLE (job jobledger.job, stage TEXT, progress INTEGER, payload TEXT, result_detail TEXT)
LANGUAGE plpgsql SECURITY INVOKER AS $$
BEGIN
    PERFORM set_config('app.current_org_id', p_org::text, true);
    RETURN QUERY
    SELECT j, e.detail_json ->> 'stage', (e.detail_json ->> 'progress')::integer, p.payload::text, r.detail_json::text
    FROM jobledger.job j
    LEFT JOIN jobledger.job_event e ON e.org_id = p_org AND e.seq = j.last_seq AND e.recorded_at = j.last_recorded_at
    LEFT JOIN jobledger.job_event r ON r.org_id = p_org AND r.seq = j.result_seq AND r.recorded_at = j.result_recorded_at
    LEFT JOIN jobledger.job_payload p ON p.org_id = p_org AND p.job_id = j.id
    WHERE j.org_id = p_org AND j.id = p_id;
END $$;

-- A page of the log: at most p_limit matching events after p_after up to p_last, and no more once p_max_bytes are exceeded.
-- Head and floor are of the same snapshot, and come in a row of their own where no event matches.
CREATE FUNCTION jobledger.read_org_events(
    p_org UUID, p_after BIGINT, p_last BIGINT, p_types TEXT[], p_statuses TEXT[], p_limit BIGINT, p_max_bytes BIGINT
)
RETURNS TABLE (
    head_seq BIGINT, floor_seq BIGINT, job_status VARCHAR, bytes_through BIGINT, org_id UUID, seq BIGINT, job_id UUID, job_seq BIGINT, ts TIMESTAMPTZ,
    recorded_at TIMESTAMPTZ, kind VARCHAR, prev_status VARCHAR, next_status VARCHAR, attempt INTEGER, actor VARCHAR,
    job_type VARCHAR, detail_json TEXT
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
        page.job_type, page.detail_json::text
    FROM log LEFT JOIN LATERAL (
        SELECT found.*, sum(found.bytes) OVER (ORDER BY found.seq) AS bytes_through
        FROM (
            SELECT e.* FROM jobledger.job_event e
            WHERE e.org_id = p_org AND e.seq > p_after AND e.seq <= p_last
                AND e.recorded_at >= log.since AND e.recorded_at < log.until
                AND (p_types IS NULL OR e.job_type = ANY (p_types))
                AND (p_statuses IS NULL OR e.next_status = ANY (p_statuses))
            ORDER BY e.seq LIMIT p_limit
        ) found
    ) page ON page.bytes_through - page.bytes <= p_max_bytes
    ORDER BY page.seq;
END $$;

-- The same for one job, whose events have an index of their own, with the job's status.
CREATE FUNCTION jobledger.read_job_events(
    p_org UUID, p_job UUID, p_after BIGINT, p_types TEXT[], p_statuses TEXT[], p_limit BIGINT, p_max_bytes BIGINT
)
RETURNS TABLE (
    head_seq BIGINT, floor_seq BIGINT, job_status VARCHAR, bytes_through BIGINT, org_id UUID, seq BIGINT, job_id UUID, job_seq BIGINT, ts TIMESTAMPTZ,
    recorded_at TIMESTAMPTZ, kind VARCHAR, prev_status VARCHAR, next_status VARCHAR, attempt INTEGER, actor VARCHAR,
    job_type VARCHAR, detail_json TEXT
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
        page.job_type, page.detail_json::text
    FROM log LEFT JOIN LATERAL (
        SELECT found.*, sum(found.bytes) OVER (ORDER BY found.seq) AS bytes_through
        FROM (
            SELECT e.* FROM jobledger.job_event e
            WHERE e.org_id = p_org AND e.job_id = p_job AND e.seq > p_after
                AND e.recorded_at >= log.since AND e.recorded_at <= log.until
                AND (p_types IS NULL OR e.job_type = ANY (p_types))
                AND (p_statuses IS NULL OR e.next_status = ANY (p_statuses))
            ORDER BY e.seq LIMIT p_limit
        ) found
    ) page ON page.bytes_through - page.bytes <= p_max_bytes
    ORDER BY page.seq;
END $$;

-- The counters, with what the batches since the last fold add to them.
CREATE FUNCTION jobledger.read_statistics(p_org UUID, p_types TEXT[])
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
        CASE WHEN c.queued > 0 THEN
            (SELECT min(j.ready_at) FROM jobledger.job j WHERE j.org_id = p_org AND j.type = c.type AND j.status = 'queued')
        END,
        clock_timestamp()
    FROM jobledger.org_head h LEFT JOIN counter c ON true
    WHERE h.org_id = p_org ORDER BY c.type;
END $$;

CREATE FUNCTION jobledger.read_heads(p_orgs UUID[])
RETURNS TABLE (org_id UUID, seq BIGINT)
LANGUAGE plpgsql SECURITY INVOKER AS $$
DECLARE
    org UUID;
BEGIN
    FOREACH org IN ARRAY p_orgs LOOP
        PERFORM set_config('app.current_org_id', org::text, true);
        RETURN QUERY
        SELECT org, coalesce((SELECT b.seq FROM jobledger.org_batch b
                              WHERE b.org_id = org AND b.seq > h.seq ORDER BY b.seq DESC LIMIT 1), h.seq)
        FROM jobledger.org_head h WHERE h.org_id = org;
    END LOOP;
END $$;

-- Makes sure that this month and the p_ahead next ones have a partition, as the owner: whoever serves may not make tables.
-- Built apart and then attached, which stands in no reader's or writer's way.
CREATE FUNCTION jobledger.make_partitions(p_ahead INTEGER)
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

-- Drops partitions of months that are over and of which retention has left nothing. Whether one is empty is asked of the
-- partition itself, since through its parent row-level security hides every row. Locks are taken parent first, as readers
-- take them, and where one is not free at once the partition waits for another time.
CREATE FUNCTION jobledger.drop_empty_partitions()
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
            -- Nobody writes to a month that is over; the lock makes sure of it while it is looked at again.
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

REVOKE ALL ON FUNCTION jobledger.make_partitions(INTEGER), jobledger.drop_empty_partitions() FROM PUBLIC;
SELECT jobledger.make_partitions(3);
