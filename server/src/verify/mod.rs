//! Recomputes what is derived from the log (jobs' states, counters, series, sizes, settings of types), on a live database, and reports
//! where the stored values differ.
//!
//! Verification notes an org's head first, and counts nothing after it. It reads in pages, and no statement reads more than
//! one page, so no long snapshot keeps the database from cleaning up. Retention waits meanwhile on every server, and up to
//! half a minute longer. If retention was under way already and has removed jobs of the org, the org is verified again.

mod counted;
mod org;
mod org_events;

use std::{
    fmt,
    time::{Duration, Instant},
};

use uuid::Uuid;

use crate::{
    domain::{
        flow::Width,
        id::{JobId, OrgId},
        replay::ReplayError,
        status::JobStatus,
    },
    store::{Bucket, Stock, Store, StoreError},
};

/// How long one request makes retention wait.
const PAUSE: Duration = Duration::from_secs(30);
/// How often the request is tried while the database is busy.
const PAUSE_TRIES: usize = 5;
/// Orgs per page of the list.
const ORGS: usize = 100;
/// How often an org is verified at most, if retention removes its jobs meanwhile.
const TRIES: usize = 5;

/// What was verified, and what was found.
#[derive(Debug, Default)]
pub struct Verified {
    /// The number of orgs verified.
    pub orgs: u64,
    /// The number of jobs verified.
    pub jobs: u64,
    /// The number of events verified.
    pub events: u64,
    /// Where stored and computed values differ.
    pub differences: Vec<Difference>,
    /// Orgs that could not be verified because retention kept removing their jobs.
    pub untold: Vec<OrgId>,
}

/// The progress of a verification.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// The current org.
    pub org: OrgId,
    /// The number of orgs that are done.
    pub orgs: u64,
    /// The number of jobs that are done.
    pub jobs: u64,
}

/// A stored value that differs from the computed one.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// The org.
    pub org: OrgId,
    /// What differs.
    pub what: What,
}

/// What differs, with the stored and the computed values.
#[derive(Debug, Clone, PartialEq)]
pub enum What {
    /// A range of the log has too few or too many events, or two events with the same `seq`.
    Log {
        /// The first `seq` of the range.
        first: i64,
        /// The last `seq` of the range.
        last: i64,
        /// The number of events in the range.
        events: i64,
        /// The number of different `seq`s that they have.
        places: i64,
    },
    /// This many events belong to no job.
    Orphans(i64),
    /// A job's events are no valid history.
    History(JobId, ReplayError),
    /// A job's row is not the fold of its events: in what.
    Row(JobId, String),
    /// A counter differs.
    Counter {
        /// The job type.
        job_type: String,
        /// The status; `None` for the number of scheduled jobs.
        status: Option<JobStatus>,
        /// The stored value.
        stored: i64,
        /// The counted value.
        counted: i64,
    },
    /// A bucket of the series differs.
    Series {
        /// The bucket.
        bucket: Bucket,
        /// The name of the count or histogram.
        name: &'static str,
        /// The stored value; of a count, without what retention has removed from the log.
        stored: Vec<i64>,
        /// The value counted from the log; of a histogram, with what retention has removed.
        counted: Vec<i64>,
    },
    /// The log has events after its stored head.
    Head {
        /// The stored head.
        stored: i64,
        /// The `seq` of the last event found.
        last: i64,
    },
    /// The org's number of jobs, or their bytes, differ from the head's.
    Stock {
        /// The stored value.
        stored: Stock,
        /// The counted value.
        counted: Stock,
    },
    /// This many batch records do not follow on the one before, or are the last and not the head's.
    Records(i64),
    /// This many rows lack an event or a lease extension that `base_seq` or `base_n` says they have.
    Rows(i64),
    /// The settings of a type (empty: of all types) are not what the org's events say: in what.
    Settings(String, String),
    /// A bulk operation is not what the org's events, or those of its jobs, say: in what.
    Bulk(Uuid, String),
    /// Jobs could not be read, for this reason, and were not verified.
    Unreadable(String),
    /// There are more differences than are listed.
    More,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "org {}: ", self.org)?;
        match &self.what {
            What::Log { first, last, events, places } => {
                write!(f, "the log has {events} events with {places} different seqs between seq {first} and {last}")
            }
            What::Orphans(events) => write!(f, "{events} events belong to no job"),
            What::History(job, error) => write!(f, "job {job}: its events are not a valid history: {error}"),
            What::Row(job, what) => write!(f, "job {job}: its row differs from its events: {what}"),
            What::Counter { job_type, status, stored, counted } => {
                let status = status.map_or("scheduled", JobStatus::as_str);
                write!(f, "type {job_type:?}: {stored} {status} by the counter, {counted} counted")
            }
            What::Series { bucket, name, stored, counted } => {
                let width = if bucket.width == Width::Minute { "minute" } else { "hour" };
                let (start, job_type) = (bucket.start, &bucket.job_type);
                write!(f, "type {job_type:?}, {width} {start}: {name} {stored:?} by the series, {counted:?} counted")
            }
            What::Head { stored, last } => write!(f, "the head is {stored}, but the last event of the log is {last}"),
            What::Stock { stored, counted } => write!(
                f,
                "{} jobs of {} bytes by the head, {} of {} counted",
                stored.jobs, stored.bytes, counted.jobs, counted.bytes
            ),
            What::Records(1) => f.write_str("1 batch record does not follow its predecessor"),
            What::Records(broken) => write!(f, "{broken} batch records do not follow their predecessors"),
            What::Rows(1) => f.write_str("1 row lacks an event or a lease extension up to base_seq or base_n"),
            What::Rows(early) => write!(f, "{early} rows lack events or lease extensions up to base_seq or base_n"),
            What::Settings(job_type, what) => write!(f, "settings of {job_type:?}: they differ from the log: {what}"),
            What::Bulk(id, what) => write!(f, "bulk operation {id}: it differs from the log: {what}"),
            What::Unreadable(reason) => write!(f, "its jobs can't be read: {reason}"),
            What::More => f.write_str("there are more differences, which are not listed"),
        }
    }
}

/// Verifies one org, or all.
///
/// # Errors
///
/// If the database can't be read.
pub async fn verify(
    store: &dyn Store,
    only: Option<OrgId>,
    mut on_progress: impl FnMut(Progress),
) -> Result<Verified, StoreError> {
    let mut verified = Verified::default();
    let mut pause = Pause { store, until: None };
    verify_orgs(store, only, &mut pause, &mut verified, &mut on_progress).await?;
    Ok(verified)
}

async fn verify_orgs(
    store: &dyn Store,
    only: Option<OrgId>,
    pause: &mut Pause<'_>,
    verified: &mut Verified,
    on_progress: &mut impl FnMut(Progress),
) -> Result<(), StoreError> {
    if let Some(org) = only {
        return verify_org(store, org, pause, verified, on_progress).await;
    }
    let mut after = None;
    loop {
        let orgs = store.orgs(after, ORGS).await?;
        let Some(last) = orgs.last() else { return Ok(()) };
        after = Some(*last);
        for org in orgs {
            verify_org(store, org, pause, verified, on_progress).await?;
        }
    }
}

async fn verify_org(
    store: &dyn Store,
    org: OrgId,
    pause: &mut Pause<'_>,
    verified: &mut Verified,
    on_progress: &mut impl FnMut(Progress),
) -> Result<(), StoreError> {
    for _ in 0..TRIES {
        let (orgs, before) = (verified.orgs, verified.jobs);
        let found =
            org::verify(store, org, pause, |jobs| on_progress(Progress { org, orgs, jobs: before + jobs })).await?;
        let Some(found) = found else { continue };
        verified.orgs += 1;
        verified.jobs += found.jobs;
        verified.events += found.events;
        verified.differences.extend(found.differences.into_iter().map(|what| Difference { org, what }));
        return Ok(());
    }
    verified.orgs += 1;
    verified.untold.push(org);
    Ok(())
}

/// Makes retention wait.
struct Pause<'a> {
    store: &'a dyn Store,
    until: Option<Instant>,
}

impl Pause<'_> {
    /// Renews the request, if less than half of its time is left.
    async fn keep(&mut self) -> Result<(), StoreError> {
        let mut tries = 0;
        while self.until.is_none_or(|until| until < Instant::now() + PAUSE / 2) {
            // A request expires by itself and is never withdrawn: another verification may run at the same time.
            let until = Instant::now() + PAUSE;
            tries += 1;
            match self.store.audit().pause_retention(PAUSE).await {
                Ok(()) => self.until = Some(until),
                Err(StoreError::Unavailable(_) | StoreError::Conflict(_)) if tries < PAUSE_TRIES => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
