//! The queries of a verification, and the statements that pause retention and resume it.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use async_trait::async_trait;

use super::{PostgresStore, columns::Columns, connections::arguments, read, statistics::flow};
use crate::{
    domain::{
        event::JobEvent,
        flow::Flow,
        id::{JobId, OrgId},
        org_event::OrgEvent,
    },
    store::{
        Audit, LONGEST_PAUSE, Scheduled, Series, Stock, StoreError, Stretch,
        rows::{self, Columns as _, EVENT_COLUMNS},
    },
};

static SERIES: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* series */ SELECT head_seq, recorded_at, width::bigint, start, type, removed, {}, waits, runs
        FROM jobledger.read_series($1, $2)",
        Flow::NAMES.map(|name| format!("flow_{name}")).join(", ")
    )
});

static HISTORIES: LazyLock<String> = LazyLock::new(|| {
    let columns = EVENT_COLUMNS.join(", ");
    format!("/* histories */ SELECT {columns}, result FROM jobledger.read_histories($1, $2, $3, $4, $5)")
});

#[async_trait]
impl Audit for PostgresStore {
    async fn pause_retention(&self, time: Duration) -> Result<(), StoreError> {
        let sql = "/* pause_retention */ UPDATE jobledger.ledger
            SET retention_paused_until = CASE
                WHEN retention_paused_until > clock_timestamp() + $2 * interval '1 second'
                THEN clock_timestamp() + $1 * interval '1 second'
                ELSE greatest(retention_paused_until, clock_timestamp() + $1 * interval '1 second') END";
        self.readers.fetch(sql, arguments![time.as_secs_f64(), LONGEST_PAUSE.as_secs_f64()]).await?;
        Ok(())
    }

    async fn confirm_clock(&self) -> Result<(), StoreError> {
        let sql = "/* confirm_clock */ UPDATE jobledger.ledger SET retention_paused_until = '-infinity'";
        self.readers.fetch(sql, arguments![]).await?;
        Ok(())
    }

    async fn stock(&self, org: OrgId) -> Result<Option<(i64, Stock)>, StoreError> {
        let sql = "/* stock */ SELECT seq, jobs, bytes FROM jobledger.read_stock($1)";
        let found = self.readers.fetch(sql, arguments![org.0]).await?;
        let stock = |row| {
            let mut columns = Columns::of(row);
            Ok((columns.long()?, Stock { jobs: columns.long()?, bytes: columns.long()? }))
        };
        found.first().map(stock).transpose()
    }

    async fn removals(&self, org: OrgId) -> Result<i64, StoreError> {
        let found = self.readers.fetch("/* removals */ SELECT jobledger.count_removals($1)", arguments![org.0]).await?;
        let removals = found.first().map(|row| Columns::of(row).optional_long()).transpose()?;
        Ok(removals.flatten().unwrap_or_default())
    }

    async fn broken_records(&self, org: OrgId) -> Result<i64, StoreError> {
        let sql = "/* broken_records */ SELECT jobledger.count_broken_records($1)";
        let found = self.readers.fetch(sql, arguments![org.0]).await?;
        found.first().map_or(Ok(0), |row| Columns::of(row).long())
    }

    async fn early_rows(&self, org: OrgId) -> Result<i64, StoreError> {
        let found =
            self.readers.fetch("/* early_rows */ SELECT jobledger.count_early_rows($1)", arguments![org.0]).await?;
        found.first().map_or(Ok(0), |row| Columns::of(row).long())
    }

    async fn series(&self, org: OrgId, types: &[String]) -> Result<Series, StoreError> {
        let mut series = Series::default();
        for row in &self.readers.fetch(SERIES.as_str(), arguments![org.0, types]).await? {
            let mut columns = Columns::of(row);
            series.as_of_seq = columns.long()?;
            series.recorded_at = columns.optional_time()?;
            let Some(seconds) = columns.optional_long()? else { break };
            let place = (seconds, columns.time()?, columns.text()?);
            let is_removed = columns.flag()?;
            series.take(place, is_removed, flow(&mut columns)?)?;
        }
        Ok(series)
    }

    async fn miscounted(&self, org: OrgId) -> Result<Vec<(String, Scheduled)>, StoreError> {
        let sql = "/* miscounted */ SELECT type, stored, counted FROM jobledger.miscounted($1)";
        let mut types = Vec::new();
        for row in &self.readers.fetch(sql, arguments![org.0]).await? {
            let mut columns = Columns::of(row);
            let name = columns.text()?.to_owned();
            types.push((name, Scheduled { stored: columns.long()?, counted: columns.long()? }));
        }
        Ok(types)
    }

    async fn count_events(&self, org: OrgId, after: i64, last: i64) -> Result<Stretch, StoreError> {
        let sql = "/* count_events */ SELECT events, places, bytes, org_events, org_bytes FROM jobledger.count_events($1, $2, $3)";
        let found = self.readers.fetch(sql, arguments![org.0, after, last]).await?;
        let mut columns = Columns::of(found.first().ok_or_else(|| rows::damaged("log"))?);
        let (events, places, bytes) = (columns.long()?, columns.long()?, columns.long()?);
        Ok(Stretch { events, places, bytes, org_events: columns.long()?, org_bytes: columns.long()? })
    }

    async fn count_remaining(&self, org: OrgId) -> Result<i64, StoreError> {
        let sql = "/* count_remaining */ SELECT jobledger.count_remaining($1)";
        let found = self.readers.fetch(sql, arguments![org.0]).await?;
        found.first().map_or(Ok(0), |row| Columns::of(row).long())
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
        let ids: Vec<_> = jobs.iter().map(|job| job.0).collect();
        let found = self.readers.fetch(HISTORIES.as_str(), arguments![org.0, ids, after, last, limit as i64]).await?;
        found.iter().map(|row| rows::event(&mut Columns::of(row))).collect()
    }
}
