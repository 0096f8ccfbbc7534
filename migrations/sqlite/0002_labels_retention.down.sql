-- loses: which labels find which jobs (the jobs keep their labels), and when background work is due
DROP TABLE org_due;
DROP TABLE job_label;
DROP INDEX idx_job_finished;
DROP INDEX idx_job_type;
DROP INDEX idx_job_status;
ALTER TABLE job DROP COLUMN result_recorded_at;
ALTER TABLE job DROP COLUMN last_recorded_at;
