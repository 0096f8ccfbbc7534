-- loses: which attempts were lost (the log then says that they were given back), how many may be, and how numbers in payloads and results were written
DROP FUNCTION jobledger.job_page(UUID, UUID, BIGINT, TEXT[], TEXT[], BOOLEAN, JSONB, BIGINT, BIGINT);
DROP FUNCTION jobledger.log_page(UUID, BIGINT, BIGINT, TEXT[], TEXT[], BOOLEAN, JSONB, BIGINT, BIGINT);
DROP FUNCTION jobledger.histories_of(UUID, UUID[], BIGINT, BIGINT, BIGINT);
DROP FUNCTION jobledger.series_of(UUID, TEXT[]);
DROP FUNCTION jobledger.summary_of(UUID, TEXT[], INTERVAL, SMALLINT, BOOLEAN);
DROP FUNCTION jobledger.jobs_of(UUID[], INTEGER[], UUID[], INTEGER);
DROP FUNCTION jobledger.contents_of(UUID, UUID[]);
DROP FUNCTION jobledger.job_of(UUID, UUID);
ALTER TABLE jobledger.job_event NO FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.org_batch NO FORCE ROW LEVEL SECURITY;
UPDATE jobledger.job_event SET detail_json = coalesce(detail_json, '{}') || jsonb_build_object('result', result::jsonb)
WHERE result IS NOT NULL AND NOT coalesce(detail_json, '{}') ? 'result';
UPDATE jobledger.job_event SET kind = 'released' WHERE kind = 'lost';
UPDATE jobledger.org_batch b SET counts = (
    SELECT jsonb_object_agg(change.key,
        CASE WHEN jsonb_array_length(change.value) > 13 THEN change.value - 13 ELSE change.value END)
    FROM jsonb_each(b.counts) change)
WHERE b.counts <> '{}';
ALTER TABLE jobledger.job_event FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.org_batch FORCE ROW LEVEL SECURITY;
ALTER TABLE jobledger.job_event DROP COLUMN result;
ALTER TABLE jobledger.job_payload ALTER COLUMN payload TYPE JSONB USING payload::jsonb;
ALTER TABLE jobledger.org_series DROP COLUMN lost;
ALTER TABLE jobledger.job DROP COLUMN lost_attempts, DROP COLUMN max_lost_attempts;
