//! Auditors see everything but contents, in every answer, stream and event.

use jobledger_client::{
    Claim, Client, NewJob, Report, RetryPolicy, Token,
    proto::{
        BulkAction, ExplainJobRequest, GetBulkOperationRequest, GetJobRequest, GetJobTypeRequest, GetServerInfoRequest,
        GetStatisticsRequest, JobFilter, JobView, ListBulkOperationsRequest, ListJobTypesRequest, ListJobsRequest,
        ListWorkersRequest, StartBulkOperationRequest, StreamJobEventsRequest,
    },
};
use jobledger_server::domain::access::Role;
use prost::Message;
use uuid::Uuid;

use super::access::{guarded, token, token_with};
use crate::{
    legacy::rest::http,
    support::harness::{Database, PATIENCE, TestServer, on_both_databases},
};

on_both_databases! {
    auditors_see_everything_but_contents,
}

/// What is in contents, and nowhere else.
const SECRETS: [&str; 5] = ["secret payload", "secret result", "secret message", "secret error", "secret reason"];

fn has(bytes: &[u8], secret: &str) -> bool {
    bytes.windows(secret.len()).any(|window| window == secret.as_bytes())
}

/// All answers that this caller gets, by call.
async fn answers(client: &Client, jobs: &[String], bulk: &str) -> Vec<(&'static str, Vec<u8>)> {
    let (mut service, mut types, mut bulks) = (client.raw(), client.raw_job_types(), client.raw_bulk());
    let mut found = Vec::new();
    for job in jobs {
        let get = GetJobRequest { job_id: job.clone(), ..Default::default() };
        found.push(("GetJob", service.get_job(get).await.unwrap().into_inner().encode_to_vec()));
        let explain = ExplainJobRequest { job_id: job.clone() };
        found.push(("ExplainJob", service.explain_job(explain).await.unwrap().into_inner().encode_to_vec()));
        let history = StreamJobEventsRequest { job_id: job.clone(), history_only: true, ..Default::default() };
        let mut stream = service.stream_job_events(history).await.unwrap().into_inner();
        while let Some(message) = stream.message().await.unwrap() {
            found.push(("StreamJobEvents of a job", message.encode_to_vec()));
        }
    }
    let keyed = GetJobRequest { idempotency_key: "key".to_owned(), ..Default::default() };
    found.push(("GetJob by key", service.get_job(keyed).await.unwrap().into_inner().encode_to_vec()));
    for view in [JobView::Basic, JobView::Full] {
        let list = ListJobsRequest { view: view.into(), ..Default::default() };
        let listed = service.list_jobs(list).await.unwrap().into_inner();
        assert_eq!(listed.jobs.len(), jobs.len());
        found.push(("ListJobs", listed.encode_to_vec()));
    }
    for include_snapshot in [false, true] {
        let follow = StreamJobEventsRequest { include_snapshot, history_only: true, ..Default::default() };
        let mut stream = service.stream_job_events(follow).await.unwrap().into_inner();
        while let Some(message) = stream.message().await.unwrap() {
            found.push(("StreamJobEvents", message.encode_to_vec()));
        }
    }
    let statistics = service.get_statistics(GetStatisticsRequest::default()).await.unwrap();
    found.push(("GetStatistics", statistics.into_inner().encode_to_vec()));
    let listed = types.list_job_types(ListJobTypesRequest::default()).await.unwrap();
    found.push(("ListJobTypes", listed.into_inner().encode_to_vec()));
    let one = types.get_job_type(GetJobTypeRequest { r#type: "t".to_owned() }).await.unwrap();
    found.push(("GetJobType", one.into_inner().encode_to_vec()));
    let listed = bulks.list_bulk_operations(ListBulkOperationsRequest::default()).await.unwrap();
    found.push(("ListBulkOperations", listed.into_inner().encode_to_vec()));
    let one = bulks.get_bulk_operation(GetBulkOperationRequest { operation_id: bulk.to_owned() }).await.unwrap();
    found.push(("GetBulkOperation", one.into_inner().encode_to_vec()));
    let workers = client.raw_workers().list_workers(ListWorkersRequest::default()).await.unwrap();
    found.push(("ListWorkers", workers.into_inner().encode_to_vec()));
    let info = client.raw_server().get_server_info(GetServerInfoRequest {}).await.unwrap();
    found.push(("GetServerInfo", info.into_inner().encode_to_vec()));
    found
}

async fn auditors_see_everything_but_contents(database: Database) {
    let org = Uuid::new_v4();
    let mut clients = Vec::new();
    for roles in [&[Role::Admin][..], &[Role::Observer], &[Role::Auditor], &[Role::Auditor, Role::Worker]] {
        clients.push(token_with(&database, Some(org), roles, |_| {}).await.0);
    }
    let auditors_token = token(&database, Some(org), Role::Auditor).await;
    let mut config = guarded(&database);
    config.legacy_http = true;
    let server = TestServer::start(config).await;
    let client = |token: &String| {
        let token = Token::new(token).unwrap();
        Client::builder(server.endpoint()).token(token).timeout(PATIENCE).build().unwrap()
    };
    let [admin, observer, auditor, both] = [0, 1, 2, 3].map(|n| client(&clients[n]));

    let job = |n: u32| NewJob::new("t").payload(&format!("secret payload {n}")).unwrap().label("shown", "label");
    let succeeded = admin.create(job(1).idempotency_key("key")).await.unwrap().job.id;
    let failed = admin.create(job(2).max_attempts(2).retry_policy(RetryPolicy::default())).await.unwrap().job.id;
    for _ in 0..2 {
        let lease = admin.claim(Claim::new("worker").types(["t"])).await.unwrap().remove(0);
        let id = lease.job.unwrap().id;
        let news = Report::progress(&id).stage("shown stage").message("secret message");
        admin.update(news.lease(&lease.lease_token)).await.unwrap();
        let report = if id == succeeded {
            Report::succeeded(&id).result(&format!("secret result {}", "x".repeat(50_000))).unwrap()
        } else {
            Report::failed(&id, "SHOWN_CODE", "secret error")
        };
        admin.update(report.lease(&lease.lease_token)).await.unwrap();
    }
    let canceled = admin.create(job(3)).await.unwrap().job.id;
    admin.cancel(&canceled, "secret reason").await.unwrap();
    let start = StartBulkOperationRequest {
        operation_id: Uuid::now_v7().to_string(),
        action: BulkAction::Retry.into(),
        filter: Some(JobFilter { error_code: "SHOWN_CODE".to_owned(), ..Default::default() }),
        dry_run: true,
        ..Default::default()
    };
    let bulk = admin.raw_bulk().start_bulk_operation(start).await.unwrap().into_inner().operation.unwrap().id;
    let jobs = [succeeded, failed, canceled];

    // A caller that may see contents is shown each of them.
    for whole in [&observer, &both] {
        let answers = if std::ptr::eq(whole, &observer) {
            answers(whole, &jobs, &bulk).await
        } else {
            let get = GetJobRequest { job_id: jobs[0].clone(), ..Default::default() };
            vec![("GetJob", whole.raw().get_job(get).await.unwrap().into_inner().encode_to_vec())]
        };
        let seen = |secret: &&str| answers.iter().any(|(_, answer)| has(answer, secret));
        assert_eq!(SECRETS.iter().filter(|secret| seen(secret)).count(), if answers.len() > 1 { 5 } else { 2 });
    }
    let answers = answers(&auditor, &jobs, &bulk).await;
    for (call, answer) in &answers {
        for secret in SECRETS {
            assert!(!has(answer, secret), "{call} shows {secret}");
        }
    }
    for shown in ["label", "shown stage", "SHOWN_CODE", "key", "worker"] {
        assert!(answers.iter().any(|(_, answer)| has(answer, shown)), "{shown}");
    }
    // Live, too.
    let mut live = auditor.raw().stream_job_events(StreamJobEventsRequest::default()).await.unwrap().into_inner();
    let last = admin.create(job(4)).await.unwrap().job.id;
    admin.cancel(&last, "secret reason").await.unwrap();
    let mut seen = 0;
    while seen < 2 {
        let message = live.message().await.unwrap().unwrap().encode_to_vec();
        assert!(!SECRETS.iter().any(|secret| has(&message, secret)));
        seen += usize::from(has(&message, &last));
    }
    // And in the old calls.
    for job in &jobs {
        let bearer = format!("Authorization: Bearer {auditors_token}");
        let answer = http(&server.address.to_string(), &format!("GET /jobs/{job}"), &[&bearer], "").await;
        assert_eq!(answer.code, 200);
        assert!(!SECRETS.iter().any(|secret| format!("{answer:?}").contains(secret)), "{answer:?}");
    }
    server.stop().await;
}
