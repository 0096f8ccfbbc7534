//! Tasks that are ready to go on, in fair order.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    hash::Hash,
    time::Duration,
};

/// With this many lines, those that are no longer needed are removed for the first time.
const REMEMBERED: usize = 1_024;
/// So many tasks of a connection are its first. With them its caller becomes known, also with TLS.
pub(super) const FIRST: u32 = 8;

/// The tasks of one line, by connection.
///
/// Where first tasks count, only every fourth is taken in fair order, one is a first task of the oldest connection that has any, and
/// two are of the newest. A new connection takes a few steps until its caller is known. In fair order alone it would wait, at each of
/// them, for all that came with it or before and want much; newest first alone, the others would wait for as long as others come.
pub(super) struct OfOne<T> {
    connections: FairQueue<u64, VecDeque<(bool, T)>>,
    /// The numbers of the connections whose next task is one of their first. They grow with time.
    new: BTreeSet<u64>,
    /// Counts what is taken.
    taken: u32,
}

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

    /// The key whose line is next.
    fn next(&mut self) -> Option<K> {
        let (had, _, key) = *self.waiting.first()?;
        self.level = self.level.max(had);
        Some(key)
    }

    /// Takes a task from the line of a key, whose turn it need not be. `take` also says whether the line is empty then.
    fn take_of<T>(&mut self, key: K, take: impl FnOnce(&mut L) -> (Option<T>, bool)) -> Option<T> {
        let line = self.lines.get_mut(&key)?;
        line.running += 1;
        let (task, is_empty) = take(&mut line.tasks);
        if is_empty {
            self.waiting.remove(&(line.had, line.came, key));
        }
        task
    }

    /// Counts processor time that a task has taken. Returns the line that pays for it. `ended` is true if the task was taken from
    /// there: once for each.
    fn charge_line(&mut self, key: K, took: Duration, ended: bool) -> &mut L {
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
        line.running = line.running.saturating_sub(ended.into());
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
    pub(super) fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// Adds tasks of a connection, each with whether it is one of its first.
    fn append(&mut self, connection: u64, mut added: VecDeque<(bool, T)>) {
        self.connections.add(connection, |tasks| tasks.append(&mut added));
        self.note(connection);
    }

    /// Notes whether the connection's next task is one of its first.
    fn note(&mut self, connection: u64) {
        let next = self.connections.lines.get(&connection).and_then(|line| line.tasks.front());
        if next.is_some_and(|(is_first, _)| *is_first) {
            self.new.insert(connection);
        } else {
            self.new.remove(&connection);
        }
    }

    fn pop(&mut self, first_count: bool) -> Option<T> {
        self.taken = self.taken.wrapping_add(1);
        let new = match self.taken % 4 {
            _ if !first_count => None,
            0 => None,
            1 => self.new.first().copied(),
            _ => self.new.last().copied(),
        };
        let connection = new.or_else(|| self.connections.next())?;
        let task = self.connections.take_of(connection, |tasks| (tasks.pop_front(), tasks.is_empty()));
        self.note(connection);
        task.map(|(_, task)| task)
    }

    /// Takes all tasks of a connection.
    fn take_all(&mut self, connection: u64) -> VecDeque<(bool, T)> {
        let Some(line) = self.connections.lines.get_mut(&connection) else { return VecDeque::new() };
        let place = (line.had, line.came, connection);
        let tasks = std::mem::take(&mut line.tasks);
        self.connections.waiting.remove(&place);
        self.new.remove(&connection);
        tasks
    }
}

impl<T> Default for OfOne<T> {
    fn default() -> Self {
        Self { connections: FairQueue::default(), new: BTreeSet::new(), taken: 0 }
    }
}

impl<K: Copy + Ord + Hash, T> FairQueue<K, OfOne<T>> {
    pub(super) fn push(&mut self, key: K, connection: u64, is_first: bool, task: T) {
        self.add(key, |line| line.append(connection, [(is_first, task)].into()));
    }

    /// Takes the next task, with the key of its line. `first_count` says in which lines the first tasks of connections count.
    pub(super) fn pop(&mut self, first_count: impl FnOnce(K) -> bool) -> Option<(K, T)> {
        let key = self.next()?;
        let task = self.take_of(key, |line| (line.pop(first_count(key)), line.is_empty()));
        task.map(|task| (key, task))
    }

    /// Moves the tasks of a connection to another line.
    pub(super) fn relocate(&mut self, connection: u64, from: K, to: K) {
        let Some(line) = self.lines.get_mut(&from) else { return };
        let tasks = line.tasks.take_all(connection);
        if line.tasks.is_empty() {
            self.waiting.remove(&(line.had, line.came, from));
        }
        if !tasks.is_empty() {
            self.add(to, |line| line.append(connection, tasks));
        }
    }

    /// Counts processor time that a task has taken which was taken from the line `from`. It may be another's to pay.
    pub(super) fn charge(&mut self, from: K, payer: K, connection: u64, took: Duration) {
        if payer != from {
            self.charge_line(from, Duration::ZERO, true).connections.charge_line(connection, Duration::ZERO, true);
        }
        let ended = payer == from;
        self.charge_line(payer, took, ended).connections.charge_line(connection, took, ended);
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
        (0..100).for_each(|_| queue.push(0, 0, false, 0));
        queue.push(1, 1, false, 1);
        let mut had = [Duration::ZERO; 2];
        for _ in 0..1_100 {
            let n = queue.pop(|_| false).unwrap().1;
            queue.push(n, n as u64, false, n);
            let took = [MS, 10 * MS][n];
            queue.charge(n, n, n as u64, took);
            had[n] += took;
        }
        let [short, long] = had;
        assert!(short.abs_diff(long) <= 20 * MS, "{short:?} and {long:?}");
    }

    #[test]
    fn who_comes_anew_is_next_and_has_saved_nothing_up() {
        let mut queue = Queue::default();
        (0..10).for_each(|n| queue.push(0, 0, false, n));
        for _ in 0..3 {
            assert!(queue.pop(|_| false).is_some());
            queue.charge(0, 0, 0, MS);
        }
        (100..104).for_each(|n| queue.push(1, 1, false, n));
        let order: Vec<_> = std::iter::from_fn(|| {
            let (_, n) = queue.pop(|_| false)?;
            let key = usize::from(n >= 100);
            queue.charge(key, key, key as u64, MS);
            Some(n)
        })
        .collect();
        assert_eq!(order, [100, 3, 101, 4, 102, 5, 103, 6, 7, 8, 9]);
        assert!(queue.is_empty());
    }

    #[test]
    fn ever_new_ones_do_not_pass_over_those_that_have_begun() {
        let mut queue = Queue::default();
        queue.push(0, 0, false, 0);
        let mut steps = 0;
        for n in 1..1_000 {
            queue.push(n, 0, false, n);
            queue.push(n + 1_000, 0, false, n + 1_000);
            let key = queue.pop(|_| false).unwrap().1;
            queue.charge(key, key, 0, MS);
            if key == 0 {
                steps += 1;
                queue.push(0, 0, false, 0);
            }
        }
        assert!(steps >= 3, "{steps} steps");
    }

    /// How many tasks of others are taken until connection `n` has had five, of these connections that come at once and want much.
    fn between(connections: std::ops::Range<u64>, n: u64) -> usize {
        let mut queue = Queue::default();
        let mut came = HashMap::<u64, u32>::new();
        let mut push = |queue: &mut Queue, connection: u64| {
            let nth = came.entry(connection).or_default();
            *nth += 1;
            queue.push(0, connection, *nth <= FIRST, connection as usize);
        };
        connections.for_each(|connection| (0..10).for_each(|_| push(&mut queue, connection)));
        let (mut own, mut others) = (0, 0);
        push(&mut queue, n);
        while own < 5 {
            let (_, next) = queue.pop(|_| true).unwrap();
            queue.charge(0, 0, next as u64, MS / 10);
            push(&mut queue, next as u64);
            own += usize::from(next as u64 == n);
            others += usize::from(next as u64 != n);
        }
        others
    }

    #[test]
    fn who_comes_last_does_not_wait_at_each_step_for_all_that_came_before() {
        assert!(between(0..300, 300) <= 12, "{}", between(0..300, 300));
        // Nor does the first one wait for ever.
        assert!(between(1..300, 0) <= 30, "{}", between(1..300, 0));
        // And one in the middle gets its turn in order.
        assert!(between(0..300, 150) <= 6_000, "{}", between(0..300, 150));
    }

    #[test]
    fn tasks_of_a_connection_follow_it_to_another_line() {
        let mut queue = Queue::default();
        (0..3).for_each(|n| queue.push(0, 7, true, n));
        queue.push(0, 8, true, 8);
        queue.relocate(7, 0, 1);
        queue.relocate(7, 0, 1);
        let order: Vec<_> = std::iter::from_fn(|| queue.pop(|_| false)).collect();
        assert_eq!(order, [(0, 8), (1, 0), (1, 1), (1, 2)]);
        assert!(queue.is_empty());
    }

    #[test]
    fn connections_of_one_key_share_its_time() {
        let mut queue = Queue::default();
        (0..9).for_each(|_| queue.push(0, 1, false, 1));
        let mut had = [Duration::ZERO; 3];
        queue.push(0, 2, false, 2);
        for _ in 0..1_000 {
            let n = queue.pop(|_| false).unwrap().1;
            queue.push(0, n as u64, false, n);
            let took = [MS, 10 * MS, MS][n];
            queue.charge(0, 0, n as u64, took);
            had[n] += took;
        }
        assert!(had[1].abs_diff(had[2]) <= 20 * MS, "{had:?}");
    }

    #[test]
    fn those_who_are_idle_are_forgotten() {
        let mut queue = Queue::default();
        queue.push(0, 0, false, 0);
        for n in 1..100_000 {
            queue.push(n, 0, false, n);
            let key = queue.pop(|_| false).unwrap().1;
            queue.charge(key, key, 0, MS);
        }
        assert!(queue.lines.len() <= 2 * REMEMBERED, "{}", queue.lines.len());
    }
}
