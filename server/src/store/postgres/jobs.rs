//! The parts of a batch's statement that write rows of `job`.

use std::collections::BTreeMap;

use super::statement::{Column, Statement, all_same, unnest};
use crate::{
    domain::{job::Job, status::JobStatus},
    store::{
        StoreError,
        job_columns::{JOB_COLUMNS, JobColumn, Kind, Shared, Varies},
        value::Value,
    },
};

impl Statement {
    /// Inserts new jobs in two parts: those that only wait (nearly all), and those that this batch has already changed.
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

    /// Overwrites the rows of changed jobs, those of edited ones whole.
    pub(super) fn changed_jobs(&mut self, jobs: &[&Job], is_edited: impl Fn(&Job) -> bool) -> Result<(), StoreError> {
        let (whole, others): (Vec<_>, Vec<_>) = jobs.iter().copied().partition(|job| is_edited(job));
        self.overwritten_jobs("changed_jobs", &others, |column| column.changes == Varies::InLife)?;
        self.overwritten_jobs("edited_jobs", &whole, |column| column.changes != Varies::Never)
    }

    fn overwritten_jobs(
        &mut self,
        part: &str,
        jobs: &[&Job],
        is_written: impl Fn(&JobColumn) -> bool,
    ) -> Result<(), StoreError> {
        if jobs.is_empty() {
            return Ok(());
        }
        let org = self.org_column(jobs, |job| job.org_id)?;
        let id = self.column("id", jobs, |job| job.id.0)?;
        let columns = self.job_columns(jobs, false, is_written)?;
        let set: Vec<_> = columns.iter().map(|column| format!("{0} = excluded.{0}", column.name)).collect();
        let names: Vec<_> = columns.iter().map(|column| column.name).collect();
        let values: Vec<_> = columns.iter().map(Column::value).collect();
        let (set, names, values) = (set.join(", "), names.join(", "), values.join(", "));
        let rows = unnest([&org, &id].into_iter().chain(&columns));
        let org = org.value();
        let guard = self.guard(" CROSS JOIN");
        // All of these rows exist, so none is inserted. ON CONFLICT looks each row up by its key, whatever PostgreSQL assumes
        // about the table. An UPDATE that was planned while the table was small would go on walking the org's rows.
        self.part(
            part,
            format_args!(
                "(INSERT INTO jobledger.job (org_id, id, type, created_seq, retry_initial, retry_multiplier, retry_max, {names})
                 SELECT {org}, u.id, '', 0, 0, 0, 0, {values} FROM {rows}{guard}
                 ON CONFLICT (org_id, id) DO UPDATE SET {set})"
            ),
        );
        Ok(())
    }

    /// The columns of new jobs, without those in which all jobs have the table's default. Columns that are shared together are
    /// left out together or not at all.
    fn new_job_columns(&mut self, jobs: &[&Job]) -> Result<Vec<Column>, StoreError> {
        // Most new jobs have one event, so `created_seq` equals `last_seq` and need not travel.
        let is_at_first = jobs.iter().all(|job| job.created_seq == job.last_seq);
        let mut columns = self.job_columns(jobs, true, |column| !is_at_first || column.name != "created_seq")?;
        if is_at_first {
            columns.push(Column::same_as("created_seq", "last_seq"));
        }
        Ok(columns)
    }

    /// The columns of jobs that `is_written` selects. Shared columns travel as single values if all rows have the same.
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

    /// Binds a column of a set that is not empty.
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

/// True if a new row has this value by default.
fn is_default(column: &JobColumn, value: &Value<'_>) -> bool {
    value.is_nothing() || column.name == "status" && *value == JobStatus::Queued.as_str().into()
}
