ALTER TABLE jobledger.org_record DROP COLUMN jobs, DROP COLUMN bytes;
ALTER TABLE jobledger.org_head DROP COLUMN jobs, DROP COLUMN bytes;
