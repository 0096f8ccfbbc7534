//! Pauses of types over the wire: which claims they stop, when they end, and who is notified.

use std::time::{Duration, SystemTime};

use jobledger_client::{
    Claim, Client, Error, Follow, Item, NewJob, OrgEvent, PauseTarget, Report,
    proto::{
        DeleteJobTypeRequest, GetStatisticsRequest, ListJobTypesRequest, PauseJobTypeRequest, ResumeJobTypeRequest,
        UpdateJobTypeRequest, org_event,
    },
};
use jobledger_server::domain::clock::{Clock as _, SystemClock};
use tokio::time::{Instant, timeout};

use crate::support::{
    harness::{Database, PATIENCE, TestServer, on_both_databases},
    program::Program,
};

on_both_databases! {
    claims_get_no_jobs_of_a_paused_type,
    claims_of_all_types_get_the_most_urgent_of_those_that_are_not_paused,
    a_claim_that_waits_gets_the_jobs_of_a_type_that_is_resumed,
    a_pause_ends_by_itself,
    a_pause_is_told_wherever_somebody_could_wonder,
    a_pause_survives_a_kill,
    settings_are_events_of_the_log,
    types_are_listed_in_pages,
    a_type_is_forgotten_with_its_last_job_and_setting,
    requests_about_types_that_make_no_sense_are_refused,
}

fn now() -> SystemTime {
    SystemClock.now().into()
}

async fn create(client: &Client, job_type: &str) -> String {
    client.create(NewJob::new(job_type)).await.unwrap().job.id
}

/// The jobs that a claim gets, in order.
async fn claimed(client: &Client, claim: Claim) -> Vec<String> {
    let leases = client.claim(claim.max_jobs(100)).await.unwrap();
    leases.into_iter().map(|lease| lease.job.unwrap().id).collect()
}

fn any() -> Claim {
    Claim::new("w")
}

async fn claims_get_no_jobs_of_a_paused_type(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let (first, b) = (create(&client, "a").await, create(&client, "b").await);
    let held = client.claim(any().types(["a"])).await.unwrap().remove(0);
    let second = create(&client, "a").await;
    client.pause("a", "the disk is full", None).await.unwrap();
    // Neither jobs that were there, nor new ones, nor ones that are given back. What runs goes on until then.
    client.update(Report::progress(&first).percent(1).lease(&held.lease_token)).await.unwrap();
    client.update(Report::released(&first).lease(&held.lease_token)).await.unwrap();
    let third = create(&client, "a").await;
    assert_eq!(claimed(&client, any().types(["a"])).await, Vec::<String>::new());
    assert_eq!(claimed(&client, any().types(["a", "b"])).await, [b]);
    assert_eq!(claimed(&client, any()).await, Vec::<String>::new());
    // Who begins a job without a claim is not stopped.
    client.update(Report::start(&second)).await.unwrap();
    client.pause("a", "still", None).await.unwrap();
    client.resume("a").await.unwrap();
    assert_eq!(claimed(&client, any()).await, [first, third]);

    let fourth = create(&client, "c").await;
    client.pause(PauseTarget::AllTypes, "", None).await.unwrap();
    client.resume("c").await.unwrap();
    create(&client, "never seen before").await;
    assert_eq!(claimed(&client, any()).await, Vec::<String>::new());
    assert_eq!(claimed(&client, any().types(["c"])).await, Vec::<String>::new());
    client.resume(PauseTarget::AllTypes).await.unwrap();
    assert_eq!(claimed(&client, any().types(["c"])).await, [fourth]);
    server.stop().await;
}

async fn claims_of_all_types_get_the_most_urgent_of_those_that_are_not_paused(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut expected = Vec::new();
    for n in 0..60 {
        let job_type = ["a", "b", "c", "d"][n % 4];
        let priority = [3, 1, 2][n % 3];
        let id = client.create(NewJob::new(job_type).priority(priority)).await.unwrap().job.id;
        if job_type != "b" {
            expected.push((-priority, n, id));
        }
    }
    expected.sort_unstable();
    let expected: Vec<_> = expected.into_iter().map(|(.., id)| id).collect();
    // The first claim fills the windows, the pause then has them filled anew.
    let first = client.claim(any()).await.unwrap().remove(0);
    client.update(Report::released(&first.job.as_ref().unwrap().id).lease(&first.lease_token)).await.unwrap();
    client.pause("b", "", None).await.unwrap();
    let mut found = Vec::new();
    for n in [1, 4, 20, 100] {
        let leases = client.claim(any().max_jobs(n)).await.unwrap();
        found.extend(leases.into_iter().map(|lease| lease.job.unwrap().id));
    }
    let mut sorted = (found.clone(), expected.clone());
    sorted.0.sort_unstable();
    sorted.1.sort_unstable();
    assert_eq!(sorted.0, sorted.1, "each job of the other types once");
    // The job that was given back is ready since then, so it comes after the others of its priority.
    let without =
        |ids: &[String]| ids.iter().filter(|id| **id != first.job.as_ref().unwrap().id).cloned().collect::<Vec<_>>();
    assert_eq!(without(&found), without(&expected), "in claim order");
    let late = create(&client, "c").await;
    assert_eq!(claimed(&client, any()).await, [late], "and what comes later");
    server.stop().await;
}

async fn a_claim_that_waits_gets_the_jobs_of_a_type_that_is_resumed(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    for (target, types) in
        [(PauseTarget::from("a"), vec!["a"]), ("a".into(), vec![]), (PauseTarget::AllTypes, vec!["a"])]
    {
        client.pause(target.clone(), "", None).await.unwrap();
        let id = create(&client, "a").await;
        let waiting = client.clone();
        let claim = any().types(types).wait(Duration::from_secs(60));
        let waiting = tokio::spawn(async move { waiting.claim(claim).await.unwrap() });
        // A call that is sent later is answered: the claim has been received.
        client.statistics(&[]).await.unwrap();
        let resumed = Instant::now();
        client.resume(target).await.unwrap();
        let leases = timeout(PATIENCE, waiting).await.unwrap().unwrap();
        assert_eq!(leases[0].job.as_ref().unwrap().id, id);
        assert!(resumed.elapsed() < Duration::from_secs(1), "{:?}", resumed.elapsed());
    }
    server.stop().await;
}

async fn a_pause_ends_by_itself(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let id = create(&client, "a").await;
    let until = now() + Duration::from_millis(1_500);
    client.pause("a", "for a moment", Some(until)).await.unwrap();
    assert_eq!(claimed(&client, any()).await, Vec::<String>::new());
    let found = claimed(&client, any().wait(Duration::from_secs(30))).await;
    assert_eq!(found, [id]);
    assert!(now() >= until);
    let events = org_events(&client).await;
    let Some(org_event::Change::JobTypeResumed(resumed)) = &events[1].change else { panic!("{events:?}") };
    assert_eq!((&*events[1].actor, &*resumed.r#type), ("jobledger", "a"));
    assert_eq!(resumed.pause.as_ref().unwrap().reason, "for a moment");
    server.stop().await;
}

/// The events of the log that are about no single job.
async fn org_events(client: &Client) -> Vec<OrgEvent> {
    let mut events = client.subscribe(Follow::org().after(0).history_only()).await.unwrap();
    let mut found = Vec::new();
    while let Some(item) = events.next().await {
        if let Item::OrgEvent(event) = item.unwrap() {
            found.push(*event);
        }
    }
    found
}

async fn a_pause_is_told_wherever_somebody_could_wonder(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    create(&client, "a").await;
    create(&client, "b").await;
    let pause = client.pause("a", "the disk is full", None).await.unwrap();
    let all = client.pause(PauseTarget::AllTypes, "an incident", None).await.unwrap();
    assert_eq!((&*pause.reason, &*all.reason), ("the disk is full", "an incident"));
    let statistics = client.statistics(&[]).await.unwrap();
    assert_eq!(statistics.pause_of_all.as_ref(), Some(&all));
    assert_eq!((statistics.types[0].pause.as_ref(), statistics.types[1].pause.as_ref()), (Some(&pause), None));
    let types = client.job_types(ListJobTypesRequest::default()).await.unwrap();
    assert_eq!(types.pause_of_all, Some(all));
    assert_eq!((types.job_types[0].pause.as_ref(), types.job_types[1].pause.as_ref()), (Some(&pause), None));
    assert_eq!(client.job_type("a").await.unwrap().pause, Some(pause));
    server.stop().await;
}

async fn a_pause_survives_a_kill(database: Database) {
    let program = Program::start(&database);
    let client = program.client();
    let id = create(&client, "a").await;
    client.pause("a", "why", None).await.unwrap();
    program.kill();
    let program = Program::start(&database);
    let client = program.client();
    assert_eq!(claimed(&client, any()).await, Vec::<String>::new());
    assert_eq!(client.job_type("a").await.unwrap().pause.unwrap().reason, "why");
    client.resume("a").await.unwrap();
    assert_eq!(claimed(&client, any()).await, [id]);
    drop(program);
    database.verify().await;
}

async fn settings_are_events_of_the_log(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let mut live = client.subscribe(Follow::org().after(0)).await.unwrap();
    let mut of_types = client.subscribe(Follow::org().after(0).types(["a"])).await.unwrap();
    let mut request = jobledger_client::proto::StreamJobEventsRequest::from(Follow::org().after(0).types(["a"]));
    request.include_org_events = true;
    let mut with_both = client.subscribe(request).await.unwrap();
    create(&client, "b").await;
    client.pause("a", "one", None).await.unwrap();
    client.pause("a", "one", None).await.unwrap();
    client.describe("a", "what it does").await.unwrap();
    client.resume("a").await.unwrap();
    client.resume("a").await.unwrap();
    client.reset_type("a").await.unwrap();
    create(&client, "a").await;
    // The SDK checks that no event is missing.
    let mut kinds = Vec::new();
    while kinds.len() < 6 {
        match timeout(PATIENCE, live.next()).await.unwrap().unwrap().unwrap() {
            Item::Event(event) => kinds.push((event.seq, "job")),
            Item::OrgEvent(event) => kinds.push((
                event.seq,
                match event.change.unwrap() {
                    org_event::Change::JobTypePaused(_) => "paused",
                    org_event::Change::JobTypeResumed(_) => "resumed",
                    org_event::Change::JobTypeUpdated(_) => "updated",
                    org_event::Change::JobTypeDeleted(_) => "deleted",
                    other => panic!("{other:?}"),
                },
            )),
            _ => {}
        }
    }
    assert_eq!(kinds, [(1, "job"), (2, "paused"), (3, "updated"), (4, "resumed"), (5, "deleted"), (6, "job")]);
    let seqs = async |events: &mut jobledger_client::Subscription| {
        let mut seqs = Vec::new();
        while seqs.last() != Some(&6) {
            match timeout(PATIENCE, events.next()).await.unwrap().unwrap().unwrap() {
                Item::Event(event) => seqs.push(event.seq),
                Item::OrgEvent(event) => seqs.push(event.seq),
                _ => {}
            }
        }
        seqs
    };
    assert_eq!(seqs(&mut of_types).await, [6]);
    assert_eq!(seqs(&mut with_both).await, [2, 3, 4, 5, 6]);
    assert_eq!(org_events(&client).await.iter().map(|event| event.seq).collect::<Vec<_>>(), [2, 3, 4, 5]);
    server.stop().await;
}

async fn types_are_listed_in_pages(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    for name in ["c", "a", "d"] {
        create(&client, name).await;
    }
    client.describe("b", "has no jobs yet").await.unwrap();
    let (mut names, mut list) = (Vec::new(), ListJobTypesRequest { page_size: 3, ..ListJobTypesRequest::default() });
    loop {
        let page = client.job_types(list.clone()).await.unwrap();
        assert!(page.job_types.len() <= 3);
        names.extend(page.job_types.into_iter().map(|of_type| (of_type.name, of_type.claimable)));
        list.page_token = page.next_page_token;
        if list.page_token.is_empty() {
            break;
        }
    }
    let expected = [("a", 1), ("b", 0), ("c", 1), ("d", 1)].map(|(name, claimable)| (name.to_owned(), claimable));
    assert_eq!(names, expected);
    assert_eq!(client.job_type("b").await.unwrap().settings.unwrap().description, "has no jobs yet");
    server.stop().await;
}

async fn a_type_is_forgotten_with_its_last_job_and_setting(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let missing =
        |found: Result<_, Error>| matches!(found, Err(Error::JobTypeNotFound { job_type }) if job_type == "a");
    assert!(missing(client.job_type("a").await.map(drop)));
    assert!(missing(client.resume("a").await) && missing(client.reset_type("a").await));
    client.pause("a", "", None).await.unwrap();
    assert_eq!(client.job_type("a").await.unwrap().name, "a");
    client.reset_type("a").await.unwrap();
    assert!(missing(client.job_type("a").await.map(drop)));
    create(&client, "a").await;
    client.describe("a", "x").await.unwrap();
    client.reset_type("a").await.unwrap();
    assert_eq!(client.job_type("a").await.unwrap().counts.unwrap().queued, 1, "it has a job");
    server.stop().await;
}

async fn requests_about_types_that_make_no_sense_are_refused(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let fields = |error: tonic::Status| match Error::from(error) {
        Error::InvalidRequest { violations, .. } => {
            violations.into_iter().map(|violation| violation.field).collect::<Vec<_>>()
        }
        other => panic!("{other}"),
    };
    let mut types = client.raw_job_types();
    let pause = |request| {
        let mut types = types.clone();
        async move { fields(types.pause_job_type(request).await.unwrap_err()) }
    };
    let of_a = PauseJobTypeRequest { r#type: "a".to_owned(), ..PauseJobTypeRequest::default() };
    assert_eq!(pause(PauseJobTypeRequest::default()).await, ["type"]);
    assert_eq!(pause(PauseJobTypeRequest { all_types: true, ..of_a.clone() }).await, ["type"]);
    assert_eq!(pause(PauseJobTypeRequest { reason: "x".repeat(5 << 10), ..of_a.clone() }).await, ["reason"]);
    let past = now() - Duration::from_secs(60);
    assert_eq!(pause(PauseJobTypeRequest { until: Some(past.into()), ..of_a.clone() }).await, ["until"]);
    let update = UpdateJobTypeRequest { r#type: "a".to_owned(), ..UpdateJobTypeRequest::default() };
    assert_eq!(fields(types.update_job_type(update.clone()).await.unwrap_err()), ["update_mask"]);
    for path in ["descriptions", "settings.description", "*", ""] {
        let update_mask = Some(jobledger_client::prost_types::FieldMask { paths: vec![path.to_owned()] });
        let update = UpdateJobTypeRequest { update_mask, ..update.clone() };
        assert_eq!(fields(types.update_job_type(update).await.unwrap_err()), ["update_mask"], "{path}");
    }
    for page_token in ["x", "after:\u{202e}"] {
        let list = ListJobTypesRequest { page_token: page_token.to_owned(), page_size: -1 };
        assert_eq!(fields(types.list_job_types(list).await.unwrap_err()), ["page_size", "page_token"]);
    }
    let follow = jobledger_client::proto::StreamJobEventsRequest {
        job_id: create(&client, "a").await,
        include_org_events: true,
        ..Default::default()
    };
    assert_eq!(fields(client.raw().stream_job_events(follow).await.unwrap_err()), ["include_org_events"]);
    // Changes under another etag.
    let paused = types.pause_job_type(of_a.clone()).await.unwrap().into_inner();
    let stale = || "0".to_owned();
    let found = [
        types.pause_job_type(PauseJobTypeRequest { etag: stale(), reason: "x".to_owned(), ..of_a }).await.err(),
        types
            .resume_job_type(ResumeJobTypeRequest { r#type: "a".to_owned(), etag: stale(), ..Default::default() })
            .await
            .err(),
        types.delete_job_type(DeleteJobTypeRequest { r#type: "a".to_owned(), etag: stale() }).await.err(),
    ];
    for found in found {
        let found = Error::from(found.unwrap());
        assert!(matches!(&found, Error::EtagMismatch { current_etag } if *current_etag == paused.etag), "{found}");
    }
    let window = GetStatisticsRequest { types: vec!["a".to_owned()], ..GetStatisticsRequest::default() };
    assert!(client.statistics_of(window).await.unwrap().types[0].pause.is_some());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_stops_claims_on_every_server_and_its_end_wakes_those_that_wait() {
    let database = Database::postgres().await;
    let (a, on_a) = TestServer::on(&database).await;
    let (b, on_b) = TestServer::on(&database).await;
    // Both servers have the state of the org in memory.
    for client in [&on_a, &on_b, &on_a, &on_b] {
        client.create(NewJob::new("t")).await.unwrap();
        assert_eq!(client.claim(Claim::new("w")).await.unwrap().len(), 1);
    }
    for target in [PauseTarget::from("t"), PauseTarget::AllTypes] {
        let id = on_b.create(NewJob::new("t")).await.unwrap().job.id;
        on_a.pause(target.clone(), "why", None).await.unwrap();
        for claim in [Claim::new("w"), Claim::new("w").types(["t"])] {
            assert!(on_b.claim(claim).await.unwrap().is_empty(), "from the answer on");
        }
        assert!(on_a.claim(Claim::new("w")).await.unwrap().is_empty());
        let waiting = on_b.clone();
        let claim = Claim::new("w").types(["t"]).wait(Duration::from_secs(60));
        let waiting = tokio::spawn(async move { waiting.claim(claim).await.unwrap() });
        on_b.statistics(&[]).await.unwrap();
        let resumed = Instant::now();
        on_a.resume(target).await.unwrap();
        let leases = timeout(PATIENCE, waiting).await.unwrap().unwrap();
        assert_eq!(leases[0].job.as_ref().unwrap().id, id);
        assert!(resumed.elapsed() < Duration::from_secs(1), "{:?}", resumed.elapsed());
    }
    let mut events = on_b.subscribe(Follow::org().after(0).history_only()).await.unwrap();
    let mut seqs = Vec::new();
    while let Some(item) = events.next().await {
        match item.unwrap() {
            Item::Event(event) => seqs.push(event.seq),
            Item::OrgEvent(event) => seqs.push(event.seq),
            _ => {}
        }
    }
    assert_eq!(seqs, (1..=16).collect::<Vec<_>>());
    a.stop().await;
    b.stop().await;
    database.verify().await;
}
