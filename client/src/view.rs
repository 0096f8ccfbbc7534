//! A local copy of an org's jobs that follows what happens to them.

use std::collections::HashMap;

use jobledger_proto::v1::{Job, JobEvent, JobEventKind, JobStatus, StreamJobEventsRequest};
use prost_types::{Timestamp, Value};
use tokio::time::{Instant, sleep_until};

use crate::{Client, Error, Item, Subscription, retry::Backoff};

/// A job as its events tell of it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct JobState {
    /// UUID of the job.
    pub id: String,
    /// Its type.
    pub job_type: String,
    /// Where it stands.
    pub status: JobStatus,
    /// How often it has entered running.
    pub attempt: i32,
    /// What its worker is doing.
    pub stage: Option<String>,
    /// How far the attempt is, in per cent.
    pub progress: Option<i32>,
    /// What its worker returned.
    pub result: Option<Value>,
    /// The code of the last failure since the job came into view, or of before if it was in the snapshot; empty for none.
    pub last_error_code: String,
    /// Its message.
    pub last_error_message: String,
    /// Not to be worked on before this time.
    pub scheduled_at: Option<Timestamp>,
    /// When its last event happened.
    pub updated_at: Option<Timestamp>,
    /// `seq` of its last event.
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

    /// The fold of a job's events.
    fn apply(&mut self, event: JobEvent) {
        let (kind, status) = (event.kind(), event.next_status());
        if matches!(kind, JobEventKind::Claimed | JobEventKind::Started | JobEventKind::Imported) {
            self.result = None;
        }
        if kind == JobEventKind::Imported {
            self.scheduled_at = None;
        }
        if status == JobStatus::Queued {
            self.scheduled_at = event.scheduled_at;
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

/// What has become of a view.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// The job with this id came into view, or changed.
    Changed(String),
    /// The job with this id has left the statuses that the view is of, and is in it no more.
    Left(String),
    /// Nothing, but the view is up to date as of a later place in the log.
    Nothing,
    /// The view was built anew: what it missed is no longer in the log, or the log is another since a restore.
    Rebuilt,
}

/// An org's jobs, those that match a [`Follow`](crate::Follow), kept up to date.
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
/// It holds every job that matches in memory. Nothing tells of jobs that retention removes: a view of finished ones keeps them,
/// until it is built anew, or told to [forget](View::forget) them. Of a job that comes into view later, result, error and
/// `scheduled_at` are known as far as the events tell that are seen of it.
#[derive(Debug)]
#[must_use]
pub struct View {
    client: Client,
    request: StreamJobEventsRequest,
    state: State,
    jobs: HashMap<String, JobState>,
    /// The job that left last: one that fails and is retried at once comes back with its error.
    left: Option<JobState>,
    as_of_seq: i64,
    /// Between one building and the next, where nothing could be followed in between.
    backoff: Backoff,
}

/// What a view is doing.
#[derive(Debug)]
enum State {
    Following(Subscription),
    Building(Snapshot),
    Ended,
}

/// A snapshot on its way.
#[derive(Debug, Default)]
struct Snapshot {
    /// `None` before it is asked for.
    events: Option<Subscription>,
    jobs: HashMap<String, JobState>,
    backoff: Backoff,
    /// Not to be asked for before.
    not_before: Option<Instant>,
}

impl Snapshot {
    /// Takes it up to its end, the bookmark that says where it belongs. May be dropped while it waits, and goes on from there.
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
                Some(Ok(Item::Event(_))) | None => return Err(Error::without("the bookmark of the snapshot")),
            }
        }
    }

    /// Begins it anew, after a while.
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

    /// The jobs, in no order.
    pub fn jobs(&self) -> impl Iterator<Item = &JobState> {
        self.jobs.values()
    }

    /// One of them.
    pub fn get(&self, id: &str) -> Option<&JobState> {
        self.jobs.get(id)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Takes a job out of the view, for instance one that has finished. It comes back if anything happens to it.
    pub fn forget(&mut self, id: &str) -> Option<JobState> {
        self.jobs.remove(id)
    }

    /// The place in the log up to which everything is in it.
    pub fn as_of_seq(&self) -> i64 {
        self.as_of_seq
    }

    /// Follows the log by one step, as soon as there is one; where that is no longer possible, because the service has removed what comes
    /// next, or has another log since a restore, the view is built anew. `None` at the end of a history, of a finished
    /// job's events, or after an error. May be dropped while it waits: nothing is lost.
    ///
    /// # Errors
    ///
    /// If the service refuses to go on.
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

    /// Takes over what a snapshot has brought.
    fn adopt(&mut self, snapshot: Snapshot, as_of_seq: i64) {
        self.state = snapshot.events.map_or(State::Ended, State::Following);
        self.jobs = snapshot.jobs;
        self.left = None;
        self.as_of_seq = as_of_seq;
    }

    fn apply(&mut self, event: JobEvent) -> Change {
        self.as_of_seq = event.seq;
        if self.jobs.get(&event.job_id).is_some_and(|job| job.last_seq >= event.seq) {
            // The snapshot was further on.
            return Change::Nothing;
        }
        let id = event.job_id.clone();
        let job = self.jobs.remove(&id);
        let was_in_view = job.is_some();
        let left = self.left.take().filter(|left| left.id == id);
        let mut job = job.or(left).unwrap_or_else(|| JobState::first_seen(&event));
        let is_in_view = self.request.statuses.is_empty() || self.request.statuses.contains(&event.next_status);
        job.apply(event);
        if is_in_view {
            self.jobs.insert(id.clone(), job);
            return Change::Changed(id);
        }
        self.left = Some(job);
        if was_in_view { Change::Left(id) } else { Change::Nothing }
    }
}

/// What says that the view's place in the log is of no use any more.
fn is_void(error: &Error) -> bool {
    matches!(error, Error::CursorExpired { .. } | Error::CursorAhead { .. } | Error::EpochChanged { .. })
}
