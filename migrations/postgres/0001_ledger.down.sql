-- loses: every job, every event, every statistic and every API token of every org
DROP TABLE jobledger.api_token, jobledger.job_event, jobledger.job_label, jobledger.job_remains, jobledger.job_payload, jobledger.job, jobledger.org_due,
    jobledger.org_month, jobledger.org_series, jobledger.org_counter, jobledger.org_record, jobledger.org_head, jobledger.ledger;
