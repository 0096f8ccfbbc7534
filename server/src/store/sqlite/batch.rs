//! A transaction of the writer: loads and writes with a few statements, however many commands there are.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use async_trait::async_trait;
use sqlx::SqliteConnection;
use tokio::sync::OwnedMutexGuard;

use super::{
    columns::micros,
    error::store_error,
    import::load_marks,
    load::{
        ids_json, load_due, load_expired, load_head, load_held, load_histories, load_jobs, load_misdated,
        load_populations, load_ready, load_rows,
    },
    series, write,
};
use crate::{
    domain::{
        clock::Time,
        id::{JobId, OrgId},
        job::Job,
    },
    store::{
        Batch, Changes, Head, Loaded, Needs, NextDue, RecordId, StoreError,
        recent::{Left, Recent},
        record::{RECORD_FORMAT, RECORDS_DROPPED, RECORDS_KEPT},
        series::told_by_series,
    },
};

/// An open write transaction.
pub(super) struct SqliteBatch {
    slot: OwnedMutexGuard<Option<SqliteConnection>>,
    connection: SqliteConnection,
    now: Time,
    recent: Arc<Recent>,
    orgs: Vec<OrgId>,
    /// The heads as they were found, each with the log's last record.
    heads: HashMap<OrgId, (Head, RecordId)>,
    /// What is to be remembered once this batch is committed.
    left: Vec<Left>,
}

impl SqliteBatch {
    /// The connection has just begun a transaction; it returns to its slot only by a commit.
    pub(super) fn new(
        slot: OwnedMutexGuard<Option<SqliteConnection>>,
        connection: SqliteConnection,
        now: Time,
        recent: Arc<Recent>,
        orgs: &[OrgId],
    ) -> Self {
        Self { slot, connection, now, recent, orgs: orgs.to_vec(), heads: HashMap::new(), left: Vec::new() }
    }

    /// Where an org's log was found to end.
    async fn end(&mut self, org: OrgId) -> Result<(Head, RecordId), StoreError> {
        if let Some(found) = self.heads.get(&org) {
            return Ok(*found);
        }
        let (head, record, _) = load_head(&mut self.connection, org, &Needs::default()).await?;
        self.heads.insert(org, (head, record));
        Ok((head, record))
    }
}

#[async_trait]
impl Batch for SqliteBatch {
    fn now(&self) -> Time {
        self.now
    }

    fn orgs(&self) -> &[OrgId] {
        &self.orgs
    }

    async fn load(&mut self, needs: &[(OrgId, Needs)]) -> Result<Vec<Loaded>, StoreError> {
        let mut loaded = Vec::with_capacity(needs.len());
        for (org, needs) in needs {
            loaded.push(self.load_one(*org, needs).await?);
        }
        Ok(loaded)
    }

    async fn ready_jobs(&mut self, ids: &[(OrgId, JobId)]) -> Result<Vec<Job>, StoreError> {
        let mut of_orgs: BTreeMap<OrgId, Vec<JobId>> = BTreeMap::new();
        for (org, id) in ids {
            of_orgs.entry(*org).or_default().push(*id);
        }
        let mut jobs = Vec::with_capacity(ids.len());
        for (org, ids) in of_orgs {
            jobs.extend(load_rows(&mut self.connection, org, &ids).await?);
        }
        Ok(jobs)
    }

    async fn write(&mut self, changes: &[(OrgId, &Changes)]) -> Result<Vec<Option<RecordId>>, StoreError> {
        let mut records = Vec::with_capacity(changes.len());
        for (org, changes) in changes {
            records.push(self.write_one(*org, changes).await?);
        }
        Ok(records)
    }

    async fn has(&mut self, org: OrgId, record: RecordId) -> Result<bool, StoreError> {
        if record.n > self.end(org).await?.1.n {
            return Ok(false);
        }
        let query = sqlx::query_scalar::<_, i64>("/* has */ SELECT id FROM org_record WHERE org_id = $1 AND n = $2");
        match query.bind(org.0).bind(record.n).fetch_optional(&mut self.connection).await.map_err(store_error)? {
            Some(id) => Ok(id == record.id),
            None => Err(StoreError::OutcomeUnknown("its record is kept no longer".to_owned())),
        }
    }

    async fn commit(self: Box<Self>) -> Result<(), StoreError> {
        let Self { mut slot, mut connection, recent, mut left, .. } = *self;
        left.iter_mut().for_each(|left| recent.committing(left));
        match sqlx::query("COMMIT").execute(&mut connection).await {
            Ok(_) => {
                *slot = Some(connection);
                left.into_iter().for_each(|left| recent.left(left));
                Ok(())
            }
            Err(error) => Err(match store_error(error) {
                // The pages did not fit: SQLite has rolled back, and a frame cut short fails its checksum.
                StoreError::Full(reason) => StoreError::Full(reason),
                // Of other failures it can't be told what they left behind: look before running it again.
                other => StoreError::OutcomeUnknown(other.to_string()),
            }),
        }
    }
}

impl SqliteBatch {
    async fn load_one(&mut self, org: OrgId, needs: &Needs) -> Result<Loaded, StoreError> {
        let connection = &mut self.connection;
        let (head, last, types) = load_head(connection, org, needs).await?;
        self.heads.insert(org, (head, last));
        let (expired, next_expiry) = match &needs.expired {
            Some(wanted) => load_expired(connection, org, wanted, self.now).await?,
            None => (Vec::new(), None),
        };
        let (due, next_due) = match needs.due {
            Some(limit) => load_due(connection, org, limit, self.now).await?,
            None => (Vec::new(), None),
        };
        let misdated = match needs.misdated {
            Some((limit, by)) => load_misdated(connection, org, limit, by, self.now).await?,
            None => Vec::new(),
        };
        // Others leave a record of whatever they write: an import, beside this server.
        let known = self.recent.jobs(org, last, &needs.jobs);
        let is_known: HashSet<_> = known.iter().map(|job| job.id).collect();
        let mut held = Vec::new();
        for wanted in &needs.held {
            held.extend(load_held(connection, org, wanted).await?);
        }
        let ids = needs.jobs.iter().chain(&expired).chain(&due).chain(&misdated).chain(&held);
        let ids: Vec<_> = ids.filter(|id| !is_known.contains(id)).copied().collect();
        let mut jobs = if ids.is_empty() && needs.keys.is_empty() {
            Vec::new()
        } else {
            load_jobs(connection, org, &ids, &needs.keys).await?
        };
        jobs.retain(|job| !is_known.contains(&job.id));
        jobs.extend(known);
        let ready = load_ready(connection, org, &needs.ready).await?;
        let histories = {
            let told = told_by_series(&head, &jobs, &expired, needs.expired.as_ref());
            load_histories(connection, org, &told).await?
        };
        let populations = match &needs.expired {
            Some(_) => load_populations(connection, org, &jobs).await?,
            None => HashMap::new(),
        };
        let marks = load_marks(connection, org, &jobs, &needs.imports).await?;
        Ok(Loaded {
            head,
            jobs,
            ready,
            types,
            expired,
            histories,
            populations,
            next_expiry,
            due,
            next_due,
            misdated,
            marks,
        })
    }

    async fn write_one(&mut self, org: OrgId, changes: &Changes) -> Result<Option<RecordId>, StoreError> {
        let (before, last) = self.end(org).await?;
        let record = changes.is_recorded().then(|| last.follow());
        self.left.push(Recent::leaving(org, last, record.unwrap_or(last), changes));
        let connection = &mut self.connection;
        if let Some(record) = record {
            // First, since a key that goes with its job may be used again by a new one.
            if !changes.removed.is_empty() {
                remove(connection, org, &changes.removed).await?;
            }
            write::created(connection, org, changes).await?;
            write::changed(connection, &changes.changed).await?;
            write::events(connection, &changes.events).await?;
            series::write(connection, org, changes, self.now).await?;
            series::forget_types(connection, org, &changes.forgotten).await?;
            let head = changes.head.unwrap_or(before);
            save_head(connection, org, head, record, !changes.removed.is_empty()).await?;
            save_record(connection, org, head, record, last, self.now).await?;
        }
        let is_first = changes.events.first().is_some_and(|event| event.seq == 1);
        if let Some(due) = changes.next_retention.or(is_first.then_some(self.now)) {
            save_retention(connection, org, due).await?;
        }
        if let Some(due) = changes.next_due {
            save_due(connection, org, due).await?;
        }
        Ok(record)
    }
}

/// Deletes jobs with all that belongs to them.
async fn remove(connection: &mut SqliteConnection, org: OrgId, jobs: &[Job]) -> Result<(), StoreError> {
    let ids = ids_json(jobs.iter().map(|job| &job.id));
    for sql in [
        "/* remove */ DELETE FROM job WHERE org_id = $1 AND id IN (SELECT unhex(value) FROM json_each($2))",
        "/* remove */ DELETE FROM job_payload WHERE org_id = $1 AND job_id IN (SELECT unhex(value) FROM json_each($2))",
        "/* remove */ DELETE FROM job_event INDEXED BY idx_job_event_job
            WHERE org_id = $1 AND job_id IN (SELECT unhex(value) FROM json_each($2))",
    ] {
        sqlx::query(sql).bind(org.0).bind(&ids).execute(&mut *connection).await.map_err(store_error)?;
    }
    for (key, value, job) in jobs.iter().flat_map(write::labels) {
        let sql =
            "/* remove */ DELETE FROM job_label WHERE org_id = $1 AND key = $2 AND value = $3 AND created_seq = $4";
        let query = sqlx::query(sql).bind(org.0).bind(key).bind(value).bind(job.created_seq);
        query.execute(&mut *connection).await.map_err(store_error)?;
    }
    Ok(())
}

async fn save_retention(connection: &mut SqliteConnection, org: OrgId, due: Time) -> Result<(), StoreError> {
    sqlx::query(
        "/* save_retention */ INSERT INTO org_due (org_id, next_due_at) VALUES ($1, $2)
         ON CONFLICT (org_id) DO UPDATE SET next_due_at = excluded.next_due_at",
    )
    .bind(org.0)
    .bind(micros(due))
    .execute(connection)
    .await
    .map_err(store_error)?;
    Ok(())
}

async fn save_due(connection: &mut SqliteConnection, org: OrgId, due: NextDue) -> Result<(), StoreError> {
    let (sql, due) = match due {
        NextDue::At(due) => ("/* save_due */ UPDATE org_due SET work_due_at = $2 WHERE org_id = $1", due),
        NextDue::By(due) => (
            "/* save_due */ UPDATE org_due SET work_due_at = $2
             WHERE org_id = $1 AND (work_due_at IS NULL OR work_due_at > $2)",
            Some(due),
        ),
    };
    sqlx::query(sql).bind(org.0).bind(due.map(micros)).execute(connection).await.map_err(store_error)?;
    Ok(())
}

async fn save_head(
    connection: &mut SqliteConnection,
    org: OrgId,
    head: Head,
    record: RecordId,
    has_removed: bool,
) -> Result<(), StoreError> {
    sqlx::query(
        "/* save_head */ INSERT INTO org_head (org_id, seq, floor_seq, recorded_at, types, ready_gen, n, record)
         VALUES ($1, $2, $3, $4, $5, $6, $8, $9)
         ON CONFLICT (org_id) DO UPDATE SET seq = excluded.seq, floor_seq = excluded.floor_seq,
            recorded_at = excluded.recorded_at, types = excluded.types, ready_gen = excluded.ready_gen,
            removals = removals + $7, n = excluded.n, record = excluded.record",
    )
    .bind(org.0)
    .bind(head.seq)
    .bind(head.floor)
    .bind(head.recorded_at.map(micros))
    .bind(head.types)
    .bind(head.ready_gen)
    .bind(has_removed)
    .bind(record.n)
    .bind(record.id)
    .execute(connection)
    .await
    .map_err(store_error)?;
    Ok(())
}

/// Adds the record of a batch that leaves the log so; now and then those that are too old go.
async fn save_record(
    connection: &mut SqliteConnection,
    org: OrgId,
    head: Head,
    record: RecordId,
    before: RecordId,
    now: Time,
) -> Result<(), StoreError> {
    let recorded_at = head.recorded_at.unwrap_or(now);
    let sql = "/* save_record */ INSERT INTO org_record (org_id, n, id, prev, seq, ready_gen, recorded_at, written_at, format)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)";
    let query = sqlx::query(sql).bind(org.0).bind(record.n).bind(record.id).bind(before.id).bind(head.seq);
    let query = query.bind(head.ready_gen).bind(micros(recorded_at)).bind(micros(now)).bind(RECORD_FORMAT);
    query.execute(&mut *connection).await.map_err(store_error)?;
    if record.n % (RECORDS_DROPPED / 2) == 0 {
        let query = sqlx::query(DROP_RECORDS).bind(org.0).bind(RECORDS_DROPPED).bind(micros(now - RECORDS_KEPT));
        query.execute(connection).await.map_err(store_error)?;
    }
    Ok(())
}

const DROP_RECORDS: &str = "/* drop_records */ DELETE FROM org_record WHERE org_id = $1 AND n <= (
    SELECT max(oldest.n) FROM (SELECT n, written_at FROM org_record WHERE org_id = $1 ORDER BY n LIMIT $2) oldest
    WHERE oldest.written_at < $3)";
