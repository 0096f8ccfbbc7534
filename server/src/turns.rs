//! Fair turns at a shared resource, with a bound on turns at the same time. Of the keys that wait (orgs, or addresses), the
//! one that has used the least time is next.
//!
//! This is start-time fair queueing (Goyal, Vin, Cheng 1996) with measured costs: when a turn ends, its key is charged the
//! time that it took. So ten short reads of one org weigh as much as one long read of another. A newcomer starts at the
//! level of those that wait, so nobody saves up time. A key that is alone gets all turns but one: that one is for others
//! that come while long turns run.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    future::poll_fn,
    hash::Hash,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::oneshot, time::Instant};

/// With this many lines, those that are no longer needed are removed for the first time.
const REMEMBERED: usize = 1_024;

/// A key: the org or address that a turn belongs to.
pub(crate) trait Whose: Copy + Ord + Hash {}

impl<K: Copy + Ord + Hash> Whose for K {}

/// The turns of one kind.
pub(crate) struct Turns<K: Whose> {
    state: Mutex<TurnState<K>>,
    /// The most turns of one key.
    each: usize,
    /// Turns that nobody gets for now, of all and of each key. At least one turn is left.
    withheld: AtomicUsize,
}

struct TurnState<K: Whose> {
    places: usize,
    free: usize,
    /// When a turn last ended.
    ended_at: Option<Instant>,
    /// The time used by the key that got the last turn, as of then. A newcomer starts here.
    level: Duration,
    lines: HashMap<K, Line<K>>,
    /// The keys that wait, ordered by time used and then by arrival.
    waiting: BTreeSet<(Duration, u64, K)>,
    /// Numbers the arrivals.
    came: u64,
    /// With this many lines, those that are no longer needed are removed.
    looks_at: usize,
}

/// The state of a key that waits, has turns, or has used more time than those that wait.
struct Line<K: Whose> {
    had: Duration,
    /// The number of its last arrival.
    came: u64,
    taken: usize,
    waiting: VecDeque<oneshot::Sender<Turn<K>>>,
    /// How many of `waiting` have gone away.
    gone: usize,
}

/// A turn. Dropping it ends it.
pub(crate) struct Turn<K: Whose> {
    turns: Arc<Turns<K>>,
    whose: K,
    since: Instant,
}

impl<K: Whose> Turns<K> {
    /// Allows this many turns at the same time, at least one.
    pub(crate) fn new(places: usize) -> Arc<Self> {
        let state = TurnState::new(places.max(1));
        let each = (state.free - 1).max(1);
        Arc::new(Self { state: Mutex::new(state), each, withheld: AtomicUsize::new(0) })
    }

    /// From now on gives out this many turns fewer than there are, but at least one.
    pub(crate) fn withhold(&self, turns: usize) {
        self.withheld.store(turns, Ordering::Relaxed);
    }

    /// True if a turn has ended within this time.
    pub(crate) fn has_ended_one_within(&self, time: Duration) -> bool {
        self.state().ended_at.is_some_and(|at| at.elapsed() < time)
    }

    /// Waits for a turn.
    pub(crate) async fn take(self: &Arc<Self>, whose: K) -> Turn<K> {
        let (turn, taken) = oneshot::channel();
        self.state().queue(whose, turn);
        let mut waits = Waits { turns: self, whose, taken };
        self.pass_on();
        // `self` has the sender, so the channel stays open.
        (&mut waits.taken).await.expect("a turn comes")
    }

    /// Polls a future, in a turn for each poll. So no more long polls run at the same time than there are turns, and short
    /// polls run in between.
    pub(crate) async fn poll<F: Future>(self: &Arc<Self>, whose: K, future: F) -> F::Output {
        let mut future = pin!(future);
        loop {
            let mut turn = Some(self.take(whose).await);
            let goes_on = poll_fn(|context| match turn.take() {
                Some(_turn) => future.as_mut().poll(context).map(Some),
                // The future was woken: its next poll needs another turn.
                None => Poll::Ready(None),
            });
            if let Some(done) = goes_on.await {
                return done;
            }
        }
    }

    /// Gives the free turns to waiters.
    fn pass_on(self: &Arc<Self>) {
        while let Some((waits, turn)) = self.next() {
            // If the waiter has just gone, this drops the turn, which frees it.
            let _ = waits.send(turn);
        }
    }

    /// The next waiter, with its turn. `None` if no turn is free or no waiting key may have one.
    fn next(self: &Arc<Self>) -> Option<(oneshot::Sender<Turn<K>>, Turn<K>)> {
        let mut state = self.state();
        let (whose, waits) = state.next(self.each, self.withheld.load(Ordering::Relaxed))?;
        Some((waits, Turn { turns: Arc::clone(self), whose, since: Instant::now() }))
    }

    fn state(&self) -> MutexGuard<'_, TurnState<K>> {
        self.state.lock()
    }
}

impl<K: Whose> TurnState<K> {
    fn new(places: usize) -> Self {
        let (lines, waiting) = (HashMap::new(), BTreeSet::new());
        Self {
            places,
            free: places,
            ended_at: None,
            level: Duration::ZERO,
            lines,
            waiting,
            came: 0,
            looks_at: REMEMBERED,
        }
    }

    fn queue(&mut self, whose: K, turn: oneshot::Sender<Turn<K>>) {
        if self.lines.len() >= self.looks_at {
            let level = self.level;
            self.lines.retain(|_, line| !line.is_idle() || line.had > level);
            self.looks_at = REMEMBERED.max(2 * self.lines.len());
        }
        let line = self.lines.entry(whose).or_insert_with(|| Line {
            had: Duration::ZERO,
            came: 0,
            taken: 0,
            waiting: VecDeque::new(),
            gone: 0,
        });
        if line.waiting.is_empty() {
            line.had = line.had.max(self.level);
            self.came += 1;
            line.came = self.came;
            self.waiting.insert((line.had, line.came, whose));
        }
        line.waiting.push_back(turn);
    }

    /// Takes a turn for the waiting key that has used the least time. Leaves `withheld` turns if any are under way.
    fn next(&mut self, each: usize, withheld: usize) -> Option<(K, oneshot::Sender<Turn<K>>)> {
        let each = each.saturating_sub(withheld).max(1);
        while self.free > withheld || self.free == self.places {
            let may = |(.., whose): &&(Duration, u64, K)| self.lines.get(whose).is_none_or(|line| line.taken < each);
            let (had, came, whose) = self.waiting.iter().find(may).copied()?;
            let line = self.lines.get_mut(&whose)?;
            while let Some(waits) = line.waiting.pop_front() {
                if waits.is_closed() {
                    line.gone = line.gone.saturating_sub(1);
                    continue;
                }
                line.taken += 1;
                if line.waiting.is_empty() {
                    self.waiting.remove(&(had, came, whose));
                }
                self.level = self.level.max(had);
                self.free -= 1;
                return Some((whose, waits));
            }
            self.waiting.remove(&(had, came, whose));
            self.forget(whose);
        }
        None
    }

    /// Ends a turn that took this long.
    fn end(&mut self, whose: K, took: Duration) {
        self.free += 1;
        if let Some(line) = self.lines.get_mut(&whose) {
            let was_waiting = self.waiting.remove(&(line.had, line.came, whose));
            line.taken -= 1;
            line.had += took;
            if was_waiting {
                self.waiting.insert((line.had, line.came, whose));
            }
        }
        self.forget(whose);
    }

    /// Counts a waiter that has gone. Removes such waiters once they are half of those of the key.
    fn has_gone(&mut self, whose: K) {
        let Some(line) = self.lines.get_mut(&whose) else { return };
        line.gone += 1;
        if 2 * line.gone >= line.waiting.len() {
            line.waiting.retain(|waits| !waits.is_closed());
            line.gone = 0;
            if line.waiting.is_empty() {
                self.waiting.remove(&(line.had, line.came, whose));
                self.forget(whose);
            }
        }
    }

    /// Removes lines that are no longer needed. While keys wait, the time that an idle key has used counts only if it is
    /// more than the level; when none waits, it does not count.
    fn forget(&mut self, whose: K) {
        if self.waiting.is_empty() {
            self.lines.retain(|_, line| !line.is_idle());
        } else if self.lines.get(&whose).is_some_and(|line| line.is_idle() && line.had <= self.level) {
            self.lines.remove(&whose);
        }
    }
}

impl<K: Whose> Line<K> {
    fn is_idle(&self) -> bool {
        self.taken == 0 && self.waiting.is_empty()
    }
}

impl<K: Whose> Drop for Turn<K> {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut state = self.turns.state();
        state.ended_at = Some(now);
        state.end(self.whose, now - self.since);
        drop(state);
        self.turns.pass_on();
    }
}

/// A waiter. Dropping it before its turn leaves the queue.
struct Waits<'a, K: Whose> {
    turns: &'a Turns<K>,
    whose: K,
    taken: oneshot::Receiver<Turn<K>>,
}

impl<K: Whose> Drop for Waits<'_, K> {
    fn drop(&mut self) {
        if !self.taken.is_terminated() {
            self.taken.close();
            // A turn that was sent already frees itself when dropped.
            if self.taken.try_recv().is_err() {
                self.turns.state().has_gone(self.whose);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(state: &mut TurnState<u32>, n: u32, times: usize) -> Vec<oneshot::Receiver<Turn<u32>>> {
        let wait = |_| {
            let (turn, taken) = oneshot::channel();
            state.queue(n, turn);
            taken
        };
        (0..times).map(wait).collect()
    }

    #[test]
    fn time_is_shared_and_not_the_number_of_turns() {
        let mut state = TurnState::new(1);
        let mut waiting = [queue(&mut state, 0, 1), queue(&mut state, 1, 1)];
        let mut had = [Duration::ZERO; 2];
        for _ in 0..1_100 {
            let (next, _) = state.next(1, 0).unwrap();
            let (n, took) = (next as usize, Duration::from_millis([10, 1][next as usize]));
            had[n] += took;
            waiting[n].extend(queue(&mut state, next, 1));
            state.end(next, took);
        }
        let [slow, fast] = had;
        assert!(slow.abs_diff(fast) <= Duration::from_millis(20), "{slow:?} and {fast:?}");
    }

    #[test]
    fn who_comes_anew_has_saved_nothing_up_and_owes_nothing() {
        let mut state = TurnState::new(1);
        let second = Duration::from_secs(1);
        let _first = queue(&mut state, 0, 4);
        for _ in 0..3 {
            let (next, _) = state.next(1, 0).unwrap();
            state.end(next, second);
        }
        let _anew = queue(&mut state, 1, 4);
        let order: Vec<_> = std::iter::from_fn(|| {
            let (next, _) = state.next(1, 0)?;
            state.end(next, second);
            Some(next)
        })
        .collect();
        assert_eq!(order, [1, 0, 1, 1, 1], "one second more was had by the first when the other came");
        assert!(state.lines.is_empty() && state.waiting.is_empty() && state.free == 1);
    }

    #[tokio::test]
    async fn one_turn_is_kept_from_whoever_has_the_others() {
        let turns = Turns::new(3);
        let taken = [turns.take(0).await, turns.take(0).await];
        let mut third = Box::pin(turns.take(0));
        assert!(at_once(&mut third).await.is_none());
        let other = turns.take(1).await;
        drop(other);
        assert!(at_once(&mut third).await.is_none());
        drop(taken);
        assert!(at_once(&mut third).await.is_some());
    }

    #[tokio::test]
    async fn those_who_go_away_keep_neither_turns_nor_memory() {
        let turns = Turns::new(1);
        let turn = turns.take(0).await;
        for n in 0..1_000 {
            assert!(at_once(&mut Box::pin(turns.take(n % 10))).await.is_none());
        }
        assert!(turns.state().waiting.is_empty());
        assert_eq!(turns.state().lines.len(), 1);
        let mut given = Box::pin(turns.take(1));
        assert!(at_once(&mut given).await.is_none());
        // The waiter has its turn already when it goes.
        drop(turn);
        drop(given);
        drop(turns.take(2).await);
        assert!(turns.state().lines.is_empty());
    }

    #[tokio::test]
    async fn a_future_has_its_turn_only_while_it_goes_on() {
        let turns = Turns::new(1);
        let (done, waits) = oneshot::channel();
        let mut waiting = Box::pin(turns.poll(0, waits));
        assert!(at_once(&mut waiting).await.is_none());
        let other = turns.take(1).await;
        done.send(7).unwrap();
        assert!(at_once(&mut waiting).await.is_none(), "another has the turn");
        drop(other);
        assert_eq!(waiting.await, Ok(7));
        assert!(turns.state().lines.is_empty());
    }

    /// The output of a future, if it is ready at once.
    async fn at_once<T>(future: &mut std::pin::Pin<Box<impl Future<Output = T>>>) -> Option<T> {
        tokio::select! {
            biased;
            done = future => Some(done),
            () = std::future::ready(()) => None,
        }
    }
}
