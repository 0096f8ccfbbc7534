//! Tenants that attack with a valid credential: what they hold or wait for is not taken from other orgs.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use jobledger_client::{
    Claim, Client, Error, Follow, Item, NewJob, Report,
    proto::{
        BatchCreateJobsRequest, ClaimJobsRequest, CreateJobRequest, GetStatisticsRequest, HeartbeatRequest,
        JobEventKind, JobStatus, JobView, LeaseHeartbeat, ListJobsRequest, StreamJobEventsRequest,
        UpdateJobStatusRequest,
    },
};
use jobledger_server::{
    domain::{
        id::{Digest, OrgId},
        json::Json,
        status,
    },
    ledger::{self, Command, Limits, StatisticsQuery},
};
use prost::Message as _;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use tonic::Code;
use uuid::Uuid;

use crate::{
    jobs::errors::assert_error,
    stores::ledger as lanes,
    support::harness::{Database, PATIENCE, on_both_databases, resident},
    support::program::Program,
    support::raw::{DATA, END_HEADERS, END_STREAM, HEADERS, Raw, frame, header_block},
};

on_both_databases! {
    claims_that_wait_hold_no_room_for_requests,
    streams_that_are_not_read_keep_no_other_org_from_the_past,
    what_streams_and_claims_name_takes_no_more_than_its_part,
    lists_without_end_keep_nobody_from_anything,
    payloads_of_claimed_jobs_are_read_in_turns,
    nobody_works_out_a_lease_token_from_what_is_told_of_a_job,
    names_that_would_write_to_a_terminal_are_refused,
}

const CLAIM: &str = "/jobledger.v1.JobService/ClaimJobs";
const STREAM: &str = "/jobledger.v1.JobService/StreamJobEvents";

/// A new org, and its client.
pub(crate) fn tenant(program: &Program) -> (Uuid, Client) {
    let org = Uuid::new_v4();
    (org, program.client_of(org))
}

/// Begins a call of an org and sends its whole message.
pub(crate) async fn begin(raw: &mut Raw, path: &str, org: Uuid, message: &[u8]) {
    let stream = raw.next_stream();
    let headers = header_block(path, &[("x-org-id", &org.to_string())]);
    raw.send(HEADERS, END_HEADERS, stream, &headers).await.unwrap();
    let message = frame(message);
    let mut pieces = message.chunks(16_384).peekable();
    while let Some(piece) = pieces.next() {
        raw.send(DATA, if pieces.peek().is_none() { END_STREAM } else { 0 }, stream, piece).await.unwrap();
    }
}

async fn claims_that_wait_hold_no_room_for_requests(database: Database) {
    // One org may have a third of it: three such claims.
    let program = Program::start_with(&database, &["--max-request-memory", "1800000"]);
    let ((org, client), (_, other)) = (tenant(&program), tenant(&program));
    let claim = ClaimJobsRequest {
        worker_id: "w".to_owned(),
        wait: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
        ..Default::default()
    };
    // An unknown field: no version of the contract has it.
    let mut message = claim.encode_to_vec();
    message.extend([0xfa, 0x7f]);
    prost::encoding::encode_varint(190_000, &mut message);
    message.resize(message.len() + 190_000, 0);
    let mut raw = Raw::over(TcpStream::connect(&program.address).await.unwrap()).await;
    // The server's settings say how much may be sent at once.
    raw.is_served().await;
    for _ in 0..16 {
        begin(&mut raw, CLAIM, org, &message).await;
        raw.is_served().await;
    }
    for client in [client, other] {
        let create: CreateJobRequest = NewJob::new("t").payload(&"x".repeat(300_000)).unwrap().into();
        client.raw().create_job(create).await.unwrap();
    }
    assert!(program.end_by("TERM").success());
}

/// Creates jobs with results that fill pages.
async fn fill(client: &Client, jobs: usize) {
    for _ in 0..jobs {
        let id = client.create(NewJob::new("t")).await.unwrap().job.id;
        client.update(Report::start(&id)).await.unwrap();
        client.update(Report::succeeded(&id).result(&json!("x".repeat(500_000))).unwrap()).await.unwrap();
    }
}

async fn streams_that_are_not_read_keep_no_other_org_from_the_past(database: Database) {
    const STREAMS: usize = 40;
    let program = Program::start_with(&database, &["--max-stream-memory", "8388608"]);
    let ((org, client), (_, other)) = (tenant(&program), tenant(&program));
    fill(&client, 12).await;
    fill(&other, 6).await;
    let mut raw = Raw::without_window(TcpStream::connect(&program.address).await.unwrap()).await;
    let request = StreamJobEventsRequest { after_seq: Some(0), ..Default::default() }.encode_to_vec();
    for _ in 0..STREAMS {
        begin(&mut raw, STREAM, org, &request).await;
    }
    raw.is_served().await;
    let past = async |client: &Client, events: usize, patience: Duration| {
        let mut stream = client.subscribe(Follow::org().after(0).history_only()).await.unwrap();
        let mut seen = 0;
        while let Some(item) = timeout(patience, stream.next()).await.expect("the past comes") {
            seen += usize::from(matches!(item.unwrap(), Item::Event(_)));
        }
        assert_eq!(seen, events);
    };
    // Long before a stream is ended because it is not read.
    past(&other, 18, Duration::from_secs(10)).await;
    // The org's own stream comes to its end, too: unread streams are ended where there is no room.
    past(&client, 36, PATIENCE).await;
    drop(raw);
    assert!(program.end_by("TERM").success());
}

async fn what_streams_and_claims_name_takes_no_more_than_its_part(database: Database) {
    let program = Program::start_with(&database, &["--max-named-memory", "1048576"]);
    let ((_, client), (_, other)) = (tenant(&program), tenant(&program));
    let types = |n: usize| (0..100).map(move |m| format!("{}{n} {m}", "🦀".repeat(80)));
    let mut kept = Vec::new();
    // Each stream names some 40 KB, so a third of a mebibyte has room for few.
    for n in 0..12 {
        let request = StreamJobEventsRequest { types: types(n).collect(), ..Default::default() };
        match client.raw().stream_job_events(request).await {
            Ok(stream) => kept.push(stream),
            Err(status) => {
                assert_error(&status, Code::ResourceExhausted, "OVERLOADED");
            }
        }
    }
    assert!((4..12).contains(&kept.len()), "{} of 12", kept.len());
    let claim = |client: &Client| {
        let (worker_id, types) = ("w".to_owned(), types(20).collect());
        let (claim, mut service) = (ClaimJobsRequest { worker_id, types, ..Default::default() }, client.raw());
        async move { service.claim_jobs(claim).await }
    };
    let status = claim(&client).await.unwrap_err();
    let told = assert_error(&status, Code::ResourceExhausted, "OVERLOADED");
    assert_eq!((&*told["scope"], &*told["limit"]), ("org", "349525"));
    // Other orgs have their own share. An org that lets go has its share again.
    claim(&other).await.unwrap();
    drop(kept);
    let again = async { while claim(&client).await.is_err() {} };
    timeout(PATIENCE, again).await.expect("there is room again");
    assert!(program.end_by("TERM").success());
}

async fn lists_without_end_keep_nobody_from_anything(database: Database) {
    const LISTS: usize = 300;
    /// More than a busy machine takes, and well below the time after which calls are given up.
    const SOON: Duration = Duration::from_secs(4);
    let program = Program::start(&database);
    let ((_, client), (_, other)) = (tenant(&program), tenant(&program));
    for _ in 0..4 {
        let jobs = (0..500).map(|_| NewJob::new("t").payload(&"x".repeat(3_000)).unwrap());
        assert!(client.create_all(jobs).await.unwrap().iter().all(Result::is_ok));
    }
    fill(&other, 1).await;
    let mut lists = JoinSet::new();
    for _ in 0..LISTS {
        let mut service = client.raw();
        lists.spawn(async move {
            loop {
                let request = ListJobsRequest { page_size: 1_000, view: JobView::Full.into(), ..Default::default() };
                // A list may be refused because there are too many.
                if let Err(error) = service.list_jobs(request).await {
                    assert_ne!(error.code(), Code::Unavailable, "{error:?}");
                }
            }
        });
    }
    let soon = async |what: &str, call: Pin<Box<dyn Future<Output = ()> + Send>>| {
        timeout(SOON, call).await.unwrap_or_else(|_| panic!("{what} takes too long"));
    };
    for _ in 0..10 {
        let id = other.create(NewJob::new("t")).await.unwrap().job.id;
        let (reader, lister, counter, follower) = (other.clone(), other.raw(), other.raw(), other.clone());
        soon("a read", Box::pin(async move { drop(reader.get(&id).await.unwrap()) })).await;
        let mut lister = lister;
        soon("a list", Box::pin(async move { drop(lister.list_jobs(ListJobsRequest::default()).await.unwrap()) }))
            .await;
        let mut counter = counter;
        let statistics = async move { drop(counter.get_statistics(GetStatisticsRequest::default()).await.unwrap()) };
        soon("statistics", Box::pin(statistics)).await;
        let past = async move {
            let mut events = follower.subscribe(Follow::org().after(0)).await.unwrap();
            assert!(matches!(events.next().await, Some(Ok(Item::Event(_)))));
        };
        soon("a stream of the past", Box::pin(past)).await;
        let ready = is_ready(program.address.clone());
        soon("readiness", Box::pin(ready)).await;
    }
    lists.abort_all();
    while let Some(ended) = lists.join_next().await {
        assert!(ended.is_err_and(|ended| ended.is_cancelled()), "they are told that there are too many, or nothing");
    }
    assert!(program.end_by("TERM").success());
}

async fn nobody_works_out_a_lease_token_from_what_is_told_of_a_job(database: Database) {
    let program = Program::start(&database);
    let (org, client) = tenant(&program);
    for _ in 0..2 {
        client.create(NewJob::new("t")).await.unwrap();
    }
    let claim = ClaimJobsRequest { worker_id: "holder".to_owned(), max_jobs: 2, ..Default::default() };
    let leases = client.raw().claim_jobs(claim).await.unwrap().into_inner().leases;
    let [own, others] = &leases[..] else { panic!("two leases: {leases:?}") };
    let (job, own_job) = (others.job.as_ref().unwrap(), own.job.as_ref().unwrap());
    let mut events = client.subscribe(Follow::job(&job.id)).await.unwrap();
    let claimed = loop {
        match timeout(PATIENCE, events.next()).await.expect("it is told").unwrap().unwrap() {
            Item::Event(event) if event.kind == JobEventKind::Claimed as i32 => break event,
            _ => {}
        }
    };
    // Guesses from the time of the claim, and from the token of another job in the same claim.
    let at = claimed.recorded_at.unwrap();
    let micros = at.seconds * 1_000_000 + i64::from(at.nanos) / 1_000;
    let (job_id, own_id) = (job.id.replace('-', ""), own_job.id.replace('-', ""));
    let guesses = [
        format!("{job_id}-1-{micros:x}"),
        format!("{}-{job_id}-1-{micros:016x}", org.simple()),
        own.lease_token.replace(&own_id, &job_id),
    ];
    for lease_token in guesses {
        let report = UpdateJobStatusRequest {
            job_id: job.id.clone(),
            lease_token: lease_token.clone(),
            status: Some(JobStatus::Succeeded.into()),
            ..Default::default()
        };
        let error = client.raw().update_job_status(report).await.unwrap_err();
        assert_error(&error, Code::FailedPrecondition, "LEASE_LOST");
        let leases = vec![LeaseHeartbeat { lease_token, ..Default::default() }];
        let beat = HeartbeatRequest { worker_id: "holder".to_owned(), leases, ..Default::default() };
        assert!(client.raw().heartbeat(beat).await.unwrap().into_inner().results[0].lease_lost);
    }
    for (worker_id, is_lost) in [("other", true), ("holder", false)] {
        let leases = vec![LeaseHeartbeat { lease_token: others.lease_token.clone(), ..Default::default() }];
        let beat = HeartbeatRequest { worker_id: worker_id.to_owned(), leases, ..Default::default() };
        assert_eq!(client.raw().heartbeat(beat).await.unwrap().into_inner().results[0].lease_lost, is_lost);
    }
    assert!(program.end_by("TERM").success());
}

async fn names_that_would_write_to_a_terminal_are_refused(database: Database) {
    let program = Program::start(&database);
    let (_, client) = tenant(&program);
    for unseen in ["\x1b[31m", "a\r\nb", "\u{9b}0m", "\u{202e}gpj.exe", "a\u{2066}b", "a\u{2028}b"] {
        let refused = [
            client.create(NewJob::new(unseen)).await.err(),
            client.create(NewJob::new("t").requested_by(unseen)).await.err(),
            client.create(NewJob::new("t").label("k", unseen)).await.err(),
            client.create(NewJob::new("t").label(unseen, "v")).await.err(),
            client.create(NewJob::new("t").idempotency_key(unseen)).await.err(),
            client.claim(Claim::new(unseen)).await.err(),
        ];
        for (n, error) in refused.into_iter().enumerate() {
            assert!(matches!(error, Some(Error::InvalidRequest { .. })), "{unseen:?}, {n}: {error:?}");
        }
    }
    client.create(NewJob::new("größer").requested_by("שלום").label("क\u{200d}ष", "支払い")).await.unwrap();
    assert!(program.end_by("TERM").success());
}

/// Asserts that the server reports that it is ready.
pub(crate) async fn is_ready(address: String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// Opening a stream reads the log's identity. However many do, the look-up of a token has a connection.
#[tokio::test]
async fn streams_that_are_opened_take_no_connection_from_the_look_up_of_credentials() {
    use sqlx::Executor as _;

    const STREAMS: i64 = 6;
    let database = Database::postgres().await;
    let store = database.open().await;
    let mut admin = database.connect_as("postgres").await;
    admin.execute("BEGIN; LOCK TABLE jobledger.ledger IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let opened: Vec<_> = (0..STREAMS)
        .map(|_| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.read_log_id().await })
        })
        .collect();
    let mut watching = database.connect_as("postgres").await;
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let all_wait =
        async { while sqlx::query_scalar::<_, i64>(waiting).fetch_one(&mut watching).await.unwrap() < STREAMS {} };
    timeout(PATIENCE, all_wait).await.expect("they wait for the lock");
    let found = timeout(PATIENCE, store.token(None, Digest([0; 32]))).await.expect("a connection is free");
    assert_eq!(found.unwrap(), None);
    admin.execute("ROLLBACK").await.unwrap();
    for log_id in opened {
        log_id.await.unwrap().unwrap();
    }
    store.close().await;
}

#[tokio::test]
async fn a_disk_that_is_nearly_full_takes_reports_and_no_more_jobs() {
    let database = Database::sqlite();
    let org = Uuid::new_v4();
    let program = Program::start(&database);
    let client = program.client_of(org);
    let id = client.create(NewJob::new("t")).await.unwrap().job.id;
    let lease = client.claim(Claim::new("w")).await.unwrap().remove(0);
    assert!(program.end_by("TERM").success());
    // More than any disk has.
    let program = Program::start_with(&database, &["--disk-reserve", "1000000000000000000"]);
    let client = program.client_of(org);
    let refused = async {
        loop {
            if let Err(error) = client.raw().create_job(CreateJobRequest::from(NewJob::new("t"))).await {
                return error;
            }
        }
    };
    assert_error(&timeout(PATIENCE, refused).await.expect("it is seen"), Code::ResourceExhausted, "STORAGE_FULL");
    client.update(Report::succeeded(&id).lease(&lease.lease_token)).await.expect("it is written");
    assert!(program.end_by("TERM").success());
}

#[tokio::test]
async fn what_would_swell_when_it_is_decoded_is_refused_before() {
    const MIB: u64 = 1 << 10;
    let database = Database::sqlite();
    let program = Program::start(&database);
    let (_, client) = tenant(&program);
    client.create(NewJob::new("t")).await.unwrap();
    let before = resident(program.id());
    let mut calls = JoinSet::new();
    for _ in 0..4 {
        let mut service = client.raw();
        calls.spawn(async move {
            let request = BatchCreateJobsRequest { requests: vec![CreateJobRequest::default(); 2_000_000] };
            let error = service.batch_create_jobs(request).await.unwrap_err();
            assert_error(&error, Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
        });
    }
    while let Some(ended) = calls.join_next().await {
        ended.unwrap();
    }
    let after = resident(program.id());
    assert!(after < before + 64 * MIB, "grew from {} MiB to {} MiB", before / MIB, after / MIB);
    assert!(matches!(client.get(&Uuid::new_v4().to_string()).await, Err(Error::JobNotFound { .. })));
    assert!(program.end_by("TERM").success());
}

fn claim(worker: &str) -> ledger::Claim {
    let (max_jobs, lease) = (1, Duration::from_secs(3_600));
    ledger::Claim { worker: worker.into(), types: [].into(), max_jobs, lease, request: None }
}

async fn payloads_of_claimed_jobs_are_read_in_turns(database: Database) {
    // All but one are for one org, and while others call one of the org's own is withheld.
    let limits = Limits::default();
    let turns = (limits.deliveries - 1).min(limits.reads_per_org - 2).max(1);
    let store = database.open().await;
    let ledger = lanes::start(&store, Limits::default());
    let [org, other] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
    let payload = Json::from_trusted(format!("\"{}\"", "x".repeat(100_000)));
    for org in std::iter::repeat_n(org, turns + 1).chain([other]) {
        let create = Command::Create(lanes::new_job("t", Some(payload.clone()), None));
        lanes::created(ledger.submit(org, create).await);
    }
    // A claim keeps the turn in which its payloads were read until its answer is made.
    let mut in_the_making = Vec::new();
    for _ in 0..turns {
        in_the_making.push(ledger.claim(org, claim("w"), Duration::ZERO).await.unwrap());
    }
    ledger.statistics(other, &StatisticsQuery::of(&[])).await.unwrap();
    let claimed = tokio::spawn({
        let ledger = ledger.clone();
        async move { ledger.claim(org, claim("w"), Duration::ZERO).await }
    });
    let running = async || {
        let statistics = ledger.statistics(org, &StatisticsQuery::of(&[])).await.unwrap();
        statistics.types[0].counts.get(status::JobStatus::Running)
    };
    timeout(PATIENCE, async { while running().await <= turns as i64 {} }).await.unwrap();
    // Another org's turn is free.
    let leases = timeout(PATIENCE, ledger.claim(other, claim("w"), Duration::ZERO)).await.unwrap().unwrap();
    assert!(leases.jobs()[0].contents.payload.is_some());
    assert!(!claimed.is_finished(), "it waits for its turn");
    in_the_making.pop().unwrap().deliver();
    let leases = timeout(PATIENCE, claimed).await.unwrap().unwrap().unwrap();
    assert!(leases.jobs()[0].contents.payload.is_some());
    leases.deliver();
}
