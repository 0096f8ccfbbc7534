-- loses: leases (the jobs stay running, and nobody can report under a lease) and run time-outs
DROP FUNCTION jobledger.list_jobs(UUID, BIGINT, TEXT, TEXT, TEXT[], TEXT[], JSONB, TEXT, TIMESTAMPTZ, TIMESTAMPTZ, BIGINT, BIGINT);
DROP FUNCTION jobledger.read_contents(UUID, UUID[]);
DROP FUNCTION jobledger.get_job(UUID, UUID);
DROP FUNCTION jobledger.read_reaches(UUID[]);
DROP FUNCTION jobledger.count_jobs(UUID, TEXT[]);
DROP FUNCTION jobledger.begin_batch(UUID);

DROP INDEX jobledger.idx_org_due_work;
ALTER TABLE jobledger.org_due DROP COLUMN work_due_at;
ALTER TABLE jobledger.org_batch DROP COLUMN ready_gen;
ALTER TABLE jobledger.org_head DROP COLUMN ready_gen;

DROP INDEX jobledger.idx_job_type;
DROP INDEX jobledger.idx_job_status;
DROP INDEX jobledger.idx_job_lease_request;
DROP INDEX jobledger.idx_job_due;
DROP INDEX jobledger.idx_job_ready;
CREATE INDEX idx_job_queued ON jobledger.job (org_id, type, ready_at) WHERE status = 'queued';
CREATE INDEX idx_job_status ON jobledger.job (org_id, status, id);
CREATE INDEX idx_job_type ON jobledger.job (org_id, type, status, id);

ALTER TABLE jobledger.job_label DROP CONSTRAINT job_label_pkey, DROP COLUMN created_seq, ADD PRIMARY KEY (org_id, key, value, job_id);

ALTER TABLE jobledger.job
    DROP COLUMN due_at, DROP COLUMN retry_request, DROP COLUMN lease_epoch, DROP COLUMN lease_confirmed,
    DROP COLUMN lease_request, DROP COLUMN lease_expires_at, DROP COLUMN lease_granted, DROP COLUMN lease_worker,
    DROP COLUMN outcome_epoch, DROP COLUMN created_seq, DROP COLUMN payload_bytes, DROP COLUMN run_timeout;
