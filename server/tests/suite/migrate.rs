//! `jobledger migrate`, and what servers do with a database that is not at their schema.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    process::{Output, Stdio},
    time::Duration,
};

use chrono::TimeDelta;
use jobledger_client::{
    Claim, Client, NewJob, Report,
    proto::{ClaimJobsRequest, ListJobsRequest, StreamJobEventsRequest},
};
use jobledger_server::domain::clock::{Clock as _, SystemClock};
use sqlx::{AssertSqlSafe, Executor as _};
use tokio::time::timeout;

use crate::{
    cluster::{self, OWNER},
    harness::{Database, PATIENCE, Program, TestServer, command},
};

fn run(arguments: &[&str], url: &str) -> (bool, String) {
    let Output { status, stdout, stderr } =
        command(arguments).env("JOBLEDGER_DATABASE_URL", url).output().expect("the program starts");
    let said = [stdout, stderr].concat();
    (status.success(), String::from_utf8(said).expect("it prints text"))
}

const MIGRATIONS: [&str; 9] = [
    "0001 ledger",
    "0002 labels_retention",
    "0003 workers",
    "0004 streams_statistics",
    "0005 reads",
    "0006 recent",
    "0007 access",
    "0008 lost_and_text",
    "0009 clock",
];

/// What `status` says where the first so many are applied.
fn applied(n: usize) -> String {
    let line = |(place, name): (usize, &&str)| format!("{name}: {}\n", if place < n { "applied" } else { "missing" });
    MIGRATIONS.iter().enumerate().map(line).collect()
}

/// Up, down and up again, as a person does it.
fn there_and_back(url: &str) {
    let status = || run(&["migrate", "status"], url).1;
    assert_eq!(status(), applied(0));
    let (refused, said) = run(&["serve", "--listen", "127.0.0.1:0", "--no-migrate"], url);
    assert!(!refused && said.contains(&format!("lacks the migrations {}", MIGRATIONS.join(", "))), "{said}");
    assert!(said.contains("jobledger migrate up"), "{said}");

    assert_eq!(run(&["migrate", "up"], url), (true, MIGRATIONS.map(|name| format!("applied {name}\n")).concat()));
    assert_eq!(run(&["migrate", "up"], url).1, "nothing to do: the database is up to date\n");
    assert_eq!(status(), applied(9));

    let (done, said) = run(&["migrate", "down", "--to", "3"], url);
    assert!(
        !done
            && said.contains(
                "undoing 0009 clock loses when a server last saw the clock\nundoing 0008 lost_and_text loses which attempts were lost"
            ) && said.contains(
                "undoing 0007 access loses every API token\nundoing 0006 recent loses nothing\nundoing 0005 reads loses nothing\nundoing 0004 streams_statistics loses what happened over time"
            ),
        "{said}"
    );
    assert!(said.contains("nothing was done: add --yes"), "{said}");
    assert!(run(&["migrate", "down", "--yes"], url).0);
    assert_eq!(status(), applied(8));
    let (done, said) = run(&["migrate", "down", "--to", "0", "--yes"], url);
    assert!(done && said.contains("loses every job") && said.ends_with("undone 0001 ledger\n"), "{said}");
    assert_eq!(run(&["migrate", "down", "--yes"], url).1, "nothing to do: no migration above 0 is applied\n");
    assert!(run(&["migrate", "up"], url).0);
}

#[test]
fn a_file_is_migrated_there_and_back() {
    let database = Database::sqlite();
    // A database without anything in it.
    std::fs::write(database.path(), "").unwrap();
    there_and_back(&database.url());
    let program = Program::start(&database);
    let (done, said) = run(&["migrate", "up"], &database.url());
    assert!(!done && said.contains("is in use by another jobledger server"), "{said}");
    drop(program);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_is_migrated_there_and_back_by_its_owner() {
    let cluster = cluster::shared().await;
    let name = cluster.create_empty_database("").await;
    there_and_back(&cluster.url(&name, OWNER));
    let newer = "INSERT INTO jobledger.migration SELECT 9999, 'newer', installed_on, success, checksum, 0 FROM jobledger.migration LIMIT 1";
    cluster.connect(&name, OWNER).await.execute(newer).await.unwrap();
    for arguments in [&["serve", "--listen", "127.0.0.1:0"][..], &["migrate", "up"], &["migrate", "down", "--yes"]] {
        let (done, said) = run(arguments, &cluster.url(&name, OWNER));
        assert!(!done && said.contains("9999") && said.contains("newer jobledger"), "{said}");
    }
    assert!(run(&["migrate", "status"], &cluster.url(&name, OWNER)).1.contains("9999 : applied by a newer jobledger"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_whose_database_a_newer_one_migrates_drains_and_says_why() {
    let database = Database::postgres().await;
    let arguments = ["--listen", "127.0.0.1:0", "--log", "error", "--database-url", &database.url()];
    let mut served = command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(served.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let client = Client::new(format!("http://{}", line.trim().strip_prefix("listening on ").unwrap())).unwrap();
    let mut events = client.raw().stream_job_events(StreamJobEventsRequest::default()).await.unwrap().into_inner();
    let newer = "INSERT INTO jobledger.migration SELECT 9999, 'newer', installed_on, success, checksum, 0 FROM jobledger.migration LIMIT 1";
    database.connect_as("postgres").await.execute(newer).await.unwrap();
    let ended = async {
        loop {
            if let Err(error) = events.message().await {
                return error;
            }
        }
    };
    let ended = timeout(PATIENCE, ended).await.expect("within seconds");
    assert_eq!(ended.code(), tonic::Code::Unavailable, "{ended:?}");
    let output = tokio::task::spawn_blocking(|| served.wait_with_output().unwrap()).await.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("jobledger: a newer jobledger has migrated the database"), "{said}");
    database.is_made_up();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_does_not_keep_unicode_is_refused_at_once() {
    let cluster = cluster::shared().await;
    for encoding in ["SQL_ASCII", "LATIN1"] {
        let how = format!("TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'");
        let url = cluster.url(&cluster.create_empty_database(&how).await, OWNER);
        for arguments in [
            &["serve", "--listen", "127.0.0.1:0"][..],
            &["migrate", "up"],
            &["token", "create", "--operator"],
            &["verify"],
        ] {
            let (done, said) = run(arguments, &url);
            assert!(!done && said.contains(encoding) && said.contains("ENCODING 'UTF8'"), "{arguments:?}: {said}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_start_at_once_on_an_empty_database_do_not_collide() {
    let cluster = cluster::shared().await;
    let name = cluster.create_empty_database("").await;
    let config = jobledger_server::Config::new(cluster.url(&name, OWNER).parse().unwrap());
    let starts: Vec<_> = (0..4).map(|_| tokio::spawn(TestServer::start(config.clone()))).collect();
    for start in starts {
        start.await.expect("each starts").stop().await;
    }
}

/// Undoes migrations and does them again, with the rights that serving takes.
async fn down_and_up(database: &Database, to: &[&str]) {
    let url = database.url_as(OWNER);
    let (done, said) = run(&[&["migrate", "down", "--yes"], to].concat(), &url);
    assert!(done, "{said}");
    let (done, said) = run(&["migrate", "up"], &url);
    assert!(done, "{said}");
    if database.is_postgres() {
        let sql = jobledger_server::store::postgres::role_sql(cluster::SERVER);
        database.connect_as("postgres").await.execute(AssertSqlSafe(sql)).await.expect("it may be run again");
    }
}

#[tokio::test]
async fn what_was_there_before_a_migration_is_there_after_it() {
    // Labels, due times and the order of creation are made anew from what the older schema has.
    for database in [Database::sqlite(), Database::postgres().await] {
        let (server, client) = TestServer::on(&database).await;
        let mut created = Vec::new();
        for n in 0..3 {
            let later = SystemClock.now() + TimeDelta::hours(1);
            let job = NewJob::new("t").label("k", "v").payload(&n).unwrap();
            let job = if n == 1 { job.scheduled_at(later) } else { job };
            created.push(client.create(job).await.unwrap().job.id);
        }
        server.stop().await;
        down_and_up(&database, &["--to", "2"]).await;
        let (server, client) = TestServer::on(&database).await;
        let mut service = client.raw();
        let labels = BTreeMap::from([("k".to_owned(), "v".to_owned())]);
        let list = ListJobsRequest { labels, ..Default::default() };
        let listed = service.list_jobs(list).await.unwrap().into_inner().jobs;
        created.reverse();
        assert_eq!(listed.iter().map(|job| &job.id).collect::<Vec<_>>(), created.iter().collect::<Vec<_>>());
        let claim = ClaimJobsRequest { worker_id: "w".to_owned(), max_jobs: 9, ..Default::default() };
        let leases = service.claim_jobs(claim).await.unwrap().into_inner().leases;
        let claimed: Vec<_> = leases.into_iter().map(|lease| lease.job.unwrap().id).collect();
        assert_eq!(claimed, [created[2].clone(), created[0].clone()], "one has its time still to come");
        server.stop().await;
        database.verify().await;
        // Undone, and done again, with batches that are not folded: a result, a lost attempt, and a bound of those.
        let (server, client) = TestServer::on(&database).await;
        let job = NewJob::new("u").max_lost_attempts(7).max_attempts(2);
        let lost = client.create(job).await.unwrap().job.id;
        let claim = Claim::new("w").types(["u"]).lease(Duration::from_secs(1)).wait(Duration::from_secs(60));
        client.claim(claim.clone()).await.unwrap();
        let lease = client.claim(claim).await.unwrap().remove(0);
        let result = serde_json::json!({"zero": -0.0, "text": "x".repeat(70_000), "id": [1, 2.5]});
        let report = Report::succeeded(&lost).lease(lease.lease_token).result(&result).unwrap();
        client.update(report).await.unwrap();
        let before = client.get(&lost).await.unwrap();
        assert_eq!((before.lost_attempts, before.max_lost_attempts), (1, 7));
        server.stop().await;
        down_and_up(&database, &["--to", "7"]).await;
        let (server, client) = TestServer::on(&database).await;
        let after = client.get(&lost).await.unwrap();
        assert_eq!((after.lost_attempts, after.max_lost_attempts, after.attempt), (0, 0, 2), "as `loses` says");
        assert_eq!(after.result, before.result);
        let fresh = client.create(NewJob::new("u")).await.unwrap().job;
        assert_eq!(fresh.max_lost_attempts, 3);
        server.stop().await;
        database.verify().await;
    }
}

#[tokio::test]
async fn the_printed_sql_makes_a_role_that_can_serve() {
    let cluster = cluster::shared().await;
    let name = cluster.create_database().await;
    let role = format!("{name}_role");
    let printed = command(&["migrate", "role-sql", "--role", &role]).output().unwrap();
    let sql = String::from_utf8(printed.stdout).unwrap();
    for _ in 0..2 {
        cluster
            .connect(&name, "postgres")
            .await
            .execute(AssertSqlSafe(sql.clone()))
            .await
            .expect("it may be run again");
    }
    let url = cluster.url(&name, &role);
    let mut config = jobledger_server::Config::new(url.parse().unwrap());
    (config.require_rls, config.migrate) = (true, false);
    let server = TestServer::start(config).await;
    server.client().create(NewJob::new("t")).await.unwrap();
    server.stop().await;
}
