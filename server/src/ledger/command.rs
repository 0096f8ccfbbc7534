//! Commands on an org's log, and what they yield.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use uuid::Uuid;

use super::{claim_selection, error::Quantity};
use crate::domain::{
    bulk::BulkRequest,
    clock::Time,
    id::{JobId, OrgId},
    job::{Job, JobSpec, MAX_LABELS},
    job_type::{Pause, TypeSettings},
    json::Json,
    transition::{self, ImportOutcome, ImportRefusal, Jump, News, Outcome, Past, Step, Sweep, Target},
};

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

/// A command on one job of an org's log.
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
    /// Callers of the org wait for the batches of its sweeps, so steps of bulk operations are short.
    pub has_company: bool,
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

/// Asks why a job does not run.
#[derive(Debug, Clone, PartialEq)]
pub struct Explain {
    /// The job.
    pub job: JobId,
    /// A claim that would take the job: of its type, and of as many jobs as are looked through.
    pub claim: Claim,
}

impl Explain {
    /// Jobs that are counted before one.
    pub const COUNTED: usize = claim_selection::LOOKED_AT;

    /// Asks about this job, which is of this type.
    pub fn new(job: JobId, job_type: Arc<str>) -> Self {
        let (types, worker) = ([job_type].into(), Arc::from(""));
        let (max_jobs, lease) = (Self::COUNTED, Duration::ZERO);
        Self { job, claim: Claim { worker, types, max_jobs, lease, request: None } }
    }
}

/// Why a job does not run, as the code that decides claims has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Explanation {
    /// The job. Only a queued one waits.
    pub job: Job,
    /// The job is queued and not ready.
    pub is_scheduled: bool,
    /// The pause of all types, and that of the job's type.
    pub pauses: [Option<Pause>; 2],
    /// Ready jobs that a claim of the job's type gets before it. 0 while the job is not ready, or its type is paused. There may
    /// be more if these are more than [`Explain::COUNTED`].
    pub ahead: usize,
    /// The batch had not loaded what would tell: a pause has ended in it, or it has taken the candidates that it had.
    pub is_unsure: bool,
    /// The org is so far beyond a quota that claims are refused: which, and its bound.
    pub quota: Option<(Quantity, u64)>,
    /// The last `seq` of the org's log.
    pub as_of_seq: i64,
    /// The database's clock.
    pub as_of: Time,
}

impl Claim {
    pub(super) fn wants(&self, job_type: &Arc<str>) -> bool {
        self.types.is_empty() || self.types.binary_search(job_type).is_ok()
    }
}

/// A job after a command.
#[derive(Debug, Clone, PartialEq)]
pub struct JobReply {
    /// The job after the command.
    pub job: Job,
    /// True if a create found an existing job with its idempotency key.
    pub deduplicated: bool,
    /// True if an erasure has to blank more events than one batch may.
    pub is_unfinished: bool,
}

impl JobReply {
    pub(super) fn of(job: Job) -> Self {
        Self { job, deduplicated: false, is_unfinished: false }
    }
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

/// The settings of a type after a command on them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeReply {
    /// The settings.
    pub settings: TypeSettings,
    /// The head of the log after the command.
    pub as_of_seq: i64,
}

/// A command on bulk operations.
#[derive(Debug, Clone, PartialEq)]
pub enum BulkCommand {
    /// Start one.
    Start(Box<BulkRequest>),
    /// Stop one. What it has done stays.
    Stop(Uuid),
}

impl BulkCommand {
    /// The operation.
    pub(super) fn id(&self) -> Uuid {
        match self {
            Self::Start(request) => request.id,
            Self::Stop(id) => *id,
        }
    }

    /// Approximate bytes of the command's texts.
    pub(super) fn text_bytes(&self) -> usize {
        let Self::Start(request) = self else { return 0 };
        let BulkRequest { edit, filter, reason, .. } = &**request;
        let texts = [&filter.requested_by, &filter.idempotency_key, &filter.error_code, &filter.worker];
        let labels = filter.labels.iter().map(|(key, value)| key.len() + value.len());
        reason.len()
            + edit.text_bytes()
            + filter.types.iter().map(String::len).sum::<usize>()
            + labels.sum::<usize>()
            + texts.into_iter().flatten().map(String::len).sum::<usize>()
    }
}

/// The outcome of a sweep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Swept {
    /// True if more jobs are due: a batch is bounded.
    pub has_more: bool,
    /// True if the batch had other commands.
    pub has_company: bool,
}

/// The outcome of retention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removed {
    /// Jobs removed, with their events.
    pub jobs: usize,
    /// True if more jobs may be removed: a batch is bounded.
    pub has_more: bool,
}

impl Command {
    /// True of commands that keep a running job alive or end it: reports, heartbeats, cancellations.
    pub(super) fn is_vital(&self) -> bool {
        match self {
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
                transition::Command::Retry(_) | transition::Command::Edit(_) | transition::Command::Erase(_) => false,
            },
            Self::Create(_) => false,
        }
    }

    /// True of commands that add a job or revive one.
    pub(super) fn grows(&self) -> bool {
        match self {
            Self::Create(_) => true,
            Self::Apply { command, .. } => {
                matches!(**command, transition::Command::Retry(_) | transition::Command::Edit(_))
            }
        }
    }

    /// True of a command that erases a job.
    pub(super) fn is_erasure(&self) -> bool {
        matches!(self, Self::Apply { command, .. } if matches!(**command, transition::Command::Erase(_)))
    }

    /// The labels that the command adds. Each is a row of its own.
    pub(super) fn labels(&self) -> usize {
        match self {
            Self::Create(create) => create.spec.labels.len(),
            Self::Apply { command, .. } => match &**command {
                // The labels before are removed.
                transition::Command::Edit(edit) => {
                    edit.fields.labels.as_ref().map_or(0, |labels| MAX_LABELS + labels.len())
                }
                _ => 0,
            },
        }
    }

    /// Approximate bytes of the command's texts.
    pub(super) fn text_bytes(&self) -> usize {
        match self {
            Self::Create(create) => create.payload.as_ref().map_or(0, Json::len) + create.spec.text_bytes(),
            Self::Apply { command, .. } => match &**command {
                transition::Command::Report(report) => {
                    let outcome = match &report.step {
                        Some(Step::End(ending)) => outcome_bytes(&ending.outcome),
                        Some(Step::Run) | None => 0,
                    };
                    news_bytes(&report.news) + outcome
                }
                transition::Command::LegacyReport(report) => {
                    let outcome = match &report.to {
                        Some(Target::Ended(ending)) => outcome_bytes(&ending.outcome),
                        Some(_) | None => 0,
                    };
                    news_bytes(&report.news) + outcome
                }
                transition::Command::Heartbeat(heartbeat) => news_bytes(&heartbeat.news),
                transition::Command::Cancel(cancel) => cancel.reason.len(),
                transition::Command::Edit(edit) => {
                    edit.fields.text_bytes() + edit.payload.as_ref().map_or(0, Json::len)
                }
                transition::Command::Claim(_)
                | transition::Command::Redeliver(_)
                | transition::Command::GiveBack(_)
                | transition::Command::Retry(_)
                | transition::Command::Erase(_)
                | transition::Command::Sweep(_)
                | transition::Command::Redate(_) => 0,
            },
        }
    }
}

impl Import {
    /// Approximate bytes of the job's texts, those of its past events included.
    pub(super) fn text_bytes(&self) -> usize {
        let past: usize = self.job.past.iter().map(past_bytes).sum();
        let (result, error) = (self.job.state.result.as_ref(), self.job.state.error.as_ref());
        past + self.job.spec.text_bytes() + result.map_or(0, Json::len) + error.map_or(0, |error| error.message.len())
    }
}

fn past_bytes(past: &Past) -> usize {
    const FIXED: usize = 256;
    let error = past.error.as_ref().map_or(0, |error| error.code.len() + error.message.len());
    FIXED + past.message.len() + past.result.as_ref().map_or(0, Json::len) + error
}

fn news_bytes(news: &News) -> usize {
    news.stage.as_deref().map_or(0, str::len) + news.message.len()
}

fn outcome_bytes(outcome: &Outcome) -> usize {
    let (result, error) = match outcome {
        Outcome::Succeeded { result } => (result, None),
        Outcome::Failed { result, error, .. } => (result, Some(error)),
        Outcome::Canceled { result, error } => (result, error.as_ref()),
        Outcome::Released { .. } => return 0,
    };
    result.as_ref().map_or(0, Json::len) + error.map_or(0, |error| error.code.len() + error.message.len())
}
