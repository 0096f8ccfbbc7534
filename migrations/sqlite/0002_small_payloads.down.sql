INSERT INTO job_payload (org_id, job_id, payload)
SELECT j.org_id, j.id, e.payload
FROM job j JOIN job_event e ON e.org_id = j.org_id AND e.seq = j.created_seq
WHERE j.payload_recorded_at IS NOT NULL AND e.payload IS NOT NULL;
ALTER TABLE job_event DROP COLUMN payload;
ALTER TABLE job DROP COLUMN payload_recorded_at;
