DROP TABLE org_counter;
DROP TABLE job_event;
DROP TABLE job_payload;
DROP TABLE job;
DROP TABLE org_head;
