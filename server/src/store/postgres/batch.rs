//! A transaction of the writer: three round trips for a plain create, four where something has to be looked up first,
//! however many commands there are.
//!
//! 1. BEGIN, with `jobledger.begin_batch`: names the org, locks its head, then reads where the log ends and the clock;
//! 2. [`load`](PostgresBatch::load), unless everything is known: jobs, by ids and keys, and types;
//! 3. [`write`](PostgresBatch::write): everything in one statement;
//! 4. COMMIT.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, LazyLock},
    time::Duration,
};

use async_trait::async_trait;
use sqlx::{AssertSqlSafe, postgres::PgArguments};

use super::{
    columns::{Columns, job_columns},
    connections::{Connection, Connections, arguments},
    error::{commit, commit_error, is_lost, store_error},
    import,
    memory::{End, Memory},
    write,
};
use crate::{
    domain::{
        clock::Time,
        flow::Milestone,
        id::{JobId, OrgId},
        job::Job,
        lease::LONGEST_LEASE,
        transition::LONGEST_GRACE,
    },
    store::{
        Batch, Changes, Expired, Head, Loaded, Needs, Ready, RecordId, StoreError,
        recent::{Left, Place, Recent},
        rows::{self, Columns as _, JOB_COLUMNS},
        series::told_by_series,
    },
};

/// An open write transaction on one org's log.
pub(super) struct PostgresBatch {
    connection: Connection,
    org: OrgId,
    /// Where the log was found to end.
    found: End,
    now: Time,
    memory: Arc<Memory>,
    /// Where the log ends once this batch is committed, and how its jobs are then, if it has written.
    end: Option<(End, Left)>,
    /// Types that are known to exist once this batch is committed.
    new_types: Vec<Arc<str>>,
    /// Where the first jobs of some types that may be claimed were found to stand.
    fronts: HashMap<Arc<str>, Place>,
}

/// Begins a transaction and locks the org's head.
pub(super) async fn begin(
    writers: &Arc<Connections>,
    org: OrgId,
    memory: Arc<Memory>,
) -> Result<PostgresBatch, StoreError> {
    let mut connection = writers.take().await?;
    // A UUID has nothing that would need quoting. Several statements in one message need no prepared ones. Whatever the
    // database's default is: the statements in the function must each see what was committed before them.
    let sql = format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED; /* begin_batch */ SELECT * FROM jobledger.begin_batch('{}')",
        org.0
    );
    let found = loop {
        match sqlx::raw_sql(AssertSqlSafe(sql.as_str())).fetch_all(&mut *connection).await {
            Ok(found) => break found,
            // Nothing has happened yet.
            Err(error) if connection.is_reused() && is_lost(&error) => connection.replace().await?,
            Err(error) => return Err(store_error(error)),
        }
    };
    let row = found.first().ok_or_else(|| rows::damaged("head"))?;
    let mut columns = Columns::of(row);
    let head = Head {
        seq: columns.long()?,
        floor: columns.long()?,
        recorded_at: columns.optional_time()?,
        types: columns.long()?,
        ready_gen: columns.long()?,
    };
    let record = RecordId { n: columns.long()?, id: columns.long()? };
    let found = End { head, record, folded_seq: columns.long()?, folded_n: columns.long()? };
    let now = columns.time()?;
    memory.found(org, found, now);
    Ok(PostgresBatch { connection, org, found, now, end: None, memory, new_types: Vec::new(), fronts: HashMap::new() })
}

#[async_trait]
impl Batch for PostgresBatch {
    fn now(&self) -> Time {
        self.now
    }

    async fn load(&mut self, _org: OrgId, needs: &Needs) -> Result<Loaded, StoreError> {
        let (expired, next_expiry) = match &needs.expired {
            Some(wanted) => self.load_expired(wanted).await?,
            None => (Vec::new(), None),
        };
        let (due, next_due) = match needs.due {
            Some(limit) => self.load_due(limit).await?,
            None => (Vec::new(), None),
        };
        let misdated = match needs.misdated {
            Some((limit, by)) => self.load_misdated(limit, by).await?,
            None => Vec::new(),
        };
        let (mut types, unknown) = self.memory.part(self.org, &needs.types);
        let mut jobs = Vec::new();
        let known = self.memory.jobs(self.org, &self.found, &needs.jobs);
        let is_known: HashSet<_> = known.iter().map(|job| job.id).collect();
        let ids = needs.jobs.iter().chain(&expired).chain(&due).chain(&misdated).filter(|id| !is_known.contains(id));
        let ids: Vec<_> = ids.map(|id| id.0).collect();
        let has_names = !(needs.keys.is_empty() && needs.requests.is_empty() && unknown.is_empty());
        if !ids.is_empty() || has_names {
            let found = self.load_jobs(ids, needs, &unknown).await?;
            self.memory.add_types(self.org, found.types.iter().map(|name| Arc::from(name.as_str())));
            types.extend(found.types);
            jobs = found.jobs;
            // Those that were found by another name, too, are there once.
            jobs.retain(|job| !is_known.contains(&job.id));
        }
        jobs.extend(known);
        if !needs.ready.is_empty() {
            let mut known: HashSet<_> = jobs.iter().map(|job| job.id).collect();
            let ready = self.load_ready(&needs.ready).await?;
            jobs.extend(ready.into_iter().filter(|job| known.insert(job.id)));
        }
        // Of those that are not there, this batch creates some.
        self.new_types = unknown.into_iter().filter(|name| types.iter().all(|found| **found != **name)).collect();
        let told = told_by_series(&self.found.head, &jobs, &expired, needs.expired.as_ref());
        let histories = self.load_histories(&jobs, &told).await?;
        let marks = import::load_marks(&mut self.connection, self.org, &jobs, &needs.imports).await?;
        Ok(Loaded {
            head: self.found.head,
            jobs,
            types,
            expired,
            histories,
            next_expiry,
            due,
            next_due,
            misdated,
            marks,
        })
    }

    async fn write(&mut self, _org: OrgId, changes: &Changes) -> Result<Option<RecordId>, StoreError> {
        self.new_types.retain(|name| changes.tallies.contains_key(name));
        if changes.is_empty() {
            return Ok(None);
        }
        let log = write::Log::new(self.org, self.found, changes, self.now);
        let end = log.end(changes);
        let mut left = Recent::leaving(self.org, self.found.record, end.record, changes);
        left.fronts = std::mem::take(&mut self.fronts);
        self.end = Some((end, left));
        for (sql, arguments) in write::statements(&log, changes)? {
            sqlx::query_with(AssertSqlSafe(sql), arguments)
                .execute(&mut *self.connection)
                .await
                .map_err(|error| self.memory.failed(error, store_error))?;
        }
        Ok(log.record())
    }

    async fn has(&mut self, _org: OrgId, record: RecordId) -> Result<bool, StoreError> {
        if record.n > self.found.record.n {
            return Ok(false);
        }
        let sql = "/* has */ SELECT id FROM jobledger.org_record WHERE org_id = $1 AND n = $2";
        let query = sqlx::query_with(sql, arguments![self.org.0, record.n]);
        let found = query.fetch_optional(&mut *self.connection).await.map_err(store_error)?;
        match found {
            Some(row) => Ok(Columns::of(&row).long()? == record.id),
            None => Err(StoreError::OutcomeUnknown("its record is kept no longer".to_owned())),
        }
    }

    async fn commit(self: Box<Self>) -> Result<(), StoreError> {
        let Self { mut connection, org, found, mut end, memory, new_types, .. } = *self;
        // A batch that writes nothing still answers from the log as it was found, whose last commit a synchronous standby may lack
        // (see `Writer::resolve`). So it commits, too, unless the log up to there is known to be confirmed. The head row of an org
        // without a log shall not stay.
        let is_confirmed = end.is_none() && (found.head.seq == 0 || memory.is_confirmed(org, found.record));
        // No time-out of the database's for the commit: this side gives up by itself, and looks.
        let sql =
            if is_confirmed { "/* commit */ ROLLBACK" } else { "/* commit */ SET LOCAL statement_timeout = 0; COMMIT" };
        if let Some((_, jobs)) = &mut end {
            memory.committing(org, jobs);
        }
        connection.commits();
        commit(sqlx::raw_sql(sql).execute(&mut *connection)).await.map_err(commit_error)?;
        connection.give_back();
        if let Some((end, jobs)) = end {
            memory.left(org, end, jobs, None);
            memory.add_types(org, new_types.into_iter());
        } else {
            memory.confirmed(org, found.record);
        }
        Ok(())
    }
}

/// The first row has the types; each other row is a job.
///
/// OFFSET 0 has PostgreSQL look each row up by its whole key. Left free, it plans while the tables are empty to walk an org's
/// rows for the wanted ones, and keeps to that until they have been analysed.
static LOAD_JOBS: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* load_jobs */ WITH wanted (id) AS MATERIALIZED (
            SELECT unnest($2::uuid[])
            UNION SELECT j.id FROM unnest($3::text[]) AS wanted (key) CROSS JOIN LATERAL (
                SELECT j.id FROM jobledger.job j WHERE j.org_id = $1 AND j.idempotency_key = wanted.key OFFSET 0) j
            UNION SELECT j.id FROM unnest($5::text[]) AS wanted (request) CROSS JOIN LATERAL (
                SELECT j.id FROM jobledger.job j WHERE j.org_id = $1 AND j.lease_request = wanted.request OFFSET 0) j
        )
        SELECT (SELECT array_agg(c.type::text) FROM jobledger.org_counter c WHERE c.org_id = $1 AND c.type = ANY ($4::text[])),
            {}, NULL, NULL
        UNION ALL
        SELECT NULL, {}, e.detail_json ->> 'stage', (e.detail_json ->> 'progress')::integer
        FROM wanted
        CROSS JOIN LATERAL (SELECT * FROM jobledger.job j WHERE j.org_id = $1 AND j.id = wanted.id OFFSET 0) j
        LEFT JOIN LATERAL (
            SELECT e.detail_json FROM jobledger.job_event e
            WHERE e.org_id = $1 AND e.seq = j.last_seq AND e.recorded_at = j.last_recorded_at OFFSET 0) e ON true",
        JOB_COLUMNS.map(|_| "NULL").join(", "),
        job_columns("j")
    )
});

/// What [`LOAD_JOBS`] finds.
#[derive(Default)]
struct Found {
    jobs: Vec<Job>,
    types: Vec<String>,
}

impl PostgresBatch {
    async fn load_jobs(
        &mut self,
        ids: Vec<uuid::Uuid>,
        needs: &Needs,
        types: &[Arc<str>],
    ) -> Result<Found, StoreError> {
        let texts = |texts: &[Arc<str>]| texts.iter().map(|text| text.to_string()).collect::<Vec<_>>();
        let (keys, types, requests) = (texts(&needs.keys), texts(types), texts(&needs.requests));
        let arguments = arguments![self.org.0, ids, keys, types, requests];
        let query = sqlx::query_with(AssertSqlSafe(LOAD_JOBS.as_str()), arguments);
        let rows = query.fetch_all(&mut *self.connection).await.map_err(store_error)?;
        let mut found = Found::default();
        for row in &rows {
            let mut columns = Columns::of(row);
            let types: Option<Vec<String>> = columns.get()?;
            if columns.peek_is_null()? {
                found.types = types.unwrap_or_default();
            } else {
                found.jobs.push(rows::job(&mut columns)?);
            }
        }
        Ok(found)
    }

    async fn load_expired(&mut self, wanted: &Expired) -> Result<(Vec<JobId>, Option<Time>), StoreError> {
        const SQL: &str = "/* load_expired */ SELECT old.id,
                (SELECT min(j.finished_at) FROM jobledger.job j
                 WHERE j.org_id = $1 AND j.status = $2 AND j.finished_at IS NOT NULL AND j.finished_at >= $3)
            FROM (VALUES (1)) one LEFT JOIN (
                SELECT j.id FROM jobledger.job j
                WHERE j.org_id = $1 AND j.status = $2 AND j.finished_at IS NOT NULL AND j.finished_at < $3
                ORDER BY j.finished_at LIMIT $4
            ) old ON true";
        let (mut expired, mut next) = (Vec::new(), None);
        for (status, before) in wanted.retention.cutoffs(self.now) {
            let limit = (wanted.limit - expired.len()) as i64;
            let query = sqlx::query_with(SQL, arguments![self.org.0, status.as_str(), before, limit]);
            for row in query.fetch_all(&mut *self.connection).await.map_err(store_error)? {
                let mut columns = Columns::of(&row);
                expired.extend(columns.get::<Option<uuid::Uuid>>()?.map(JobId));
                if let Some(finished_at) = columns.optional_time()? {
                    let expiry = finished_at + (self.now - before);
                    next = Some(next.map_or(expiry, |next: Time| next.min(expiry)));
                }
            }
        }
        Ok((expired, next))
    }

    /// What happened to some of the jobs.
    async fn load_histories(
        &mut self,
        jobs: &[Job],
        told: &[JobId],
    ) -> Result<HashMap<JobId, Vec<Milestone>>, StoreError> {
        const SQL: &str =
            "/* load_histories */ SELECT e.job_id, e.kind, e.ts, e.recorded_at, e.detail_json ->> 'scheduled_at',
                COALESCE(e.detail_json ? 'past', false)
            FROM unnest($2::uuid[]) WITH ORDINALITY AS wanted (id, n) CROSS JOIN LATERAL (
                SELECT * FROM jobledger.job_event e WHERE e.org_id = $1 AND e.job_id = wanted.id
                    AND e.recorded_at >= $3 AND e.recorded_at <= $4 AND e.kind NOT IN ('progress', 'cancel_requested')
                ORDER BY e.seq OFFSET 0
            ) e";
        let mut histories: HashMap<_, Vec<_>> = HashMap::new();
        let (Some(since), Some(until)) = (
            jobs.iter().map(|job| job.created_at).min().filter(|_| !told.is_empty()),
            jobs.iter().map(|job| job.last_recorded_at).max(),
        ) else {
            return Ok(histories);
        };
        let ids: Vec<_> = told.iter().map(|id| id.0).collect();
        let query = sqlx::query_with(SQL, arguments![self.org.0, ids, since, until]);
        for row in query.fetch_all(&mut *self.connection).await.map_err(store_error)? {
            let (job, milestone) = rows::milestone(&mut Columns::of(&row))?;
            histories.entry(job).or_default().push(milestone);
        }
        Ok(histories)
    }

    async fn load_due(&mut self, limit: usize) -> Result<(Vec<JobId>, Option<Time>), StoreError> {
        const SQL: &str = "/* load_due */ SELECT due.id,
                (SELECT min(j.due_at) FROM jobledger.job j WHERE j.org_id = $1 AND j.due_at IS NOT NULL AND j.due_at > $2)
            FROM (VALUES (1)) one LEFT JOIN (
                SELECT j.id FROM jobledger.job j WHERE j.org_id = $1 AND j.due_at IS NOT NULL AND j.due_at <= $2
                ORDER BY j.due_at LIMIT $3
            ) due ON true";
        let query = sqlx::query_with(SQL, arguments![self.org.0, self.now, limit as i64]);
        let (mut due, mut next) = (Vec::new(), None);
        for row in query.fetch_all(&mut *self.connection).await.map_err(store_error)? {
            let mut columns = Columns::of(&row);
            due.extend(columns.get::<Option<uuid::Uuid>>()?.map(JobId));
            next = columns.optional_time()?;
        }
        Ok((due, next))
    }

    async fn load_misdated(&mut self, limit: usize, by: Duration) -> Result<Vec<JobId>, StoreError> {
        const SQL: &str =
            "/* load_misdated */ SELECT j.id FROM jobledger.job j WHERE j.org_id = $1 AND j.due_at IS NOT NULL AND (
                j.status = 'running' AND j.lease_expires_at > $2 + j.lease_granted * interval '1 microsecond'
                    AND (j.updated_at > $2 OR j.lease_expires_at > $2 + $3 * interval '1 second')
                OR j.status = 'running' AND j.due_at > $5 * interval '1 second' + greatest($2, least(j.lease_expires_at,
                    least(j.attempt_started_at, $2) + j.run_timeout * interval '1 microsecond'))
                OR j.status = 'queued' AND j.attempt > 0 AND j.updated_at > $2
                    AND j.due_at > $2 + (j.scheduled_at - j.updated_at)
            ) LIMIT $4";
        let by = by.min(LONGEST_LEASE).as_secs_f64();
        let arguments = arguments![self.org.0, self.now, by, limit as i64, LONGEST_GRACE.as_secs_f64()];
        let found = sqlx::query_with(SQL, arguments).fetch_all(&mut *self.connection).await.map_err(store_error)?;
        found.iter().map(|row| Ok(JobId(Columns::of(row).uuid()?))).collect()
    }

    async fn load_ready(&mut self, wanted: &Ready) -> Result<Vec<Job>, StoreError> {
        let mut jobs = Vec::new();
        if !wanted.of.is_empty() {
            let names: Vec<_> = wanted.of.keys().map(|name| name.to_string()).collect();
            let limits: Vec<_> = wanted.of.values().map(|limit| *limit as i64).collect();
            let front = |name| self.memory.front(self.org, &self.found, name);
            let fronts: Vec<_> = wanted.of.keys().map(front).collect();
            let priorities: Vec<_> =
                fronts.iter().map(|front| front.map_or(i32::MAX, |front| front.priority.0)).collect();
            let ready: Vec<_> = fronts.iter().map(|front| front.map(|front| front.ready_at)).collect();
            let seqs: Vec<_> = fronts.iter().map(|front| front.map(|front| front.created_seq)).collect();
            let arguments = arguments![self.org.0, names, limits, priorities, ready, seqs];
            jobs.extend(self.fetch_jobs(&LOAD_READY, arguments).await?);
            for job in &jobs {
                let (place, name) = (Place::of(job), &job.spec.job_type);
                let front = self.fronts.entry(Arc::clone(name)).or_insert(place);
                *front = place.min(*front);
            }
        }
        if wanted.all > 0 {
            jobs.extend(self.fetch_jobs(&LOAD_ALL_READY, arguments![self.org.0, wanted.all as i64]).await?);
        }
        Ok(jobs)
    }

    async fn fetch_jobs(&mut self, sql: &'static str, arguments: PgArguments) -> Result<Vec<Job>, StoreError> {
        let query = sqlx::query_with(AssertSqlSafe(sql), arguments);
        let found = query.fetch_all(&mut *self.connection).await.map_err(store_error)?;
        found.iter().map(|row| rows::job(&mut Columns::of(row))).collect()
    }
}

/// Of each type wanted, the first in the order of the index.
fn load_ready(wanted: &str, tail: &str) -> String {
    format!(
        "{wanted}
        SELECT {}, NULL::text, NULL::integer FROM wanted CROSS JOIN LATERAL (
            SELECT j.* FROM jobledger.job j
            WHERE j.org_id = $1 AND j.type = wanted.type AND j.status = 'queued' AND j.due_at IS NULL
            ORDER BY j.priority DESC, j.ready_at, j.created_seq LIMIT wanted.most
        ) j {tail}",
        job_columns("j")
    )
}

/// The same from a place on. Of jobs that are claimed the index keeps what stood there for as long as anybody has an older
/// snapshot: beginning at its front, each claim would wade through all of them. Where no place is known the priority is above all.
static LOAD_READY: LazyLock<String> = LazyLock::new(|| {
    let first = |condition: &str, order: &str| {
        format!(
            "(SELECT j.* FROM jobledger.job j
              WHERE j.org_id = $1 AND j.type = wanted.type AND j.status = 'queued' AND j.due_at IS NULL AND {condition}
              ORDER BY {order}j.ready_at, j.created_seq LIMIT wanted.most)"
        )
    };
    format!(
        "/* load_ready */ WITH wanted (type, most, priority, ready_at, created_seq) AS (
            SELECT * FROM unnest($2::text[], $3::bigint[], $4::integer[], $5::timestamptz[], $6::bigint[])
        )
        SELECT {}, NULL::text, NULL::integer FROM wanted CROSS JOIN LATERAL ({} UNION ALL {} LIMIT wanted.most) j",
        job_columns("j"),
        first(
            "j.priority = wanted.priority AND (j.ready_at, j.created_seq) >= (wanted.ready_at, wanted.created_seq)",
            ""
        ),
        first("j.priority < wanted.priority", "j.priority DESC, ")
    )
});

/// The types of which a job may be claimed, one after the other, from one place in the index to the next. The first so many
/// of all jobs are of the types whose own first is among the first so many.
static LOAD_ALL_READY: LazyLock<String> = LazyLock::new(|| {
    load_ready(
        "/* load_all_ready */ WITH RECURSIVE found (type) AS (
            (SELECT j.type::text FROM jobledger.job j WHERE j.org_id = $1 AND j.status = 'queued' AND j.due_at IS NULL
             ORDER BY j.type LIMIT 1)
            UNION ALL
            SELECT (SELECT j.type::text FROM jobledger.job j
                    WHERE j.org_id = $1 AND j.status = 'queued' AND j.due_at IS NULL AND j.type > found.type
                    ORDER BY j.type LIMIT 1)
            FROM found WHERE found.type IS NOT NULL
        ), wanted (type, most) AS (
            SELECT found.type, $2::bigint FROM found CROSS JOIN LATERAL (
                SELECT j.priority, j.ready_at, j.created_seq FROM jobledger.job j
                WHERE j.org_id = $1 AND j.type = found.type AND j.status = 'queued' AND j.due_at IS NULL
                ORDER BY j.priority DESC, j.ready_at, j.created_seq LIMIT 1
            ) first
            ORDER BY first.priority DESC, first.ready_at, first.created_seq LIMIT $2::bigint
        )",
        "ORDER BY j.priority DESC, j.ready_at, j.created_seq LIMIT $2::bigint",
    )
});
