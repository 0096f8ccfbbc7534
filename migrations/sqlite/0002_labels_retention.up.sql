-- Labels to find jobs by, what retention looks for, and when an org has background work.

ALTER TABLE job ADD COLUMN last_recorded_at INTEGER NOT NULL DEFAULT 0;  -- recorded_at of the last event
ALTER TABLE job ADD COLUMN result_recorded_at INTEGER;                   -- recorded_at of the event that brought the result
UPDATE job SET
    last_recorded_at = (SELECT recorded_at FROM job_event e WHERE e.org_id = job.org_id AND e.seq = job.last_seq),
    result_recorded_at = (SELECT recorded_at FROM job_event e WHERE e.org_id = job.org_id AND e.seq = job.result_seq);

CREATE INDEX idx_job_status ON job (org_id, status, id);
CREATE INDEX idx_job_type ON job (org_id, type, status, id);
CREATE INDEX idx_job_finished ON job (org_id, status, finished_at) WHERE finished_at IS NOT NULL;

CREATE TABLE job_label (
    org_id BLOB NOT NULL,
    key    TEXT NOT NULL,
    value  TEXT NOT NULL,
    job_id BLOB NOT NULL,
    PRIMARY KEY (org_id, key, value, job_id)
) STRICT, WITHOUT ROWID;

INSERT INTO job_label
SELECT job.org_id, label.key, label.value, job.id FROM job, json_each(job.labels) AS label WHERE job.labels IS NOT NULL;

-- A row for each org; next_due_at is when its background work is to be looked at again.
CREATE TABLE org_due (
    org_id      BLOB    NOT NULL PRIMARY KEY CHECK (length(org_id) = 16),
    next_due_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX idx_org_due ON org_due (next_due_at);
INSERT INTO org_due SELECT org_id, 0 FROM org_head;
