-- loses: every job, every event, every statistic and every API token of every org
DROP TABLE api_token;
DROP TABLE job_event;
DROP TABLE job_label;
DROP TABLE job_remains;
DROP TABLE job_result;
DROP TABLE job_payload;
DROP TABLE job;
DROP TABLE org_due;
DROP TABLE org_series;
DROP TABLE org_counter;
DROP TABLE org_record;
DROP TABLE org_head;
DROP TABLE ledger;
