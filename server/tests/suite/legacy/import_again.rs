//! Imports that are run again, or beside a server, while both sides change.

use std::{collections::HashMap, time::Duration};

use jobledger_client::{Follow, Item, JobEvent, JobEventKind, JobStatus, NewJob, Report, proto as v1};
use tempfile::TempDir;
use uuid::Uuid;

use crate::legacy::import::{everything, history, import};
use crate::{
    legacy::database::LegacyDatabase,
    legacy::rows::{expected, found},
    support::harness::{Database, TestServer, on_both_databases},
    support::program::{Program, command},
};

on_both_databases! {
    what_changes_on_one_side_is_taken_over_and_on_both_is_refused,
    an_import_runs_beside_a_server_whose_subscribers_see_it,
    a_view_follows_what_is_brought_in,
    what_goes_on_meanwhile_comes_with_the_next_run,
    imports_at_once_bring_each_row_once,
    a_job_that_was_erased_stays_blank,
}

pub(crate) const RUNNING: &str = "11111111-1111-1111-1111-111111111111";
const QUEUED: &str = "22222222-2222-2222-2222-222222222222";
pub(crate) const DONE: &str = "33333333-3333-3333-3333-333333333333";

/// Three jobs in the table with events: one runs, one waits, and one has ended.
pub(crate) async fn three_jobs() -> LegacyDatabase {
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

pub(crate) fn kinds(events: &[JobEvent]) -> Vec<JobEventKind> {
    events.iter().map(JobEvent::kind).collect()
}

async fn a_job_that_was_erased_stays_blank(database: Database) {
    let legacy = three_jobs().await;
    assert_eq!(import(&legacy, &database, &[]).code(), 0);
    let (server, client) = TestServer::on(&database).await;
    let request = v1::EraseJobRequest { job_id: DONE.to_owned(), ..v1::EraseJobRequest::default() };
    let erased = client.erase(request).await.unwrap();
    // Both as it was, and after the old service has changed it.
    for change in ["updated_at = updated_at", "last_error_message = 'late', updated_at = now()"] {
        legacy.run(&format!("UPDATE job SET {change} WHERE id = '{DONE}'")).await;
        let run = import(&legacy, &database, &[]);
        assert_eq!(run.code(), 0, "{}", run.said());
        assert!(run.said().contains("1 rows were skipped, since their jobs were erased"), "{}", run.said());
        assert_eq!(client.get(DONE).await.unwrap(), erased);
    }
    // Its key is another job's by now.
    let new = client.create(NewJob::new("mock_process").idempotency_key("c")).await.unwrap();
    assert!(!new.deduplicated);
    assert_eq!(import(&legacy, &database, &[]).code(), 0);
    server.stop().await;
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
    assert!(run.said().contains(" 0 new, 1 updated, 0 unchanged, 1 newer in the ledger, 1 refused"), "{}", run.said());
    let both = "it changed in the old database and in the ledger since its import".to_owned();
    let refused = run.reported.iter().find(|line| line["verdict"] == "refused").expect("there is one");
    assert_eq!(refused["reasons"][1], "the ledger keeps its own version, with status succeeded");
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
