//! What callers ask of a log, and what they are answered.

use std::sync::Arc;

use crate::domain::{
    clock::Time,
    id::JobId,
    job::{Job, JobSpec},
    json::Json,
    transition::{self, Outcome, Step},
};
use crate::store::Retention;

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

/// The answer to a command.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// To one on a job.
    Job(Box<JobReply>),
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
}

impl Command {
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
                Self::Apply { command, .. } => {
                    let transition::Command::Report(report) = &**command;
                    report.stage.as_deref().map_or(0, str::len)
                        + report.message.len()
                        + report.lease.as_ref().map_or(0, |lease| lease.0.len())
                        + report.etag.as_ref().map_or(0, String::len)
                        + report.actor.len()
                        + match &report.step {
                            Some(Step::End(ending)) => outcome_weight(&ending.outcome),
                            Some(Step::Run) | None => 0,
                        }
                }
                Self::Retain(_) => 0,
            }
    }
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
