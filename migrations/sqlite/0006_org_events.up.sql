-- Settings of types, and events of the log that are about no single job.
ALTER TABLE org_head ADD COLUMN org_seq INTEGER NOT NULL DEFAULT 0; -- seq of the last row of org_event; 0: there was none

-- Events that are about no single job. They have places in the same seq as those of job_event.
CREATE TABLE org_event (
    org_id      BLOB    NOT NULL,
    seq         INTEGER NOT NULL,
    ts          INTEGER NOT NULL,
    recorded_at INTEGER NOT NULL,
    kind        TEXT    NOT NULL,
    actor       TEXT,
    detail_json TEXT    NOT NULL,               -- what changed, before and after
    bytes       INTEGER NOT NULL,               -- approximate size in memory
    PRIMARY KEY (org_id, seq)
) STRICT, WITHOUT ROWID;

-- What is set for a type. A row exists while anything is. The empty type stands for all types together.
CREATE TABLE org_type (
    org_id      BLOB    NOT NULL,
    type        TEXT    NOT NULL,
    description TEXT    NOT NULL,
    pause       TEXT,                           -- JSON: since, until, reason, actor; null: not paused
    changed_seq INTEGER NOT NULL,               -- seq of the event that changed it last
    PRIMARY KEY (org_id, type)
) STRICT, WITHOUT ROWID;
