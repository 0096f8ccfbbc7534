//! The reads of `verify`.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use async_trait::async_trait;
use sqlx::AssertSqlSafe;

use super::{
    SqliteStore,
    columns::{Columns, IS_BEHIND, micros},
    error::store_error,
    load::ids_json,
    read,
    series::histogram,
    write::MAX_SMALL_RESULT,
};
use crate::{
    domain::{
        event::JobEvent,
        flow::{FLOW_COUNTS, Flow},
        id::{JobId, OrgId},
        org_event::OrgEvent,
    },
    store::{
        Audit, LONGEST_PAUSE, Scheduled, Series, Stock, StoreError, Stretch,
        rows::{self, Columns as _, EVENT_COLUMNS},
    },
};

pub(super) static SERIES: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* series */ SELECT h.seq, h.recorded_at, s.width, s.start, s.type, s.removed, {}, s.waits, s.runs
        FROM org_head h LEFT JOIN org_series s ON s.org_id = h.org_id AND s.type IN (SELECT value FROM json_each($2))
        WHERE h.org_id = $1",
        Flow::NAMES.map(|name| format!("s.{name}")).join(", ")
    )
});

/// Events job by job, in the order of the argument; of the first job only those after `$3`. Results are read as null.
pub(super) static HISTORIES: LazyLock<String> = LazyLock::new(|| {
    let column = |name: &str| match name {
        "detail_json" => "CASE WHEN json_type(e.detail_json, '$.result') IS NULL THEN e.detail_json
            ELSE json_set(e.detail_json, '$.result', NULL) END"
            .to_owned(),
        name => format!("e.{name}"),
    };
    format!(
        "/* histories */ SELECT {}, iif(x.seq IS NULL, NULL, 'null') FROM json_each($2) wanted
        CROSS JOIN job_event e INDEXED BY idx_job_event_job ON e.org_id = $1 AND e.job_id = unhex(wanted.value)
            AND e.seq > CASE wanted.key WHEN 0 THEN $3 ELSE 0 END AND e.seq <= $4
        LEFT JOIN job_result x ON e.bytes > {MAX_SMALL_RESULT} AND x.org_id = e.org_id AND x.job_id = e.job_id AND x.seq = e.seq
        LIMIT +$5",
        EVENT_COLUMNS.map(column).join(", ")
    )
});

pub(super) const COUNT_REMAINING: &str = "/* count_remaining */ SELECT count(*) FROM job_remains r
    CROSS JOIN job_event e INDEXED BY idx_job_event_job ON e.org_id = r.org_id AND e.job_id = r.job_id AND e.seq <= r.last_seq
    WHERE r.org_id = $1";

pub(super) const BROKEN_RECORDS: &str = "/* broken_records */ SELECT count(*) FROM org_head h CROSS JOIN (
        SELECT n, id, prev, lag(n) OVER chain AS before_n, lag(id) OVER chain AS before_id, lead(n) OVER chain AS after_n
        FROM org_record WHERE org_id = $1 WINDOW chain AS (ORDER BY n)
    ) kept
    WHERE h.org_id = $1 AND ((before_n, before_id) <> (kept.n - 1, prev) OR after_n IS NULL AND (kept.n, id) <> (h.n, h.record))";

pub(super) const EARLY_ROWS: &str = "/* early_rows */ SELECT (
        SELECT count(*) FROM org_head h
        CROSS JOIN job j INDEXED BY idx_job_status ON j.org_id = h.org_id AND j.status IN ('queued', 'running')
        WHERE h.org_id = $1 AND EXISTS (SELECT 1 FROM job_event e INDEXED BY idx_job_event_job
            WHERE e.org_id = j.org_id AND e.job_id = j.id AND e.seq > j.last_seq AND e.seq <= h.base_seq)
    ) + (
        SELECT count(*) FROM org_head h CROSS JOIN (
            SELECT unhex(said.key) AS job_id, max(found_record.n) AS n, found_record.seq, CAST(said.value AS INTEGER) AS expires_at
            FROM (
                SELECT n, seq, extensions FROM org_record INDEXED BY idx_org_record_extensions
                WHERE org_id = $1 AND octet_length(extensions) > 0 ORDER BY seq DESC, n DESC LIMIT 1000
            ) AS found_record CROSS JOIN json_each(found_record.extensions) said GROUP BY said.key
        ) found
        CROSS JOIN job j ON j.org_id = h.org_id AND j.id = found.job_id
        WHERE h.org_id = $1 AND found.n <= h.base_n AND j.status = 'running' AND j.last_seq <= found.seq
            AND found.expires_at IS NOT j.lease_expires_at
            AND NOT EXISTS (SELECT 1 FROM job_event e INDEXED BY idx_job_event_job
                WHERE e.org_id = j.org_id AND e.job_id = j.id AND e.seq > j.last_seq)
    )";

pub(super) static MISCOUNTED: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* miscounted */ SELECT type, sum(stored), sum(counted) FROM (
            SELECT type, scheduled AS stored, 0 AS counted FROM org_counter WHERE org_id = $1
            UNION ALL
            SELECT type, 0, 1 FROM job j INDEXED BY idx_job_due
            WHERE org_id = $1 AND due_at IS NOT NULL AND status = 'queued' AND NOT {IS_BEHIND}
        ) GROUP BY type HAVING sum(stored) <> sum(counted)"
    )
});

#[async_trait]
impl Audit for SqliteStore {
    async fn pause_retention(&self, time: Duration) -> Result<(), StoreError> {
        let now = self.clock.now();
        let sql = "/* pause_retention */ UPDATE ledger SET retention_paused_until = CASE
            WHEN retention_paused_until > $2 THEN $1 ELSE max(retention_paused_until, $1) END";
        self.write(sqlx::query(sql).bind(micros(now + time)).bind(micros(now + LONGEST_PAUSE))).await
    }

    async fn confirm_clock(&self) -> Result<(), StoreError> {
        self.write(sqlx::query("/* confirm_clock */ UPDATE ledger SET retention_paused_until = 0")).await
    }

    async fn broken_records(&self, org: OrgId) -> Result<i64, StoreError> {
        let query = sqlx::query_scalar(BROKEN_RECORDS).bind(org.0);
        query.fetch_one(&self.readers).await.map_err(store_error)
    }

    async fn early_rows(&self, org: OrgId) -> Result<i64, StoreError> {
        sqlx::query_scalar(EARLY_ROWS).bind(org.0).fetch_one(&self.readers).await.map_err(store_error)
    }

    async fn stock(&self, org: OrgId) -> Result<Option<(i64, Stock)>, StoreError> {
        let query = sqlx::query_as("/* stock */ SELECT seq, jobs, bytes FROM org_head WHERE org_id = $1").bind(org.0);
        let found = query.fetch_optional(&self.readers).await.map_err(store_error)?;
        Ok(found.map(|(seq, jobs, bytes)| (seq, Stock { jobs, bytes })))
    }

    async fn removals(&self, org: OrgId) -> Result<i64, StoreError> {
        let query = sqlx::query_scalar("/* removals */ SELECT removals FROM org_head WHERE org_id = $1").bind(org.0);
        Ok(query.fetch_optional(&self.readers).await.map_err(store_error)?.unwrap_or_default())
    }

    async fn series(&self, org: OrgId, types: &[String]) -> Result<Series, StoreError> {
        let query = sqlx::query(AssertSqlSafe(SERIES.as_str())).bind(org.0).bind(rows::json_text(&types));
        let found = query.fetch_all(&self.readers).await.map_err(store_error)?;
        let mut series = Series::default();
        for row in &found {
            let mut columns = Columns::of(row);
            series.as_of_seq = columns.long()?;
            series.recorded_at = columns.optional_time()?;
            let Some(seconds) = columns.optional_long()? else { break };
            let place = (seconds, columns.time()?, columns.text()?);
            let is_removed = columns.flag()?;
            let mut counts = [0; FLOW_COUNTS];
            for count in &mut counts {
                *count = columns.long()?;
            }
            let mut flow = Flow::of_counts(counts);
            flow.waits = histogram(columns.text()?)?;
            flow.runs = histogram(columns.text()?)?;
            series.take(place, is_removed, flow)?;
        }
        Ok(series)
    }

    async fn miscounted(&self, org: OrgId) -> Result<Vec<(String, Scheduled)>, StoreError> {
        let found = sqlx::query_as(AssertSqlSafe(MISCOUNTED.as_str()))
            .bind(org.0)
            .fetch_all(&self.readers)
            .await
            .map_err(store_error)?;
        Ok(found.into_iter().map(|(name, stored, counted)| (name, Scheduled { stored, counted })).collect())
    }

    async fn count_events(&self, org: OrgId, after: i64, last: i64) -> Result<Stretch, StoreError> {
        let sql = "/* count_events */ SELECT * FROM (
                SELECT count(*), count(DISTINCT seq), ifnull(sum(bytes), 0) FROM job_event
                WHERE org_id = $1 AND seq > $2 AND seq <= $3)
            CROSS JOIN (
                SELECT count(*), ifnull(sum(bytes), 0) FROM org_event WHERE org_id = $1 AND seq > $2 AND seq <= $3)";
        let query = sqlx::query_as(sql).bind(org.0).bind(after).bind(last);
        let (events, places, bytes, org_events, org_bytes) =
            query.fetch_one(&self.readers).await.map_err(store_error)?;
        Ok(Stretch { events, places, bytes, org_events, org_bytes })
    }

    async fn count_remaining(&self, org: OrgId) -> Result<i64, StoreError> {
        let query = sqlx::query_scalar(COUNT_REMAINING).bind(org.0);
        query.fetch_one(&self.readers).await.map_err(store_error)
    }

    async fn org_events(&self, org: OrgId, after: i64, last: i64) -> Result<Vec<Arc<OrgEvent>>, StoreError> {
        read::org_events(&self.readers, org, after, last).await
    }

    async fn histories(
        &self,
        org: OrgId,
        jobs: &[JobId],
        after: i64,
        last: i64,
        limit: usize,
    ) -> Result<Vec<JobEvent>, StoreError> {
        let query = sqlx::query(AssertSqlSafe(HISTORIES.as_str())).bind(org.0).bind(ids_json(jobs));
        let query = query.bind(after).bind(last).bind(limit as i64);
        let found = query.fetch_all(&self.readers).await.map_err(store_error)?;
        found.iter().map(|row| rows::event(&mut Columns::of(row))).collect()
    }
}
