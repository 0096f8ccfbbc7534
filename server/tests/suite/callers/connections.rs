//! Connections: how many, how long, and what they may hold.

use std::time::Duration;

use jobledger_client::{
    Follow, NewJob,
    proto::{JobView, ListJobsRequest},
};
use prost::{Message as _, bytes::Bytes};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tonic::Code;

use crate::callers::limits::assert_overloaded;
use crate::{
    jobs::errors::{assert_error, new_job, text},
    support::harness::{Database, PATIENCE, TestServer},
    support::raw::{Answer, DATA, END_HEADERS, END_STREAM, HEADERS, Raw, WINDOW_UPDATE, frame, literals},
};

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
