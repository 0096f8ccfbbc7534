//! How PostgreSQL plans the reads, with the server's role, on a database that is not small.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use chrono::TimeDelta;
use jobledger_client::{Claim, HeartbeatRequest, JobView, LeaseHeartbeat, ListJobsRequest, NewJob, Report};
use jobledger_server::{
    domain::{
        clock::{Clock as _, SystemClock},
        id::{JobId, OrgId},
        job_filter::JobFilter,
        status::JobStatus,
    },
    ledger::Retention,
    store::{
        DueWork, EventFilter, EventQuery, Expired, FoundJob, ListOrder, ListQuery, Most, Needs, Ready, SeriesKind,
        StatisticsQuery, Store,
    },
};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _};
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    support::cluster::SERVER,
    support::factory,
    support::harness::{Database, PATIENCE, TestServer, short_or_long},
};

const ORGS: i64 = 50;

pub(crate) fn org(n: i64) -> OrgId {
    OrgId(Uuid::from_u128(n as u128))
}

pub(crate) fn job(n: i64) -> JobId {
    JobId(Uuid::from_u128((0x0198_0000_0000_7000 << 64) + n as u128))
}

/// Writes jobs with three events each, spread over the orgs. Every third job has a label.
async fn fill(database: &Database, jobs: i64) {
    let mut connection = database.connect_as("postgres").await;
    let of_org = "lpad(to_hex(n % 50), 32, '0')::uuid";
    let id = "('01980000-0000-7000-' || lpad(to_hex(n >> 48), 4, '0') || '-' || lpad(to_hex(n), 12, '0'))::uuid";
    // The `seq` of a job's first event. An org's jobs come one after the other.
    let first = "(n / 50) * 3 + 1";
    for sql in [
        // One transaction: the time of its last event in a job's row is the time at which the event was written.
        "BEGIN".to_owned(),
        format!(
            "INSERT INTO jobledger.job (org_id, id, type, status, attempt, retry_initial, retry_multiplier, retry_max, labels,
                created_at, created_seq, finished_at, ready_at, due_at, last_job_seq, last_seq, last_recorded_at, payload_bytes,
                payload_recorded_at)
             SELECT {of_org}, {id}, 't' || n % 7,
                (ARRAY['succeeded', 'succeeded', 'succeeded', 'failed', 'queued', 'running'])[1 + n % 6], 1, 1, 2, 3,
                CASE WHEN n % 3 = 0 THEN jsonb_build_object('k', (n % 100)::text) END,
                now() - interval '1 minute', {first}, CASE WHEN n % 6 < 4 THEN now() END, now(),
                CASE WHEN n % 12 IN (5, 10) THEN now() + interval '1 day' END, 3, {first} + 2, now(),
                CASE WHEN n % 4 < 3 THEN 2 ELSE 0 END, CASE WHEN n % 4 = 1 THEN now() END
             FROM generate_series(0, {jobs} - 1) n"
        ),
        format!(
            "INSERT INTO jobledger.job_event (org_id, seq, job_id, job_seq, recorded_at, kind, prev_status, next_status, attempt,
                job_type, bytes, payload)
             SELECT {of_org}, {first} + e, {id}, e + 1, now(), 'progress', 'running', 'running', 1, 't' || n % 7, 256,
                CASE WHEN e = 0 AND n % 4 = 1 THEN '{{}}' END
             FROM generate_series(0, {jobs} - 1) n, generate_series(0, 2) e"
        ),
        format!(
            "INSERT INTO jobledger.job_label SELECT {of_org}, 'k', (n % 100)::text, {id}, {first}
             FROM generate_series(0, {jobs} - 1) n WHERE n % 3 = 0"
        ),
        format!(
            "INSERT INTO jobledger.job_payload SELECT {of_org}, {id}, '{{}}' FROM generate_series(0, {jobs} - 1) n WHERE n % 2 = 0"
        ),
        format!(
            "INSERT INTO jobledger.job_remains SELECT {of_org}, gen_random_uuid(), 0, now(), now() FROM generate_series(0, {jobs} - 1) n"
        ),
        "INSERT INTO jobledger.org_head (org_id, seq, base_seq, recorded_at, types)
         SELECT org_id, max(seq), max(seq), max(recorded_at), 7 FROM jobledger.job_event GROUP BY org_id ON CONFLICT DO NOTHING"
            .to_owned(),
        "INSERT INTO jobledger.org_month SELECT org_id, date_trunc('month', now(), 'UTC'), 1 FROM jobledger.org_head ON CONFLICT DO NOTHING".to_owned(),
        "INSERT INTO jobledger.org_due SELECT org_id, now(), now() FROM jobledger.org_head ON CONFLICT DO NOTHING".to_owned(),
        "INSERT INTO jobledger.org_counter SELECT org_id, type, count(*) FILTER (WHERE status = 'queued'),
            count(*) FILTER (WHERE status = 'running'), count(*) FILTER (WHERE status = 'succeeded'),
            count(*) FILTER (WHERE status = 'failed'), 0, 0, count(*) FILTER (WHERE status = 'queued' AND due_at IS NOT NULL) FROM jobledger.job GROUP BY org_id, type ON CONFLICT DO NOTHING"
            .to_owned(),
        "COMMIT".to_owned(),
    ] {
        connection.execute(AssertSqlSafe(sql)).await.expect("the database is filled");
    }
}

/// The parameter types and the statement of a function of the schema, with the parameters as `$1`, `$2`, …
async fn inner(connection: &mut PgConnection, function: &str) -> (Vec<String>, String) {
    let sql = format!(
        "SELECT prosrc, proargnames[1:pronargs], pronargs::int, (SELECT array_agg(t::regtype::text) FROM unnest(proargtypes::oid[]) t)
         FROM pg_proc WHERE proname = '{function}' AND pronamespace = 'jobledger'::regnamespace"
    );
    let row = connection.fetch_one(AssertSqlSafe(sql)).await.expect("the function is there");
    let (source, names, types): (String, Vec<String>, Vec<String>) = (row.get(0), row.get(1), row.get(3));
    let (_, statement) = source.split_once("RETURN QUERY").expect("it returns a query");
    let mut statement = statement.rsplit_once("\nEND").expect("and ends").0.trim().trim_end_matches(';').to_owned();
    // Longer names first, because one name may begin with another.
    let mut order: Vec<_> = (0..names.len()).collect();
    order.sort_by_key(|n| std::cmp::Reverse(names[*n].len()));
    for n in order {
        statement = statement.replace(&names[n], &format!("${}", n + 1));
    }
    // The function's own variables, which it reads before.
    for (variable, value) in [
        ("coalesce(head, 0)", "0"),
        ("> base_n", "> 0"),
        ("> base", "> 0"),
        (">= since", ">= now()"),
        ("since IS NOT NULL", "true"),
        ("base, since", "0, now()"),
        ("sign * ", "-1 * "),
    ] {
        statement = statement.replace(variable, value);
    }
    (types, statement)
}

/// The plan of a statement with these arguments.
async fn plan(
    connection: &mut PgConnection,
    settings: &str,
    types: &[String],
    statement: &str,
    arguments: &str,
) -> Vec<String> {
    let mut transaction = connection.begin().await.unwrap();
    let prepare = format!(
        "{settings}; SELECT set_config('app.current_org_id', '{}', true); PREPARE plan ({}) AS {statement}",
        org(7),
        types.join(", ")
    );
    sqlx::raw_sql(AssertSqlSafe(prepare)).execute(&mut *transaction).await.unwrap();
    let explain = format!("EXPLAIN (COSTS OFF) EXECUTE plan ({arguments})");
    let rows = sqlx::raw_sql(AssertSqlSafe(explain)).fetch_all(&mut *transaction).await.unwrap();
    transaction.execute("DEALLOCATE plan").await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// The steps of a plan without those below a condition that is never true, because they are not run.
fn run(plan: Vec<String>) -> Vec<String> {
    let depth = |step: &str| step.len() - step.trim_start().len();
    let mut never = usize::MAX;
    let is_run = |step: &String| {
        if depth(step) < never {
            never = if step.contains("One-Time Filter: false") { depth(step) } else { usize::MAX };
        }
        never == usize::MAX
    };
    plan.into_iter().filter(is_run).collect()
}

/// The planner settings of the store's sessions, and PostgreSQL's own.
const SERVING: &str = "SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL enable_seqscan = off";
const ALONE: &str = "SET LOCAL plan_cache_mode = auto";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_read_walks_a_table() {
    let jobs = short_or_long(20_000, 1_000_000);
    let database = Database::postgres().await;
    fill(&database, jobs).await;
    database.connect_as("postgres").await.execute("ANALYZE").await.unwrap();
    let mut connection = database.connect_as(SERVER).await;

    let (o, j) = (org(7), job(7));
    let mut reads = Vec::new();
    for (function, arguments) in [
        ("read_job", format!("'{o}', '{j}'", j = j.0)),
        ("read_log", format!("'{o}', 100, 4196, NULL, NULL, false, NULL, 256, 1000000")),
        ("read_log", format!("'{o}', 100, 4196, '{{t1}}', '{{failed}}', true, '{{\"k\": \"7\"}}', 256, 1000000")),
        ("read_job_log", format!("'{o}', '{j}', 0, NULL, NULL, false, NULL, 256, 1000000", j = j.0)),
        ("miscounted", format!("'{o}'")),
        ("count_events", format!("'{o}', 0, 20000")),
        ("count_remaining", format!("'{o}'")),
        ("read_histories", format!("'{o}', '{{{j}}}', 0, 1000000, 256", j = j.0)),
        ("read_contents", format!("'{o}', '{{{j}}}'", j = j.0)),
        ("newest_candidates", format!("'{o}', 1000000, 'me', NULL, NULL, NULL, '{{failed}}', 0, NULL, 51")),
        ("newest_candidates", format!("'{o}', 1000000, NULL, NULL, NULL, NULL, '{{failed}}', 0, NULL, 51")),
        ("newest_candidates", format!("'{o}', 1000000, NULL, NULL, NULL, NULL, '{{running}}', 0, now(), 51")),
        ("newest_candidates", format!("'{o}', 1000000, NULL, NULL, NULL, '{{t1,t3}}', '{{queued,failed}}', 0, NULL, 51")),
        ("newest_candidates", format!("'{o}', 1000000, NULL, 'k', '7', NULL, '{{failed}}', 0, NULL, 51")),
        ("oldest_candidates", format!("'{o}', 0, 'me', NULL, NULL, NULL, '{{failed}}', 0, NULL, 51")),
        ("oldest_candidates", format!("'{o}', 0, NULL, NULL, NULL, NULL, '{{failed}}', 0, NULL, 51")),
        ("oldest_candidates", format!("'{o}', 0, NULL, NULL, NULL, NULL, '{{running}}', 0, now(), 51")),
        ("oldest_candidates", format!("'{o}', 0, NULL, NULL, NULL, '{{t1,t3}}', '{{queued,failed}}', 0, NULL, 51")),
        ("oldest_candidates", format!("'{o}', 0, NULL, 'k', '7', NULL, '{{failed}}', 0, NULL, 51")),
        (
            "list_jobs",
            format!(
                "'{o}', 1000000, false, NULL, NULL, NULL, '{{failed}}', '{{\"k\": \"7\"}}', 'me', now(), now(), NULL, 'E',
                'w', now(), now(), 2000, 51"
            ),
        ),
        (
            "list_jobs",
            format!(
                "'{o}', 1000000, true, NULL, NULL, NULL, '{{failed}}', '{{\"k\": \"7\"}}', 'me', now(), now(), NULL, 'E',
                'w', now(), now(), 2000, 51"
            ),
        ),
    ] {
        let (types, statement) = inner(&mut connection, function).await;
        reads.push((function.to_owned(), types, statement, arguments));
    }
    for (name, types, statement, arguments) in &reads {
        for settings in [SERVING, ALONE] {
            let plan = run(plan(&mut connection, settings, types, statement, arguments).await);
            let walks = |step: &&String| {
                // The partition of a future month is empty, and not worth an index.
                let is_ahead = step.contains("job_event_") && settings == ALONE;
                step.contains("Seq Scan on job") && !is_ahead
            };
            assert_eq!(plan.iter().find(walks), None, "{name}: {plan:#?}");
            let by_org = plan.iter().any(|step| step.contains("Index Cond") && step.contains("org_id"));
            assert!(by_org, "{name}: {plan:#?}");
        }
    }
    let everything = serve(&database).await;
    println!("{jobs} jobs in {ORGS} orgs: no plan walks a table; {everything}");
}

/// A statement that was planned on an empty database must also serve a full one. Plans are made when a statement is
/// first used, and kept until the tables are analysed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_planned_on_an_empty_database_serves_a_full_one() {
    let database = Database::postgres().await;
    let mut watching = database.connect_as("postgres").await;
    for table in ["job", "job_payload", "job_label"] {
        let sql = format!("ALTER TABLE jobledger.{table} SET (autovacuum_enabled = off)");
        watching.execute(AssertSqlSafe(sql)).await.unwrap();
    }
    let jobs = 20_000;
    let (server, _) = TestServer::on(&database).await;
    let all_calls = async |org: OrgId| {
        let client = jobledger_client::Client::builder(server.endpoint()).org(org.0).build().unwrap();
        for n in 0..5 {
            let created = client.create(NewJob::new("u").payload(&n).unwrap().label("l", "v")).await.unwrap().job;
            let lease = client.claim(Claim::new("w").types(["u"])).await.unwrap().remove(0);
            assert_eq!(lease.job.unwrap().id, created.id);
            let beat =
                LeaseHeartbeat { lease_token: lease.lease_token.clone(), progress: Some(n), ..Default::default() };
            let beat = HeartbeatRequest { worker_id: "w".to_owned(), leases: vec![beat], extend_by: None };
            assert!(!client.heartbeat(beat).await.unwrap()[0].lease_lost);
            client.update(Report::succeeded(&created.id).lease(lease.lease_token)).await.unwrap();
            client.get(&created.id).await.unwrap();
            for view in [JobView::Basic, JobView::Full] {
                let list = ListJobsRequest {
                    types: vec!["u".to_owned()],
                    // Jobs of other statuses are looked for among all types.
                    statuses: vec![jobledger_client::JobStatus::Succeeded.into()],
                    view: view.into(),
                    page_size: 5,
                    ..Default::default()
                };
                assert!(!client.list(list).await.unwrap().jobs.is_empty());
            }
        }
    };
    all_calls(org(99)).await;
    fill(&database, jobs).await;
    all_calls(org(8)).await;
    server.stop().await;
    const READ: &str = "SELECT 0::bigint, coalesce(sum(idx_tup_read), 0)::bigint FROM pg_stat_user_indexes
        WHERE schemaname = 'jobledger' AND relname LIKE 'job%'";
    let count = async |connection: &mut PgConnection| {
        let row = connection.fetch_one(READ).await.unwrap();
        (row.get::<i64, _>(0), row.get::<i64, _>(1))
    };
    let (_, read) = settled(&mut watching, &count, 1).await;
    // An org has 400 of the jobs. Walking them once for each looked-up row would read many times this.
    assert!(read < 3_000, "{read} entries of indexes were read for ten jobs' lives");
}

/// Jobs that fall due at once are looked up by their keys. If a month was empty when a statement was planned,
/// PostgreSQL takes one index for as good as another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_falls_due_at_once_is_looked_up_by_its_keys() {
    const JOBS: i64 = 4_000;
    let database = Database::postgres().await;
    let mut watching = database.connect_as("postgres").await;
    let off = "DO $$ DECLARE part REGCLASS; BEGIN
        FOR part IN SELECT 'jobledger.job'::regclass UNION SELECT inhrelid FROM pg_inherits WHERE inhparent = 'jobledger.job_event'::regclass LOOP
            EXECUTE format('ALTER TABLE %s SET (autovacuum_enabled = off)', part);
        END LOOP; END $$";
    watching.execute(off).await.unwrap();
    let (server, client) = TestServer::on(&database).await;
    let at = SystemClock.now() + TimeDelta::seconds(3);
    for _ in 0..JOBS / 500 {
        for created in client.create_all((0..500).map(|_| NewJob::new("t").scheduled_at(at))).await.unwrap() {
            created.unwrap();
        }
    }
    // Without an index, because the blocks of indexes are counted.
    watching
        .execute("SET enable_indexscan = off; SET enable_indexonlyscan = off; SET enable_bitmapscan = off")
        .await
        .unwrap();
    let waiting = "SELECT 1 FROM jobledger.job WHERE due_at IS NOT NULL LIMIT 1";
    let is_ready = async { while watching.fetch_optional(waiting).await.unwrap().is_some() {} };
    timeout(PATIENCE, is_ready).await.expect("they become ready");
    server.stop().await;
    const READ: &str =
        "SELECT 0::bigint, coalesce(sum(idx_blks_hit + idx_blks_read), 0)::bigint FROM pg_statio_user_indexes
        WHERE schemaname = 'jobledger' AND relname LIKE 'job_event%'";
    let count = async |connection: &mut PgConnection| {
        let row = connection.fetch_one(READ).await.unwrap();
        (row.get::<i64, _>(0), row.get::<i64, _>(1))
    };
    let (_, blocks) = settled(&mut watching, &count, 1).await;
    // Walking the org's entries would read some thirty more blocks for each job.
    assert!(blocks < 20 * JOBS, "{blocks} blocks of the events' indexes were looked at for {JOBS} jobs");
}

/// Makes a store do all its reads, and asserts that PostgreSQL walked no table. Returns how long the reads took.
async fn serve(database: &Database) -> String {
    const WALKS: &str = "SELECT coalesce(sum(seq_scan) FILTER (WHERE relname LIKE 'job%'), 0)::bigint,
            coalesce(sum(idx_scan), 0)::bigint
        FROM pg_stat_user_tables WHERE schemaname = 'jobledger'";
    let mut watching = database.connect_as("postgres").await;
    let store = database.open().await;
    // Reads empty months for the first time before the count begins.
    use_all(&store).await;
    store.close().await;
    let count = async |connection: &mut PgConnection| {
        let row = connection.fetch_one(WALKS).await.unwrap();
        (row.get::<i64, _>(0), row.get::<i64, _>(1))
    };
    let before = settled(&mut watching, &count, 1).await;
    let store = database.open().await;
    let took = use_all(&store).await;
    // Sessions report their counts when they end.
    store.close().await;
    let after = settled(&mut watching, &count, before.1 + 1).await;
    assert_eq!(after.0 - before.0, 0, "PostgreSQL walked a table");
    took
}

/// The counts, once the store's sessions have ended and reported them.
pub(crate) async fn settled(
    connection: &mut PgConnection,
    count: &impl AsyncFn(&mut PgConnection) -> (i64, i64),
    least: i64,
) -> (i64, i64) {
    let sessions = "SELECT 1 FROM pg_stat_activity
        WHERE datname = current_database() AND application_name LIKE 'jobledger%'";
    let settled = async {
        while connection.fetch_optional(sessions).await.unwrap().is_some() {}
        loop {
            let found = count(connection).await;
            if found.1 >= least {
                return found;
            }
        }
    };
    timeout(PATIENCE, settled).await.expect("sessions report when they end")
}

async fn use_all(store: &Arc<dyn Store>) -> String {
    let o = org(7);
    let events = |filter, after| EventQuery { filter, after, max_events: 256, max_bytes: 1 << 20 };
    let of_type = EventFilter { types: vec!["t1".to_owned()], ..EventFilter::default() };
    let of_job = EventFilter { job: Some(job(7)), ..EventFilter::default() };
    let mut took = Vec::new();
    let mut since = Instant::now();
    let mut note = |name: &str| {
        took.push(format!("{name} {:.1} ms", since.elapsed().as_secs_f64() * 1e3));
        since = Instant::now();
    };
    assert!(store.job(o, job(7)).await.unwrap().is_some());
    note("connecting and job");
    assert!(store.job(o, job(57)).await.unwrap().is_some());
    note("job");
    let found = store.jobs(&[(o, job(57))]).await.unwrap();
    let FoundJob::Whole(record) = &found[0] else { panic!("{found:?}") };
    assert_eq!(store.unchanged(&[&record.job]).await.unwrap(), [true]);
    note("jobs");
    assert_eq!(store.events(o, &events(EventFilter::default(), 100)).await.unwrap().events.len(), 256);
    note("page");
    assert!(!store.events(o, &events(of_type, 100)).await.unwrap().events.is_empty());
    note("filtered page");
    assert_eq!(store.events(o, &events(of_job, 0)).await.unwrap().events.len(), 3);
    note("job's events");
    assert!(store.statistics(o, &StatisticsQuery::of(&[])).await.unwrap().types.len() >= 7);
    note("statistics");
    let week =
        StatisticsQuery { window: chrono::TimeDelta::days(7), series: SeriesKind::ByType, ..StatisticsQuery::of(&[]) };
    store.statistics(o, &week).await.unwrap();
    note("a week's");
    let audit = store.audit();
    audit.series(o, &["t1".to_owned()]).await.unwrap();
    audit.removals(o).await.unwrap();
    audit.miscounted(o).await.unwrap();
    assert!(audit.count_events(o, 0, 1_000).await.unwrap().events > 0);
    assert_eq!(audit.histories(o, &[job(7), job(57)], 0, i64::MAX, 100).await.unwrap().len(), 6);
    store.about().await.unwrap();
    note("what verify asks");
    assert_eq!(store.reaches(&[o, org(8)]).await.unwrap().len(), 2);
    assert!(!store.take_due(DueWork::Retention, 3, std::time::Duration::ZERO).await.unwrap().is_empty());
    store.take_due(DueWork::Jobs, 3, std::time::Duration::ZERO).await.unwrap();
    note("reaches and due");
    assert_eq!(store.contents(o, &[job(7), job(57)]).await.unwrap().len(), 2);
    note("contents");
    let list = |filter| ListQuery::first(filter, ListOrder::NewestFirst, 50);
    let labels = BTreeMap::from([("k".to_owned(), "7".to_owned())]);
    let types = vec!["t1".to_owned()];
    let statuses = vec![JobStatus::Failed];
    for filter in [
        JobFilter::default(),
        JobFilter { labels, ..JobFilter::default() },
        JobFilter { types, ..JobFilter::default() },
        JobFilter { statuses, ..JobFilter::default() },
    ] {
        assert!(!store.list(o, &list(filter)).await.unwrap().jobs.is_empty());
    }
    note("four lists");
    // This org has jobs that are ready, and some that will be.
    let queued = org(8);
    let mut batch = store.begin(&[queued]).await.unwrap();
    let of_types = BTreeMap::from([("t1".into(), 10), ("t4".into(), 10)]);
    for ready in [Ready { all: 20, ..Ready::default() }, Ready { of: of_types, all: 0 }] {
        let loaded =
            factory::load_in(&mut *batch, queued, Needs { ready, due: Some(10), ..Needs::default() }).await.unwrap();
        assert!((5..=20).contains(&loaded.ready.jobs.len()) && loaded.next_due.is_some());
    }
    drop(batch);
    note("what is ready and due, twice");
    factory::create(&**store, o, true, 10).await;
    note("batch of ten");
    let mut retention = Retention::default();
    retention.set(JobStatus::Failed, std::time::Duration::ZERO);
    let expired =
        Some(Expired { retention, limit: 500, most: Most { events: 10_000, bytes: 16 << 20 }, max_history: 200_000 });
    let mut batch = store.begin(&[o]).await.unwrap();
    let needs =
        Needs { jobs: vec![job(57)], keys: vec!["k".into()], types: vec!["t1".into()], expired, ..Needs::default() };
    assert!(!factory::load_in(&mut *batch, o, needs).await.unwrap().expired.is_empty());
    note("expired");
    took.join(", ")
}
