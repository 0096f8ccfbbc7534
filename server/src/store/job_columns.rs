//! The columns of `job`, each defined once: name, type, whether it changes, group, and the value that it gets from a job.

use std::{sync::Arc, time::Duration};

use uuid::Uuid;

use super::{
    StoreError,
    rows::{Columns, damaged, labels_json, labels_of, non_empty},
    value::Value,
};
use crate::domain::{
    clock::Time,
    event::{JobError, Position},
    id::{Digest, JobId, OrgId},
    job::{Ended, Idempotency, Job, JobSpec},
    lease::Lease,
    retry::RetryPolicy,
    status::JobStatus,
};

/// A column of `job`.
pub(super) struct JobColumn {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// When the column changes after the job was created.
    pub(super) changes: Varies,
    /// The group of the column.
    pub(super) shared: Shared,
    /// The column's value for a job.
    pub(super) value: for<'a> fn(&'a Job) -> Value<'a>,
}

/// When a column changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Varies {
    Never,
    /// Only by an edit or an erasure, which write the job's whole row. No image has the column.
    ByEdit,
    /// With the job's life.
    InLife,
}

/// The type of a column's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Uuid,
    Text,
    Int,
    Long,
    Double,
    Flag,
    Bytes,
    Time,
}

/// Groups of columns of `job`. The columns of a group likely have the same values in all jobs that a batch writes. PostgreSQL
/// then gets each value once instead of for every row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Shared {
    /// In no group: the column differs from job to job.
    No,
    Org,
    Type,
    /// What the jobs of one producer have in common.
    Spec,
    Key,
    RunTimeout,
    Payload,
    SmallPayload,
    /// The batch's time.
    Clock,
    /// The number of the job's last event.
    Step,
    /// The times of a job's wait in the queue.
    Wait,
    /// Columns that are empty in most jobs.
    Rare,
    Lease,
}

/// A Rust type as which a column is read.
trait Field<'r>: Sized {
    const KIND: Kind;

    fn read(columns: &mut impl Columns<'r>) -> Result<Self, StoreError>;
}

macro_rules! fields {
    (<$r:lifetime> $($read:ident: $type:ty = $kind:ident;)*) => {
        $(impl<$r> Field<$r> for $type {
            const KIND: Kind = Kind::$kind;

            fn read(columns: &mut impl Columns<$r>) -> Result<Self, StoreError> {
                columns.$read()
            }
        })*
    };
}

fields! {
    <'r>
    uuid: Uuid = Uuid;
    text: &'r str = Text;
    optional_text: Option<&'r str> = Text;
    status: JobStatus = Text;
    int: i32 = Int;
    long: i64 = Long;
    optional_long: Option<i64> = Long;
    duration: Duration = Long;
    optional_duration: Option<Duration> = Long;
    double: f64 = Double;
    flag: bool = Flag;
    digest: Option<Digest> = Bytes;
    time: Time = Time;
    optional_time: Option<Time> = Time;
}

/// Defines [`JobRow`], with a field for each column as it is read, and the list of columns in the same order.
macro_rules! job_columns {
    (<$r:lifetime> $($name:literal $field:ident: $type:ty, $changes:ident, $shared:ident, $value:expr;)*) => {
        /// A row of `job`.
        struct JobRow<$r> {
            $($field: $type,)*
        }

        impl<$r> JobRow<$r> {
            const COLUMNS: &'static [JobColumn] = &[$(JobColumn {
                name: $name,
                kind: <$type as Field<$r>>::KIND,
                changes: $changes,
                shared: Shared::$shared,
                value: $value,
            }),*];

            fn read(columns: &mut impl Columns<$r>) -> Result<Self, StoreError> {
                Ok(Self { $($field: Field::read(columns)?,)* })
            }
        }
    };
}

/// The columns of `job`, in the order in which they are written and read.
pub(super) const JOB_COLUMNS: &[JobColumn] = JobRow::COLUMNS;

const FIXED: Varies = Varies::Never;
const EDITS: Varies = Varies::ByEdit;
const CHANGES: Varies = Varies::InLife;

job_columns! {
    <'r>
    "org_id" org_id: Uuid, FIXED, Org, |job| job.org_id.0.into();
    "id" id: Uuid, FIXED, No, |job| job.id.0.into();
    "type" job_type: &'r str, FIXED, Type, |job| (&*job.spec.job_type).into();
    "max_attempts" max_attempts: i32, EDITS, Spec, |job| job.spec.max_attempts.into();
    "max_lost_attempts" max_lost_attempts: i32, FIXED, Spec, |job| job.spec.max_lost_attempts.into();
    "priority" priority: i32, EDITS, Spec, |job| job.spec.priority.into();
    "idempotency_key" key: Option<&'r str>, EDITS, Key, |job| {
        job.spec.idempotency.as_ref().map(|idempotency| &*idempotency.key).into()
    };
    "request_digest" request_digest: Option<Digest>, EDITS, Key, |job| {
        job.spec.idempotency.as_ref().and_then(|idempotency| idempotency.digest.as_ref()).map(|digest| &digest.0[..]).into()
    };
    "requested_by" requested_by: Option<&'r str>, EDITS, Spec, |job| non_empty(&job.spec.requested_by).into();
    "labels" labels: Option<&'r str>, EDITS, Spec, |job| labels_json(&job.spec.labels).into();
    "retry_initial" retry_initial: Duration, FIXED, Spec, |job| job.spec.retry_policy.initial_backoff.into();
    "retry_multiplier" retry_multiplier: f64, FIXED, Spec, |job| job.spec.retry_policy.multiplier.into();
    "retry_max" retry_max: Duration, FIXED, Spec, |job| job.spec.retry_policy.max_backoff.into();
    "run_timeout" run_timeout: Option<Duration>, EDITS, RunTimeout, |job| job.spec.run_timeout.into();
    "payload_bytes" payload_bytes: i32, EDITS, Payload, |job| job.spec.payload_bytes.into();
    "payload_recorded_at" payload_recorded_at: Option<Time>, EDITS, SmallPayload, |job| job.payload_recorded_at.into();
    "erased_at" erased_at: Option<Time>, EDITS, Rare, |job| job.erased_at.into();
    "created_at" created_at: Time, FIXED, Clock, |job| job.created_at.into();
    "created_seq" created_seq: i64, FIXED, No, |job| job.created_seq.into();
    "status" status: JobStatus, CHANGES, No, |job| job.status.as_str().into();
    "attempt" attempt: i32, CHANGES, Rare, |job| job.attempt.into();
    "failures" failures: i32, CHANGES, Rare, |job| job.failures.into();
    "lost_attempts" lost_attempts: i32, CHANGES, Rare, |job| job.lost_attempts.into();
    "updated_at" updated_at: Time, CHANGES, Clock, |job| job.updated_at.into();
    "started_at" started_at: Option<Time>, CHANGES, No, |job| job.started_at.into();
    "attempt_started_at" attempt_started_at: Option<Time>, CHANGES, No, |job| job.attempt_started_at.into();
    "finished_at" finished_at: Option<Time>, CHANGES, No, |job| job.finished_at.into();
    "scheduled_at" scheduled_at: Option<Time>, CHANGES, Wait, |job| job.scheduled_at.into();
    "ready_at" ready_at: Time, CHANGES, Wait, |job| job.ready_at.into();
    "cancel_requested" cancel_requested: bool, CHANGES, Rare, |job| job.cancel_requested.into();
    "outcome_digest" outcome_digest: Option<Digest>, CHANGES, No, |job| {
        job.outcome.as_ref().map(|outcome| &outcome.digest.0[..]).into()
    };
    "outcome_nonce" outcome_nonce: Option<i64>, CHANGES, No, |job| job.outcome.and_then(|outcome| outcome.nonce).into();
    "lease_worker" lease_worker: Option<&'r str>, CHANGES, Lease, |job| job.lease.as_ref().map(|lease| &*lease.worker).into();
    "lease_granted" lease_granted: Option<Duration>, CHANGES, Lease, |job| job.lease.as_ref().map(|lease| lease.granted).into();
    "lease_expires_at" lease_expires_at: Option<Time>, CHANGES, Lease, |job| {
        job.lease.as_ref().map(|lease| lease.expires_at).into()
    };
    "lease_request" lease_request: Option<&'r str>, CHANGES, Lease, |job| {
        job.lease.as_ref().and_then(|lease| lease.request.as_deref()).into()
    };
    "lease_confirmed" lease_confirmed: bool, CHANGES, Lease, |job| {
        job.lease.as_ref().is_some_and(|lease| lease.is_confirmed).into()
    };
    "lease_nonce" lease_nonce: i64, CHANGES, No, |job| job.lease_nonce.into();
    "retry_request" retry_request: Option<&'r str>, CHANGES, Rare, |job| job.retry_request.as_deref().into();
    "due_at" due_at: Option<Time>, CHANGES, Wait, |job| job.due_at.into();
    "last_error_code" last_error_code: Option<&'r str>, CHANGES, Rare, |job| {
        job.last_error.as_ref().map(|error| &*error.code).into()
    };
    "last_error_message" last_error_message: Option<&'r str>, CHANGES, Rare, |job| {
        job.last_error.as_ref().map(|error| &*error.message).into()
    };
    "result_seq" result_seq: Option<i64>, CHANGES, Rare, |job| job.result_at.map(|at| at.seq).into();
    "result_recorded_at" result_recorded_at: Option<Time>, CHANGES, Rare, |job| job.result_at.map(|at| at.recorded_at).into();
    "last_job_seq" last_job_seq: i64, CHANGES, Step, |job| job.last_job_seq.into();
    "last_seq" last_seq: i64, CHANGES, No, |job| job.last_seq.into();
    "last_recorded_at" last_recorded_at: Time, CHANGES, Clock, |job| job.last_recorded_at.into();
}

/// Reads [`JOB_COLUMNS`], then `stage` and `progress`.
pub(super) fn read_job<'r>(columns: &mut impl Columns<'r>) -> Result<Job, StoreError> {
    let row = JobRow::read(columns)?;
    let spec = Arc::new(JobSpec {
        job_type: row.job_type.into(),
        priority: row.priority,
        max_attempts: row.max_attempts,
        max_lost_attempts: row.max_lost_attempts,
        retry_policy: RetryPolicy {
            initial_backoff: row.retry_initial,
            multiplier: row.retry_multiplier,
            max_backoff: row.retry_max,
        },
        idempotency: row.key.map(|key| Idempotency { key: key.into(), digest: row.request_digest }),
        requested_by: row.requested_by.unwrap_or_default().into(),
        labels: labels_of(row.labels)?,
        run_timeout: row.run_timeout,
        payload_bytes: u32::try_from(row.payload_bytes).map_err(|_| damaged("size"))?,
    });
    let last_error = row
        .last_error_code
        .map(|code| JobError { code: code.into(), message: row.last_error_message.unwrap_or_default().into() });
    let result_at = row.result_seq.zip(row.result_recorded_at);
    Ok(Job {
        id: JobId(row.id),
        org_id: OrgId(row.org_id),
        spec,
        status: row.status,
        attempt: row.attempt,
        failures: row.failures,
        lost_attempts: row.lost_attempts,
        stage: columns.optional_text()?.map(Arc::from),
        progress: columns.optional_int()?.map(u8::try_from).transpose().map_err(|_| damaged("progress"))?,
        result_at: result_at.map(|(seq, recorded_at)| Position { seq, recorded_at }),
        last_error,
        cancel_requested: row.cancel_requested,
        outcome: row.outcome_digest.map(|digest| Ended { digest, nonce: row.outcome_nonce }),
        lease: row.lease()?,
        lease_nonce: row.lease_nonce,
        retry_request: row.retry_request.map(Arc::from),
        created_at: row.created_at,
        updated_at: row.updated_at,
        started_at: row.started_at,
        attempt_started_at: row.attempt_started_at,
        finished_at: row.finished_at,
        scheduled_at: row.scheduled_at,
        ready_at: row.ready_at,
        due_at: row.due_at,
        payload_recorded_at: row.payload_recorded_at,
        erased_at: row.erased_at,
        created_seq: row.created_seq,
        last_job_seq: row.last_job_seq,
        last_seq: row.last_seq,
        last_recorded_at: row.last_recorded_at,
    })
}

impl JobRow<'_> {
    fn lease(&self) -> Result<Option<Lease>, StoreError> {
        let Some(worker) = self.lease_worker else { return Ok(None) };
        Ok(Some(Lease {
            worker: worker.into(),
            granted: self.lease_granted.ok_or_else(|| damaged("lease"))?,
            expires_at: self.lease_expires_at.ok_or_else(|| damaged("lease"))?,
            request: self.lease_request.map(Arc::from),
            is_confirmed: self.lease_confirmed,
        }))
    }
}
