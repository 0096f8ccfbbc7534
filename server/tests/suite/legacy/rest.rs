//! The old REST calls, as old clients make them.

use std::sync::Arc;

use chrono::DateTime;
use jobledger_client::{Claim, Client, Follow, Item, JobEventKind, NewJob, Report};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use uuid::Uuid;

use crate::{
    support::breaking::Breaking,
    support::harness::{Database, TestServer, on_both_databases},
};

on_both_databases! {
    a_job_lives_as_the_old_service_told_it,
    a_report_takes_the_job_wherever_it_says,
    what_has_no_way_or_is_leased_is_a_conflict,
    what_is_sent_back_is_what_was_sent,
    bad_requests_are_told_as_fastapi_tells_them,
    old_and_new_clients_see_the_same_jobs,
    without_its_database_it_says_when_to_come_back,
}

/// An HTTP answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: u16,
    headers: String,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        assert!(self.headers.to_lowercase().contains("content-type: application/json"), "{self:?}");
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Makes a request by HTTP/1.1, as curl does.
pub(crate) async fn http(address: &str, request: &str, headers: &[&str], body: &str) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut text =
        format!("{request} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    for header in headers {
        text.push_str(&format!("{header}\r\n"));
    }
    stream.write_all(format!("{text}\r\n{body}").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
    let (headers, text) = answer.split_once("\r\n\r\n").expect("headers end");
    Answer { code, headers: headers.to_owned(), text: text.to_owned() }
}

const JSON: &str = "Content-Type: application/json";

/// A server with the old REST calls turned on.
struct Legacy {
    server: TestServer,
    client: Client,
}

impl Legacy {
    async fn on(database: &Database) -> Self {
        let mut config = database.config();
        config.legacy_http = true;
        let server = TestServer::start(config).await;
        let client = server.client();
        Self { server, client }
    }

    async fn ask(&self, request: &str, body: &str) -> Answer {
        http(&self.server.address.to_string(), request, &[JSON], body).await
    }

    async fn create(&self) -> String {
        let answer = self.ask("POST /jobs", r#"{"type": "mock_process"}"#).await;
        assert_eq!(answer.code, 200, "{answer:?}");
        let body = answer.json();
        let id = body["job_id"].as_str().expect("an id").to_owned();
        assert_eq!(body, json!({"job_id": id}), "and nothing else");
        id
    }

    /// The text of GET /jobs/ID, with its times replaced by their names.
    async fn get(&self, id: &str) -> String {
        let answer = self.ask(&format!("GET /jobs/{id}"), "").await;
        assert_eq!(answer.code, 200, "{answer:?}");
        without_times(&answer)
    }

    async fn report(&self, id: &str, body: &Value) -> Answer {
        self.ask(&format!("POST /jobs/{id}/status"), &body.to_string()).await
    }

    async fn kinds(&self, id: &str) -> Vec<JobEventKind> {
        let mut events = self.client.subscribe(Follow::job(id).history_only()).await.unwrap();
        let mut kinds = Vec::new();
        while let Some(item) = events.next().await {
            if let Item::Event(event) = item.unwrap() {
                kinds.push(event.kind());
            }
        }
        kinds
    }
}

/// The text of an answer. Its times must be as Python prints them, and are replaced by their names.
fn without_times(answer: &Answer) -> String {
    let body = answer.json();
    let mut text = answer.text.clone();
    for name in ["created_at", "updated_at"] {
        let time = body[name].as_str().unwrap_or_else(|| panic!("{name} is missing: {text}"));
        assert!(time.ends_with("+00:00") && (time.len() == 32 || time.len() == 25), "{time}");
        DateTime::parse_from_rfc3339(time).expect("a time");
        text = text.replacen(&format!("\"{name}\":\"{time}\""), name, 1);
    }
    text
}

async fn a_job_lives_as_the_old_service_told_it(database: Database) {
    let legacy = Legacy::on(&database).await;
    // The steps of the test in the old service's report.
    let id = legacy.create().await;
    let fresh = r#""status":"pending","stage":null,"progress":0,"result":null,"error":null,created_at,updated_at}"#;
    assert_eq!(legacy.get(&id).await, format!("{{\"id\":\"{id}\",{fresh}"));

    let answer = legacy.report(&id, &json!({"status": "processing", "stage": "analyzing", "progress": 50})).await;
    let running =
        r#""status":"processing","stage":"analyzing","progress":50,"result":null,"error":null,created_at,updated_at}"#;
    assert_eq!((answer.code, without_times(&answer)), (200, format!("{{\"id\":\"{id}\",{running}")));
    assert_eq!(legacy.get(&id).await, format!("{{\"id\":\"{id}\",{running}"));

    let done = json!({"status": "completed", "stage": "done", "progress": 100, "result": {"frames": 12, "ü": [1.50, null]}, "error": null});
    assert_eq!(legacy.report(&id, &done).await.code, 200);
    let ended = legacy.get(&id).await;
    let body: Value = serde_json::from_str(&ended.replace(",created_at,updated_at", "")).unwrap();
    let expected = json!({"id": id, "status": "completed", "stage": "done", "progress": 100,
        "result": {"frames": 12, "ü": [1.5, null]}, "error": null});
    assert_eq!(body, expected);
    // Repeating a report changes nothing.
    assert_eq!(legacy.report(&id, &done).await.code, 200);
    use JobEventKind::{Created, Failed, Started, Succeeded};
    assert_eq!(legacy.kinds(&id).await, [Created, Started, Succeeded]);

    let id = legacy.create().await;
    legacy.report(&id, &json!({"status": "processing"})).await;
    let answer = legacy.report(&id, &json!({"status": "failed", "error": "Traceback: it's broken"})).await;
    let failed = r#""status":"failed","stage":null,"progress":0,"result":null,"error":"Traceback: it's broken",created_at,updated_at}"#;
    assert_eq!(without_times(&answer), format!("{{\"id\":\"{id}\",{failed}"));
    assert_eq!(legacy.kinds(&id).await, [Created, Started, Failed]);

    for request in
        ["GET /jobs/01a202c1-14cb-75f7-8263-5ef8e4054d47", "POST /jobs/01a202c1-14cb-75f7-8263-5ef8e4054d47/status"]
    {
        let answer = legacy.ask(request, "{}").await;
        assert_eq!((answer.code, answer.text.as_str()), (404, r#"{"detail":"Job not found"}"#));
    }
    legacy.server.stop().await;
}

async fn a_report_takes_the_job_wherever_it_says(database: Database) {
    use JobEventKind::{Canceled, Created, Failed, Progress, Released, Requeued, Started, Succeeded};
    let legacy = Legacy::on(&database).await;
    // The reports, one after the other, then the status after the last, and all events.
    let ways: [(Vec<Value>, &str, Vec<JobEventKind>); 16] = [
        (
            vec![json!({"status": "pending", "stage": null, "progress": 0}), json!({"progress": 0})],
            "pending",
            vec![Created],
        ),
        (
            vec![
                json!({"status": "failed", "error": "x"}),
                json!({"status": "pending", "stage": "waiting"}),
                json!({"status": "failed", "error": "x"}),
            ],
            "failed",
            vec![Created, Started, Failed, Requeued, Started, Failed],
        ),
        (vec![json!({"status": "completed"})], "completed", vec![Created, Started, Succeeded]),
        (
            vec![json!({"status": "completed", "result": 1}), json!({"status": "completed"})],
            "completed\",\"stage\":null,\"progress\":0,\"result\":1,\"error\":null",
            vec![Created, Started, Succeeded],
        ),
        (
            vec![json!({"status": "failed", "result": 1, "error": "x"}), json!({"status": "failed"})],
            "failed\",\"stage\":null,\"progress\":0,\"result\":1,\"error\":\"x\"",
            vec![Created, Started, Failed],
        ),
        (vec![json!({"status": "succeeded"})], "completed", vec![Created, Started, Succeeded]),
        (vec![json!({"status": "failed"})], "failed", vec![Created, Started, Failed]),
        (vec![json!({"stage": "extracting"})], "processing", vec![Created, Started]),
        (vec![json!({"status": "canceled"})], "canceled", vec![Created, Canceled]),
        (vec![json!({"status": "running"}), json!({"progress": 3})], "processing", vec![Created, Started, Progress]),
        (
            vec![json!({"status": "processing"}), json!({"status": "pending"})],
            "pending",
            vec![Created, Started, Released],
        ),
        (
            vec![json!({"status": "processing"}), json!({"status": "canceled"})],
            "canceled",
            vec![Created, Started, Canceled],
        ),
        (
            vec![json!({"status": "failed"}), json!({"status": "processing", "stage": "again"})],
            "processing",
            vec![Created, Started, Failed, Requeued, Started],
        ),
        (
            vec![json!({"status": "failed"}), json!({"status": "completed", "result": 1})],
            "completed",
            vec![Created, Started, Failed, Requeued, Started, Succeeded],
        ),
        (
            vec![json!({"status": "canceled"}), json!({"status": "pending"})],
            "pending",
            vec![Created, Canceled, Requeued],
        ),
        (
            vec![
                json!({}),
                json!({"status": "pending"}),
                json!({"status": "failed", "error": "x"}),
                json!({"status": "failed", "error": "x"}),
            ],
            "failed",
            vec![Created, Started, Failed],
        ),
    ];
    for (reports, status, kinds) in ways {
        let id = legacy.create().await;
        for report in &reports {
            let answer = legacy.report(&id, report).await;
            assert_eq!(answer.code, 200, "{report}: {answer:?}");
        }
        let text = legacy.get(&id).await;
        assert!(text.contains(&format!("\"status\":\"{status}")), "{reports:?}: {text}");
        assert_eq!(legacy.kinds(&id).await, kinds, "{reports:?}");
    }
    // Reports of old workers also use up the budget of a job that a new client created.
    let created = legacy.client.create(NewJob::new("t").max_attempts(2)).await.unwrap();
    let id = &created.job.id;
    for _ in 0..2 {
        legacy.report(id, &json!({"status": "processing"})).await;
        assert_eq!(legacy.report(id, &json!({"status": "failed", "error": "no"})).await.code, 200);
    }
    assert!(legacy.get(id).await.contains("\"status\":\"failed\""), "a dead letter, in the old words");
    let kinds = legacy.kinds(id).await;
    assert_eq!(kinds.last(), Some(&JobEventKind::DeadLettered));
    assert_eq!(legacy.report(id, &json!({"status": "processing"})).await.code, 200);
    legacy.server.stop().await;
}

async fn what_has_no_way_or_is_leased_is_a_conflict(database: Database) {
    let legacy = Legacy::on(&database).await;
    let id = legacy.create().await;
    legacy.report(&id, &json!({"status": "completed", "result": {"n": 1}})).await;
    for (report, detail) in [
        (json!({"status": "processing"}), "The job is completed, and can't become processing"),
        (json!({"status": "pending"}), "The job is completed, and can't become pending"),
        (json!({"status": "completed", "result": {"n": 2}}), "The job is completed, and can't become completed"),
        (json!({"status": "canceled"}), "The job is completed, and can't become canceled"),
        (json!({"progress": 7}), "The job is completed, so no worker is processing it"),
        (json!({"status": "dead_letter"}), "The job is completed, and can't become dead_letter"),
        (json!({"status": "processing", "result": 1}), "a result is allowed only with the status completed or failed"),
    ] {
        let answer = legacy.report(&id, &report).await;
        assert_eq!((answer.code, answer.json()), (409, json!({"detail": detail})), "{report}");
    }
    assert_eq!(legacy.kinds(&id).await.len(), 3, "nothing was half done");

    let id = legacy.create().await;
    let lease = legacy.client.claim(Claim::new("w")).await.unwrap().remove(0);
    assert_eq!(lease.job.as_ref().unwrap().id, id);
    for report in [json!({"status": "completed"}), json!({"progress": 7}), json!({"status": "canceled"})] {
        let answer = legacy.report(&id, &report).await;
        let detail = "The job is held by a worker under a lease, and only that worker may report on it";
        assert_eq!((answer.code, answer.json()), (409, json!({"detail": detail})), "{report}");
    }
    legacy.client.update(Report::succeeded(&id).lease(&lease.lease_token)).await.unwrap();
    legacy.server.stop().await;
}

async fn what_is_sent_back_is_what_was_sent(database: Database) {
    let legacy = Legacy::on(&database).await;
    let id = legacy.create().await;
    // Numbers that no double holds, characters beyond the first plane, and text that only looks like the NUL character.
    let sent = r#"{"status":"completed","result":{"id":12345678901234567890,"text":"\u00fc \ud83e\udd80 \\u0000","zero":-0.0}}"#;
    assert_eq!(legacy.ask(&format!("POST /jobs/{id}/status"), sent).await.code, 200);
    let text = legacy.get(&id).await;
    assert!(text.contains("\"id\": 12345678901234567890") || text.contains("\"id\":12345678901234567890"), "{text}");
    let body: Value = serde_json::from_str(&text.replace(",created_at,updated_at", "")).unwrap();
    assert_eq!(body["result"]["text"], "ü 🦀 \\u0000");

    // Values that the old service never bounded are cut, not refused.
    let id = legacy.create().await;
    let report = json!({"status": "failed", "stage": "s".repeat(300), "progress": 250.4, "error": "e".repeat(100_000)});
    assert_eq!(legacy.report(&id, &report).await.code, 200);
    let body: Value = serde_json::from_str(&legacy.get(&id).await.replace(",created_at,updated_at", "")).unwrap();
    assert_eq!((body["stage"].as_str().unwrap().len(), &body["progress"]), (100, &json!(100)));
    assert_eq!(body["error"].as_str().unwrap().len(), 64 << 10);
    // An `error` in a report that is no failure becomes the event's message.
    let id = legacy.create().await;
    legacy.report(&id, &json!({"status": "processing", "error": "slow disk"})).await;
    let mut events = legacy.client.subscribe(Follow::job(&id).history_only()).await.unwrap();
    let mut messages = Vec::new();
    while let Some(item) = events.next().await {
        if let Item::Event(event) = item.unwrap() {
            messages.push(event.message);
        }
    }
    assert_eq!(messages, ["", "slow disk"]);
    legacy.server.stop().await;
}

async fn bad_requests_are_told_as_fastapi_tells_them(database: Database) {
    let legacy = Legacy::on(&database).await;
    let long = "x".repeat(101);
    let too_long = json!({"type": "string_too_long", "loc": ["body", "type"],
        "msg": "String should have at most 100 characters", "input": long, "ctx": {"max_length": 100}});
    let long_body = json!({"type": long}).to_string();
    for (body, expected) in [
        ("", json!({"type": "missing", "loc": ["body"], "msg": "Field required", "input": null})),
        ("{}", json!({"type": "missing", "loc": ["body", "type"], "msg": "Field required", "input": {}})),
        (
            "{\"type\": 5}",
            json!({"type": "string_type", "loc": ["body", "type"], "msg": "Input should be a valid string", "input": 5}),
        ),
        (
            "{\"type\": null}",
            json!({"type": "string_type", "loc": ["body", "type"], "msg": "Input should be a valid string", "input": null}),
        ),
        (long_body.as_str(), too_long),
        (
            "[1]",
            json!({"type": "model_attributes_type", "loc": ["body"],
                "msg": "Input should be a valid dictionary or object to extract fields from", "input": [1]}),
        ),
        (
            "{\"type\": }",
            json!({"type": "json_invalid", "loc": ["body", 9], "msg": "JSON decode error", "input": {},
                "ctx": {"error": "expected value at line 1 column 10"}}),
        ),
    ] {
        let answer = legacy.ask("POST /jobs", body).await;
        assert_eq!((answer.code, answer.json()), (422, json!({"detail": [expected]})), "{body}");
    }
    let address = legacy.server.address.to_string();
    let form =
        http(&address, "POST /jobs", &["Content-Type: application/x-www-form-urlencoded"], "{\"type\":\"t\"}").await;
    assert_eq!((form.code, &form.json()["detail"][0]["type"]), (422, &json!("model_attributes_type")));
    let unsaid = http(&address, "POST /jobs", &[], "{\"type\":\"t\", \"more\": 1}").await;
    assert_eq!(unsaid.code, 200, "as FastAPI, it takes what doesn't say what it is for JSON: {unsaid:?}");

    let id = legacy.create().await;
    let answer = legacy
        .report(&id, &json!({"status": "archived", "stage": 7, "progress": "much", "error": ["e"], "result": "\0"}))
        .await;
    let body = answer.json();
    let errors: Vec<_> =
        body["detail"].as_array().unwrap().iter().map(|error| (&error["type"], &error["loc"])).collect();
    let at = |field: &str| json!(["body", field]);
    assert_eq!(
        errors,
        [
            (&json!("literal_error"), &at("status")),
            (&json!("string_type"), &at("stage")),
            (&json!("int_parsing"), &at("progress")),
            (&json!("value_error"), &at("result")),
            (&json!("string_type"), &at("error")),
        ]
    );
    assert_eq!(answer.code, 422);
    let answer = legacy.ask("GET /jobs/42", "").await;
    let body = answer.json();
    assert_eq!(
        (answer.code, &body["detail"][0]["type"], &body["detail"][0]["loc"]),
        (422, &json!("uuid_parsing"), &json!(["path", "job_id"]))
    );
    let answer = http(&address, "POST /jobs", &[JSON, "x-org-id: me"], "{\"type\":\"t\"}").await;
    assert_eq!((answer.code, &answer.json()["detail"][0]["loc"]), (422, &json!(["header", "x-org-id"])));
    let answer = legacy.ask("DELETE /jobs", "").await;
    assert_eq!((answer.code, answer.json()), (405, json!({"detail": "Method Not Allowed"})));
    let answer = legacy.ask("POST /jobs", &format!("{{\"type\":\"{}\"}}", "x".repeat(5 << 20))).await;
    assert_eq!((answer.code, answer.json()["detail"].is_string()), (413, true));
    for (request, code, expected) in [
        ("POST /jobs/?a=b", 307, "location: /jobs?a=b\r"),
        ("GET /jobs/42/", 307, "location: /jobs/42\r"),
        ("GET /jobs/42/other", 404, "content-type: application/json"),
        ("POST /api/jobs", 404, "content-type: application/json"),
        ("GET /health", 404, "content-type: application/json"),
    ] {
        let answer = legacy.ask(request, "").await;
        assert_eq!(answer.code, code, "{answer:?}");
        assert!(format!("{}\r", answer.headers.to_lowercase()).contains(expected), "{answer:?}");
    }
    let page = http(&address, "POST /jobs", &["Origin: http://evil.example"], "{\"type\":\"t\"}").await;
    assert_eq!(page.code, 403, "a page of another site may not: {page:?}");
    legacy.server.stop().await;
}

async fn old_and_new_clients_see_the_same_jobs(database: Database) {
    let legacy = Legacy::on(&database).await;
    let id = legacy.create().await;
    // A new worker claims an old client's job, and the old client sees its progress.
    let lease = legacy.client.claim(Claim::new("w").types(["mock_process"])).await.unwrap().remove(0);
    let report = Report::progress(&id).stage("deep").percent(20).lease(&lease.lease_token);
    legacy.client.update(report).await.unwrap();
    let text = legacy.get(&id).await;
    assert!(text.contains(r#""status":"processing","stage":"deep","progress":20,"#), "{text}");
    let report = Report::failed(&id, "TIMEOUT", "").lease(&lease.lease_token);
    legacy.client.update(report).await.unwrap();
    assert!(legacy.get(&id).await.contains(r#""error":"TIMEOUT""#), "a code where there is no message");

    let org = Uuid::new_v4();
    let address = legacy.server.address.to_string();
    let header = format!("X-Org-Id: {org}");
    let answer = http(&address, "POST /jobs", &[JSON, &header], "{\"type\":\"t\"}").await;
    let theirs = answer.json()["job_id"].as_str().unwrap().to_owned();
    assert_eq!(legacy.ask(&format!("GET /jobs/{theirs}"), "").await.code, 404, "another org's");
    assert_eq!(http(&address, &format!("GET /jobs/{theirs}"), &[&header], "").await.code, 200);
    let counts = legacy.client.statistics(&[]).await.unwrap().counts.unwrap();
    assert_eq!((counts.queued, counts.failed), (0, 1), "what old clients do is counted as all else");
    legacy.server.stop().await;
}

async fn without_its_database_it_says_when_to_come_back(database: Database) {
    let store = Breaking::new(database.open().await, &[]);
    let mut config = database.config();
    config.legacy_http = true;
    let server = TestServer::start_with(config, Arc::clone(&store) as _).await;
    store.go_away();
    let answer = http(&server.address.to_string(), "POST /jobs", &[JSON], "{\"type\":\"t\"}").await;
    assert_eq!(answer.code, 503, "{answer:?}");
    assert!(answer.headers.to_lowercase().contains("retry-after: 1"), "{answer:?}");
    assert!(answer.json()["detail"].as_str().unwrap().contains("is not available"), "{answer:?}");
    store.come_back().await;
    server.stop().await;
}

#[tokio::test]
async fn where_they_are_off_callers_are_told_how_to_turn_them_on() {
    let database = Database::sqlite();
    let (server, _) = TestServer::on(&database).await;
    for request in ["POST /jobs", "GET /jobs/01a202c1-14cb-75f7-8263-5ef8e4054d47"] {
        let answer = http(&server.address.to_string(), request, &[JSON], "{\"type\":\"t\"}").await;
        assert_eq!(answer.code, 404);
        assert!(answer.json()["detail"].as_str().unwrap().contains("--legacy-http"), "{answer:?}");
    }
    server.stop().await;
}
