-- loses: every job, every event and every statistic of every org
DROP TABLE org_counter;
DROP TABLE job_event;
DROP TABLE job_payload;
DROP TABLE job;
DROP TABLE org_head;
