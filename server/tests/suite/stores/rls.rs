//! Row-level security: what PostgreSQL enforces in addition, checked with the server's role.

use jobledger_client::NewJob;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _};
use uuid::Uuid;

use crate::{
    support::cluster::{OWNER, SERVER},
    support::harness::{Database, TestServer},
    support::program::command,
};

const TENANT_TABLES: [&str; 13] = [
    "org_head",
    "org_record",
    "org_counter",
    "org_series",
    "org_month",
    "job",
    "job_payload",
    "job_remains",
    "job_unblanked",
    "job_label",
    "job_event",
    "api_token",
    "api_token_use",
];

async fn count(connection: &mut PgConnection, table: &str) -> i64 {
    let sql = format!("SELECT count(*) FROM jobledger.{table}");
    connection.fetch_one(AssertSqlSafe(sql)).await.unwrap().get(0)
}

/// Makes two orgs with rows in every table.
async fn two_orgs(database: &Database) -> [Uuid; 2] {
    let (server, client) = TestServer::on(database).await;
    let orgs = [Uuid::new_v4(), Uuid::new_v4()];
    let url = database.url_as(OWNER);
    for org in orgs {
        let made = command(&["token", "create", "--role", "worker", "--org", &org.to_string()]);
        assert!({ made }.env("JOBLEDGER_DATABASE_URL", &url).output().unwrap().status.success());
        let client = jobledger_client::Client::builder(server.endpoint()).org(org).build().unwrap();
        for n in 0..3 {
            let job = NewJob::new("t").label("n", n.to_string()).payload(&"x".repeat(1_000)).unwrap();
            client.create(job).await.unwrap();
        }
    }
    drop(client);
    server.stop().await;
    let remains = "INSERT INTO jobledger.job_remains SELECT org_id, id, 0, now(), now() FROM jobledger.job";
    let mut everything = database.connect_as("postgres").await;
    everything.execute(remains).await.unwrap();
    let unblanked =
        "INSERT INTO jobledger.job_unblanked SELECT org_id, id, 0, 0, now(), now(), NULL FROM jobledger.job";
    everything.execute(unblanked).await.unwrap();
    let uses = "INSERT INTO jobledger.api_token_use SELECT org_id, digest, now() FROM jobledger.api_token";
    everything.execute(uses).await.unwrap();
    orgs
}

#[tokio::test]
async fn a_query_without_its_org_filter_still_sees_no_other_org() {
    let database = Database::postgres().await;
    let orgs = two_orgs(&database).await;
    let mut connection = database.connect_as(SERVER).await;
    for table in TENANT_TABLES {
        assert_eq!(count(&mut connection, table).await, 0, "{table}: nobody is named");
    }
    let mut everything = database.connect_as("postgres").await;
    for org in orgs {
        let mut transaction = connection.begin().await.unwrap();
        let set = format!("SELECT set_config('app.current_org_id', '{org}', true)");
        transaction.execute(AssertSqlSafe(set)).await.unwrap();
        for table in TENANT_TABLES {
            let all = count(&mut everything, table).await;
            let seen = count(&mut transaction, table).await;
            assert!(seen > 0 && seen * 2 == all, "{table}: {seen} of {all}");
            let foreign = format!("SELECT count(*) FROM jobledger.{table} WHERE org_id <> '{org}'");
            let foreign: i64 = transaction.fetch_one(AssertSqlSafe(foreign)).await.unwrap().get(0);
            assert_eq!(foreign, 0, "{table}");
        }
        let changed = transaction.execute("UPDATE jobledger.job SET priority = 1").await.unwrap().rows_affected();
        assert_eq!(changed, 3, "its own");
        transaction.commit().await.unwrap();
    }
    // The org is named only within its transaction.
    assert_eq!(count(&mut connection, "job").await, 0);
}

#[tokio::test]
async fn the_serving_role_can_neither_write_for_others_nor_go_around_the_parent_table() {
    let database = Database::postgres().await;
    let [ours, theirs] = two_orgs(&database).await;
    let mut connection = database.connect_as(SERVER).await;
    let partition: String = database
        .connect_as("postgres")
        .await
        .fetch_one("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'jobledger.job_event'::regclass LIMIT 1")
        .await
        .unwrap()
        .get(0);
    for (sql, expected) in [
        (format!("INSERT INTO jobledger.org_head (org_id) VALUES ('{}')", Uuid::new_v4()), "row-level security"),
        (format!("UPDATE jobledger.job SET org_id = '{theirs}'"), "row-level security"),
        (format!("INSERT INTO jobledger.job_label VALUES ('{theirs}', 'k', 'v', '{theirs}', 1)"), "row-level security"),
        (format!("INSERT INTO jobledger.api_token_use VALUES ('{theirs}', '\\x00', now())"), "row-level security"),
        ("UPDATE jobledger.api_token SET roles = 'admin'".to_owned(), "permission denied"),
        ("UPDATE jobledger.job_event SET kind = 'x'".to_owned(), "permission denied"),
        ("TRUNCATE jobledger.job".to_owned(), "permission denied"),
        (format!("SELECT count(*) FROM {partition}"), "permission denied"),
        ("ALTER TABLE jobledger.job DISABLE ROW LEVEL SECURITY".to_owned(), "must be owner"),
        ("INSERT INTO jobledger.migration SELECT * FROM jobledger.migration".to_owned(), "permission denied"),
    ] {
        let mut transaction = connection.begin().await.unwrap();
        let set = format!("SELECT set_config('app.current_org_id', '{ours}', true)");
        transaction.execute(AssertSqlSafe(set)).await.unwrap();
        let refused = transaction.execute(AssertSqlSafe(sql.clone())).await.expect_err(&sql).to_string();
        assert!(refused.contains(expected), "{sql}: {refused}");
    }
}

#[tokio::test]
async fn every_table_of_an_org_is_under_forced_row_level_security() {
    let database = Database::postgres().await;
    let sql = "SELECT c.relname::text, c.relrowsecurity AND c.relforcerowsecurity
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'org_id'
        WHERE c.relnamespace = 'jobledger'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition ORDER BY 1";
    let found = database.connect_as(SERVER).await.fetch_all(sql).await.unwrap();
    let mut tables = Vec::new();
    for row in found {
        let (table, is_forced): (String, bool) = (row.get(0), row.get(1));
        // `org_due` leads every server from org to org, so it has no row-level security.
        assert_eq!(is_forced, table != "org_due", "{table}");
        tables.push(table);
    }
    assert!(TENANT_TABLES.iter().all(|table| tables.iter().any(|found| found == table)), "{tables:?}");
}

#[tokio::test]
async fn a_role_that_is_above_row_level_security_is_warned_of_or_refused() {
    let database = Database::postgres().await;
    for (role, reason) in [("postgres", "is a superuser"), (OWNER, "owns the tables")] {
        let url = database.url_as(role);
        let arguments = ["--listen", "127.0.0.1:0", "--database-url", &url, "--require-rls"];
        let output = command(&arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(reason) && said.contains("role-sql"), "{said}");
    }
    let url = database.url_as(SERVER);
    let config = jobledger_server::Config { require_rls: true, ..jobledger_server::Config::new(url.parse().unwrap()) };
    TestServer::start(config).await.stop().await;
}
