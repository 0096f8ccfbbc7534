//! What a server tells about itself, about the caller's limits, and to operators about all orgs.

use std::time::Duration;

use jobledger_client::{
    Claim, Client, Error, Follow, NewJob, Report, Token,
    proto::{ListOrgsRequest, Role as RoleWord},
};
use jobledger_server::domain::{
    access::Role,
    clock::{Clock as _, SystemClock},
};
use uuid::Uuid;

use super::access::{guarded, token, token_with};
use crate::support::harness::{Database, TestServer, on_both_databases, root};

on_both_databases! {
    a_caller_is_told_its_rights_its_limits_and_what_it_uses,
    operators_page_through_all_orgs,
}

fn client(server: &TestServer, token: &str, org: Option<Uuid>) -> Client {
    let builder = Client::builder(server.endpoint()).token(Token::new(token).unwrap());
    org.into_iter().fold(builder, |builder, org| builder.org(org)).build().unwrap()
}

async fn a_caller_is_told_its_rights_its_limits_and_what_it_uses(database: Database) {
    let org = Uuid::new_v4();
    let ends = SystemClock.now() + Duration::from_secs(3_600);
    let roles = [Role::Producer, Role::Worker];
    let (of_worker, _) = token_with(&database, Some(org), &roles, |token| token.expires_at = Some(ends)).await;
    let operator = token(&database, None, Role::Operator).await;
    let mut config = guarded(&database);
    config.limits.jobs_per_org = Some(5);
    config.calls.request_bytes = 1 << 20;
    let server = TestServer::start(config).await;
    let worker = client(&server, &of_worker, None);

    let before = worker.server_info().await.unwrap();
    let caller = before.caller.as_ref().unwrap();
    assert_eq!((&*caller.actor, &*caller.org_id), ("token:tester", &*org.to_string()));
    assert_eq!(Vec::from_iter(caller.roles()), [RoleWord::Producer, RoleWord::Worker]);
    assert_eq!(caller.expires_at.unwrap().seconds, ends.timestamp());
    assert_eq!(before.version, env!("CARGO_PKG_VERSION"));
    assert_eq!(before.database, if database.is_postgres() { "postgresql" } else { "sqlite" });
    assert!((before.time.unwrap().seconds - SystemClock.now().timestamp()).abs() < 60);

    let job = worker.create(NewJob::new("a").payload("x").unwrap()).await.unwrap().job.id;
    for job_type in ["a", "b", "b"] {
        worker.create(NewJob::new(job_type)).await.unwrap();
    }
    worker.claim(Claim::new("w")).await.unwrap();
    worker.update(Report::succeeded(&job)).await.unwrap_err();
    let info = worker.server_info().await.unwrap();
    let limit = |name: &str| info.limits.iter().find(|limit| limit.name == name).cloned().unwrap();
    assert_eq!((limit("max-jobs-per-org").value, limit("max-jobs-per-org").used), (Some(5), Some(4)));
    assert_eq!((limit("max-types-per-org").value, limit("max-types-per-org").used), (Some(10_000), Some(2)));
    let bytes = limit("max-bytes-per-org");
    assert!(bytes.value.is_none() && bytes.used > Some(4 << 10), "{bytes:?}");
    assert_eq!((limit("max-request-bytes").value, limit("max-request-bytes").used), (Some(1 << 20), None));
    // The next job but one is refused, as the limit says.
    worker.create(NewJob::new("a")).await.unwrap();
    assert!(matches!(worker.create(NewJob::new("a")).await, Err(Error::Exhausted { .. })));

    // The id of the log is the one that cursors have.
    let mut events =
        client(&server, &operator, Some(org)).subscribe(Follow::org().after(0).history_only()).await.unwrap();
    while events.next().await.is_some() {}
    assert_eq!(events.cursor().unwrap().log_id, info.log_id);

    // Each is an option of the server, and is documented.
    let documented = std::fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let mut last = 0;
    for limit in &info.limits {
        let at = documented.find(&format!("`--{}`", limit.name)).unwrap_or_else(|| panic!("{limit:?} is not there"));
        assert!(at > last, "{limit:?} is told in another order than the documentation's");
        last = at;
    }

    let of_operator = client(&server, &operator, Some(org)).server_info().await.unwrap();
    assert_eq!(Vec::from_iter(of_operator.caller.unwrap().roles()), [RoleWord::Operator]);
    assert_eq!((of_operator.limits[2].clone(), of_operator.log_id), (limit_of_five(), info.log_id));
    server.stop().await;
}

fn limit_of_five() -> jobledger_client::proto::Limit {
    jobledger_client::proto::Limit { name: "max-jobs-per-org".to_owned(), value: Some(5), used: Some(5) }
}

async fn operators_page_through_all_orgs(database: Database) {
    let operator = token(&database, None, Role::Operator).await;
    let mut orgs: Vec<_> = (0..5).map(|_| Uuid::new_v4()).collect();
    orgs.sort();
    let admin = token(&database, Some(orgs[0]), Role::Admin).await;
    let server = TestServer::start(guarded(&database)).await;
    let of_org = |n: usize| client(&server, &operator, Some(orgs[n]));
    for n in 0..5 {
        of_org(n).create_all((0..=n).map(|m| NewJob::new(format!("t{}", m % 2)))).await.unwrap();
    }
    of_org(3).claim(Claim::new("w")).await.unwrap();
    let later = SystemClock.now() + Duration::from_secs(600);
    of_org(3).create(NewJob::new("t0").scheduled_at(later)).await.unwrap();

    // An operator needs no org for it, and may name one.
    for caller in [client(&server, &operator, None), of_org(2)] {
        let (mut found, mut list, mut pages) = (Vec::new(), ListOrgsRequest { page_size: 2, ..Default::default() }, 0);
        loop {
            let page = caller.orgs(list.clone()).await.unwrap();
            assert!(page.orgs.len() <= 2);
            found.extend(page.orgs);
            pages += 1;
            list.page_token = page.next_page_token;
            if list.page_token.is_empty() {
                break;
            }
        }
        assert_eq!(
            (found.iter().map(|org| org.id.clone()).collect(), pages),
            (orgs.iter().map(Uuid::to_string).collect::<Vec<_>>(), 3)
        );
        for (n, org) in found.iter().enumerate() {
            let statistics = of_org(n).statistics(&[]).await.unwrap();
            assert_eq!((org.counts, org.as_of_seq), (statistics.counts, statistics.as_of_seq));
            assert_eq!((org.claimable, org.scheduled), (statistics.claimable, statistics.scheduled));
            assert_eq!(org.types, if n == 0 { 1 } else { 2 });
            assert!(org.bytes > (n as i64 + 1) << 10, "{org:?}");
        }
        assert_eq!((found[3].claimable, found[3].scheduled, found[3].counts.unwrap().running), (3, 1, 1));
    }

    assert!(matches!(
        client(&server, &admin, None).orgs(ListOrgsRequest::default()).await,
        Err(Error::PermissionDenied { .. })
    ));
    let bad = ListOrgsRequest { page_token: "x".to_owned(), ..Default::default() };
    match client(&server, &operator, None).orgs(bad).await {
        Err(Error::InvalidRequest { violations, .. }) => assert_eq!(violations[0].field, "page_token"),
        other => panic!("{other:?}"),
    }
    server.stop().await;
}
