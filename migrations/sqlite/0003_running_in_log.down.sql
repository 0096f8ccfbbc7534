-- First brings rows up to date with the log.
-- Full images. If the last image is empty, these columns are as in the row.
UPDATE job SET
    failures = ifnull(last.image ->> '$[1]', 0),
    lost_attempts = ifnull(last.image ->> '$[2]', 0),
    started_at = last.ts + last.image ->> '$[3]',
    attempt_started_at = last.ts + last.image ->> '$[4]',
    finished_at = last.ts + last.image ->> '$[5]',
    scheduled_at = last.ts + last.image ->> '$[6]',
    ready_at = last.ts + last.image ->> '$[7]',
    cancel_requested = ifnull(last.image ->> '$[8]', 0),
    outcome_digest = unhex(last.image ->> '$[9]'),
    outcome_nonce = last.image ->> '$[10]',
    lease_worker = last.image ->> '$[11]',
    lease_granted = last.image ->> '$[12]',
    lease_expires_at = last.ts + last.image ->> '$[13]',
    lease_request = last.image ->> '$[14]',
    lease_confirmed = ifnull(last.image ->> '$[15]', 0),
    lease_nonce = ifnull(last.image ->> '$[16]', 0),
    retry_request = last.image ->> '$[17]',
    due_at = last.ts + last.image ->> '$[18]',
    last_error_code = last.image ->> '$[19]',
    last_error_message = last.image ->> '$[20]',
    result_seq = last.image ->> '$[21]',
    result_recorded_at = last.ts + last.image ->> '$[22]'
FROM org_head h CROSS JOIN job_event last ON last.org_id = h.org_id AND last.seq > h.base_seq AND last.image IS NOT NULL
WHERE job.org_id = last.org_id AND job.id = last.job_id AND job.last_seq < last.seq AND last.seq = (
    SELECT max(e.seq) FROM job_event e INDEXED BY idx_job_event_job WHERE e.org_id = job.org_id AND e.job_id = job.id) AND last.image LIKE '[%';
-- Images that have only the lease.
UPDATE job SET
    lease_expires_at = substr(last.said, 1, instr(last.said || ',', ',') - 1),
    lease_confirmed = NOT last.said LIKE '%,0',
    due_at = CASE WHEN last.said NOT LIKE '%,%' THEN last.said + 0
        ELSE nullif(substr(last.said, instr(last.said, ',') + 1, length(last.said) - instr(last.said, ',') - 2), '') + 0 END
FROM (
    SELECT e.org_id, e.job_id, e.seq, rtrim(e.image, '"') AS said FROM org_head h
    CROSS JOIN job_event e ON e.org_id = h.org_id AND e.seq > h.base_seq AND e.image <> '' AND e.image NOT LIKE '[%'
) last
WHERE job.org_id = last.org_id AND job.id = last.job_id AND job.last_seq < last.seq AND last.seq = (
    SELECT max(e.seq) FROM job_event e INDEXED BY idx_job_event_job WHERE e.org_id = job.org_id AND e.job_id = job.id);
UPDATE job SET
    status = last.next_status,
    attempt = last.attempt,
    updated_at = last.ts,
    last_job_seq = last.job_seq,
    last_seq = last.seq,
    last_recorded_at = last.recorded_at
FROM org_head h CROSS JOIN job_event last ON last.org_id = h.org_id AND last.seq > h.base_seq AND last.image IS NOT NULL
WHERE job.org_id = last.org_id AND job.id = last.job_id AND job.last_seq < last.seq AND last.seq = (
    SELECT max(e.seq) FROM job_event e INDEXED BY idx_job_event_job WHERE e.org_id = job.org_id AND e.job_id = job.id);
-- Then the lease extensions in records since.
UPDATE job SET
    lease_expires_at = substr(last.said, 1, instr(last.said || ',', ',') - 1),
    lease_confirmed = NOT last.said LIKE '%,0',
    due_at = CASE WHEN last.said NOT LIKE '%,%' THEN last.said + 0
        ELSE nullif(substr(last.said, instr(last.said, ',') + 1, length(last.said) - instr(last.said, ',') - 2), '') + 0 END
FROM (
    SELECT r.org_id, unhex(x.key) AS job_id, r.seq, x.value AS said, max(r.n) FROM org_head h
    CROSS JOIN org_record r ON r.org_id = h.org_id AND r.n > h.base_n AND r.extensions IS NOT NULL
    CROSS JOIN json_each(r.extensions) x GROUP BY r.org_id, x.key
) last
WHERE job.org_id = last.org_id AND job.id = last.job_id AND job.last_seq <= last.seq AND job.lease_worker IS NOT NULL;
DROP INDEX idx_org_record_extensions;
ALTER TABLE org_record DROP COLUMN extensions;
ALTER TABLE org_head DROP COLUMN base_n;
ALTER TABLE org_head DROP COLUMN base_seq;
ALTER TABLE job_event DROP COLUMN image;
