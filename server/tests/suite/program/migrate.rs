//! `jobledger migrate`, and what servers do with a database that is not at their schema.

use std::{
    io::{BufRead as _, BufReader},
    process::{Output, Stdio},
    time::Duration,
};

use jobledger_client::{
    BulkAction, Claim, Client, Error, Follow, Item, NewJob, Report,
    proto::{StartBulkOperationRequest, StreamJobEventsRequest},
};
use serde_json::json;
use sqlx::{AssertSqlSafe, Executor as _};
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    jobs::bulk::ended,
    stores::retention::rows,
    support::cluster::{self, OWNER, SERVER},
    support::harness::{Database, PATIENCE, TestServer},
    support::program::{Program, command},
    work::leases::keep,
};

fn run(arguments: &[&str], url: &str) -> (bool, String) {
    let Output { status, stdout, stderr } =
        command(arguments).env("JOBLEDGER_DATABASE_URL", url).output().expect("the program starts");
    let said = [stdout, stderr].concat();
    (status.success(), String::from_utf8(said).expect("it prints text"))
}

const MIGRATIONS: [&str; 11] = [
    "0001 ledger",
    "0002 small_payloads",
    "0003 running_in_log",
    "0004 quotas",
    "0005 token_use",
    "0006 org_events",
    "0007 bulk_operations",
    "0008 workers",
    "0009 revoked_tokens",
    "0010 edits",
    "0011 erasures",
];
const FUNCTIONS: &str = "functions 14";

/// The steps that such a database needs, in their order.
fn steps(is_postgres: bool) -> Vec<&'static str> {
    MIGRATIONS.into_iter().chain(is_postgres.then_some(FUNCTIONS)).collect()
}

/// The output of `status` if the first `n` steps are applied.
fn applied(steps: &[&str], n: usize) -> String {
    let line = |(place, name): (usize, &&str)| format!("{name}: {}\n", if place < n { "applied" } else { "missing" });
    steps.iter().enumerate().map(line).collect()
}

/// What the program prints before it undoes a step.
fn undoing(step: &str) -> String {
    let loses = match step {
        "0005 token_use" => "when each API token was last used",
        "0006 org_events" => {
            "descriptions and pauses of types, and the log's events about them; cursors from before the last of these expire"
        }
        "0007 bulk_operations" => {
            "bulk operations, and with them those that are under way; the log's events about them; cursors from before the last of these expire"
        }
        "0008 workers" => "which workers were heard of lately",
        _ => "nothing",
    };
    format!("undoing {step} loses {loses}\n")
}

/// Migrates up, down and up again, as a person does it.
fn there_and_back(url: &str, steps: &[&str]) {
    let status = || run(&["migrate", "status"], url).1;
    assert_eq!(status(), applied(steps, 0));
    let (refused, said) = run(&["serve", "--listen", "127.0.0.1:0", "--no-migrate"], url);
    assert!(!refused && said.contains(&format!("the database lacks {}", steps.join(", "))), "{said}");
    assert!(said.contains("jobledger migrate up"), "{said}");

    assert_eq!(run(&["migrate", "up"], url), (true, steps.iter().map(|name| format!("applied {name}\n")).collect()));
    assert_eq!(run(&["migrate", "up"], url).1, "nothing to do: the database is up to date\n");
    assert_eq!(status(), applied(steps, steps.len()));

    let (done, said) = run(&["migrate", "down", "--to", "0"], url);
    let undoing: String = MIGRATIONS[1..].iter().rev().map(|step| undoing(step)).collect();
    assert!(!done && said.starts_with(&(undoing + "undoing 0001 ledger loses every job")), "{said}");
    assert!(said.contains("nothing was changed: add --yes"), "{said}");
    assert_eq!(status(), applied(steps, steps.len()));
    let (done, said) = run(&["migrate", "down", "--to", "0", "--yes"], url);
    assert!(done && said.contains("loses every job") && said.ends_with("undone 0001 ledger\n"), "{said}");
    assert_eq!(run(&["migrate", "down", "--yes"], url).1, "nothing to do: no migration above 0 is applied\n");
    assert!(run(&["migrate", "up"], url).0);
}

#[test]
fn a_file_is_migrated_there_and_back() {
    let database = Database::sqlite();
    // An empty file is a database without tables.
    std::fs::write(database.path(), "").unwrap();
    there_and_back(&database.url(), &steps(false));
    let program = Program::start(&database);
    let (done, said) = run(&["migrate", "up"], &database.url());
    assert!(!done && said.contains("is in use by another jobledger server"), "{said}");
    drop(program);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_is_migrated_there_and_back_by_its_owner() {
    let cluster = cluster::shared().await;
    let name = cluster.create_empty_database("").await;
    there_and_back(&cluster.url(&name, OWNER), &steps(true));
    let newer = "INSERT INTO jobledger.migration SELECT 9999, 'newer', installed_on, success, checksum, 0 FROM jobledger.migration LIMIT 1";
    cluster.connect(&name, OWNER).await.execute(newer).await.unwrap();
    for arguments in [&["serve", "--listen", "127.0.0.1:0"][..], &["migrate", "up"], &["migrate", "down", "--yes"]] {
        let (done, said) = run(arguments, &cluster.url(&name, OWNER));
        assert!(!done && said.contains("9999") && said.contains("newer jobledger"), "{said}");
    }
    assert!(run(&["migrate", "status"], &cluster.url(&name, OWNER)).1.contains("9999: applied by a newer jobledger"));
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

#[tokio::test]
async fn functions_are_put_in_place_again_when_they_have_changed() {
    let database = Database::postgres().await;
    let (url, mut owner) = (database.url_as(OWNER), database.connect_as(OWNER).await);
    // As an older program would have left them: one function is missing, and another one uses a row type.
    let older = "UPDATE jobledger.ledger SET functions = 0;
        DROP FUNCTION jobledger.read_jobs(uuid[], integer[], uuid[], integer);
        CREATE FUNCTION jobledger.dead() RETURNS SETOF jobledger.found_job LANGUAGE sql AS 'SELECT * FROM jobledger.found_job'";
    sqlx::raw_sql(older).execute(&mut owner).await.unwrap();
    let (served, said) = run(&["serve", "--listen", "127.0.0.1:0", "--no-migrate"], &url);
    assert!(!served && said.contains("the database lacks functions 14: run `jobledger migrate up`"), "{said}");
    assert_eq!(run(&["migrate", "up"], &url), (true, "applied functions 14\n".to_owned()));
    let is_there = "SELECT to_regproc('jobledger.dead') IS NULL AND to_regproc('jobledger.read_jobs') IS NOT NULL";
    assert!(sqlx::query_scalar::<_, bool>(is_there).fetch_one(&mut owner).await.unwrap());
    // The server's role can still serve: no grant was lost.
    let (server, client) = TestServer::on(&database).await;
    client.create(NewJob::new("t")).await.unwrap();
    server.stop().await;
    database.verify().await;

    for (change, expected) in [
        ("functions_digest = '\\x00'", "functions 14 in the database differs"),
        ("functions = functions + 1", "the database has functions 15, which this program doesn't know"),
    ] {
        owner.execute(AssertSqlSafe(format!("UPDATE jobledger.ledger SET {change}"))).await.unwrap();
        for arguments in [&["serve", "--listen", "127.0.0.1:0"][..], &["migrate", "up"], &["migrate", "down", "--yes"]]
        {
            let (done, said) = run(arguments, &url);
            assert!(!done && said.contains(expected), "{arguments:?}: {said}");
        }
    }
    database.is_made_up();
}

#[tokio::test]
async fn what_was_there_before_a_migration_is_there_after_it() {
    for database in [Database::sqlite(), Database::postgres().await] {
        let mut config = database.config();
        config.fold_after = Duration::ZERO;
        let server = TestServer::start(config).await;
        let client =
            |server: &TestServer, org| Client::builder(server.endpoint()).org(Uuid::from_u128(org)).build().unwrap();
        let mut created = Vec::new();
        for (org, text) in [(1, "small"), (2, &*"x".repeat(2_000)), (2, "\u{1f980}")] {
            let payload = json!({ "text": text, "zero": -0.0 });
            let job = NewJob::new("t").payload(&payload).unwrap();
            let client = client(&server, org);
            let id = client.create(job).await.unwrap().job.id;
            created.push((org, client.get(&id).await.unwrap()));
        }
        let mut running = Vec::new();
        for (org, is_folded) in [(3, false), (4, true), (5, false), (6, true)] {
            let working = client(&server, org);
            let id = working.create(NewJob::new("t").run_timeout(Duration::from_secs(3_600))).await.unwrap().job.id;
            let leases = working.claim(Claim::new("w")).await.unwrap();
            if is_folded {
                working.create(NewJob::new("u")).await.unwrap();
            }
            if org > 4 {
                // The end of org 6's lease is in an image, that of org 5's in a batch record.
                keep(&working, &leases, 1_000).await;
            }
            working
                .update(Report::progress(&id).lease(&leases[0].lease_token).stage("on it").percent(40))
                .await
                .unwrap();
            if org == 5 {
                keep(&working, &leases, 2_000).await;
            }
            running.push((org, working.get(&id).await.unwrap()));
        }
        let ends = client(&server, 7);
        let ended = ends.create(NewJob::new("t")).await.unwrap().job.id;
        ends.update(Report::start(&ended)).await.unwrap();
        ends.update(Report::succeeded(&ended).result(&"y".repeat(2_000)).unwrap()).await.unwrap();
        let before = ends.get(&ended).await.unwrap();
        running.push((7, before));
        server.stop().await;
        assert_eq!(rows(&database, "job_payload").await, 1, "the others lie with their events");

        // What an older program finds.
        let url = database.url_as(OWNER);
        let (done, said) = run(&["migrate", "down", "--to", "1", "--yes"], &url);
        let undone = [
            "0011 erasures",
            "0010 edits",
            "0009 revoked_tokens",
            "0008 workers",
            "0007 bulk_operations",
            "0006 org_events",
            "0005 token_use",
            "0004 quotas",
            "0003 running_in_log",
            "0002 small_payloads",
        ];
        let lines = |what: fn(&str) -> String| undone.map(what).concat();
        let expected = lines(undoing) + &lines(|name| format!("undone {name}\n"));
        assert!(done && said == expected, "{said}");
        assert_eq!(rows(&database, "job_payload").await, 3);
        let as_they_are = "job WHERE status = 'running' AND lease_worker = 'w' AND last_job_seq = 3";
        assert_eq!(rows(&database, as_they_are).await, 4);
        // Nobody has rights on a new table yet.
        let grant = database.is_postgres().then_some(["--grant", SERVER]);
        let (done, said) =
            run(&[&["migrate", "up"][..], grant.as_ref().map_or(&[], |grant| &grant[..])].concat(), &url);
        assert!(done && said.starts_with("applied 0002 small_payloads\n"), "{said}");
        let granted = format!("granted {SERVER} the rights that serving needs\n");
        assert_eq!(said.ends_with(&granted), database.is_postgres(), "{said}");
        if !database.is_postgres() {
            let (done, said) = run(&["migrate", "up", "--grant", SERVER], &url);
            assert!(!done && said.contains("SQLite has no roles"), "{said}");
        }

        let (server, _) = TestServer::on(&database).await;
        for (org, before) in &running {
            assert_eq!(client(&server, *org).get(&before.id).await.unwrap(), *before);
        }
        let mut events = client(&server, 7).subscribe(Follow::org().after(0).history_only()).await.unwrap();
        let mut results = 0;
        while let Some(item) = events.next().await {
            results += usize::from(matches!(item.unwrap(), Item::Event(event) if event.result.is_some()));
        }
        assert_eq!(results, 1, "a large one, too");
        for (org, before) in &created {
            let client = client(&server, *org);
            assert_eq!(client.get(&before.id).await.unwrap(), *before);
            let claimed = client.claim(Claim::new("w")).await.unwrap().remove(0).job.unwrap();
            assert_eq!((&claimed.id, &claimed.payload), (&before.id, &before.payload));
            client.create(NewJob::new("u").payload(&json!("after")).unwrap()).await.unwrap();
        }
        server.stop().await;
        assert_eq!(rows(&database, "job_payload").await, 3, "what is new lies with its event");
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_bulk_operations_the_log_has_none_of_their_events() {
    for database in [Database::sqlite(), Database::postgres().await] {
        let (server, client) = TestServer::on(&database).await;
        client.create(NewJob::new("t")).await.unwrap();
        client.describe("t", "what it does").await.unwrap();
        let operation = StartBulkOperationRequest {
            action: BulkAction::Cancel.into(),
            expected_count: Some(1),
            ..StartBulkOperationRequest::default()
        };
        let started = client.start_bulk(operation).await.unwrap();
        ended(&client, &started.id).await;
        server.stop().await;
        assert_eq!(rows(&database, "org_event").await, 3);
        let url = database.url_as(OWNER);
        let (done, said) = run(&["migrate", "down", "--to", "6", "--yes"], &url);
        assert!(done, "{said}");
        assert_eq!(rows(&database, "org_event").await, 1, "the description");
        let grant: &[&str] = if database.is_postgres() { &["--grant", SERVER] } else { &[] };
        let (done, said) = run(&[&["migrate", "up"], grant].concat(), &url);
        assert!(done, "{said}");
        database.verify().await;
        let (server, client) = TestServer::on(&database).await;
        let refused = client.subscribe(Follow::org().after(1).history_only()).await.err();
        assert!(matches!(refused, Some(Error::CursorExpired { .. })), "{refused:?}");
        let job = client.create(NewJob::new("t")).await.unwrap().job;
        assert_eq!(client.get(&job.id).await.unwrap(), job);
        server.stop().await;
    }
}
