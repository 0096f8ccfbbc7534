//! What a handler has of its job beside the payload.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use jobledger_proto::v1::Job;
use tokio_util::sync::CancellationToken;

use super::keeper::Held;

/// The longest stage, in characters, and the longest message, in bytes, that the contract takes.
const MAX_STAGE_CHARS: usize = 100;
const MAX_MESSAGE_BYTES: usize = 4 << 10;

/// A handler's view of its attempt. Cheap to clone.
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

    /// The job's id: the same in all its attempts.
    pub fn job_id(&self) -> &str {
        &self.job.id
    }

    /// Which attempt this is: 1, 2, …
    pub fn attempt(&self) -> i32 {
        self.job.attempt
    }

    /// How many attempts before this one have failed, of the job's `max_attempts`.
    pub fn failures(&self) -> i32 {
        self.job.failures
    }

    /// How many attempts before this one were lost, because their workers' leases expired: they may have done some of the work, or all
    /// of it.
    pub fn lost_attempts(&self) -> i32 {
        self.job.lost_attempts
    }

    /// When the job's run time-out ends the attempt, if it has one.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Says what is being done now, in at most 100 characters; more are cut off. Returns at once: the latest of what was said is
    /// reported a few times a second.
    pub fn stage(&self, stage: impl Into<String>) {
        let stage = clean(stage.into()).chars().take(MAX_STAGE_CHARS).collect();
        self.held.tell(|news| news.stage = Some(stage));
    }

    /// Says how far the work is, in per cent of at most 100. Returns at once, as [`Context::stage`] does.
    pub fn progress(&self, percent: u8) {
        self.held.tell(|news| news.progress = Some(percent.min(100).into()));
    }

    /// Leaves a remark for the event log, of at most 4 KiB; more is cut off. Returns at once, as [`Context::stage`] does; of
    /// remarks that follow quickly on each other the latest is reported.
    pub fn message(&self, message: impl Into<String>) {
        let mut message = clean(message.into());
        message.truncate(message.floor_char_boundary(MAX_MESSAGE_BYTES));
        self.held.tell(|news| news.message = message);
    }

    /// True once the handler should stop: the job was canceled, or belongs to others, or the worker is stopping and can wait no
    /// longer.
    pub fn is_canceled(&self) -> bool {
        self.held.token().is_cancelled()
    }

    /// Waits until the handler should stop.
    pub async fn canceled(&self) {
        self.held.token().cancelled().await;
    }

    /// The same as a token, to hand on.
    pub fn cancellation(&self) -> CancellationToken {
        self.held.token().clone()
    }
}

/// Without the one character that the service refuses.
fn clean(mut text: String) -> String {
    text.retain(|c| c != '\0');
    text
}
