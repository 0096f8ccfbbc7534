//! Jobs of the service that jobledger replaces, brought in from its database.
//!
//! The old database is only read, in pages of one snapshot each. Each row becomes a command in the lane of its org, and each such
//! command can come again: what was brought in before and has not changed is left alone. So an import that was cut off is
//! simply run again, and what has changed meanwhile comes with the next run.

mod mapping;
mod source;
mod summary;

use std::{collections::HashMap, fmt, time::Duration};

use serde::Serialize;
use serde_json::value::RawValue;
use thiserror::Error;
use tokio::{sync::mpsc, time::sleep};
use uuid::Uuid;

use self::{
    mapping::Mapped,
    source::{Page, Row, Source},
};
pub use self::{
    source::Table,
    summary::{OfStatus, Summary},
};
use crate::{
    domain::{
        id::OrgId,
        job::Job,
        transition::{ImportOutcome, ImportRefusal},
    },
    ledger::{Import, Imported, Ledger, LedgerError},
};

/// Pages that are read ahead.
const PAGES_AHEAD: usize = 2;
/// Rows whose commands are under way together, at most: a few batches.
const COMMANDS_AT_ONCE: usize = 2_048;
/// How often a page is tried again where the ledger is busy or out of reach.
const TRIES: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Why an import can't go on. What was brought in until then stays.
#[derive(Debug, Error)]
pub enum ImportError {
    /// The old database.
    #[error("the old database: {0}")]
    Source(String),
    /// The ledger.
    #[error("the ledger: {0}")]
    Ledger(#[from] LedgerError),
    /// Whoever is told of rows can't take it.
    #[error("can't write down a row: {0}")]
    Report(#[from] std::io::Error),
}

impl From<sqlx::Error> for ImportError {
    fn from(error: sqlx::Error) -> Self {
        Self::Source(error.to_string())
    }
}

/// What to bring in.
#[derive(Clone)]
pub struct ImportRequest {
    /// The old database, `postgres://…`.
    pub url: String,
    /// The schema of the old tables.
    pub schema: String,
    /// Whose the rows of the old `jobs` table are.
    pub org: OrgId,
    /// Whether to say only what would become of each row.
    pub is_dry_run: bool,
}

/// Without the password that the URL may hold.
impl fmt::Debug for ImportRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImportRequest").field("schema", &self.schema).field("org", &self.org).finish_non_exhaustive()
    }
}

/// Who hears how it goes.
pub trait Observer: Send {
    /// So many rows there are.
    fn begin(&mut self, tables: &[Table], rows: u64);

    /// So many more were looked at.
    fn advance(&mut self, rows: u64);

    /// A row is not in the ledger as it is in the old database.
    ///
    /// # Errors
    ///
    /// If it can't be written down: the import then ends.
    fn report(&mut self, row: &ReportedRow<'_>) -> std::io::Result<()>;
}

/// A row that is not, or not quite, in the ledger as it is in the old database.
#[derive(Debug, Serialize)]
pub struct ReportedRow<'a> {
    /// What became of it.
    pub verdict: RowVerdict,
    /// Where it is.
    pub table: Table,
    /// Its id.
    pub id: String,
    /// Why, or in what the ledger differs.
    pub reasons: &'a [String],
    /// All of it.
    pub row: Option<&'a RawValue>,
}

/// What became of such a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RowVerdict {
    /// It is in the ledger, with the differences named.
    Adjusted,
    /// It is not.
    Refused,
}

/// Why a row is not brought in.
#[derive(Debug)]
struct Refusal(String);

impl Refusal {
    fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// Brings all rows in. Without a ledger, as where there is none yet, it is only told which rows would be refused.
///
/// # Errors
///
/// If the old database can't be read, or the ledger not written. What was brought in until then stays, and the next run goes on.
pub async fn run(
    request: &ImportRequest,
    ledger: Option<&Ledger>,
    observer: &mut dyn Observer,
) -> Result<Summary, ImportError> {
    let mut source = Source::open(&request.url, &request.schema).await?;
    let rows = source.count().await?.iter().map(|(_, n)| n).sum();
    observer.begin(source.tables(), rows);
    let duplicates = source.duplicate_keys().await?;
    let mut summary = Summary::default();
    let (send, mut pages) = mpsc::channel(PAGES_AHEAD);
    let reading = tokio::spawn(async move {
        loop {
            let page = source.next().await;
            let is_last = !matches!(page, Ok(Some(_)));
            if send.send(page).await.is_err() || is_last {
                return source;
            }
        }
    });
    let mut importer = Importer { request, ledger, observer, duplicates, summary: &mut summary };
    while let Some(page) = pages.recv().await {
        let Some(page) = page? else { break };
        importer.bring(page).await?;
    }
    let mut source = reading.await.map_err(|ended| ImportError::Source(ended.to_string()))?;
    summary.of_source(source.count().await?);
    source.close().await;
    Ok(summary)
}

struct Importer<'a> {
    request: &'a ImportRequest,
    ledger: Option<&'a Ledger>,
    observer: &'a mut dyn Observer,
    /// Rows with a key that another row before them has.
    duplicates: HashMap<Uuid, Uuid>,
    summary: &'a mut Summary,
}

impl Importer<'_> {
    async fn bring(&mut self, page: Page) -> Result<(), ImportError> {
        self.summary.superseded += page.superseded;
        let mut of_orgs: Vec<(OrgId, Vec<(Row, Mapped)>)> = Vec::new();
        let rows = page.rows.len() as u64;
        for row in page.rows {
            let mapped = match self.duplicates.get(&row.id) {
                Some(first) => Err(Refusal(format!("job {first} has its idempotency_key, and a key is one job's"))),
                None => mapping::map(&row, self.request.org, page.now),
            };
            match mapped {
                Err(refusal) => self.refuse(&row, refusal)?,
                Ok(mapped) => match of_orgs.iter_mut().find(|(org, _)| *org == mapped.org) {
                    Some((_, of_org)) => of_org.push((row, mapped)),
                    None => of_orgs.push((mapped.org, vec![(row, mapped)])),
                },
            }
        }
        for (org, mut rows) in of_orgs {
            while !rows.is_empty() {
                let rest = rows.split_off(rows.len().min(COMMANDS_AT_ONCE));
                self.submit(org, rows).await?;
                rows = rest;
            }
        }
        self.observer.advance(rows);
        Ok(())
    }

    async fn submit(&mut self, org: OrgId, rows: Vec<(Row, Mapped)>) -> Result<(), ImportError> {
        let Some(ledger) = self.ledger else {
            for (row, mapped) in &rows {
                self.summary.would_bring(mapped.import.state.status);
                self.note(row, &mapped.notes)?;
            }
            return Ok(());
        };
        let mut waiting = rows;
        let mut pause = FIRST_PAUSE;
        for tries in 1.. {
            let wanted = waiting
                .iter()
                .map(|(_, mapped)| Import { job: mapped.import.clone(), is_dry_run: self.request.is_dry_run })
                .collect();
            let replies = match ledger.import_all(org, wanted).await {
                Ok(replies) => replies,
                Err(error) => waiting.iter().map(|_| Err(error.clone())).collect(),
            };
            let mut again = Vec::new();
            for ((row, mapped), reply) in waiting.into_iter().zip(replies) {
                match reply {
                    // What is known to be in the ledger already is left alone when it comes again.
                    Err(error) if is_passing(&error) && tries < TRIES => again.push((row, mapped)),
                    Err(error) => self.refuse(&row, refusal(error)?)?,
                    Ok(Imported { outcome: Ok(outcome), job, events }) => {
                        self.summary.events += events as u64;
                        self.brought(&row, &mapped, outcome, job)?;
                    }
                    Ok(Imported { outcome: Err(reason), .. }) => self.refuse(&row, Refusal::new(in_words(reason)))?,
                }
            }
            if again.is_empty() {
                break;
            }
            waiting = again;
            sleep(pause).await;
            pause *= 2;
        }
        Ok(())
    }

    fn brought(
        &mut self,
        row: &Row,
        mapped: &Mapped,
        outcome: ImportOutcome,
        job: Option<Job>,
    ) -> Result<(), ImportError> {
        let status = mapped.import.state.status;
        self.summary.brought(outcome, status, job.map_or(status, |job| job.status));
        self.note(row, &mapped.notes)
    }

    fn note(&mut self, row: &Row, notes: &[String]) -> Result<(), ImportError> {
        if !notes.is_empty() {
            self.summary.adjusted += 1;
            self.report(row, RowVerdict::Adjusted, notes)?;
        }
        Ok(())
    }

    fn refuse(&mut self, row: &Row, refusal: Refusal) -> Result<(), ImportError> {
        self.summary.refused(mapping::status_of(row));
        self.report(row, RowVerdict::Refused, &[refusal.0])
    }

    fn report(&mut self, row: &Row, verdict: RowVerdict, reasons: &[String]) -> Result<(), ImportError> {
        let reported = ReportedRow { verdict, table: row.table, id: row.id.to_string(), reasons, row: row.raw() };
        Ok(self.observer.report(&reported)?)
    }
}

/// True of what may go well when it is tried again.
fn is_passing(error: &LedgerError) -> bool {
    matches!(error, LedgerError::Overloaded | LedgerError::Unavailable | LedgerError::OutcomeUnknown)
}

/// Why the ledger refuses a row, if it is for the row.
fn refusal(error: LedgerError) -> Result<Refusal, ImportError> {
    match error {
        LedgerError::IdempotencyKeyReused { existing } => {
            Ok(Refusal(format!("the ledger's job {existing} has its idempotency_key, and a key is one job's")))
        }
        LedgerError::TooManyTypes { .. } | LedgerError::Refused => Ok(Refusal(error.to_string())),
        other => Err(other.into()),
    }
}

fn in_words(refusal: ImportRefusal) -> &'static str {
    match refusal {
        ImportRefusal::BothChanged => "it has changed on both sides since it was brought in",
        ImportRefusal::Own => "the ledger has a job of its own with this id",
        ImportRefusal::OtherSpec => {
            "its type, priority, idempotency_key or requested_by has changed since it was brought in"
        }
    }
}
