//! How PostgreSQL plans statistics and the fold.

use std::time::Duration;

use jobledger_server::{domain::status::JobStatus, store::StatisticsQuery};
use sqlx::{AssertSqlSafe, Executor as _, PgConnection, Row as _};
use tokio::time::timeout;

use crate::stores::plans::{org, settled};
use crate::support::harness::Database;

/// Statistics of an org with thousands of types come at once, beside an org with few types and many jobs: before
/// PostgreSQL has statistics of the tables, and once it takes each org for the mean of both.
#[tokio::test]
async fn statistics_of_thousands_of_types_come_at_once() {
    let database = Database::postgres().await;
    let store = database.open().await;
    let mut filling = database.connect_as("postgres").await;
    for table in ["job", "org_counter", "org_series", "org_record"] {
        let sql = format!("ALTER TABLE jobledger.{table} SET (autovacuum_enabled = off)");
        filling.execute(AssertSqlSafe(sql)).await.unwrap();
    }
    for (n, types, jobs) in [(1, 8_000, 8_000), (2, 5, 40_000)] {
        let org = format!("'{}'", org(n).0);
        for sql in [
            format!("INSERT INTO jobledger.org_head (org_id, seq, base_seq, recorded_at, types) VALUES ({org}, {jobs}, {jobs}, now(), {types})"),
            format!(
                "INSERT INTO jobledger.job (org_id, id, type, retry_initial, retry_multiplier, retry_max, created_seq, ready_at,
                    last_job_seq, last_seq, last_recorded_at)
                 SELECT {org}, gen_random_uuid(), 't' || n % {types}, 1, 2, 3, n, now(), 1, n, now() FROM generate_series(1, {jobs}) n"
            ),
            format!("INSERT INTO jobledger.org_counter SELECT {org}, type, count(*), 0, 0, 0, 0, 0, 0 FROM jobledger.job WHERE org_id = {org} GROUP BY type"),
            format!(
                "INSERT INTO jobledger.org_series SELECT {org}, w, date_bin(w * interval '1 second', now(), 'epoch') - m * w * interval '1 second',
                    't' || n, false, 1, 0, 0, 0, 0, 0, 0, '{{1}}', '{{1}}'
                 FROM generate_series(0, {types} - 1) n, generate_series(0, 2) m, (VALUES (60), (3600)) widths (w)"
            ),
            format!(
                "INSERT INTO jobledger.org_record SELECT {org}, n, n, n - 1, {jobs}, 1, now(), now(), 1, jsonb_build_object('t' || n % {types}, '[1]'::jsonb), {jobs}, n, NULL, NULL, {jobs}, 0
                 FROM generate_series(1, 500) n"
            ),
        ] {
            filling.execute(AssertSqlSafe(sql)).await.unwrap();
        }
    }
    for is_analyzed in [false, true] {
        if is_analyzed {
            filling.execute("ANALYZE").await.unwrap();
        }
        for (n, types, jobs) in [(1, 8_000, 8_000), (2, 5, 40_000)] {
            let summary = timeout(Duration::from_secs(5), store.statistics(org(n), &StatisticsQuery::of(&[]))).await;
            let summary = summary.expect("in no time").unwrap();
            assert_eq!(summary.types.len(), types);
            assert_eq!(
                summary.types.iter().map(|of_type| of_type.counts.get(JobStatus::Queued)).sum::<i64>(),
                jobs + 500
            );
            assert!(summary.types.iter().all(|of_type| of_type.oldest_ready_at.is_some()));
        }
    }
    store.close().await;
    database.is_made_up();
}

/// Folded records are kept for a while. A count that goes on after the last folded record must not walk them.
#[tokio::test]
async fn records_that_are_folded_are_not_walked() {
    const OF_EACH: i64 = 900;
    let database = Database::postgres().await;
    let mut filling = database.connect_as("postgres").await;
    for sql in [
        "ALTER TABLE jobledger.org_record SET (autovacuum_enabled = off)".to_owned(),
        format!(
            "INSERT INTO jobledger.org_head (org_id, n, record, seq, base_seq, recorded_at, types)
             SELECT lpad(to_hex(o), 32, '0')::uuid, {OF_EACH}, {OF_EACH}, 1, 1, now(), 1 FROM generate_series(1, 100) o"
        ),
        "INSERT INTO jobledger.org_counter SELECT org_id, 't', 1, 0, 0, 0, 0, 0, 0 FROM jobledger.org_head".to_owned(),
        // In the order in which they are written: the orgs' records lie beside each other.
        format!(
            "INSERT INTO jobledger.org_record
             SELECT lpad(to_hex(o), 32, '0')::uuid, n, n, n - 1, 1, 1, now(), now(), 1, '{{\"t\": [1]}}', 1, n, NULL, NULL, 1, 0
             FROM generate_series(1, {OF_EACH}) n, generate_series(1, 100) o ORDER BY n, o"
        ),
        "ANALYZE".to_owned(),
    ] {
        filling.execute(AssertSqlSafe(sql)).await.unwrap();
    }
    let store = database.open().await;
    for n in 1..=5 {
        assert_eq!(store.statistics(org(n), &StatisticsQuery::of(&[])).await.unwrap().types.len(), 1);
        store.audit().series(org(n), &["t".to_owned()]).await.unwrap();
    }
    store.close().await;
    const READ: &str = "SELECT 0::bigint, coalesce(sum(idx_tup_read), 0)::bigint FROM pg_stat_user_indexes
        WHERE schemaname = 'jobledger' AND relname = 'org_record'";
    let count = async |connection: &mut PgConnection| {
        let row = connection.fetch_one(READ).await.unwrap();
        (row.get::<i64, _>(0), row.get::<i64, _>(1))
    };
    let (_, read) = settled(&mut filling, &count, 0).await;
    assert!(read < OF_EACH / 10, "{read} records were read for five orgs that have nothing to count");
    database.is_made_up();
}
