-- Jobs may be erased: they are blanked with their events.
ALTER TABLE job ADD COLUMN erased_at INTEGER;
-- Events of erased jobs that are still to be blanked: they are more than one batch may blank.
CREATE TABLE job_unblanked (
    org_id       BLOB    NOT NULL,
    job_id       BLOB    NOT NULL,
    after_seq    INTEGER NOT NULL,              -- the job's events up to this seq are blank
    last_seq     INTEGER NOT NULL,              -- seq of the last of these events
    since        INTEGER NOT NULL,              -- bounds of their recorded_at
    until        INTEGER NOT NULL,
    requested_by TEXT,                          -- who is blanked as their actor
    PRIMARY KEY (org_id, job_id)
) STRICT, WITHOUT ROWID;
