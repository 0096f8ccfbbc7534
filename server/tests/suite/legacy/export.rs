//! The export of jobs for the old service.

use std::collections::BTreeMap;

use jobledger_client::{Job, JobStatus, NewJob, Report};
use serde_json::Value;

use crate::legacy::import::{ORGS, everything, import, text};
use crate::{
    legacy::database::LegacyDatabase,
    support::harness::{Database, TestServer, on_both_databases},
    support::program::command,
};

on_both_databases! {
    what_is_exported_is_the_old_table_and_comes_back_unchanged,
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
