-- loses: every job, every event and every statistic of every org
DROP TABLE jobledger.job_event;
DROP TABLE jobledger.job_payload;
DROP TABLE jobledger.job;
DROP TABLE jobledger.org_month;
DROP TABLE jobledger.org_counter;
DROP TABLE jobledger.org_batch;
DROP TABLE jobledger.org_head;
