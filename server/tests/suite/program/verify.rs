//! `jobledger verify` finds what differs from the log, and nothing else, on a live database.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jobledger_client::{
    BulkAction, Claim, Client, JobFilter, NewJob, PauseTarget, Report,
    proto::{CancelJobRequest, ClaimJobsRequest, GetJobRequest, StartBulkOperationRequest},
};
use jobledger_server::domain::{id::OrgId, status::JobStatus};
use sqlx::{AssertSqlSafe, Executor as _};
use tokio::{task::JoinSet, time::timeout};
use uuid::Uuid;

use crate::{
    jobs::bulk::ended,
    stores::retention::rows,
    support::cluster::OWNER,
    support::harness::{Database, TestServer, on_both_databases},
    support::program::command,
    work::leases::keep,
};

on_both_databases! {
    what_was_tampered_with_is_told,
    settings_and_operations_that_were_tampered_with_are_told,
    a_row_that_lacks_what_it_is_said_to_have_is_told,
    a_row_that_lacks_the_end_of_its_lease_is_told,
    nothing_is_told_of_rows_that_are_ahead_of_a_log_that_was_cut,
    live_databases_are_verified_while_retention_waits,
    one_org_is_verified_or_all,
}

/// The exit code, and what the program prints.
fn verify(database: &Database, arguments: &[&str]) -> (Option<i32>, String) {
    let url = database.url_as(OWNER);
    let arguments: Vec<_> = ["verify", "--database-url", &url].iter().chain(arguments).copied().collect();
    let output = command(&arguments).output().expect("the program starts");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).expect("it prints text"))
}

async fn some_jobs(client: &Client) {
    for n in 0..3 {
        let id = client.create(NewJob::new("t").label("k", "v")).await.unwrap().job.id;
        client.update(Report::start(&id)).await.unwrap();
        client.update(Report::progress(&id).percent(n)).await.unwrap();
        client.update(Report::succeeded(&id).result(&n).unwrap()).await.unwrap();
    }
}

async fn what_was_tampered_with_is_told(database: Database) {
    let is_postgres = database.is_postgres();
    let (server, client) = TestServer::on(&database).await;
    some_jobs(&client).await;
    server.stop().await;
    assert_eq!(verify(&database, &[]), (Some(0), "verified 1 orgs, 3 jobs, 12 events: no difference\n".to_owned()));
    let histogram = if is_postgres { "'{7}'" } else { "'[7]'" };
    let labels = if is_postgres { "'{\"k\": \"w\"}'" } else { "'{\"k\":\"w\"}'" };
    let first = "(SELECT job_id FROM job_event WHERE seq = 1)";
    let mut cases = vec![
        ("UPDATE org_counter SET succeeded = succeeded + 1".to_owned(), vec!["4 succeeded by the counter, 3 counted"]),
        ("UPDATE org_counter SET scheduled = scheduled + 1".to_owned(), vec!["1 scheduled by the counter, 0 counted"]),
        (
            // Whether the jobs were created in one minute or in two.
            "UPDATE org_series SET created = 70 WHERE width = 60".to_owned(),
            vec!["minute", "created [7", "] by the series, ["],
        ),
        (
            format!("UPDATE org_series SET waits = {histogram} WHERE width = 3600"),
            vec!["hour", "waits [7", "by the series"],
        ),
        (
            format!("UPDATE job SET attempt = 9 WHERE id = {first}"),
            vec!["its row differs from its events", "attempt: 9", "1 difference"],
        ),
        (
            "DELETE FROM job_event WHERE seq = 6".to_owned(),
            vec!["11 events with 11 different seqs between seq 1 and 12", "its events are not a valid history"],
        ),
        (
            format!("DELETE FROM job WHERE id = {first}"),
            vec!["4 events belong to no job", "3 succeeded by the counter, 2 counted", "] by the series, ["],
        ),
        (
            format!("UPDATE job_event SET labels = {labels} WHERE seq = 3"),
            vec!["event 3 differs in type or labels", "1 difference"],
        ),
        (
            "UPDATE job_event SET bytes = bytes + 1 WHERE seq = 3".to_owned(),
            vec!["3 jobs of ", " by the head, 3 of ", "1 difference"],
        ),
        (
            "UPDATE org_record SET prev = prev + 1 WHERE n = 3".to_owned(),
            vec!["1 batch record does not follow its predecessor", "1 difference"],
        ),
    ];
    let lost = if is_postgres { "DELETE FROM org_record WHERE seq = 12" } else { "UPDATE org_head SET seq = 11" };
    cases.push((lost.to_owned(), vec!["the head is 11, but the last event of the log is 12"]));
    if is_postgres {
        // No key of a partitioned table can rule this out.
        let twice = "INSERT INTO job_event (org_id, seq, job_id, job_seq, ts, recorded_at, kind, prev_status, next_status, attempt, job_type, bytes)
            SELECT org_id, seq, job_id, job_seq, ts, recorded_at + interval '1 microsecond', kind, prev_status, next_status, attempt,
                job_type, bytes FROM job_event WHERE seq = 11";
        cases.push((twice.to_owned(), vec!["13 events with 12 different seqs"]));
    }
    for (sql, expected) in cases {
        let database = if is_postgres { Database::postgres().await } else { Database::sqlite() };
        let (server, client) = TestServer::on(&database).await;
        some_jobs(&client).await;
        database.tamper(&sql).await;
        // Runs beside the server, which has the file locked.
        let (code, said) = verify(&database, &[]);
        assert_eq!(code, Some(1), "{sql}\n{said}");
        for expected in expected {
            assert!(said.contains(expected), "{sql}\n{said}\nlacks: {expected}");
        }
        server.stop().await;
    }
    let (code, said) = match is_postgres {
        true => {
            let output = command(&["verify", "--database-url", "postgres://nobody@127.0.0.1:1/none"]).output().unwrap();
            (output.status.code(), String::from_utf8(output.stderr).unwrap())
        }
        false => verify(&Database::sqlite(), &[]),
    };
    assert_eq!(code, Some(2), "{said}");
    let expected = if is_postgres { "can't connect" } else { "no database at" };
    assert!(said.starts_with("jobledger: ") && said.contains(expected), "{said}");
}

async fn settings_and_operations_that_were_tampered_with_are_told(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    some_jobs(&client).await;
    client.create_all((0..5).map(|_| NewJob::new("bulk"))).await.unwrap();
    client.describe("t", "first").await.unwrap();
    client.describe("t", "makes thumbnails").await.unwrap();
    client.pause("t", "an incident", None).await.unwrap();
    client.describe("gone", "for a moment").await.unwrap();
    client.reset_type("gone").await.unwrap();
    client.pause(PauseTarget::AllTypes, "", None).await.unwrap();
    client.resume(PauseTarget::AllTypes).await.unwrap();
    let filter = Some(JobFilter { types: vec!["bulk".to_owned()], ..JobFilter::default() });
    let action = BulkAction::Cancel.into();
    let request = StartBulkOperationRequest { action, filter, ..StartBulkOperationRequest::default() };
    let operation = client.start_bulk(request).await.unwrap();
    assert_eq!(ended(&client, &operation.id).await.changed, 5);
    server.stop().await;
    let clean = |(code, said): (Option<i32>, String)| assert!(code == Some(0), "{said}");
    clean(verify(&database, &[]));
    for (sql, undo, expected) in [
        (
            "UPDATE org_type SET description = 'tampered with'",
            "UPDATE org_type SET description = 'makes thumbnails'",
            "settings of \"t\": they differ from the log",
        ),
        (
            "UPDATE org_type SET changed_seq = changed_seq - 1",
            "UPDATE org_type SET changed_seq = changed_seq + 1",
            "settings of \"t\"",
        ),
        (
            "UPDATE bulk_operation SET changed = changed - 1",
            "UPDATE bulk_operation SET changed = changed + 1",
            "it differs from the log: 4 jobs were changed, events of 5 name it",
        ),
        (
            "UPDATE bulk_operation SET status = 'stopped'",
            "UPDATE bulk_operation SET status = 'succeeded'",
            "is its end by the log",
        ),
    ] {
        database.tamper(sql).await;
        let (code, said) = verify(&database, &[]);
        assert!(code == Some(1) && said.contains(expected), "{sql}\n{said}");
        database.tamper(undo).await;
    }
    clean(verify(&database, &[]));
    database.tamper("DELETE FROM org_type").await;
    let (code, said) = verify(&database, &[]);
    assert!(code == Some(1) && said.contains("settings of \"t\""), "{said}");
}

async fn a_row_that_lacks_what_it_is_said_to_have_is_told(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    client.create(NewJob::new("t")).await.unwrap();
    client.claim(Claim::new("w")).await.unwrap();
    server.stop().await;
    assert_eq!(verify(&database, &[]).0, Some(0));
    let table = if database.is_postgres() { "org_record" } else { "org_head" };
    database.tamper(&format!("UPDATE {table} SET base_seq = seq")).await;
    let (code, said) = verify(&database, &[]);
    assert!(code == Some(1) && said.contains("1 row lacks an event or a lease extension"), "{said}");
}

async fn a_row_that_lacks_the_end_of_its_lease_is_told(database: Database) {
    let mut config = database.config();
    config.fold_after = Duration::ZERO;
    let server = TestServer::start(config).await;
    let client = server.client();
    client.create(NewJob::new("t")).await.unwrap();
    let leases = client.claim(Claim::new("w")).await.unwrap();
    keep(&client, &leases, 600).await;
    // This batch writes the row.
    client.create(NewJob::new("t")).await.unwrap();
    server.stop().await;
    let extended = "org_record WHERE extensions IS NOT NULL";
    assert_eq!((rows(&database, "job WHERE status = 'running'").await, rows(&database, extended).await), (1, 1));
    assert_eq!(verify(&database, &[]).0, Some(0));
    let earlier = if database.is_postgres() { "interval '9 minutes'" } else { "540000000" };
    database.tamper(&format!("UPDATE job SET lease_expires_at = lease_expires_at - {earlier}")).await;
    let (code, said) = verify(&database, &[]);
    assert!(code == Some(1) && said.contains("1 row lacks an event or a lease extension"), "{said}");
}

/// Calls on a job whose row is ahead of the log fail. Such rows are there after a restore that brought an older log,
/// and an answer would contradict the log.
async fn nothing_is_told_of_rows_that_are_ahead_of_a_log_that_was_cut(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut jobs = Vec::new();
    for name in ["finished", "running", "queued", "whole"] {
        jobs.push(client.create(NewJob::new(name)).await.unwrap().job.id);
    }
    client.update(Report::start(&jobs[0])).await.unwrap();
    client.update(Report::succeeded(&jobs[0])).await.unwrap();
    client.update(Report::start(&jobs[1])).await.unwrap();
    let late = client.create(NewJob::new("queued")).await.unwrap().job.id;
    server.stop().await;
    let cut = if database.is_postgres() {
        "DELETE FROM job_event WHERE seq > 4; DELETE FROM org_record WHERE seq > 4;
         UPDATE job SET last_seq = 7, last_recorded_at = now() WHERE type = 'running'"
    } else {
        "DELETE FROM job_event WHERE seq > 4; DELETE FROM org_record WHERE seq > 4;
         UPDATE org_head SET seq = 4, base_seq = 4, n = (SELECT max(n) FROM org_record), record = (SELECT id FROM org_record ORDER BY n DESC);
         UPDATE job SET last_seq = 7 WHERE type = 'running'"
    };
    database.tamper(cut).await;

    let (server, client) = TestServer::on(&database).await;
    for id in [&jobs[0], &jobs[1], &late] {
        let got = client.raw().get_job(GetJobRequest { job_id: id.clone(), ..Default::default() }).await;
        assert!(got.is_err(), "{got:?}");
        let canceled = client.raw().cancel_job(CancelJobRequest { job_id: id.clone(), ..Default::default() }).await;
        assert!(canceled.is_err(), "{canceled:?}");
    }
    let claimed = client.raw().claim_jobs(ClaimJobsRequest::from(Claim::new("w").max_jobs(5))).await;
    assert!(claimed.is_err(), "{claimed:?}");
    // Jobs that the log has are answered.
    assert_eq!(client.get(&jobs[3]).await.unwrap().id, jobs[3]);
    client.update(Report::start(&jobs[3])).await.unwrap();
    // Calls still fail once the log has other events at the lost `seq`s.
    for _ in 0..9 {
        client.create(NewJob::new("later")).await.unwrap();
    }
    for id in [&jobs[0], &jobs[1], &late] {
        let got = client.raw().get_job(GetJobRequest { job_id: id.clone(), ..Default::default() }).await;
        assert!(got.is_err(), "{got:?}");
        let canceled = client.raw().cancel_job(CancelJobRequest { job_id: id.clone(), ..Default::default() }).await;
        assert!(canceled.is_err(), "{canceled:?}");
    }
    server.stop().await;
    let (code, said) = verify(&database, &[]);
    assert!(code == Some(1) && said.contains("the log lacks the last event of a job"), "{said}");
}

async fn live_databases_are_verified_while_retention_waits(database: Database) {
    let mut config = database.config();
    config.retention.set(JobStatus::Succeeded, Duration::from_secs(1));
    config.retention.set(JobStatus::Canceled, Duration::from_secs(1));
    let server = TestServer::start(config).await;
    let client = server.client();
    let is_over = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for _ in 0..8 {
        let (client, is_over) = (client.clone(), Arc::clone(&is_over));
        writers.spawn(async move {
            let mut n = 0;
            while !is_over.load(Ordering::Relaxed) {
                n += 1;
                let id =
                    client.create(NewJob::new(["a", "b"][n % 2]).label("n", "1").max_attempts(2)).await.unwrap().job.id;
                client.update(Report::start(&id)).await.unwrap();
                if n % 3 == 0 {
                    client.update(Report::failed(&id, "E", "").retry_after(Duration::ZERO)).await.unwrap();
                    client.cancel(&id, "").await.unwrap();
                } else {
                    client.update(Report::succeeded(&id).result(&n).unwrap()).await.unwrap();
                }
            }
        });
    }
    // Waits until retention has removed something before each run.
    let removed = async |floor: i64| loop {
        let error = client.subscribe(jobledger_client::Follow::org().after(floor - 1)).await;
        let oldest = match error {
            Err(jobledger_client::Error::CursorExpired { oldest_seq, .. }) => oldest_seq,
            _ => continue,
        };
        break oldest;
    };
    let mut floor = 1;
    for _ in 0..3 {
        floor =
            tokio::time::timeout(crate::support::harness::PATIENCE, removed(floor)).await.expect("retention goes on");
        database.verify().await;
    }
    is_over.store(true, Ordering::Relaxed);
    writers.join_all().await;
    database.verify().await;
    // Statistics still have what was removed.
    let statistics = client.statistics(&[]).await.unwrap();
    let (happened, counts) = (statistics.happened.unwrap(), statistics.counts.unwrap());
    assert!(happened.succeeded > counts.succeeded, "{happened:?} {counts:?}");
    server.stop().await;
}

async fn one_org_is_verified_or_all(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    some_jobs(&client).await;
    let other = Uuid::new_v4();
    let theirs = Client::builder(server.endpoint()).org(other).build().unwrap();
    theirs.create(NewJob::new("t")).await.unwrap();
    assert_eq!(verify(&database, &[]).1, "verified 2 orgs, 4 jobs, 13 events: no difference\n");
    let one = verify(&database, &["--org", &other.to_string()]);
    assert_eq!(one, (Some(0), "verified 1 orgs, 1 jobs, 1 events: no difference\n".to_owned()));
    server.stop().await;
}

/// The leases of thousands of jobs are verified within seconds even if PostgreSQL has no statistics of the tables yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_of_thousands_of_jobs_are_verified_at_once() {
    const JOBS: usize = 40_000;
    let database = Database::postgres().await;
    database.is_made_up();
    let store = database.open().await;
    let mut filling = database.connect_as("postgres").await;
    for table in ["job", "org_record"] {
        let sql = format!("ALTER TABLE jobledger.{table} SET (autovacuum_enabled = off)");
        filling.execute(AssertSqlSafe(sql)).await.unwrap();
    }
    let org_id = OrgId(Uuid::from_u128(1));
    let org = format!("'{}'", org_id.0);
    let id = "('01980000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid";
    for sql in [
        format!("INSERT INTO jobledger.org_head (org_id, seq, base_seq, base_n, recorded_at, types) VALUES ({org}, {JOBS}, {JOBS}, 1000, now(), 1)"),
        format!(
            "INSERT INTO jobledger.job (org_id, id, type, status, retry_initial, retry_multiplier, retry_max, created_seq, ready_at,
                last_job_seq, last_seq, last_recorded_at, lease_expires_at)
             SELECT {org}, {id}, 't', 'running', 1, 2, 3, n, now(), 1, n, date_trunc('day', now()), '2026-01-01 00:00:00+00' FROM generate_series(1, {JOBS}) n"
        ),
        format!(
            "INSERT INTO jobledger.job_event (org_id, seq, job_id, job_seq, ts, recorded_at, kind, next_status, attempt, job_type, bytes)
             SELECT {org}, n, {id}, 1, now(), date_trunc('day', now()), 'created', 'queued', 0, 't', 100 FROM generate_series(1, {JOBS}) n"
        ),
        // Each record has the lease ends of ten jobs of its own. All but one of them differ from the rows.
        format!(
            "INSERT INTO jobledger.org_record (org_id, n, id, prev, seq, ready_gen, recorded_at, written_at, format, counts, base_seq, base_n, jobs, bytes, extensions)
             SELECT {org}, r, r, r - 1, {JOBS}, 1, now(), now(), 1, '{{}}', {JOBS}, 1000, {JOBS}, 0, (
                SELECT '{{' || string_agg(format('\"%s\":\"%s\"', encode(uuid_send({id}), 'hex'),
                    CASE WHEN n % 10 = 0 THEN '1767225600000000' ELSE '1' END), ',') || '}}'
                FROM generate_series(10 * r - 9, 10 * r) n)
             FROM generate_series(1, 1000) r"
        ),
    ] {
        filling.execute(AssertSqlSafe(sql)).await.unwrap();
    }
    let early = timeout(Duration::from_secs(5), store.audit().early_rows(org_id)).await;
    assert_eq!(early.expect("in no time").unwrap(), 9_000);
    store.close().await;
}
