-- Settings of types, and events of the log that are about no single job.
ALTER TABLE jobledger.org_head ADD COLUMN org_seq BIGINT NOT NULL DEFAULT 0;    -- seq of the last row of org_event; 0: there was none

-- Events that are about no single job. They have places in the same seq as those of job_event. They are few, so there are no
-- partitions.
CREATE TABLE jobledger.org_event (
    org_id      UUID         NOT NULL,
    seq         BIGINT       NOT NULL,
    ts          TIMESTAMPTZ  NOT NULL,
    recorded_at TIMESTAMPTZ  NOT NULL,
    kind        VARCHAR(50)  COLLATE "C" NOT NULL,
    actor       VARCHAR(255),
    detail_json JSONB        NOT NULL,              -- what changed, before and after
    bytes       INTEGER      NOT NULL,              -- approximate size in memory
    PRIMARY KEY (org_id, seq)
);

-- What is set for a type. A row exists while anything is. The empty type stands for all types together.
CREATE TABLE jobledger.org_type (
    org_id      UUID         NOT NULL,
    type        VARCHAR(100) COLLATE "C" NOT NULL,
    description TEXT         NOT NULL,
    pause       TEXT,                               -- JSON: since, until, reason, actor; null: not paused
    changed_seq BIGINT       NOT NULL,              -- seq of the event that changed it last
    PRIMARY KEY (org_id, type)
);

DO $$
DECLARE
    tenant_table TEXT;
BEGIN
    FOREACH tenant_table IN ARRAY ARRAY['org_event', 'org_type'] LOOP
        EXECUTE format('ALTER TABLE jobledger.%I ENABLE ROW LEVEL SECURITY', tenant_table);
        EXECUTE format('ALTER TABLE jobledger.%I FORCE ROW LEVEL SECURITY', tenant_table);
        EXECUTE format('CREATE POLICY org ON jobledger.%I USING (
            org_id = (SELECT nullif(current_setting(''app.current_org_id'', true), '''')::uuid)
            OR org_id = ANY ((SELECT string_to_array(nullif(current_setting(''app.current_org_ids'', true), ''''), '','')::uuid[])::uuid[]))',
            tenant_table);
    END LOOP;
END $$;
