//! What callers ask of a log, and what they are answered.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::domain::{
    clock::Time,
    id::{JobId, OrgId},
    job::{Job, JobSpec},
    json::Json,
    transition::{self, ImportOutcome, ImportRefusal, Jump, Look, News, Outcome, Past, Step, Target},
};
use crate::store::Retention;

/// Whose command it is.
#[derive(Debug, Clone)]
pub struct By {
    /// The org.
    pub org: OrgId,
    /// Who the events say that it was, but for what the ledger does by itself. Where nobody is known: the worker or the creator that
    /// the command names.
    pub actor: Option<Arc<str>>,
}

impl From<OrgId> for By {
    fn from(org: OrgId) -> Self {
        Self { org, actor: None }
    }
}

/// One command on one org's log.
#[derive(Debug, Clone)]
pub enum Command {
    /// Queue a new job.
    Create(Box<Create>),
    /// Change an existing one.
    Apply {
        /// Which.
        job: JobId,
        /// How.
        command: Box<transition::Command>,
    },
    /// Bring in a job of another system.
    Import(Box<Import>),
    /// Take jobs that are ready.
    Claim(Box<Claim>),
    /// Do what is due, to as many jobs as its batch may.
    Look(Asked),
    /// Date anew what a clock that was ahead, by so much at most, has put off: as many jobs as its batch may.
    Redate(Duration),
    /// Remove finished jobs that are kept no longer, as many as one batch may.
    Retain(Retention),
}

/// A job to queue.
#[derive(Debug, Clone)]
pub struct Create {
    /// Its identity, made by whoever accepted it, so that deciding the same again makes the same job.
    pub id: JobId,
    /// What is asked for.
    pub spec: Arc<JobSpec>,
    /// Input for the worker.
    pub payload: Option<Json>,
    /// Not to be worked on before.
    pub scheduled_at: Option<Time>,
}

/// A job to be brought in.
#[derive(Debug, Clone)]
pub struct Import {
    /// As the other system has it.
    pub job: transition::Import,
    /// Whether to say only what would become of it. What commands before it would have done is then not seen.
    pub is_dry_run: bool,
}

/// When a look for what is due was asked for.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// Since when workers can reach the ledger through whoever asks.
    pub reachable_since: Instant,
    /// When it was asked for. Workers could not be heard either while it had to wait.
    pub at: Instant,
}

impl Asked {
    /// The wait from which on it tells of an outage: a batch takes milliseconds. No longer than the shortest lease.
    pub const OUTAGE: Duration = Duration::from_secs(1);

    /// The look, in a batch that begins now.
    pub(super) fn look(self, now: Instant, jump: Option<Jump>) -> Look {
        let has_waited = now - self.at >= Self::OUTAGE;
        Look { reachable_for: if has_waited { Duration::ZERO } else { now - self.reachable_since }, jump }
    }
}

/// A worker that wants work.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// Who.
    pub worker: Arc<str>,
    /// Of these types alone; each once, in order. Empty: of all.
    pub types: Arc<[Arc<str>]>,
    /// No more than this many; at least 1.
    pub max_jobs: usize,
    /// For how long, unless it is extended.
    pub lease: Duration,
    /// By what the claim is known when it comes again.
    pub request: Option<Arc<str>>,
}

impl Claim {
    /// True if the worker wants jobs of this type.
    pub(super) fn wants(&self, job_type: &Arc<str>) -> bool {
        self.types.is_empty() || self.types.binary_search(job_type).is_ok()
    }
}

/// The answer to a command.
#[derive(Debug)]
pub enum Reply {
    /// To one on a job.
    Job(Box<JobReply>),
    /// To one that brings a job in.
    Imported(Box<Imported>),
    /// To one that takes jobs.
    Claimed(Claimed),
    /// To one that does what is due.
    Looked(Looked),
    /// To one that removes jobs.
    Removed(Removed),
}

/// What became of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct JobReply {
    /// The job after the command.
    pub job: Job,
    /// True of a create whose job existed before, by its idempotency key.
    pub deduplicated: bool,
}

/// What became of a job that was to be brought in.
#[derive(Debug, Clone, PartialEq)]
pub struct Imported {
    /// Whether it was.
    pub outcome: Result<ImportOutcome, ImportRefusal>,
    /// The job in the ledger; after a dry run, as it would be. `None` of one that was refused.
    pub job: Option<Job>,
    /// How many events were written.
    pub events: usize,
}

/// What a claim took.
#[derive(Debug, Clone, PartialEq)]
pub struct Claimed {
    /// The jobs, the most urgent first, each with its lease.
    pub jobs: Vec<Job>,
    /// True if there may be more that it could have taken.
    pub has_more: bool,
    /// How many batches had made a job ready: all that they made so was there to be taken.
    pub ready_gen: i64,
}

/// What came of a look for what is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Looked {
    /// True if there are more: a batch is bounded.
    pub has_more: bool,
}

/// What retention did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removed {
    /// Jobs that were removed, with their events.
    pub jobs: usize,
    /// True if there are more: a batch is bounded.
    pub has_more: bool,
}

impl Reply {
    pub(super) fn of_job(job: Job, deduplicated: bool) -> Self {
        Self::Job(Box::new(JobReply { job, deduplicated }))
    }

    pub(super) fn of_import(outcome: Result<ImportOutcome, ImportRefusal>, job: Option<Job>, events: usize) -> Self {
        Self::Imported(Box::new(Imported { outcome, job, events }))
    }

    /// The generation is known once the whole batch is decided.
    pub(super) fn of_claim(jobs: Vec<Job>, has_more: bool) -> Self {
        Self::Claimed(Claimed { jobs, has_more, ready_gen: 0 })
    }
}

impl Command {
    /// True of a command that keeps a running job alive, ends or begins one: a report, a heartbeat, a cancellation, a claim, a sweep. It
    /// goes before creates and finds room where those find none, as do the calls that bring it (`api/access.rs`).
    pub(super) fn is_vital(&self) -> bool {
        match self {
            Self::Claim(_) | Self::Look(_) | Self::Redate(_) => true,
            Self::Apply { command, .. } => match &**command {
                transition::Command::Report(_)
                | transition::Command::Reach(_)
                | transition::Command::Claim(_)
                | transition::Command::Heartbeat(_)
                | transition::Command::Renew(_)
                | transition::Command::Abandon(_)
                | transition::Command::Cancel(_)
                | transition::Command::Look(_)
                | transition::Command::Redate(_) => true,
                transition::Command::Retry(_) => false,
            },
            Self::Create(_) | Self::Import(_) | Self::Retain(_) => false,
        }
    }

    /// True of a command that brings a job, or another life of one: what a disk that is nearly full is not for.
    pub(super) fn grows(&self) -> bool {
        match self {
            Self::Create(_) | Self::Import(_) => true,
            Self::Apply { command, .. } => matches!(**command, transition::Command::Retry(_)),
            Self::Claim(_) | Self::Look(_) | Self::Redate(_) | Self::Retain(_) => false,
        }
    }

    /// True of a command that has a transaction to itself, with others of its org: what it takes of the database is not bounded by its
    /// size.
    pub(super) fn goes_alone(&self) -> bool {
        match self {
            Self::Import(_) | Self::Retain(_) => true,
            Self::Create(_) | Self::Apply { .. } | Self::Claim(_) | Self::Look(_) | Self::Redate(_) => false,
        }
    }

    /// The labels that the command brings: each has a place of its own in the database.
    pub(super) fn labels(&self) -> usize {
        if let Self::Create(create) = self { create.spec.labels.len() } else { 0 }
    }

    /// About how many bytes the command takes in memory, which is what queues and batches are bounded by.
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
                    transition::Command::Reach(reach) => {
                        let outcome = match &reach.to {
                            Some(Target::Ended(ending)) => outcome_weight(&ending.outcome),
                            _ => 0,
                        };
                        news_weight(&reach.news) + outcome
                    }
                    transition::Command::Heartbeat(heartbeat) => news_weight(&heartbeat.news),
                    transition::Command::Cancel(cancel) => cancel.reason.len(),
                    transition::Command::Claim(_)
                    | transition::Command::Renew(_)
                    | transition::Command::Abandon(_)
                    | transition::Command::Retry(_)
                    | transition::Command::Look(_)
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
                Self::Look(_) | Self::Redate(_) | Self::Retain(_) => 0,
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
