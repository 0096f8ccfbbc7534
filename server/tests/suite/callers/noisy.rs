//! An org that calls ten times as often as it may does not slow other orgs down.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use jobledger_client::{Client, Error, NewJob};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};
use uuid::Uuid;

use crate::support::harness::{Database, PATIENCE, on_both_databases, short_or_long};
use crate::support::program::Program;

on_both_databases! {
    an_org_at_ten_times_its_rate_does_not_slow_another_one_down,
}

/// Latencies below this are noise.
const FLOOR: Duration = Duration::from_millis(10);

/// Creates jobs at a rate without waiting. Returns how long each took from when it was due, and how many were refused.
async fn create(client: Client, rate: u32, time: Duration) -> (Vec<Duration>, usize) {
    let (took, refused) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
    let mut due = interval(Duration::from_secs(1) / rate);
    due.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut calls, began) = (JoinSet::new(), Instant::now());
    while began.elapsed() < time {
        let since = due.tick().await.into_std();
        let (mut service, took, refused) = (client.raw(), Arc::clone(&took), Arc::clone(&refused));
        calls.spawn(async move {
            let request: jobledger_client::proto::CreateJobRequest = NewJob::new("t").into();
            match service.create_job(request).await.map_err(Error::from) {
                Ok(_) => took.lock().unwrap().push(since.elapsed()),
                Err(Error::Exhausted { reason, retry_after, .. }) => {
                    assert_eq!(reason, "RATE_LIMITED");
                    assert!(retry_after.is_some(), "it is told when to come back");
                    refused.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => panic!("{error:?}"),
            }
        });
        while let Some(ended) = calls.try_join_next() {
            ended.expect("nothing else is answered");
        }
    }
    timeout(PATIENCE, calls.join_all()).await.expect("all are answered");
    let took = std::mem::take(&mut *took.lock().unwrap());
    (took, refused.load(Ordering::Relaxed))
}

fn p99(mut took: Vec<Duration>) -> Duration {
    took.sort();
    took[took.len() * 99 / 100]
}

fn median(mut took: Vec<Duration>) -> Duration {
    took.sort();
    took[took.len() / 2]
}

async fn an_org_at_ten_times_its_rate_does_not_slow_another_one_down(database: Database) {
    let share = short_or_long(50, 100);
    let (rounds, time) = (7, Duration::from_secs(short_or_long(1, 10)));
    let program = Program::start_with(&database, &["--log", "error", "--max-rate-per-org", &share.to_string()]);
    let (quiet, noisy) = (program.client_of(Uuid::new_v4()), program.client_of(Uuid::new_v4()));
    create(quiet.clone(), share * 4 / 5, time).await;
    let (mut alone, mut beside, mut let_in, mut refused) = (Vec::new(), Vec::new(), 0, 0);
    // Measured in turns, so that both see the machine in the same state.
    for _ in 0..rounds {
        alone.push(p99(create(quiet.clone(), share * 4 / 5, time).await.0));
        // Uses up what the noisy org has saved up meanwhile. It may use that at once, and would decide the p99 with it.
        let (saved, too_many) = create(noisy.clone(), share * 10, time / 4).await;
        let_in += saved.len();
        refused += too_many;
        let (of_quiet, of_noisy) =
            tokio::join!(create(quiet.clone(), share * 4 / 5, time), create(noisy.clone(), share * 10, time));
        assert_eq!(of_quiet.1, 0, "who keeps to its rate is never refused");
        beside.push(p99(of_quiet.0));
        let_in += of_noisy.0.len();
        refused += of_noisy.1;
    }
    let most = ((rounds * (time + time / 4).as_millis() as usize).div_ceil(1_000) + rounds) * share as usize;
    assert!(let_in <= most, "{let_in} calls of the noisy org were let in, of {most} that may be");
    assert!(refused > let_in * 4, "{refused} were refused");
    // The median of the rounds, because a disk that stalls for a moment does so in any round.
    let (alone, beside) = (median(alone), median(beside));
    println!(
        "p99 is {alone:?} alone and {beside:?} beside the noisy org, of which {let_in} are let in and {refused} refused"
    );
    assert!(beside <= 2 * alone.max(FLOOR), "{beside:?} beside it, {alone:?} alone");
    assert!(program.end_by("TERM").success());
}
