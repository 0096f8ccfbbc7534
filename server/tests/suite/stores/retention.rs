//! Retention removes finished jobs after their time, with all that belongs to them. Everything else stays.

use std::{
    collections::BTreeMap,
    io::{Read as _, Seek as _},
    time::Duration,
};

use chrono::TimeDelta;
use jobledger_client::{Client, Error, Follow, Item, NewJob, Report};
use jobledger_server::{
    domain::{
        clock::Clock as _,
        id::OrgId,
        status::JobStatus,
        transition::{self, Cancel, Erase},
    },
    ledger::{Command, Delivery, EventFilter, LedgerError, Retention, StatisticsQuery, SubscribeRequest, SweepRequest},
    store::DueWork,
};
use serde_json::json;
use sqlx::{Executor as _, Row as _};
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    stores::ledger::{Work, breaking, create_once, created, new_job, poll_once, start},
    support::harness::{Database, ManualClock, PATIENCE, TestServer, on_both_databases},
    support::program::Program,
};

on_both_databases! {
    finished_jobs_go_when_their_time_is_over_and_others_stay,
    one_batch_removes_a_bounded_number_and_says_that_there_are_more,
    an_org_with_much_to_remove_has_no_other_wait,
    a_job_that_was_retried_meanwhile_stays,
    what_goes_later_than_what_came_after_it_is_counted_out_too,
    a_key_is_free_for_the_next_command_once_its_job_is_removed,
    what_a_batch_erases_it_does_not_remove_as_well,
    a_reader_of_a_job_that_is_removed_is_told,
    the_next_look_is_in_time_for_whatever_finishes_first,
    a_command_that_fails_leaves_nothing_of_its_org,
}

#[tokio::test]
async fn months_are_made_ahead_and_empty_ones_that_are_past_are_dropped() {
    let database = Database::postgres().await;
    let mut owner = database.connect_as(crate::support::cluster::OWNER).await;
    for (name, from, to) in [("2020_01", "2020-01-01", "2020-02-01"), ("2020_02", "2020-02-01", "2020-03-01")] {
        let sql = format!(
            "CREATE TABLE jobledger.job_event_{name} PARTITION OF jobledger.job_event
             FOR VALUES FROM ('{from} 00:00+00') TO ('{to} 00:00+00')"
        );
        owner.execute(sqlx::AssertSqlSafe(sql)).await.unwrap();
    }
    let kept = "INSERT INTO jobledger.job_event_2020_02 (org_id, seq, job_id, job_seq, recorded_at, kind, next_status, attempt,
            job_type, bytes)
        VALUES (gen_random_uuid(), 1, gen_random_uuid(), 1, '2020-02-02', 'created', 'queued', 0, 't', 256)";
    database.connect_as("postgres").await.execute(kept).await.unwrap();
    // A month ahead that was dropped is made again.
    let newest =
        "SELECT max(inhrelid::regclass::text) FROM pg_inherits WHERE inhparent = 'jobledger.job_event'::regclass";
    let newest: String = owner.fetch_one(newest).await.unwrap().get(0);
    owner.execute(sqlx::AssertSqlSafe(format!("DROP TABLE {newest}"))).await.unwrap();
    let before = months(&mut owner).await;
    database.open().await.maintain().await.unwrap();
    let after = months(&mut owner).await;
    assert!(before.iter().any(|name| name.ends_with("2020_01")) && !before.contains(&newest), "{before:?}");
    assert!(!after.iter().any(|name| name.ends_with("2020_01")), "empty and past: {after:?}");
    assert!(after.iter().any(|name| name.ends_with("2020_02")), "something is in it: {after:?}");
    assert!(after.contains(&newest) && after.len() == 4, "this month and the next two: {after:?}");
}

async fn months(connection: &mut sqlx::PgConnection) -> Vec<String> {
    let sql =
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'jobledger.job_event'::regclass ORDER BY 1";
    connection.fetch_all(sql).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// Counts the rows of a table. `table` may end with a WHERE clause.
pub(crate) async fn rows(database: &Database, table: &str) -> i64 {
    let sql = format!("SELECT count(*) FROM {table}");
    if database.is_postgres() {
        let sql = sqlx::AssertSqlSafe(sql.replace("FROM ", "FROM jobledger."));
        database.connect_as("postgres").await.fetch_one(sql).await.unwrap().get(0)
    } else {
        database.connect().await.fetch_one(sqlx::AssertSqlSafe(sql)).await.unwrap().get(0)
    }
}

pub(crate) fn keep(status: JobStatus, time: Duration) -> Retention {
    let mut retention = Retention::default();
    retention.set(status, time);
    retention
}

/// Reads the statistics until a count is as expected.
pub(crate) async fn until_counts(
    client: &Client,
    status: fn(&jobledger_client::proto::StatusCounts) -> i64,
    expected: i64,
) {
    let reached =
        async { while status(&client.statistics(&[]).await.unwrap().counts.unwrap_or_default()) != expected {} };
    timeout(PATIENCE, reached).await.expect("retention gets there");
}

async fn finished_jobs_go_when_their_time_is_over_and_others_stay(database: Database) {
    let mut config = database.config();
    config.retention = keep(JobStatus::Succeeded, Duration::from_secs(1));
    let server = TestServer::start(config).await;
    let client = server.client();
    let create = async |n: i32| {
        let job = NewJob::new("t").idempotency_key(format!("key {n}")).label("n", n.to_string());
        // Every other payload is large enough for a row of its own.
        let text = "x".repeat(if n % 2 == 0 { 1_000 } else { 0 });
        client.create(job.payload(&json!({ "n": n, "text": text })).unwrap()).await.unwrap().job.id
    };
    let failed = create(100).await;
    client.update(Report::start(&failed)).await.unwrap();
    client.update(Report::failed(&failed, "E", "no")).await.unwrap();
    let running = create(101).await;
    client.update(Report::start(&running)).await.unwrap();
    let mut gone = Vec::new();
    for n in 0..5 {
        let id = create(n).await;
        client.update(Report::start(&id)).await.unwrap();
        client.update(Report::succeeded(&id).result(&json!("done")).unwrap()).await.unwrap();
        gone.push(id);
    }
    let queued = create(102).await;
    until_counts(&client, |counts| counts.succeeded, 0).await;

    let counts = client.statistics(&[]).await.unwrap().counts.unwrap();
    assert_eq!((counts.failed, counts.running, counts.queued), (1, 1, 1));
    for id in &gone {
        assert!(matches!(client.get(id).await, Err(Error::JobNotFound { .. })));
    }
    for id in [&failed, &running, &queued] {
        assert!(client.get(id).await.unwrap().payload.is_some());
    }
    // A job that exists has its whole history. The org's log is complete from its floor on.
    let mut history = client.subscribe(Follow::job(&failed)).await.unwrap();
    let mut seqs = Vec::new();
    while let Some(item) = timeout(PATIENCE, history.next()).await.expect("it ends") {
        if let Item::Event(event) = item.unwrap() {
            seqs.push(event.seq);
        }
    }
    assert_eq!(seqs, [1, 2, 3]);
    let expired = client.subscribe(Follow::org().after(0)).await;
    let error = match expired {
        Err(error) => error,
        Ok(mut events) => events.next().await.expect("an answer").expect_err("what is gone is not skipped"),
    };
    assert!(matches!(error, Error::CursorExpired { oldest_seq: 21, head_seq: 21 }), "{error:?}");
    let mut rest = client.subscribe(Follow::org().after(20)).await.unwrap();
    let first = timeout(PATIENCE, rest.next()).await.unwrap().unwrap().unwrap();
    assert!(matches!(first, Item::Event(event) if event.seq == 21 && event.job_id == queued));
    // A removed job's key is free.
    let again = client.create(NewJob::new("t").idempotency_key("key 0")).await.unwrap();
    assert!(!again.deduplicated && again.job.id != gone[0]);
    for (table, expected) in [("job", 4), ("job_payload", 2), ("job_label", 3), ("job_event", 7)] {
        assert_eq!(rows(&database, table).await, expected, "{table}");
    }
    server.stop().await;
}

async fn one_batch_removes_a_bounded_number_and_says_that_there_are_more(database: Database) {
    let store = database.open().await;
    let ledger = start(&store, Default::default());
    let org = OrgId::DEFAULT;
    let work = Work { ledger: &ledger, org };
    for _ in 0..1_100 {
        work.finish(work.create().await).await;
    }
    let retention = keep(JobStatus::Succeeded, Duration::ZERO);
    let mut removed = Vec::new();
    loop {
        let done = ledger.retain(org, retention).await.unwrap();
        removed.push(done.jobs);
        if !done.has_more {
            break;
        }
    }
    assert_eq!(removed, [500, 500, 100]);
    assert_eq!(ledger.retain(org, retention).await.unwrap().jobs, 0);
    let statistics = ledger.statistics(org, &StatisticsQuery::of(&[])).await.unwrap();
    assert_eq!((statistics.as_of_seq, statistics.types[0].counts.get(JobStatus::Succeeded)), (3_300, 0));
    // The log goes on after its last `seq`, though all its events are removed.
    let job = ledger.job(org, work.create().await).await.unwrap().0.job.clone();
    assert_eq!(job.last_seq, 3_301);
    assert_eq!(rows(&database, "job_event").await, 1);
    assert!(store.take_due(DueWork::Retention, 10, Duration::from_secs(60)).await.unwrap().len() <= 1);
    assert_eq!(store.orgs(None, 10).await.unwrap(), [org]);
    assert_eq!(store.orgs(Some(org), 10).await.unwrap(), []);
}

async fn an_org_with_much_to_remove_has_no_other_wait(database: Database) {
    let store = database.open().await;
    let ledger = start(&store, Default::default());
    // In the order in which retention visits them.
    let [much, little] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
    for (org, n) in [(much, 2_100), (little, 1)] {
        let creates = (0..n).map(|_| Command::Create(new_job("t", None, None))).collect();
        let jobs = ledger.submit_all(org, creates).await.unwrap();
        let cancel = |reply| {
            let cancel = Cancel { reason: "".into(), etag: None, actor: "".into() };
            Command::Apply { job: created(reply).id, command: Box::new(transition::Command::Cancel(cancel)) }
        };
        let canceled = ledger.submit_all(org, jobs.into_iter().map(cancel).collect()).await.unwrap();
        assert!(canceled.into_iter().all(|reply| reply.is_ok()));
    }
    drop(ledger);
    store.close().await;
    let (mut log, mut said) = (tempfile::tempfile().unwrap(), String::new());
    let more = ["--log", "info", "--retain-finished", "1s"];
    let program = Program::serve_saying("127.0.0.1:0", &database.url(), &more, &[], log.try_clone().unwrap().into());
    for org in [much, little] {
        until_counts(&program.client_of(org.0), |counts| counts.canceled, 0).await;
    }
    assert!(program.end_by("TERM").success());
    log.rewind().unwrap();
    log.read_to_string(&mut said).unwrap();
    let removed: Vec<_> = said.lines().filter(|line| line.contains("removed finished jobs")).collect();
    assert!(removed.len() >= 2 && removed[0].contains(&little.to_string()), "{said}");
}

async fn a_key_is_free_for_the_next_command_once_its_job_is_removed(database: Database) {
    let (store, ledger) = breaking(&database, &[]).await;
    let org = OrgId::DEFAULT;
    let work = Work { ledger: &ledger, org };
    let first = created(ledger.submit(org, create_once("k")).await).id;
    work.finish(first).await;
    // The following commands share one batch, which waits for the head.
    let begun = store.begun();
    let held = store.inner.begin(&[org]).await.unwrap();
    let (ahead, retaining) = (ledger.clone(), ledger.clone());
    let ahead = tokio::spawn(async move { ahead.submit(org, create_once("ahead")).await });
    store.has_begun(begun + 1).await;
    let at_once = keep(JobStatus::Succeeded, Duration::ZERO);
    let mut retaining = Box::pin(async move { retaining.retain(org, at_once).await });
    assert!(poll_once(&mut retaining).is_pending());
    let mut again = Box::pin(ledger.submit(org, create_once("k")));
    assert!(poll_once(&mut again).is_pending());
    drop(held);
    created(ahead.await.unwrap());
    assert_eq!(retaining.await.unwrap().jobs, 1);
    let second = created(again.await).id;
    assert_ne!(second, first);
    assert_eq!(store.begun(), begun + 1, "one batch removed and created");
    assert_eq!(rows(&database, "job").await, 2);
    let request = SubscribeRequest { after: Some(0), ..SubscribeRequest::default() };
    let expired = ledger.subscribe(org, None, request).await.map(|_| ());
    assert_eq!(expired, Err(LedgerError::CursorExpired { oldest: 4, head: 5 }), "it removed as well as it created");
}

async fn what_a_batch_erases_it_does_not_remove_as_well(database: Database) {
    let (store, ledger) = breaking(&database, &[]).await;
    let org = OrgId::DEFAULT;
    let work = Work { ledger: &ledger, org };
    let first = created(ledger.submit(org, create_once("k")).await).id;
    work.finish(first).await;
    // The following commands share one batch, which waits for the head.
    let begun = store.begun();
    let held = store.inner.begin(&[org]).await.unwrap();
    let ahead = ledger.clone();
    let ahead = tokio::spawn(async move { ahead.submit(org, create_once("ahead")).await });
    store.has_begun(begun + 1).await;
    let at_once = keep(JobStatus::Succeeded, Duration::ZERO);
    let erase = Erase { cancel: false, etag: None, actor: "".into() };
    let mut erasing = Box::pin(ledger.erase(org, first, erase));
    assert!(poll_once(&mut erasing).is_pending());
    let mut retaining = Box::pin(ledger.retain(org, at_once));
    assert!(poll_once(&mut retaining).is_pending());
    let mut again = Box::pin(ledger.submit(org, create_once("k")));
    assert!(poll_once(&mut again).is_pending());
    drop(held);
    created(ahead.await.unwrap());
    assert!(erasing.await.unwrap().job.erased_at.is_some());
    let retained = retaining.await.unwrap();
    assert_eq!((retained.jobs, retained.has_more), (0, true));
    // The key of the erased job is free in the same batch.
    assert_ne!(created(again.await).id, first);
    assert_eq!(store.begun(), begun + 1, "one batch erased and created");
    database.verify().await;
    assert_eq!(ledger.retain(org, at_once).await.unwrap().jobs, 1);
    assert_eq!(rows(&database, "job").await, 2);
}

async fn a_reader_of_a_job_that_is_removed_is_told(database: Database) {
    let store = database.open().await;
    let ledger = start(&store, Default::default());
    let org = OrgId::DEFAULT;
    let work = Work { ledger: &ledger, org };
    let job = work.create().await;
    work.begin(job).await;
    for n in 0..300_u16 {
        work.progress(job, (n % 100) as u8).await;
    }
    work.end(job).await;
    let filter = EventFilter { job: Some(job), ..EventFilter::default() };
    let mut reader =
        ledger.subscribe(org, None, SubscribeRequest { filter, ..SubscribeRequest::default() }).await.unwrap();
    assert!(matches!(reader.next().await.unwrap(), Delivery::Events(events, _) if events.len() == 256));
    assert_eq!(ledger.retain(org, keep(JobStatus::Succeeded, Duration::ZERO)).await.unwrap().jobs, 1);
    assert_eq!(reader.next().await.map(|_| ()), Err(LedgerError::JobNotFound { job }));
}

async fn the_next_look_is_in_time_for_whatever_finishes_first(database: Database) {
    let store = database.open().await;
    let ledger = start(&store, Default::default());
    let org = OrgId::DEFAULT;
    let work = Work { ledger: &ledger, org };
    work.finish(work.create().await).await;
    let day = Duration::from_secs(86_400);
    let mut retention = keep(JobStatus::Succeeded, 90 * day);
    retention.set(JobStatus::Failed, 7 * day);
    assert_eq!(ledger.retain(org, retention).await.unwrap().jobs, 0);
    let days: f64 = if database.is_postgres() {
        let sql = "SELECT (extract(epoch FROM next_due_at - now()) / 86400)::double precision FROM jobledger.org_due";
        database.connect_as("postgres").await.fetch_one(sql).await.unwrap().get(0)
    } else {
        let sql = "SELECT (next_due_at / 1e6 - unixepoch('subsec')) / 86400 FROM org_due";
        database.connect().await.fetch_one(sql).await.unwrap().get(0)
    };
    assert!((6.9..=7.1).contains(&days), "a job that fails now is to go in seven days, not in {days}");
}

async fn a_command_that_fails_leaves_nothing_of_its_org(database: Database) {
    let (server, _) = TestServer::on(&database).await;
    let stranger = Client::builder(server.endpoint()).org(uuid::Uuid::new_v4()).build().unwrap();
    let unknown = stranger.update(Report::start(uuid::Uuid::now_v7().to_string())).await;
    assert!(matches!(unknown, Err(Error::JobNotFound { .. })), "{unknown:?}");
    for table in ["org_head", "org_due"] {
        assert_eq!(rows(&database, table).await, 0, "{table}");
    }
    server.stop().await;
}

async fn a_job_that_was_retried_meanwhile_stays(database: Database) {
    let store = database.open().await;
    let ledger = start(&store, Default::default());
    let org = OrgId::DEFAULT;
    let work = Work { ledger: &ledger, org };
    let first = work.create().await;
    work.finish(first).await;
    let running = work.create().await;
    work.begin(running).await;
    let mut all = Retention::default();
    for status in JobStatus::ALL.into_iter().filter(|status| status.is_terminal()) {
        all.set(status, Duration::from_secs(3_600));
    }
    assert_eq!(ledger.retain(org, all).await.unwrap().jobs, 0, "their time is not over");
    let at_once = keep(JobStatus::Succeeded, Duration::ZERO);
    assert_eq!(ledger.retain(org, at_once).await.unwrap().jobs, 1);
    assert!(ledger.job(org, running).await.is_ok(), "never a job that isn't finished");
    let counts: BTreeMap<_, _> = ledger
        .statistics(org, &StatisticsQuery::of(&[]))
        .await
        .unwrap()
        .types
        .into_iter()
        .map(|of_type| (of_type.job_type, of_type.counts.get(JobStatus::Running)))
        .collect();
    assert_eq!(counts, BTreeMap::from([("t".to_owned(), 1)]));
}

async fn what_goes_later_than_what_came_after_it_is_counted_out_too(database: Database) {
    let store = database.open().await;
    let ledger = start(&store, Default::default());
    let org = OrgId::DEFAULT;
    let work = Work { ledger: &ledger, org };
    let early = work.create().await;
    let cancel = Cancel { reason: "".into(), etag: None, actor: "".into() };
    let cancel = Command::Apply { job: early, command: Box::new(transition::Command::Cancel(cancel)) };
    ledger.submit(org, cancel).await.unwrap();
    for _ in 0..3 {
        work.finish(work.create().await).await;
    }
    work.create().await;
    let count = async || {
        let statistics = ledger.statistics(org, &StatisticsQuery::of(&[])).await.unwrap();
        [JobStatus::Canceled, JobStatus::Succeeded, JobStatus::Queued]
            .map(|status| statistics.types[0].counts.get(status))
    };
    assert_eq!(count().await, [1, 3, 1]);
    assert_eq!(ledger.retain(org, keep(JobStatus::Succeeded, Duration::ZERO)).await.unwrap().jobs, 3);
    assert_eq!(count().await, [1, 0, 1]);
    // The log's floor is already beyond the canceled job.
    assert_eq!(ledger.retain(org, keep(JobStatus::Canceled, Duration::ZERO)).await.unwrap().jobs, 1);
    assert_eq!(count().await, [0, 0, 1]);
}

/// `verify` finds no difference in an org where only time passes. Without an event the log's time stands still while
/// the clock goes on.
#[tokio::test]
async fn what_time_alone_does_to_an_idle_org_is_no_difference() {
    let database = Database::sqlite();
    let clock = ManualClock::stepping(1);
    let store = database.open_with(clock.clone()).await;
    let ledger = start(&store, Default::default());
    let org = OrgId::DEFAULT;
    let work = Work { ledger: &ledger, org };
    work.finish(work.create().await).await;
    let later = clock.now() + TimeDelta::days(2);
    let mut scheduled = new_job("t", None, None);
    scheduled.scheduled_at = Some(later);
    ledger.submit(org, Command::Create(scheduled)).await.unwrap();
    for days in [2, 9] {
        clock.set_back(-TimeDelta::days(days).num_microseconds().unwrap());
        let now = std::time::Instant::now();
        ledger.sweep(org, SweepRequest { reachable_since: now, at: now, has_company: false }).await.unwrap();
        let mut retention = Retention::default();
        retention.set(JobStatus::Succeeded, Duration::ZERO);
        ledger.retain(org, retention).await.unwrap();
        let verified = jobledger_server::verify::verify(&*store, None, |_| {}).await.unwrap();
        assert_eq!(verified.differences, []);
    }
    let statistics = ledger.statistics(org, &StatisticsQuery::of(&[])).await.unwrap();
    assert_eq!((statistics.types[0].counts.get(JobStatus::Queued), statistics.types[0].scheduled), (1, 0));
}
