-- What streams and statistics need: the log's identity, labels in the log, jobs that wait for their time, and a series of what
-- happened, by the minute and by the hour.

-- One row, of the whole database.
CREATE TABLE ledger (
    id                     INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
    log_id                 BLOB    NOT NULL CHECK (length(log_id) = 16), -- another after a restore: cursors of before are void
    series_since           INTEGER NOT NULL,                             -- what happened before is not in the series
    retention_paused_until INTEGER NOT NULL DEFAULT 0                    -- while a verification runs
) STRICT;
INSERT INTO ledger (id, log_id, series_since)
SELECT 1, randomblob(16), coalesce(max(CAST(unixepoch('subsec') * 1000000 AS INTEGER), (SELECT max(recorded_at) FROM org_head)), 0);

ALTER TABLE job_event ADD COLUMN labels TEXT;                             -- the job's, a JSON object, null when empty
UPDATE job_event SET labels = (SELECT j.labels FROM job j WHERE j.org_id = job_event.org_id AND j.id = job_event.job_id)
WHERE job_id IN (SELECT id FROM job WHERE labels IS NOT NULL);

-- How many batches have removed jobs.
ALTER TABLE org_head ADD COLUMN removals INTEGER NOT NULL DEFAULT 0;

-- Queued jobs whose time is still to come.
ALTER TABLE org_counter ADD COLUMN scheduled INTEGER NOT NULL DEFAULT 0;
UPDATE org_counter SET scheduled = (
    SELECT count(*) FROM job j
    WHERE j.org_id = org_counter.org_id AND j.type = org_counter.type AND j.status = 'queued' AND j.due_at IS NOT NULL);

-- What happened in each minute and each hour, by type. A row with removed = 1 has what retention took away of it: what is in
-- the log and what was removed make up the row beside it.
CREATE TABLE org_series (
    org_id    BLOB    NOT NULL,
    width     INTEGER NOT NULL CHECK (width IN (60, 3600)), -- seconds
    start     INTEGER NOT NULL,
    type      TEXT    NOT NULL,
    removed   INTEGER NOT NULL,
    created   INTEGER NOT NULL,
    started   INTEGER NOT NULL,
    succeeded INTEGER NOT NULL,
    failed    INTEGER NOT NULL,
    retried   INTEGER NOT NULL,
    canceled  INTEGER NOT NULL,
    waits     TEXT    NOT NULL,                             -- a JSON array: how many there were of each size
    runs      TEXT    NOT NULL,
    PRIMARY KEY (org_id, width, start, type, removed)
) STRICT, WITHOUT ROWID;
