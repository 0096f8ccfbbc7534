//! Exports an org's jobs as SQL for the `jobs` table of the old service.

use std::{
    collections::HashMap,
    io::{self, Write},
};

use thiserror::Error;

use crate::{
    domain::{
        id::{JobId, OrgId},
        job::{Job, JobContents},
        job_filter::JobFilter,
    },
    legacy::{error_text, isoformat, old_word},
    store::{ListOrder, ListQuery, Store, StoreError},
};

/// Jobs per page.
const PAGE_JOBS: usize = 256;
/// An INSERT ends at this many rows, or after about this many bytes.
const INSERT_ROWS: usize = 256;
const INSERT_BYTES: usize = 1 << 20;
/// Results per read; each may have 1 MiB.
const RESULTS_AT_ONCE: usize = 8;
/// Orgs per page.
const ORGS: usize = 100;

/// Why an export failed.
#[derive(Debug, Error)]
pub enum ExportError {
    /// The ledger can't be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The SQL can't be written.
    #[error("can't write: {0}")]
    Write(#[from] io::Error),
}

/// Writes an org's jobs as SQL that brings the old `jobs` table of this schema up to date, and creates the table if it is
/// missing. Returns the number of jobs. The SQL is one transaction and may be run again: it changes no row whose
/// `updated_at` is the same or later.
///
/// # Errors
///
/// If the ledger can't be read or the SQL can't be written.
pub async fn to_old_table(
    store: &dyn Store,
    org: OrgId,
    schema: &str,
    out: &mut (dyn Write + Send),
) -> Result<u64, ExportError> {
    let table = format!("\"{}\".jobs", schema.replace('"', "\"\""));
    writeln!(out, "{}", BEGIN.replace("$jobs", &table))?;
    let mut query = ListQuery::first(JobFilter::default(), ListOrder::NewestFirst, PAGE_JOBS);
    let mut rows = Rows { table, text: String::new(), n: 0 };
    let mut exported = 0;
    loop {
        let page = store.list(org, &query).await?;
        for jobs in page.jobs.chunks(RESULTS_AT_ONCE) {
            let mut results = results(store, org, jobs).await?;
            for job in jobs {
                rows.add(&row(job, &results.remove(&job.id).unwrap_or_default()));
            }
            rows.write(out, INSERT_BYTES)?;
        }
        exported += page.jobs.len() as u64;
        match page.next {
            Some(after) => query.after = after,
            None => break,
        }
    }
    rows.write(out, 0)?;
    writeln!(out, "COMMIT;")?;
    out.flush()?;
    Ok(exported)
}

/// The rows of the next INSERT.
struct Rows {
    table: String,
    text: String,
    n: usize,
}

impl Rows {
    fn add(&mut self, row: &str) {
        self.text.push_str(if self.n == 0 { "    " } else { ",\n    " });
        self.text.push_str(row);
        self.n += 1;
    }

    /// Writes the rows if they have at least this many bytes or [`INSERT_ROWS`] rows.
    fn write(&mut self, out: &mut (dyn Write + Send), bytes: usize) -> io::Result<()> {
        if self.n == 0 || self.text.len() < bytes && self.n < INSERT_ROWS {
            return Ok(());
        }
        let table = &self.table;
        writeln!(
            out,
            "INSERT INTO {table} (id, status, stage, progress, result, error, created_at, updated_at) VALUES"
        )?;
        writeln!(out, "{}\n{}", self.text, UPSERT.replace("$jobs", table))?;
        self.text.clear();
        self.n = 0;
        Ok(())
    }
}

/// The number of other orgs that have a log.
///
/// # Errors
///
/// If the ledger can't be read.
pub async fn other_orgs(store: &dyn Store, org: OrgId) -> Result<u64, StoreError> {
    let (mut after, mut others) = (None, 0);
    loop {
        let orgs = store.orgs(after, ORGS).await?;
        others += orgs.iter().filter(|other| **other != org).count() as u64;
        match orgs.last() {
            Some(last) => after = Some(*last),
            None => return Ok(others),
        }
    }
}

async fn results(store: &dyn Store, org: OrgId, jobs: &[Job]) -> Result<HashMap<JobId, JobContents>, StoreError> {
    let with_result: Vec<_> = jobs.iter().filter(|job| job.result_at.is_some()).map(|job| job.id).collect();
    let mut results = HashMap::new();
    for ids in with_result.chunks(RESULTS_AT_ONCE) {
        results.extend(store.contents(org, ids).await?);
    }
    Ok(results)
}

/// Creates the table with the columns of the old service.
const BEGIN: &str = "-- The old jobs table, as the ledger has its jobs.
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
BEGIN;
CREATE TABLE IF NOT EXISTS $jobs (
    id UUID PRIMARY KEY,
    status VARCHAR,
    stage VARCHAR,
    progress INTEGER,
    result JSONB,
    error TEXT,
    created_at TIMESTAMPTZ,
    updated_at TIMESTAMPTZ
);
CREATE INDEX IF NOT EXISTS idx_jobs_status ON $jobs (status);
CREATE INDEX IF NOT EXISTS idx_jobs_created_at ON $jobs (created_at);";

const UPSERT: &str =
    "ON CONFLICT (id) DO UPDATE SET status = excluded.status, stage = excluded.stage, progress = excluded.progress,
    result = excluded.result, error = excluded.error, created_at = excluded.created_at, updated_at = excluded.updated_at
WHERE $jobs.updated_at IS NULL OR $jobs.updated_at < excluded.updated_at;";

fn row(job: &Job, contents: &JobContents) -> String {
    let text = |text: Option<&str>| text.map_or_else(|| "NULL".to_owned(), literal);
    format!(
        "('{}', '{}', {}, {}, {}, {}, '{}', '{}')",
        job.id,
        old_word(job.status),
        text(job.stage.as_deref()),
        job.progress.unwrap_or_default(),
        text(contents.result.as_ref().map(|result| result.as_str())),
        text(job.last_error.as_ref().map(error_text)),
        isoformat(job.created_at),
        isoformat(job.updated_at),
    )
}

/// Quotes a text for SQL, where `standard_conforming_strings` makes backslashes plain characters.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
