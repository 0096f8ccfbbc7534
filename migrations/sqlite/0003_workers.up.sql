-- Leases, what time does to jobs, the queue of jobs that are ready, and lists of jobs in the order of their creation.

ALTER TABLE job ADD COLUMN run_timeout INTEGER;                        -- microseconds
ALTER TABLE job ADD COLUMN payload_bytes INTEGER NOT NULL DEFAULT 0;   -- on the wire
ALTER TABLE job ADD COLUMN created_seq INTEGER NOT NULL DEFAULT 0;     -- the first event
ALTER TABLE job ADD COLUMN outcome_epoch INTEGER;                      -- of the lease under which the last attempt ended
ALTER TABLE job ADD COLUMN lease_worker TEXT;                          -- null where nobody holds the job
ALTER TABLE job ADD COLUMN lease_granted INTEGER;                      -- microseconds
ALTER TABLE job ADD COLUMN lease_expires_at INTEGER;
ALTER TABLE job ADD COLUMN lease_request TEXT;                         -- request_id of the claim
ALTER TABLE job ADD COLUMN lease_confirmed INTEGER NOT NULL DEFAULT 0; -- the holder was heard of since
ALTER TABLE job ADD COLUMN lease_epoch INTEGER NOT NULL DEFAULT 0;     -- rises with every claim and expiry
ALTER TABLE job ADD COLUMN retry_request TEXT;                         -- request_id of the last RetryJob
ALTER TABLE job ADD COLUMN due_at INTEGER;                             -- when time itself may change the job, or earlier

-- A JSON text grows sevenfold on the wire at most, and to a mebibyte.
UPDATE job SET
    created_seq = (SELECT seq FROM job_event e WHERE e.org_id = job.org_id AND e.job_id = job.id AND e.job_seq = 1),
    payload_bytes = coalesce((SELECT min(7 * octet_length(payload), 1048576) FROM job_payload p WHERE p.org_id = job.org_id AND p.job_id = job.id), 0),
    due_at = CASE WHEN status = 'queued' AND scheduled_at IS NOT NULL THEN ready_at END;

-- Jobs that may be claimed, in the order in which they are. It also finds what has been ready longest, for statistics.
DROP INDEX idx_job_queued;
CREATE INDEX idx_job_ready ON job (org_id, type, priority DESC, ready_at, created_seq) WHERE status = 'queued' AND due_at IS NULL;
-- Apart from an extended lease's end, which moves with every heartbeat: nothing here does.
CREATE INDEX idx_job_due ON job (org_id, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX idx_job_lease_request ON job (org_id, lease_request) WHERE lease_request IS NOT NULL;

DROP INDEX idx_job_status;
DROP INDEX idx_job_type;
CREATE INDEX idx_job_status ON job (org_id, status, created_seq);
CREATE INDEX idx_job_type ON job (org_id, type, status, created_seq);

DROP TABLE job_label;
CREATE TABLE job_label (
    org_id      BLOB    NOT NULL,
    key         TEXT    NOT NULL,
    value       TEXT    NOT NULL,
    created_seq INTEGER NOT NULL,
    job_id      BLOB    NOT NULL,
    PRIMARY KEY (org_id, key, value, created_seq)
) STRICT, WITHOUT ROWID;
INSERT INTO job_label
SELECT job.org_id, label.key, label.value, job.created_seq, job.id FROM job, json_each(job.labels) AS label WHERE job.labels IS NOT NULL;

ALTER TABLE org_head ADD COLUMN ready_gen INTEGER NOT NULL DEFAULT 0;  -- raised by every batch that makes a job ready

-- next_due_at is retention's; this is that of leases, run time-outs and schedules. Null: there are none.
ALTER TABLE org_due ADD COLUMN work_due_at INTEGER;
CREATE INDEX idx_org_due_work ON org_due (work_due_at) WHERE work_due_at IS NOT NULL;
UPDATE org_due SET work_due_at = (SELECT min(due_at) FROM job WHERE job.org_id = org_due.org_id AND due_at IS NOT NULL);
