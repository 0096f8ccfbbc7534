//! Tasks that are ready to go on, in fair order.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    hash::Hash,
    time::Duration,
};

/// With this many lines, those that are no longer needed are removed for the first time.
const REMEMBERED: usize = 1_024;

/// The tasks of one line, by connection.
pub(super) type OfOne<T> = FairQueue<u64, VecDeque<T>>;

/// Lines of tasks, by key. The line that has used the least processor time is next: start-time fair queueing (Goyal, Vin,
/// Cheng 1996) with measured costs. A newcomer starts at the level of those that wait, so nobody saves up time. The level rises with
/// the time that is used, so that ever new ones don't pass over those that have begun.
pub(super) struct FairQueue<K, L> {
    lines: HashMap<K, Line<L>>,
    /// The keys whose tasks wait, ordered by time used and then by arrival.
    waiting: BTreeSet<(Duration, u64, K)>,
    /// The time that those who wait have used, about. A newcomer starts here.
    level: Duration,
    /// Numbers the arrivals.
    came: u64,
    /// With this many lines, those that are no longer needed are removed.
    looks_at: usize,
}

struct Line<L> {
    had: Duration,
    /// The number of its last arrival.
    came: u64,
    /// Its tasks that were taken and not charged.
    running: u32,
    tasks: L,
}

impl<K: Copy + Ord + Hash, L: Default> FairQueue<K, L> {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Adds a task to the line of a key.
    fn add(&mut self, key: K, add: impl FnOnce(&mut L)) {
        let level = self.level;
        let line = self.lines.entry(key).or_insert_with(|| Line::new(level));
        // In `waiting` already if it has tasks.
        if !self.waiting.contains(&(line.had, line.came, key)) {
            if line.running == 0 {
                line.had = line.had.max(level);
            }
            self.came += 1;
            line.came = self.came;
            self.waiting.insert((line.had, line.came, key));
        }
        add(&mut line.tasks);
    }

    /// Takes a task from the next line. `take` also says whether the line is empty then.
    fn take<T>(&mut self, take: impl FnOnce(&mut L) -> (Option<T>, bool)) -> Option<T> {
        let next = self.waiting.first().copied()?;
        let (had, _, key) = next;
        let line = self.lines.get_mut(&key)?;
        line.running += 1;
        let (task, is_empty) = take(&mut line.tasks);
        if is_empty {
            self.waiting.remove(&next);
        }
        self.level = self.level.max(had);
        task
    }

    /// Counts processor time that a task of this key has taken, once for each that was taken from its line. Returns its line.
    fn charge_line(&mut self, key: K, took: Duration) -> &mut L {
        // The share of each that waits.
        self.level += took / (self.waiting.len() as u32 + 1);
        let level = self.level;
        if self.lines.len() >= self.looks_at.max(REMEMBERED) {
            let waiting = &self.waiting;
            // Where most owe time, as many newcomers did come: then no debt is remembered.
            let all_owe = self.lines.values().filter(|line| line.had > level).count() > REMEMBERED / 2;
            let owes = |line: &Line<L>| line.running > 0 || !all_owe && line.had > level;
            self.lines.retain(|key, line| owes(line) || waiting.contains(&(line.had, line.came, *key)));
            self.looks_at = 2 * self.lines.len();
        }
        let line = self.lines.entry(key).or_insert_with(|| Line::new(level));
        let was_waiting = self.waiting.remove(&(line.had, line.came, key));
        line.running = line.running.saturating_sub(1);
        line.had += took;
        if was_waiting {
            self.waiting.insert((line.had, line.came, key));
        } else if self.waiting.is_empty() {
            // Nobody waited for it: nobody is owed anything.
            self.level = self.level.max(line.had);
        }
        &mut line.tasks
    }
}

impl<T> OfOne<T> {
    pub(super) fn push(&mut self, connection: u64, task: T) {
        self.add(connection, |tasks| tasks.push_back(task));
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        self.take(|tasks| (tasks.pop_front(), tasks.is_empty()))
    }
}

impl<K: Copy + Ord + Hash, T> FairQueue<K, OfOne<T>> {
    pub(super) fn push(&mut self, key: K, connection: u64, task: T) {
        self.add(key, |line| line.push(connection, task));
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        self.take(|line| (line.pop(), line.is_empty()))
    }

    /// Counts processor time that a task has taken.
    pub(super) fn charge(&mut self, key: K, connection: u64, took: Duration) {
        self.charge_line(key, took).charge_line(connection, took);
    }
}

impl<K, L> Default for FairQueue<K, L> {
    fn default() -> Self {
        let (lines, waiting) = (HashMap::new(), BTreeSet::new());
        Self { lines, waiting, level: Duration::ZERO, came: 0, looks_at: 0 }
    }
}

impl<L: Default> Line<L> {
    fn new(had: Duration) -> Self {
        Self { had, came: 0, running: 0, tasks: L::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Queue = FairQueue<usize, OfOne<usize>>;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn processor_time_is_shared_and_not_the_number_of_tasks() {
        let mut queue = Queue::default();
        // The first has a hundred short tasks ready at any time, the second one long task.
        (0..100).for_each(|_| queue.push(0, 0, 0));
        queue.push(1, 1, 1);
        let mut had = [Duration::ZERO; 2];
        for _ in 0..1_100 {
            let n = queue.pop().unwrap();
            queue.push(n, n as u64, n);
            let took = [MS, 10 * MS][n];
            queue.charge(n, n as u64, took);
            had[n] += took;
        }
        let [short, long] = had;
        assert!(short.abs_diff(long) <= 20 * MS, "{short:?} and {long:?}");
    }

    #[test]
    fn who_comes_anew_is_next_and_has_saved_nothing_up() {
        let mut queue = Queue::default();
        (0..10).for_each(|n| queue.push(0, 0, n));
        for _ in 0..3 {
            assert!(queue.pop().is_some());
            queue.charge(0, 0, MS);
        }
        (100..104).for_each(|n| queue.push(1, 1, n));
        let order: Vec<_> = std::iter::from_fn(|| {
            let n = queue.pop()?;
            let key = usize::from(n >= 100);
            queue.charge(key, key as u64, MS);
            Some(n)
        })
        .collect();
        assert_eq!(order, [100, 3, 101, 4, 102, 5, 103, 6, 7, 8, 9]);
        assert!(queue.is_empty());
    }

    #[test]
    fn ever_new_ones_do_not_pass_over_those_that_have_begun() {
        let mut queue = Queue::default();
        queue.push(0, 0, 0);
        let mut steps = 0;
        for n in 1..1_000 {
            queue.push(n, 0, n);
            queue.push(n + 1_000, 0, n + 1_000);
            let key = queue.pop().unwrap();
            queue.charge(key, 0, MS);
            if key == 0 {
                steps += 1;
                queue.push(0, 0, 0);
            }
        }
        assert!(steps >= 3, "{steps} steps");
    }

    #[test]
    fn connections_of_one_key_share_its_time() {
        let mut queue = Queue::default();
        (0..9).for_each(|_| queue.push(0, 1, 1));
        let mut had = [Duration::ZERO; 3];
        queue.push(0, 2, 2);
        for _ in 0..1_000 {
            let n = queue.pop().unwrap();
            queue.push(0, n as u64, n);
            let took = [MS, 10 * MS, MS][n];
            queue.charge(0, n as u64, took);
            had[n] += took;
        }
        assert!(had[1].abs_diff(had[2]) <= 20 * MS, "{had:?}");
    }

    #[test]
    fn those_who_are_idle_are_forgotten() {
        let mut queue = Queue::default();
        queue.push(0, 0, 0);
        for n in 1..100_000 {
            queue.push(n, 0, n);
            let key = queue.pop().unwrap();
            queue.charge(key, 0, MS);
        }
        assert!(queue.lines.len() <= 2 * REMEMBERED, "{}", queue.lines.len());
    }
}
