//! Jobs that are brought in from another system, with what happened to them there.

use std::{collections::HashMap, sync::Arc};

use super::{Tick, Transition};
use crate::domain::{
    clock::Time,
    event::{EventKind, JobError, JobEvent, Origin, Position},
    id::{Digest, JobId, OrgId},
    job::{Job, JobSpec},
    json::Json,
    status::JobStatus,
};

/// A job as another system has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Import {
    /// Its identity there and here.
    pub id: JobId,
    /// What its creator asked for.
    pub spec: Arc<JobSpec>,
    /// Where it stands.
    pub state: State,
    /// What happened to it, in order; the first is its creation.
    pub past: Vec<Past>,
    /// Of all that the other system has of it.
    pub digest: Digest,
}

/// Where a job stands in another system.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// As in [`Job`].
    pub status: JobStatus,
    /// As in [`Job`].
    pub attempt: i32,
    /// As in [`Job`].
    pub stage: Option<Arc<str>>,
    /// As in [`Job`].
    pub progress: Option<u8>,
    /// What its worker returned.
    pub result: Option<Json>,
    /// The last failure.
    pub error: Option<JobError>,
    /// As in [`Job`].
    pub created_at: Time,
    /// As in [`Job`].
    pub updated_at: Time,
    /// As in [`Job`].
    pub started_at: Option<Time>,
    /// As in [`Job`]; of one that has ended and doesn't say when, it is `updated_at`.
    pub finished_at: Option<Time>,
}

/// Something that happened to a job in another system.
#[derive(Debug, Clone, PartialEq)]
pub struct Past {
    /// When.
    pub ts: Time,
    /// Nobody has written down when, or that it happened: it follows from something else, and may be dated otherwise next time.
    pub is_inferred: bool,
    /// As in [`JobEvent`].
    pub prev_status: Option<JobStatus>,
    /// As in [`JobEvent`].
    pub next_status: JobStatus,
    /// As in [`JobEvent`].
    pub attempt: i32,
    /// As in [`JobEvent`].
    pub stage: Option<Arc<str>>,
    /// As in [`JobEvent`].
    pub progress: Option<u8>,
    /// As in [`JobEvent`].
    pub message: Arc<str>,
    /// As in [`JobEvent`].
    pub result: Option<Json>,
    /// As in [`JobEvent`].
    pub error: Option<JobError>,
}

/// What was brought in of a job before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// `seq` of its last [`EventKind::Imported`] event.
    pub seq: i64,
    /// What the other system had of it then.
    pub digest: Digest,
    /// The log's events of it that are no such, if the other system has something else now.
    pub past: Vec<PastKey>,
}

/// By what something that happened elsewhere is known: two such that are the same in this are told apart by nothing but their number.
pub type PastKey = (Time, Option<JobStatus>, JobStatus);

/// What became of a job that was brought in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ImportOutcome {
    /// The ledger did not have it.
    New,
    /// The other system had changed it since it was brought in, and the ledger had not.
    Updated,
    /// It is here as it is there.
    Unchanged,
    /// It has gone on here, and not there.
    Ahead,
}

/// Why a job is not brought in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportRefusal {
    /// It has changed on both sides since it was brought in.
    BothChanged,
    /// It was not brought in, but created here, and is another than that.
    Own,
}

impl Past {
    /// What it proves to have happened.
    fn kind(&self) -> EventKind {
        if self.prev_status == Some(self.next_status) {
            return EventKind::Progress;
        }
        match (self.prev_status, self.next_status) {
            (None, JobStatus::Queued) => EventKind::Created,
            (Some(JobStatus::Running), JobStatus::Queued) => EventKind::Released,
            (Some(_), JobStatus::Queued) => EventKind::Requeued,
            (_, JobStatus::Running) => EventKind::Started,
            (_, JobStatus::Succeeded) => EventKind::Succeeded,
            (_, JobStatus::Failed) => EventKind::Failed,
            (_, JobStatus::Canceled) => EventKind::Canceled,
            (_, JobStatus::DeadLetter) => EventKind::DeadLettered,
        }
    }

    /// By what it is known.
    pub fn key(&self) -> PastKey {
        (self.ts, self.prev_status, self.next_status)
    }
}

impl Job {
    /// Brings a job in, or along with what has happened to it elsewhere since. The ledger's own job wins over what is
    /// brought in: only one to which nothing has happened here is changed. Pure, as [`Job::apply`].
    ///
    /// # Errors
    ///
    /// If the job is here and must not change in this way; it then stays as it is.
    pub fn import(
        import: &Import,
        org_id: OrgId,
        known: Option<(&Self, Option<&Mark>)>,
        at: Tick,
    ) -> Result<(ImportOutcome, Transition), ImportRefusal> {
        let (job, before) = match known {
            None => return Ok((ImportOutcome::New, import.bring(Self::unborn(import, org_id, at), &[], at))),
            Some((job, Some(mark))) if mark.digest == import.digest => {
                let is_ahead = job.last_seq != mark.seq;
                let outcome = if is_ahead { ImportOutcome::Ahead } else { ImportOutcome::Unchanged };
                return Ok((outcome, job.unchanged()));
            }
            Some((job, Some(mark))) if job.last_seq == mark.seq => (job, mark),
            // As when what was written back to the other system is brought in.
            Some((job, _)) if import.state.is_of(job) => return Ok((ImportOutcome::Unchanged, job.unchanged())),
            Some((_, None)) => return Err(ImportRefusal::Own),
            Some((_, Some(_))) => return Err(ImportRefusal::BothChanged),
        };
        Ok((ImportOutcome::Updated, import.bring(job.clone(), &before.past, at)))
    }

    /// A job before its first event.
    fn unborn(import: &Import, org_id: OrgId, at: Tick) -> Self {
        let create = Self::create(import.id, org_id, Arc::clone(&import.spec), None, at);
        // Where its events are looked for by time, none is older than the job.
        Self { created_at: import.state.created_at.min(at.now), last_job_seq: 0, last_seq: 0, ..create.job }
    }
}

impl State {
    /// True if a job of the ledger's stands there, as far as old clients can tell.
    fn is_of(&self, job: &Job) -> bool {
        let in_old_words = |status| if status == JobStatus::DeadLetter { JobStatus::Failed } else { status };
        (job.created_at, job.updated_at) == (self.created_at, self.updated_at)
            && in_old_words(job.status) == in_old_words(self.status)
            && job.stage == self.stage
            && job.progress.unwrap_or_default() == self.progress.unwrap_or_default()
            && job.result_at.is_some() == self.result.is_some()
    }
}

impl Import {
    /// What happened elsewhere and is not among the events that are known.
    fn unknown(&self, known: &[PastKey]) -> Vec<&Past> {
        let mut dated: HashMap<PastKey, usize> = HashMap::new();
        for key in known {
            *dated.entry(*key).or_default() += 1;
        }
        let mut take = |key: PastKey| match dated.get_mut(&key) {
            Some(n) if *n > 0 => {
                *n -= 1;
                true
            }
            _ => false,
        };
        let is_known: Vec<_> = self.past.iter().map(|past| !past.is_inferred && take(past.key())).collect();
        // Of what is inferred, the date says nothing.
        let mut undated: HashMap<_, usize> = HashMap::new();
        for ((_, prev, next), n) in dated {
            *undated.entry((prev, next)).or_default() += n;
        }
        let mut is_inferred_known = |past: &Past| match undated.get_mut(&(past.prev_status, past.next_status)) {
            Some(n) if past.is_inferred && *n > 0 => {
                *n -= 1;
                true
            }
            _ => false,
        };
        let unknown = self.past.iter().zip(is_known).filter(|(past, is_known)| !is_known && !is_inferred_known(past));
        unknown.map(|(past, _)| past).collect()
    }

    /// Appends what happened elsewhere and is not in the log yet, and then where that has led.
    fn bring(&self, mut job: Job, known: &[PastKey], at: Tick) -> Transition {
        let new = self.unknown(known);
        let mut events = Vec::with_capacity(self.past.len() + 1);
        let before = job.last_job_seq;
        let mut push = |event: JobEvent| {
            let n = events.len() as i64;
            events.push(JobEvent { seq: at.next_seq + n, job_seq: before + n + 1, ..event });
        };
        // Who follows the status that the job had here is told that it leaves it.
        let mut status = (before > 0).then_some(job.status);
        for past in new {
            if before == 0 {
                status = Some(past.next_status);
            }
            push(JobEvent {
                ts: past.ts,
                is_past: true,
                kind: past.kind(),
                prev_status: past.prev_status,
                next_status: past.next_status,
                attempt: past.attempt,
                stage: past.stage.clone(),
                progress: past.progress,
                message: Arc::clone(&past.message),
                result: past.result.clone(),
                error: past.error.clone(),
                ..self.event(&job, at)
            });
        }
        self.enter(&mut job, at);
        push(JobEvent {
            ts: job.updated_at,
            prev_status: status,
            result: self.state.result.clone(),
            origin: Some(Arc::new(Origin {
                digest: self.digest,
                created_at: job.created_at,
                started_at: job.started_at,
                finished_at: job.finished_at,
            })),
            ..self.event(&job, at)
        });
        job.last_job_seq += events.len() as i64;
        job.last_seq = at.next_seq + events.len() as i64 - 1;
        job.last_recorded_at = at.recorded_at;
        job.result_at =
            self.state.result.is_some().then_some(Position { seq: job.last_seq, recorded_at: job.last_recorded_at });
        Transition { job, events, is_changed: true }
    }

    /// The event that says where the job stands.
    fn event(&self, job: &Job, at: Tick) -> JobEvent {
        JobEvent {
            org_id: job.org_id,
            seq: 0,
            job_id: job.id,
            job_seq: 0,
            ts: at.now,
            recorded_at: at.recorded_at,
            kind: EventKind::Imported,
            prev_status: None,
            next_status: job.status,
            attempt: job.attempt,
            actor: Arc::default(),
            job_type: Arc::clone(&job.spec.job_type),
            labels: Arc::clone(&job.spec.labels),
            stage: job.stage.clone(),
            progress: job.progress,
            message: Arc::default(),
            result: None,
            error: job.last_error.clone(),
            scheduled_at: None,
            origin: None,
            is_past: false,
        }
    }

    /// Puts the job where it stands in the other system. What that is ahead in time counts as now.
    fn enter(&self, job: &mut Job, at: Tick) {
        let State { status, attempt, stage, progress, error, updated_at, started_at, finished_at, .. } = &self.state;
        // What the other system does not know, or not any more, stays.
        let started_at = started_at.or(job.started_at);
        let finished_at = finished_at.or(job.finished_at.filter(|_| job.status == *status));
        job.status = *status;
        job.attempt = job.attempt.max(*attempt);
        // One failure uses the budget up: the other system did not try again by itself.
        job.failures = i32::from(matches!(status, JobStatus::Failed | JobStatus::DeadLetter));
        job.lost_attempts = 0;
        job.stage.clone_from(stage);
        job.progress = *progress;
        job.last_error.clone_from(error);
        job.updated_at = (*updated_at).min(at.now);
        job.started_at = started_at.map(|time| time.min(at.now));
        let finished_at = finished_at.map_or(job.updated_at, |time| time.min(at.now));
        job.finished_at = status.is_terminal().then_some(finished_at);
        // Since when it runs is not known to the microsecond, and what is not known is not counted.
        job.attempt_started_at = None;
        job.scheduled_at = None;
        job.ready_at = job.updated_at;
        job.due_at = None;
    }
}
