-- A small payload is stored with its job's first event, and has no row of its own.
ALTER TABLE job ADD COLUMN payload_recorded_at INTEGER;     -- recorded_at of the first event, if that has the payload
ALTER TABLE job_event ADD COLUMN payload TEXT;              -- JSON, as it was given
