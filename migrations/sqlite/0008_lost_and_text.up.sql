-- Lost attempts. Payloads and results are text here already. Whoever created the jobs that are there counted on each expired lease
-- as a failure.
ALTER TABLE job ADD COLUMN max_lost_attempts INTEGER NOT NULL DEFAULT 0;
ALTER TABLE job ADD COLUMN lost_attempts INTEGER NOT NULL DEFAULT 0;     -- expired leases that did not count as failures
ALTER TABLE org_series ADD COLUMN lost INTEGER NOT NULL DEFAULT 0;
