//! Hands committed events to the subscribers in this process.
//!
//! Each org that has subscribers has a channel: the recent tail of its log, and a signal. The tail only ever holds an
//! unbroken run of events, and grows at its own end alone; whoever needs others reads the database. Where somebody else has
//! written in between, another server or an import, the [follower](super::follower) reads what is missing, once for all
//! subscribers. Nothing here is needed for correctness: losing the tail delays, never loses.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use tokio::sync::{Notify, watch};

use super::shared::SharedEvent;
use crate::domain::{
    event::JobEvent,
    id::{LogId, OrgId},
};

/// An org's share of the memory for tails is never smaller, however many orgs there are, and never larger, however few:
/// a tail is for subscribers that are nearly live, and those that are not have the database.
const MIN_TAIL_BYTES: usize = 16 << 10;
const MAX_TAIL_BYTES: usize = 4 << 20;

/// All channels.
pub(super) struct Hub {
    channels: Mutex<HashMap<OrgId, Weak<Channel>>>,
    tail_bytes: usize,
    /// What all tails hold together.
    held_bytes: AtomicUsize,
    /// The log that all of it is of, once known, and the turn of whoever read that.
    log_id: Mutex<(u64, Option<LogId>)>,
    /// Turns to read which log it is.
    turns: AtomicU64,
    /// Orgs whose tail ends before what is known to be committed.
    behind: Mutex<HashSet<OrgId>>,
    fell_behind: Notify,
}

/// What a tail lacks of what is known to be committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gap {
    /// Where the tail ends.
    pub(super) end: i64,
    /// How far the log is known to reach.
    pub(super) known: i64,
}

impl Hub {
    pub(super) fn new(tail_bytes: usize) -> Self {
        Self {
            channels: Mutex::default(),
            tail_bytes,
            held_bytes: AtomicUsize::new(0),
            log_id: Mutex::default(),
            turns: AtomicU64::new(0),
            behind: Mutex::default(),
            fell_behind: Notify::new(),
        }
    }

    /// Joins an org's channel, opening it for its first subscriber.
    pub(super) fn listen(self: &Arc<Self>, org: OrgId) -> Listener {
        let mut channels = lock(&self.channels);
        let slot = channels.entry(org).or_default();
        let channel = slot.upgrade().unwrap_or_else(|| {
            let channel = Arc::new(Channel {
                hub: Arc::downgrade(self),
                org,
                tail: Mutex::default(),
                signal: watch::Sender::new(Signal::default()),
            });
            *slot = Arc::downgrade(&channel);
            channel
        });
        Listener { signal: channel.signal.subscribe(), channel }
    }

    /// Hands on committed events of an org, without a hole among them. Those that the tail has are passed over; if some
    /// are missing before them, they wait for the follower to read those.
    pub(super) fn publish(&self, org: OrgId, events: &[Arc<JobEvent>]) {
        let Some(last) = events.last() else { return };
        let (channel, share) = {
            let channels = lock(&self.channels);
            let share = (self.tail_bytes / channels.len().max(1)).clamp(MIN_TAIL_BYTES, MAX_TAIL_BYTES);
            (channels.get(&org).and_then(Weak::upgrade), share)
        };
        let Some(channel) = channel else { return };
        let held = self.held_bytes.load(Ordering::Relaxed);
        let (end, gap) = channel.change_tail(|tail| {
            tail.known = tail.known.max(last.seq);
            // Others may hold more than their share, from when they were fewer.
            let room = self.tail_bytes.saturating_sub(held.saturating_sub(tail.bytes));
            tail.append(events, share.min(room).max(MIN_TAIL_BYTES));
            (tail.end, tail.gap())
        });
        if let Some(end) = end {
            channel.signal.send_modify(|signal| signal.head = signal.head.max(end));
        }
        if gap.is_some() {
            self.fall_behind(org);
        }
    }

    /// Takes note that an org's log reaches so far.
    pub(super) fn heard(&self, org: OrgId, seq: i64) {
        let channel = lock(&self.channels).get(&org).and_then(Weak::upgrade);
        let Some(channel) = channel else { return };
        if channel.heard(seq).is_some() {
            self.fall_behind(org);
        }
    }

    /// A turn to read which log the database has.
    pub(super) fn turn(&self) -> u64 {
        self.turns.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Takes note of which log the database has, as was read on this turn. If it is another than it was, memory is of no use, and
    /// neither is any cursor.
    pub(super) fn is_of_log(&self, turn: u64, log_id: LogId) {
        let was = {
            let mut known = lock(&self.log_id);
            if turn < known.0 {
                // Somebody has read it later and was told earlier.
                return;
            }
            known.0 = turn;
            known.1.replace(log_id)
        };
        if was.is_some_and(|was| was != log_id) {
            tracing::warn!(%log_id, "the database has another log than it had: it was restored");
            for org in self.orgs() {
                self.restart(org);
            }
        }
    }

    /// The orgs that have subscribers.
    pub(super) fn orgs(&self) -> Vec<OrgId> {
        lock(&self.channels).keys().copied().collect()
    }

    /// The same, with where each tail ends, as far as that is known.
    pub(super) fn ends(&self) -> Vec<(OrgId, Option<i64>)> {
        let channels: Vec<_> =
            lock(&self.channels).iter().filter_map(|(org, slot)| Some((*org, slot.upgrade()?))).collect();
        channels.into_iter().map(|(org, channel)| (org, lock(&channel.tail).end)).collect()
    }

    /// Takes back what was heard of an org's log, which ends here.
    pub(super) fn correct(&self, org: OrgId, head: i64) {
        let channel = lock(&self.channels).get(&org).and_then(Weak::upgrade);
        let Some(channel) = channel else { return };
        channel.change_tail(|tail| tail.known = tail.end.map_or(head, |end| end.max(head)));
    }

    /// Has the follower look after an org.
    pub(super) fn fall_behind(&self, org: OrgId) {
        lock(&self.behind).insert(org);
        self.fell_behind.notify_one();
    }

    /// Waits for orgs whose tail lacks something, and takes them.
    pub(super) async fn behind(&self) -> Vec<OrgId> {
        loop {
            let orgs = std::mem::take(&mut *lock(&self.behind));
            if !orgs.is_empty() {
                return orgs.into_iter().collect();
            }
            self.fell_behind.notified().await;
        }
    }

    /// What an org's tail lacks; `None` for nothing, or when nobody listens.
    pub(super) fn gap(&self, org: OrgId) -> Option<Gap> {
        let channel = lock(&self.channels).get(&org).and_then(Weak::upgrade)?;
        lock(&channel.tail).gap()
    }

    /// Forgets an org's tail after a commit whose outcome this process could not follow, and sends its subscribers to
    /// the database.
    pub(super) fn restart(&self, org: OrgId) {
        let channel = lock(&self.channels).get(&org).and_then(Weak::upgrade);
        let Some(channel) = channel else { return };
        channel.change_tail(Tail::forget);
        // The log may end before where the tail did.
        channel.signal.send_modify(|signal| *signal = Signal { head: 0, restarts: signal.restarts + 1 });
    }
}

/// What subscribers of one org share.
struct Channel {
    hub: Weak<Hub>,
    org: OrgId,
    tail: Mutex<Tail>,
    signal: watch::Sender<Signal>,
}

impl Channel {
    /// Changes the tail and keeps count of what all of them hold.
    fn change_tail<T>(&self, change: impl FnOnce(&mut Tail) -> T) -> T {
        let mut tail = lock(&self.tail);
        let before = tail.bytes;
        let answer = change(&mut tail);
        if let Some(hub) = self.hub.upgrade() {
            hub.held_bytes.fetch_add(tail.bytes.wrapping_sub(before), Ordering::Relaxed);
        }
        answer
    }

    fn heard(&self, seq: i64) -> Option<Gap> {
        let mut tail = lock(&self.tail);
        tail.known = tail.known.max(seq);
        tail.gap()
    }
}

impl Drop for Channel {
    /// The last subscriber is gone. A new one may have opened another channel meanwhile: that one stays.
    fn drop(&mut self) {
        self.change_tail(Tail::forget);
        let Some(hub) = self.hub.upgrade() else { return };
        let mut channels = lock(&hub.channels);
        if channels.get(&self.org).is_some_and(|slot| slot.strong_count() == 0) {
            channels.remove(&self.org);
        }
    }
}

/// How far an org's subscribers can be brought.
#[derive(Debug, Clone, Copy, Default)]
struct Signal {
    /// Where the tail ended last; 0 before its first event, and once it was forgotten.
    head: i64,
    /// How often the tail was forgotten.
    restarts: u64,
}

/// The last events of a log: an unbroken run.
#[derive(Default)]
struct Tail {
    events: VecDeque<Arc<SharedEvent>>,
    bytes: usize,
    /// What comes next follows on this `seq`, also where no event is held; `None` until that is known.
    end: Option<i64>,
    /// The highest `seq` heard of.
    known: i64,
}

impl Tail {
    fn append(&mut self, batch: &[Arc<JobEvent>], max_bytes: usize) {
        let (Some(first), Some(last)) = (batch.first(), batch.last()) else { return };
        let end = *self.end.get_or_insert(first.seq - 1);
        if first.seq > end + 1 || last.seq <= end {
            return;
        }
        for event in batch.iter().filter(|event| event.seq > end) {
            let event = SharedEvent::new(Arc::clone(event));
            self.bytes += event.weight();
            self.events.push_back(event);
        }
        self.end = Some(last.seq);
        while self.bytes > max_bytes
            && let Some(oldest) = self.events.pop_front()
        {
            self.bytes -= oldest.weight();
        }
    }

    /// What is known to be committed and not here.
    fn gap(&self) -> Option<Gap> {
        let end = self.end?;
        (self.known > end).then_some(Gap { end, known: self.known })
    }

    fn forget(&mut self) {
        *self = Self { known: self.known, ..Self::default() };
    }
}

/// What the tail has after a cursor.
pub(super) enum Recent {
    /// The next events, without a gap after the cursor.
    Events(Vec<Arc<SharedEvent>>),
    /// The cursor is where the log ends, as far as is known.
    AtHead,
    /// More is known to be committed than was brought here yet.
    Awaited,
    /// The next events are no longer, or not, in memory.
    Behind,
}

/// One subscriber's place in a channel. Leaves it when dropped.
pub(super) struct Listener {
    channel: Arc<Channel>,
    signal: watch::Receiver<Signal>,
}

impl Listener {
    /// Events after the cursor: at most so many, and no more once so many bytes are exceeded.
    pub(super) fn recent(&self, after: i64, max_events: usize, max_bytes: usize) -> Recent {
        let tail = lock(&self.channel.tail);
        let Some(end) = tail.end else {
            // Nobody has brought the tail to where this subscriber is.
            return Recent::Behind;
        };
        if after >= end {
            return if tail.known > after { Recent::Awaited } else { Recent::AtHead };
        }
        let Some(first) = tail.events.front() else { return Recent::Behind };
        match usize::try_from(after + 1 - first.seq) {
            Ok(skip) => {
                let mut bytes = 0;
                let fits = |event: &&Arc<SharedEvent>| {
                    let fits = bytes <= max_bytes;
                    bytes += event.weight();
                    fits
                };
                Recent::Events(tail.events.iter().skip(skip).take(max_events).take_while(fits).cloned().collect())
            }
            Err(_) => Recent::Behind,
        }
    }

    /// Takes note that a subscriber has read the log up to here, and that it ended there.
    pub(super) fn reached(&self, head: i64) {
        let gap = self.channel.change_tail(|tail| {
            tail.end.get_or_insert(head);
            tail.known = tail.known.max(head);
            tail.gap()
        });
        if gap.is_some()
            && let Some(hub) = self.channel.hub.upgrade()
        {
            hub.fall_behind(self.channel.org);
        }
    }

    /// The log that the hub knows of.
    pub(super) fn log_id(&self) -> Option<LogId> {
        self.channel.hub.upgrade().and_then(|hub| lock(&hub.log_id).1)
    }

    /// Counts the times the tail was forgotten; see [`Listener::news`].
    pub(super) fn restarts(&self) -> u64 {
        self.signal.borrow().restarts
    }

    /// Waits until there is, or may be, something after the cursor that was not there at that count of restarts.
    pub(super) async fn news(&mut self, after: i64, restarts: u64) {
        let found = self.signal.wait_for(|signal| signal.head > after || signal.restarts != restarts).await;
        // The sender lives in the channel that this listener holds.
        debug_assert!(found.is_ok());
    }
}

/// The maps behind these locks stay whole whatever panics beside them.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(super) mod tests {
    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;
    use crate::domain::{event::EventKind, id::JobId, job::Labels, status::JobStatus};

    pub(in crate::ledger) fn events(seqs: impl IntoIterator<Item = i64>) -> Vec<Arc<JobEvent>> {
        let event = |seq| JobEvent {
            org_id: OrgId::DEFAULT,
            seq,
            job_id: JobId(Uuid::nil()),
            job_seq: seq,
            ts: DateTime::UNIX_EPOCH,
            recorded_at: DateTime::UNIX_EPOCH,
            kind: EventKind::Progress,
            prev_status: Some(JobStatus::Running),
            next_status: JobStatus::Running,
            attempt: 1,
            actor: "".into(),
            job_type: "t".into(),
            labels: Labels::default(),
            stage: None,
            progress: None,
            message: "".into(),
            result: None,
            error: None,
            scheduled_at: None,
            origin: None,
            is_past: false,
        };
        seqs.into_iter().map(|seq| Arc::new(event(seq))).collect()
    }

    /// Of one such event.
    fn weight() -> usize {
        SharedEvent::new(events([1]).remove(0)).weight()
    }

    fn listen(tail_bytes: usize) -> (Arc<Hub>, Listener) {
        let hub = Arc::new(Hub::new(tail_bytes));
        let listener = hub.listen(OrgId::DEFAULT);
        (hub, listener)
    }

    /// The `seq`s after a cursor, or why there are none.
    fn after(listener: &Listener, cursor: i64) -> Result<Vec<i64>, &'static str> {
        match listener.recent(cursor, 100, usize::MAX) {
            Recent::Events(events) => Ok(events.iter().map(|event| event.seq).collect()),
            Recent::AtHead => Err("at head"),
            Recent::Awaited => Err("awaited"),
            Recent::Behind => Err("behind"),
        }
    }

    #[test]
    fn a_tail_is_an_unbroken_run_of_events() {
        let (hub, listener) = listen(usize::MAX);
        hub.publish(OrgId::DEFAULT, &events(5..=6));
        hub.publish(OrgId::DEFAULT, &events(7..=8));
        assert_eq!(after(&listener, 4), Ok(vec![5, 6, 7, 8]));
        assert_eq!(after(&listener, 6), Ok(vec![7, 8]));
        assert_eq!((after(&listener, 3), after(&listener, 8)), (Err("behind"), Err("at head")));
        // Somebody else wrote 9: what is after it waits until that is read.
        hub.publish(OrgId::DEFAULT, &events(10..=11));
        assert_eq!((after(&listener, 8), hub.gap(OrgId::DEFAULT)), (Err("awaited"), Some(Gap { end: 8, known: 11 })));
        hub.publish(OrgId::DEFAULT, &events(9..=10));
        assert_eq!((after(&listener, 8), hub.gap(OrgId::DEFAULT)), (Ok(vec![9, 10]), Some(Gap { end: 10, known: 11 })));
        // What comes twice is there once.
        hub.publish(OrgId::DEFAULT, &events(9..=11));
        hub.publish(OrgId::DEFAULT, &events(10..=11));
        assert_eq!((after(&listener, 8), hub.gap(OrgId::DEFAULT)), (Ok(vec![9, 10, 11]), None));
    }

    #[tokio::test]
    async fn what_is_heard_of_is_fetched_once_somebody_has_read_up_to_the_head() {
        let (hub, listener) = listen(usize::MAX);
        hub.heard(OrgId::DEFAULT, 5);
        assert_eq!((after(&listener, 3), hub.gap(OrgId::DEFAULT)), (Err("behind"), None));
        // The head that it read was from before.
        listener.reached(4);
        assert_eq!((after(&listener, 4), hub.gap(OrgId::DEFAULT)), (Err("awaited"), Some(Gap { end: 4, known: 5 })));
        assert_eq!(hub.behind().await, [OrgId::DEFAULT]);
        hub.publish(OrgId::DEFAULT, &events([5]));
        assert_eq!((after(&listener, 4), after(&listener, 5)), (Ok(vec![5]), Err("at head")));
        hub.restart(OrgId::DEFAULT);
        assert_eq!((after(&listener, 5), hub.gap(OrgId::DEFAULT)), (Err("behind"), None));
    }

    #[test]
    fn a_tail_keeps_no_more_than_its_share() {
        let (hub, listener) = listen(0);
        let fits = MIN_TAIL_BYTES / weight();
        hub.publish(OrgId::DEFAULT, &events(1..=1_000));
        let first = 1_000 - fits as i64 + 1;
        assert_eq!(after(&listener, first - 1).map(|seqs| seqs[0]), Ok(first));
        assert_eq!(after(&listener, first - 2), Err("behind"));

        let (hub, listener) = listen(0);
        let mut large = events([1]);
        Arc::get_mut(&mut large[0]).unwrap().message = "x".repeat(MIN_TAIL_BYTES).into();
        hub.publish(OrgId::DEFAULT, &large);
        assert_eq!(after(&listener, 0), Err("behind"), "what no tail can hold is in the database");
    }

    #[test]
    fn tails_of_many_orgs_stay_within_the_whole() {
        let weight = weight();
        let hub = Arc::new(Hub::new(1_000 * weight));
        // The first fills its share while it is alone; the others come later.
        let listeners: Vec<_> = (0..50)
            .map(|n| {
                let org = OrgId(Uuid::from_u128(n));
                let listener = hub.listen(org);
                hub.publish(org, &events(1..=2_000));
                listener
            })
            .collect();
        let held = hub.held_bytes.load(Ordering::Relaxed);
        assert!(held <= 1_000 * weight + 50 * MIN_TAIL_BYTES, "{held} bytes are held");
        drop(listeners);
        assert_eq!(hub.held_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn slices_are_bounded_in_events_and_bytes() {
        let (hub, listener) = listen(usize::MAX);
        hub.publish(OrgId::DEFAULT, &events(1..=10));
        let slice = |max_events, max_bytes| match listener.recent(0, max_events, max_bytes) {
            Recent::Events(events) => events.len(),
            Recent::AtHead | Recent::Awaited | Recent::Behind => 0,
        };
        assert_eq!((slice(4, usize::MAX), slice(100, 0), slice(100, 2 * weight() + 1)), (4, 1, 3));
    }

    #[test]
    fn a_channel_lives_as_long_as_somebody_listens() {
        let (hub, first) = listen(usize::MAX);
        let second = hub.listen(OrgId::DEFAULT);
        drop(first);
        hub.publish(OrgId::DEFAULT, &events([1]));
        assert_eq!(after(&second, 0), Ok(vec![1]));
        drop(second);
        assert!(lock(&hub.channels).is_empty());
    }
}
