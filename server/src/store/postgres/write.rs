//! Writes what a batch changes: in one statement with a part for each kind of row, and in others for retention.

use std::{borrow::Cow, collections::HashMap};

use chrono::{Datelike as _, TimeDelta};
use sqlx::{
    postgres::PgArguments,
    types::chrono::{DateTime, TimeZone, Utc},
};

use super::{
    cache::End,
    statement::{Column, Statement, all_same, unnest},
};
use crate::{
    domain::{clock::Time, flow::Width, id::OrgId, job::Job, json::Json, status::JobStatus},
    store::{
        Changes, Head, NewPayload, NextDue, RecordId, StoreError, detail,
        row_writes::RowWrites,
        rows::{EVENT_COLUMNS, labels_json, non_empty},
        state::OrgState,
        states::Left,
    },
};

/// A batch folds if its log is this many events or records beyond what is folded. This bounds the records that a reader of
/// statistics adds up, and the versions that a head has under an old snapshot: one for this many events.
const FOLD_AFTER: i64 = 512;
/// The same for events, in a batch of [`LARGE`] events or more: few such batches come before that.
const FOLD_LARGE_AFTER: i64 = 2_048;
const LARGE: usize = 64;
/// Bytes up to which a result is also in `detail_json`, for people who read the table.
pub(super) const MAX_DETAIL_RESULT: usize = 64 << 10;

/// A batch's part in one org: where it found the log, and what it leaves there.
pub(super) struct OrgWrite<'a> {
    pub(super) org: OrgId,
    pub(super) before: End,
    /// The head and the record that the batch leaves. `None` if it changes neither the log, nor jobs, nor their rows.
    pub(super) after: Option<(Head, RecordId)>,
    /// The database's clock.
    pub(super) now: Time,
    /// What the batch does to the rows of existing jobs.
    pub(super) rows: RowWrites<'a>,
    /// When to sweep the org for due jobs. `None` leaves the time as it is.
    pub(super) next_due: Option<NextDue>,
}

impl<'a> OrgWrite<'a> {
    pub(super) fn new(
        org: OrgId,
        before: End,
        changes: &'a Changes,
        now: Time,
        state: &mut OrgState,
        fold_after: TimeDelta,
    ) -> Self {
        let head = changes.head.unwrap_or(before.head);
        let rows = state.follow(changes, (head.seq, before.record.n + 1), now, fold_after);
        let after = (changes.is_recorded() || rows.is_fold).then(|| (head, before.record.follow()));
        let next_due = match (after, changes.next_due) {
            (None, found @ (None | Some(NextDue::By(_)))) => found,
            (_, found) => state.next_due(found, now, fold_after),
        };
        Self { org, before, after, now, rows, next_due }
    }

    /// The state to cache once the batch is committed.
    pub(super) fn leaving(&self, changes: &Changes, mut state: OrgState) -> Left {
        let end = self.end(changes);
        state.removals = end.removals;
        Left { org: self.org, before: self.before.record, after: end.record, state }
    }

    pub(super) fn record(&self) -> Option<RecordId> {
        self.after.map(|(_, record)| record)
    }

    /// The log's end after the batch.
    pub(super) fn end(&self, changes: &Changes) -> End {
        let Some((head, record)) = self.after else { return self.before };
        if self.shall_fold(changes) {
            let removals = self.before.removals + i64::from(changes.is_removing());
            let (folded_seq, folded_n) = (head.seq, record.n);
            End { head, record, folded_seq, folded_n, removals, base: self.rows.base }
        } else {
            End { head, record, base: self.rows.base, ..self.before }
        }
    }

    /// True if the batch folds its record and those before it into the head and the counters.
    pub(super) fn shall_fold(&self, changes: &Changes) -> bool {
        let Some((after, record)) = &self.after else { return false };
        let before = &self.before;
        after.types != before.head.types
            || after.floor != before.head.floor
            || after.org_seq != before.head.org_seq
            || changes.new_minute.is_some()
            || !changes.removed.is_empty()
            || changes.erases()
            || after.seq - before.folded_seq >= fold_after(changes.events.len())
            || record.n - before.folded_n >= FOLD_AFTER
    }

    /// When the log's last event was recorded, or the batch's time if there is none.
    pub(super) fn recorded_at(&self, after: &Head) -> Time {
        after.recorded_at.unwrap_or(self.now)
    }

    /// True if the batch has the org's first event of a month.
    pub(super) fn begins_month(&self, changes: &Changes) -> bool {
        let first = changes.first();
        first.is_some_and(|first| self.before.head.recorded_at.map(month_of) != Some(month_of(first.recorded_at)))
    }
}

/// How many events a log may be beyond what is folded, after a batch of this many events.
fn fold_after(events: usize) -> i64 {
    if events >= LARGE { FOLD_LARGE_AFTER } else { FOLD_AFTER }
}

/// True if a batch of this many events that begins here has to do more than insert rows.
pub(super) fn is_time_to_fold(end: &End, now: Time, events: usize) -> bool {
    let minute = |time| Width::Minute.start(time);
    end.head.seq + events as i64 - end.folded_seq >= fold_after(events)
        || end.record.n + 1 - end.folded_n >= FOLD_AFTER
        || end.head.recorded_at.is_none_or(|last| minute(last) != minute(now.max(last)))
}

/// What a batch writes for an org.
pub(super) type Write<'a> = (&'a OrgWrite<'a>, &'a Changes);

/// The statement that writes and commits the changes by itself. `None` if they take more than that.
pub(super) fn resuming(writes: &[Write<'_>]) -> Result<Option<(String, PgArguments)>, StoreError> {
    let takes_more = |(log, changes): &Write<'_>| {
        let removes = changes.is_removing() || changes.removed_slice.is_some() || changes.removed_org_events.is_some();
        let has_others = removes
            || !changes.edited.is_empty()
            || !changes.unblanked.is_empty()
            || !changes.bulk.is_empty()
            || changes.next_retention.is_some()
            || begins_log(changes);
        let has_looked = matches!(log.next_due, Some(NextDue::At(_)));
        has_others || has_looked || log.begins_month(changes) || log.shall_fold(changes)
    };
    if writes.iter().any(takes_more) {
        return Ok(None);
    }
    let last: Vec<_> = writes.iter().map(|(log, _)| (log.org, log.before.record)).collect();
    let mut write = Statement::resuming("resume", &last)?;
    write.changes(writes)?;
    Ok(Some(write.finish()))
}

/// The statements that write the changes of a batch: one, and others for what retention removes and when it comes next.
pub(super) fn statements(writes: &[Write<'_>]) -> Result<Vec<(String, PgArguments)>, StoreError> {
    let mut statements = Vec::with_capacity(1);
    // First, since a new job may use the idempotency key of a removed one.
    for (log, changes) in writes {
        let mut remove = Statement::new("remove");
        let org = remove.bind(log.org.0)?;
        remove.removed_slice(&org, changes)?;
        remove.removed_org_events(&org, changes)?;
        if !changes.removed.is_empty() {
            remove.removed_jobs(&org, changes)?;
            remove.removed_flow(&org, &changes.removed_flow)?;
        }
        if remove.has_parts() {
            statements.push(remove.finish());
        }
        // First, too, since one statement would not see that rows with the same keys are gone.
        let mut edit = Statement::new("edit");
        let org = edit.bind(log.org.0)?;
        edit.edited(&org, changes)?;
        edit.erased(&org, changes)?;
        if edit.has_parts() {
            statements.push(edit.finish());
        }
    }
    let mut write = Statement::new("write");
    write.changes(writes)?;
    if write.has_parts() {
        statements.push(write.finish());
    }
    for (log, changes) in writes.iter().filter(|(_, changes)| !changes.forgotten.is_empty()) {
        // Last, since the statement before brings their counters to zero.
        let mut forget = Statement::new("forget_types");
        let names: Vec<_> = changes.forgotten.iter().map(|name| name.to_string()).collect();
        let (org, names) = (forget.bind(log.org.0)?, forget.bind(names)?);
        let sql =
            format_args!("(DELETE FROM jobledger.org_counter WHERE org_id = {org} AND type = ANY ({names}::text[]))");
        forget.part("forgotten", sql);
        statements.push(forget.finish());
    }
    for (log, changes) in writes {
        // The batch with the org's first event writes this time with the new row of `org_due`.
        if let Some(retention) = changes.next_retention.filter(|_| !begins_log(changes)) {
            let mut due = Statement::new("due");
            let (org, retention) = (due.bind(log.org.0)?, due.bind(retention)?);
            due.part(
                "retention",
                format_args!("(UPDATE jobledger.org_due SET next_due_at = {retention} WHERE org_id = {org})"),
            );
            statements.push(due.finish());
        }
    }
    Ok(statements)
}

/// True if the batch has the org's first event.
pub(super) fn begins_log(changes: &Changes) -> bool {
    changes.first().is_some_and(|first| first.seq == 1)
}

/// One kind of row, of all orgs in the batch.
fn rows<'a, T: 'a>(writes: &[Write<'a>], of: impl Fn(&'a Changes) -> &'a [T]) -> Vec<&'a T> {
    writes.iter().flat_map(|(_, changes)| of(changes)).collect()
}

impl Statement {
    /// Adds parts for all changes except removals.
    fn changes(&mut self, writes: &[Write<'_>]) -> Result<(), StoreError> {
        let created = rows(writes, |changes| &changes.created);
        self.created_jobs(&created)?;
        let changed: Vec<_> = writes.iter().flat_map(|(log, _)| &log.rows.rows).map(Cow::as_ref).collect();
        let edited: HashMap<_, _> = writes
            .iter()
            .flat_map(|(log, changes)| changes.edited.iter().map(|edited| ((log.org, edited.job), edited)))
            .collect();
        self.changed_jobs(&changed, |job| edited.contains_key(&(job.org_id, job.id)))?;
        self.payloads(writes)?;
        // An edited job has the labels that it has now.
        let has_other_labels =
            |job: &Job| edited.get(&(job.org_id, job.id)).is_some_and(|edited| edited.labels_before.is_some());
        let labeled = changed.into_iter().filter(|job| has_other_labels(job));
        self.labels(&created.iter().copied().chain(labeled).collect::<Vec<_>>())?;
        self.events(writes)?;
        self.org_events(writes)?;
        self.settings(writes)?;
        self.bulk_operations(writes)?;
        self.months(writes)?;
        self.records(writes)?;
        self.fold(writes)?;
        self.due(writes)
    }

    /// The column with the org of each row.
    pub(super) fn org_column<'q, R>(
        &mut self,
        rows: &'q [R],
        org: impl Fn(&'q R) -> OrgId,
    ) -> Result<Column, StoreError> {
        let is_same = all_same(rows, &org);
        self.either(is_same, "org_id", rows, |row| org(row).0)
    }

    /// Removes payloads and labels that edits replace.
    fn edited(&mut self, org: &str, changes: &Changes) -> Result<(), StoreError> {
        let payloads = changes.edited.iter().filter(|edited| edited.has_other_payload);
        let payloads: Vec<_> = payloads.map(|edited| edited.job.0).collect();
        if !payloads.is_empty() {
            let ids = self.bind(payloads)?;
            self.part(
                "edited_payloads",
                format_args!(
                    "(DELETE FROM jobledger.job_payload WHERE org_id = {org} AND job_id = ANY ({ids}::uuid[]))"
                ),
            );
        }
        let labels = changes.edited.iter().flat_map(|edited| {
            let before = edited.labels_before.iter().flat_map(|labels| labels.iter());
            before.map(move |label| (edited.created_seq, label))
        });
        let labels: Vec<_> = labels.collect();
        if !labels.is_empty() {
            let columns = [
                self.column("key", &labels, |(_, (key, _))| key.as_str().to_owned())?,
                self.column("value", &labels, |(_, (_, value))| value.as_str().to_owned())?,
                self.column("created_seq", &labels, |(seq, _)| *seq)?,
            ];
            self.gone_labels(org, &columns);
        }
        Ok(())
    }

    /// Removes labels by their key, value and `created_seq`.
    pub(super) fn gone_labels(&mut self, org: &str, columns: &[Column]) {
        let rows = unnest(columns);
        self.part(
            "gone_labels",
            format_args!(
                "(DELETE FROM jobledger.job_label l USING {rows}
                 WHERE l.org_id = {org} AND l.key = u.key AND l.value = u.value AND l.created_seq = u.created_seq)"
            ),
        );
    }

    fn payloads(&mut self, writes: &[Write<'_>]) -> Result<(), StoreError> {
        let mut payloads: Vec<(OrgId, &NewPayload)> = Vec::new();
        for (log, changes) in writes {
            payloads.extend(changes.large_payloads().map(|payload| (log.org, payload)));
        }
        if payloads.is_empty() {
            return Ok(());
        }
        let columns = [
            self.org_column(&payloads, |(org, _)| *org)?,
            self.column("job_id", &payloads, |(_, payload)| payload.job.0)?,
            self.column("payload", &payloads, |(_, payload)| payload.json.as_str())?,
        ];
        self.insert("payloads", "job_payload", &columns);
        Ok(())
    }

    fn labels(&mut self, jobs: &[&Job]) -> Result<(), StoreError> {
        let columns = self.label_columns(jobs)?;
        if let Some(columns) = columns {
            self.insert("labels", "job_label", &columns);
        }
        Ok(())
    }

    pub(super) fn label_columns(&mut self, jobs: &[&Job]) -> Result<Option<[Column; 5]>, StoreError> {
        let labels: Vec<_> =
            jobs.iter().flat_map(|job| job.spec.labels.iter().map(move |label| (*job, label))).collect();
        if labels.is_empty() {
            return Ok(None);
        }
        Ok(Some([
            self.org_column(&labels, |(job, _)| job.org_id)?,
            self.column("key", &labels, |(_, (key, _))| key.as_str().to_owned())?,
            self.column("value", &labels, |(_, (_, value))| value.as_str().to_owned())?,
            self.column("created_seq", &labels, |(job, _)| job.created_seq)?,
            self.column("job_id", &labels, |(job, _)| job.id.0)?,
        ]))
    }

    fn events(&mut self, writes: &[Write<'_>]) -> Result<(), StoreError> {
        let events = &rows(writes, |changes| &changes.events)[..];
        if events.is_empty() {
            return Ok(());
        }
        let details =
            events.iter().map(|event| detail::write(event, MAX_DETAIL_RESULT)).collect::<Result<Vec<_>, _>>()?;
        let time_is_same = all_same(events, |event| (event.ts, event.recorded_at));
        let kind_is_same = all_same(events, |event| {
            let path = (event.kind, event.prev_status, event.next_status, event.attempt, event.job_seq);
            (path, &event.actor, &event.job_type, event.weight())
        });
        let labels_are_same = all_same(events, |event| &event.labels);
        let says_nothing = details.iter().all(Option::is_none);
        let mut columns = vec![
            self.org_column(events, |event| event.org_id)?,
            self.column("seq", events, |event| event.seq)?,
            self.column("job_id", events, |event| event.job_id.0)?,
            self.either(kind_is_same, "job_seq", events, |event| event.job_seq)?,
            self.either(time_is_same, "ts", events, |event| event.ts)?,
            self.either(time_is_same, "recorded_at", events, |event| event.recorded_at)?,
            self.either(kind_is_same, "kind", events, |event| event.kind.as_str())?,
            self.either(kind_is_same, "prev_status", events, |event| event.prev_status.map(JobStatus::as_str))?,
            self.either(kind_is_same, "next_status", events, |event| event.next_status.as_str())?,
            self.either(kind_is_same, "attempt", events, |event| event.attempt)?,
            self.either(kind_is_same, "actor", events, |event| non_empty(&event.actor))?,
            self.either(kind_is_same, "job_type", events, |event| &*event.job_type)?,
            self.either(says_nothing, "detail_json", &details, Option::as_deref)?,
            self.either(labels_are_same, "labels", events, |event| labels_json(&event.labels))?,
            self.either(kind_is_same, "bytes", events, |event| i32::try_from(event.weight()).unwrap_or(i32::MAX))?,
        ];
        debug_assert!(columns.iter().map(|column| column.name).take(14).eq(EVENT_COLUMNS));
        if events.iter().any(|event| event.result.is_some()) {
            columns.push(self.column("result", events, |event| event.result.as_ref().map(Json::as_str))?);
        }
        let mut payloads = Vec::with_capacity(events.len());
        for (_, changes) in writes {
            let small = changes.small_payloads();
            payloads.extend(changes.events.iter().map(|event| small.get(&event.seq).map(|payload| payload.as_str())));
        }
        if payloads.iter().any(Option::is_some) {
            columns.push(self.column("payload", &payloads, |payload| *payload)?);
        }
        let image = |log: &'_ OrgWrite<'_>, seq| log.rows.images.get(seq).cloned();
        let images = writes.iter().flat_map(|(log, changes)| changes.events.iter().map(|event| image(log, &event.seq)));
        let images: Vec<_> = images.collect();
        if images.iter().any(Option::is_some) {
            columns.push(self.column("image", &images, Option::as_deref)?);
        }
        self.insert("events", "job_event", &columns);
        Ok(())
    }
}

/// The first instant of a time's month, in UTC.
pub(super) fn month_of(time: Time) -> DateTime<Utc> {
    Utc.with_ymd_and_hms(time.year(), time.month(), 1, 0, 0, 0).single().expect("every month has a first day in UTC")
}
