//! Callers without a credential: the connections that they open, and the credentials and host names that they try.

use std::{fs::File, net::SocketAddr, process::Stdio, time::Duration};

use jobledger_client::{NewJob, proto::GetJobRequest};
use jobledger_server::domain::access::Role;
use prost::Message as _;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use uuid::Uuid;

use crate::{
    callers::access::token,
    callers::tenants::{begin, is_ready, tenant},
    support::harness::{Database, PATIENCE},
    support::program::Program,
    support::raw::Raw,
};

const GET: &str = "/jobledger.v1.JobService/GetJob";

#[tokio::test]
async fn connections_of_strangers_leave_files_and_places_to_others() {
    let database = Database::sqlite();
    let program = Program::with_files(&database, 400);
    let to = program.address.parse().unwrap();
    let mut silent = Vec::new();
    for n in 0..500 {
        // The server closes the connections that it refuses.
        silent.extend(connect_from([127, 1, 0, 1 + (n % 2) as u8], to).await);
    }
    // Two addresses have two thirds of the connections, and the server still has its files.
    let (_, client) = tenant(&program);
    let id = client.create(NewJob::new("t")).await.unwrap().job.id;
    client.get(&id).await.unwrap();
    is_ready(program.address.clone()).await;
    drop(silent);
    assert!(program.end_by("TERM").success());
}

/// Connects from one of this machine's addresses.
async fn connect_from(address: [u8; 4], to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((address, 0).into())?;
    socket.connect(to).await
}

#[tokio::test]
async fn a_connection_on_which_nobody_called_is_soon_closed() {
    let database = Database::sqlite();
    let program = Program::start_with(&database, &["--unknown-idle-timeout", "1s"]);
    let connect = async || Raw::over(TcpStream::connect(&program.address).await.unwrap()).await;
    let (mut unknown, mut known) = (connect().await, connect().await);
    begin(
        &mut known,
        GET,
        Uuid::new_v4(),
        &GetJobRequest { job_id: Uuid::new_v4().to_string(), ..Default::default() }.encode_to_vec(),
    )
    .await;
    timeout(PATIENCE, unknown.goes_away()).await.expect("it is told to go");
    assert!(known.drain(Duration::from_secs(3)).await, "it stays");
    known.is_served().await;
    assert!(program.end_by("TERM").success());
}

/// The status code of the answer to an HTTP/1 request.
async fn code_of(address: &str, head: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("{head}Connection: close\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.split(' ').nth(1).unwrap_or_default().to_owned()
}

#[tokio::test]
async fn names_that_others_lead_here_are_turned_away_where_nobody_is_asked_who_they_are() {
    let database = Database::sqlite();
    let program = Program::start_with(&database, &["--legacy-http", "--allowed-host", "ledger.internal"]);
    let address = &program.address;
    let job = format!("GET /jobs/{} HTTP/1.1\r\n", Uuid::new_v4());
    for ours in [address, "localhost:50051", "ledger.internal", "[::1]:50051"] {
        assert_eq!(code_of(address, &format!("{job}Host: {ours}\r\n")).await, "404", "{ours}");
    }
    // As a web page does whose host name was made to lead to this machine after it was loaded.
    for anothers in ["rebound.example.com", "localhost.example.com:50051"] {
        assert_eq!(code_of(address, &format!("{job}Host: {anothers}\r\n")).await, "403", "{anothers}");
    }
    assert!(program.end_by("TERM").success());
}

#[tokio::test]
async fn credentials_that_are_refused_are_logged_now_and_then() {
    let (database, folder) = (Database::sqlite(), TempDir::new().unwrap());
    database.open().await.close().await;
    let _good = token(&database, Some(Uuid::new_v4()), Role::Observer).await;
    let path = folder.path().join("log");
    let log = Stdio::from(File::create(&path).unwrap());
    let more = ["--require-auth", "--legacy-http", "--log-format", "json"];
    let program = Program::serve_saying("127.0.0.1:0", &database.url(), &more, &[], log);
    let job = format!("GET /jobs/{} HTTP/1.1\r\nHost: localhost\r\n", Uuid::new_v4());
    for n in 0..20 {
        let token = format!("{job}Authorization: Bearer not-a-token-{n}\r\n");
        assert_eq!(code_of(&program.address, &token).await, "401");
    }
    assert_eq!(code_of(&program.address, &job).await, "401");
    assert!(program.end_by("TERM").success());
    let log = std::fs::read_to_string(path).unwrap();
    let refused: Vec<_> = log.lines().filter(|line| line.contains("credentials were refused")).collect();
    assert!(refused.len() == 1 && refused[0].contains("127.0.0.1"), "{log}");
    assert!(!log.contains("not-a-token"), "what was tried is not told");
}
