//! The arrows that one command takes.

use std::{sync::Arc, time::Duration};

use super::{Outcome, Report, Tick, Transition};
use crate::domain::{
    clock::Time,
    event::{ACTOR_LEDGER, EventKind, JobError, JobEvent, Position},
    job::Job,
    json::Json,
    status::JobStatus,
};

/// What an event says beside the job's state.
#[derive(Default)]
pub(super) struct Detail {
    pub(super) message: Arc<str>,
    pub(super) result: Option<Json>,
    pub(super) error: Option<JobError>,
    pub(super) scheduled_at: Option<Time>,
}

impl Detail {
    pub(super) fn of(report: &Report) -> Self {
        Self { message: Arc::clone(&report.message), ..Self::default() }
    }
}

/// The way of one job through one command: the job as it becomes, and an event for each arrow.
pub(super) struct Path {
    pub(super) job: Job,
    pub(super) events: Vec<JobEvent>,
    actor: Arc<str>,
    at: Tick,
}

impl Path {
    pub(super) fn new(job: &Job, actor: &Arc<str>, at: Tick) -> Self {
        Self { job: job.clone(), events: Vec::new(), actor: Arc::clone(actor), at }
    }

    pub(super) fn finish(self) -> Transition {
        Transition { job: self.job, events: self.events }
    }

    /// Takes one arrow: writes its event, and what the event says, into the job.
    pub(super) fn take(&mut self, kind: EventKind, next: JobStatus, detail: Detail) {
        let job = &mut self.job;
        let prev = job.status;
        let seq = self.at.next_seq + self.events.len() as i64;
        job.status = next;
        job.updated_at = self.at.now;
        job.last_job_seq += 1;
        job.last_seq = seq;
        job.last_recorded_at = self.at.now;
        if detail.result.is_some() {
            job.result_at = Some(Position { seq, recorded_at: self.at.now });
        }
        if let Some(error) = &detail.error {
            job.last_error = Some(error.clone());
        }
        job.finished_at = next.is_terminal().then_some(self.at.now);
        if next == JobStatus::Queued {
            job.scheduled_at = detail.scheduled_at;
            job.ready_at = detail.scheduled_at.map_or(self.at.now, |time| time.max(self.at.now));
        }
        self.events.push(JobEvent {
            org_id: job.org_id,
            seq,
            job_id: job.id,
            job_seq: job.last_job_seq,
            ts: self.at.now,
            recorded_at: self.at.now,
            kind,
            prev_status: Some(prev),
            next_status: next,
            attempt: job.attempt,
            actor: Arc::clone(&self.actor),
            job_type: Arc::clone(&job.spec.job_type),
            stage: job.stage.clone(),
            progress: job.progress,
            message: detail.message,
            result: detail.result,
            error: detail.error,
            scheduled_at: detail.scheduled_at,
        });
    }

    pub(super) fn end_attempt(&mut self, outcome: &Outcome, detail: Detail) {
        match outcome {
            Outcome::Succeeded { result } => {
                self.take(EventKind::Succeeded, JobStatus::Succeeded, Detail { result: result.clone(), ..detail });
            }
            // After cancel was requested, every exit other than success leads to canceled and keeps its error.
            Outcome::Failed { result, error, .. } if self.job.cancel_requested => {
                self.cancel(Detail { result: result.clone(), error: Some(error.clone()), ..detail });
            }
            Outcome::Released { .. } if self.job.cancel_requested => self.cancel(detail),
            Outcome::Canceled { result, error } => {
                self.cancel(Detail { result: result.clone(), error: error.clone(), ..detail });
            }
            Outcome::Released { retry_after } => {
                let scheduled_at = retry_after.map(|wait| self.at.now + wait);
                self.take(EventKind::Released, JobStatus::Queued, Detail { scheduled_at, ..detail });
            }
            Outcome::Failed { result, error, retryable, retry_after } => {
                let detail = Detail { result: result.clone(), error: Some(error.clone()), ..detail };
                self.fail(detail, *retryable, *retry_after);
            }
        }
    }

    fn cancel(&mut self, detail: Detail) {
        self.take(EventKind::Canceled, JobStatus::Canceled, detail);
    }

    /// running → failed, and at once on to queued or dead_letter where the budget says so.
    fn fail(&mut self, detail: Detail, retryable: bool, retry_after: Option<Duration>) {
        self.job.failures += 1;
        self.take(EventKind::Failed, JobStatus::Failed, detail);
        if !retryable {
            return;
        }
        let (failures, budget) = (self.job.failures, self.job.spec.max_attempts);
        self.actor = Arc::from(ACTOR_LEDGER);
        if failures < budget {
            let wait = retry_after.unwrap_or_else(|| self.job.spec.retry_policy.delay(self.job.id, failures));
            let scheduled_at = Some(self.at.now + wait);
            self.take(EventKind::RetryScheduled, JobStatus::Queued, Detail { scheduled_at, ..Detail::default() });
        } else if budget > 1 {
            self.take(EventKind::DeadLettered, JobStatus::DeadLetter, Detail::default());
        }
    }
}
