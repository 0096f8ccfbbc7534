-- Refused once a job was erased, since no version before can read that.
CREATE TABLE erasures (n INTEGER NOT NULL CONSTRAINT no_job_may_have_been_erased CHECK (n = 0)) STRICT;
INSERT INTO erasures SELECT count(*) FROM (SELECT 1 FROM job_event WHERE kind = 'erased' LIMIT 1);
INSERT INTO erasures SELECT count(*) FROM (
    SELECT 1 FROM bulk_operation WHERE request ->> 'action' IN ('erase', 'cancel_and_erase') LIMIT 1);
INSERT INTO erasures SELECT count(*) FROM (
    SELECT 1 FROM org_event WHERE kind = 'bulk_started' AND detail_json ->> 'action' IN ('erase', 'cancel_and_erase') LIMIT 1);
DROP TABLE erasures;
DROP TABLE job_unblanked;
ALTER TABLE job DROP COLUMN erased_at;
