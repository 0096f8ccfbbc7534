//! Writes the counters and the series.
//!
//! A batch writes its changes as JSON into `org_record`. Folding adds them up in the database.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Map, Value};

use super::statement::Statement;
use crate::{
    domain::{
        clock::Time,
        flow::{Flow, Width},
        id::OrgId,
        status::JobStatus,
    },
    store::{RemovedFlow, StoreError, Tally, rows::json_text, series::FORGOTTEN_AT_ONCE},
};

/// Positions in the JSON array of a tally, after the counts by status.
const SCHEDULED: usize = JobStatus::ALL.len();
const FLOW: usize = SCHEDULED + 1;
const WAITS: usize = FLOW + Flow::NAMES.len();
const RUNS: usize = WAITS + 1;

/// The changes of a batch, by type: an array of counts without the zeros at its end.
pub(super) fn json(tallies: &BTreeMap<Arc<str>, Tally>) -> String {
    let value = |tally: &Tally| {
        let statuses = JobStatus::ALL.map(|status| tally.counts.get(status));
        let counts = statuses.into_iter().chain([tally.scheduled]).chain(tally.flow.counts());
        let mut values: Vec<_> = counts.map(Value::from).collect();
        values.push(tally.flow.waits.counts().into());
        values.push(tally.flow.runs.counts().into());
        let is_nothing = |value: &Value| value == 0 || value.as_array().is_some_and(Vec::is_empty);
        values.truncate(values.iter().rposition(|value| !is_nothing(value)).map_or(0, |last| last + 1));
        Value::from(values)
    };
    json_text(&tallies.iter().map(|(name, tally)| (name.to_string(), value(tally))).collect::<Map<_, _>>())
}

impl Statement {
    /// Adds up the part `changes` into the counters of its orgs.
    pub(super) fn counters(&mut self) {
        let names: Vec<_> = JobStatus::ALL.map(JobStatus::as_str).into_iter().chain(["scheduled"]).collect();
        let sums: Vec<_> =
            (0..names.len()).map(|n| format!("coalesce(sum((changes.value ->> {n})::bigint), 0)")).collect();
        let add: Vec<_> = names.iter().map(|name| format!("{name} = c.{name} + excluded.{name}")).collect();
        let (names, sums, add) = (names.join(", "), sums.join(", "), add.join(", "));
        self.part(
            "counters",
            format_args!(
                "(INSERT INTO jobledger.org_counter AS c (org_id, type, {names})
                 SELECT changes.org_id, changes.key, {sums} FROM changes GROUP BY changes.org_id, changes.key
                 ON CONFLICT (org_id, type) DO UPDATE SET {add})"
            ),
        );
    }

    /// Adds up the part `changes` into the series of its orgs.
    pub(super) fn series(&mut self) {
        let sums: Vec<_> =
            (FLOW..WAITS).map(|n| format!("coalesce(sum((changes.value ->> {n})::bigint), 0)")).collect();
        let (names, sums) = (Flow::NAMES.join(", "), sums.join(", "));
        let add = add();
        self.part(
            "series",
            format_args!(
                "(INSERT INTO jobledger.org_series AS s (org_id, width, start, type, removed, {names}, waits, runs)
                 SELECT changes.org_id, w.width, date_bin(w.width * interval '1 second', changes.recorded_at, 'epoch'), changes.key, false,
                    {sums}, jobledger.sum_counts(jobledger.to_counts(changes.value -> {WAITS})),
                    jobledger.sum_counts(jobledger.to_counts(changes.value -> {RUNS}))
                 FROM changes CROSS JOIN (VALUES (60::smallint), (3600::smallint)) w (width)
                 WHERE jsonb_array_length(changes.value) > {FLOW} GROUP BY 1, 2, 3, 4
                 ON CONFLICT (org_id, width, start, type, removed) DO UPDATE SET {add})"
            ),
        );
    }

    /// Removes old rows from the series of some orgs, as of these times.
    pub(super) fn forget(&mut self, orgs: &[(OrgId, Time)]) -> Result<(), StoreError> {
        if orgs.is_empty() {
            return Ok(());
        }
        let org = self.bind(orgs.iter().map(|(org, _)| org.0).collect::<Vec<_>>())?;
        for (width, part) in [(Width::Minute, "forget_minutes"), (Width::Hour, "forget_hours")] {
            let seconds = width.seconds();
            let kept_since = self.bind(orgs.iter().map(|(_, time)| width.kept_since(*time)).collect::<Vec<_>>())?;
            self.part(
                part,
                format_args!(
                    "(DELETE FROM jobledger.org_series s USING (
                        SELECT old.place FROM unnest({org}::uuid[], {kept_since}::timestamptz[]) AS u (org_id, kept_since)
                        CROSS JOIN LATERAL (
                            SELECT s.ctid AS place FROM jobledger.org_series s
                            WHERE s.org_id = u.org_id AND s.width = {seconds} AND s.start < u.kept_since
                            ORDER BY s.start LIMIT {FORGOTTEN_AT_ONCE}) old) gone
                     WHERE s.ctid = gone.place)"
                ),
            );
        }
        Ok(())
    }

    /// Adds what retention removes from the log to the `removed` rows of the series.
    pub(super) fn removed_flow(&mut self, org: &str, removed: &RemovedFlow) -> Result<(), StoreError> {
        let rows: Vec<_> = removed.iter().collect();
        if rows.is_empty() {
            return Ok(());
        }
        let width = self.bind(rows.iter().map(|(bucket, _)| bucket.width.seconds() as i16).collect::<Vec<_>>())?;
        let start = self.bind(rows.iter().map(|(bucket, _)| bucket.start).collect::<Vec<_>>())?;
        let name = self.bind(rows.iter().map(|(bucket, _)| bucket.job_type.to_string()).collect::<Vec<_>>())?;
        let counts = (0..Flow::NAMES.len())
            .map(|n| self.bind(rows.iter().map(|(_, flow)| flow.counts()[n]).collect::<Vec<_>>()))
            .map(|place| place.map(|place| format!("{place}::bigint[]")))
            .collect::<Result<Vec<_>, _>>()?
            .join(", ");
        let waits = self.bind(rows.iter().map(|(_, flow)| json_text(&flow.waits.counts())).collect::<Vec<_>>())?;
        let runs = self.bind(rows.iter().map(|(_, flow)| json_text(&flow.runs.counts())).collect::<Vec<_>>())?;
        let names = Flow::NAMES.join(", ");
        let add = add();
        self.part(
            "removed_flow",
            format_args!(
                "(INSERT INTO jobledger.org_series AS s (org_id, width, start, type, removed, {names}, waits, runs)
                 SELECT {org}, u.width, u.start, u.type, true, {names},
                    jobledger.to_counts(u.waits::jsonb), jobledger.to_counts(u.runs::jsonb)
                 FROM unnest({width}::smallint[], {start}::timestamptz[], {name}::text[], {counts}, {waits}::text[], {runs}::text[])
                    AS u (width, start, type, {names}, waits, runs)
                 ON CONFLICT (org_id, width, start, type, removed) DO UPDATE SET {add})"
            ),
        );
        Ok(())
    }
}

/// The SET list that adds to an existing row of the series.
fn add() -> String {
    let mut add: Vec<_> = Flow::NAMES.iter().map(|name| format!("{name} = s.{name} + excluded.{name}")).collect();
    add.extend(["waits", "runs"].map(|name| format!("{name} = jobledger.add_counts(s.{name}, excluded.{name})")));
    add.join(", ")
}
