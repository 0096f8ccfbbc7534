//! What a batch writes of jobs: parts of its statement.

use std::collections::BTreeMap;

use super::statement::{Column, Statement, all_same, unnest};
use crate::{
    domain::{job::Job, status::JobStatus},
    store::{
        StoreError,
        job_columns::{JOB_COLUMNS, JobColumn, Kind, Shared},
        value::Value,
    },
};

impl Statement {
    /// New jobs: those that only wait, which is nearly all, apart from those that this batch has worked on already.
    pub(super) fn created_jobs(&mut self, jobs: &[&Job]) -> Result<(), StoreError> {
        let (waiting, others): (Vec<_>, Vec<_>) = jobs.iter().copied().partition(|job| job.last_job_seq == 1);
        for (part, jobs) in [("waiting_jobs", waiting), ("created_jobs", others)] {
            if !jobs.is_empty() {
                let columns = self.new_job_columns(&jobs)?;
                self.insert(part, "job", &columns);
            }
        }
        Ok(())
    }

    pub(super) fn changed_jobs(&mut self, jobs: &[&Job]) -> Result<(), StoreError> {
        if jobs.is_empty() {
            return Ok(());
        }
        let org = self.org_column(jobs, |job| job.org_id)?;
        let id = self.column("id", jobs, |job| job.id.0)?;
        let columns = self.job_columns(jobs, false, |column| column.changes)?;
        let set: Vec<_> = columns.iter().map(|column| format!("{0} = excluded.{0}", column.name)).collect();
        let names: Vec<_> = columns.iter().map(|column| column.name).collect();
        let values: Vec<_> = columns.iter().map(Column::value).collect();
        let (set, names, values) = (set.join(", "), names.join(", "), values.join(", "));
        let rows = unnest([&org, &id].into_iter().chain(&columns));
        let org = org.value();
        let guard = self.guard(" CROSS JOIN");
        // The rows are there, and so none is inserted. It is written like this because it looks each up by its key, whatever
        // PostgreSQL takes the table for: an UPDATE that was planned while it was small goes on walking the org's rows.
        self.part(
            "changed_jobs",
            format_args!(
                "(INSERT INTO jobledger.job (org_id, id, type, created_seq, retry_initial, retry_multiplier, retry_max, {names})
                 SELECT {org}, u.id, '', 0, 0, 0, 0, {values} FROM {rows}{guard}
                 ON CONFLICT (org_id, id) DO UPDATE SET {set})"
            ),
        );
        Ok(())
    }

    /// The columns of new jobs; without those, or those that are shared together, in which all have what a row has where nobody says
    /// anything.
    fn new_job_columns(&mut self, jobs: &[&Job]) -> Result<Vec<Column>, StoreError> {
        // The first event of most is their last.
        let is_at_first = jobs.iter().all(|job| job.created_seq == job.last_seq);
        let mut columns = self.job_columns(jobs, true, |column| !is_at_first || column.name != "created_seq")?;
        if is_at_first {
            columns.push(Column::same_as("created_seq", "last_seq"));
        }
        Ok(columns)
    }

    /// Some columns of jobs: those that are shared travel once where all of them are the same in all rows.
    fn job_columns(
        &mut self,
        jobs: &[&Job],
        are_new: bool,
        is_written: impl Fn(&JobColumn) -> bool,
    ) -> Result<Vec<Column>, StoreError> {
        let mut sets: BTreeMap<Shared, Vec<(&JobColumn, Vec<Value<'_>>)>> = BTreeMap::new();
        for column in JOB_COLUMNS.iter().filter(|column| is_written(column)) {
            let values = jobs.iter().map(|job| (column.value)(job)).collect();
            sets.entry(column.shared).or_default().push((column, values));
        }
        let mut columns = Vec::new();
        for (shared, set) in sets {
            let are_same = shared != Shared::No && set.iter().all(|(_, values)| all_same(values, |value| value));
            let is_default =
                |(column, values): &(&JobColumn, Vec<_>)| values.iter().all(|value| is_default(column, value));
            let are_default = shared != Shared::No && set.iter().all(is_default);
            for of_column in set {
                if !are_new || !are_default && (shared != Shared::No || !is_default(&of_column)) {
                    columns.push(self.values(of_column.0, &of_column.1, are_same)?);
                }
            }
        }
        Ok(columns)
    }

    /// Binds a column of a set that has rows.
    fn values(&mut self, column: &JobColumn, values: &[Value<'_>], is_same: bool) -> Result<Column, StoreError> {
        macro_rules! either {
            ($pattern:pat => $value:expr) => {
                self.either(is_same, column.name, values, |value| match value {
                    $pattern => Some($value),
                    _ => None,
                })
            };
        }
        match column.kind {
            Kind::Uuid => either!(Value::Uuid(value) => *value),
            Kind::Text => either!(Value::Text(value) => &**value),
            Kind::Int => either!(Value::Int(value) => *value),
            Kind::Long => either!(Value::Long(value) => *value),
            Kind::Double => either!(Value::Double(value) => *value),
            Kind::Flag => either!(Value::Flag(value) => *value),
            Kind::Bytes => either!(Value::Bytes(value) => *value),
            Kind::Time => either!(Value::Time(value) => *value),
        }
    }
}

/// True of what a new row has in a column where nobody says anything.
fn is_default(column: &JobColumn, value: &Value<'_>) -> bool {
    value.is_nothing() || column.name == "status" && *value == JobStatus::Queued.as_str().into()
}
