//! Health checks by HTTP on the same port, and by gRPC.

use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{
    support::breaking::Breaking,
    support::harness::{Database, PATIENCE, TestServer, on_both_databases},
};

on_both_databases! {
    a_server_without_its_database_is_alive_and_not_ready,
}

/// Makes a GET request by HTTP/1.1. Returns the status code and the body.
async fn get(server: &TestServer, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
    (code, answer.split("\r\n\r\n").nth(1).unwrap_or_default().to_owned())
}

async fn a_server_without_its_database_is_alive_and_not_ready(database: Database) {
    let store = Breaking::new(database.open().await, &[]);
    let server = TestServer::start_with(database.config(), Arc::clone(&store) as _).await;
    assert_eq!(get(&server, "/healthz").await, (200, "ok\n".to_owned()));
    assert_eq!(get(&server, "/readyz").await, (200, "ready\n".to_owned()));
    let channel = Endpoint::from_shared(server.endpoint()).unwrap().connect().await.unwrap();
    let mut watches = Vec::new();
    for service in ["", "jobledger.v1.JobService"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        watches.push(HealthClient::new(channel.clone()).watch(request).await.unwrap().into_inner());
    }
    let mut hear = async |expected| {
        for watch in &mut watches {
            let heard = timeout(PATIENCE, watch.message()).await.expect("they are told").unwrap().unwrap();
            assert_eq!(heard.status(), expected);
        }
    };
    hear(ServingStatus::Serving).await;
    store.go_away();
    hear(ServingStatus::NotServing).await;
    // Anybody may ask, so the reason is only in the log.
    assert_eq!(get(&server, "/readyz").await, (503, "not ready\n".to_owned()));
    assert_eq!(get(&server, "/healthz").await.0, 200, "liveness never depends on the database");
    store.come_back().await;
    hear(ServingStatus::Serving).await;
    assert_eq!(get(&server, "/readyz").await.0, 200);
    server.stop().await;
}
