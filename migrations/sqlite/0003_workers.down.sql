-- loses: leases (the jobs stay running, and nobody can report under a lease) and run time-outs
DROP INDEX idx_org_due_work;
ALTER TABLE org_due DROP COLUMN work_due_at;
ALTER TABLE org_head DROP COLUMN ready_gen;

DROP TABLE job_label;
CREATE TABLE job_label (
    org_id BLOB NOT NULL,
    key    TEXT NOT NULL,
    value  TEXT NOT NULL,
    job_id BLOB NOT NULL,
    PRIMARY KEY (org_id, key, value, job_id)
) STRICT, WITHOUT ROWID;
INSERT INTO job_label
SELECT job.org_id, label.key, label.value, job.id FROM job, json_each(job.labels) AS label WHERE job.labels IS NOT NULL;

DROP INDEX idx_job_type;
DROP INDEX idx_job_status;
CREATE INDEX idx_job_queued ON job (org_id, type, ready_at) WHERE status = 'queued';
CREATE INDEX idx_job_status ON job (org_id, status, id);
CREATE INDEX idx_job_type ON job (org_id, type, status, id);

DROP INDEX idx_job_lease_request;
DROP INDEX idx_job_due;
DROP INDEX idx_job_ready;
ALTER TABLE job DROP COLUMN due_at;
ALTER TABLE job DROP COLUMN retry_request;
ALTER TABLE job DROP COLUMN lease_epoch;
ALTER TABLE job DROP COLUMN lease_confirmed;
ALTER TABLE job DROP COLUMN lease_request;
ALTER TABLE job DROP COLUMN lease_expires_at;
ALTER TABLE job DROP COLUMN lease_granted;
ALTER TABLE job DROP COLUMN lease_worker;
ALTER TABLE job DROP COLUMN outcome_epoch;
ALTER TABLE job DROP COLUMN created_seq;
ALTER TABLE job DROP COLUMN payload_bytes;
ALTER TABLE job DROP COLUMN run_timeout;
