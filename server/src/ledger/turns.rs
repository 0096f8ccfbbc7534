//! Turns at what all orgs share: so many at a time. Of the orgs that wait, the one that has had the least time of them is next.
//!
//! It is start-time fair queueing (Goyal, Vin, Cheng 1996) with costs that are measured: a turn is charged to its org when it ends, with
//! the time that it took, so that ten short reads of one org weigh as much as a long one of another. Who comes anew begins where
//! those that wait are, and can't have saved any up. An org that is alone has all turns but one: that one is there for whoever comes
//! while the others take their time.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

use crate::domain::id::OrgId;

/// Orgs that are remembered for what they have had before those are looked for that need not be.
const ORGS: usize = 1_024;

/// All turns of one kind.
pub(super) struct Turns {
    state: Mutex<State>,
    per_org: usize,
}

struct State {
    free: usize,
    /// When one ended last.
    ended_at: Option<Instant>,
    /// What the org had had that the last turn went to: who comes anew begins here.
    level: Duration,
    lines: HashMap<OrgId, Line>,
    /// The orgs that wait, by what they have had.
    waiting: BTreeSet<(Duration, OrgId)>,
}

/// An org that waits for turns, or has some, or has had more than those that wait.
#[derive(Default)]
struct Line {
    had: Duration,
    taken: usize,
    waiting: VecDeque<oneshot::Sender<Turn>>,
    /// How many of those that wait have gone.
    gone: usize,
}

/// A turn, until it is dropped.
pub(super) struct Turn {
    turns: Arc<Turns>,
    org: OrgId,
    since: Instant,
}

impl Turns {
    /// So many at a time, at least one.
    pub(super) fn new(places: usize) -> Arc<Self> {
        let state = State::new(places.max(1));
        let per_org = (state.free - 1).max(1);
        Arc::new(Self { state: Mutex::new(state), per_org })
    }

    /// True if a turn has ended lately.
    pub(super) fn has_ended_one_within(&self, time: Duration) -> bool {
        self.state().ended_at.is_some_and(|at| at.elapsed() < time)
    }

    /// Waits for a turn of an org.
    pub(super) async fn take(self: &Arc<Self>, org: OrgId) -> Turn {
        let (turn, taken) = oneshot::channel();
        self.state().queue(org, turn);
        let mut waits = Waits { turns: self, org, taken };
        self.pass_on();
        // The sender is with the turns, which are here.
        (&mut waits.taken).await.expect("a turn comes")
    }

    /// Gives free turns to those that wait.
    fn pass_on(self: &Arc<Self>) {
        while let Some((waits, turn)) = self.next() {
            // From one who has just gone it comes back.
            let _ = waits.send(turn);
        }
    }

    /// Who is next, and its turn; `None` if none is free, or nobody waits who may have it.
    fn next(self: &Arc<Self>) -> Option<(oneshot::Sender<Turn>, Turn)> {
        let mut state = self.state();
        let (org, waits) = state.next(self.per_org)?;
        Some((waits, Turn { turns: Arc::clone(self), org, since: Instant::now() }))
    }

    /// The maps stay whole whatever panics beside them.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn new(free: usize) -> Self {
        Self { free, ended_at: None, level: Duration::ZERO, lines: HashMap::new(), waiting: BTreeSet::new() }
    }

    fn queue(&mut self, org: OrgId, turn: oneshot::Sender<Turn>) {
        if self.lines.len() >= ORGS.max(2 * self.waiting.len()) {
            let level = self.level;
            self.lines.retain(|_, line| !line.is_idle() || line.had > level);
        }
        let line = self.lines.entry(org).or_default();
        if line.waiting.is_empty() {
            line.had = line.had.max(self.level);
            self.waiting.insert((line.had, org));
        }
        line.waiting.push_back(turn);
    }

    /// Takes a turn for the org that has had least.
    fn next(&mut self, per_org: usize) -> Option<(OrgId, oneshot::Sender<Turn>)> {
        while self.free > 0 {
            let may = |(_, org): &&(Duration, OrgId)| self.lines.get(org).is_none_or(|line| line.taken < per_org);
            let (had, org) = self.waiting.iter().find(may).copied()?;
            let Some(line) = self.lines.get_mut(&org) else { return None };
            while let Some(waits) = line.waiting.pop_front() {
                if waits.is_closed() {
                    line.gone = line.gone.saturating_sub(1);
                    continue;
                }
                line.taken += 1;
                if line.waiting.is_empty() {
                    self.waiting.remove(&(had, org));
                }
                self.level = self.level.max(had);
                self.free -= 1;
                return Some((org, waits));
            }
            self.waiting.remove(&(had, org));
            self.forget(org);
        }
        None
    }

    /// Ends a turn that took so long.
    fn end(&mut self, org: OrgId, took: Duration) {
        self.free += 1;
        if let Some(line) = self.lines.get_mut(&org) {
            let was_waiting = self.waiting.remove(&(line.had, org));
            line.taken -= 1;
            line.had += took;
            if was_waiting {
                self.waiting.insert((line.had, org));
            }
        }
        self.forget(org);
    }

    /// Takes out who has gone, once they are half of those that wait.
    fn has_gone(&mut self, org: OrgId) {
        let Some(line) = self.lines.get_mut(&org) else { return };
        line.gone += 1;
        if 2 * line.gone >= line.waiting.len() {
            line.waiting.retain(|waits| !waits.is_closed());
            line.gone = 0;
            if line.waiting.is_empty() {
                self.waiting.remove(&(line.had, org));
                self.forget(org);
            }
        }
    }

    /// Forgets orgs of which nothing need be known: what this one has had counts for as long as others wait who have had less, and what
    /// any has had while somebody waits.
    fn forget(&mut self, org: OrgId) {
        if self.waiting.is_empty() {
            self.lines.retain(|_, line| !line.is_idle());
        } else if self.lines.get(&org).is_some_and(|line| line.is_idle() && line.had <= self.level) {
            self.lines.remove(&org);
        }
    }
}

impl Line {
    fn is_idle(&self) -> bool {
        self.taken == 0 && self.waiting.is_empty()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut state = self.turns.state();
        state.ended_at = Some(now);
        state.end(self.org, now - self.since);
        drop(state);
        self.turns.pass_on();
    }
}

/// Who waits, or goes away.
struct Waits<'a> {
    turns: &'a Turns,
    org: OrgId,
    taken: oneshot::Receiver<Turn>,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        if !self.taken.is_terminated() {
            self.taken.close();
            // If it had come already, it goes back by itself.
            if self.taken.try_recv().is_err() {
                self.turns.state().has_gone(self.org);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    type Waiting = Vec<oneshot::Receiver<Turn>>;

    fn org(n: u128) -> OrgId {
        OrgId(Uuid::from_u128(n))
    }

    fn queue(state: &mut State, n: u128, times: usize) -> Waiting {
        let wait = |_| {
            let (turn, taken) = oneshot::channel();
            state.queue(org(n), turn);
            taken
        };
        (0..times).map(wait).collect()
    }

    #[test]
    fn time_is_shared_and_not_the_number_of_turns() {
        let mut state = State::new(1);
        let mut waiting = [queue(&mut state, 0, 1), queue(&mut state, 1, 1)];
        let mut had = [Duration::ZERO; 2];
        for _ in 0..1_100 {
            let (next, _) = state.next(1).unwrap();
            let n = next.0.as_u128();
            let took = Duration::from_millis([10, 1][n as usize]);
            had[n as usize] += took;
            waiting[n as usize].extend(queue(&mut state, n, 1));
            state.end(next, took);
        }
        let [slow, fast] = had;
        assert!(slow.abs_diff(fast) <= Duration::from_millis(20), "{slow:?} and {fast:?}");
    }

    #[test]
    fn who_comes_anew_has_saved_nothing_up_and_owes_nothing() {
        let mut state = State::new(1);
        let second = Duration::from_secs(1);
        let _first = queue(&mut state, 0, 4);
        for _ in 0..3 {
            let (next, _) = state.next(1).unwrap();
            state.end(next, second);
        }
        let _anew = queue(&mut state, 1, 4);
        let order: Vec<_> = std::iter::from_fn(|| {
            let (next, _) = state.next(1)?;
            state.end(next, second);
            Some(next.0.as_u128())
        })
        .collect();
        assert_eq!(order, [1, 0, 1, 1, 1], "one second more was had by the first when the other came");
        assert!(state.lines.is_empty() && state.waiting.is_empty() && state.free == 1);
    }

    #[tokio::test]
    async fn one_turn_is_kept_from_whoever_has_the_others() {
        let turns = Turns::new(3);
        let taken = [turns.take(org(0)).await, turns.take(org(0)).await];
        let mut third = Box::pin(turns.take(org(0)));
        assert!(at_once(&mut third).await.is_none());
        let other = turns.take(org(1)).await;
        drop(other);
        assert!(at_once(&mut third).await.is_none());
        drop(taken);
        assert!(at_once(&mut third).await.is_some());
    }

    #[tokio::test]
    async fn those_who_go_away_keep_neither_turns_nor_memory() {
        let turns = Turns::new(1);
        let turn = turns.take(org(0)).await;
        for n in 0..1_000 {
            assert!(at_once(&mut Box::pin(turns.take(org(n % 10)))).await.is_none());
        }
        assert!(turns.state().waiting.is_empty());
        assert_eq!(turns.state().lines.len(), 1);
        let mut given = Box::pin(turns.take(org(1)));
        assert!(at_once(&mut given).await.is_none());
        // Its turn has come when it goes.
        drop(turn);
        drop(given);
        drop(turns.take(org(2)).await);
        assert!(turns.state().lines.is_empty());
    }

    /// What a future comes to without waiting.
    async fn at_once<T>(future: &mut std::pin::Pin<Box<impl Future<Output = T>>>) -> Option<T> {
        tokio::select! {
            biased;
            done = future => Some(done),
            () = std::future::ready(()) => None,
        }
    }
}
