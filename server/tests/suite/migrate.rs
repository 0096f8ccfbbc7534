//! `jobledger migrate`, and what servers do with a database that is not at their schema.

use std::process::Output;

use sqlx::{AssertSqlSafe, Executor as _};

use crate::{
    cluster::{self, OWNER},
    harness::{Database, Program, TestServer, command},
};

fn run(arguments: &[&str], url: &str) -> (bool, String) {
    let Output { status, stdout, stderr } =
        command(arguments).env("JOBLEDGER_DATABASE_URL", url).output().expect("the program starts");
    let said = [stdout, stderr].concat();
    (status.success(), String::from_utf8(said).expect("it prints text"))
}

/// Up, down and up again, as a person does it.
fn there_and_back(url: &str) {
    let status = || run(&["migrate", "status"], url).1;
    assert_eq!(status(), "0001 ledger: missing\n0002 labels_retention: missing\n");
    let (refused, said) = run(&["serve", "--listen", "127.0.0.1:0", "--no-migrate"], url);
    assert!(!refused && said.contains("lacks the migrations 0001 ledger, 0002 labels_retention"), "{said}");
    assert!(said.contains("jobledger migrate up"), "{said}");

    assert_eq!(run(&["migrate", "up"], url), (true, "applied 0001 ledger\napplied 0002 labels_retention\n".to_owned()));
    assert_eq!(run(&["migrate", "up"], url).1, "nothing to do: the database is up to date\n");
    assert_eq!(status(), "0001 ledger: applied\n0002 labels_retention: applied\n");

    let (done, said) = run(&["migrate", "down"], url);
    assert!(!done && said.contains("undoing 0002 labels_retention loses which labels"), "{said}");
    assert!(said.contains("nothing was done: add --yes"), "{said}");
    assert!(run(&["migrate", "down", "--yes"], url).0);
    assert_eq!(status(), "0001 ledger: applied\n0002 labels_retention: missing\n");
    let (done, said) = run(&["migrate", "down", "--to", "0", "--yes"], url);
    assert!(done && said.contains("loses every job") && said.ends_with("undone 0001 ledger\n"), "{said}");
    assert_eq!(run(&["migrate", "down", "--yes"], url).1, "nothing to do: no migration above 0 is applied\n");
    assert!(run(&["migrate", "up"], url).0);
}

#[test]
fn a_file_is_migrated_there_and_back() {
    let database = Database::sqlite();
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
async fn what_was_there_before_a_migration_is_there_after_it() {
    // Labels and due times are made anew from what the older schema has.
    let database = Database::postgres().await;
    let (server, client) = TestServer::on(&database).await;
    client.create(jobledger_client::NewJob::new("t").label("k", "v")).await.unwrap();
    server.stop().await;
    let url = database.url_as(OWNER);
    assert!(run(&["migrate", "down", "--yes"], &url).0);
    assert!(run(&["migrate", "up"], &url).0);
    let sql = "SELECT (SELECT count(*) FROM jobledger.job_label) + 10 * (SELECT count(*) FROM jobledger.org_due)";
    let found = database.connect_as("postgres").await.fetch_one(sql).await.unwrap();
    assert_eq!(sqlx::Row::get::<i64, _>(&found, 0), 11);
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
    server.client().create(jobledger_client::NewJob::new("t")).await.unwrap();
    server.stop().await;
}
