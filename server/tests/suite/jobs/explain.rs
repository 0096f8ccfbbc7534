//! Why jobs wait: whatever the state, the explanation is what claims then do.

use std::{
    collections::HashMap,
    time::{Duration, Instant, SystemTime},
};

use jobledger_client::{
    Claim, Client, Error, JobStatus, NewJob, PauseTarget, Report,
    proto::{ExplainJobResponse, GetStatisticsRequest, wait_reason::Reason},
};
use jobledger_server::domain::clock::{Clock as _, SystemClock};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::support::{
    harness::{Database, PATIENCE, TestServer, on_both_databases, short_or_long},
    seeded::Seeded,
};

on_both_databases! {
    explanations_are_what_claims_then_do,
    long_queues_are_counted_as_far_as_is_said,
    waits_are_estimated_from_what_began_lately,
    workers_that_wait_or_work_are_known_on_every_server,
}

const TYPES: [&str; 3] = ["a", "b", "c"];
/// How long another server may not know of a new worker.
const NEWS: Duration = Duration::from_secs(12);

fn reasons(explained: &ExplainJobResponse) -> Vec<&Reason> {
    explained.reasons.iter().map(|reason| reason.reason.as_ref().expect("it is one that is known")).collect()
}

fn behind(explained: &ExplainJobResponse) -> i64 {
    let behind = reasons(explained).into_iter().find_map(|reason| match reason {
        Reason::Behind(behind) => Some(behind.jobs),
        _ => None,
    });
    behind.unwrap_or_default()
}

fn is_paused(explained: &ExplainJobResponse) -> bool {
    reasons(explained).iter().any(|reason| matches!(reason, Reason::Paused(_)))
}

async fn claimed(client: &Client, job_type: &str, most: i64) -> Vec<String> {
    // A worker for each type: of a worker its last claim counts.
    let leases = client.claim(Claim::new(job_type).types([job_type]).max_jobs(most as i32)).await.unwrap();
    leases.into_iter().map(|lease| lease.job.unwrap().id).collect()
}

async fn explanations_are_what_claims_then_do(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let other = if database.is_postgres() { Some(TestServer::on(&database).await) } else { None };
    let clients = [&client, other.as_ref().map_or(&client, |(_, client)| client)];
    let mut random = Seeded::new(Seeded::from_environment("explanations"));
    let (mut jobs, mut asked) = (Vec::new(), HashMap::<&str, Instant>::new());
    let mut seen = HashMap::<&str, usize>::new();
    let (steps, mut step) = (short_or_long(150, 2_000), 0);
    // Chance decides which kinds of states come: it goes on until there was each of the five.
    while step < steps || seen.len() < 5 {
        step += 1;
        assert!(step < 20 * steps, "{seen:?}");
        let client = clients[random.below(2) as usize];
        let job_type = TYPES[random.below(3) as usize];
        match random.below(10) {
            0..5 => {
                let job = NewJob::new(job_type).priority(random.below(3) as i32);
                let in_an_hour = SystemClock.now() + Duration::from_secs(3_600);
                let job = if random.below(4) == 0 { job.scheduled_at(in_an_hour) } else { job };
                jobs.push(client.create(job).await.unwrap().job.id);
            }
            5 => {
                client.pause(job_type, "an incident", None).await.unwrap();
            }
            6 => {
                client.pause(PauseTarget::AllTypes, "", None).await.unwrap();
            }
            7..9 => {
                match client.resume(job_type).await {
                    Ok(()) | Err(Error::JobTypeNotFound { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
                client.resume(PauseTarget::AllTypes).await.unwrap();
            }
            _ => {
                claimed(client, job_type, 1).await;
                asked.entry(job_type).or_insert_with(Instant::now);
            }
        }
        let place = random.below(jobs.len().max(1) as u64) as usize;
        let Some(id) = jobs.get(place).cloned() else { continue };
        let explained = clients[random.below(2) as usize].explain(&id).await.unwrap();
        let job = explained.job.as_ref().unwrap();
        let named = reasons(&explained);
        if job.status() != JobStatus::Queued {
            assert!(named.is_empty() && !explained.next, "{explained:#?}");
            *seen.entry("at work").or_default() += 1;
            // Asked about once: else these are soon most of the jobs.
            jobs.swap_remove(place);
            continue;
        }
        let job_type: &'static str = TYPES.into_iter().find(|name| *name == job.r#type).unwrap();
        // Workers: none asked, or they are at work, since no claim here waits.
        let (no_worker, busy) = (
            named.iter().any(|reason| matches!(reason, Reason::NoWorker(_))),
            named.iter().any(|reason| matches!(reason, Reason::WorkersBusy(_))),
        );
        match asked.get(job_type) {
            None => assert!(no_worker && !busy, "{explained:#?}"),
            Some(since) if since.elapsed() > NEWS || !database.is_postgres() => assert!(!no_worker, "{explained:#?}"),
            Some(_) => {}
        }
        let waits = named.iter().find_map(|reason| match reason {
            Reason::NotBefore(until) => until.time,
            _ => None,
        });
        assert_eq!(waits, job.scheduled_at.filter(|_| waits.is_some()), "{explained:#?}");
        assert_eq!(waits.is_some(), job.scheduled_at.is_some(), "{explained:#?}");
        if waits.is_some() || is_paused(&explained) {
            assert!(!explained.next && behind(&explained) == 0 && !busy, "{explained:#?}");
            assert!(!claimed(client, job_type, 100).await.contains(&id), "{explained:#?}");
            asked.entry(job_type).or_insert_with(Instant::now);
            // Without the pauses that are named there is none.
            for reason in &named {
                let Reason::Paused(paused) = reason else { continue };
                assert!(paused.pause.is_some());
                let target = if paused.all_types { PauseTarget::AllTypes } else { job_type.into() };
                client.resume(target).await.unwrap();
            }
            let again = client.explain(&id).await.unwrap();
            assert!(!is_paused(&again), "{again:#?}");
            *seen.entry(if waits.is_some() { "scheduled" } else { "paused" }).or_default() += 1;
            continue;
        }
        // A claim of so many jobs gets others, and then the job.
        let ahead = behind(&explained);
        assert_eq!(explained.next, ahead == 0, "{explained:#?}");
        if ahead > 0 {
            let first = claimed(clients[random.below(2) as usize], job_type, ahead).await;
            assert!(first.len() as i64 == ahead && !first.contains(&id), "{explained:#?}");
        }
        assert_eq!(claimed(client, job_type, 1).await, [id], "{explained:#?}");
        asked.entry(job_type).or_insert_with(Instant::now);
        *seen.entry(if ahead > 0 { "behind" } else { "next" }).or_default() += 1;
    }
    let unknown = client.explain(Uuid::now_v7().to_string()).await;
    assert!(matches!(unknown, Err(Error::JobNotFound { .. })), "{unknown:?}");
    let bad = client.explain("x").await;
    assert!(matches!(bad, Err(Error::InvalidRequest { .. })), "{bad:?}");
    if let Some((other, _)) = other {
        other.stop().await;
    }
    server.stop().await;
}

async fn long_queues_are_counted_as_far_as_is_said(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    client.create_all((0..1_000).map(|_| NewJob::new("t"))).await.unwrap();
    let told = async |id: &str| {
        let explained = client.explain(id).await.unwrap();
        let told = reasons(&explained).into_iter().find_map(|reason| match reason {
            Reason::Behind(behind) => Some((behind.jobs, behind.truncated)),
            _ => None,
        });
        told.unwrap()
    };
    let exact = client.create(NewJob::new("t")).await.unwrap().job.id;
    assert_eq!(told(&exact).await, (1_000, false));
    client.create_all((0..200).map(|_| NewJob::new("t"))).await.unwrap();
    let more = client.create(NewJob::new("t")).await.unwrap().job.id;
    assert_eq!(told(&more).await, (1_000, true));
    assert_eq!(told(&exact).await, (1_000, false));
    server.stop().await;
}

async fn waits_are_estimated_from_what_began_lately(database: Database) {
    const BEGUN: i64 = 5;
    let (server, client) = TestServer::on(&database).await;
    let other = if database.is_postgres() { Some(TestServer::on(&database).await) } else { None };
    let elsewhere = other.as_ref().map_or(&client, |(_, client)| client);
    let seconds =
        |wait: Option<prost_types::Duration>| wait.map(|wait| Duration::try_from(wait).unwrap().as_secs_f64());
    let estimated = async |id: &str| seconds(elsewhere.explain(id).await.unwrap().estimated_wait);
    let mut jobs = Vec::new();
    for _ in 0..20 {
        jobs.push(client.create(NewJob::new("t")).await.unwrap().job.id);
    }
    assert_eq!(estimated(&jobs[19]).await, None, "nobody works");
    assert_eq!(claimed(&client, "t", BEGUN).await.len() as i64, BEGUN);
    assert_eq!(estimated(&jobs[0]).await, None, "it runs");
    // 14 come first, and then it is the job's turn: 15 at the rate of 5 since the log began.
    let request = GetStatisticsRequest {
        types: vec!["t".to_owned()],
        window: Some(prost_types::Duration { seconds: 15 * 60, nanos: 0 }),
        ..Default::default()
    };
    let window = async || {
        let told = elsewhere.statistics_of(request.clone()).await.unwrap();
        let [since, until] = [told.window_start, told.as_of].map(|time| SystemTime::try_from(time.unwrap()).unwrap());
        until.duration_since(since).unwrap().as_secs_f64().max(1.0)
    };
    let (before, wait, after) = (window().await, estimated(&jobs[19]).await.unwrap(), window().await);
    assert!((before * 3.0..=after * 3.0).contains(&wait), "{before} {wait} {after}");
    // A time comes on top, and the end of a pause; a pause without an end can't be told.
    let in_an_hour = SystemClock.now() + Duration::from_secs(3_600);
    let later = client.create(NewJob::new("t").scheduled_at(in_an_hour)).await.unwrap().job.id;
    assert!((3_590.0..3_600.0 + wait).contains(&estimated(&later).await.unwrap()));
    client.pause("t", "", Some((in_an_hour + Duration::from_secs(3_600)).into())).await.unwrap();
    assert!((7_190.0..7_200.0 + wait).contains(&estimated(&later).await.unwrap()));
    client.pause("t", "", None).await.unwrap();
    assert_eq!(estimated(&later).await, None);
    if let Some((other, _)) = other {
        other.stop().await;
    }
    server.stop().await;
}

async fn workers_that_wait_or_work_are_known_on_every_server(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let other = if database.is_postgres() { Some(TestServer::on(&database).await) } else { None };
    let elsewhere = other.as_ref().map_or(&client, |(_, client)| client);
    let first = client.create(NewJob::new("t")).await.unwrap().job.id;
    assert!(matches!(reasons(&elsewhere.explain(&first).await.unwrap())[..], [Reason::NoWorker(_)]));
    claimed(&client, "t", 1).await;
    let second = client.create(NewJob::new("t")).await.unwrap().job.id;
    let busy = async {
        while !matches!(reasons(&elsewhere.explain(&second).await.unwrap())[..], [Reason::WorkersBusy(_)]) {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, busy).await.expect("the other server hears of the worker");
    client.update(Report::succeeded(&first)).await.unwrap_err();
    let finished = client.cancel(&second, "").await.unwrap();
    assert_eq!(finished.status(), JobStatus::Canceled);
    assert!(reasons(&elsewhere.explain(&second).await.unwrap()).is_empty());
    if let Some((other, _)) = other {
        other.stop().await;
    }
    server.stop().await;
}
