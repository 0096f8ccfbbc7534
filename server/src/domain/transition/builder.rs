//! Builds the transition of one command: the changed job, and its events.

use std::{sync::Arc, time::Duration};

use super::{Outcome, Tick, Transition};
use crate::domain::{
    clock::Time,
    event::{ACTOR_LEDGER, EventKind, JobError, JobEvent, Position},
    job::Job,
    json::Json,
    lease::Lease,
    status::JobStatus,
};

/// The fields of an event that don't come from the job.
#[derive(Default)]
pub(super) struct Detail {
    pub(super) message: Arc<str>,
    pub(super) result: Option<Json>,
    pub(super) error: Option<JobError>,
    pub(super) scheduled_at: Option<Time>,
}

impl Detail {
    pub(super) fn saying(message: &Arc<str>) -> Self {
        Self { message: Arc::clone(message), ..Self::default() }
    }
}

/// A transition in progress: the job as changed so far, and an event for each arrow taken.
pub(super) struct Path {
    pub(super) job: Job,
    pub(super) events: Vec<JobEvent>,
    actor: Arc<str>,
    at: Tick,
    /// True if the job has changed without an event.
    is_changed: bool,
}

impl Path {
    pub(super) fn new(job: &Job, actor: &Arc<str>, at: Tick) -> Self {
        Self { job: job.clone(), events: Vec::new(), actor: Arc::clone(actor), at, is_changed: false }
    }

    pub(super) fn finish(self) -> Transition {
        Transition { is_changed: self.is_changed || !self.events.is_empty(), job: self.job, events: self.events }
    }

    /// Changes the job without an event.
    pub(super) fn change(&mut self, change: impl FnOnce(&mut Job)) {
        self.is_changed = true;
        change(&mut self.job);
    }

    /// Sets up a new attempt, under a lease or (`None`) for a reporter without one. The caller takes the arrow afterwards.
    pub(super) fn enter_running(&mut self, lease: Option<Lease>) {
        let job = &mut self.job;
        job.attempt += 1;
        job.started_at.get_or_insert(self.at.now);
        job.attempt_started_at = Some(self.at.now);
        job.stage = None;
        job.progress = None;
        job.result_at = None;
        job.lease = lease;
        job.due_at = job.attempt_ends_at();
    }

    /// Takes one arrow: adds its event, and applies what the event says to the job.
    pub(super) fn take(&mut self, kind: EventKind, next: JobStatus, detail: Detail) {
        let job = &mut self.job;
        let prev = job.status;
        let seq = self.at.next_seq + self.events.len() as i64;
        job.status = next;
        job.updated_at = self.at.now;
        job.last_job_seq += 1;
        job.last_seq = seq;
        job.last_recorded_at = self.at.recorded_at;
        if detail.result.is_some() {
            job.result_at = Some(Position { seq, recorded_at: self.at.recorded_at });
        }
        if let Some(error) = &detail.error {
            job.last_error = Some(error.clone());
        }
        if kind != EventKind::Erased {
            job.finished_at = next.is_terminal().then_some(self.at.now);
        }
        if next != JobStatus::Running && kind != EventKind::Edited {
            job.lease = None;
            job.due_at = None;
        }
        // An edit without a time leaves the job's place among those that wait.
        if next == JobStatus::Queued && (kind != EventKind::Edited || detail.scheduled_at.is_some()) {
            job.scheduled_at = detail.scheduled_at;
            job.ready_at = detail.scheduled_at.map_or(self.at.now, |time| time.max(self.at.now));
            job.due_at = (job.ready_at > self.at.now).then_some(job.ready_at);
        }
        self.events.push(JobEvent {
            org_id: job.org_id,
            seq,
            job_id: job.id,
            job_seq: job.last_job_seq,
            ts: self.at.now,
            recorded_at: self.at.recorded_at,
            kind,
            prev_status: Some(prev),
            next_status: next,
            attempt: job.attempt,
            actor: Arc::clone(&self.actor),
            job_type: Arc::clone(&job.spec.job_type),
            labels: Arc::clone(&job.spec.labels),
            stage: job.stage.clone(),
            progress: job.progress,
            message: detail.message,
            result: detail.result,
            error: detail.error,
            scheduled_at: detail.scheduled_at,
            origin: None,
            is_past: false,
            bulk_operation: None,
            edit: None,
        });
    }

    pub(super) fn end_attempt(&mut self, outcome: &Outcome, detail: Detail) {
        match outcome {
            Outcome::Succeeded { result } => {
                self.take(EventKind::Succeeded, JobStatus::Succeeded, Detail { result: result.clone(), ..detail });
            }
            // After cancel was requested, every exit other than success leads to canceled and keeps its error.
            Outcome::Failed { result, error, .. } if self.job.cancel_requested => {
                // An empty error is not kept.
                let error = Some(error.clone()).filter(|error| *error != JobError::default());
                self.cancel(Detail { result: result.clone(), error, ..detail });
            }
            Outcome::Canceled { result, error } => {
                self.cancel(Detail { result: result.clone(), error: error.clone(), ..detail });
            }
            Outcome::Released { retry_after } => self.release(*retry_after, detail),
            Outcome::Failed { result, error, retryable, retry_after } => {
                let detail = Detail { result: result.clone(), error: Some(error.clone()), ..detail };
                self.fail(detail, *retryable, *retry_after);
            }
        }
    }

    /// running → queued, without a failure.
    pub(super) fn release(&mut self, retry_after: Option<Duration>, detail: Detail) {
        if self.job.cancel_requested {
            return self.cancel(detail);
        }
        let scheduled_at = retry_after.map(|wait| self.at.now + wait);
        self.take(EventKind::Released, JobStatus::Queued, Detail { scheduled_at, ..detail });
    }

    /// running → queued, because the lease expired; a failure once `max_lost_attempts` are used up.
    pub(super) fn lose(&mut self, error: JobError) {
        if self.job.cancel_requested || self.job.lost_attempts >= self.job.spec.max_lost_attempts {
            return self.give_up(error);
        }
        self.revoke_lease();
        self.job.lost_attempts += 1;
        let scheduled_at = Some(self.at.now + self.backoff());
        self.take(EventKind::Lost, JobStatus::Queued, Detail { error: Some(error), scheduled_at, ..Detail::default() });
    }

    /// Ends the attempt as a failure that the ledger decided.
    pub(super) fn give_up(&mut self, error: JobError) {
        self.revoke_lease();
        let (result, retryable, retry_after) = (None, true, None);
        self.end_attempt(&Outcome::Failed { result, error, retryable, retry_after }, Detail::default());
    }

    /// Clears the last outcome, so that a late report is refused and can't pass as a repetition.
    fn revoke_lease(&mut self) {
        self.job.outcome = None;
    }

    /// The retry policy's delay before the next attempt.
    fn backoff(&self) -> Duration {
        let job = &self.job;
        job.spec.retry_policy.delay(job.id, job.failures + job.lost_attempts)
    }

    pub(super) fn cancel(&mut self, detail: Detail) {
        self.take(EventKind::Canceled, JobStatus::Canceled, detail);
    }

    /// Blanks the finished job, and its events so far.
    pub(super) fn erase(&mut self) {
        let requester = Arc::clone(&self.job.spec.requested_by);
        self.job.blank(self.at.now);
        self.take(EventKind::Erased, self.job.status, Detail::default());
        self.events.iter_mut().for_each(|event| event.blank(&requester));
    }

    /// running → failed, and from there at once to queued or dead_letter, as the budget says.
    fn fail(&mut self, detail: Detail, retryable: bool, retry_after: Option<Duration>) {
        self.job.failures += 1;
        self.take(EventKind::Failed, JobStatus::Failed, detail);
        if !retryable {
            return;
        }
        let (failures, budget) = (self.job.failures, self.job.spec.max_attempts);
        self.actor = Arc::from(ACTOR_LEDGER);
        if failures < budget {
            let wait = retry_after.unwrap_or_else(|| self.backoff());
            let scheduled_at = Some(self.at.now + wait);
            self.take(EventKind::RetryScheduled, JobStatus::Queued, Detail { scheduled_at, ..Detail::default() });
        } else if budget > 1 {
            self.take(EventKind::DeadLettered, JobStatus::DeadLetter, Detail::default());
        }
    }
}

impl Job {
    /// When a timer ends the attempt: at the end of its lease or of its `run_timeout`, whichever is first.
    pub(super) fn attempt_ends_at(&self) -> Option<Time> {
        let lease_end = self.lease.as_ref().map(|lease| lease.expires_at);
        lease_end.into_iter().chain(self.run_ends_at()).min()
    }

    /// When the attempt's `run_timeout` ends.
    pub(super) fn run_ends_at(&self) -> Option<Time> {
        Some(self.attempt_started_at? + self.spec.run_timeout?)
    }

    pub(super) fn confirm_lease(&mut self) {
        if let Some(lease) = &mut self.lease {
            lease.is_confirmed = true;
        }
    }
}
