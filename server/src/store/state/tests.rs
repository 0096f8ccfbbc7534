//! What is known of running jobs, against their histories.

use std::fmt::Debug;

use proptest::prelude::*;

use super::{
    fold::{FAR, MOST, MOST_BYTES},
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

/// All there is, in an order.
fn all(state: &OrgState) -> impl Debug + PartialEq + use<> {
    let jobs: BTreeMap<_, _> = state.jobs.iter().map(|(id, behind)| (*id, format!("{behind:?}"))).collect();
    (
        jobs,
        state.since.clone(),
        state.queued.clone(),
        state.extended.clone(),
        state.clean.clone(),
        state.requests.clone(),
        (state.head, state.bytes, state.behind_bytes),
    )
}

proptest! {
    /// What a batch that came to nothing has changed is as it was, whatever it was.
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

/// What is left of a log once so many of its jobs were claimed by a batch.
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

/// However many jobs begin to run in each batch, and however large they are, the base follows the log.
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

/// However many orgs there are whose jobs run, what is known of all of them stays within bounds.
#[test]
fn many_orgs_take_no_more_than_their_budget() {
    let (job, event) = job_claimed();
    let job = Job { stage: Some("x".repeat(1_000).into()), ..job };
    let states = States::new(Duration::from_secs(3_600));
    let orgs: Vec<_> = (0..100).map(|_| OrgId(Uuid::now_v7())).collect();
    let (mut n, mut most) = (0, 0);
    for turn in 0..60 {
        for org in &orgs {
            let (_, mut state) = states.take(*org).unwrap_or_default();
            claim(&mut state, 20, &job, &event, states.fold_after());
            n += 1;
            state.settle();
            states.put(*org, RecordId { n, id: n }, state);
        }
        let bytes = states.bytes();
        assert!(bytes <= states::BUDGET + orgs.len() * 20 * job.bytes(), "{bytes} after {turn} turns");
        most = most.max(bytes);
    }
    assert!(most > states::BUDGET / 2, "it came to it");
}
