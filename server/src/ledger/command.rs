//! What callers ask of a log, and what they are answered.

use std::sync::Arc;

use crate::domain::{
    clock::Time,
    id::JobId,
    job::{Job, JobSpec},
    json::Json,
    transition::{self, Outcome, Step},
};

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
    /// To a create.
    Created {
        /// The new job, or the one that exists.
        job: Job,
        /// True if it existed.
        deduplicated: bool,
    },
    /// To a change: the job after it.
    Applied(Job),
}

impl Command {
    /// About how many bytes the command takes in memory, which is what queues and batches are bounded by.
    pub fn weight(&self) -> usize {
        const FIXED: usize = 512;
        FIXED
            + match self {
                Self::Create(create) => {
                    let labels = &create.spec.labels;
                    create.payload.as_ref().map_or(0, |payload| payload.as_str().len())
                        + labels.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>()
                }
                Self::Apply { command, .. } => {
                    let transition::Command::Report(report) = &**command;
                    let ended = match &report.step {
                        Some(Step::End(ending)) => match &ending.outcome {
                            Outcome::Succeeded { result }
                            | Outcome::Failed { result, .. }
                            | Outcome::Canceled { result, .. } => result.as_ref().map_or(0, |json| json.as_str().len()),
                            Outcome::Released { .. } => 0,
                        },
                        Some(Step::Run) | None => 0,
                    };
                    ended + report.message.len()
                }
            }
    }
}
