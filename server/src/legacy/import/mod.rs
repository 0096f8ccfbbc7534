//! Imports the jobs of the service that jobledger replaces from its database.
//!
//! The old database is only read, in pages of one snapshot each. Each row becomes a command in the lane of its org.
//! Importing a row again is harmless: a job that has not changed since is left alone. So an import that was cut off is
//! run again, and what has changed meanwhile comes with the next run.

mod detail;
mod mapping;
mod source;
mod summary;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    fmt,
    future::Future,
    pin::Pin,
    time::Duration,
};

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
        clock::Time,
        id::{JobId, OrgId},
        job::Job,
        transition::{self, ImportOutcome, ImportRefusal},
    },
    ledger::{Import, Imported, Ledger, LedgerError, StatisticsQuery},
};

const PAGES_AHEAD: usize = 2;
/// Pages that wait in lanes, each of one org: while one batch commits, the next gathers.
const MOST_IN_FLIGHT: usize = 2;
/// The final count of jobs in the ledger is skipped for more orgs than this.
const COUNTED_ORGS: usize = 1_000;
/// Attempts at a page while the ledger is overloaded or unavailable.
const TRIES: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Why an import stopped. What was imported until then stays.
#[derive(Debug, Error)]
pub enum ImportError {
    /// The old database can't be read, or is not one.
    #[error("the old database: {0}")]
    Source(String),
    /// The ledger can't be written.
    #[error("the ledger: {0}")]
    Ledger(#[from] LedgerError),
    /// The observer can't take a report.
    #[error("can't report a refused or adjusted row: {0}")]
    Report(#[from] std::io::Error),
}

impl From<sqlx::Error> for ImportError {
    fn from(error: sqlx::Error) -> Self {
        Self::Source(in_words(&error))
    }
}

fn in_words(error: &sqlx::Error) -> String {
    error.as_database_error().map_or_else(|| error.to_string(), |said| said.message().to_owned())
}

/// What to import.
#[derive(Clone)]
pub struct ImportRequest {
    /// URL of the old database, `postgres://…`.
    pub url: String,
    /// The schema of the old tables.
    pub schema: String,
    /// The org that the rows of the old `jobs` table get.
    pub org: OrgId,
    /// True to report only what would become of each row.
    pub is_dry_run: bool,
    /// Pause after each page, for other processes to use the ledger's database. Waiting for its lock they poll only now
    /// and then.
    pub breather: Duration,
}

/// Leaves the URL out, since it may have a password.
impl fmt::Debug for ImportRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImportRequest").field("schema", &self.schema).field("org", &self.org).finish_non_exhaustive()
    }
}

/// Receives the progress of an import.
pub trait Observer: Send {
    /// Called once, with the number of rows in the old database.
    ///
    /// # Errors
    ///
    /// If it can't take reports. The import then ends before it begins.
    fn begin(&mut self, tables: &[Table], rows: u64) -> std::io::Result<()>;

    /// Called after this many more rows were dealt with.
    fn advance(&mut self, rows: u64);

    /// Called for a row that was refused or adjusted.
    ///
    /// # Errors
    ///
    /// If it can't store the report. The import then ends.
    fn report(&mut self, row: &ReportedRow<'_>) -> std::io::Result<()>;
}

/// A row that was not imported, or not quite as it was.
#[derive(Debug, Serialize)]
pub struct ReportedRow<'a> {
    /// Whether the row was adjusted or refused.
    pub verdict: RowVerdict,
    /// The table of the row.
    pub table: Table,
    /// The row's id, a UUID.
    pub id: String,
    /// Why the row was refused, or the differences in the ledger.
    pub reasons: &'a [String],
    /// The whole row as JSON, where it could be read.
    pub row: Option<&'a RawValue>,
}

/// What became of a reported row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RowVerdict {
    /// It is in the ledger, with the reported differences.
    Adjusted,
    /// It was not imported. The ledger does not have it, or still as it was before.
    Refused,
}

#[derive(Debug)]
struct RowRefusal(String);

impl RowRefusal {
    fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// Imports all rows. Without a ledger it only reports which rows would be refused: the database does not exist yet.
///
/// # Errors
///
/// If the old database can't be read, the ledger can't be written, or the observer fails. What was imported until then
/// stays, and the next run goes on from there.
pub async fn run(
    request: &ImportRequest,
    ledger: Option<&Ledger>,
    observer: &mut dyn Observer,
) -> Result<Summary, ImportError> {
    let mut source = Source::open(&request.url, &request.schema).await?;
    let rows = source.count().await?.iter().map(|(_, n)| n).sum();
    observer.begin(source.tables(), rows)?;
    let duplicates = source.duplicate_keys().await?;
    let (send, mut pages) = mpsc::channel(PAGES_AHEAD);
    let org = request.org;
    // Reads and maps the next pages while the ledger writes the earlier ones.
    let reading = tokio::spawn(async move {
        loop {
            let page = source.next().await;
            let is_last = !matches!(page, Ok(Some(_)));
            let page = page.map(|page| page.map(|page| MappedPage::of(page, org, &duplicates)));
            if send.send(page).await.is_err() || is_last {
                return source;
            }
        }
    });
    let mut importer = Importer {
        request,
        ledger,
        observer,
        in_flight: VecDeque::new(),
        summary: Summary::default(),
        orgs: BTreeSet::new(),
    };
    while let Some(page) = pages.recv().await {
        let Some(page) = page? else { break };
        importer.bring(page).await?;
    }
    let (mut summary, orgs) = importer.finish().await?;
    if let Some(ledger) = ledger.filter(|_| orgs.len() <= COUNTED_ORGS) {
        for org in orgs {
            summary.of_ledger(&ledger.statistics(org, &StatisticsQuery::of(&[])).await?);
        }
    }
    let mut source = reading.await.map_err(|ended| ImportError::Source(ended.to_string()))?;
    summary.of_source(source.count().await?);
    source.close().await;
    Ok(summary)
}

/// The rows of a page, mapped to jobs or refused.
struct MappedPage {
    rows: Vec<(Row, Result<Mapped, RowRefusal>)>,
    superseded: u64,
}

impl MappedPage {
    /// Refuses a row whose idempotency key an earlier row has: the key belongs to that job.
    fn of(page: Page, org: OrgId, duplicates: &HashMap<Uuid, Uuid>) -> Self {
        let map = |row: Row| {
            let mapped = match duplicates.get(&row.id) {
                Some(first) => Err(RowRefusal(format!("its idempotency_key is already used by job {first}"))),
                None => mapping::map(&row, org, page.now),
            };
            (row, mapped)
        };
        Self { rows: page.rows.into_iter().map(map).collect(), superseded: page.superseded }
    }
}

/// The ledger's answers to a group of commands, in order.
type Replies<'a> = Pin<Box<dyn Future<Output = Vec<Result<Imported, LedgerError>>> + Send + 'a>>;

/// Rows of one org whose commands wait in its lane.
struct InFlight<'a> {
    org: OrgId,
    rows: Vec<(Row, Mapped)>,
    replies: Replies<'a>,
}

struct Importer<'a> {
    request: &'a ImportRequest,
    ledger: Option<&'a Ledger>,
    observer: &'a mut dyn Observer,
    in_flight: VecDeque<InFlight<'a>>,
    summary: Summary,
    orgs: BTreeSet<OrgId>,
}

impl<'a> Importer<'a> {
    async fn bring(&mut self, page: MappedPage) -> Result<(), ImportError> {
        self.summary.superseded += page.superseded;
        let mut of_orgs: Vec<(OrgId, Vec<(Row, Mapped)>)> = Vec::new();
        for (row, mapped) in page.rows {
            match mapped {
                Err(refusal) => self.refuse(&row, refusal).await?,
                Ok(mapped) => match of_orgs.iter_mut().find(|(org, _)| *org == mapped.org) {
                    Some((_, of_org)) => of_org.push((row, mapped)),
                    None => of_orgs.push((mapped.org, vec![(row, mapped)])),
                },
            }
        }
        for (org, rows) in of_orgs {
            let Some(ledger) = self.ledger else {
                for (row, mapped) in &rows {
                    self.summary.would_bring(mapped.import.state.status);
                    self.observer.advance(1);
                    self.note(row, &mapped.notes)?;
                }
                continue;
            };
            // In the order of the rows, which the lane keeps.
            self.orgs.insert(org);
            let replies = self.submit(ledger, org, &rows);
            self.in_flight.push_back(InFlight { org, rows, replies });
            let breather = self.request.breather;
            if !breather.is_zero() {
                self.settle_first().await?;
                sleep(breather).await;
            } else if self.in_flight.len() > MOST_IN_FLIGHT {
                self.settle_first().await?;
            }
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<(Summary, BTreeSet<OrgId>), ImportError> {
        while !self.in_flight.is_empty() {
            self.settle_first().await?;
        }
        Ok((self.summary, self.orgs))
    }

    fn submit(&self, ledger: &'a Ledger, org: OrgId, rows: &[(Row, Mapped)]) -> Replies<'a> {
        let is_dry_run = self.request.is_dry_run;
        let wanted = rows.iter().map(|(_, mapped)| Import { job: mapped.import.clone(), is_dry_run }).collect();
        let n = rows.len();
        match ledger.import_all(org, wanted) {
            Ok(replies) => Box::pin(replies),
            Err(error) => Box::pin(async move { vec![Err(error); n] }),
        }
    }

    /// Waits for the answers to the rows that were submitted first. Submits rows again after a temporary error.
    async fn settle_first(&mut self) -> Result<(), ImportError> {
        let (Some(first), Some(ledger)) = (self.in_flight.pop_front(), self.ledger) else { return Ok(()) };
        let InFlight { org, mut rows, mut replies } = first;
        let mut pause = FIRST_PAUSE;
        for tries in 1.. {
            let mut again = Vec::new();
            for ((row, mapped), reply) in rows.into_iter().zip(replies.await) {
                match reply {
                    // Safe where the outcome is unknown: a job that was imported already is left alone.
                    Err(error) if is_passing(&error) && tries < TRIES => again.push((row, mapped)),
                    Err(error) => self.refuse(&row, refusal(error)?).await?,
                    Ok(Imported { outcome: Ok(outcome), job, events }) => {
                        self.summary.events += events as u64;
                        self.brought(&row, &mapped, outcome, job)?;
                    }
                    Ok(Imported { outcome: Err(reason), .. }) => {
                        self.refuse(&row, RowRefusal::new(why(reason))).await?
                    }
                }
            }
            if again.is_empty() {
                break;
            }
            sleep(pause).await;
            pause *= 2;
            replies = self.submit(ledger, org, &again);
            rows = again;
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
        let here = job.as_ref().map_or(status, |job| job.status);
        self.summary.brought(outcome, status, here);
        self.observer.advance(1);
        let mut notes = mapped.notes.clone();
        if let Some(job) = job.filter(|_| !matches!(outcome, ImportOutcome::Ahead | ImportOutcome::Erased)) {
            notes.extend(differences(&mapped.import, &job));
        }
        self.note(row, &notes)
    }

    fn note(&mut self, row: &Row, notes: &[String]) -> Result<(), ImportError> {
        if !notes.is_empty() {
            self.summary.adjusted += 1;
            self.report(row, RowVerdict::Adjusted, notes)?;
        }
        Ok(())
    }

    async fn refuse(&mut self, row: &Row, refusal: RowRefusal) -> Result<(), ImportError> {
        self.summary.refused(mapping::status_of(row));
        self.observer.advance(1);
        let mut reasons = vec![refusal.0];
        if let (Some(ledger), Some(org)) = (self.ledger, mapping::org_of(row, self.request.org))
            && let Ok((record, _)) = ledger.job(org, JobId(row.id)).await
        {
            reasons.push(format!("the ledger keeps its own version, with status {}", record.job.status));
        }
        self.report(row, RowVerdict::Refused, &reasons)
    }

    fn report(&mut self, row: &Row, verdict: RowVerdict, reasons: &[String]) -> Result<(), ImportError> {
        let reported = ReportedRow { verdict, table: row.table, id: row.id.to_string(), reasons, row: row.raw() };
        Ok(self.observer.report(&reported)?)
    }
}

/// How the ledger's job differs from the import: times ahead of the ledger's clock were cut, and its spec never changes.
fn differences(import: &transition::Import, job: &Job) -> Vec<String> {
    let state = &import.state;
    let mut differences = Vec::new();
    let mut differ = |name: &str, there: Option<Time>, here: Option<Time>| {
        if let (Some(there), Some(here)) = (there, here)
            && there > here
        {
            differences.push(format!("{name} was {there}, ahead of the ledger's clock"));
        }
    };
    differ("created_at", Some(state.created_at), Some(job.created_at));
    differ("updated_at", Some(state.updated_at), Some(job.updated_at));
    differ("started_at", state.started_at, job.started_at);
    differ("finished_at", state.finished_at, job.finished_at);
    let (there, here) = (&import.spec, &job.spec);
    if there.priority != here.priority {
        differences.push(format!(
            "priority is {} in the old database, and stays {} in the ledger",
            there.priority, here.priority
        ));
    }
    for (name, is_same) in [
        ("type", there.job_type == here.job_type),
        ("idempotency_key", there.idempotency == here.idempotency),
        ("requested_by", there.requested_by == here.requested_by),
    ] {
        if !is_same {
            differences.push(format!("{name} changed in the old database; the ledger keeps its value"));
        }
    }
    if state.created_at < job.created_at {
        differences
            .push(format!("created_at is now {} in the old database; the ledger keeps its value", state.created_at));
    }
    differences
}

/// True of temporary errors.
fn is_passing(error: &LedgerError) -> bool {
    matches!(error, LedgerError::Overloaded | LedgerError::Unavailable | LedgerError::OutcomeUnknown)
}

/// The reason, if the error is about this row. Any other error ends the import.
fn refusal(error: LedgerError) -> Result<RowRefusal, ImportError> {
    match error {
        LedgerError::IdempotencyKeyReused { existing } => {
            Ok(RowRefusal(format!("its idempotency_key is already used by the ledger's job {existing}")))
        }
        LedgerError::TooManyTypes { .. } | LedgerError::QuotaExceeded { .. } | LedgerError::Refused => {
            Ok(RowRefusal(error.to_string()))
        }
        other => Err(other.into()),
    }
}

fn why(refusal: ImportRefusal) -> &'static str {
    match refusal {
        ImportRefusal::BothChanged => "it changed in the old database and in the ledger since its import",
        ImportRefusal::Own => "the ledger has a job with this id that was not imported",
    }
}
