//! Org events and the settings of types: what a batch loads and writes of them.

use std::{collections::HashMap, sync::Arc};

use sqlx::PgConnection;

use super::{
    columns::Columns,
    connections::arguments,
    error::store_error,
    statement::{Statement, unnest},
    write::Write,
};
use crate::{
    domain::{id::OrgId, job_type::OrgSettings},
    store::{
        Changes, Head, Outdated, StoreError,
        changes::OUTDATED_AT_ONCE,
        org_events::{PauseText, kind_and_text},
        rows::{Columns as _, non_empty},
        settings,
    },
};

/// Loads the settings of some orgs, as of their last org events.
pub(super) async fn load_settings(
    connection: &mut PgConnection,
    orgs: &[(OrgId, i64)],
) -> Result<HashMap<OrgId, Arc<OrgSettings>>, StoreError> {
    const SQL: &str = "/* load_settings */ SELECT t.org_id, t.type, t.description, t.pause, t.changed_seq
        FROM unnest($1::uuid[]) AS wanted (org_id)
        CROSS JOIN LATERAL (SELECT * FROM jobledger.org_type t WHERE t.org_id = wanted.org_id OFFSET 0) t";
    let settings = |as_of| OrgSettings { as_of, ..OrgSettings::default() };
    let mut found: HashMap<_, _> = orgs.iter().map(|(org, as_of)| (*org, settings(*as_of))).collect();
    let ids: Vec<_> = orgs.iter().map(|(org, _)| org.0).collect();
    let query = sqlx::query_with(SQL, arguments![ids]);
    for row in &query.fetch_all(connection).await.map_err(store_error)? {
        let mut columns = Columns::of(row);
        if let Some(of_org) = found.get_mut(&OrgId(columns.uuid()?)) {
            settings::read(&mut columns, of_org)?;
        }
    }
    Ok(found.into_iter().map(|(org, settings)| (org, Arc::new(settings))).collect())
}

/// Loads the types of an org with rows that say that they are ready: one search of the index for each.
pub(super) async fn load_ready_types(connection: &mut PgConnection, org: OrgId) -> Result<Vec<Arc<str>>, StoreError> {
    const SQL: &str = "/* load_ready_types */ WITH RECURSIVE found (type) AS (
            SELECT (SELECT j.type FROM jobledger.job j WHERE j.org_id = $1 AND jobledger.is_ready(j.status, j.due_at)
                ORDER BY j.type LIMIT 1)
            UNION ALL
            SELECT (SELECT j.type FROM jobledger.job j
                WHERE j.org_id = $1 AND j.type > found.type AND jobledger.is_ready(j.status, j.due_at) ORDER BY j.type LIMIT 1)
            FROM found WHERE found.type IS NOT NULL
        ) SELECT type::text FROM found WHERE type IS NOT NULL";
    let found = sqlx::query_with(SQL, arguments![org.0]).fetch_all(connection).await.map_err(store_error)?;
    found.iter().map(|row| Ok(Columns::of(row).text()?.into())).collect()
}

/// Loads the org events before the floor of the log, the oldest ones: `seq` of the last, and bytes of all.
pub(super) async fn load_outdated(
    connection: &mut PgConnection,
    org: OrgId,
    head: &Head,
) -> Result<Option<Outdated>, StoreError> {
    const SQL: &str = "/* load_outdated */ SELECT max(found.seq), coalesce(sum(found.bytes), 0)::bigint FROM (
        SELECT e.seq, e.bytes FROM jobledger.org_event e WHERE e.org_id = $1 AND e.seq < $2 ORDER BY e.seq LIMIT $3) found";
    if head.org_seq == 0 {
        return Ok(None);
    }
    let query = sqlx::query_with(SQL, arguments![org.0, head.floor, OUTDATED_AT_ONCE]);
    let row = query.fetch_one(connection).await.map_err(store_error)?;
    let mut columns = Columns::of(&row);
    let (last, bytes) = (columns.optional_long()?, columns.long()?);
    Ok(last.map(|last| Outdated { last, bytes }))
}

impl Statement {
    /// Inserts new org events.
    pub(super) fn org_events(&mut self, writes: &[Write<'_>]) -> Result<(), StoreError> {
        let events: Vec<_> = writes.iter().flat_map(|(_, changes)| &changes.org_events).collect();
        if events.is_empty() {
            return Ok(());
        }
        let texts: Vec<_> = events.iter().map(|event| kind_and_text(&event.change)).collect();
        let columns = [
            self.column("org_id", &events, |event| event.org_id.0)?,
            self.column("seq", &events, |event| event.seq)?,
            self.column("ts", &events, |event| event.ts)?,
            self.column("recorded_at", &events, |event| event.recorded_at)?,
            self.column("kind", &texts, |(kind, _)| *kind)?,
            self.column("actor", &events, |event| non_empty(&event.actor))?,
            self.column("detail_json", &texts, |(_, detail)| detail.as_str())?,
            self.column("bytes", &events, |event| i32::try_from(event.weight()).unwrap_or(i32::MAX))?,
        ];
        self.insert("org_events", "org_event", &columns);
        Ok(())
    }

    /// Overwrites the settings that have changed, and removes those of types with nothing set.
    pub(super) fn settings(&mut self, writes: &[Write<'_>]) -> Result<(), StoreError> {
        let of_all = writes.iter().flat_map(|(log, changes)| {
            changes.settings.iter().map(move |(name, of_type)| (log.org, name.to_string(), of_type))
        });
        let (reset, set): (Vec<_>, Vec<_>) = of_all.partition(|(.., of_type)| of_type.is_default());
        if !set.is_empty() {
            let pause = |of_type: &crate::domain::job_type::TypeSettings| of_type.pause.as_ref().map(PauseText::text);
            let columns = [
                self.column("org_id", &set, |(org, ..)| org.0)?,
                self.column("type", &set, |(_, name, _)| name.as_str())?,
                self.column("description", &set, |(.., of_type)| of_type.description.to_string())?,
                self.column("pause", &set, |(.., of_type)| pause(of_type))?,
                self.column("changed_seq", &set, |(.., of_type)| of_type.changed_seq)?,
            ];
            let rows = unnest(&columns);
            self.part(
                "settings",
                format_args!(
                    "(INSERT INTO jobledger.org_type (org_id, type, description, pause, changed_seq) SELECT * FROM {rows}
                     ON CONFLICT (org_id, type) DO UPDATE SET description = excluded.description, pause = excluded.pause,
                        changed_seq = excluded.changed_seq)"
                ),
            );
        }
        if !reset.is_empty() {
            let org = self.bind(reset.iter().map(|(org, ..)| org.0).collect::<Vec<_>>())?;
            let name = self.bind(reset.iter().map(|(_, name, _)| name.as_str()).collect::<Vec<_>>())?;
            self.part(
                "reset_types",
                format_args!(
                    "(DELETE FROM jobledger.org_type t USING unnest({org}::uuid[], {name}::text[]) AS u (org_id, type)
                     WHERE t.org_id = u.org_id AND t.type = u.type)"
                ),
            );
        }
        Ok(())
    }

    /// Removes old org events.
    pub(super) fn removed_org_events(&mut self, org: &str, changes: &Changes) -> Result<(), StoreError> {
        if let Some(outdated) = changes.removed_org_events {
            let last = self.bind(outdated.last)?;
            let sql = format_args!("(DELETE FROM jobledger.org_event WHERE org_id = {org} AND seq <= {last})");
            self.part("removed_org_events", sql);
        }
        Ok(())
    }
}
