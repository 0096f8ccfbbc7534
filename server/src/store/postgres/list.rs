//! Lists of jobs: one call of `jobledger.list_jobs`, which finds jobs by their key, by a label, or by status and type.

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

use sqlx::{
    AssertSqlSafe, PgConnection,
    postgres::{PgArguments, PgRow},
};

use super::{
    columns::{Columns, job_over},
    connections::{Connections, arguments},
    error::store_error,
};
use crate::{
    domain::id::OrgId,
    store::{
        JobPage, ListOrder, ListQuery, StoreError,
        image::read_job_over,
        rows::{self, Columns as _},
    },
};

static LIST: LazyLock<String> = LazyLock::new(|| {
    format!(
        "/* list */ SELECT head_seq, examined, reached, is_match, {}
        FROM jobledger.list_jobs($1, $2, $3, $4, $5, $6, $7, $8::jsonb, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18) r",
        job_over("(r.found)")
    )
});

pub(super) async fn list(readers: &Arc<Connections>, org: OrgId, query: &ListQuery) -> Result<JobPage, StoreError> {
    page(&readers.fetch(LIST.as_str(), list_arguments(org, query)?).await?, query)
}

/// The same within a transaction. Only this org is named to row-level security afterwards.
pub(super) async fn list_in(
    connection: &mut PgConnection,
    org: OrgId,
    query: &ListQuery,
) -> Result<JobPage, StoreError> {
    let found = sqlx::query_with(AssertSqlSafe(LIST.as_str()), list_arguments(org, query)?);
    page(&found.fetch_all(connection).await.map_err(store_error)?, query)
}

fn list_arguments(org: OrgId, query: &ListQuery) -> Result<PgArguments, StoreError> {
    let filter = &query.filter;
    let (key, value) = filter.labels.first_key_value().unzip();
    let labels = (!BTreeMap::is_empty(&filter.labels)).then(|| rows::json_text(&filter.labels));
    let types = (!filter.types.is_empty()).then_some(&filter.types[..]);
    Ok(arguments![
        org.0,
        query.after,
        query.order == ListOrder::OldestFirst,
        key.map(String::as_str),
        value.map(String::as_str),
        types,
        query.status_names(),
        labels,
        filter.requested_by.as_deref(),
        filter.created_after,
        filter.created_before,
        filter.idempotency_key.as_deref(),
        filter.error_code.as_deref(),
        filter.worker.as_deref(),
        filter.finished_after,
        filter.finished_before,
        query.scan() as i64,
        query.rows() as i64
    ])
}

fn page(found: &[PgRow], query: &ListQuery) -> Result<JobPage, StoreError> {
    let (mut jobs, mut place) = (Vec::with_capacity(found.len()), (0, 0, None));
    for row in found {
        let mut columns = Columns::of(row);
        place = (columns.long()?, columns.long()?, columns.optional_long()?);
        if columns.flag()? {
            jobs.push(read_job_over(&mut columns)?);
        }
    }
    let (as_of_seq, examined, reached) = place;
    let is_through = (examined.unsigned_abs() as usize) < query.scan();
    Ok(query.page(jobs, as_of_seq, reached.filter(|_| !is_through)))
}
