//! Access control: which credential may make which call. A table covers every call, every role and every invalid credential.

use std::{collections::BTreeSet, fmt::Write as _, time::Duration};

use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};
use jobledger_client::{
    Claim, Client, Error, Follow, Item, JobEventKind, NewJob, Report, Token,
    proto::{GetJobRequest, StreamJobEventsRequest, StreamJobEventsResponse},
};
use jobledger_proto::FILE_DESCRIPTOR_SET;
use jobledger_server::{
    Config, Server,
    access::{Authentication, Secret},
    domain::{
        access::{ApiToken, Role, Roles},
        clock::{Clock as _, SystemClock},
        id::OrgId,
    },
    store::DatabaseUrl,
};
use prost::{Message as _, bytes::Bytes};
use prost_types::{FileDescriptorSet, MethodDescriptorProto};
use tokio::{net::TcpListener, time::timeout};
use tonic::Code;
use uuid::Uuid;

use crate::{
    jobs::errors::assert_error,
    legacy::rest::http,
    support::cluster::OWNER,
    support::harness::{Database, PATIENCE, TestServer, on_both_databases, root},
    support::raw::Answer,
};

on_both_databases! {
    every_call_is_for_its_roles_in_their_own_org,
    old_calls_are_for_the_same_roles,
    who_calls_is_who_the_events_name,
    another_orgs_job_and_an_unknown_one_are_told_the_same,
    a_server_that_others_reach_asks_who_they_are,
}

pub(crate) const OURS: Uuid = Uuid::from_u128(0xa11ce);
pub(crate) const THEIRS: Uuid = Uuid::from_u128(0xb0b);

/// A server that requires authentication.
pub(crate) fn guarded(database: &Database) -> Config {
    let mut config = database.config();
    config.access.authentication = Authentication::Required;
    config
}

pub(crate) fn owner_url(database: &Database) -> DatabaseUrl {
    database.url_as(OWNER).parse().expect("a valid URL")
}

/// Makes a token; returns its text and its id.
pub(crate) async fn token_with(
    database: &Database,
    org: Option<Uuid>,
    roles: &[Role],
    change: impl FnOnce(&mut ApiToken),
) -> (String, Uuid) {
    let secret = Secret::generate(org.map(OrgId)).expect("the system has randomness");
    let mut token = ApiToken {
        id: Uuid::now_v7(),
        org: org.map(OrgId),
        digest: secret.digest(),
        name: "tester".to_owned(),
        roles: Roles::of(roles),
        created_at: SystemClock.now(),
        expires_at: None,
        revoked_at: None,
        used_at: None,
    };
    change(&mut token);
    if !database.is_postgres() && !database.path().exists() {
        database.open().await.close().await;
    }
    owner_url(database).database().unwrap().add_token(&token).await.expect("the token is kept");
    (secret.text().to_owned(), token.id)
}

pub(crate) async fn token(database: &Database, org: Option<Uuid>, role: Role) -> String {
    token_with(database, org, &[role], |_| {}).await.0
}

pub(crate) fn client_with(server: &TestServer, token: &str) -> Client {
    let token = Token::new(token).unwrap();
    Client::builder(server.endpoint()).token(token).timeout(PATIENCE).build().expect("a valid endpoint")
}

/// Every call, and whether a producer, worker, observer, auditor, admin or operator may make it, in this order.
const CALLS: [(&str, [bool; 6]); 35] = [
    ("jobledger.v1.JobService/CreateJob", [true, false, false, false, true, true]),
    ("jobledger.v1.JobService/BatchCreateJobs", [true, false, false, false, true, true]),
    ("jobledger.v1.JobService/GetJob", [true, true, true, true, true, true]),
    ("jobledger.v1.JobService/ListJobs", [true, true, true, true, true, true]),
    ("jobledger.v1.JobService/ExplainJob", [true, true, true, true, true, true]),
    ("jobledger.v1.JobService/UpdateJobStatus", [false, true, false, false, true, true]),
    ("jobledger.v1.JobService/BatchUpdateJobStatus", [false, true, false, false, true, true]),
    ("jobledger.v1.JobService/ClaimJobs", [false, true, false, false, true, true]),
    ("jobledger.v1.JobService/Heartbeat", [false, true, false, false, true, true]),
    ("jobledger.v1.JobService/CancelJob", [true, false, false, false, true, true]),
    ("jobledger.v1.JobService/RetryJob", [true, false, false, false, true, true]),
    ("jobledger.v1.JobService/UpdateJob", [true, false, false, false, true, true]),
    ("jobledger.v1.JobService/EraseJob", [false, false, false, false, true, true]),
    ("jobledger.v1.JobService/StreamJobEvents", [false, false, true, true, true, true]),
    ("jobledger.v1.JobService/GetStatistics", [false, false, true, true, true, true]),
    ("jobledger.v1.JobTypeService/ListJobTypes", [false, false, true, true, true, true]),
    ("jobledger.v1.JobTypeService/GetJobType", [false, false, true, true, true, true]),
    ("jobledger.v1.JobTypeService/UpdateJobType", [false, false, false, false, true, true]),
    ("jobledger.v1.JobTypeService/DeleteJobType", [false, false, false, false, true, true]),
    ("jobledger.v1.JobTypeService/PauseJobType", [false, false, false, false, true, true]),
    ("jobledger.v1.JobTypeService/ResumeJobType", [false, false, false, false, true, true]),
    ("jobledger.v1.BulkOperationService/StartBulkOperation", [false, false, false, false, true, true]),
    ("jobledger.v1.BulkOperationService/GetBulkOperation", [false, false, true, true, true, true]),
    ("jobledger.v1.BulkOperationService/ListBulkOperations", [false, false, true, true, true, true]),
    ("jobledger.v1.BulkOperationService/StopBulkOperation", [false, false, false, false, true, true]),
    ("jobledger.v1.WorkerService/ListWorkers", [false, false, true, true, true, true]),
    ("jobledger.v1.ServerService/GetServerInfo", [true; 6]),
    ("jobledger.v1.ServerService/CreateToken", [false, false, false, false, true, true]),
    ("jobledger.v1.ServerService/ListTokens", [false, false, false, false, true, true]),
    ("jobledger.v1.ServerService/RevokeToken", [false, false, false, false, true, true]),
    (ABOUT_ALL_ORGS, [false, false, false, false, false, true]),
    ("grpc.health.v1.Health/Check", [true; 6]),
    ("grpc.health.v1.Health/Watch", [true; 6]),
    ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", [true; 6]),
    ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", [true; 6]),
];
const ROLES: [Role; 6] = [Role::Producer, Role::Worker, Role::Observer, Role::Auditor, Role::Admin, Role::Operator];
/// The only call of the contract that is about no single org.
const ABOUT_ALL_ORGS: &str = "jobledger.v1.ServerService/ListOrgs";
/// The only call that needs no credential.
const PUBLIC: &str = "grpc.health.v1.Health/Check";

fn is_about_an_org(call: &str) -> bool {
    call.starts_with("jobledger.")
}

#[test]
fn the_table_has_every_call_of_the_contract() {
    let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).expect("it is one");
    let mut calls = BTreeSet::new();
    for file in &set.file {
        for service in &file.service {
            let call =
                |method: &MethodDescriptorProto| format!("{}.{}/{}", file.package(), service.name(), method.name());
            calls.extend(service.method.iter().map(call));
        }
    }
    let in_table = CALLS.iter().map(|(call, _)| (*call).to_owned()).filter(|call| is_about_an_org(call));
    assert_eq!(in_table.collect::<BTreeSet<_>>(), calls);
}

/// Sends a message with these headers. Returns the status code of the response headers, or OK if they have none.
struct Caller {
    http: HttpClient<HttpConnector, Full<Bytes>>,
    endpoint: String,
}

impl Caller {
    fn of(server: &TestServer) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let http = HttpClient::builder(TokioExecutor::new()).http2_only(true).build(connector);
        Self { http, endpoint: server.endpoint() }
    }

    async fn call(&self, call: &str, headers: &[(&str, &str)], message: &[u8]) -> Code {
        let mut frame = vec![0];
        frame.extend((message.len() as u32).to_be_bytes());
        frame.extend(message);
        let mut request = http::Request::post(format!("{}/{call}", self.endpoint))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer =
            timeout(PATIENCE, self.http.request(request.body(Full::from(frame)).unwrap())).await.unwrap().unwrap();
        let code = answer.headers().get("grpc-status").map_or(0, |code| code.to_str().unwrap().parse().unwrap());
        Code::from_i32(code)
    }
}

async fn every_call_is_for_its_roles_in_their_own_org(database: Database) {
    let mut tokens = Vec::new();
    for role in ROLES {
        let org = (role != Role::Operator).then_some(OURS);
        tokens.push((role, token(&database, org, role).await));
    }
    let past = SystemClock.now() - Duration::from_secs(1);
    let expired = token_with(&database, Some(OURS), &[Role::Admin], |token| token.expires_at = Some(past)).await.0;
    let (revoked, id) = token_with(&database, Some(OURS), &[Role::Admin], |_| {}).await;
    assert!(owner_url(&database).database().unwrap().revoke_token(id, past).await.unwrap());
    let unknown = Secret::generate(Some(OrgId(OURS))).unwrap().text().to_owned();
    // The admin's secret under another org's id. `unknown` is a random secret under our org's id.
    let admin = &tokens[4].1;
    let moved = format!("{}{}", &Secret::generate(Some(OrgId(THEIRS))).unwrap().text()[..23], &admin[23..]);
    let server = TestServer::start(guarded(&database)).await;
    let caller = Caller::of(&server);
    let (ours, theirs) = (OURS.to_string(), THEIRS.to_string());

    let mut unexpected = String::new();
    let mut cells = 0;
    let mut expect = |what: String, found: Code, expected: fn(Code) -> bool| {
        cells += 1;
        if !expected(found) {
            writeln!(unexpected, "{what}: {found:?}").unwrap();
        }
    };
    let is_let_in = |code| !matches!(code, Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented);
    for (call, allowed) in CALLS {
        // An allowed call may still be refused for its message, which is empty.
        for ((role, token), is_allowed) in tokens.iter().zip(allowed) {
            let bearer = format!("Bearer {token}");
            let is_operator = *role == Role::Operator;
            for (org, named) in
                [("none", None), ("own", Some(&*ours)), ("other", Some(&*theirs)), ("bad", Some("acme"))]
            {
                let mut headers = vec![("authorization", &*bearer)];
                headers.extend(named.map(|named| ("x-org-id", named)));
                let found = caller.call(call, &headers, &[]).await;
                let expected: fn(Code) -> bool = if call == ABOUT_ALL_ORGS && !is_allowed {
                    |code| code == Code::PermissionDenied
                } else if call == ABOUT_ALL_ORGS || !is_about_an_org(call) {
                    is_let_in
                } else if org == "bad" || org == "none" && is_operator {
                    |code| code == Code::InvalidArgument
                } else if org == "other" && !is_operator || !is_allowed {
                    |code| code == Code::PermissionDenied
                } else {
                    is_let_in
                };
                expect(format!("{call} by {role}, org {org}"), found, expected);
            }
        }
        let basic = "Basic Zm9vOmJhcg==".to_owned();
        let bearer = |token: &str| format!("Bearer {token}");
        for (what, header) in [
            ("none", None),
            ("empty", Some(String::new())),
            ("no token", Some("Bearer ".to_owned())),
            ("another scheme", Some(basic)),
            ("garbage", Some(bearer("jl_garbage"))),
            ("half a token", Some(bearer(&admin[..40]))),
            ("a token and more", Some(bearer(&format!("{admin}A")))),
            ("unknown", Some(bearer(&unknown))),
            ("moved to another org", Some(bearer(&moved))),
            ("expired", Some(bearer(&expired))),
            ("revoked", Some(bearer(&revoked))),
            ("a JWT, and none are taken", Some(bearer("eyJhbGciOiJub25lIn0.e30."))),
        ] {
            for named in [None, Some(&*ours), Some(&*theirs), Some("acme")] {
                let mut headers = Vec::new();
                headers.extend(header.as_deref().map(|header| ("authorization", header)));
                headers.extend(named.map(|named| ("x-org-id", named)));
                let found = caller.call(call, &headers, &[]).await;
                let expected: fn(Code) -> bool =
                    if call == PUBLIC { is_let_in } else { |code| code == Code::Unauthenticated };
                expect(format!("{call}, credential {what}, org {named:?}"), found, expected);
            }
        }
    }
    // Every role may stream one job. NOT_FOUND shows that the call was let in.
    let one = StreamJobEventsRequest { job_id: Uuid::now_v7().to_string(), ..Default::default() }.encode_to_vec();
    for (role, token) in &tokens {
        let headers = [("authorization", &*format!("Bearer {token}")), ("x-org-id", &*ours)];
        let found = caller.call("jobledger.v1.JobService/StreamJobEvents", &headers, &one).await;
        expect(format!("a stream of one job by {role}"), found, |code| code == Code::NotFound);
    }
    // A header that comes twice is refused: a proxy in between may have checked the other value.
    let (bearer, call) = (format!("Bearer {admin}"), "jobledger.v1.JobService/GetStatistics");
    let (known, org) = (("authorization", &*bearer), ("x-org-id", &*ours));
    expect("one of each".to_owned(), caller.call(call, &[known, org], &[]).await, is_let_in);
    expect("two credentials".to_owned(), caller.call(call, &[known, org, known], &[]).await, |code| {
        code == Code::Unauthenticated
    });
    expect("two orgs".to_owned(), caller.call(call, &[org, known, org], &[]).await, |code| {
        code == Code::InvalidArgument
    });
    // A reflection client sends more messages only after an answer, so the refusal must not wait for the request's end.
    let reflection = "grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    let (refused, _open) = Answer::streamed(&server, reflection, &[], Bytes::new());
    let refused = timeout(Duration::from_millis(1_900), refused).await.expect("before its request ends").unwrap();
    assert_error(&refused.status(), Code::Unauthenticated, "UNAUTHENTICATED");
    // A method that doesn't exist is UNIMPLEMENTED with a credential and UNAUTHENTICATED without one.
    for call in ["jobledger.v1.JobService/DropJobs", "jobledger.v2.JobService/CreateJob", "x.Y/Z"] {
        let headers = [("authorization", &*format!("Bearer {admin}"))];
        expect(call.to_owned(), caller.call(call, &headers, &[]).await, |code| code == Code::Unimplemented);
        expect(call.to_owned(), caller.call(call, &[], &[]).await, |code| code == Code::Unauthenticated);
    }
    assert_eq!(unexpected, "", "of {cells} cells");
    assert_eq!(cells, CALLS.len() * (ROLES.len() * 4 + 12 * 4) + ROLES.len() + 3 + 6);
    server.stop().await;
    assert_documented();
}

/// Checks that docs/access.md has this table.
fn assert_documented() {
    let mut table = String::from(
        "| call | producer | worker | observer | auditor | admin | operator |\n|---|---|---|---|---|---|---|\n",
    );
    for (call, allowed) in CALLS.iter().filter(|(call, _)| is_about_an_org(call)) {
        let cells: Vec<_> = allowed.iter().map(|allowed| if *allowed { "yes" } else { "–" }).collect();
        writeln!(table, "| `{}` | {} |", call.rsplit('/').next().unwrap(), cells.join(" | ")).unwrap();
    }
    let documented = std::fs::read_to_string(root().join("docs/access.md")).expect("it is there");
    assert!(documented.contains(&table), "docs/access.md has another table than:\n{table}");
}

async fn old_calls_are_for_the_same_roles(database: Database) {
    let mut tokens = Vec::new();
    for role in ROLES {
        tokens.push((role, token(&database, (role != Role::Operator).then_some(OURS), role).await));
    }
    let mut config = guarded(&database);
    config.legacy_http = true;
    let server = TestServer::start(config).await;
    let address = server.address.to_string();
    let job = client_with(&server, &tokens[0].1).create(NewJob::new("t")).await.unwrap().job.id;
    let (read, report) = (format!("GET /jobs/{job}"), format!("POST /jobs/{job}/status"));
    let org = format!("x-org-id: {OURS}");
    for (request, body, allowed) in [
        ("POST /jobs", "{\"type\":\"t\"}", [true, false, false, false, true, true]),
        (&*read, "", [true; 6]),
        (&*report, "{\"progress\": 5}", [false, true, false, false, true, true]),
    ] {
        for ((role, token), is_allowed) in tokens.iter().zip(allowed) {
            let headers = ["Content-Type: application/json", &*org, &*format!("Authorization: Bearer {token}")];
            let answer = http(&address, request, &headers, body).await;
            assert_eq!(answer.code, if is_allowed { 200 } else { 403 }, "{request} by {role}: {answer:?}");
            assert!(answer.json().is_object());
        }
        let nobody = http(&address, request, &["Content-Type: application/json"], body).await;
        assert_eq!(nobody.code, 401, "{nobody:?}");
        assert!(format!("{nobody:?}").to_lowercase().contains("www-authenticate: bearer"), "{nobody:?}");
        let theirs = format!("x-org-id: {THEIRS}");
        let headers = ["Content-Type: application/json", &*theirs, &*format!("Authorization: Bearer {}", tokens[4].1)];
        assert_eq!(http(&address, request, &headers, body).await.code, 403);
    }
    // Probes need no credential. Everything else does, unknown paths included.
    for (request, code) in [("GET /healthz", 200), ("GET /readyz", 200), ("GET /metrics", 401), ("GET /", 401)] {
        assert_eq!(http(&address, request, &[], "").await.code, code, "{request}");
    }
    let known = format!("Authorization: Bearer {}", tokens[4].1);
    assert_eq!(http(&address, "GET /metrics", &[&known], "").await.code, 404);
    server.stop().await;
}

/// Reads a stream to its end; returns the error that it ends with.
pub(crate) async fn end_of(mut stream: tonic::Streaming<StreamJobEventsResponse>) -> tonic::Status {
    let end = async {
        loop {
            match stream.message().await {
                Ok(message) => assert!(message.is_some(), "not as if all were said"),
                Err(status) => return status,
            }
        }
    };
    timeout(PATIENCE, end).await.expect("it ends")
}

async fn who_calls_is_who_the_events_name(database: Database) {
    let named = |name: &str| {
        let name = name.to_owned();
        move |token: &mut ApiToken| token.name = name
    };
    let producer = token_with(&database, Some(OURS), &[Role::Producer], named("shop")).await.0;
    let worker = token_with(&database, Some(OURS), &[Role::Worker], named("resizers")).await.0;
    let server = TestServer::start(guarded(&database)).await;
    let (producer, worker) = (client_with(&server, &producer), client_with(&server, &worker));
    let job = producer.create(NewJob::new("t")).await.unwrap().job;
    assert_eq!(job.requested_by, "token:shop");
    let asked = producer.create(NewJob::new("t").requested_by("alice")).await.unwrap().job;
    assert_eq!(asked.requested_by, "alice");
    producer.cancel(&asked.id, "changed her mind").await.unwrap();
    let lease = worker.claim(Claim::new("host-7")).await.unwrap().remove(0);
    assert_eq!((&lease.job.as_ref().unwrap().id, &*lease.job.as_ref().unwrap().worker_id), (&job.id, "host-7"));
    worker.update(Report::succeeded(&job.id).lease(&lease.lease_token)).await.unwrap();
    let mut who = Vec::new();
    for id in [&job.id, &asked.id] {
        let mut events = worker.subscribe(Follow::job(id)).await.unwrap();
        while let Some(item) = events.next().await {
            if let Item::Event(event) = item.unwrap() {
                who.push((event.kind(), event.actor));
            }
        }
    }
    let expected = [
        (JobEventKind::Created, "token:shop"),
        (JobEventKind::Claimed, "token:resizers"),
        (JobEventKind::Succeeded, "token:resizers"),
        (JobEventKind::Created, "token:shop"),
        (JobEventKind::Canceled, "token:shop"),
    ];
    assert_eq!(who, expected.map(|(kind, who)| (kind, who.to_owned())));
    server.stop().await;
}

/// The headers and the body of a GetJob answer, byte by byte, with the requested id replaced.
async fn refusal(caller: &Caller, bearer: &str, id: &str) -> (Vec<(String, String)>, Vec<u8>) {
    let message = GetJobRequest { job_id: id.to_owned(), ..Default::default() }.encode_to_vec();
    let mut frame = vec![0];
    frame.extend((message.len() as u32).to_be_bytes());
    frame.extend(message);
    let request = http::Request::post(format!("{}/jobledger.v1.JobService/GetJob", caller.endpoint))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", bearer);
    let answer = caller.http.request(request.body(Full::from(frame)).unwrap()).await.unwrap();
    let (head, body) = answer.into_parts();
    let mut headers: Vec<_> = head
        .headers
        .iter()
        // The time of day differs between answers.
        .filter(|(name, _)| *name != "date")
        .map(|(name, value)| {
            let value = value.to_str().unwrap().to_owned();
            let details = (name == "grpc-status-details-bin").then(|| decode(&value));
            (name.to_string(), details.unwrap_or(value).replace(id, "ID"))
        })
        .collect();
    headers.sort();
    (headers, body.collect().await.unwrap().to_bytes().to_vec())
}

fn decode(details: &str) -> String {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD_NO_PAD.decode(details.trim_end_matches('=')).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn another_orgs_job_and_an_unknown_one_are_told_the_same(database: Database) {
    const TRIES: usize = 1_000;
    let ours = token(&database, Some(OURS), Role::Admin).await;
    let theirs = token(&database, Some(THEIRS), Role::Admin).await;
    let server = TestServer::start(guarded(&database)).await;
    let client = client_with(&server, &theirs);
    let mut jobs = Vec::new();
    for _ in 0..20 {
        jobs.push(client.create(NewJob::new("t")).await.unwrap().job.id);
    }
    let (caller, bearer) = (Caller::of(&server), format!("Bearer {ours}"));
    let mut times = [Vec::new(), Vec::new()];
    let expected = refusal(&caller, &bearer, &Uuid::now_v7().to_string()).await;
    assert!(expected.0.contains(&("grpc-status".to_owned(), "5".to_owned())), "{expected:?}");
    for n in 0..TRIES {
        let unknown = Uuid::now_v7();
        // One call of each kind per round, in random order, so that no periodic load on the machine favours one kind.
        let first = usize::from(unknown.as_bytes()[15] % 2);
        let ids = [&jobs[n % jobs.len()], &unknown.to_string()];
        for kind in [first, 1 - first] {
            let asked = std::time::Instant::now();
            let found = refusal(&caller, &bearer, ids[kind]).await;
            times[kind].push(asked.elapsed());
            assert_eq!(found, expected);
        }
    }
    // At each quartile the times differ by less than 25 %: less than either distribution varies from run to run.
    for times in &mut times {
        times.sort();
    }
    let [theirs, unknown] = times;
    for part in [TRIES / 4, TRIES / 2, TRIES * 3 / 4] {
        let (one, other) = (theirs[part].as_secs_f64(), unknown[part].as_secs_f64());
        assert!((one / other).max(other / one) < 1.25, "at {part} of {TRIES}: {one} s against {other} s");
    }
    let ours = client_with(&server, &ours);
    for id in &jobs {
        for refused in [
            ours.cancel(id, "").await.map(|_| ()),
            ours.update(Report::start(id)).await.map(|_| ()),
            ours.retry(id).await.map(|_| ()),
        ] {
            assert!(matches!(&refused, Err(Error::JobNotFound { job_id }) if job_id == id), "{refused:?}");
        }
    }
    assert_eq!(ours.list(Default::default()).await.unwrap().jobs.len(), 0);
    assert_eq!(client.get(&jobs[0]).await.unwrap().last_seq, 1);
    server.stop().await;
}

async fn a_server_that_others_reach_asks_who_they_are(database: Database) {
    let start = || async {
        let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
        Server::open(listener, database.config()).await?.run(std::future::ready(())).await
    };
    let refused = start().await.expect_err("nobody could call").to_string();
    for way in ["jobledger token create", "--jwt-keys", "--client-identities", "--insecure-no-auth"] {
        assert!(refused.contains(way), "{refused}");
    }
    token(&database, Some(OURS), Role::Admin).await;
    start().await.expect("somebody could");
}
