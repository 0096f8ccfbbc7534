//! Jobs that are imported from another system, with their history there.

use std::{collections::HashMap, sync::Arc};

use super::super::{Tick, Transition};
use crate::domain::{
    clock::Time,
    event::{EventKind, JobError, JobEvent, Origin, Position},
    id::{Digest, JobId, OrgId},
    job::{Job, JobSpec},
    json::Json,
    status::JobStatus,
};

/// A job of another system.
#[derive(Debug, Clone, PartialEq)]
pub struct Import {
    /// The job's id, there and here.
    pub id: JobId,
    /// What its creator asked for.
    pub spec: Arc<JobSpec>,
    /// Its current state there.
    pub state: ImportedState,
    /// Its history there, in order. The first entry is its creation.
    pub past: Vec<Past>,
    /// Digest of everything that the other system has of the job.
    pub digest: Digest,
}

/// The state of a job in another system.
#[derive(Debug, Clone, PartialEq)]
pub struct ImportedState {
    /// The status there.
    pub status: JobStatus,
    /// How often the job has entered running there.
    pub attempt: i32,
    /// What its worker is doing, in its own words.
    pub stage: Option<Arc<str>>,
    /// Progress of the attempt, in per cent.
    pub progress: Option<u8>,
    /// What its worker returned.
    pub result: Option<Json>,
    /// The last failure.
    pub error: Option<JobError>,
    /// When the job was created there.
    pub created_at: Time,
    /// When the job last changed there.
    pub updated_at: Time,
    /// When the job first entered running there.
    pub started_at: Option<Time>,
    /// When the job ended there. Where an ended job lacks it, the ledger keeps the end that it has, or takes `updated_at`.
    pub finished_at: Option<Time>,
}

/// One entry of a job's history in another system.
#[derive(Debug, Clone, PartialEq)]
pub struct Past {
    /// When it happened.
    pub ts: Time,
    /// True if the other system has no record of it, or not of its time. It follows from other data, and the next import
    /// may date it differently.
    pub is_inferred: bool,
    /// The status before; `None` for the creation.
    pub prev_status: Option<JobStatus>,
    /// The status after.
    pub next_status: JobStatus,
    /// The attempt after it.
    pub attempt: i32,
    /// The stage after it.
    pub stage: Option<Arc<str>>,
    /// The progress after it, in per cent.
    pub progress: Option<u8>,
    /// A remark; empty for none.
    pub message: Arc<str>,
    /// The result that came with it.
    pub result: Option<Json>,
    /// The error that came with it.
    pub error: Option<JobError>,
}

/// What the log has of an earlier import of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// `seq` of the job's last [`EventKind::Imported`] event.
    pub seq: i64,
    /// Digest of what the other system had of the job then.
    pub digest: Digest,
    /// The keys of the job's other events. Only loaded if the other system has changed the job since.
    pub past: Vec<PastKey>,
}

/// Identifies a history entry by time and statuses. Entries with equal keys are matched by their number.
pub type PastKey = (Time, Option<JobStatus>, JobStatus);

/// The outcome of an import.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ImportOutcome {
    /// The ledger did not have the job.
    New,
    /// The other system has changed the job since the last import, and the ledger has not. The import was applied.
    Updated,
    /// The job is the same here and there.
    Unchanged,
    /// The job has changed here since the import, and not there.
    Ahead,
    /// The job was erased here. It stays as it is.
    Erased,
}

/// Why an import is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportRefusal {
    /// The job has changed on both sides since it was imported.
    BothChanged,
    /// The ledger created the job itself, and it differs.
    Own,
}

impl Past {
    /// The event kind that the two statuses imply.
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

    /// The key of the entry.
    pub fn key(&self) -> PastKey {
        (self.ts, self.prev_status, self.next_status)
    }
}

impl Job {
    /// Imports a job, or updates an imported one with what has happened in the other system since. The ledger wins: a job
    /// that has changed here is not updated. Pure, like [`Job::apply`].
    ///
    /// # Errors
    ///
    /// If the job is here and must not be changed by the import; it then stays as it is.
    pub fn import(
        import: &Import,
        org_id: OrgId,
        known: Option<(&Self, Option<&Mark>)>,
        at: Tick,
    ) -> Result<(ImportOutcome, Transition), ImportRefusal> {
        let (job, before) = match known {
            None => return Ok((ImportOutcome::New, import.bring(Self::unborn(import, org_id, at), &[], at))),
            Some((job, _)) if job.erased_at.is_some() => return Ok((ImportOutcome::Erased, job.unchanged())),
            Some((job, Some(mark))) if mark.digest == import.digest => {
                let is_ahead = job.last_seq != mark.seq;
                let outcome = if is_ahead { ImportOutcome::Ahead } else { ImportOutcome::Unchanged };
                return Ok((outcome, job.unchanged()));
            }
            Some((job, Some(mark))) if job.last_seq == mark.seq => (job, mark),
            // This happens when a job that was exported to the other system is imported.
            Some((job, _)) if import.state.is_of(job) => return Ok((ImportOutcome::Unchanged, job.unchanged())),
            Some((_, None)) => return Err(ImportRefusal::Own),
            Some((_, Some(_))) => return Err(ImportRefusal::BothChanged),
        };
        Ok((ImportOutcome::Updated, import.bring(job.clone(), &before.past, at)))
    }

    /// The job before its first event.
    fn unborn(import: &Import, org_id: OrgId, at: Tick) -> Self {
        let create = Self::create(import.id, org_id, Arc::clone(&import.spec), None, at);
        // Queries for a job's events use `created_at` as the lower bound of `recorded_at`, so it must not be in the future.
        Self { created_at: import.state.created_at.min(at.now), last_job_seq: 0, last_seq: 0, ..create.job }
    }
}

impl ImportedState {
    /// True if a job of the ledger is in this state, as far as old clients can tell.
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
    /// The history entries that the log lacks.
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
        // Inferred entries match whatever their time.
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

    /// Appends the history entries that the log lacks, and then an IMPORTED event with the current state.
    fn bring(&self, mut job: Job, known: &[PastKey], at: Tick) -> Transition {
        let new = self.unknown(known);
        let mut events = Vec::with_capacity(self.past.len() + 1);
        let before = job.last_job_seq;
        let mut push = |event: JobEvent| {
            let n = events.len() as i64;
            events.push(JobEvent { seq: at.next_seq + n, job_seq: before + n + 1, ..event });
        };
        // The job leaves the status that it had here, so that subscribers that filter by that status see it go.
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

    /// An IMPORTED event with the job's state.
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
            bulk_operation: None,
            edit: None,
        }
    }

    /// Sets the job to its state in the other system. Times in the future become now.
    fn enter(&self, job: &mut Job, at: Tick) {
        let ImportedState { status, attempt, stage, progress, error, updated_at, started_at, finished_at, .. } =
            &self.state;
        // What the other system lacks, or has no more, stays.
        let started_at = started_at.or(job.started_at);
        let finished_at = finished_at.or(job.finished_at.filter(|_| job.status == *status));
        job.status = *status;
        job.attempt = job.attempt.max(*attempt);
        // One failure uses up the budget: the other system did not retry by itself.
        job.failures = i32::from(matches!(status, JobStatus::Failed | JobStatus::DeadLetter));
        job.lost_attempts = 0;
        job.stage.clone_from(stage);
        job.progress = *progress;
        job.last_error.clone_from(error);
        job.updated_at = (*updated_at).min(at.now);
        job.started_at = started_at.map(|time| time.min(at.now));
        let finished_at = finished_at.map_or(job.updated_at, |time| time.min(at.now));
        job.finished_at = status.is_terminal().then_some(finished_at);
        // The start of the attempt is not known to the microsecond, so its duration is not counted.
        job.attempt_started_at = None;
        job.scheduled_at = None;
        job.ready_at = job.updated_at;
        job.due_at = None;
    }
}
