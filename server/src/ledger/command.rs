//! Commands on an org's log, and their answers.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::domain::{
    clock::Time,
    id::{JobId, OrgId},
    job::{Job, JobSpec},
    json::Json,
    transition::{self, ImportOutcome, ImportRefusal, Jump, News, Outcome, Past, Step, Sweep, Target},
};
use crate::store::Retention;

/// The org and the actor of a command.
#[derive(Debug, Clone)]
pub struct Author {
    /// The org.
    pub org: OrgId,
    /// Actor of the command's events, except events that the ledger itself causes. `None`: the worker or the creator that the
    /// command names.
    pub actor: Option<Arc<str>>,
}

impl From<OrgId> for Author {
    fn from(org: OrgId) -> Self {
        Self { org, actor: None }
    }
}

/// One command on one org's log.
#[derive(Debug, Clone)]
pub enum Command {
    /// Queue a new job.
    Create(Box<Create>),
    /// Change an existing job.
    Apply {
        /// The job.
        job: JobId,
        /// The change.
        command: Box<transition::Command>,
    },
    /// Import a job of another system.
    Import(Box<Import>),
    /// Claim ready jobs.
    Claim(Box<Claim>),
    /// Sweep: handle jobs that are due, as many as a batch may.
    Sweep(SweepRequest),
    /// Re-date jobs that the clock postponed while it was ahead, by this much at most: as many jobs as a batch may.
    Redate(Duration),
    /// Remove finished jobs whose retention is over, as many as a batch may.
    Retain(Retention),
}

/// A job to queue.
#[derive(Debug, Clone)]
pub struct Create {
    /// Chosen when the call is accepted, so that a batch that is run again creates the same job.
    pub id: JobId,
    /// The job's type, policy, labels and idempotency key.
    pub spec: Arc<JobSpec>,
    /// Input for the worker.
    pub payload: Option<Json>,
    /// Earliest time at which workers may claim the job.
    pub scheduled_at: Option<Time>,
}

/// A job to import.
#[derive(Debug, Clone)]
pub struct Import {
    /// The job as the other system has it.
    pub job: transition::Import,
    /// If true, report the outcome and write nothing. A dry run does not see the effects of dry runs before it.
    pub is_dry_run: bool,
}

/// When a sweep was requested, and since when workers could be heard.
#[derive(Debug, Clone, Copy)]
pub struct SweepRequest {
    /// Since when workers can reach the ledger through the server that sweeps.
    pub reachable_since: Instant,
    /// When the sweep was requested. If it had to wait long, workers could not be heard either.
    pub at: Instant,
}

impl SweepRequest {
    /// A sweep that waited this long indicates an outage, since a batch takes milliseconds. No longer than the shortest lease.
    pub const OUTAGE: Duration = Duration::from_secs(1);

    /// The sweep as its batch decides it, which begins at `now`.
    pub(super) fn sweep(self, now: Instant, jump: Option<Jump>) -> Sweep {
        let has_waited = now - self.at >= Self::OUTAGE;
        Sweep { reachable_for: if has_waited { Duration::ZERO } else { now - self.reachable_since }, jump }
    }
}

/// A worker's request for jobs.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// The worker.
    pub worker: Arc<str>,
    /// Types of the jobs, sorted and unique. Empty: all types.
    pub types: Arc<[Arc<str>]>,
    /// Most jobs to take; at least 1.
    pub max_jobs: usize,
    /// How long the lease lasts unless it is extended.
    pub lease: Duration,
    /// The claim's `request_id`, by which a repeated call is recognised.
    pub request: Option<Arc<str>>,
}

impl Claim {
    pub(super) fn wants(&self, job_type: &Arc<str>) -> bool {
        self.types.is_empty() || self.types.binary_search(job_type).is_ok()
    }
}

/// The answer to a command.
#[derive(Debug)]
pub enum Reply {
    /// To a command on a job.
    Job(Box<JobReply>),
    /// To an import.
    Imported(Box<Imported>),
    /// To a claim.
    Claimed(Claimed),
    /// To a sweep.
    Swept(Swept),
    /// To retention.
    Removed(Removed),
}

/// A job after a command.
#[derive(Debug, Clone, PartialEq)]
pub struct JobReply {
    /// The job after the command.
    pub job: Job,
    /// True if a create found an existing job with its idempotency key.
    pub deduplicated: bool,
}

/// The outcome of an import.
#[derive(Debug, Clone, PartialEq)]
pub struct Imported {
    /// Whether the job was imported.
    pub outcome: Result<ImportOutcome, ImportRefusal>,
    /// The job in the ledger; after a dry run, as it would be. `None` if it was refused.
    pub job: Option<Job>,
    /// How many events were written.
    pub events: usize,
}

/// The outcome of a claim.
#[derive(Debug, Clone, PartialEq)]
pub struct Claimed {
    /// The jobs, most urgent first, each with its lease.
    pub jobs: Vec<Job>,
    /// True if there may be more jobs that the claim could have taken.
    pub has_more: bool,
    /// The `ready_gen` that the claim saw: every job that became ready up to this generation was a candidate.
    pub ready_gen: i64,
}

/// The outcome of a sweep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Swept {
    /// True if more jobs are due: a batch is bounded.
    pub has_more: bool,
}

/// The outcome of retention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removed {
    /// Jobs removed, with their events.
    pub jobs: usize,
    /// True if more jobs may be removed: a batch is bounded.
    pub has_more: bool,
}

impl Reply {
    pub(super) fn of_job(job: Job, deduplicated: bool) -> Self {
        Self::Job(Box::new(JobReply { job, deduplicated }))
    }

    pub(super) fn of_import(outcome: Result<ImportOutcome, ImportRefusal>, job: Option<Job>, events: usize) -> Self {
        Self::Imported(Box::new(Imported { outcome, job, events }))
    }

    /// The caller sets `ready_gen` once the whole batch is decided.
    pub(super) fn of_claim(jobs: Vec<Job>, has_more: bool) -> Self {
        Self::Claimed(Claimed { jobs, has_more, ready_gen: 0 })
    }
}

impl Command {
    /// True of commands that keep a running job alive, begin it or end it: reports, heartbeats, cancellations, claims, sweeps.
    /// They go before creates and have reserved room in queues, as their calls have (`api/access.rs`).
    pub(super) fn is_vital(&self) -> bool {
        match self {
            Self::Claim(_) | Self::Sweep(_) | Self::Redate(_) => true,
            Self::Apply { command, .. } => match &**command {
                transition::Command::Report(_)
                | transition::Command::LegacyReport(_)
                | transition::Command::Claim(_)
                | transition::Command::Heartbeat(_)
                | transition::Command::Redeliver(_)
                | transition::Command::GiveBack(_)
                | transition::Command::Cancel(_)
                | transition::Command::Sweep(_)
                | transition::Command::Redate(_) => true,
                transition::Command::Retry(_) => false,
            },
            Self::Create(_) | Self::Import(_) | Self::Retain(_) => false,
        }
    }

    /// True of commands that add a job or revive one. They are bounded or refused while the disk is nearly full.
    pub(super) fn grows(&self) -> bool {
        match self {
            Self::Create(_) | Self::Import(_) => true,
            Self::Apply { command, .. } => matches!(**command, transition::Command::Retry(_)),
            Self::Claim(_) | Self::Sweep(_) | Self::Redate(_) | Self::Retain(_) => false,
        }
    }

    /// True of commands that share no transaction with other orgs, because the database work they cause is not bounded by their
    /// size.
    pub(super) fn goes_alone(&self) -> bool {
        match self {
            Self::Import(_) | Self::Retain(_) => true,
            Self::Create(_) | Self::Apply { .. } | Self::Claim(_) | Self::Sweep(_) | Self::Redate(_) => false,
        }
    }

    /// The labels that the command adds. Each is a row of its own.
    pub(super) fn labels(&self) -> usize {
        if let Self::Create(create) = self { create.spec.labels.len() } else { 0 }
    }

    /// Approximate bytes that the command takes in memory. Queues and batches are bounded by this.
    pub fn weight(&self) -> usize {
        const FIXED: usize = 512;
        FIXED
            + match self {
                Self::Create(create) => {
                    let spec = &create.spec;
                    create.payload.as_ref().map_or(0, Json::len)
                        + spec.job_type.len()
                        + spec.requested_by.len()
                        + spec.idempotency.as_ref().map_or(0, |idempotency| idempotency.key.len())
                        + spec.labels.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>()
                }
                Self::Apply { command, .. } => match &**command {
                    transition::Command::Report(report) => {
                        let outcome = match &report.step {
                            Some(Step::End(ending)) => outcome_weight(&ending.outcome),
                            Some(Step::Run) | None => 0,
                        };
                        news_weight(&report.news) + outcome
                    }
                    transition::Command::LegacyReport(reach) => {
                        let outcome = match &reach.to {
                            Some(Target::Ended(ending)) => outcome_weight(&ending.outcome),
                            _ => 0,
                        };
                        news_weight(&reach.news) + outcome
                    }
                    transition::Command::Heartbeat(heartbeat) => news_weight(&heartbeat.news),
                    transition::Command::Cancel(cancel) => cancel.reason.len(),
                    transition::Command::Claim(_)
                    | transition::Command::Redeliver(_)
                    | transition::Command::GiveBack(_)
                    | transition::Command::Retry(_)
                    | transition::Command::Sweep(_)
                    | transition::Command::Redate(_) => 0,
                },
                Self::Import(import) => {
                    let spec = &import.job.spec;
                    let past: usize = import.job.past.iter().map(past_weight).sum();
                    let state = &import.job.state;
                    let (result, error) = (state.result.as_ref(), state.error.as_ref());
                    past + spec.job_type.len()
                        + spec.requested_by.len()
                        + result.map_or(0, Json::len)
                        + error.map_or(0, |error| error.message.len())
                }
                Self::Claim(claim) => claim.types.iter().map(|name| name.len()).sum(),
                Self::Sweep(_) | Self::Redate(_) | Self::Retain(_) => 0,
            }
    }
}

fn past_weight(past: &Past) -> usize {
    const FIXED: usize = 256;
    let error = past.error.as_ref().map_or(0, |error| error.code.len() + error.message.len());
    FIXED + past.message.len() + past.result.as_ref().map_or(0, Json::len) + error
}

fn news_weight(news: &News) -> usize {
    news.stage.as_deref().map_or(0, str::len) + news.message.len()
}

fn outcome_weight(outcome: &Outcome) -> usize {
    let (result, error) = match outcome {
        Outcome::Succeeded { result } => (result, None),
        Outcome::Failed { result, error, .. } => (result, Some(error)),
        Outcome::Canceled { result, error } => (result, error.as_ref()),
        Outcome::Released { .. } => return 0,
    };
    result.as_ref().map_or(0, Json::len) + error.map_or(0, |error| error.code.len() + error.message.len())
}
