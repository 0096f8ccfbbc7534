//! Hands committed events to the subscribers in this process.
//!
//! Each org that has subscribers has a channel: the recent tail of its log, and a signal. The tail only ever holds an
//! unbroken run of events; whoever needs others reads the database. Nothing here is needed for correctness: losing the
//! tail delays, never loses.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::watch;

use crate::domain::{event::JobEvent, id::OrgId};

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
}

impl Hub {
    pub(super) fn new(tail_bytes: usize) -> Self {
        Self { channels: Mutex::default(), tail_bytes, held_bytes: AtomicUsize::new(0) }
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

    /// Hands on one committed batch of an org. Batches of an org come in the order of their commits.
    pub(super) fn publish(&self, org: OrgId, events: &[Arc<JobEvent>]) {
        let Some(last) = events.last() else { return };
        let (channel, share) = {
            let channels = lock(&self.channels);
            let share = (self.tail_bytes / channels.len().max(1)).clamp(MIN_TAIL_BYTES, MAX_TAIL_BYTES);
            (channels.get(&org).and_then(Weak::upgrade), share)
        };
        let Some(channel) = channel else { return };
        let held = self.held_bytes.load(Ordering::Relaxed);
        channel.change_tail(|tail| {
            // Others may hold more than their share, from when they were fewer.
            let room = self.tail_bytes.saturating_sub(held.saturating_sub(tail.bytes));
            tail.append(events, share.min(room).max(MIN_TAIL_BYTES));
        });
        channel.signal.send_modify(|signal| signal.head = signal.head.max(last.seq));
    }

    /// Forgets an org's tail after a commit whose outcome this process could not follow, and sends its subscribers to
    /// the database.
    pub(super) fn restart(&self, org: OrgId) {
        let channel = lock(&self.channels).get(&org).and_then(Weak::upgrade);
        let Some(channel) = channel else { return };
        channel.change_tail(|tail| *tail = Tail::default());
        channel.signal.send_modify(|signal| signal.restarts += 1);
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
    fn change_tail(&self, change: impl FnOnce(&mut Tail)) {
        let mut tail = lock(&self.tail);
        let before = tail.bytes;
        change(&mut tail);
        if let Some(hub) = self.hub.upgrade() {
            hub.held_bytes.fetch_add(tail.bytes.wrapping_sub(before), Ordering::Relaxed);
        }
    }
}

impl Drop for Channel {
    /// The last subscriber is gone. A new one may have opened another channel meanwhile: that one stays.
    fn drop(&mut self) {
        self.change_tail(|tail| *tail = Tail::default());
        let Some(hub) = self.hub.upgrade() else { return };
        let mut channels = lock(&hub.channels);
        if channels.get(&self.org).is_some_and(|slot| slot.strong_count() == 0) {
            channels.remove(&self.org);
        }
    }
}

/// How far an org's log is known to reach.
#[derive(Debug, Clone, Copy, Default)]
struct Signal {
    /// The highest `seq` heard of; 0 before the first.
    head: i64,
    /// How often the tail was forgotten.
    restarts: u64,
}

/// The last events of a log: an unbroken run.
#[derive(Default)]
struct Tail {
    events: VecDeque<Arc<JobEvent>>,
    bytes: usize,
}

impl Tail {
    fn append(&mut self, batch: &[Arc<JobEvent>], max_bytes: usize) {
        let follows = self.events.back().is_none_or(|last| batch.first().is_some_and(|next| next.seq == last.seq + 1));
        if !follows {
            *self = Self::default();
        }
        for event in batch {
            self.bytes += event.weight();
            self.events.push_back(Arc::clone(event));
        }
        while self.bytes > max_bytes
            && let Some(oldest) = self.events.pop_front()
        {
            self.bytes -= oldest.weight();
        }
    }
}

/// What the tail has after a cursor.
pub(super) enum Recent {
    /// The next events, without a gap after the cursor.
    Events(Vec<Arc<JobEvent>>),
    /// The cursor is where the log ends, as far as is known.
    AtHead,
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
        let (Some(first), Some(last)) = (tail.events.front(), tail.events.back()) else {
            let head = self.signal.borrow().head;
            return if head > after { Recent::Behind } else { Recent::AtHead };
        };
        if after >= last.seq {
            return Recent::AtHead;
        }
        match usize::try_from(after + 1 - first.seq) {
            Ok(skip) => {
                let mut bytes = 0;
                let fits = |event: &&Arc<JobEvent>| {
                    let fits = bytes <= max_bytes;
                    bytes += event.weight();
                    fits
                };
                Recent::Events(tail.events.iter().skip(skip).take(max_events).take_while(fits).cloned().collect())
            }
            Err(_) => Recent::Behind,
        }
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
mod tests {
    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;
    use crate::domain::{event::EventKind, id::JobId, status::JobStatus};

    fn events(seqs: impl IntoIterator<Item = i64>) -> Vec<Arc<JobEvent>> {
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
            stage: None,
            progress: None,
            message: "".into(),
            result: None,
            error: None,
            scheduled_at: None,
        };
        seqs.into_iter().map(|seq| Arc::new(event(seq))).collect()
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
        // Somebody else wrote 9: what is after it starts a new run.
        hub.publish(OrgId::DEFAULT, &events(10..=11));
        assert_eq!((after(&listener, 8), after(&listener, 9)), (Err("behind"), Ok(vec![10, 11])));
    }

    #[test]
    fn a_tail_keeps_no_more_than_its_share() {
        let (hub, listener) = listen(0);
        let fits = MIN_TAIL_BYTES / events([1])[0].weight();
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
        let weight = events([1])[0].weight();
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
            Recent::AtHead | Recent::Behind => 0,
        };
        assert_eq!((slice(4, usize::MAX), slice(100, 0), slice(100, 600)), (4, 1, 3));
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
