//! API tokens, made, listed and revoked by calls.

use std::time::{Duration, Instant};

use jobledger_client::{
    Client, Error, Follow, Item, JobEventKind, NewJob, Token,
    proto::{ApiToken, CreateTokenRequest, ListTokensRequest, Role as RoleWord, StreamJobEventsRequest},
};
use jobledger_server::{
    domain::{
        access::Role,
        clock::{Clock as _, SystemClock},
    },
    ledger::MOST_TOKENS,
};
use tokio::time::{sleep, timeout};
use tonic::Code;
use uuid::Uuid;

use super::access::{OURS, THEIRS, client_with, end_of, guarded, token};
use crate::{
    jobs::errors::assert_error,
    support::harness::{Database, PATIENCE, TestServer, on_both_databases},
};

on_both_databases! {
    admins_make_list_and_revoke_their_orgs_tokens,
    requests_about_tokens_are_checked,
    revoking_a_token_checks_no_other,
    an_org_has_so_many_tokens_and_ended_ones_make_room,
}

fn wanted(name: &str, roles: &[RoleWord]) -> CreateTokenRequest {
    CreateTokenRequest {
        name: name.to_owned(),
        roles: roles.iter().map(|role| (*role).into()).collect(),
        ..Default::default()
    }
}

async fn listed(client: &Client) -> Vec<ApiToken> {
    client.tokens(ListTokensRequest::default()).await.unwrap().tokens
}

/// Waits until a token is refused.
async fn is_refused(client: &Client) {
    let refused = async {
        while !matches!(client.server_info().await, Err(Error::Unauthenticated { .. })) {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, refused).await.expect("the token ends");
}

async fn admins_make_list_and_revoke_their_orgs_tokens(database: Database) {
    let admin = token(&database, Some(OURS), Role::Admin).await;
    let other = token(&database, Some(THEIRS), Role::Admin).await;
    let operator = token(&database, None, Role::Operator).await;
    let mut servers = vec![TestServer::start(guarded(&database)).await];
    if database.is_postgres() {
        servers.push(TestServer::start(guarded(&database)).await);
    }
    let last = servers.last().unwrap();
    let (admin, other) = (client_with(&servers[0], &admin), client_with(last, &other));
    let ends = SystemClock.now().timestamp() + 3_600;
    let expires_at = Some(jobledger_client::prost_types::Timestamp { seconds: ends, nanos: 0 });
    let request = CreateTokenRequest { expires_at, ..wanted("ci", &[RoleWord::Producer, RoleWord::Observer]) };
    let (made, secret) = admin.create_token(request).await.unwrap();
    assert_eq!((&*made.name, made.expires_at.unwrap().seconds), ("ci", ends));
    assert_eq!(Vec::from_iter(made.roles()), [RoleWord::Producer, RoleWord::Observer]);
    assert!((made.created_at.unwrap().seconds + 3_600 - ends).abs() < 60 && made.revoked_at.is_none());

    // It holds on every server, with its own roles only.
    let (mut streams, mut jobs) = (Vec::new(), Vec::new());
    for server in &servers {
        let client = client_with(server, &secret.text());
        jobs.push(client.create(NewJob::new("t")).await.unwrap().job.id);
        assert!(matches!(client.tokens(ListTokensRequest::default()).await, Err(Error::PermissionDenied { .. })));
        let mut stream = client.raw().stream_job_events(StreamJobEventsRequest::default()).await.unwrap().into_inner();
        stream.message().await.unwrap().expect("an event or a bookmark");
        streams.push(stream);
    }
    match admin.subscribe(Follow::job(&jobs[0])).await.unwrap().next().await {
        Some(Ok(Item::Event(created))) => {
            assert_eq!((created.kind(), &*created.actor), (JobEventKind::Created, "token:ci"));
        }
        other => panic!("{other:?}"),
    }

    // The org's tokens in the order in which they were made, page by page.
    let (defaults, _) = admin.create_token(wanted("defaults", &[RoleWord::Worker])).await.unwrap();
    let days = defaults.expires_at.unwrap().seconds - defaults.created_at.unwrap().seconds;
    assert_eq!((days + 60) / 86_400, 90);
    let (mut names, mut page) = (Vec::new(), ListTokensRequest { page_size: 2, ..Default::default() });
    loop {
        let answer = admin.tokens(page.clone()).await.unwrap();
        names.extend(answer.tokens.into_iter().map(|token| token.name));
        page.page_token = answer.next_page_token;
        if page.page_token.is_empty() {
            break;
        }
    }
    assert_eq!(names, ["tester", "ci", "defaults"]);

    // To another org it does not exist.
    assert_eq!(listed(&other).await.len(), 1);
    for id in [&made.id, &Uuid::new_v4().to_string()] {
        let unknown = other.revoke_token(id).await;
        assert!(matches!(&unknown, Err(Error::TokenNotFound { token_id }) if token_id == id), "{unknown:?}");
    }
    // An operator names the org. Revoking again changes nothing.
    let operator = Client::builder(last.endpoint()).org(OURS).token(Token::new(&operator).unwrap()).build().unwrap();
    let began = Instant::now();
    let revoked = operator.revoke_token(&made.id).await.unwrap();
    assert!(revoked.revoked_at.is_some() && revoked.name == "ci");
    assert_eq!(admin.revoke_token(&made.id).await.unwrap().revoked_at, revoked.revoked_at);
    for (stream, server) in streams.into_iter().zip(&servers) {
        assert_error(&end_of(stream).await, Code::Unauthenticated, "UNAUTHENTICATED");
        is_refused(&client_with(server, &secret.text())).await;
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let now = listed(&admin).await;
    assert_eq!(
        now.iter().filter(|token| token.revoked_at.is_some()).map(|token| &*token.id).collect::<Vec<_>>(),
        [&*made.id]
    );
    for server in servers {
        server.stop().await;
    }
}

async fn requests_about_tokens_are_checked(database: Database) {
    let admin = token(&database, Some(OURS), Role::Admin).await;
    let server = TestServer::start(guarded(&database)).await;
    let admin = client_with(&server, &admin);
    let at = |seconds| Some(jobledger_client::prost_types::Timestamp { seconds, nanos: 0 });
    let now = SystemClock.now().timestamp();
    let good = wanted("a", &[RoleWord::Worker]);
    let bad = [
        (wanted("", &[RoleWord::Worker]), "name"),
        (wanted(&"x".repeat(241), &[RoleWord::Worker]), "name"),
        (wanted("a\u{202e}b", &[RoleWord::Worker]), "name"),
        (wanted("a", &[]), "roles"),
        (wanted("a", &[RoleWord::Operator]), "roles"),
        (wanted("a", &[RoleWord::Unspecified]), "roles"),
        (CreateTokenRequest { roles: vec![77], ..good.clone() }, "roles"),
        (CreateTokenRequest { roles: vec![1; 7], ..good.clone() }, "roles"),
        (CreateTokenRequest { expires_at: at(now - 1), ..good.clone() }, "expires_at"),
        (CreateTokenRequest { expires_at: at(now + 11 * 366 * 86_400), ..good.clone() }, "expires_at"),
        (CreateTokenRequest { expires_at: at(i64::MAX), ..good }, "expires_at"),
    ];
    for (request, field) in bad {
        match admin.create_token(request.clone()).await {
            Err(Error::InvalidRequest { violations, .. }) => assert_eq!(violations[0].field, field, "{request:?}"),
            other => panic!("{request:?}: {other:?}"),
        }
    }
    let bad = [
        admin.tokens(ListTokensRequest { page_token: "x".to_owned(), ..Default::default() }).await.map(drop),
        admin.tokens(ListTokensRequest { page_size: -1, ..Default::default() }).await.map(drop),
        admin.revoke_token("x").await.map(drop),
    ];
    for refused in bad {
        assert!(matches!(refused, Err(Error::InvalidRequest { .. })), "{refused:?}");
    }
    assert_eq!(listed(&admin).await.len(), 1, "nothing was made");
    server.stop().await;
}

async fn revoking_a_token_checks_no_other(database: Database) {
    let admin = token(&database, Some(OURS), Role::Admin).await;
    let server = TestServer::start(guarded(&database)).await;
    let admin = client_with(&server, &admin);
    let (first, revoked) = admin.create_token(wanted("a", &[RoleWord::Worker])).await.unwrap();
    let (other, stays) = admin.create_token(wanted("b", &[RoleWord::Worker])).await.unwrap();
    let (revoked, stays) = (client_with(&server, &revoked.text()), client_with(&server, &stays.text()));
    for client in [&revoked, &stays] {
        client.server_info().await.unwrap();
    }
    // A row that somebody deletes is missed only where its token is looked up.
    let id = if database.is_postgres() {
        format!("'{}'", other.id)
    } else {
        format!("x'{}'", Uuid::parse_str(&other.id).unwrap().simple())
    };
    database.tamper(&format!("DELETE FROM api_token WHERE id = {id}")).await;
    admin.revoke_token(&first.id).await.unwrap();
    is_refused(&revoked).await;
    stays.server_info().await.unwrap();
    server.stop().await;
}

async fn an_org_has_so_many_tokens_and_ended_ones_make_room(database: Database) {
    let admin = token(&database, Some(OURS), Role::Admin).await;
    let server = TestServer::start(guarded(&database)).await;
    let admin = client_with(&server, &admin);
    let mut made = Vec::new();
    while made.len() + 1 < MOST_TOKENS {
        made.push(admin.create_token(wanted("one of many", &[RoleWord::Worker])).await.unwrap());
    }
    let full = |made: Result<_, Error>| match made {
        Err(Error::Exhausted { reason, .. }) => assert_eq!(reason, "QUOTA_EXCEEDED"),
        other => panic!("{:?}", other.map(|(token, _): (ApiToken, Token)| token)),
    };
    full(admin.create_token(wanted("one too many", &[RoleWord::Worker])).await);
    // Every server has to notice first that a token has ended.
    admin.revoke_token(&made[0].0.id).await.unwrap();
    full(admin.create_token(wanted("one too many", &[RoleWord::Worker])).await);
    let hour_ago =
        if database.is_postgres() { "revoked_at - interval '61 minutes'" } else { "revoked_at - 3660000000" };
    database.tamper(&format!("UPDATE api_token SET revoked_at = {hour_ago} WHERE revoked_at IS NOT NULL")).await;
    let (last, _) = admin.create_token(wanted("one more", &[RoleWord::Worker])).await.unwrap();
    let all = admin.tokens(ListTokensRequest { page_size: 1_000, ..Default::default() }).await.unwrap();
    let ids: Vec<_> = all.tokens.iter().map(|token| &token.id).collect();
    assert_eq!((ids.len(), ids.contains(&&last.id), ids.contains(&&made[0].0.id)), (MOST_TOKENS, true, false));
    full(admin.create_token(wanted("one too many", &[RoleWord::Worker])).await);
    server.stop().await;
}
