//! The commands under "Everyday tasks" in docs/operations.md, run as they are shown.

use std::{fs, process::Command, time::Duration};

use jobledger_client::{
    BulkStatus, Claim, JobStatus, NewJob, Report,
    proto::{CreateTokenRequest, Role},
};
use jobledger_server::domain::clock::{Clock as _, SystemClock};
use serde_json::{Deserializer, Value, json};

use super::grpcurl::grpcurl;
use crate::{
    jobs::bulk::ended,
    support::{
        harness::{Database, on_both_databases, root},
        program::Program,
    },
};

on_both_databases! {
    everyday_tasks_do_what_the_docs_say,
}

/// The id that the docs show for a job that failed.
const SHOWN: &str = "01a202c1-14cb-75f7-8263-5ef8e4054d47";

/// The id that the docs show for a job that is scheduled.
const SHOWN_SCHEDULED: &str = "01a2114e-60b1-7f5a-9d0e-4b6a2c1f8a35";

/// The id that the docs show for an API token.
const SHOWN_TOKEN: &str = "01a2080c-7f4d-7096-98ae-5032dbb014e7";

/// The tasks: the title of each, and its commands.
fn tasks() -> Vec<(String, Vec<String>)> {
    let text = fs::read_to_string(root().join("docs/operations.md")).expect("it is there");
    let (_, section) = text.split_once("\n## Everyday tasks\n").expect("the section is there");
    let section = section.split("\n## ").next().expect("it ends");
    let task = |part: &str| {
        let (title, rest) = part.split_once("**")?;
        let commands = rest.split("```").skip(1).step_by(2).flat_map(str::lines);
        let commands = commands.filter(|line| line.starts_with("call "));
        Some((title.trim_end_matches('.').to_owned(), commands.map(str::to_owned).collect()))
    };
    section.split("\n**").skip(1).filter_map(task).collect()
}

async fn everyday_tasks_do_what_the_docs_say(database: Database) {
    let program = Program::start(&database);
    let client = program.client();
    let failing = client.create(NewJob::new("thumbnail")).await.unwrap().job.id;
    client.update(Report::start(&failing)).await.unwrap();
    client.update(Report::failed(&failing, "DISK_FULL", "no space left on device")).await.unwrap();
    let other = client.create(NewJob::new("thumbnail")).await.unwrap().job.id;
    client.update(Report::start(&other)).await.unwrap();
    client.update(Report::failed(&other, "TIMEOUT", "")).await.unwrap();
    let keyed = client.create(NewJob::new("thumbnail").idempotency_key("cat.jpg@7")).await.unwrap().job.id;
    let held = client.claim(Claim::new("worker-1")).await.unwrap().remove(0).job.unwrap().id;
    assert_eq!(held, keyed);
    client.create(NewJob::new("thumbnail")).await.unwrap();

    let in_an_hour = SystemClock.now() + Duration::from_secs(3_600);
    let scheduled = client.create(NewJob::new("nightly").scheduled_at(in_an_hour)).await.unwrap().job.id;

    let of_customer = client.create(NewJob::new("mail").label("customer", "4711")).await.unwrap().job.id;

    client.create_all((0..3).map(|_| NewJob::new("report"))).await.unwrap();
    let roles = vec![Role::Worker.into()];
    let request = CreateTokenRequest { name: "old".to_owned(), roles, ..Default::default() };
    let (token, _) = client.create_token(request).await.unwrap();

    let call = format!("call() {{ {} -plaintext -d \"$2\" {} \"jobledger.v1.$1\"; }}", grpcurl(), program.address);
    let run = |command: &str| -> Vec<Value> {
        let ids = [(SHOWN, &failing), (SHOWN_SCHEDULED, &scheduled), (SHOWN_TOKEN, &token.id)];
        let command = ids.into_iter().fold(command.to_owned(), |command, (shown, id)| command.replace(shown, id));
        let script = format!("{call}; {command} 2>&1");
        let ran = Command::new("sh").args(["-c", &script]).output().expect("a shell runs");
        let printed = String::from_utf8(ran.stdout).expect("grpcurl prints text");
        assert!(ran.status.success(), "{command}\n{printed}");
        Deserializer::from_str(&printed).into_iter().map(|message| message.expect("JSON")).collect()
    };
    let mut seen = Vec::new();
    for (title, commands) in tasks() {
        let answers: Vec<_> = commands.iter().map(|command| run(command)).collect();
        let first = &answers[0][0];
        match &*title {
            "Failed jobs of a type since this morning, by error code" => {
                let jobs = first["jobs"].as_array().unwrap();
                assert!(jobs.len() == 1 && jobs[0]["id"] == json!(failing), "{first}");
            }
            "Why one failed" => {
                assert_eq!(first["job"]["lastErrorMessage"], "no space left on device");
                assert_eq!(answers[1][2]["event"]["errorCode"], "DISK_FULL", "{answers:?}");
            }
            "Retry them all" => {
                let id = first["operation"]["id"].as_str().unwrap();
                let done = ended(&client, id).await;
                assert_eq!((done.matched, done.changed, &*done.reason), (1, 1, "the disk was full"), "{done:?}");
                assert_eq!(answers[1][0]["operations"][0]["id"], json!(id));
                assert_eq!(client.get(&failing).await.unwrap().status(), JobStatus::Queued);
            }
            "Cancel everything queued of a type" => {
                let counted = ended(&client, first["operation"]["id"].as_str().unwrap()).await;
                assert_eq!((counted.matched, counted.changed), (3, 0), "{counted:?}");
                let done = ended(&client, answers[1][0]["operation"]["id"].as_str().unwrap()).await;
                assert_eq!((done.changed, done.status()), (3, BulkStatus::Succeeded), "{done:?}");
            }
            "Find a job by its key" => assert_eq!(first["job"]["id"], json!(keyed)),
            "Workers, and how much each holds" => {
                assert_eq!(
                    (&first["workers"][0]["id"], &first["workers"][0]["held"]),
                    (&json!("worker-1"), &json!("1"))
                );
            }
            "What a job waits for" => assert_eq!(first["job"]["id"], json!(failing)),
            "Move a scheduled job to now" => {
                assert_eq!(first["job"]["id"], json!(scheduled));
                assert_eq!(client.job_type("nightly").await.unwrap().claimable, 1);
            }
            "Erase one customer" => {
                let done = ended(&client, first["operation"]["id"].as_str().unwrap()).await;
                assert_eq!((done.changed, done.status()), (1, BulkStatus::Succeeded), "{done:?}");
                assert!(client.get(&of_customer).await.unwrap().labels.is_empty());
                assert!(answers[1][0]["job"]["erasedAt"].is_string(), "{answers:?}");
            }
            "What a worker holds" => assert_eq!(first["jobs"][0]["id"], json!(held)),
            "Pause during an incident" => {
                assert_eq!(first["pause"]["reason"], "the disk is full");
                assert_eq!(answers[1][0]["jobTypes"][3]["pause"], first["pause"]);
                let of_type = client.job_type("thumbnail").await.unwrap();
                assert!(of_type.pause.is_none() && of_type.claimable == 2, "{of_type:?}");
            }
            "Throughput of the last hour, and the oldest wait" => {
                assert_eq!(
                    (&first["happened"]["created"], &first["happened"]["retried"]),
                    (&json!("4"), &json!("1")),
                    "{first}"
                );
                assert!(first["oldestQueuedAge"].is_string(), "{first}");
            }
            "How much is left of the quotas" => {
                let jobs = first["limits"].as_array().unwrap().iter().find(|limit| limit["name"] == "max-jobs-per-org");
                assert_eq!(jobs.unwrap()["used"], "9", "{first}");
            }
            "Make a worker's API token, list the tokens, revoke one" => {
                assert!(first["secret"].as_str().unwrap().starts_with("jl_"), "{first}");
                let all = answers[1][0]["tokens"].as_array().unwrap();
                assert_eq!(all.iter().map(|token| &token["name"]).collect::<Vec<_>>(), ["old", "worker-2"]);
                assert!(answers[2][0]["token"]["revokedAt"].is_string(), "{answers:?}");
            }
            "Whose jobs there are" => {
                assert_eq!(first["orgs"][0]["id"], "00000000-0000-0000-0000-000000000000");
                assert_eq!(first["orgs"][0]["counts"]["canceled"], "5", "{first}");
            }
            other => panic!("what is {other:?} to do?"),
        }
        seen.push(title);
    }
    assert_eq!(seen.len(), 15, "{seen:?}");
}
