-- What an org has: its jobs, and the approximate bytes of them and their log (JobEvent::weight, Job::weight).
ALTER TABLE job_event ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;      -- approximate size in memory
UPDATE job_event SET bytes = 256 + ifnull(octet_length(detail_json), 0) + ifnull(octet_length(labels), 0) + ifnull((
    SELECT octet_length(x.result) FROM job_result x
    WHERE x.org_id = job_event.org_id AND x.job_id = job_event.job_id AND x.seq = job_event.seq), 0);
ALTER TABLE org_head ADD COLUMN jobs INTEGER NOT NULL DEFAULT 0;
ALTER TABLE org_head ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
UPDATE org_head SET
    jobs = (SELECT count(*) FROM job j WHERE j.org_id = org_head.org_id),
    bytes = (SELECT ifnull(sum(1024 + j.payload_bytes), 0) FROM job j WHERE j.org_id = org_head.org_id)
        + (SELECT ifnull(sum(e.bytes), 0) FROM job_event e WHERE e.org_id = org_head.org_id);
