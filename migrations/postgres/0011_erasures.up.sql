-- Jobs may be erased: they are blanked with their events.
ALTER TABLE jobledger.job ADD COLUMN erased_at TIMESTAMPTZ;
-- Events of erased jobs that are still to be blanked: they are more than one batch may blank.
CREATE TABLE jobledger.job_unblanked (
    org_id       UUID        NOT NULL,
    job_id       UUID        NOT NULL,
    after_seq    BIGINT      NOT NULL,              -- the job's events up to this seq are blank
    last_seq     BIGINT      NOT NULL,              -- seq of the last of these events
    since        TIMESTAMPTZ NOT NULL,              -- bounds of their recorded_at
    until        TIMESTAMPTZ NOT NULL,
    requested_by VARCHAR(255),                      -- who is blanked as their actor
    PRIMARY KEY (org_id, job_id)
);
ALTER TABLE jobledger.job_unblanked ENABLE ROW LEVEL SECURITY;
ALTER TABLE jobledger.job_unblanked FORCE ROW LEVEL SECURITY;
CREATE POLICY org ON jobledger.job_unblanked USING (
    org_id = (SELECT nullif(current_setting('app.current_org_id', true), '')::uuid)
    OR org_id = ANY ((SELECT string_to_array(nullif(current_setting('app.current_org_ids', true), ''), ',')::uuid[])::uuid[]));
