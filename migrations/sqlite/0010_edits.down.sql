-- Refused once a job was edited, since no version before can read that.
CREATE TABLE edits (n INTEGER NOT NULL CONSTRAINT no_job_may_have_been_edited CHECK (n = 0)) STRICT;
INSERT INTO edits SELECT count(*) FROM (SELECT 1 FROM job_event WHERE kind = 'edited' LIMIT 1);
INSERT INTO edits SELECT count(*) FROM (SELECT 1 FROM bulk_operation WHERE request ->> 'action' = 'update' LIMIT 1);
INSERT INTO edits SELECT count(*) FROM (
    SELECT 1 FROM org_event WHERE kind = 'bulk_started' AND detail_json ->> 'action' = 'update' LIMIT 1);
DROP TABLE edits;
