//! Batches of several orgs in one transaction.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use jobledger_client::NewJob;
use jobledger_server::{
    domain::{clock::Time, id::OrgId, job::Job, json::Json, status::JobStatus},
    ledger::{Command, JobReply, Ledger, LedgerError, Limits},
    store::{self, OpenOptions, Retention, Store},
};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, Row as _};
use tokio::{sync::oneshot, time::timeout};
use uuid::Uuid;

use crate::{
    stores::ledger::{created, new_job, poll_once, start},
    support::cluster::SERVER,
    support::factory::fill,
    support::harness::{Database, PATIENCE, TestServer, on_both_databases},
};

on_both_databases! {
    what_the_database_refuses_of_one_org_costs_no_other,
    orgs_share_a_transaction_and_retention_has_one_to_itself,
}

/// A store with one transaction at a time, so that commands gather while it is open.
async fn one_at_a_time(database: &Database) -> Arc<dyn Store> {
    let config = database.config();
    store::open(&config.database_url, OpenOptions { write_connections: 1, ..config.open_options() }).await.unwrap()
}

type Answer = oneshot::Receiver<Result<JobReply, LedgerError>>;

/// Submits a create, which enters its org's lane at once.
fn submit(ledger: &Ledger, org: OrgId, job_type: &str) -> Answer {
    crate::stores::ledger::submit(ledger, org, Command::Create(new_job(job_type, None, None)))
}

async fn job(answer: Answer) -> Job {
    created(timeout(PATIENCE, answer).await.expect("it is answered").unwrap())
}

/// Creates a job in each of `n` orgs, so that each has a log.
async fn orgs_of(ledger: &Ledger, n: u128) -> Vec<OrgId> {
    let orgs: Vec<_> = (1..=n).map(|n| OrgId(Uuid::from_u128(n))).collect();
    for org in &orgs {
        job(submit(ledger, *org, "t")).await;
    }
    orgs
}

async fn what_the_database_refuses_of_one_org_costs_no_other(database: Database) {
    let store = one_at_a_time(&database).await;
    database.refuse_jobs_of_type("poison").await;
    let ledger = start(&store, Limits::default());
    let orgs = orgs_of(&ledger, 5).await;
    let held = store.begin(&orgs[..1]).await.unwrap();
    let answers: Vec<_> = orgs.iter().flat_map(|org| ["a", "poison", "b"].map(|name| (*org, name))).collect();
    let answers: Vec<_> = answers
        .into_iter()
        .filter(|(org, name)| *name != "poison" || *org == orgs[2])
        .map(|(org, name)| (name, submit(&ledger, org, name)))
        .collect();
    drop(held);
    for (name, answer) in answers {
        let answer = timeout(PATIENCE, answer).await.expect("it is answered").unwrap();
        match name {
            "poison" => assert_eq!(answer.unwrap_err(), LedgerError::Refused),
            _ => _ = created(answer),
        }
    }
    for org in orgs {
        assert_eq!(store.reaches(&[org]).await.unwrap()[0].1.seq, 3);
    }
    store.close().await;
}

async fn orgs_share_a_transaction_and_retention_has_one_to_itself(database: Database) {
    // Made by another ledger: in this one, on a slow disk, an org rests after a turn of its own.
    let before = one_at_a_time(&database).await;
    let orgs = orgs_of(&start(&before, Limits::default()), 6).await;
    before.close().await;
    let store = one_at_a_time(&database).await;
    let ledger = start(&store, Limits::default());
    let held = store.begin(&orgs[..1]).await.unwrap();
    // The writer takes this command and waits for the connection. Later commands gather.
    let first = submit(&ledger, orgs[0], "t");
    let is_taken = async {
        while ledger.stalled_for() > Duration::ZERO {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, is_taken).await.expect("it is taken");
    let mut retention = Retention::default();
    retention.set(JobStatus::Succeeded, Duration::from_secs(60));
    let mut answers = Vec::new();
    for org in &orgs[1..] {
        answers.push(submit(&ledger, *org, "t"));
        if *org == orgs[3] {
            let (ledger, org) = (ledger.clone(), *org);
            let mut retain = Box::pin(async move { ledger.retain(org, retention).await });
            assert!(poll_once(&mut retain).is_pending(), "it is in its lane");
            tokio::spawn(retain);
        }
    }
    drop(held);
    job(first).await;
    // Each transaction reads the clock once, so equal times mean the same transaction.
    let mut at: Vec<Time> = Vec::new();
    for answer in answers {
        at.push(job(answer).await.created_at);
    }
    assert!(at[0] == at[1] && at[3] == at[4], "others share one: {at:?}");
    assert_eq!(at.iter().filter(|other| **other == at[2]).count(), 1, "retention shares one: {at:?}");
    store.close().await;
}

/// A transaction on several orgs takes the heads that are free. It waits for none that is locked elsewhere, and makes
/// none for an org without a log.
#[tokio::test]
async fn of_several_heads_those_that_are_free_are_held() {
    let database = Database::postgres().await;
    let (ours, theirs) = (database.open().await, database.open().await);
    let orgs: Vec<_> = (1..=4).map(|n| OrgId(Uuid::from_u128(n))).collect();
    for org in &orgs[..3] {
        fill(&*ours, *org, "t", 1).await;
    }
    let held = theirs.begin(&orgs[1..2]).await.unwrap();
    let batch = timeout(Duration::from_secs(4), ours.begin(&orgs)).await.expect("it does not wait").unwrap();
    let expected = BTreeSet::from([&orgs[0], &orgs[2]]);
    assert_eq!(batch.orgs().iter().collect::<BTreeSet<_>>(), expected);
    drop(held);
    let nobody = timeout(Duration::from_secs(4), theirs.begin(&[orgs[0], orgs[2]])).await.unwrap().unwrap();
    assert!(nobody.orgs().is_empty());
    drop((batch, nobody));
    assert_eq!(ours.orgs(None, 10).await.unwrap().len(), 3, "no row was made for one without a log");
}

/// An org whose head another server has locked goes on as soon as the head is free, and delays no other org for longer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_org_whose_head_is_held_elsewhere_waits_alone() {
    let database = Database::postgres().await;
    let (ours, theirs) = (one_at_a_time(&database).await, database.open().await);
    let ledger = start(&ours, Limits::default());
    let orgs = orgs_of(&ledger, 20).await;
    let held = theirs.begin(&orgs[9..10]).await.unwrap();
    let mut waiting = submit(&ledger, orgs[9], "t");
    let others: Vec<_> = orgs.iter().filter(|org| **org != orgs[9]).map(|org| submit(&ledger, *org, "t")).collect();
    // The only connection waits for that head, so later commands wait, too, but not for longer than the head is locked.
    let early = timeout(Duration::from_millis(300), &mut waiting).await;
    assert!(early.is_err(), "it was written beside its head's holder");
    drop(held);
    job(waiting).await;
    for other in others {
        job(other).await;
    }
    ours.close().await;
    theirs.close().await;
    database.verify().await;
}

/// Orgs whose heads are locked elsewhere wait for them, and take none of the transactions that other orgs share.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_that_are_held_elsewhere_keep_no_other_org_waiting() {
    let database = Database::postgres().await;
    let (ours, theirs) = (database.open().await, database.open().await);
    let ledger = start(&ours, Limits::default());
    let orgs = orgs_of(&ledger, 8).await;
    let mut held = Vec::new();
    for org in &orgs[..4] {
        held.push(theirs.begin(&[*org]).await.unwrap());
    }
    let mut waiting = Vec::new();
    let mut everything = database.connect_as("postgres").await;
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    for (org, other) in orgs[..4].iter().zip(&orgs[4..]) {
        waiting.push(submit(&ledger, *org, "t"));
        // By then the first org waits in a transaction of its own, which the second can't share.
        let is_waiting =
            async { while everything.fetch_one(waits).await.unwrap().get::<i64, _>(0) < waiting.len() as i64 {} };
        timeout(PATIENCE, is_waiting).await.expect("it waits for the head");
        // Far less than a transaction waits for a head before it is given up.
        timeout(Duration::from_secs(2), job(submit(&ledger, *other, "t"))).await.expect("its head is free");
    }
    drop(held);
    for answer in waiting {
        job(answer).await;
    }
    ours.close().await;
    theirs.close().await;
    database.verify().await;
}

/// Every row that a shared transaction writes has the org of its lane. Otherwise one org could see another's data. The
/// jobs name their org in types, labels and payloads, so a mixed-up row shows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_row_of_a_shared_transaction_is_of_its_lane() {
    let database = Database::postgres().await;
    let store = one_at_a_time(&database).await;
    let ledger = start(&store, Limits::default());
    let orgs = orgs_of(&ledger, 64).await;
    let mut answers = Vec::new();
    for org in &orgs {
        for _ in 0..3 {
            let mut create = new_job(&org.0.to_string(), Some(Json::from_trusted(format!("\"{}\"", org.0))), None);
            let spec = Arc::make_mut(&mut create.spec);
            spec.labels = Arc::new([("org".to_owned(), org.0.to_string())].into());
            spec.payload_bytes = 40;
            answers.push(crate::stores::ledger::submit(&ledger, *org, Command::Create(create)));
        }
    }
    let mut transactions = BTreeSet::new();
    for answer in answers {
        transactions.insert(job(answer).await.created_at);
    }
    assert!(transactions.len() < 64, "{} transactions for 192 jobs of 64 orgs", transactions.len());
    store.close().await;
    let mut everything = database.connect_as("postgres").await;
    for (table, whose) in [
        ("job", "type"),
        ("job", "labels ->> 'org'"),
        ("job_event", "job_type"),
        ("job_event", "payload::jsonb #>> '{}'"),
        ("job_label", "value"),
        ("org_counter", "type"),
        ("org_series", "type"),
    ] {
        let sql = format!(
            "SELECT count(*), count(*) FILTER (WHERE {whose} <> org_id::text) FROM jobledger.{table} WHERE {whose} <> 't'"
        );
        let row = everything.fetch_one(AssertSqlSafe(sql)).await.unwrap();
        assert!(row.get::<i64, _>(0) >= 64 || table.starts_with("org_"), "{table}");
        assert_eq!(row.get::<i64, _>(1), 0, "{table}.{whose}");
    }
    database.verify().await;
}

/// A transaction that names several orgs sees and writes these, and no others.
#[tokio::test]
async fn a_transaction_on_several_orgs_is_held_to_them() {
    let database = Database::postgres().await;
    let (server, _) = TestServer::on(&database).await;
    let orgs: Vec<_> = (1..=3).map(Uuid::from_u128).collect();
    for org in &orgs {
        let client = jobledger_client::Client::builder(server.endpoint()).org(*org).build().unwrap();
        client.create(NewJob::new("t")).await.unwrap();
    }
    server.stop().await;
    let mut connection = database.connect_as(SERVER).await;
    let named = format!("SELECT jobledger.name_orgs('{{{},{}}}')", orgs[0], orgs[1]);
    let mut transaction = connection.begin().await.unwrap();
    transaction.execute(AssertSqlSafe(named.clone())).await.unwrap();
    for table in ["org_head", "org_record", "org_counter", "job", "job_event"] {
        let sql = format!("SELECT count(*), count(*) FILTER (WHERE org_id = '{}') FROM jobledger.{table}", orgs[2]);
        let row = transaction.fetch_one(AssertSqlSafe(sql)).await.unwrap();
        assert_eq!((row.get::<i64, _>(0), row.get::<i64, _>(1)), (2, 0), "{table}");
    }
    let theirs = format!("INSERT INTO jobledger.org_head (org_id) VALUES ('{}')", Uuid::new_v4());
    let refused = transaction.execute(AssertSqlSafe(theirs)).await.unwrap_err().to_string();
    assert!(refused.contains("row-level security"), "{refused}");
    drop(transaction);
    // The names end with their transaction.
    let left = connection.fetch_one("SELECT count(*) FROM jobledger.job").await.unwrap();
    assert_eq!(left.get::<i64, _>(0), 0);
}
