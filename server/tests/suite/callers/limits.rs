//! What callers may take. Beyond a bound a call is refused with a time to come back, and other callers go on.

use std::time::Duration;

use jobledger_client::{
    Claim, Client, Error, Follow, NewJob, Report,
    proto::{GetJobRequest, JobView, ListJobsRequest},
};
use jobledger_server::{Config, domain::id::OrgId, store};
use prost::{Message as _, bytes::Bytes};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::{
    jobs::errors::{assert_error, new_job, text},
    support::breaking::Breaking,
    support::harness::{Database, PATIENCE, TestServer, on_both_databases},
    support::raw::{Answer, DATA, END_HEADERS, END_STREAM, HEADERS, Raw, WINDOW_UPDATE, frame, literals},
};

on_both_databases! {
    an_org_may_have_so_many_calls_under_way_and_others_go_on,
    an_org_may_call_so_often_and_others_go_on,
    what_follows_on_claims_has_room_where_creates_find_none,
    an_org_may_have_so_many_claims_waiting_and_others_go_on,
    what_has_waited_too_long_is_refused_undecided,
    a_call_takes_no_longer_than_any_may,
}

fn client_of(server: &TestServer, org: u128) -> Client {
    Client::builder(server.endpoint()).org(Uuid::from_u128(org)).timeout(PATIENCE).build().unwrap()
}

/// Asserts that a call was refused because of other calls under way, with a time to come back. Returns the bound's scope.
#[track_caller]
fn assert_overloaded(status: &Status) -> String {
    let facts = assert_error(status, Code::ResourceExhausted, "OVERLOADED");
    assert!(status.get_details_retry_info().is_some_and(|retry| retry.retry_delay.is_some()), "{status:?}");
    facts.get("scope").cloned().unwrap_or_default()
}

/// A server over a store whose heads tests can lock.
async fn held(config: Config) -> (std::sync::Arc<Breaking>, TestServer) {
    let inner = store::open(&config.database_url, config.open_options()).await.unwrap();
    let store = Breaking::new(inner, &[]);
    let server = TestServer::start_with(config, std::sync::Arc::clone(&store) as _).await;
    (store, server)
}

/// Creates a job, retrying while other calls have the org's slots.
async fn create_once_there_is_room(client: Client) -> Result<(), Status> {
    loop {
        match client.raw().create_job(new_job()).await {
            Err(status) if status.get_details_error_info().is_some_and(|info| info.metadata.contains_key("scope")) => {}
            done => return done.map(|_| ()),
        }
    }
}

/// Reads a job until a call is refused. By then the calls that were made before are under way.
async fn has_no_room(client: &Client) -> Status {
    let request = GetJobRequest { job_id: Uuid::now_v7().to_string() };
    let refused = async {
        loop {
            let refused = client.raw().get_job(request.clone()).await.expect_err("there is no such job");
            if refused.code() != Code::NotFound {
                return refused;
            }
        }
    };
    timeout(PATIENCE, refused).await.expect("they are under way")
}

async fn an_org_may_have_so_many_calls_under_way_and_others_go_on(database: Database) {
    let mut config = database.config();
    (config.calls.calls, config.calls.calls_per_org) = (3, 2);
    let (store, server) = held(config).await;
    let head = store.inner.begin(&[OrgId(Uuid::from_u128(1))]).await.unwrap();
    let mut waiting = JoinSet::new();
    let one = client_of(&server, 1);
    // Streams and claims have slots of their own.
    let _stream = one.subscribe(Follow::org()).await.unwrap();
    for _ in 0..2 {
        waiting.spawn(create_once_there_is_room(one.clone()));
    }
    assert_eq!(assert_overloaded(&has_no_room(&one).await), "org");
    assert_eq!(assert_overloaded(&one.raw().create_job(new_job()).await.unwrap_err()), "org");
    let mut other = client_of(&server, 2).raw();
    waiting.spawn(async move { other.create_job(new_job()).await.map(|_| ()) });
    drop(head);
    for done in waiting.join_all().await {
        done.expect("what was let in is done");
    }
    one.create(NewJob::new("t")).await.expect("there is room again");
    server.stop().await;
}

async fn an_org_may_call_so_often_and_others_go_on(database: Database) {
    let mut config = database.config();
    config.calls.rate_per_org = Some(5);
    let server = TestServer::start(config).await;
    let mut service = client_of(&server, 1).raw();
    let refused = async {
        loop {
            if let Err(status) = service.create_job(new_job()).await {
                return status;
            }
        }
    };
    let refused = timeout(PATIENCE, refused).await.expect("it is too often");
    let facts = assert_error(&refused, Code::ResourceExhausted, "RATE_LIMITED");
    assert_eq!(facts["limit"], "5");
    let wait = refused.get_details_retry_info().and_then(|retry| retry.retry_delay).expect("when to come back");
    assert!(wait <= Duration::from_millis(200), "{wait:?}");
    let other = client_of(&server, 2);
    for _ in 0..5 {
        other.create(NewJob::new("t")).await.expect("another org's are not fewer for it");
    }
    let again = async { while service.create_job(new_job()).await.is_err() {} };
    timeout(PATIENCE, again).await.expect("a second later there are more");
    server.stop().await;
}

async fn what_follows_on_claims_has_room_where_creates_find_none(database: Database) {
    let mut config = database.config();
    (config.calls.calls, config.calls.calls_per_org) = (2, 2);
    let (store, server) = held(config).await;
    let client = client_of(&server, 1);
    let job = client.create(NewJob::new("t")).await.unwrap().job.id;
    let lease = client.claim(Claim::new("w")).await.unwrap().remove(0).lease_token;
    let head = store.inner.begin(&[OrgId(Uuid::from_u128(1))]).await.unwrap();
    let mut waiting = JoinSet::new();
    for _ in 0..2 {
        waiting.spawn(create_once_there_is_room(client.clone()));
    }
    assert_overloaded(&has_no_room(&client).await);
    // The report is let in, and waits for the head like the creates.
    let report = Report::succeeded(&job).lease(lease);
    let mut reporting = Box::pin(client.update(report));
    assert!(timeout(Duration::from_millis(200), &mut reporting).await.is_err());
    drop(head);
    reporting.await.expect("it was let in");
    for done in waiting.join_all().await {
        done.unwrap();
    }
    server.stop().await;

    // Rates are counted apart, too.
    let mut config = database.config();
    config.calls.rate_per_org = Some(5);
    let server = TestServer::start(config).await;
    let client = client_of(&server, 2);
    client.create(NewJob::new("t")).await.unwrap();
    let mut service = client.raw();
    let spent = async { while service.create_job(new_job()).await.is_ok() {} };
    timeout(PATIENCE, spent).await.unwrap();
    let claim = jobledger_client::proto::ClaimJobsRequest { worker_id: "w".to_owned(), ..Default::default() };
    let lease = service.claim_jobs(claim).await.expect("claims have a rate of their own").into_inner().leases.remove(0);
    let report: jobledger_client::proto::UpdateJobStatusRequest =
        Report::succeeded(lease.job.unwrap().id).lease(lease.lease_token).into();
    service.update_job_status(report).await.expect("and so have reports");
    server.stop().await;
}

async fn an_org_may_have_so_many_claims_waiting_and_others_go_on(database: Database) {
    let mut config = database.config();
    (config.limits.claims, config.limits.claims_per_org) = (3, 2);
    let server = TestServer::start(config).await;
    let mut waiting = JoinSet::new();
    let claim = |org| {
        let client = client_of(&server, org);
        async move {
            loop {
                // The claims that test whether there is room take it for a moment.
                match client.claim(Claim::new("w").wait(PATIENCE)).await {
                    Err(Error::Exhausted { .. }) => {}
                    claimed => return claimed,
                }
            }
        }
    };
    for _ in 0..2 {
        waiting.spawn(claim(1));
    }
    let refused = async {
        loop {
            let once = jobledger_client::proto::ClaimJobsRequest { worker_id: "w".to_owned(), ..Default::default() };
            if let Err(status) = client_of(&server, 1).raw().claim_jobs(once).await {
                return status;
            }
        }
    };
    assert_overloaded(&timeout(PATIENCE, refused).await.expect("both wait by then"));
    waiting.spawn(claim(2));
    for org in [1, 1, 2] {
        client_of(&server, org).create(NewJob::new("t")).await.unwrap();
    }
    for claimed in waiting.join_all().await {
        assert_eq!(claimed.expect("it was let in").len(), 1);
    }
    server.stop().await;
}

async fn what_has_waited_too_long_is_refused_undecided(database: Database) {
    let mut config = database.config();
    config.limits.queued_within = Duration::from_millis(50);
    config.calls.calls_per_org = 2;
    let (store, server) = held(config).await;
    let org = OrgId(Uuid::from_u128(1));
    let head = store.inner.begin(&[org]).await.unwrap();
    let client = client_of(&server, 1);
    let mut service = client.raw();
    let taken = tokio::spawn(async move { service.create_job(new_job()).await });
    store.has_begun(1).await;
    let late = tokio::spawn(create_once_there_is_room(client.clone()));
    has_no_room(&client).await;
    let since = std::time::Instant::now();
    while since.elapsed() < Duration::from_millis(60) {
        tokio::task::yield_now().await;
    }
    drop(head);
    taken.await.unwrap().expect("what was taken is decided, however long it took");
    assert_overloaded(&late.await.unwrap().expect_err("it has waited too long"));
    assert_eq!(client.list(Default::default()).await.unwrap().jobs.len(), 1, "it never happened");
    server.stop().await;
}

async fn a_call_takes_no_longer_than_any_may(database: Database) {
    let mut config = database.config();
    config.calls.call_within = Duration::from_millis(100);
    let (store, server) = held(config).await;
    let head = store.inner.begin(&[OrgId::DEFAULT]).await.unwrap();
    let message = frame(&prost::Message::encode_to_vec(&new_job()));
    for deadline in [None, Some("1H")] {
        let mut headers = Vec::new();
        headers.extend(deadline.map(|deadline| ("grpc-timeout", deadline)));
        let answer = Answer::to(&server, "jobledger.v1.JobService/CreateJob", &headers, message.clone()).await;
        assert_error(&answer.status(), Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    }
    drop(head);
    server.stop().await;
}

/// Reads until the server closes the connection. A reset counts, too.
async fn is_closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("it is closed");
}

async fn from(address: [u8; 4], server: &TestServer) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((address, 0).into()).unwrap();
    socket.connect(server.address).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_many_connections_are_served_in_all_and_from_one_address() {
    let database = Database::sqlite();
    let mut config = database.config();
    (config.connections.connections, config.connections.connections_per_address) = (4, 3);
    let server = TestServer::start(config).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(Raw::over(from([127, 0, 0, 2], &server).await).await);
        open.last_mut().unwrap().is_served().await;
    }
    is_closed(&mut from([127, 0, 0, 2], &server).await).await;
    let mut other = Raw::over(from([127, 0, 0, 3], &server).await).await;
    other.is_served().await;
    is_closed(&mut from([127, 0, 0, 4], &server).await).await;
    drop(open);
    // Succeeds once the server has noticed that the connections are gone.
    let again = async { while server.client().create(NewJob::new("t")).await.is_err() {} };
    timeout(PATIENCE, again).await.expect("there is room again");
    other.is_served().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_says_nothing_is_closed() {
    let database = Database::sqlite();
    let mut config = database.config();
    config.connections.first_bytes_within = Duration::from_millis(200);
    let server = TestServer::start(config).await;
    is_closed(&mut TcpStream::connect(server.address).await.unwrap()).await;
    for half in ["PRI * HTTP/2.0\r\n", "GET /healthz HT", "GET /healthz HTTP/1.1\r\nHost: a-long-name.example.com\r\n"]
    {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(half.as_bytes()).await.unwrap();
        is_closed(&mut stream).await;
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_without_calls_is_closed_and_one_with_a_stream_is_not() {
    let database = Database::sqlite();
    let mut config = database.config();
    config.connections.idle = Duration::from_millis(300);
    let server = TestServer::start(config).await;
    let client = server.client();
    let mut stream = client.subscribe(Follow::org()).await.unwrap();
    stream.next().await.unwrap().unwrap();
    let mut idle = Raw::to(&server).await;
    idle.is_served().await;
    timeout(PATIENCE, idle.goes_away()).await.expect("it is told to go");
    // The stream outlives the idle time, on the same connection as before.
    let other = server.client();
    let id = other.create(NewJob::new("t")).await.unwrap().job.id;
    let seen = async {
        while !matches!(stream.next().await.unwrap().unwrap(), jobledger_client::Item::Event(event) if event.job_id == id)
        {
        }
    };
    timeout(PATIENCE, seen).await.expect("it goes on");
    // A client whose connection was closed while it was idle notices nothing.
    let mut idle = Raw::to(&server).await;
    timeout(PATIENCE, idle.goes_away()).await.expect("another one's time is over, too");
    other.create(NewJob::new("t")).await.unwrap();
    server.stop().await;
}

/// A call of which only a part has been sent, and read by the server.
async fn begun(server: &TestServer, bytes: usize) -> Raw {
    /// What the server may have read without a window update, in bytes.
    const UNSAID: usize = 256 << 10;
    let mut raw = Raw::to(server).await;
    // By then the server's settings are in effect.
    raw.is_served().await;
    let stream = raw.call("/jobledger.v1.JobService/CreateJob", 0).await.unwrap();
    let mut message = vec![0];
    message.extend(4_000_000_u32.to_be_bytes());
    message.resize(bytes, b'x');
    let (mut sent, mut may_send, mut said) = (0, 256 << 10, 0);
    while said + UNSAID < bytes || sent < bytes {
        while sent < bytes && sent < may_send {
            let next = bytes.min(may_send).min(sent + 16_384);
            raw.send(DATA, 0, stream, &message[sent..next]).await.unwrap();
            sent = next;
        }
        let (kind, _, of, payload) = timeout(PATIENCE, raw.receive()).await.expect("it reads").expect("it is open");
        if kind == WINDOW_UPDATE && of == stream {
            let more = u32::from_be_bytes(payload.try_into().unwrap()) as usize;
            (may_send, said) = (may_send + more, said + more);
        }
    }
    raw
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_find_room_in_memory() {
    let database = Database::sqlite();
    let mut config = database.config();
    config.calls.request_memory = 2 << 20;
    let server = TestServer::start(config).await;
    let large = jobledger_client::proto::CreateJobRequest { payload: text(900_000), ..new_job() };
    server.client().raw().create_job(large.clone()).await.expect("there is room");
    let refused = async {
        loop {
            // The request that finds no room is refused. That may be the half one, as long as the server has not read its end.
            let half = begun(&server, 1_700_000).await;
            if let Err(status) = server.client().raw().create_job(large.clone()).await {
                return (status, half);
            }
        }
    };
    let (status, half) = timeout(PATIENCE, refused).await.expect("there is none left");
    assert_eq!(assert_overloaded(&status), "requests");
    let heartbeat = jobledger_client::proto::HeartbeatRequest {
        worker_id: "w".to_owned(),
        leases: vec![jobledger_client::LeaseHeartbeat::default()],
        extend_by: None,
    };
    server.client().raw().heartbeat(heartbeat).await.expect("there is more room for what keeps jobs alive");
    drop(half);
    let again = async { while server.client().raw().create_job(large.clone()).await.is_err() {} };
    timeout(PATIENCE, again).await.expect("there is room again");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_request_gives_way_where_others_find_no_room() {
    let database = Database::sqlite();
    let mut config = database.config();
    config.calls.request_memory = 2 << 20;
    // The server would wait this long for the request if there were room.
    config.calls.request_within = 2 * PATIENCE;
    let server = TestServer::start(config).await;
    let _half = begun(&server, 1_700_000).await;
    let large = jobledger_client::proto::CreateJobRequest { payload: text(900_000), ..new_job() };
    let room = async { while server.client().raw().create_job(large.clone()).await.is_err() {} };
    // Sooner than the server closes a connection that answers no pings.
    timeout(PATIENCE / 3, room).await.expect("there is room again");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_do_not_come_give_way_where_others_find_no_place() {
    let database = Database::sqlite();
    let mut config = database.config();
    config.calls.calls_per_org = 8;
    config.calls.request_within = 2 * PATIENCE;
    let server = TestServer::start(config).await;
    let mut raw = Raw::to(&server).await;
    raw.is_served().await;
    let fill = async {
        // Repeated if filling all slots takes longer than the server waits for the messages.
        loop {
            for _ in 0..8 {
                raw.call("/jobledger.v1.JobService/CreateJob", 0).await.unwrap();
            }
            raw.is_served().await;
            if let Err(status) = server.client().raw().create_job(new_job()).await {
                break assert_overloaded(&status);
            }
        }
    };
    assert_eq!(timeout(PATIENCE, fill).await.expect("they take all places"), "org");
    let place = async { while server.client().raw().create_job(new_job()).await.is_err() {} };
    timeout(PATIENCE / 3, place).await.expect("there is a place again");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_takes_no_answers_loses_its_connection_and_nobody_else_does() {
    let database = Database::sqlite();
    let mut config = database.config();
    config.connections.unread = 10 << 20;
    let server = TestServer::start(config).await;
    let client = server.client();
    for _ in 0..5 {
        client.create(NewJob::new("t").payload(&"x".repeat(900_000)).unwrap()).await.unwrap();
    }
    // Each answer is a page of 4 MiB, and gets no window.
    let request = ListJobsRequest { view: JobView::Full.into(), ..Default::default() };
    let untaken = async |answers: usize| {
        let stream = TcpStream::connect(&server.address).await.unwrap();
        let mut raw = Raw::without_window(stream).await;
        for _ in 0..answers {
            let stream = raw.call("/jobledger.v1.JobService/ListJobs", 0).await.unwrap();
            raw.send(DATA, END_STREAM, stream, &frame(&request.encode_to_vec())).await.unwrap();
        }
        raw
    };
    let mut one = untaken(1).await;
    let mut many = untaken(3).await;
    timeout(PATIENCE, async { while many.receive().await.is_some() {} }).await.expect("it is cut");
    // A window of one byte for each answer doesn't count as taking it.
    let mut tricky = untaken(3).await;
    for stream in [1u32, 3, 5] {
        // The connection may have been cut by then.
        let _ = tricky.send(WINDOW_UPDATE, 0, stream, &1u32.to_be_bytes()).await;
    }
    timeout(PATIENCE, async { while tricky.receive().await.is_some() {} }).await.expect("it is cut, too");
    one.is_served().await;
    // A caller that takes its answers may have any number of them.
    for _ in 0..5 {
        assert_eq!(client.raw().list_jobs(request.clone()).await.unwrap().into_inner().jobs.len(), 4);
    }
    drop((one, many));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_that_nobody_reads_are_counted_too() {
    let database = Database::sqlite();
    let mut config = database.config();
    config.connections.unread = 64 << 10;
    let server = TestServer::start(config).await;
    let stream = TcpStream::connect(&server.address).await.unwrap();
    let mut raw = Raw::without_window(stream).await;
    let probe = [(":method", "GET"), (":scheme", "http"), (":path", "/healthz"), (":authority", "localhost")];
    for _ in 0..40 {
        let stream = raw.next_stream();
        raw.send(HEADERS, END_HEADERS | END_STREAM, stream, &literals(&probe)).await.unwrap();
    }
    timeout(PATIENCE, async { while raw.receive().await.is_some() {} }).await.expect("it is cut");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_refused_often_keeps_its_connection() {
    let database = Database::sqlite();
    let mut config = database.config();
    config.calls.rate_per_org = Some(1);
    let server = TestServer::start(config).await;
    let message = frame(&new_job().encode_to_vec());
    let mut raw = Raw::to(&server).await;
    raw.is_served().await;
    for _ in 0..3 {
        // More streams than the HTTP/2 library remembers to have reset.
        let mut streams = Vec::new();
        for _ in 0..300 {
            streams.push(raw.call("/jobledger.v1.JobService/CreateJob", 0).await.unwrap());
        }
        // There are too many calls, but their messages are still to come, so refusing them would be too early.
        assert!(raw.drain(Duration::from_millis(500)).await, "it is open");
        for stream in &streams {
            raw.send(DATA, END_STREAM, *stream, &message).await.unwrap();
        }
    }
    raw.is_served().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_may_come_in_any_pieces() {
    let database = Database::sqlite();
    let server = TestServer::start(database.config()).await;
    let message = frame(&jobledger_client::proto::CreateJobRequest { payload: text(300), ..new_job() }.encode_to_vec());
    for size in [1, 4, 5, 6, message.len()] {
        let (answer, sender) = Answer::streamed(&server, "jobledger.v1.JobService/CreateJob", &[], Bytes::new());
        for piece in message.chunks(size) {
            sender.send(Bytes::copy_from_slice(piece)).unwrap();
        }
        drop(sender);
        let answer = timeout(PATIENCE, answer).await.expect("an answer").unwrap();
        assert_eq!(answer.status().code(), Code::Ok, "in pieces of {size}: {:?}", answer.status());
    }
    // A message that ends too early is invalid.
    let (answer, sender) =
        Answer::streamed(&server, "jobledger.v1.JobService/CreateJob", &[], Bytes::from(message).slice(..100));
    drop(sender);
    let answer = timeout(PATIENCE, answer).await.expect("an answer").unwrap();
    assert_error(&answer.status(), Code::InvalidArgument, "INVALID_FIELD");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_come_whole_in_time() {
    let database = Database::sqlite();
    let mut config = database.config();
    config.calls.request_within = Duration::from_millis(200);
    let server = TestServer::start(config).await;
    let (half, _sender) =
        Answer::streamed(&server, "jobledger.v1.JobService/CreateJob", &[], Bytes::from_static(&[0, 0, 0]));
    let answer = timeout(PATIENCE, half).await.expect("it is not waited for").unwrap();
    assert_error(&answer.status(), Code::DeadlineExceeded, "REQUEST_TOO_SLOW");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_are_bounded() {
    let database = Database::sqlite();
    let (server, client) = TestServer::on(&database).await;
    let long = "x".repeat(20_000);
    let answer = Answer::to(&server, "jobledger.v1.JobService/GetJob", &[("x-long", &long)], frame(&[])).await;
    assert_eq!(answer.http, 431, "{answer:?}");
    client.create(NewJob::new("t")).await.expect("others go on");
    server.stop().await;
}
