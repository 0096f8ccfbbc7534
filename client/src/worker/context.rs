//! The context of an attempt: what a handler gets besides the payload.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use jobledger_proto::v1::Job;
use tokio_util::sync::CancellationToken;

use super::heartbeats::Held;

/// The contract's limits for a stage and a message.
const MAX_STAGE_CHARS: usize = 100;
const MAX_MESSAGE_BYTES: usize = 4 << 10;

/// A handler's access to its job and attempt. Cheap to clone.
#[derive(Clone)]
pub struct Context {
    job: Arc<Job>,
    held: Arc<Held>,
    deadline: Option<Instant>,
}

impl Context {
    pub(super) fn new(job: Job, held: Arc<Held>) -> Self {
        let timeout = job.run_timeout.and_then(|timeout| Duration::try_from(timeout).ok());
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        Self { job: Arc::new(job), held, deadline }
    }

    /// The job as it was claimed, without its payload.
    pub fn job(&self) -> &Job {
        &self.job
    }

    /// The job's id, which is the same in all attempts.
    pub fn job_id(&self) -> &str {
        &self.job.id
    }

    /// The number of this attempt: 1, 2, …
    pub fn attempt(&self) -> i32 {
        self.job.attempt
    }

    /// How many attempts have failed so far. The job ends when this reaches its `max_attempts`.
    pub fn failures(&self) -> i32 {
        self.job.failures
    }

    /// How many attempts were lost so far, because their leases expired. They may have done some of the work, or all of it.
    pub fn lost_attempts(&self) -> i32 {
        self.job.lost_attempts
    }

    /// When the run timeout ends this attempt, counted from when the worker received the job; `None` without one.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Sets what the worker is doing, at most 100 characters; the rest is cut off. Returns at once: the latest stage is
    /// reported a few times per second.
    pub fn stage(&self, stage: impl Into<String>) {
        let stage = clean(stage.into()).chars().take(MAX_STAGE_CHARS).collect();
        self.held.tell(|news| news.stage = Some(stage));
    }

    /// Sets the progress in per cent; more than 100 counts as 100. Returns at once, as [`Context::stage`] does.
    pub fn progress(&self, percent: u8) {
        self.held.tell(|news| news.progress = Some(percent.min(100).into()));
    }

    /// Adds a remark to the event log, at most 4 KiB; the rest is cut off. Returns at once, as [`Context::stage`] does.
    /// Of several remarks within one interval only the latest is reported.
    pub fn message(&self, message: impl Into<String>) {
        let mut message = clean(message.into());
        message.truncate(message.floor_char_boundary(MAX_MESSAGE_BYTES));
        self.held.tell(|news| news.message = message);
    }

    /// True once the handler should stop: the job was canceled, the lease is lost, or the worker's shutdown grace is over.
    pub fn is_canceled(&self) -> bool {
        self.held.token().is_cancelled()
    }

    /// Waits until the handler should stop.
    pub async fn canceled(&self) {
        self.held.token().cancelled().await;
    }

    /// The same signal as a token, to pass on.
    pub fn cancellation(&self) -> CancellationToken {
        self.held.token().clone()
    }
}

/// Removes NUL, the one character that the service refuses.
fn clean(mut text: String) -> String {
    text.retain(|c| c != '\0');
    text
}
