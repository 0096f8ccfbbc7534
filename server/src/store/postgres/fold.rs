//! What a batch writes about a log beside its events: months, records, heads, counters, and when the org is due.

use super::{
    series,
    statement::{Statement, all_same, unnest},
    write::{OrgWrite, Write, begins_log, month_of},
};
use crate::{
    domain::{
        clock::Time,
        id::{JobId, OrgId},
    },
    store::{
        Changes, Head, NextDue, RecordId, StoreError,
        record::{RECORD_FORMAT, RECORDS_DROPPED, RECORDS_KEPT},
    },
};

/// The ids as the text of an SQL array. `None` if there are none.
fn array(ids: &[JobId]) -> Option<String> {
    let ids: Vec<_> = ids.iter().map(|id| id.0.to_string()).collect();
    (!ids.is_empty()).then(|| format!("{{{}}}", ids.join(",")))
}

/// A log whose batch folds: the head and the record that the batch leaves.
type Folding<'a> = (&'a OrgWrite<'a>, &'a Changes, &'a Head, &'a RecordId);

impl Statement {
    /// Writes the `seq` at which a month begins, for orgs whose first batch of that month this is.
    pub(super) fn months(&mut self, writes: &[Write<'_>]) -> Result<(), StoreError> {
        let begun: Vec<_> = writes
            .iter()
            .filter(|(log, changes)| log.begins_month(changes))
            .filter_map(|(log, changes)| Some((log.org, changes.first()?)))
            .collect();
        if begun.is_empty() {
            return Ok(());
        }
        let org = self.bind(begun.iter().map(|(org, _)| org.0).collect::<Vec<_>>())?;
        let month = self.bind(begun.iter().map(|(_, first)| month_of(first.recorded_at)).collect::<Vec<_>>())?;
        let seq = self.bind(begun.iter().map(|(_, first)| first.seq).collect::<Vec<_>>())?;
        self.part(
            "months",
            format_args!(
                "(INSERT INTO jobledger.org_month (org_id, month, first_seq)
                 SELECT * FROM unnest({org}::uuid[], {month}::timestamptz[], {seq}::bigint[]) ON CONFLICT DO NOTHING)"
            ),
        );
        Ok(())
    }

    /// Appends the batch's record to each log that changes.
    pub(super) fn records(&mut self, writes: &[Write<'_>]) -> Result<(), StoreError> {
        let records: Vec<_> = writes
            .iter()
            .filter_map(|(log, changes)| log.after.as_ref().map(|(after, record)| (*log, *changes, after, record)))
            .collect();
        if records.is_empty() {
            return Ok(());
        }
        let is_plain = all_same(&records, |(.., after, _)| after.recorded_at);
        let quiet: Vec<_> = records.iter().map(|(log, ..)| array(&log.rows.quiet)).collect();
        let mut columns = vec![
            self.org_column(&records, |(log, ..)| log.org)?,
            self.column("n", &records, |(.., record)| record.n)?,
            self.column("id", &records, |(.., record)| record.id)?,
            self.column("prev", &records, |(log, ..)| log.before.record.id)?,
            self.column("seq", &records, |(_, _, after, _)| after.seq)?,
            self.column("ready_gen", &records, |(_, _, after, _)| after.ready_gen)?,
            self.column("jobs", &records, |(_, _, after, _)| after.stock.jobs)?,
            self.column("bytes", &records, |(_, _, after, _)| after.stock.bytes)?,
            self.either(is_plain, "recorded_at", &records, |(log, _, after, _)| log.recorded_at(after))?,
            self.either(true, "written_at", &records, |(log, ..)| log.now)?,
            self.column("counts", &records, |(_, changes, ..)| series::json(&changes.tallies))?,
            self.either(true, "format", &records, |_| RECORD_FORMAT)?,
            self.column("base_seq", &records, |(log, ..)| log.rows.base.seq)?,
            self.column("base_n", &records, |(log, ..)| log.rows.base.n)?,
        ];
        if quiet.iter().any(Option::is_some) {
            columns.push(self.column("quiet", &quiet, Option::as_deref)?);
        }
        if records.iter().any(|(log, ..)| log.rows.extensions.is_some()) {
            columns.push(self.column("extensions", &records, |(log, ..)| log.rows.extensions.as_deref())?);
        }
        self.insert("records", "org_record", &columns);
        Ok(())
    }

    /// Folds the records of the logs that `Log::shall_fold` selects, that of this batch included, into their heads, counters
    /// and series. Removes old records.
    pub(super) fn fold(&mut self, writes: &[Write<'_>]) -> Result<(), StoreError> {
        let folding: Vec<_> = writes
            .iter()
            .filter(|(log, changes)| log.shall_fold(changes))
            .filter_map(|(log, changes)| log.after.as_ref().map(|(after, record)| (*log, *changes, after, record)))
            .collect();
        if folding.is_empty() {
            return Ok(());
        }
        let org = self.bind(folding.iter().map(|(log, ..)| log.org.0).collect::<Vec<_>>())?;
        let folded = self.bind(folding.iter().map(|(log, ..)| log.before.folded_n).collect::<Vec<_>>())?;
        let needless = folding.iter().map(|(log, ..)| log.before.folded_n.min(log.rows.base.n));
        let needless = self.bind(needless.collect::<Vec<_>>())?;
        let before = self.bind(folding.iter().map(|(log, ..)| log.before.record.n).collect::<Vec<_>>())?;
        let times: Vec<_> = folding.iter().map(|(log, _, after, _)| log.recorded_at(after)).collect();
        let old = self.bind(folding.iter().map(|(log, ..)| log.now - RECORDS_KEPT).collect::<Vec<_>>())?;
        let recorded_at = self.bind(times)?;
        let counts =
            self.bind(folding.iter().map(|(_, changes, ..)| series::json(&changes.tallies)).collect::<Vec<_>>())?;
        self.part(
            "changes",
            format_args!(
                "(SELECT folded.org_id, folded.recorded_at, change.key, change.value FROM (
                    SELECT u.org_id, r.recorded_at, r.counts
                    FROM unnest({org}::uuid[], {folded}::bigint[], {before}::bigint[]) AS u (org_id, folded, before) CROSS JOIN LATERAL (
                        SELECT r.recorded_at, r.counts FROM jobledger.org_record r
                        WHERE r.org_id = u.org_id AND r.n > u.folded AND r.n <= u.before OFFSET 0) r
                    UNION ALL
                    SELECT u.org_id, u.recorded_at, u.counts::jsonb
                    FROM unnest({org}::uuid[], {recorded_at}::timestamptz[], {counts}::text[]) AS u (org_id, recorded_at, counts)
                 ) folded, jsonb_each(folded.counts) change)"
            ),
        );
        // Bounded below by `kept_n`: the index still has rows that were removed earlier, while an old snapshot sees them.
        self.part(
            "dropped",
            format_args!(
                "(DELETE FROM jobledger.org_record r USING (
                    SELECT oldest.place FROM unnest({org}::uuid[], {needless}::bigint[], {old}::timestamptz[]) AS u (org_id, needless, old)
                    CROSS JOIN LATERAL (SELECT h.kept_n FROM jobledger.org_head h WHERE h.org_id = u.org_id OFFSET 0) h
                    CROSS JOIN LATERAL (
                        SELECT r.place, r.n, max(r.n) FILTER (WHERE r.written_at < u.old) OVER () AS last_old FROM (
                            SELECT r.ctid AS place, r.n, r.written_at FROM jobledger.org_record r
                            WHERE r.org_id = u.org_id AND r.n >= h.kept_n AND r.n <= u.needless ORDER BY r.n LIMIT {RECORDS_DROPPED}) r
                    ) oldest
                    WHERE oldest.n <= oldest.last_old) gone
                 WHERE r.ctid = gone.place RETURNING r.org_id, r.n)"
            ),
        );
        self.counters();
        self.series();
        self.forget(
            &folding.iter().filter_map(|(log, changes, ..)| Some((log.org, changes.new_minute?))).collect::<Vec<_>>(),
        )?;
        self.folded_heads(&folding)
    }

    /// Writes the heads as of their last records, and from which record on records are kept.
    fn folded_heads(&mut self, folding: &[Folding<'_>]) -> Result<(), StoreError> {
        let is_removing = |changes: &Changes| i64::from(changes.is_removing());
        let columns = [
            self.column("org_id", folding, |(log, ..)| log.org.0)?,
            self.column("n", folding, |(.., record)| record.n)?,
            self.column("record", folding, |(.., record)| record.id)?,
            self.column("seq", folding, |(_, _, after, _)| after.seq)?,
            self.column("recorded_at", folding, |(_, _, after, _)| after.recorded_at)?,
            self.column("floor_seq", folding, |(_, _, after, _)| after.floor)?,
            self.column("types", folding, |(_, _, after, _)| after.types)?,
            self.column("ready_gen", folding, |(_, _, after, _)| after.ready_gen)?,
            self.column("jobs", folding, |(_, _, after, _)| after.stock.jobs)?,
            self.column("bytes", folding, |(_, _, after, _)| after.stock.bytes)?,
            self.column("org_seq", folding, |(_, _, after, _)| after.org_seq)?,
            self.column("base_seq", folding, |(log, ..)| log.rows.base.seq)?,
            self.column("base_n", folding, |(log, ..)| log.rows.base.n)?,
            self.column("removals", folding, |(_, changes, ..)| is_removing(changes))?,
        ];
        let names: Vec<_> = columns.iter().map(|column| column.name).collect();
        let set: Vec<_> = names[1..names.len() - 1].iter().map(|name| format!("{name} = excluded.{name}")).collect();
        let (names, set, rows) = (names.join(", "), set.join(", "), unnest(&columns));
        self.part(
            "heads",
            format_args!(
                "(INSERT INTO jobledger.org_head AS h ({names}, kept_n)
                 SELECT {names}, coalesce((SELECT max(dropped.n) + 1 FROM dropped WHERE dropped.org_id = u.org_id), 1) FROM {rows}
                 ON CONFLICT (org_id) DO UPDATE SET {set}, removals = h.removals + excluded.removals,
                    kept_n = greatest(h.kept_n, excluded.kept_n))"
            ),
        );
        Ok(())
    }

    /// Writes when each org's jobs are due next, and when retention is, if the batch begins the org's log.
    pub(super) fn due(&mut self, writes: &[Write<'_>]) -> Result<(), StoreError> {
        let (begun, others): (Vec<_>, Vec<_>) = writes.iter().copied().partition(|(_, changes)| begins_log(changes));
        let by = |next| match next {
            Some(NextDue::By(due)) => Some(due),
            Some(NextDue::At(due)) => due,
            None => None,
        };
        let first: Vec<_> = begun
            .iter()
            .map(|(log, changes)| (log.org, changes.next_retention.unwrap_or(log.now), by(log.next_due)))
            .collect();
        let mut earlier = Vec::new();
        let mut exact = Vec::new();
        for (log, _) in others {
            match log.next_due {
                // The retention time is a placeholder: the org has a row, and keeps that row's retention time.
                Some(NextDue::By(due)) => earlier.push((log.org, due, Some(due))),
                Some(NextDue::At(due)) => exact.push((log.org, log.now, due)),
                None => {}
            }
        }
        const SAME: &str = "work_due_at = excluded.work_due_at";
        self.due_rows("first_due", &first, &format!("next_due_at = excluded.next_due_at, {SAME}"))?;
        // Most rows have an earlier time already, and are not written then.
        let if_earlier = format!("{SAME} WHERE d.work_due_at IS NULL OR d.work_due_at > excluded.work_due_at");
        self.due_rows("earlier_due", &earlier, &if_earlier)?;
        self.due_rows("exact_due", &exact, SAME)
    }

    fn due_rows(&mut self, part: &str, rows: &[(OrgId, Time, Option<Time>)], set: &str) -> Result<(), StoreError> {
        if rows.is_empty() {
            return Ok(());
        }
        let org = self.bind(rows.iter().map(|(org, ..)| org.0).collect::<Vec<_>>())?;
        let retention = self.bind(rows.iter().map(|(_, retention, _)| *retention).collect::<Vec<_>>())?;
        let due = self.bind(rows.iter().map(|(.., due)| *due).collect::<Vec<_>>())?;
        let guard = self.guard(" CROSS JOIN");
        self.part(
            part,
            format_args!(
                "(INSERT INTO jobledger.org_due AS d (org_id, next_due_at, work_due_at)
                 SELECT u.* FROM unnest({org}::uuid[], {retention}::timestamptz[], {due}::timestamptz[]) AS u{guard}
                 ON CONFLICT (org_id) DO UPDATE SET {set})"
            ),
        );
        Ok(())
    }
}
