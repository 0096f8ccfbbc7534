//! Compares states with random histories of jobs.

use std::{collections::HashSet, fmt::Debug};

use proptest::prelude::*;

use super::{
    fold::{FAR, MOST, MOST_BYTES, MOST_EXTENDED_BYTES},
    *,
};
use crate::domain::{
    event::JobEvent,
    id::OrgId,
    tests::{job_claimed, replay::any_history},
};
use crate::store::{
    RecordId,
    states::{self, States},
};

/// Everything in a state, in a fixed order.
fn all(state: &OrgState) -> impl Debug + PartialEq + use<> {
    let jobs: BTreeMap<_, _> = state.jobs.iter().map(|(id, behind)| (*id, format!("{behind:?}"))).collect();
    (
        jobs,
        state.since.clone(),
        state.queued.clone(),
        state.extended.clone(),
        state.clean.clone(),
        state.requests.clone(),
        (state.head, state.bytes, state.since_bytes, state.extended_bytes),
    )
}

proptest! {
    /// Reverting a batch restores the state, whatever the batch changed.
    #[test]
    fn a_batch_that_came_to_nothing_leaves_no_trace(history in any_history(), seconds in 0i64..20) {
        let mut state = OrgState::default();
        for (job, events) in history.iter().skip(1).filter(|(_, events)| !events.is_empty()) {
            let changes = Changes {
                changed: vec![job.clone().into()],
                events: events.iter().cloned().map(Arc::new).collect(),
                ..Changes::default()
            };
            let now = job.last_recorded_at + TimeDelta::seconds(seconds);
            let before = all(&state);
            state.follow(&changes, (job.last_seq, 1), now, TimeDelta::seconds(10));
            let after = all(&state);
            state.revert();
            prop_assert_eq!(all(&state), before);
            state.follow(&changes, (job.last_seq, 1), now, TimeDelta::seconds(10));
            prop_assert_eq!(all(&state), after);
            prop_assert_eq!(state.get(job.id).is_some(), state.len() == 1);
        }
    }
}

/// Applies a batch that claims this many new jobs. Returns the base after it.
fn claim(state: &mut OrgState, jobs: usize, like: &Job, event: &JobEvent, fold_after: TimeDelta) -> Base {
    let mut changes = Changes::default();
    for seq in state.head + 1..=state.head + jobs as i64 {
        let job = Job { id: JobId(Uuid::now_v7()), last_seq: seq, ..like.clone() };
        changes.events.push(Arc::new(JobEvent { seq, job_id: job.id, ..event.clone() }));
        changes.changed.push(job.into());
    }
    let head = state.head + jobs as i64;
    state.follow(&changes, (head, head), event.recorded_at, fold_after).base
}

/// Applies a batch of heartbeats of running jobs. Returns the base after it.
fn keep(state: &mut OrgState, of: &[JobId], event: &JobEvent, fold_after: TimeDelta) -> Base {
    let extended = |id: &JobId| Changed { job: state.get(*id).unwrap().clone(), differs: Differs::InLease };
    let changes = Changes { changed: of.iter().map(extended).collect(), ..Changes::default() };
    let head = state.head;
    state.follow(&changes, (head, head), event.recorded_at, fold_after).base
}

/// However many jobs start in each batch, and however large they are, the base follows the log.
#[test]
fn no_more_is_behind_than_may_be() {
    let (job, event) = job_claimed();
    let large = Job { stage: Some("x".repeat(10_000).into()), ..job.clone() };
    for (job, of_batch) in [(&job, 100), (&job, 500), (&large, 100), (&large, 500)] {
        let mut state = OrgState::default();
        while state.head < 2 * FAR {
            let base = claim(&mut state, of_batch, job, &event, TimeDelta::hours(1));
            let (far, most, bytes) = (state.head - base.seq, state.since.len(), state.behind_bytes());
            assert!(most <= MOST + of_batch && far <= FAR + of_batch as i64, "{most} are behind, by {far} events");
            assert!(bytes <= MOST_BYTES + of_batch * job.bytes(), "{bytes} bytes are behind");
        }
    }
}

/// Extensions have a bound of their own, and take nothing from what events may leave behind.
#[test]
fn leases_that_are_kept_leave_others_their_room() {
    let (job, event) = job_claimed();
    let large = Job { stage: Some("x".repeat(4_000).into()), ..job };
    let mut state = OrgState::default();
    for _ in 0..30 {
        claim(&mut state, 500, &large, &event, TimeDelta::zero());
        let running: Vec<_> = state.jobs.keys().copied().collect();
        keep(&mut state, &running, &event, TimeDelta::hours(1));
        let bytes = state.extended_bytes;
        assert!(bytes <= MOST_EXTENDED_BYTES + running.len() * large.bytes(), "{bytes} are behind");
    }
    assert!(state.extended_bytes > MOST_EXTENDED_BYTES / 2, "it came to it");
    let before = state.since.len();
    claim(&mut state, 500, &large, &event, TimeDelta::hours(1));
    claim(&mut state, 1, &large, &event, TimeDelta::hours(1));
    assert_eq!(state.since.len(), before + 501, "nobody is in need of room");
}

/// With any number of orgs, all states together stay within the budget. Orgs that use little don't pay for those that use much.
#[test]
fn many_orgs_take_no_more_than_their_budget() {
    let (job, event) = job_claimed();
    let job = Job { stage: Some("x".repeat(1_000).into()), ..job };
    let states = States::new(Duration::from_secs(3_600));
    let orgs: Vec<_> = (0..101).map(|_| OrgId(Uuid::now_v7())).collect();
    let (little, orgs) = orgs.split_first().unwrap();
    let mut n = 0;
    let mut turn = |org: OrgId, jobs: usize| {
        let (_, mut state) = states.take(org).unwrap_or_default();
        let fold_after = states.fold_after(&state);
        claim(&mut state, jobs, &job, &event, fold_after);
        n += 1;
        state.settle();
        let behind = state.since.len();
        states.put(org, RecordId { n, id: n }, state);
        behind
    };
    let (mut most, mut pressed) = (0, HashSet::new());
    for round in 1..=60 {
        assert_eq!(turn(*little, 1), round, "it has little");
        for org in orgs {
            turn(*org, 20);
        }
        let bytes = states.bytes();
        assert!(bytes <= states::BUDGET + orgs.len() * 20 * job.bytes(), "{bytes} after {round} rounds");
        most = most.max(bytes);
        pressed.extend(states.stale(event.recorded_at, usize::MAX));
    }
    assert!(most > states::BUDGET / 2, "it came to it");
    assert!(!pressed.is_empty() && !pressed.contains(little), "{pressed:?}");
}
