//! A local copy of an org's jobs that follows what happens to them.

use std::collections::HashMap;

use jobledger_proto::v1::{Job, JobEvent, JobEventKind, JobStatus, StreamJobEventsRequest};
use prost_types::{Timestamp, Value};

use crate::{Client, Error, Item, Subscription};

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
        if matches!(kind, JobEventKind::Claimed | JobEventKind::Started) {
            self.result = None;
        }
        if status == JobStatus::Queued {
            self.scheduled_at = event.scheduled_at;
        }
        if event.result.is_some() {
            self.result = event.result;
        }
        if kind == JobEventKind::Failed || !event.error_code.is_empty() || !event.error_message.is_empty() {
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
/// It holds every job that matches in memory: without statuses those that have finished too, until retention has removed them
/// and the view is built anew.
#[derive(Debug)]
#[must_use]
pub struct View {
    client: Client,
    request: StreamJobEventsRequest,
    events: Subscription,
    jobs: HashMap<String, JobState>,
    /// The job that left last: one that fails and is retried at once comes back with its error.
    left: Option<JobState>,
    as_of_seq: i64,
}

impl View {
    pub(crate) async fn open(client: Client, mut request: StreamJobEventsRequest) -> Result<Self, Error> {
        request.include_snapshot = true;
        let (events, jobs, as_of_seq) = snapshot(&client, &request).await?;
        Ok(Self { client, request, events, jobs, left: None, as_of_seq })
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

    /// The place in the log up to which everything is in it.
    pub fn as_of_seq(&self) -> i64 {
        self.as_of_seq
    }

    /// Follows the log by one step, as soon as there is one. `None` at the end of a history, or of a finished job. May be dropped
    /// while it waits: nothing is lost.
    ///
    /// # Errors
    ///
    /// If the service refuses to go on; then it ends.
    pub async fn next(&mut self) -> Option<Result<Change, Error>> {
        let item = match self.events.next().await? {
            Ok(item) => item,
            Err(Error::CursorExpired { .. } | Error::EpochChanged { .. }) => return Some(self.rebuild().await),
            Err(error) => return Some(Err(error)),
        };
        Some(Ok(match item {
            Item::Event(event) => self.apply(*event),
            Item::Bookmark(bookmark) => {
                self.as_of_seq = bookmark.seq;
                Change::Nothing
            }
            Item::Snapshot(_) | Item::SnapshotRestarted => Change::Nothing,
        }))
    }

    async fn rebuild(&mut self) -> Result<Change, Error> {
        self.left = None;
        (self.events, self.jobs, self.as_of_seq) = snapshot(&self.client, &self.request).await?;
        Ok(Change::Rebuilt)
    }

    fn apply(&mut self, event: JobEvent) -> Change {
        self.as_of_seq = event.seq;
        if self.jobs.get(&event.job_id).is_some_and(|job| job.last_seq >= event.seq) {
            // The snapshot was further on.
            return Change::Nothing;
        }
        let id = event.job_id.clone();
        let left = self.left.take().filter(|left| left.id == id);
        let job = self.jobs.remove(&id).or(left);
        let mut job = job.unwrap_or_else(|| JobState::first_seen(&event));
        let is_of_view = self.request.statuses.is_empty() || self.request.statuses.contains(&event.next_status);
        job.apply(event);
        if !is_of_view {
            self.left = Some(job);
            return Change::Left(id);
        }
        self.jobs.insert(id.clone(), job);
        Change::Changed(id)
    }
}

/// Reads the jobs as they are, and where in the log that is.
async fn snapshot(
    client: &Client,
    request: &StreamJobEventsRequest,
) -> Result<(Subscription, HashMap<String, JobState>, i64), Error> {
    let mut events = client.subscribe(request.clone()).await?;
    let mut jobs = HashMap::new();
    while let Some(item) = events.next().await {
        match item? {
            Item::Snapshot(job) => {
                jobs.insert(job.id.clone(), JobState::from(*job));
            }
            Item::SnapshotRestarted => jobs.clear(),
            Item::Bookmark(bookmark) => return Ok((events, jobs, bookmark.seq)),
            Item::Event(_) => return Err(Error::without("the bookmark of the snapshot")),
        }
    }
    Err(Error::without("the bookmark of the snapshot"))
}
