//! The lanes: one queue of commands for each org, taken in turn.
//!
//! An org with waiting commands is ready. An org whose batch is under way is busy, and never ready at the same time: this makes
//! its log serial. Queues are bounded in commands and in bytes, over all lanes together. Vital commands, which keep running
//! jobs alive or end them, have a quarter more room and are taken first.

use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

use super::{
    LedgerError, Limits,
    command::Author,
    disk_space::Space,
    lane::MANY,
    lane_queues::LaneQueues,
    pacing::Worked,
    pending::{Begun, OrgBatch, Pending, Turn},
    submission::{Receiver, ReplyTo, Submission},
};
use crate::{
    domain::{id::OrgId, transition::GiveBack},
    shares::with_reserve,
    store::Capacity,
};

/// One lane may have one part in this many of the bytes of all lanes.
const ORG_SHARE: usize = 4;

/// The lanes of all orgs.
pub(super) struct Lanes {
    limits: Limits,
    state: Mutex<LaneQueues>,
    work: Notify,
    /// Free space of the database's disk.
    space: Space,
}

impl Lanes {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, state: Mutex::default(), work: Notify::new(), space: Space::default() }
    }

    pub(super) fn space(&self) -> &Space {
        &self.space
    }

    /// Appends a command to its org's lane. `of` says which kind it is: a variant of [`Submission`].
    pub(super) fn enqueue_one<C, R>(
        &self,
        by: Author,
        of: impl FnOnce(C, ReplyTo<R>) -> Submission,
        command: C,
    ) -> Result<Receiver<R>, LedgerError> {
        let (reply, receiver) = ReplyTo::channel();
        let pending = Pending::new(of(command, reply), by.actor);
        self.space.refuse(&pending.command)?;
        let state = self.admit(by.org, 1, pending.weight, pending.command.is_vital())?;
        self.push(state, by.org, [pending]);
        Ok(receiver)
    }

    /// Appends commands of one kind to their org's lane: all of them, or none.
    pub(super) fn enqueue<C, R>(
        &self,
        by: &Author,
        of: impl Fn(C, ReplyTo<R>) -> Submission,
        commands: Vec<C>,
    ) -> Result<Vec<Receiver<R>>, LedgerError> {
        let (mut pending, mut receivers) = (Vec::with_capacity(commands.len()), Vec::with_capacity(commands.len()));
        for command in commands {
            let (reply, receiver) = ReplyTo::channel();
            let command = of(command, reply);
            self.space.refuse(&command)?;
            pending.push(Pending::new(command, by.actor.clone()));
            receivers.push(receiver);
        }
        let weight: usize = pending.iter().map(|pending| pending.weight).sum();
        let is_vital = pending.iter().all(|pending| pending.command.is_vital());
        let state = self.admit(by.org, pending.len(), weight, is_vital)?;
        self.push(state, by.org, pending);
        Ok(receivers)
    }

    /// Locks the state if it has room for this many commands of this many bytes.
    fn admit(
        &self,
        org: OrgId,
        commands: usize,
        weight: usize,
        is_vital: bool,
    ) -> Result<MutexGuard<'_, LaneQueues>, LedgerError> {
        let most = |limit| if is_vital { with_reserve(limit) } else { limit };
        let state = self.state();
        if state.is_closed {
            return Err(LedgerError::Draining);
        }
        let (waiting, bytes) = state.load.asked();
        let is_full = waiting + commands > most(self.limits.queued_commands);
        if is_full || bytes + weight > most(self.limits.queued_bytes) {
            return Err(state.refusal(Instant::now()));
        }
        if let Some(lane) = state.lanes.get(&org) {
            let is_full = lane.waiting() + commands > most(self.limits.queued_commands_per_org);
            // An empty lane accepts a command that exceeds the bound by itself.
            if is_full || lane.bytes > 0 && lane.bytes + weight > most(self.limits.queued_bytes / ORG_SHARE) {
                return Err(state.refusal(Instant::now()));
            }
        }
        Ok(state)
    }

    /// Gives jobs back that were claimed and not delivered. This follows from accepted commands, so bounds do not apply, and it
    /// is accepted while the lanes drain.
    pub(super) fn give_back(&self, org: OrgId, jobs: impl IntoIterator<Item = GiveBack>) {
        let pending = |job| Pending::new(Submission::GiveBack(job), None);
        self.push(self.state(), org, jobs.into_iter().map(pending));
    }

    fn push(&self, mut guard: MutexGuard<'_, LaneQueues>, org: OrgId, pending: impl IntoIterator<Item = Pending>) {
        let state = &mut *guard;
        if state.load.commands == 0 {
            state.moved_at = Some(Instant::now());
        }
        let mut pending = pending.into_iter().peekable();
        if pending.peek().is_none() {
            return;
        }
        let lane = state.lanes.entry(org).or_default();
        let before = lane.waiting();
        let is_first = before == 0 && !lane.is_busy;
        for pending in pending {
            state.load.add(&pending);
            lane.bytes += pending.weight;
            lane.loners += usize::from(pending.command.goes_alone());
            lane.queue(pending.command.is_vital()).push_back(pending);
        }
        let becomes_alone = !lane.is_busy && before < MANY && lane.waiting() >= MANY;
        if is_first {
            state.ready.push_back(org);
        }
        drop(guard);
        if is_first || becomes_alone {
            self.work.notify_one();
        }
    }

    /// How long commands have been waiting while no turn ended; zero if none waits.
    pub(super) fn stalled_for(&self) -> Duration {
        let state = self.state();
        let moved_at = state.moved_at.filter(|_| state.load.commands > 0);
        moved_at.map_or(Duration::ZERO, |moved_at| moved_at.elapsed())
    }

    /// True while the database does not answer: a lack of room is then not the callers' fault.
    pub(super) fn is_stalled(&self) -> bool {
        self.state().is_out(Instant::now())
    }

    /// Refuses new commands. Waiting commands are still taken.
    pub(super) fn close(&self) {
        self.state().is_closed = true;
        self.work.notify_waiters();
        self.work.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state().is_closed
    }

    /// Waits for orgs with commands and takes their batches; `None` once closed and empty.
    pub(super) async fn next_turn(&self, capacity: Capacity) -> Option<Begun> {
        loop {
            let patience;
            {
                let mut state = self.state();
                // One reading: what ends while a turn is looked for is over at the next look, which then follows at once.
                let now = Instant::now();
                let begun = state.take_turn(capacity, &self.limits, now);
                if !begun.turn.is_empty() {
                    let has_more = !state.ready.is_empty();
                    drop(state);
                    if has_more {
                        self.work.notify_one();
                    }
                    return Some(begun);
                }
                patience = state.patience(now);
                if state.is_closed && state.lanes.is_empty() {
                    drop(state);
                    // Wakes the other writers, which may be waiting for work that will not come.
                    self.work.notify_one();
                    return None;
                }
            }
            match patience {
                Some(until) => _ = timeout_at(until, self.work.notified()).await,
                None => self.work.notified().await,
            }
        }
    }

    /// Adds commands that arrived since an org's batch was taken, as far as the batch has room.
    pub(super) fn top_up(&self, batch: &mut OrgBatch, capacity: Capacity) {
        let mut state = self.state();
        let mut room = state.room(Some(batch.org), capacity, &self.limits, Instant::now());
        batch.commands.iter().for_each(|taken| room.take(batch.org, taken));
        let most = batch.most.map(|most| most.saturating_sub(batch.commands.len()));
        state.take(batch.org, most, &mut room, &mut batch.commands, &self.limits);
    }

    /// Puts back the commands of orgs that a turn left out, in their old order. These orgs go alone, before all others.
    pub(super) fn put_back(&self, left_out: Turn) {
        if left_out.is_empty() {
            return;
        }
        let mut state = self.state();
        let state = &mut *state;
        for OrgBatch { org, commands, .. } in left_out {
            let lane = state.lanes.entry(org).or_default();
            (lane.is_busy, lane.goes_alone) = (false, true);
            for pending in commands.into_iter().rev() {
                state.load.add(&pending);
                lane.bytes += pending.weight;
                lane.loners += usize::from(pending.command.goes_alone());
                lane.queue(pending.command.is_vital()).push_front(pending);
            }
            state.ready.push_front(org);
        }
        self.work.notify_one();
    }

    /// Records how much work a turn was before its commit.
    pub(super) fn worked(&self, turn: &[Worked], took: Duration) {
        self.state().rests.worked(turn, took, Instant::now());
    }

    /// Ends a turn of these orgs. Orgs with more commands queue up again. `is_outage`: the database did not answer, or took
    /// longer than [`OUTAGE`].
    pub(super) fn finish_turn(&self, orgs: &[OrgId], (began, shared): (Instant, Option<Instant>), is_outage: bool) {
        let mut state = self.state();
        if let Some(n) = state.shared.iter().position(|began| Some(*began) == shared) {
            state.shared.swap_remove(n);
        }
        let now = Instant::now();
        state.moved_at = Some(now);
        *if is_outage { &mut state.outage_at } else { &mut state.answered_at } = Some(now);
        state.rests.ended(orgs, now - began, now);
        for org in orgs {
            state.release(*org);
        }
        let wake = !state.ready.is_empty() || state.is_closed;
        drop(state);
        if wake {
            self.work.notify_one();
        }
    }

    fn state(&self) -> MutexGuard<'_, LaneQueues> {
        self.state.lock()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::{super::command::Claim, *};

    #[tokio::test]
    async fn an_org_whose_rest_ends_while_a_turn_is_looked_for_has_its_turn() {
        let [resting, gone] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
        let limits =
            Limits { queued_commands: usize::MAX / 2, queued_commands_per_org: usize::MAX / 2, ..Limits::default() };
        let lanes = Lanes::new(limits);
        let claim = || Claim {
            worker: "w".into(),
            types: [].into(),
            max_jobs: 1,
            lease: Duration::from_secs(1),
            request: None,
        };
        let submit = |org, claims: usize| {
            let claims = (0..claims).map(|_| Box::new(claim())).collect();
            lanes.enqueue(&Author { org, actor: None }, Submission::Claim, claims).expect("there is room")
        };
        // To drop these takes longer than the rest.
        drop(submit(gone, 100_000));
        let _caller = submit(resting, 1);
        lanes.work.notified().await;
        let now = Instant::now();
        for org in [gone, resting] {
            lanes.state().rests.ended(&[org], Duration::from_millis(10), now);
        }
        assert!(lanes.state().rests.until(&resting, now).is_some() && lanes.state().rests.until(&gone, now).is_none());
        let capacity = Capacity { transactions: 1, orgs: 64 };
        let begun = tokio::time::timeout(Duration::from_secs(20), lanes.next_turn(capacity)).await;
        let begun = begun.expect("it waits for nobody").expect("the lanes are open");
        assert_eq!(begun.turn.iter().map(|batch| batch.org).collect::<Vec<_>>(), [resting]);
    }
}
