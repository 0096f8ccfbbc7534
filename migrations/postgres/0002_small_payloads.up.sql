-- A small payload is stored with its job's first event, and has no row of its own.
ALTER TABLE jobledger.job ADD COLUMN payload_recorded_at TIMESTAMPTZ;   -- recorded_at of the first event, if that has the payload
ALTER TABLE jobledger.job_event ADD COLUMN payload TEXT;                -- JSON, as it was given
