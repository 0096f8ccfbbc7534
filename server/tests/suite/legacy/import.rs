//! The import of the old service's jobs.

use std::{
    collections::{BTreeMap, HashMap},
    process::{Output, Stdio},
    time::Duration,
};

use jobledger_client::{
    Client, Error, Follow, Item, Job, JobEvent, JobEventKind, JobStatus, NewJob, Report, proto as v1,
};
use serde_json::Value;
use tempfile::TempDir;
use uuid::Uuid;

use crate::{
    legacy::database::LegacyDatabase,
    legacy::rows::{Expected, expected, found},
    support::harness::{Database, Program, TestServer, command, on_both_databases, short_or_long},
};

on_both_databases! {
    every_row_is_brought_in_as_it_was_or_refused_with_a_reason,
    what_changes_on_one_side_is_taken_over_and_on_both_is_refused,
    a_row_without_events_tells_its_story_once,
    every_way_through_the_tables_leads_to_the_same,
    a_job_with_too_much_of_a_past_comes_with_the_last_of_it,
    a_key_that_was_brought_in_dedups_its_type,
    an_import_that_was_killed_goes_on_to_the_same_end,
    a_dry_run_says_what_would_be_and_writes_nothing,
    an_import_runs_beside_a_server_whose_subscribers_see_it,
    a_view_follows_what_is_brought_in,
    what_goes_on_meanwhile_comes_with_the_next_run,
    rows_of_both_tables_are_taken_once,
    a_row_that_cannot_be_read_keeps_no_other_from_coming,
    imports_at_once_bring_each_row_once,
    what_is_exported_is_the_old_table_and_comes_back_unchanged,
}

/// A run of `jobledger import`.
pub(crate) struct Run {
    output: Output,
    /// The reported lines: rows that were refused or adjusted.
    reported: Vec<Value>,
}

impl Run {
    fn code(&self) -> i32 {
        self.output.status.code().expect("it ended by itself")
    }

    fn said(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    /// The numbers in the line of a status: source, ledger, ahead, refused, difference.
    fn line(&self, name: &str) -> Vec<i64> {
        let said = self.said();
        let line = said.lines().find(|line| line.split_whitespace().next() == Some(name));
        let line = line.unwrap_or_else(|| panic!("no line for {name} in:\n{said}"));
        line.split_whitespace().skip(1).take(5).map(|number| number.parse().expect("a number")).collect()
    }

    /// The ledger's own count of all jobs.
    fn counted(&self) -> i64 {
        let said = self.said();
        let last = said.lines().find(|line| line.starts_with("all ")).expect("a line for all");
        last.split_whitespace().last().and_then(|number| number.parse().ok()).expect("a number")
    }

    fn refused(&self) -> HashMap<String, String> {
        let refused = self.reported.iter().filter(|line| line["verdict"] == "refused");
        refused.map(|line| (text(&line["id"]), text(&line["reasons"][0]))).collect()
    }
}

fn text(value: &Value) -> String {
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

const ORGS: [Uuid; 4] = [Uuid::from_u128(0), Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3)];

fn client_of(server: &TestServer, org: Uuid) -> Client {
    Client::builder(server.endpoint()).org(org).build().expect("a valid endpoint")
}

/// All jobs of all orgs with payloads and results, by id, and the heads of the logs.
async fn everything(database: &Database) -> (BTreeMap<String, Job>, Vec<i64>) {
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

async fn history(client: &Client, id: &str) -> Vec<JobEvent> {
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
    let mut reasons: Vec<_> = refused.values().map(|reason| reason.split("job ").next().unwrap()).collect();
    reasons.sort_unstable();
    reasons.dedup();
    assert_eq!(reasons, ["", "it has no status", "its status \"archived\" is unknown"]);
    assert!(refused.values().any(|reason| reason.ends_with("has its idempotency_key, and a key is one job's")));
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

const RUNNING: &str = "11111111-1111-1111-1111-111111111111";
const QUEUED: &str = "22222222-2222-2222-2222-222222222222";
const DONE: &str = "33333333-3333-3333-3333-333333333333";

/// Three jobs in the table with events: one runs, one waits, and one has ended.
async fn three_jobs() -> LegacyDatabase {
    let legacy = LegacyDatabase::empty().await;
    for (id, status, key) in [(RUNNING, "running", "a"), (QUEUED, "queued", "b"), (DONE, "succeeded", "c")] {
        legacy
            .run(&format!(
                "INSERT INTO job (id, org_id, type, status, attempt, idempotency_key, created_at, updated_at)
                 VALUES ('{id}', '{}', 'mock_process', '{status}', 1, '{key}', '2025-10-29 12:00:00+00', '2025-10-29 12:00:05.5+00');
                 INSERT INTO job_event (job_id, ts, prev_status, next_status) VALUES ('{id}', '2025-10-29 12:00:00+00', NULL, 'queued')",
                Uuid::nil()
            ))
            .await;
    }
    let happened = format!(
        "INSERT INTO job_event (job_id, ts, prev_status, next_status, detail_json) VALUES
            ('{RUNNING}', '2025-10-29 12:00:05.5+00', 'queued', 'running', '{{\"stage\": \"extracting\", \"progress\": 10}}'),
            ('{DONE}', '2025-10-29 12:00:01+00', 'queued', 'running', NULL),
            ('{DONE}', '2025-10-29 12:00:05.5+00', 'running', 'succeeded', '{{\"result\": {{\"frames\": 7}}, \"progress\": 100}}')"
    );
    legacy.run(&happened).await;
    legacy
}

fn kinds(events: &[JobEvent]) -> Vec<JobEventKind> {
    events.iter().map(JobEvent::kind).collect()
}

async fn what_changes_on_one_side_is_taken_over_and_on_both_is_refused(database: Database) {
    use JobEventKind::{Created, Imported, Started, Succeeded};
    let legacy = three_jobs().await;
    assert_eq!(import(&legacy, &database, &[]).code(), 0);
    let (server, client) = TestServer::on(&database).await;
    let done = history(&client, DONE).await;
    assert_eq!(kinds(&done), [Created, Started, Succeeded, Imported]);
    assert_eq!(done[1].ts.unwrap().seconds + 4, done[2].ts.unwrap().seconds, "old times");
    assert!(done[0].recorded_at.unwrap().seconds > done[3].ts.unwrap().seconds, "new ones of writing");
    assert_eq!(done[2].result, done[3].result);

    // A worker of the ledger ends one job and starts another. A worker of the old service ends the first one in another way.
    client.update(Report::succeeded(RUNNING).result("here").unwrap()).await.unwrap();
    client.update(Report::start(QUEUED)).await.unwrap();
    legacy
        .run(&format!(
            "UPDATE job SET status = 'failed', updated_at = now() WHERE id = '{RUNNING}';
             UPDATE job SET status = 'failed', last_error_message = 'late', updated_at = now() WHERE id = '{DONE}';
             INSERT INTO job_event (job_id, prev_status, next_status) VALUES ('{DONE}', 'succeeded', 'failed')"
        ))
        .await;
    let run = import(&legacy, &database, &[]);
    assert!(
        run.said().contains(" 0 new, 1 updated, 0 unchanged, 1 gone on in the ledger, 1 refused"),
        "{}",
        run.said()
    );
    let both = "it has changed on both sides since it was brought in".to_owned();
    let refused = run.reported.iter().find(|line| line["verdict"] == "refused").expect("there is one");
    assert_eq!(refused["reasons"][1], "the ledger still has it, succeeded");
    assert_eq!(run.refused(), HashMap::from([(RUNNING.to_owned(), both)]));
    assert_eq!(run.line("queued"), [1, 0, 1, 0, 0]);

    assert_eq!(client.get(RUNNING).await.unwrap().status(), JobStatus::Succeeded, "the ledger's own job wins");
    let job = client.get(DONE).await.unwrap();
    assert_eq!((job.status(), job.last_error_message.as_str()), (JobStatus::Failed, "late"));
    let events = history(&client, DONE).await;
    assert_eq!(kinds(&events), [Created, Started, Succeeded, Imported, JobEventKind::Failed, Imported]);
    assert!(job.result.is_none(), "as the old service would have shown it");
    server.stop().await;
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
    assert!(text(&left_out["reasons"][0]).contains("of its events were left out"), "{left_out}");
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
    let reason = format!("the ledger's job {} has its idempotency_key, and a key is one job's", own.job.id);
    assert_eq!(run.refused().into_values().collect::<Vec<_>>(), [reason]);
    server.stop().await;
}

async fn an_import_runs_beside_a_server_whose_subscribers_see_it(database: Database) {
    let legacy = three_jobs().await;
    let program = Program::start(&database);
    let client = program.client();
    let mut events = client.subscribe(Follow::org().after(0)).await.unwrap();
    let own = client.create(NewJob::new("own")).await.unwrap();
    assert_eq!(import(&legacy, &database, &[]).code(), 0);
    let mut seen = Vec::new();
    let seeing = async {
        while seen.len() < 10 {
            if let Item::Event(event) = events.next().await.unwrap().unwrap() {
                seen.push(event.seq);
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), seeing).await.expect("they come");
    assert_eq!(seen, (1..=10).collect::<Vec<_>>());
    // An imported job that waits can be claimed here.
    let mut raw = client.raw();
    let claim = v1::ClaimJobsRequest { worker_id: "w".into(), max_jobs: 5, ..Default::default() };
    let leases = raw.claim_jobs(claim).await.unwrap().into_inner().leases;
    let mut claimed: Vec<_> = leases.iter().map(|lease| lease.job.as_ref().unwrap().id.clone()).collect();
    claimed.sort_unstable();
    let mut expected = [QUEUED.to_owned(), own.job.id];
    expected.sort_unstable();
    assert_eq!(claimed, expected, "a job that runs elsewhere is nobody's to take");
    assert!(program.end_by("TERM").success());
}

async fn a_view_follows_what_is_brought_in(database: Database) {
    let legacy = three_jobs().await;
    legacy.run(&format!("UPDATE job SET status = 'failed', last_error_message = 'no' WHERE id = '{DONE}'")).await;
    let (server, client) = TestServer::on(&database).await;
    let mut view = client.view(Follow::org()).await.unwrap();
    import(&legacy, &database, &[]);
    // A job that had failed with a result is queued again without either.
    legacy
        .run(&format!(
            "UPDATE job SET status = 'queued', last_error_message = NULL, updated_at = now() WHERE id = '{DONE}';
             INSERT INTO job_event (job_id, prev_status, next_status) VALUES ('{DONE}', 'failed', 'queued')"
        ))
        .await;
    import(&legacy, &database, &[]);
    let head = client.statistics(&[]).await.unwrap().as_of_seq;
    while view.as_of_seq() < head {
        tokio::time::timeout(Duration::from_secs(60), view.next()).await.expect("it follows").unwrap().unwrap();
    }
    assert_eq!(view.len(), 3);
    for id in [RUNNING, QUEUED, DONE] {
        assert_eq!(view.get(id), Some(&client.get(id).await.unwrap().into()));
    }
    server.stop().await;
}

async fn what_goes_on_meanwhile_comes_with_the_next_run(database: Database) {
    let legacy = LegacyDatabase::with_rows(1_000).await;
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    // Acts as the old service: creates jobs and ends others, in both tables.
    let mut connection = legacy.connect().await;
    let service = tokio::spawn(async move {
        use sqlx::Executor as _;
        let mut n = 0;
        while stopped.try_recv().is_err() {
            n += 1;
            let sql = format!(
                "INSERT INTO jobs (id, status, progress, created_at, updated_at) VALUES (gen_random_uuid(), 'pending', 0, now(), now());
                 UPDATE jobs SET status = 'completed', updated_at = now() WHERE id = md5('jobs ' || {n})::uuid AND status = 'pending';
                 WITH ended AS (UPDATE job SET status = 'succeeded', finished_at = now(), updated_at = now()
                    WHERE id = md5('job ' || {n})::uuid AND status = 'running' RETURNING id)
                 INSERT INTO job_event (job_id, prev_status, next_status, detail_json)
                    SELECT id, 'running', 'succeeded', '{{\"progress\": 100}}' FROM ended"
            );
            connection.execute(sqlx::AssertSqlSafe(sql)).await.expect("it goes on");
        }
        n
    });
    let background = |legacy: &LegacyDatabase| {
        let (from, url) = (legacy.url(), database.url());
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("r.jsonl").display().to_string();
        let mut command = command(&["import", "--from", &from, "--database-url", &url, "--refused", &path]);
        tokio::task::spawn_blocking(move || (folder, command.output().unwrap()))
    };
    for _ in 0..2 {
        background(&legacy).await.unwrap();
    }
    stop.send(()).unwrap();
    assert!(service.await.unwrap() > 10, "something went on");
    let last = import(&legacy, &database, &[]);
    let again = import(&legacy, &database, &[]);
    assert!(again.said().contains(" 0 new, 0 updated, "), "{}", again.said());
    assert_eq!(last.line("all"), again.line("all"));
    assert_eq!(last.line("all")[4], 0);
    let (jobs, _) = everything(&database).await;
    let expected = expected(&legacy).await;
    assert_eq!(jobs.len(), expected.len());
    for (id, job) in &jobs {
        assert_eq!(Some(&found(job)), expected.get(id), "{id}");
    }
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
        assert!(run.said().contains("3 rows of jobs are in job too"), "{}", run.said());
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

async fn imports_at_once_bring_each_row_once(database: Database) {
    let legacy = LegacyDatabase::with_rows(300).await;
    std::thread::scope(|scope| {
        let runs = [(); 8].map(|()| scope.spawn(|| import(&legacy, &database, &[])));
        for run in runs {
            assert_eq!(run.join().unwrap().line("all")[4], 0);
        }
    });
    let again = import(&legacy, &database, &[]);
    assert!(again.said().contains(" 0 new, 0 updated, "), "{}", again.said());
    let (jobs, _) = everything(&database).await;
    let expected = expected(&legacy).await;
    assert_eq!(jobs.len(), expected.len());
    for (id, job) in &jobs {
        assert_eq!(Some(&found(job)), expected.get(id), "{id}");
    }
}

async fn what_is_exported_is_the_old_table_and_comes_back_unchanged(database: Database) {
    let legacy = LegacyDatabase::with_rows(300).await;
    legacy.run("DELETE FROM jobs WHERE status IS NULL OR status = 'archived'").await;
    import(&legacy, &database, &[]);
    let imported: BTreeMap<_, _> =
        everything(&database).await.0.into_iter().filter(|(_, job)| job.org_id == ORGS[0].to_string()).collect();
    // From here on only the table `jobs` is left.
    legacy.run("DROP TABLE job_event, job").await;
    let (server, client) = TestServer::on(&database).await;
    let created = client.create(NewJob::new("t")).await.unwrap();
    let report = Report::start(&created.job.id).stage("it's").percent(7);
    client.update(report).await.unwrap();
    let rows = "SELECT jsonb_agg(to_jsonb(j) ORDER BY id)::text FROM jobs j";
    let before: String = sqlx::query_scalar(rows).fetch_one(&mut legacy.connect().await).await.unwrap();

    let exported = command(&["export", "--legacy", "--database-url", &database.url()]).output().unwrap();
    assert!(exported.status.success(), "{}", String::from_utf8_lossy(&exported.stderr));
    let sql = String::from_utf8(exported.stdout).unwrap();
    // The export is applied to the existing table, to an empty database, and once more.
    legacy.run(&sql).await;
    let upserted: String = sqlx::query_scalar(rows).fetch_one(&mut legacy.connect().await).await.unwrap();
    legacy.run("DROP TABLE jobs").await;
    legacy.run(&sql).await;
    legacy.run(&sql).await;
    let restored: String = sqlx::query_scalar(rows).fetch_one(&mut legacy.connect().await).await.unwrap();

    let parse = |rows: &str| -> BTreeMap<String, Value> {
        let rows: Vec<Value> = serde_json::from_str(rows).unwrap();
        rows.into_iter().map(|row| (text(&row["id"]), row)).collect()
    };
    let (before, upserted, restored) = (parse(&before), parse(&upserted), parse(&restored));
    let own = &restored[&created.job.id];
    assert_eq!(
        (&own["status"], &own["stage"], &own["progress"], &own["error"]),
        (&"processing".into(), &"it's".into(), &7.into(), &Value::Null)
    );
    assert!(restored.len() > before.len() + 50, "with those that were rows of job");
    for (id, row) in before {
        assert!(upserted[&id] == row || row["updated_at"].is_null(), "what has not changed is left as it is: {row}");
        let mut row = row;
        // Values that the ledger stores in another form.
        row["progress"] = row["progress"].as_i64().unwrap_or(0).clamp(0, 100).into();
        if row["updated_at"].is_null() {
            row["updated_at"] = row["created_at"].clone();
        }
        assert_eq!(restored[&id], row);
    }
    let again = import(&legacy, &database, &[]);
    assert!(again.said().contains(" 0 new, ") && again.said().contains(" 0 refused"), "{}", again.said());
    // The old table has fewer fields of a job than the ledger, and the ledger keeps them.
    let known = |job: &Job| {
        (job.status(), job.attempt, job.started_at, job.finished_at, job.idempotency_key.clone(), job.priority)
    };
    for (id, job) in &imported {
        let mut expected = known(job);
        if expected.0 == JobStatus::DeadLetter {
            expected.0 = JobStatus::Failed;
        }
        assert_eq!(known(&client.get(id).await.unwrap()), expected, "{id}");
    }
    let report = Report::succeeded(&created.job.id);
    client.update(report).await.expect("the ledger's own job was left alone");
    server.stop().await;
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
