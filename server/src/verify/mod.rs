//! Computes everything that is derived from the log again, on a live database, and says where it differs from what is stored.
//!
//! Each org is looked at as of a head that is noted first; what comes later is not counted. It reads page by page, no
//! statement longer than a page: nothing piles up behind an old snapshot. Retention waits meanwhile, on every server, and up to half a
//! minute longer; where it has removed something all the same, since it was under way, the org is looked at again.

mod counted;
mod org;

use std::{
    fmt,
    time::{Duration, Instant},
};

use crate::{
    domain::{
        flow::Width,
        id::{JobId, OrgId},
        replay::ReplayError,
        status::JobStatus,
    },
    store::{Bucket, Stock, Store, StoreError},
};

/// How long retention waits, unless it is told again.
const PAUSE: Duration = Duration::from_secs(30);
/// How often it is tried to tell it so, on a database that is busy.
const PAUSE_TRIES: usize = 5;
/// Orgs that are listed at once.
const ORGS: usize = 100;
/// How often an org is looked at again because retention was under way.
const TRIES: usize = 5;

/// What was looked at, and what was found.
#[derive(Debug, Default)]
pub struct Verified {
    /// Orgs looked at.
    pub orgs: u64,
    /// Jobs looked at.
    pub jobs: u64,
    /// Events looked at.
    pub events: u64,
    /// Where what is stored differs from what was computed.
    pub differences: Vec<Difference>,
    /// Orgs of which it could not be told, since retention went on removing their jobs.
    pub untold: Vec<OrgId>,
}

/// How far a verification is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Where it is.
    pub org: OrgId,
    /// Orgs done.
    pub orgs: u64,
    /// Jobs done.
    pub jobs: u64,
}

/// Something that is stored and not what was computed.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// Whose.
    pub org: OrgId,
    /// What.
    pub what: What,
}

/// What differs.
#[derive(Debug, Clone, PartialEq)]
pub enum What {
    /// Between these places the log has another number of events, or of places, than it should.
    Log {
        /// The first place.
        first: i64,
        /// The last.
        last: i64,
        /// Events there.
        events: i64,
        /// Different places that they take.
        places: i64,
    },
    /// So many events are of no job.
    Orphans(i64),
    /// A job's events are not a history.
    History(JobId, ReplayError),
    /// A job's row is not the fold of its events, in this.
    Row(JobId, String),
    /// A counter.
    Counter {
        /// The type.
        job_type: String,
        /// The status; `None` for the queued jobs whose time is still to come.
        status: Option<JobStatus>,
        /// What is stored.
        stored: i64,
        /// What was counted.
        counted: i64,
    },
    /// A bucket of the series.
    Series {
        /// Which.
        bucket: Bucket,
        /// Which of its numbers.
        name: &'static str,
        /// What is stored, without what was removed since.
        stored: Vec<i64>,
        /// What was counted.
        counted: Vec<i64>,
    },
    /// The log goes on beyond what is taken for its head.
    Head {
        /// What is stored.
        stored: i64,
        /// The last event there is.
        last: i64,
    },
    /// The org has other jobs, or bytes, than its head says.
    Stock {
        /// What is stored.
        stored: Stock,
        /// What was counted.
        counted: Stock,
    },
    /// So many batch records do not follow on the one before.
    Records(i64),
    /// So many jobs' rows lack events, or the end of their lease, up to where none is said to.
    Rows(i64),
    /// Jobs can't be read, for this reason; they were not looked at.
    Unreadable(String),
    /// There is more that is not listed.
    More,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "org {}: ", self.org)?;
        match &self.what {
            What::Log { first, last, events, places } => {
                write!(f, "the log has {events} events in {places} places from seq {first} to {last}")
            }
            What::Orphans(events) => write!(f, "{events} events are of no job"),
            What::History(job, error) => write!(f, "job {job}: its events are no history: {error}"),
            What::Row(job, what) => write!(f, "job {job}: its row is not what its events say: {what}"),
            What::Counter { job_type, status, stored, counted } => {
                let status = status.map_or("scheduled", JobStatus::as_str);
                write!(f, "type {job_type:?}: {stored} {status} by the counter, {counted} counted")
            }
            What::Series { bucket, name, stored, counted } => {
                let width = if bucket.width == Width::Minute { "minute" } else { "hour" };
                let (start, job_type) = (bucket.start, &bucket.job_type);
                write!(f, "type {job_type:?}, {width} {start}: {name} {stored:?} by the series, {counted:?} counted")
            }
            What::Head { stored, last } => write!(f, "the head is {stored}, and the log goes on to {last}"),
            What::Stock { stored, counted } => write!(
                f,
                "{} jobs of {} bytes by the head, {} of {} counted",
                stored.jobs, stored.bytes, counted.jobs, counted.bytes
            ),
            What::Records(1) => f.write_str("1 batch record does not follow on the one before"),
            What::Records(broken) => write!(f, "{broken} batch records do not follow on the ones before"),
            What::Rows(1) => f.write_str("1 row lacks events, or the end of its lease, that it is said to have"),
            What::Rows(early) => write!(f, "{early} rows lack events, or ends of leases, that they are said to have"),
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

/// Has retention wait.
struct Pause<'a> {
    store: &'a dyn Store,
    until: Option<Instant>,
}

impl Pause<'_> {
    /// Makes sure that it waits for a while yet.
    async fn keep(&mut self) -> Result<(), StoreError> {
        let mut tries = 0;
        while self.until.is_none_or(|until| until < Instant::now() + PAUSE / 2) {
            // It ends by itself: others may verify at the same time.
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
