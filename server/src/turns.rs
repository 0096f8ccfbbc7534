//! Turns at what callers have in common: so many at a time. Of those that wait (orgs, or addresses), the one that has had the least time of
//! them is next.
//!
//! It is start-time fair queueing (Goyal, Vin, Cheng 1996) with costs that are measured: a turn is charged when it ends, with
//! the time that it took, so that ten short reads of one org weigh as much as a long one of another. Who comes anew begins where
//! those that wait are, and can't have saved any up. Who is alone has all turns but one: that one is there for whoever comes
//! while the others take their time.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    future::poll_fn,
    hash::Hash,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

/// Those that are remembered for what they have had before those are looked for that need not be.
const REMEMBERED: usize = 1_024;

/// Whose turn it is.
pub(crate) trait Whose: Copy + Ord + Hash {}

impl<K: Copy + Ord + Hash> Whose for K {}

/// All turns of one kind.
pub(crate) struct Turns<K: Whose> {
    state: Mutex<State<K>>,
    /// How many one may have.
    each: usize,
}

struct State<K: Whose> {
    free: usize,
    /// When one ended last.
    ended_at: Option<Instant>,
    /// What the one had had that the last turn went to: who comes anew begins here.
    level: Duration,
    lines: HashMap<K, Line<K>>,
    /// Those that wait, by what they have had and when they came.
    waiting: BTreeSet<(Duration, u64, K)>,
    /// How many have come.
    came: u64,
    /// With so many lines those are looked for that need not be there.
    looks_at: usize,
}

/// One that waits for turns, or has some, or has had more than those that wait.
struct Line<K: Whose> {
    had: Duration,
    /// When it came to wait last.
    came: u64,
    taken: usize,
    waiting: VecDeque<oneshot::Sender<Turn<K>>>,
    /// How many of those that wait have gone.
    gone: usize,
}

/// A turn, until it is dropped.
pub(crate) struct Turn<K: Whose> {
    turns: Arc<Turns<K>>,
    whose: K,
    since: Instant,
}

impl<K: Whose> Turns<K> {
    /// So many at a time, at least one.
    pub(crate) fn new(places: usize) -> Arc<Self> {
        let state = State::new(places.max(1));
        let each = (state.free - 1).max(1);
        Arc::new(Self { state: Mutex::new(state), each })
    }

    /// True if a turn has ended lately.
    pub(crate) fn has_ended_one_within(&self, time: Duration) -> bool {
        self.state().ended_at.is_some_and(|at| at.elapsed() < time)
    }

    /// Waits for a turn of somebody.
    pub(crate) async fn take(self: &Arc<Self>, whose: K) -> Turn<K> {
        let (turn, taken) = oneshot::channel();
        self.state().queue(whose, turn);
        let mut waits = Waits { turns: self, whose, taken };
        self.pass_on();
        // The sender is with the turns, which are here.
        (&mut waits.taken).await.expect("a turn comes")
    }

    /// Goes on with a future in turns: of those that take long whenever they go on, no more do at a time than there are turns, and what is
    /// short goes on in between.
    pub(crate) async fn poll<F: Future>(self: &Arc<Self>, whose: K, future: F) -> F::Output {
        let mut future = pin!(future);
        loop {
            let mut turn = Some(self.take(whose).await);
            let goes_on = poll_fn(|context| match turn.take() {
                Some(_turn) => future.as_mut().poll(context).map(Some),
                // Woken, it waits for another turn.
                None => Poll::Ready(None),
            });
            if let Some(done) = goes_on.await {
                return done;
            }
        }
    }

    /// Gives free turns to those that wait.
    fn pass_on(self: &Arc<Self>) {
        while let Some((waits, turn)) = self.next() {
            // From one who has just gone it comes back.
            let _ = waits.send(turn);
        }
    }

    /// Who is next, and its turn; `None` if none is free, or nobody waits who may have it.
    fn next(self: &Arc<Self>) -> Option<(oneshot::Sender<Turn<K>>, Turn<K>)> {
        let mut state = self.state();
        let (whose, waits) = state.next(self.each)?;
        Some((waits, Turn { turns: Arc::clone(self), whose, since: Instant::now() }))
    }

    /// The maps stay whole whatever panics beside them.
    fn state(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Whose> State<K> {
    fn new(free: usize) -> Self {
        let (lines, waiting) = (HashMap::new(), BTreeSet::new());
        Self { free, ended_at: None, level: Duration::ZERO, lines, waiting, came: 0, looks_at: REMEMBERED }
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

    /// Takes a turn for the one that has had least.
    fn next(&mut self, each: usize) -> Option<(K, oneshot::Sender<Turn<K>>)> {
        while self.free > 0 {
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

    /// Ends a turn that took so long.
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

    /// Takes out who has gone, once they are half of those that wait.
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

    /// Forgets those of which nothing need be known: what this one has had counts for as long as others wait who have had less, and what
    /// any has had while somebody waits.
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

/// Who waits, or goes away.
struct Waits<'a, K: Whose> {
    turns: &'a Turns<K>,
    whose: K,
    taken: oneshot::Receiver<Turn<K>>,
}

impl<K: Whose> Drop for Waits<'_, K> {
    fn drop(&mut self) {
        if !self.taken.is_terminated() {
            self.taken.close();
            // If it had come already, it goes back by itself.
            if self.taken.try_recv().is_err() {
                self.turns.state().has_gone(self.whose);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(state: &mut State<u32>, n: u32, times: usize) -> Vec<oneshot::Receiver<Turn<u32>>> {
        let wait = |_| {
            let (turn, taken) = oneshot::channel();
            state.queue(n, turn);
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
        // Its turn has come when it goes.
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

    /// What a future comes to without waiting.
    async fn at_once<T>(future: &mut std::pin::Pin<Box<impl Future<Output = T>>>) -> Option<T> {
        tokio::select! {
            biased;
            done = future => Some(done),
            () = std::future::ready(()) => None,
        }
    }
}
