//! What is known of running jobs, against their histories.

use std::fmt::Debug;

use proptest::prelude::*;

use super::{
    fold::{FAR, MOST},
    *,
};
use crate::domain::{
    event::JobEvent,
    tests::{job_claimed, replay::any_history},
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
        state.head,
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

/// However many jobs begin to run in each batch, the base follows the log.
#[test]
fn no_more_is_behind_than_may_be() {
    let (job, event) = job_claimed();
    for of_batch in [100, 500] {
        let (mut state, mut seq) = (OrgState::default(), 0);
        while seq < 2 * FAR {
            let mut changes = Changes::default();
            for _ in 0..of_batch {
                seq += 1;
                let job = Job { id: JobId(uuid::Uuid::now_v7()), last_seq: seq, ..job.clone() };
                changes.events.push(Arc::new(JobEvent { seq, job_id: job.id, ..event.clone() }));
                changes.changed.push(job.into());
            }
            let rows = state.follow(&changes, (seq, seq), event.recorded_at, TimeDelta::hours(1));
            let (far, most) = (seq - rows.base.seq, state.since.len());
            assert!(most <= MOST + of_batch && far <= FAR + of_batch as i64, "{most} are behind, by {far} events");
        }
    }
}
