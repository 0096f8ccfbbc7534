//! API tokens: made, listed, revoked and expired.

use std::{sync::Arc, time::Duration};

use jobledger_client::{Claim, Client, Error, Follow, Item, NewJob, Token, proto::StreamJobEventsRequest};
use jobledger_server::{
    domain::{
        access::Role,
        clock::{Clock as _, SystemClock, Time},
    },
    store::{self},
};
use prost::{Message as _, bytes::Bytes};
use tokio::time::timeout;
use tonic::Code;
use uuid::Uuid;

use crate::callers::access::{OURS, THEIRS, client_with, end_of, guarded, owner_url, token, token_with};
use crate::{
    jobs::errors::{assert_error, new_job},
    support::breaking::Breaking,
    support::cluster::OWNER,
    support::harness::{Database, PATIENCE, TestServer, on_both_databases},
    support::program::command,
    support::raw::{Answer, frame},
};

on_both_databases! {
    a_token_that_is_revoked_ends_what_is_called_with_it,
    a_revoked_token_that_can_not_be_looked_up_does_not_go_on_for_that,
    a_token_ends_with_its_time,
    tokens_are_made_listed_and_revoked_by_the_program,
}

async fn a_token_that_is_revoked_ends_what_is_called_with_it(database: Database) {
    let (text, id) = token_with(&database, Some(OURS), &[Role::Admin], |_| {}).await;
    let other = token(&database, Some(OURS), Role::Admin).await;
    // The revocation reaches every server. SQLite has only one.
    let mut servers = vec![TestServer::start(guarded(&database)).await];
    if database.is_postgres() {
        servers.push(TestServer::start(guarded(&database)).await);
    }
    let mut streams = Vec::new();
    let mut claims = Vec::new();
    for server in &servers {
        let client = client_with(server, &text);
        client.create(NewJob::new("t")).await.unwrap();
        let mut stream = client.raw().stream_job_events(StreamJobEventsRequest::default()).await.unwrap().into_inner();
        stream.message().await.unwrap().expect("a bookmark");
        streams.push(stream);
        let mut stays = client_with(server, &other).subscribe(Follow::org()).await.unwrap();
        stays.next().await.unwrap().unwrap();
        claims.push((
            tokio::spawn(
                async move { client.claim(Claim::new("w").types(["none"]).wait(Duration::from_secs(60))).await },
            ),
            stays,
        ));
    }
    let message = frame(&new_job().encode_to_vec());
    let bearer = format!("Bearer {}", text.trim());
    let begun: Vec<_> = servers
        .iter()
        .map(|server| {
            let headers = [("authorization", &*bearer)];
            let half = Bytes::copy_from_slice(&message[..message.len() / 2]);
            Answer::streamed(server, "jobledger.v1.JobService/CreateJob", &headers, half)
        })
        .collect();
    for server in &servers {
        // Once this later call is answered, the server has received the half-sent one.
        client_with(server, &text).create(NewJob::new("t")).await.unwrap();
    }
    let revoked = std::time::Instant::now();
    assert!(owner_url(&database).database().unwrap().revoke_token(id, SystemClock.now()).await.unwrap());
    for ((stream, server), (claim, mut stays)) in streams.into_iter().zip(&servers).zip(claims) {
        let ended = end_of(stream).await;
        assert_error(&ended, Code::Unauthenticated, "UNAUTHENTICATED");
        let claimed = timeout(PATIENCE, claim).await.expect("it ends").unwrap();
        assert!(matches!(claimed, Err(Error::Unauthenticated { .. })), "{claimed:?}");
        let refused = client_with(server, &text).create(NewJob::new("t")).await;
        assert!(matches!(refused, Err(Error::Unauthenticated { .. })), "{refused:?}");
        // Calls and streams with other tokens go on.
        let created = client_with(server, &other).create(NewJob::new("t")).await.unwrap().job.id;
        let seen = async {
            loop {
                match stays.next().await.unwrap().unwrap() {
                    Item::Event(event) if event.job_id == created => return,
                    _ => {}
                }
            }
        };
        timeout(PATIENCE, seen).await.expect("it is heard of");
    }
    assert!(revoked.elapsed() < Duration::from_secs(5), "{:?}", revoked.elapsed());
    // A call that was half sent before the revocation is refused.
    for (answer, sender) in begun {
        sender.send(Bytes::copy_from_slice(&message[message.len() / 2..])).unwrap();
        drop(sender);
        let answer = timeout(PATIENCE, answer).await.expect("an answer").unwrap();
        assert_error(&answer.status(), Code::Unauthenticated, "UNAUTHENTICATED");
    }
    for server in servers {
        server.stop().await;
    }
}

async fn a_revoked_token_that_can_not_be_looked_up_does_not_go_on_for_that(database: Database) {
    let (text, id) = token_with(&database, Some(OURS), &[Role::Observer], |_| {}).await;
    let (other, id_of_other) = token_with(&database, Some(OURS), &[Role::Observer], |_| {}).await;
    let config = guarded(&database);
    let inner = store::open(&config.database_url, config.open_options()).await.unwrap();
    let breaking = Breaking::new(inner, &[]);
    let server = TestServer::start_with(config, Arc::clone(&breaking) as _).await;
    let follow = async |text: &str| {
        let client = client_with(&server, text);
        let mut stream = client.raw().stream_job_events(StreamJobEventsRequest::default()).await.unwrap().into_inner();
        stream.message().await.unwrap().expect("a bookmark");
        stream
    };
    let revoke = async |id| {
        assert!(owner_url(&database).database().unwrap().revoke_token(id, SystemClock.now()).await.unwrap());
    };
    let (revoked, stays) = (follow(&text).await, follow(&other).await);
    breaking.fail_tokens(3);
    revoke(id).await;
    assert_error(&end_of(revoked).await, Code::Unauthenticated, "UNAUTHENTICATED");
    // The other token can't be re-checked, and its stream ends all the same.
    breaking.fail_tokens(usize::MAX);
    revoke(id_of_other).await;
    assert_eq!(end_of(stays).await.code(), Code::Unavailable, "to be tried again");
    server.stop().await;
}

async fn a_token_ends_with_its_time(database: Database) {
    let end: Time = SystemClock.now() + Duration::from_millis(1_500);
    let (text, _) = token_with(&database, Some(OURS), &[Role::Observer], |token| token.expires_at = Some(end)).await;
    let server = TestServer::start(guarded(&database)).await;
    let client = client_with(&server, &text);
    let stream = client.raw().stream_job_events(StreamJobEventsRequest::default()).await.unwrap().into_inner();
    let ended = end_of(stream).await;
    assert!(SystemClock.now() >= end);
    assert_error(&ended, Code::Unauthenticated, "UNAUTHENTICATED");
    assert!(ended.message().contains("expired"), "{ended:?}");
    let refused = client.statistics(&["t"]).await;
    assert!(matches!(&refused, Err(Error::Unauthenticated { message }) if message.contains("expired")), "{refused:?}");
    server.stop().await;
}

fn run(database: &Database, arguments: &[&str]) -> (bool, String, String) {
    let output = command(arguments).env("JOBLEDGER_DATABASE_URL", database.url_as(OWNER)).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

async fn tokens_are_made_listed_and_revoked_by_the_program(database: Database) {
    database.open().await.close().await;
    let org = OURS.to_string();
    let create = ["token", "create", "--org", &org, "--role", "producer,worker", "--name", "ci"];
    let (done, text, said) = run(&database, &create);
    assert!(done && said.contains("(ci, org") && said.contains("producer,worker"), "{said}");
    assert!(!said.contains(text.trim()), "the secret is not in what is said beside it");
    let server = TestServer::start(guarded(&database)).await;
    let client = client_with(&server, &text);
    client.create(NewJob::new("t")).await.unwrap();
    let refused = client.statistics(&[]).await;
    assert!(matches!(refused, Err(Error::PermissionDenied { .. })), "{refused:?}");
    // The program makes a token while the server runs, and the server accepts it at once.
    let (_, operator, said) = run(&database, &["token", "create", "--operator", "--expires", "never"]);
    assert!(said.contains("does not expire"), "{said}");
    let operator =
        Client::builder(server.endpoint()).org(THEIRS).token(Token::new(&operator).unwrap()).build().unwrap();
    assert_eq!(operator.create(NewJob::new("t")).await.unwrap().job.org_id, THEIRS.to_string());

    let (_, all, _) = run(&database, &["token", "list"]);
    assert_eq!(all.lines().count(), 2, "{all}");
    let is_used = async { while run(&database, &["token", "list"]).1.matches("last used at 2").count() < 2 {} };
    timeout(PATIENCE, is_used).await.expect("both are seen to be used");
    let (_, unused, _) = run(&database, &["token", "create", "--operator"]);
    assert!(run(&database, &["token", "list"]).1.ends_with(", never used\n") && !unused.is_empty());
    assert!(!all.contains(text.trim()), "nor can it be read again");
    let (_, listed, _) = run(&database, &["token", "list", "--org", &org]);
    assert!(listed.lines().count() == 1 && listed.contains("ci") && listed.contains("expires at"), "{listed}");
    let id = listed.split_whitespace().next().unwrap();
    assert!(run(&database, &["token", "revoke", id]).0);
    assert!(run(&database, &["token", "list", "--org", &org]).1.contains("revoked at"));
    let unknown = Uuid::now_v7().to_string();
    if database.is_postgres() {
        // The server's database role sees only some tokens. The commands refuse it, so that nobody takes these for all.
        for arguments in [&["token", "list"][..], &["token", "revoke", id], &["renew-log-id"]] {
            let output = command(arguments).env("JOBLEDGER_DATABASE_URL", database.url()).output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(
                !output.status.success() && said.contains("requires the owner of the tables"),
                "{arguments:?}: {said}"
            );
        }
    }
    for (arguments, expected) in [
        (&["token", "revoke", &unknown][..], "there is no token"),
        (&["token", "revoke", "ci"], "expected a UUID"),
        (&["token", "create", "--role", "admin"], "--org <UUID>"),
        (&["token", "create", "--org", &org, "--role", "root"], "unknown role \"root\""),
        (&["token", "create", "--org", &org, "--role", "operator"], "--operator instead"),
        (
            &["token", "create", "--org", &org, "--role", "admin", "--expires", "2001-01-01T00:00:00Z"],
            "this time is in the past",
        ),
        (&["token", "create", "--org", &org, "--role", "admin", "--expires", "soon"], "or never"),
        (&["token", "create", "--org", &org, "--role", "admin", "--name", "a\u{202e}b"], "a name has"),
        (
            &["token", "create", "--org", "ffffffff-ffff-ffff-ffff-ffffffffffff", "--role", "admin"],
            "is not a valid org",
        ),
    ] {
        let (done, _, said) = run(&database, arguments);
        assert!(!done && said.contains(expected), "{arguments:?}: {said}");
    }
    server.stop().await;
}
