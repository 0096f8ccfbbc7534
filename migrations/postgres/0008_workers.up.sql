-- Workers that some server has heard of lately.
CREATE TABLE jobledger.worker (
    org_id   UUID         NOT NULL,
    id       VARCHAR(255) COLLATE "C" NOT NULL,
    about    TEXT         NOT NULL,                 -- JSON: what it asks for, and what it says of itself
    heard_at TIMESTAMPTZ  NOT NULL,
    PRIMARY KEY (org_id, id)                        -- read_workers
);
ALTER TABLE jobledger.worker ENABLE ROW LEVEL SECURITY;
ALTER TABLE jobledger.worker FORCE ROW LEVEL SECURITY;
CREATE POLICY org ON jobledger.worker USING (
    org_id = (SELECT nullif(current_setting('app.current_org_id', true), '')::uuid)
    OR org_id = ANY ((SELECT string_to_array(nullif(current_setting('app.current_org_ids', true), ''), ',')::uuid[])::uuid[]));
