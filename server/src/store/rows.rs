//! Maps rows to the domain's values, the same way for both databases.

use std::{cmp::Reverse, collections::BTreeMap, sync::Arc, time::Duration};

use serde::Serialize;
use uuid::Uuid;

use super::{
    ClaimOrder, FoundJob, Head, ReadyJob, RecordId, Stock, StoreError, StoredEvent, Unblanked, detail,
    image::read_job_over, job_columns::read_job,
};
use crate::domain::{
    clock::Time,
    event::{EventKind, JobEvent},
    flow::Milestone,
    id::{Digest, JobId, OrgId},
    job::{Job, JobContents, JobRecord, Labels},
    json::Json,
    status::JobStatus,
    transition::{Mark, PastKey},
};

/// The columns of `job_event`, in the order in which they are written and read.
pub(super) const EVENT_COLUMNS: [&str; 14] = [
    "org_id",
    "seq",
    "job_id",
    "job_seq",
    "ts",
    "recorded_at",
    "kind",
    "prev_status",
    "next_status",
    "attempt",
    "actor",
    "job_type",
    "detail_json",
    "labels",
];

/// A row, read from left to right. Each method reads the next column, in a type that both databases have.
pub(super) trait Columns<'r> {
    fn uuid(&mut self) -> Result<Uuid, StoreError>;
    fn flag(&mut self) -> Result<bool, StoreError>;
    fn optional_flag(&mut self) -> Result<Option<bool>, StoreError>;
    fn int(&mut self) -> Result<i32, StoreError>;
    fn optional_int(&mut self) -> Result<Option<i32>, StoreError>;
    fn long(&mut self) -> Result<i64, StoreError>;
    fn optional_long(&mut self) -> Result<Option<i64>, StoreError>;
    fn double(&mut self) -> Result<f64, StoreError>;
    fn optional_text(&mut self) -> Result<Option<&'r str>, StoreError>;
    fn optional_bytes(&mut self) -> Result<Option<&'r [u8]>, StoreError>;
    fn optional_time(&mut self) -> Result<Option<Time>, StoreError>;
    /// The result of an event, exactly as it was given.
    fn result(&mut self) -> Result<Option<Json>, StoreError>;
    /// The result in a column of its own after [`EVENT_COLUMNS`]. `None` if `detail_json` has the result.
    fn result_beside_detail(&mut self) -> Result<Option<Json>, StoreError>;

    fn time(&mut self) -> Result<Time, StoreError> {
        self.optional_time()?.ok_or_else(|| damaged("time"))
    }

    /// A null becomes the empty text.
    fn text(&mut self) -> Result<&'r str, StoreError> {
        Ok(self.optional_text()?.unwrap_or_default())
    }

    fn status(&mut self) -> Result<JobStatus, StoreError> {
        status(self.text()?)
    }

    fn digest(&mut self) -> Result<Option<Digest>, StoreError> {
        let bytes = self.optional_bytes()?;
        bytes.map(|bytes| bytes.try_into().map(Digest).map_err(|_| damaged("digest"))).transpose()
    }

    fn duration(&mut self) -> Result<Duration, StoreError> {
        Ok(Duration::from_micros(self.long()?.unsigned_abs()))
    }

    fn optional_duration(&mut self) -> Result<Option<Duration>, StoreError> {
        Ok(self.optional_long()?.map(|micros| Duration::from_micros(micros.unsigned_abs())))
    }
}

/// Reads the head of a log, then its last record.
pub(super) fn head<'r>(columns: &mut impl Columns<'r>) -> Result<(Head, RecordId), StoreError> {
    let head = Head {
        seq: columns.long()?,
        floor: columns.long()?,
        recorded_at: columns.optional_time()?,
        types: columns.long()?,
        ready_gen: columns.long()?,
        stock: Stock { jobs: columns.long()?, bytes: columns.long()? },
        org_seq: columns.long()?,
    };
    Ok((head, RecordId { n: columns.long()?, id: columns.long()? }))
}

/// Reads a ready job: its id, type, priority, ready time, and the `seq` of its first event.
pub(super) fn ready_job<'r>(columns: &mut impl Columns<'r>) -> Result<ReadyJob, StoreError> {
    let (id, job_type) = (JobId(columns.uuid()?), columns.text()?.into());
    let (priority, ready_at) = (Reverse(columns.int()?), columns.time()?);
    Ok(ReadyJob { id, job_type, order: ClaimOrder { priority, ready_at, created_seq: columns.long()? } })
}

/// Reads a job as [`read_job_over`] does, then payload and result.
pub(super) fn job_record<'r>(columns: &mut impl Columns<'r>) -> Result<JobRecord, StoreError> {
    Ok(JobRecord { job: read_job_over(columns)?, contents: contents(columns)? })
}

/// Reads a job as [`read_job`] does, then whether the log has the job's last event.
///
/// # Errors
///
/// If the log lacks that event. Then the row is ahead of a log that was cut, and nothing can be decided on the job.
pub(super) fn job_of_log<'r>(columns: &mut impl Columns<'r>) -> Result<Job, StoreError> {
    let job = read_job(columns)?;
    if columns.flag()? {
        return Ok(job);
    }
    Err(StoreError::Refused(format!(
        "the log lacks event {} of job {}: the end of the log was lost",
        job.last_seq, job.id
    )))
}

/// Reads some of `wanted` jobs. Each row has the job's index among them, whether it is large, and what [`job_record`] reads.
pub(super) fn found_jobs<'r, C: Columns<'r>>(
    wanted: usize,
    rows: impl Iterator<Item = C>,
) -> Result<Vec<FoundJob>, StoreError> {
    let mut found = vec![FoundJob::Nothing; wanted];
    for mut columns in rows {
        let place = usize::try_from(columns.long()?).ok().and_then(|n| found.get_mut(n));
        let place = place.ok_or_else(|| damaged("place"))?;
        *place = if columns.flag()? { FoundJob::Large } else { FoundJob::Whole(Arc::new(job_record(&mut columns)?)) };
    }
    Ok(found)
}

/// A list of `wanted` flags, of which those at these indexes are true.
pub(super) fn at(wanted: usize, places: impl IntoIterator<Item = usize>) -> Result<Vec<bool>, StoreError> {
    let mut found = vec![false; wanted];
    for place in places {
        *found.get_mut(place).ok_or_else(|| damaged("place"))? = true;
    }
    Ok(found)
}

/// Reads payload and result.
pub(super) fn contents<'r>(columns: &mut impl Columns<'r>) -> Result<JobContents, StoreError> {
    Ok(JobContents { payload: columns.optional_text()?.map(Json::from_trusted), result: columns.result()? })
}

/// Reads a job's id, and what a timeline needs of one of its events.
pub(super) fn milestone<'r>(columns: &mut impl Columns<'r>) -> Result<(JobId, Milestone), StoreError> {
    let job = JobId(columns.uuid()?);
    let kind = EventKind::parse(columns.text()?).ok_or_else(|| damaged("kind"))?;
    let (ts, recorded_at) = (columns.time()?, columns.time()?);
    let scheduled_at = columns.optional_text()?.map(detail::time).transpose()?;
    Ok((job, Milestone { kind, ts, recorded_at, is_past: columns.flag()?, scheduled_at }))
}

/// Reads the last import of a job: the job's id, and the `seq` and the detail of its `IMPORTED` event.
pub(super) fn mark<'r>(columns: &mut impl Columns<'r>) -> Result<(JobId, Mark), StoreError> {
    let job = JobId(columns.uuid()?);
    let seq = columns.long()?;
    let digest = detail::origin_digest(columns.text()?)?;
    Ok((job, Mark { seq, digest, past: Vec::new() }))
}

/// Reads a job's id, and the key by which an imported event of the job is recognised.
pub(super) fn past_key<'r>(columns: &mut impl Columns<'r>) -> Result<(JobId, PastKey), StoreError> {
    let job = JobId(columns.uuid()?);
    let ts = columns.time()?;
    Ok((job, (ts, columns.optional_text()?.map(status).transpose()?, columns.status()?)))
}

/// Reads [`EVENT_COLUMNS`], then the result if it has a column of its own.
pub(super) fn event<'r>(columns: &mut impl Columns<'r>) -> Result<JobEvent, StoreError> {
    let mut event = JobEvent {
        org_id: OrgId(columns.uuid()?),
        seq: columns.long()?,
        job_id: JobId(columns.uuid()?),
        job_seq: columns.long()?,
        ts: columns.time()?,
        recorded_at: columns.time()?,
        kind: EventKind::parse(columns.text()?).ok_or_else(|| damaged("kind"))?,
        prev_status: columns.optional_text()?.map(status).transpose()?,
        next_status: columns.status()?,
        attempt: columns.int()?,
        actor: columns.text()?.into(),
        job_type: columns.text()?.into(),
        labels: Labels::default(),
        stage: None,
        progress: None,
        message: "".into(),
        result: None,
        error: None,
        scheduled_at: None,
        origin: None,
        is_past: false,
        bulk_operation: None,
        edit: None,
    };
    if let Some(text) = columns.optional_text()? {
        detail::read(text, &mut event)?;
    }
    event.labels = labels_of(columns.optional_text()?)?;
    if let Some(result) = columns.result_beside_detail()? {
        event.result = Some(result);
    }
    Ok(event)
}

/// Reads an event as [`event`] does, then its size.
pub(super) fn stored_event<'r>(columns: &mut impl Columns<'r>) -> Result<StoredEvent, StoreError> {
    Ok(StoredEvent { event: event(columns)?, bytes: columns.long()? })
}

/// Reads what an erasure has left to blank.
pub(super) fn unblanked<'r>(columns: &mut impl Columns<'r>) -> Result<Unblanked, StoreError> {
    Ok(Unblanked {
        job: JobId(columns.uuid()?),
        after: columns.long()?,
        last: columns.long()?,
        since: columns.time()?,
        until: columns.time()?,
        requester: columns.text()?.into(),
    })
}

pub(super) fn status(name: &str) -> Result<JobStatus, StoreError> {
    JobStatus::parse(name).ok_or_else(|| damaged("status"))
}

pub(super) fn damaged(what: &str) -> StoreError {
    StoreError::Unusable(format!("the database holds a {what} that can't be read"))
}

/// `None` for the empty text, which is stored as null.
pub(super) fn non_empty(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

pub(super) fn labels_of(text: Option<&str>) -> Result<Labels, StoreError> {
    text.map_or(Ok(Labels::default()), |text| serde_json::from_str(text).map(Arc::new).map_err(|_| damaged("label")))
}

pub(super) fn labels_json(labels: &BTreeMap<String, String>) -> Option<String> {
    (!labels.is_empty()).then(|| json_text(labels))
}

/// The JSON text of a value. It must have string keys only, as then serialising can't fail.
pub(super) fn json_text(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("strings, numbers and raw JSON serialise")
}
