//! A local copy of an org's jobs that follows the log.

use std::collections::HashMap;

use jobledger_proto::v1::{Job, JobEvent, JobEventKind, JobStatus, StreamJobEventsRequest};
use prost_types::{Timestamp, Value};
use tokio::time::{Instant, sleep_until};

use crate::{Client, Error, Item, Subscription, retry::Backoff};

/// A job as folded from its events.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct JobState {
    /// UUID of the job.
    pub id: String,
    /// The job's type.
    pub job_type: String,
    /// The job's status.
    pub status: JobStatus,
    /// How often the job has entered running.
    pub attempt: i32,
    /// What the worker is doing; `None` if it said nothing.
    pub stage: Option<String>,
    /// Progress of the attempt, 0 to 100 per cent; `None` if the worker reported none.
    pub progress: Option<i32>,
    /// The result that the worker returned.
    pub result: Option<Value>,
    /// The code of the last failure that the view has seen, or that the snapshot had; empty for none.
    pub last_error_code: String,
    /// The message of that failure.
    pub last_error_message: String,
    /// The job may not begin before this time.
    pub scheduled_at: Option<Timestamp>,
    /// When the job's last event happened.
    pub updated_at: Option<Timestamp>,
    /// `seq` of the job's last event.
    pub last_seq: i64,
}

impl From<Job> for JobState {
    fn from(job: Job) -> Self {
        Self {
            status: job.status(),
            id: job.id,
            job_type: job.r#type,
            attempt: job.attempt,
            stage: job.stage,
            progress: job.progress,
            result: job.result,
            last_error_code: job.last_error_code,
            last_error_message: job.last_error_message,
            scheduled_at: job.scheduled_at,
            updated_at: job.updated_at,
            last_seq: job.last_seq,
        }
    }
}

impl JobState {
    fn first_seen(event: &JobEvent) -> Self {
        Self {
            id: event.job_id.clone(),
            job_type: event.job_type.clone(),
            status: JobStatus::Unspecified,
            attempt: 0,
            stage: None,
            progress: None,
            result: None,
            last_error_code: String::new(),
            last_error_message: String::new(),
            scheduled_at: None,
            updated_at: None,
            last_seq: 0,
        }
    }

    /// Folds an event into the job.
    fn apply(&mut self, event: JobEvent) {
        let (kind, status) = (event.kind(), event.next_status());
        if matches!(kind, JobEventKind::Claimed | JobEventKind::Started | JobEventKind::Imported) {
            self.result = None;
        }
        if kind == JobEventKind::Imported {
            self.scheduled_at = None;
        }
        // An edit says the time only if it changed that.
        let is_timed = kind != JobEventKind::Edited || event.scheduled_at.is_some();
        if status == JobStatus::Queued && is_timed {
            self.scheduled_at = event.scheduled_at;
        }
        if kind == JobEventKind::Erased {
            self.result = None;
            (self.last_error_code, self.last_error_message) = (String::new(), String::new());
        }
        if event.result.is_some() {
            self.result = event.result;
        }
        if matches!(kind, JobEventKind::Failed | JobEventKind::Imported)
            || !event.error_code.is_empty()
            || !event.error_message.is_empty()
        {
            self.last_error_code = event.error_code;
            self.last_error_message = event.error_message;
        }
        self.status = status;
        self.attempt = event.attempt;
        self.stage = event.stage;
        self.progress = event.progress;
        self.updated_at = event.ts;
        self.last_seq = event.seq;
    }
}

/// A change of a [`View`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// The job with this id came into the view, or changed.
    Changed(String),
    /// The job with this id left the view: its status is none of those that the view selects, or an edit or an erasure took
    /// a label from it.
    Left(String),
    /// No job of the view changed, but the view is up to date as of a later `seq`.
    Nothing,
    /// The view was rebuilt from a snapshot: retention had removed the next events, or a restore had replaced the log.
    Rebuilt,
}

/// The org's jobs that match a [`Follow`](crate::Follow), kept up to date in memory.
///
/// ```no_run
/// # async fn example(client: jobledger_client::Client) -> Result<(), jobledger_client::Error> {
/// use jobledger_client::{Follow, JobStatus};
///
/// let mut view = client.view(Follow::org().statuses([JobStatus::Queued, JobStatus::Running])).await?;
/// println!("{} jobs are not finished", view.len());
/// while let Some(change) = view.next().await {
///     println!("{:?}: {} jobs", change?, view.len());
/// }
/// # Ok(())
/// # }
/// ```
///
/// No event reports a job that retention removes. A view of finished jobs therefore keeps removed jobs until it is
/// rebuilt, or until [`View::forget`] drops them. For a job that comes into the view after the snapshot, `result`, the
/// last error and `scheduled_at` are known only from the events that the view has received.
#[derive(Debug)]
#[must_use]
pub struct View {
    client: Client,
    request: StreamJobEventsRequest,
    state: State,
    jobs: HashMap<String, JobState>,
    /// The job that left last: a job that fails and is retried at once comes back with its error.
    left: Option<JobState>,
    as_of_seq: i64,
    /// Wait between two rebuilds if no event was received between them.
    backoff: Backoff,
}

#[derive(Debug)]
enum State {
    Following(Subscription),
    Building(Snapshot),
    Ended,
}

/// A snapshot in progress.
#[derive(Debug, Default)]
struct Snapshot {
    /// `None` before the subscription is opened.
    events: Option<Subscription>,
    jobs: HashMap<String, JobState>,
    backoff: Backoff,
    /// The subscription is not opened before this time.
    not_before: Option<Instant>,
}

impl Snapshot {
    /// Receives the snapshot up to its final bookmark, and returns the bookmark's `seq`. Cancel-safe.
    async fn take(&mut self, client: &Client, request: &StreamJobEventsRequest) -> Result<i64, Error> {
        loop {
            if let Some(time) = self.not_before {
                sleep_until(time).await;
                self.not_before = None;
            }
            let events = match &mut self.events {
                Some(events) => events,
                None => self.events.insert(client.subscribe(request.clone()).await?),
            };
            match events.next().await {
                Some(Ok(Item::Snapshot(job))) => {
                    self.jobs.insert(job.id.clone(), JobState::from(*job));
                }
                Some(Ok(Item::SnapshotRestarted)) => self.jobs.clear(),
                Some(Ok(Item::Bookmark(bookmark))) => return Ok(bookmark.seq),
                Some(Err(error)) => return Err(error),
                Some(Ok(Item::Event(_) | Item::OrgEvent(_))) | None => {
                    return Err(Error::without("the bookmark of the snapshot"));
                }
            }
        }
    }

    /// Discards the snapshot, and starts it again after a backoff.
    fn restart(&mut self, after: &Error) {
        self.not_before = Some(Instant::now() + self.backoff.next(after.retry_after()));
        self.events = None;
        self.jobs.clear();
    }
}

impl View {
    pub(crate) async fn open(client: Client, mut request: StreamJobEventsRequest) -> Result<Self, Error> {
        request.include_snapshot = true;
        let mut snapshot = Snapshot::default();
        let as_of_seq = snapshot.take(&client, &request).await?;
        let (state, jobs, backoff) = (State::Ended, HashMap::new(), Backoff::default());
        let mut view = Self { client, request, state, jobs, left: None, as_of_seq, backoff };
        view.adopt(snapshot, as_of_seq);
        Ok(view)
    }

    /// The jobs, in no particular order.
    pub fn jobs(&self) -> impl Iterator<Item = &JobState> {
        self.jobs.values()
    }

    /// The job with this id, if the view has it.
    pub fn get(&self, id: &str) -> Option<&JobState> {
        self.jobs.get(id)
    }

    /// Number of jobs in the view.
    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    /// True if the view has no jobs.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Removes a job from the view, for instance a finished one. The job's next event brings it back.
    pub fn forget(&mut self, id: &str) -> Option<JobState> {
        self.jobs.remove(id)
    }

    /// The `seq` up to which the view includes every event.
    pub fn as_of_seq(&self) -> i64 {
        self.as_of_seq
    }

    /// Waits for the next change and applies it. Rebuilds the view if the service has removed the next events, or has
    /// another log after a restore. Returns `None` at the end of a history, at the end of a finished job's events, or
    /// after an error. Cancel-safe: dropping the future loses no change.
    ///
    /// # Errors
    ///
    /// Any error with which the service refuses to go on.
    pub async fn next(&mut self) -> Option<Result<Change, Error>> {
        loop {
            let error = match &mut self.state {
                State::Ended => return None,
                State::Following(events) => match events.next().await {
                    None => {
                        self.state = State::Ended;
                        return None;
                    }
                    Some(Ok(Item::Event(event))) => {
                        self.backoff.reset();
                        return Some(Ok(self.apply(*event)));
                    }
                    Some(Ok(Item::OrgEvent(event))) => {
                        self.as_of_seq = event.seq;
                        return Some(Ok(Change::Nothing));
                    }
                    Some(Ok(Item::Bookmark(bookmark))) => {
                        self.as_of_seq = bookmark.seq;
                        return Some(Ok(Change::Nothing));
                    }
                    Some(Ok(Item::Snapshot(_) | Item::SnapshotRestarted)) => continue,
                    Some(Err(error)) => error,
                },
                State::Building(snapshot) => match snapshot.take(&self.client, &self.request).await {
                    Ok(as_of_seq) => {
                        let State::Building(snapshot) = std::mem::replace(&mut self.state, State::Ended) else {
                            return None;
                        };
                        self.adopt(snapshot, as_of_seq);
                        return Some(Ok(Change::Rebuilt));
                    }
                    Err(error) => error,
                },
            };
            if !(is_void(&error) || matches!(self.state, State::Building(_)) && error.is_transient()) {
                self.state = State::Ended;
                return Some(Err(error));
            }
            tracing::debug!(%error, "building a view anew");
            match &mut self.state {
                State::Building(snapshot) => snapshot.restart(&error),
                _ => {
                    let not_before = Some(Instant::now() + self.backoff.next(None));
                    self.state = State::Building(Snapshot { not_before, ..Snapshot::default() });
                }
            }
        }
    }

    fn adopt(&mut self, snapshot: Snapshot, as_of_seq: i64) {
        self.state = snapshot.events.map_or(State::Ended, State::Following);
        self.jobs = snapshot.jobs;
        self.left = None;
        self.as_of_seq = as_of_seq;
    }

    fn apply(&mut self, event: JobEvent) -> Change {
        self.as_of_seq = event.seq;
        if self.jobs.get(&event.job_id).is_some_and(|job| job.last_seq >= event.seq) {
            // The snapshot had the job as of this event or later.
            return Change::Nothing;
        }
        let id = event.job_id.clone();
        let job = self.jobs.remove(&id);
        let was_in_view = job.is_some();
        let left = self.left.take().filter(|left| left.id == id);
        let mut job = job.or(left).unwrap_or_else(|| JobState::first_seen(&event));
        let has_status = self.request.statuses.is_empty() || self.request.statuses.contains(&event.next_status);
        let is_in_view = has_status && self.has_labels(&event);
        job.apply(event);
        if is_in_view {
            self.jobs.insert(id.clone(), job);
            return Change::Changed(id);
        }
        self.left = Some(job);
        if was_in_view { Change::Left(id) } else { Change::Nothing }
    }

    /// True if the job has the labels of the view after the event. An edit's event also comes if it had them before, and that of
    /// an erasure in any case.
    fn has_labels(&self, event: &JobEvent) -> bool {
        if event.kind() == JobEventKind::Erased {
            return self.request.labels.is_empty();
        }
        let Some(edit) = event.edit.as_ref().filter(|edit| edit.fields.iter().any(|field| field == "labels")) else {
            return true;
        };
        let after = edit.after.as_ref().map(|after| &after.labels);
        after.is_some_and(|labels| self.request.labels.iter().all(|(key, value)| labels.get(key) == Some(value)))
    }
}

/// True of errors that make the view's position in the log useless.
fn is_void(error: &Error) -> bool {
    matches!(error, Error::CursorExpired { .. } | Error::CursorAhead { .. } | Error::EpochChanged { .. })
}
