//! Lists of jobs. Each shape of filter has its own statement, over the indexes that end in `created_seq`.

use std::iter;

use sqlx::{AssertSqlSafe, SqliteConnection, SqlitePool};

use super::{
    columns::{Columns, EXTENSION, IS_BEHIND, LAST_EVENT, job_over, micros},
    error::store_error,
};
use crate::{
    domain::{id::OrgId, status::JobStatus},
    store::{
        JobPage, LIST_SCAN, ListOrder, ListQuery, StoreError,
        image::read_job_over,
        rows::{self, Columns as _},
    },
};

/// The most pairs of type and status that get a subselect each. SQLite allows 500 terms in a compound SELECT, and a
/// filter with more pairs matches most of the jobs anyway.
const MOST_WAYS: usize = 60;
/// The number of arguments that all these statements have in common.
const FIXED: usize = 14;

/// A SELECT of the jobs that may match, in the query's order: one subselect for each index range. Also returns the
/// arguments of the subselects, which follow the fixed ones.
fn candidates(query: &ListQuery) -> (String, Vec<String>) {
    let filter = &query.filter;
    let mut values = Vec::new();
    let mut bind = |value: &str| {
        values.push(value.to_owned());
        format!("?{}", FIXED + values.len())
    };
    let mut ways = Vec::new();
    if let Some(key) = &filter.idempotency_key {
        ways.push(format!("id FROM job WHERE org_id = ?1 AND idempotency_key = {}", bind(key)));
    } else if let Some((key, value)) = filter.labels.first_key_value() {
        let (key, value) = (bind(key), bind(value));
        ways.push(format!("job_id AS id FROM job_label WHERE org_id = ?1 AND key = {key} AND value = {value}"));
    } else {
        let is_by_type = !filter.types.is_empty() && !has_too_many_ways(query);
        for status in filter.possible_statuses() {
            // As a literal: where a parameter may imply the condition of a partial index, SQLite compiles the statement again
            // for each value.
            let name = format!("'{}'", status.as_str());
            // The index over types has finished jobs only.
            if is_by_type && status.is_terminal() {
                for job_type in &filter.types {
                    let job_type = bind(job_type);
                    let way = "id FROM job INDEXED BY idx_job_type WHERE org_id = ?1 AND finished_at IS NOT NULL";
                    ways.push(format!("{way} AND type = {job_type} AND status = {name}"));
                }
            } else {
                ways.push(format!("id FROM job INDEXED BY idx_job_status WHERE org_id = ?1 AND status = {name}"));
            }
            // Such a row says queued if it doesn't say running.
            if status == JobStatus::Running && filter.possible_statuses().all(|status| status != JobStatus::Queued) {
                ways.push(BEHIND.to_owned());
            }
        }
    }
    let (beyond, sort) = direction(query.order);
    let ways = ways.into_iter().map(|way| {
        format!(
            " SELECT * FROM (SELECT created_seq, {way} AND created_seq {beyond} ?2 ORDER BY created_seq {sort} LIMIT +?3)"
        )
    });
    let ways: Vec<_> = iter::once(" SELECT 0 AS created_seq, NULL AS id WHERE false".to_owned()).chain(ways).collect();
    (ways.join(" UNION ALL"), values)
}

/// How the `created_seq` of a page's jobs compares with the query's `after`, and how the page is sorted.
fn direction(order: ListOrder) -> (&'static str, &'static str) {
    match order {
        ListOrder::NewestFirst => ("<", "DESC"),
        ListOrder::OldestFirst => (">", "ASC"),
    }
}

/// Subselect of the running jobs whose rows are behind and have none of the wanted statuses. It returns each job once.
const BEHIND: &str = "id FROM (SELECT DISTINCT b.created_seq, b.id FROM org_head h
    CROSS JOIN job_event i ON i.org_id = h.org_id AND i.seq > h.base_seq AND i.image IS NOT NULL
    CROSS JOIN job b ON b.org_id = i.org_id AND b.id = i.job_id AND b.last_seq < i.seq
        AND b.status NOT IN (SELECT value FROM json_each(?6))
    WHERE h.org_id = ?1) WHERE true";

fn has_too_many_ways(query: &ListQuery) -> bool {
    query.filter.types.len() * query.filter.possible_statuses().count() > MOST_WAYS
}

/// On pages of more jobs than this, one pass finds all lease extensions, instead of one search for each job.
const LONG: usize = 32;

pub(super) async fn list(pool: &SqlitePool, org: OrgId, query: &ListQuery) -> Result<JobPage, StoreError> {
    list_in(&mut *pool.acquire().await.map_err(store_error)?, org, query).await
}

/// The same within a transaction.
pub(super) async fn list_in(
    connection: &mut SqliteConnection,
    org: OrgId,
    query: &ListQuery,
) -> Result<JobPage, StoreError> {
    let filter = &query.filter;
    // Without the index over types, the statement also reads jobs of other types.
    let scan = if has_too_many_ways(query) && !query.is_step { query.scan().max(LIST_SCAN) } else { query.scan() };
    let (candidates, values) = candidates(query);
    let (_, sort) = direction(query.order);
    let last = match query.order {
        ListOrder::NewestFirst => "min",
        ListOrder::OldestFirst => "max",
    };
    let sql = format!(
        "/* list */ WITH candidate AS MATERIALIZED (SELECT * FROM ({candidates}) ORDER BY created_seq {sort} LIMIT +?3),
        page AS MATERIALIZED (
            SELECT j.id, j.created_seq FROM candidate c CROSS JOIN job j ON j.org_id = ?1 AND j.id = c.id
            WHERE (?5 IS NULL OR j.type IN (SELECT value FROM json_each(?5)))
                AND iif({IS_BEHIND}, 'running', j.status) IN (SELECT value FROM json_each(?6))
                AND NOT EXISTS (SELECT 1 FROM json_each(?7) wanted
                    WHERE NOT EXISTS (SELECT 1 FROM json_each(j.labels) l WHERE l.key = wanted.key AND l.value = wanted.value))
                AND (?8 IS NULL OR j.requested_by = ?8)
                AND (?9 IS NULL OR j.created_at >= ?9) AND (?10 IS NULL OR j.created_at < ?10)
                AND (?11 IS NULL OR j.last_error_code = ?11)
                AND (?12 IS NULL OR j.finished_at >= ?12) AND (?13 IS NULL OR j.finished_at < ?13)
                AND (?14 IS NULL OR j.lease_worker = ?14 OR {IS_BEHIND})
            ORDER BY c.created_seq {sort} LIMIT +?4
        ),
        extended AS MATERIALIZED (
            SELECT unhex(said.key) AS job_id, max(r.n) AS n, r.seq, said.value || '\"' AS said
            FROM org_head h CROSS JOIN org_record r ON r.org_id = h.org_id AND r.n > h.base_n AND r.extensions IS NOT NULL
            CROSS JOIN json_each(r.extensions) said
            WHERE h.org_id = ?1 AND (SELECT count(*) FROM page) > {LONG} GROUP BY said.key
        )
        SELECT coalesce((SELECT seq FROM org_head WHERE org_id = ?1), 0),
            (SELECT count(*) FROM candidate), (SELECT {last}(created_seq) FROM candidate), page.id IS NOT NULL,
            {}
        FROM (SELECT 1) one LEFT JOIN page ON true LEFT JOIN job j ON j.org_id = ?1 AND j.id = page.id
        {LAST_EVENT} LEFT JOIN extended ON extended.job_id = j.id
        ORDER BY page.created_seq {sort}",
        job_over(&format!(
            "iif((SELECT count(*) FROM page) > {LONG}, iif(e.next_status = 'running' AND extended.seq >= e.seq, extended.said, NULL),
                {})",
            *EXTENSION
        ))
    );
    let mut statement = sqlx::query(AssertSqlSafe(sql))
        .bind(org.0)
        .bind(query.after)
        .bind(scan as i64)
        .bind(query.rows() as i64)
        .bind((!filter.types.is_empty()).then(|| rows::json_text(&filter.types)))
        .bind(rows::json_text(&query.status_names()))
        .bind(rows::json_text(&filter.labels))
        .bind(filter.requested_by.as_deref())
        .bind(filter.created_after.map(micros))
        .bind(filter.created_before.map(micros))
        .bind(filter.error_code.as_deref())
        .bind(filter.finished_after.map(micros))
        .bind(filter.finished_before.map(micros))
        .bind(filter.worker.as_deref());
    for value in values {
        statement = statement.bind(value);
    }
    let found = statement.persistent(query.is_step).fetch_all(connection).await.map_err(store_error)?;
    let (mut jobs, mut place) = (Vec::with_capacity(found.len()), (0, 0, None));
    for row in &found {
        let mut columns = Columns::of(row);
        place = (columns.long()?, columns.long()?, columns.optional_long()?);
        if columns.flag()? {
            jobs.push(read_job_over(&mut columns)?);
        }
    }
    let (as_of_seq, examined, reached) = place;
    let is_through = (examined.unsigned_abs() as usize) < scan;
    Ok(query.page(jobs, as_of_seq, reached.filter(|_| !is_through)))
}
