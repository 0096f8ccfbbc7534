//! The import of the old service's jobs.

use std::{
    collections::{BTreeMap, HashMap},
    process::{Output, Stdio},
};

use jobledger_client::{Client, Error, Follow, Item, Job, JobEvent, JobEventKind, JobStatus, NewJob, proto as v1};
use serde_json::Value;
use tempfile::TempDir;
use uuid::Uuid;

use crate::{
    legacy::database::LegacyDatabase,
    legacy::import_again::{DONE, RUNNING, kinds, three_jobs},
    legacy::rows::{Expected, expected, found},
    support::harness::{Database, TestServer, on_both_databases, short_or_long},
    support::program::command,
};

on_both_databases! {
    every_row_is_brought_in_as_it_was_or_refused_with_a_reason,
    a_row_without_events_tells_its_story_once,
    every_way_through_the_tables_leads_to_the_same,
    a_job_with_too_much_of_a_past_comes_with_the_last_of_it,
    a_key_that_was_brought_in_dedups_its_type,
    an_import_that_was_killed_goes_on_to_the_same_end,
    a_dry_run_says_what_would_be_and_writes_nothing,
    rows_of_both_tables_are_taken_once,
    a_row_that_cannot_be_read_keeps_no_other_from_coming,
}

/// A run of `jobledger import`.
pub(crate) struct Run {
    pub(crate) output: Output,
    /// The reported lines: rows that were refused or adjusted.
    pub(crate) reported: Vec<Value>,
}

impl Run {
    pub(crate) fn code(&self) -> i32 {
        self.output.status.code().expect("it ended by itself")
    }

    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    /// The numbers in the line of a status: source, ledger, ahead, refused, difference.
    pub(crate) fn line(&self, name: &str) -> Vec<i64> {
        let said = self.said();
        let line = said.lines().find(|line| line.split_whitespace().next() == Some(name));
        let line = line.unwrap_or_else(|| panic!("no line for {name} in:\n{said}"));
        line.split_whitespace().skip(1).take(5).map(|number| number.parse().expect("a number")).collect()
    }

    /// The ledger's own count of all jobs.
    pub(crate) fn counted(&self) -> i64 {
        let said = self.said();
        let last = said.lines().find(|line| line.starts_with("all ")).expect("a line for all");
        last.split_whitespace().last().and_then(|number| number.parse().ok()).expect("a number")
    }

    pub(crate) fn refused(&self) -> HashMap<String, String> {
        let refused = self.reported.iter().filter(|line| line["verdict"] == "refused");
        refused.map(|line| (text(&line["id"]), text(&line["reasons"][0]))).collect()
    }
}

pub(crate) fn text(value: &Value) -> String {
    value.as_str().expect("a text").to_owned()
}

/// Imports into a database, while servers may write to it.
pub(crate) fn import(legacy: &LegacyDatabase, database: &Database, more: &[&str]) -> Run {
    let folder = TempDir::new().expect("a temporary directory");
    let refused = folder.path().join("refused.jsonl");
    let (from, url, path) = (legacy.url(), database.url(), refused.display().to_string());
    let mut arguments = vec!["import", "--from", &from, "--database-url", &url, "--refused", &path];
    arguments.extend(more);
    let output = command(&arguments).output().expect("the program starts");
    let lines = std::fs::read_to_string(&refused).unwrap_or_default();
    let reported = lines.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    let run = Run { output, reported };
    assert!(run.code() < 2, "{}", String::from_utf8_lossy(&run.output.stderr));
    run
}

pub(crate) const ORGS: [Uuid; 4] = [Uuid::from_u128(0), Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3)];

fn client_of(server: &TestServer, org: Uuid) -> Client {
    Client::builder(server.endpoint()).org(org).build().expect("a valid endpoint")
}

/// All jobs of all orgs with payloads and results, by id, and the heads of the logs.
pub(crate) async fn everything(database: &Database) -> (BTreeMap<String, Job>, Vec<i64>) {
    let (server, _) = TestServer::on(database).await;
    let (mut jobs, mut heads) = (BTreeMap::new(), Vec::new());
    for org in ORGS {
        let mut raw = client_of(&server, org).raw();
        let mut request =
            v1::ListJobsRequest { page_size: 1_000, view: v1::JobView::Full.into(), ..Default::default() };
        loop {
            let page = raw.list_jobs(request.clone()).await.unwrap().into_inner();
            jobs.extend(page.jobs.into_iter().map(|job| (job.id.clone(), job)));
            if page.next_page_token.is_empty() {
                heads.push(page.as_of_seq);
                break;
            }
            request.page_token = page.next_page_token;
        }
    }
    server.stop().await;
    (jobs, heads)
}

pub(crate) async fn history(client: &Client, id: &str) -> Vec<JobEvent> {
    let mut events = client.subscribe(Follow::job(id).history_only()).await.unwrap();
    let mut history = Vec::new();
    while let Some(item) = events.next().await {
        if let Item::Event(event) = item.unwrap() {
            history.push(*event);
        }
    }
    history
}

async fn every_row_is_brought_in_as_it_was_or_refused_with_a_reason(database: Database) {
    let n = short_or_long(1_500, 200_000);
    let legacy = LegacyDatabase::with_rows(n).await;
    let first = import(&legacy, &database, &[]);
    println!("{}", first.said());
    assert_eq!(first.code(), 1, "some were refused");

    let (jobs, heads) = everything(&database).await;
    let expected = expected(&legacy).await;
    assert_eq!(jobs.len(), expected.len());
    for (id, job) in &jobs {
        assert_eq!(Some(&found(job)), expected.get(id), "{id}");
    }
    // Each row is in the ledger, or a reason is reported.
    let refused = first.refused();
    assert_eq!(refused.len() + jobs.len(), 2 * n);
    let mut reasons: Vec<_> = refused.values().map(|reason| reason.split("used by").next().unwrap()).collect();
    reasons.sort_unstable();
    reasons.dedup();
    assert_eq!(reasons, ["it has no status", "its idempotency_key is already ", "its status \"archived\" is unknown"]);
    assert!(refused.values().any(|reason| reason.contains("already used by")));
    let [source, ledger, ahead, refused_rows, difference] = first.line("all")[..] else { panic!("{}", first.said()) };
    assert_eq!((source, ledger, ahead, difference), (2 * n as i64, jobs.len() as i64, 0, 0));
    assert_eq!(refused_rows, refused.len() as i64);
    assert_eq!(first.counted(), jobs.len() as i64);
    for status in JobStatus::Queued as i32..=JobStatus::DeadLetter as i32 {
        let status = JobStatus::try_from(status).unwrap();
        let name = status.as_str_name().trim_start_matches("JOB_STATUS_").to_lowercase();
        let of_status = jobs.values().filter(|job| job.status() == status).count();
        assert_eq!(first.line(&name)[1], of_status as i64, "{name}");
        assert_eq!(first.line(&name)[4], 0, "{name}");
    }
    // An adjusted row is reported with everything that it had.
    let adjusted = first.reported.iter().find(|line| line["reasons"][0] == "progress was 250").expect("there are some");
    assert_eq!(
        (adjusted["verdict"].as_str(), adjusted["row"]["id"].clone()),
        (Some("adjusted"), adjusted["id"].clone())
    );

    let second = import(&legacy, &database, &[]);
    assert!(second.said().contains(" 0 new, 0 updated,"), "{}", second.said());
    assert_eq!(second.line("all"), first.line("all"));
    assert_eq!(everything(&database).await, (jobs, heads), "a second run changes nothing");
}

async fn a_dry_run_says_what_would_be_and_writes_nothing(database: Database) {
    let legacy = LegacyDatabase::with_rows(500).await;
    let dry = import(&legacy, &database, &["--dry-run"]);
    if database.is_postgres() {
        assert_eq!(count_jobs(&database).await, 0);
    } else {
        assert!(!database.path().exists(), "not even a file");
    }
    let real = import(&legacy, &database, &[]);
    assert_eq!((dry.line("all"), dry.refused()), (real.line("all"), real.refused()));
    for (id, reason) in dry.refused() {
        assert!(dry.said().contains(&format!("{id}: {reason}")), "{}", dry.said());
    }
    // A dry run also works on an existing ledger.
    let (_, heads) = everything(&database).await;
    legacy.run("UPDATE jobs SET status = 'failed', updated_at = now() WHERE status = 'pending'").await;
    legacy.run("INSERT INTO jobs (id, status) VALUES (gen_random_uuid(), 'completed')").await;
    let dry = import(&legacy, &database, &["--dry-run"]);
    assert_eq!(everything(&database).await.1, heads);
    let real = import(&legacy, &database, &[]);
    let counts = |run: &Run| {
        run.said()
            .lines()
            .find(|line| line.contains(" rows: "))
            .unwrap()
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|n| n.parse().ok())
            .collect::<Vec<u32>>()
    };
    assert_eq!(counts(&dry), counts(&real));
    assert_eq!(counts(&real)[1], 1, "one is new: {}", real.said());
    assert!(counts(&real)[2] > 50, "and some have changed: {}", real.said());
}

async fn an_import_that_was_killed_goes_on_to_the_same_end(database: Database) {
    let n = short_or_long(4_000, 200_000);
    let legacy = LegacyDatabase::with_rows(n).await;
    let whole = if database.is_postgres() { Database::postgres().await } else { Database::sqlite() };
    import(&legacy, &whole, &[]);
    // A server creates the ledger, so that its jobs can be counted from the start.
    TestServer::on(&database).await.0.stop().await;
    let mut kills = 0;
    for share in [10, 4, 2] {
        let folder = TempDir::new().unwrap();
        let (from, url, path) = (legacy.url(), database.url(), folder.path().join("r.jsonl").display().to_string());
        let mut process = command(&["import", "--from", &from, "--database-url", &url, "--refused", &path])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts");
        while count_jobs(&database).await < 2 * n / share {
            assert!(process.try_wait().unwrap().is_none(), "it was still under way");
            tokio::task::yield_now().await;
        }
        process.kill().unwrap();
        process.wait().unwrap();
        kills += 1;
        database.verify().await;
    }
    assert_eq!(kills, 3);
    import(&legacy, &database, &[]);
    let comparable = |jobs: BTreeMap<String, Job>| -> BTreeMap<String, Expected> {
        jobs.into_iter().map(|(id, job)| (id, found(&job))).collect()
    };
    let (killed, heads) = everything(&database).await;
    let (undisturbed, undisturbed_heads) = everything(&whole).await;
    assert_eq!(heads, undisturbed_heads, "no event was written twice");
    assert_eq!(comparable(killed), comparable(undisturbed));
}

async fn count_jobs(database: &Database) -> usize {
    let count = "SELECT count(*) FROM job";
    let n: i64 = if database.is_postgres() {
        sqlx::query_scalar("SELECT count(*) FROM jobledger.job")
            .fetch_one(&mut database.connect_as("postgres").await)
            .await
    } else {
        sqlx::query_scalar(count).fetch_one(&mut database.connect().await).await
    }
    .expect("it can be counted");
    usize::try_from(n).unwrap()
}

async fn a_row_without_events_tells_its_story_once(database: Database) {
    use JobEventKind::{Created, Imported, Started, Succeeded};
    let legacy = LegacyDatabase::empty().await;
    let insert = format!(
        "INSERT INTO jobs (id, status, progress, created_at, updated_at) VALUES ('{DONE}', 'pending', 0, NULL, now() - interval '9 s')"
    );
    legacy.run(&insert).await;
    import(&legacy, &database, &[]);
    for (status, progress) in [("processing", 10), ("processing", 50), ("completed", 100), ("completed", 100)] {
        let update = "UPDATE jobs SET updated_at = now() - interval '1 s'";
        legacy.run(&format!("{update}, status = '{status}', progress = {progress}")).await;
        import(&legacy, &database, &[]);
    }
    let (server, client) = TestServer::on(&database).await;
    let kinds = kinds(&history(&client, DONE).await);
    let happened: Vec<_> = kinds.into_iter().filter(|kind| *kind != Imported).collect();
    assert_eq!(happened, [Created, Started, Succeeded]);
    server.stop().await;
}

async fn every_way_through_the_tables_leads_to_the_same(database: Database) {
    let legacy = LegacyDatabase::with_rows(1_500).await;
    // Many rows share a time, also at the ends of pages.
    legacy.run("UPDATE jobs SET created_at = date_trunc('day', created_at); UPDATE job SET created_at = date_trunc('day', created_at)").await;
    legacy.run("UPDATE jobs SET created_at = NULL WHERE progress = 7").await;
    let by_index = import(&legacy, &database, &["--dry-run"]);
    let whole = "CREATE UNIQUE INDEX ON job (org_id, idempotency_key) WHERE idempotency_key <> 'same'";
    legacy.run(&format!("DROP INDEX idx_jobs_created_at, idx_job_org_status; {whole}")).await;
    let by_id = import(&legacy, &database, &[]);
    assert_eq!((by_index.line("all"), by_index.refused()), (by_id.line("all"), by_id.refused()));
    legacy.run("CREATE INDEX ON jobs USING brin (created_at); CREATE INDEX ON job (created_at)").await;
    let by_time = import(&legacy, &database, &[]);
    assert!(by_time.said().contains(" 0 new, 0 updated, "), "{}", by_time.said());
    assert_eq!(by_time.line("all"), by_id.line("all"));
}

async fn a_job_with_too_much_of_a_past_comes_with_the_last_of_it(database: Database) {
    let legacy = three_jobs().await;
    let many = format!(
        "INSERT INTO job_event (job_id, ts, prev_status, next_status, detail_json)
         SELECT '{RUNNING}', '2025-10-29 12:00:06+00'::timestamptz + n * interval '1 ms', 'running', 'running',
            jsonb_build_object('progress', n % 100, 'log', repeat('x', 400))
         FROM generate_series(1, 60000) n"
    );
    legacy.run(&many).await;
    let run = import(&legacy, &database, &[]);
    assert_eq!((run.code(), run.line("all")), (0, vec![3, 3, 0, 0, 0]));
    let left_out = run.reported.iter().find(|line| line["id"] == RUNNING).expect("it is told");
    assert!(text(&left_out["reasons"][0]).contains("events were left out"), "{left_out}");
    let again = import(&legacy, &database, &[]);
    assert!(again.said().contains(" 0 new, 0 updated, 3 unchanged"), "{}", again.said());
    let (server, client) = TestServer::on(&database).await;
    let job = client.get(RUNNING).await.unwrap();
    assert_eq!((job.status(), job.progress), (JobStatus::Running, Some(0)));
    server.stop().await;
}

async fn a_key_that_was_brought_in_dedups_its_type(database: Database) {
    let legacy = three_jobs().await;
    import(&legacy, &database, &[]);
    let (server, client) = TestServer::on(&database).await;
    for payload in [1, 2] {
        let job = NewJob::new("mock_process").idempotency_key("c").payload(&payload).unwrap();
        let created = client.create(job).await.unwrap();
        assert!(created.deduplicated, "whatever the request");
        assert_eq!((created.job.id.as_str(), created.job.status()), (DONE, JobStatus::Succeeded));
    }
    let other = client.create(NewJob::new("another_type").idempotency_key("c")).await.unwrap_err();
    assert!(
        matches!(&other, Error::IdempotencyKeyReused { existing_job_id, .. } if existing_job_id == DONE),
        "{other:?}"
    );
    // An imported row doesn't take over the key of the ledger's own job.
    let own = client.create(NewJob::new("mock_process").idempotency_key("new")).await.unwrap();
    legacy
        .run(&format!(
            "INSERT INTO job (id, org_id, type, idempotency_key) VALUES (gen_random_uuid(), '{}', 'mock_process', 'new')",
            Uuid::nil()
        ))
        .await;
    let run = import(&legacy, &database, &[]);
    let reason = format!("its idempotency_key is already used by the ledger's job {}", own.job.id);
    assert_eq!(run.refused().into_values().collect::<Vec<_>>(), [reason]);
    server.stop().await;
}

async fn rows_of_both_tables_are_taken_once(database: Database) {
    let legacy = three_jobs().await;
    legacy
        .run(&format!(
            "INSERT INTO jobs (id, status, created_at, updated_at) VALUES
                ('{DONE}', 'pending', '2025-10-29 12:00:00+00', '2025-10-29 12:00:00+00'),
                -- Changed there later, as after a way back; and copied from there without its events.
                ('{RUNNING}', 'completed', '2025-10-29 12:00:00+00', '2025-10-29 13:00:00+00'),
                ('55555555-5555-5555-5555-555555555555', 'completed', '2025-10-29 12:00:00+00', '2025-10-29 12:00:00+00'),
                ('44444444-4444-4444-4444-444444444444', 'canceled', '2025-10-29 12:00:00+00', '2025-10-29 12:00:00+00')"
        ))
        .await;
    legacy
        .run(&format!(
            "UPDATE jobs SET result = '{{\"frames\": 3}}', progress = 100 WHERE status = 'completed';
             INSERT INTO job (id, org_id, type, status, created_at, updated_at)
                SELECT id, '{}', 'mock_process', 'succeeded', created_at, updated_at FROM jobs WHERE id::text LIKE '5%'",
            Uuid::nil()
        ))
        .await;
    // As after pg_dump and pg_restore into a database with other tables.
    legacy.run("CREATE SCHEMA \"old Times\"; ALTER TABLE jobs SET SCHEMA \"old Times\"").await;
    legacy.run("ALTER TABLE job SET SCHEMA \"old Times\"; ALTER TABLE job_event SET SCHEMA \"old Times\"").await;
    let org = ORGS[2].to_string();
    for _ in 0..2 {
        let run = import(&legacy, &database, &["--schema", "old Times", "--org", &org]);
        assert_eq!((run.code(), run.line("all")), (0, vec![5, 5, 0, 0, 0]));
        assert_eq!(run.line("succeeded"), [3, 3, 0, 0, 0]);
        assert!(run.said().contains("3 rows of jobs were merged"), "{}", run.said());
    }
    let (server, client) = TestServer::on(&database).await;
    assert_eq!(client.get(DONE).await.unwrap().status(), JobStatus::Succeeded);
    for id in [RUNNING, "55555555-5555-5555-5555-555555555555"] {
        let job = client.get(id).await.unwrap();
        let result: Value = jobledger_client::from_value(job.result.as_ref()).unwrap();
        assert_eq!((job.status(), job.progress, &result["frames"]), (JobStatus::Succeeded, Some(100), &3.into()));
    }
    let canceled = client_of(&server, ORGS[2]).get("44444444-4444-4444-4444-444444444444").await.unwrap();
    assert_eq!((canceled.status(), canceled.r#type.as_str()), (JobStatus::Canceled, "mock_process"));
    server.stop().await;
}

async fn a_row_that_cannot_be_read_keeps_no_other_from_coming(database: Database) {
    let legacy = LegacyDatabase::empty().await;
    // As with damaged storage: reading the `error` of two rows fails.
    legacy
        .run(
            "INSERT INTO jobs (id, status, created_at, updated_at)
                SELECT lpad(n::text, 32, '0')::uuid, 'pending', now(), now() FROM generate_series(1, 2500) n;
             ALTER TABLE jobs RENAME TO stored;
             CREATE VIEW jobs AS SELECT id, status, stage, progress, result, created_at, updated_at,
                CASE WHEN id::text ~ '0000(7|2400)$' THEN (1 / progress)::text END AS error FROM stored;
             UPDATE stored SET progress = 0",
        )
        .await;
    let unreadable = ["0007", "2400"].map(|n| format!("00000000-0000-0000-0000-00000000{n}"));
    for is_dry_run in [true, false] {
        let run = import(&legacy, &database, if is_dry_run { &["--dry-run"] } else { &[] });
        assert_eq!((run.code(), run.line("queued")), (1, vec![2_500, 2_498, 0, 2, 0]), "{}", run.said());
        let mut refused: Vec<_> = run.refused().into_iter().collect();
        refused.sort_unstable();
        let reason = "its row can't be read: division by zero".to_owned();
        assert_eq!(refused, unreadable.clone().map(|id| (id, reason.clone())));
    }
    legacy.run("UPDATE stored SET progress = 1").await;
    assert_eq!(import(&legacy, &database, &[]).line("queued"), [2_500, 2_500, 0, 0, 0]);
}

#[tokio::test]
async fn what_is_no_old_database_is_said() {
    let database = Database::sqlite();
    let legacy = three_jobs().await;
    let refusal = |from: &str, schema: &str| {
        let arguments = ["import", "--from", from, "--schema", schema, "--database-url", &database.url()];
        let output = command(&arguments).output().expect("the program starts");
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let url = legacy.url();
    for (from, schema, expected) in [
        (url.as_str(), "elsewhere", "schema elsewhere has neither a table jobs nor a table job"),
        (url.as_str(), "jobledger", "is jobledger's own"),
        ("postgres://u:secret@h:x/d", "public", "not a PostgreSQL URL"),
        ("postgres://nobody:secret@127.0.0.1:1/d", "public", "can't connect to PostgreSQL at 127.0.0.1"),
        ("postgresql+psycopg2://u:secret@h/d", "public", "expected postgres://USER@HOST/NAME"),
    ] {
        let said = refusal(from, schema);
        assert!(said.contains(expected), "{said}");
        assert!(!said.contains("secret"), "a password stays unsaid: {said}");
    }
    let arguments =
        ["import", "--from", &url, "--database-url", &database.url(), "--refused", "/nowhere/refused.jsonl"];
    let output = command(&arguments).output().expect("the program starts");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && said.contains("/nowhere/refused.jsonl: No such file"), "{said}");
    // Rows that the role may not see are an error: they must not look missing.
    let role = "CREATE ROLE import_reader LOGIN; GRANT SELECT ON jobs, job TO import_reader";
    legacy.run(role).await;
    let reader = url.replace("postgres@", "import_reader@");
    assert!(refusal(&reader, "public").contains("permission denied for table job_event"));
    legacy.run("GRANT SELECT ON job_event TO import_reader; ALTER TABLE job ENABLE ROW LEVEL SECURITY").await;
    assert!(refusal(&reader, "public").contains("row-level security"));
    legacy
        .run("DROP OWNED BY import_reader; DROP ROLE import_reader; ALTER TABLE job DISABLE ROW LEVEL SECURITY")
        .await;
    legacy.run("ALTER TABLE jobs DROP COLUMN stage").await;
    assert!(refusal(&url, "public").contains("public.jobs is not the old table: it has no stage"));
    legacy.run("DROP TABLE jobs, job_event; ALTER TABLE job ALTER COLUMN id DROP DEFAULT").await;
    legacy.run("ALTER TABLE job ALTER COLUMN id TYPE text").await;
    assert!(refusal(&url, "public").contains("public.job.id is a text, not a uuid"));
}
