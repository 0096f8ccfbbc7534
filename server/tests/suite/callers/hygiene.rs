//! Malformed requests and internal failures get error codes of the contract, and reveal nothing of the server's inside.

use std::sync::Arc;

use jobledger_client::{
    NewJob,
    proto::{BatchCreateJobsRequest, CreateJobRequest, GetStatisticsRequest},
};
use jobledger_server::store;
use prost::Message as _;
use tonic::Code;
use uuid::Uuid;

use crate::{
    jobs::errors::{assert_error, assert_fields, create, new_job},
    support::breaking::{Breaking, IMPOSSIBLE},
    support::harness::{Database, TestServer, on_both_databases},
    support::raw::{Answer, frame},
};

on_both_databases! {
    a_panic_is_an_answer_and_others_go_on,
    a_decision_that_panics_is_its_callers_alone,
}

const CREATE: &str = "jobledger.v1.JobService/CreateJob";
const GRPC: [(&str, &str); 2] = [("content-type", "application/grpc"), ("te", "trailers")];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_are_none_have_codes_of_the_contract() {
    let database = Database::sqlite();
    let (server, client) = TestServer::on(&database).await;
    let good = frame(&new_job().encode_to_vec());
    let with_flag = |flag: u8| {
        let mut bytes = good.clone();
        bytes[0] = flag;
        bytes
    };
    for (what, body) in [
        ("nothing", Vec::new()),
        ("half a prefix", vec![0, 0]),
        ("half a message", good[..good.len() - 1].to_vec()),
        ("no protobuf", frame(b"\xff\xff\xff\xff\xff")),
        ("a field of another type", frame(&[0x0a, 0xff])),
        ("text that is none", frame(&[0x0a, 0x01, 0xff])),
        ("compressed, and it isn't", with_flag(1)),
        ("an unknown flag", with_flag(7)),
        ("garbage", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
    ] {
        for call in [CREATE, "jobledger.v1.JobService/StreamJobEvents"] {
            // None of these bodies is a valid message of either call.
            let answer = Answer::to(&server, call, &[], body.clone()).await;
            let status = answer.status();
            if what == "garbage" {
                // Its first byte is not a valid flag.
                assert_eq!(status.code(), Code::InvalidArgument, "{what}: {answer:?}");
            }
            assert_eq!(answer.http, 200, "{what}: {answer:?}");
            assert_fields(&status, &["(message)"]);
        }
    }
    for length in [u32::MAX, (4 << 20) + 1] {
        let mut body = vec![0];
        body.extend(length.to_be_bytes());
        body.extend(b"a little");
        let status = Answer::to(&server, CREATE, &[], body).await.status();
        let facts = assert_error(&status, Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
        assert_eq!(facts["limit"], (4 << 20).to_string());
    }
    // These calls take exactly one message.
    let two = [good.clone(), good.clone()].concat();
    for (call, body) in [(CREATE, two), ("grpc.health.v1.Health/Check", [[0; 5], [0; 5]].concat())] {
        assert_fields(&Answer::to(&server, call, &[], body).await.status(), &["(message)"]);
    }
    // Calls about no org need no credential, so their messages are small: at most 4 KiB.
    for call in ["grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"] {
        let status = Answer::to(&server, call, &[], vec![0, 0, 0x40, 0, 0]).await.status();
        let facts = assert_error(&status, Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
        assert_eq!(facts["limit"], "4096");
    }
    let answer = Answer::to(&server, CREATE, &[("grpc-encoding", "gzip")], good.clone()).await;
    assert_error(&answer.status(), Code::Unimplemented, "UNSUPPORTED_ENCODING");
    // A server without authentication refuses browsers: a web page's calls may not be what its user wants.
    for header in ["origin", "sec-fetch-site"] {
        let answer = Answer::to(&server, CREATE, &[(header, "http://localhost:3000")], good.clone()).await;
        assert_error(&answer.status(), Code::PermissionDenied, "PERMISSION_DENIED");
    }
    for timeout in ["", "5", "x", "123456789S", "1 S", "-1S"] {
        let answer = Answer::to(&server, CREATE, &[("grpc-timeout", timeout)], good.clone()).await;
        assert_fields(&answer.status(), &["grpc-timeout"]);
    }
    client.create(NewJob::new("t")).await.expect("others go on");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_call_is_told_so_in_its_own_protocol() {
    let database = Database::sqlite();
    let (server, _) = TestServer::on(&database).await;
    let good = frame(&new_job().encode_to_vec());
    let ask = |method: &'static str, path: &'static str, headers: &'static [(&str, &str)]| {
        Answer::to_request(&server, method, path, headers, good.clone())
    };
    for path in ["jobledger.v1.JobService/DropJobs", "jobledger.v2.JobService/CreateJob", "a.B/C", "nothing"] {
        let status = ask("POST", path, &GRPC).await.status();
        assert_error(&status, Code::Unimplemented, "NO_SUCH_CALL");
    }
    for kind in [&[][..], &[("content-type", "text/plain")], &[("content-type", "application/json")]] {
        let answer = ask("POST", CREATE, kind).await;
        assert_eq!(answer.http, 415, "{answer:?}");
        assert!(!answer.headers.contains_key("grpc-status"), "{answer:?}");
    }
    for method in ["GET", "PUT", "DELETE", "OPTIONS"] {
        let answer = ask(method, CREATE, &GRPC).await;
        assert_eq!((answer.http, &*answer.headers["allow"]), (405, "POST"), "{method}: {answer:?}");
    }
    let answer = ask("GET", "nothing", &[]).await;
    assert_eq!((answer.http, &*answer.body), (404, br#"{"detail":"Not Found"}"#.as_slice()), "{answer:?}");
    server.stop().await;
}

async fn a_panic_is_an_answer_and_others_go_on(database: Database) {
    let config = database.config();
    let inner = store::open(&config.database_url, config.open_options()).await.unwrap();
    let store = Breaking::new(inner, &[]);
    let server = TestServer::start_with(config, Arc::clone(&store) as _).await;
    let mut service = server.client().raw();
    store.panic_in_statistics();
    let status = service.get_statistics(GetStatisticsRequest::default()).await.unwrap_err();
    let facts = assert_error(&status, Code::Internal, "INTERNAL");
    Uuid::try_parse(&facts["error_id"]).expect("an id to look for in the log");
    assert!(!status.message().contains("deliberate"), "{status:?}");
    create(&mut service).await;
    service.get_statistics(GetStatisticsRequest::default()).await.expect("on the same connection");
    server.stop().await;
}

async fn a_decision_that_panics_is_its_callers_alone(database: Database) {
    let config = database.config();
    let inner = store::open(&config.database_url, config.open_options()).await.unwrap();
    let store = Breaking::new(inner, &[]);
    let server = TestServer::start_with(config, Arc::clone(&store) as _).await;
    let mut service = server.client().raw();
    let impossible = CreateJobRequest { r#type: IMPOSSIBLE.to_owned(), ..Default::default() };
    let status = service.create_job(impossible.clone()).await.unwrap_err();
    let facts = assert_error(&status, Code::Internal, "REFUSED_BY_DATABASE");
    Uuid::try_parse(&facts["error_id"]).expect("an id to look for in the log");
    assert!(!status.message().contains("overflow"), "{status:?}");
    // Other commands in the same batch are not affected.
    let requests = vec![new_job(), impossible, new_job()];
    let results = service.batch_create_jobs(BatchCreateJobsRequest { requests }).await.unwrap().into_inner().results;
    let codes: Vec<_> = results.iter().map(|result| result.error.as_ref().map_or(0, |error| error.code)).collect();
    assert_eq!(codes, [0, Code::Internal as i32, 0]);
    create(&mut service).await;
    server.stop().await;
}
