//! Hands committed events to the subscribers of this process.
//!
//! Each org with subscribers has a channel: the tail, which is the newest part of its log, and a signal. A tail is an unbroken
//! run of events and grows at its end only. A subscriber that needs other events reads the database. If another server or an
//! import has written in between, the [follower](super::follower) reads the missing events once for all subscribers.
//! Correctness does not depend on the hub: losing a tail delays events and loses none.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::encoded_event::EncodedEvent;
use crate::domain::{
    event::{EventKind, JobEvent},
    id::{LogId, OrgId},
    org_event::LogEvent,
};

/// Bounds of an org's share of the memory for tails, however many orgs there are. Tails serve subscribers that are nearly live;
/// the others read the database.
const MIN_TAIL_BYTES: usize = 16 << 10;
const MAX_TAIL_BYTES: usize = 4 << 20;

pub(super) struct Hub {
    channels: Mutex<HashMap<OrgId, Weak<Channel>>>,
    tail_bytes: usize,
    /// Bytes of all tails together.
    held_bytes: AtomicUsize,
    /// The log id of the database, once known, and the turn in which it was read.
    log_id: Mutex<(u64, Option<LogId>)>,
    /// Numbers the reads of the log id.
    turns: AtomicU64,
    /// Orgs whose tail lacks committed events.
    behind: Mutex<HashSet<OrgId>>,
    fell_behind: Notify,
}

/// The committed events that a tail lacks.
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

    /// Joins an org's channel, and opens it for the first subscriber.
    pub(super) fn listen(self: &Arc<Self>, org: OrgId) -> Listener {
        let mut channels = self.channels.lock();
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

    /// True if an org has subscribers here. One that joins later reads what was committed before from the database.
    pub(super) fn is_followed(&self, org: OrgId) -> bool {
        self.channels.lock().contains_key(&org)
    }

    /// Publishes committed events of an org, an unbroken run. Events that the tail has are skipped. If earlier ones are
    /// missing, none is added, and the follower reads all of them.
    pub(super) fn publish(&self, org: OrgId, events: &[LogEvent]) {
        let Some(last) = events.last() else { return };
        let (channel, share) = {
            let channels = self.channels.lock();
            let share = (self.tail_bytes / channels.len().max(1)).clamp(MIN_TAIL_BYTES, MAX_TAIL_BYTES);
            (channels.get(&org).and_then(Weak::upgrade), share)
        };
        let Some(channel) = channel else { return };
        let held = self.held_bytes.load(Ordering::Relaxed);
        let (end, gap) = channel.change_tail(|tail| {
            tail.known = tail.known.max(last.seq());
            // Tails of other orgs may exceed their share, from a time when there were fewer orgs.
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

    /// Records that an org's log reaches this `seq`.
    pub(super) fn heard(&self, org: OrgId, seq: i64) {
        let channel = self.channels.lock().get(&org).and_then(Weak::upgrade);
        let Some(channel) = channel else { return };
        if channel.heard(seq).is_some() {
            self.fall_behind(org);
        }
    }

    /// A turn to read the database's log id. Take it before reading.
    pub(super) fn turn(&self) -> u64 {
        self.turns.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Records the log id of the database, read in this turn. If it has changed, all tails and cursors are void.
    pub(super) fn is_of_log(&self, turn: u64, log_id: LogId) {
        let was = {
            let mut known = self.log_id.lock();
            if turn < known.0 {
                // A read that began later has already reported.
                return;
            }
            known.0 = turn;
            known.1.replace(log_id)
        };
        if was.is_some_and(|was| was != log_id) {
            tracing::warn!(%log_id, "the database's log id changed: it was restored or replaced; existing cursors are invalid");
            for org in self.orgs() {
                self.restart(org);
            }
        }
    }

    /// The orgs that have subscribers.
    pub(super) fn orgs(&self) -> Vec<OrgId> {
        self.channels.lock().keys().copied().collect()
    }

    /// The orgs that have subscribers, each with the end of its tail, if known.
    pub(super) fn ends(&self) -> Vec<(OrgId, Option<i64>)> {
        let channels: Vec<_> =
            self.channels.lock().iter().filter_map(|(org, slot)| Some((*org, slot.upgrade()?))).collect();
        channels.into_iter().map(|(org, channel)| (org, channel.tail.lock().end)).collect()
    }

    /// Corrects a false announcement: the org's log ends at `head`.
    pub(super) fn correct(&self, org: OrgId, head: i64) {
        let channel = self.channels.lock().get(&org).and_then(Weak::upgrade);
        let Some(channel) = channel else { return };
        channel.change_tail(|tail| tail.known = tail.end.map_or(head, |end| end.max(head)));
    }

    /// Asks the follower to fill an org's tail.
    pub(super) fn fall_behind(&self, org: OrgId) {
        self.behind.lock().insert(org);
        self.fell_behind.notify_one();
    }

    /// Waits for orgs whose tail lacks events, and takes them.
    pub(super) async fn behind(&self) -> Vec<OrgId> {
        loop {
            let orgs = std::mem::take(&mut *self.behind.lock());
            if !orgs.is_empty() {
                return orgs.into_iter().collect();
            }
            self.fell_behind.notified().await;
        }
    }

    /// What an org's tail lacks; `None` if nothing, or if nobody listens.
    pub(super) fn gap(&self, org: OrgId) -> Option<Gap> {
        let channel = self.channels.lock().get(&org).and_then(Weak::upgrade)?;
        channel.tail.lock().gap()
    }

    /// Drops an org's tail after a commit whose events may not reach it, and sends its subscribers to the database.
    pub(super) fn restart(&self, org: OrgId) {
        let channel = self.channels.lock().get(&org).and_then(Weak::upgrade);
        let Some(channel) = channel else { return };
        channel.change_tail(Tail::forget);
        // The log may end before the tail did.
        channel.signal.send_modify(|signal| *signal = Signal { head: 0, restarts: signal.restarts + 1 });
    }
}

/// What the subscribers of one org share.
struct Channel {
    hub: Weak<Hub>,
    org: OrgId,
    tail: Mutex<Tail>,
    signal: watch::Sender<Signal>,
}

impl Channel {
    /// Changes the tail and updates the byte count of all tails.
    fn change_tail<T>(&self, change: impl FnOnce(&mut Tail) -> T) -> T {
        let mut tail = self.tail.lock();
        let before = tail.bytes;
        let answer = change(&mut tail);
        if let Some(hub) = self.hub.upgrade() {
            hub.held_bytes.fetch_add(tail.bytes.wrapping_sub(before), Ordering::Relaxed);
        }
        answer
    }

    fn heard(&self, seq: i64) -> Option<Gap> {
        let mut tail = self.tail.lock();
        tail.known = tail.known.max(seq);
        tail.gap()
    }
}

impl Drop for Channel {
    /// The last subscriber has left. If a new one has opened another channel meanwhile, that one stays.
    fn drop(&mut self) {
        self.change_tail(Tail::forget);
        let Some(hub) = self.hub.upgrade() else { return };
        let mut channels = hub.channels.lock();
        if channels.get(&self.org).is_some_and(|slot| slot.strong_count() == 0) {
            channels.remove(&self.org);
        }
    }
}

/// What wakes an org's subscribers.
#[derive(Debug, Clone, Copy, Default)]
struct Signal {
    /// Where the tail last ended; 0 before its first event and after a restart.
    head: i64,
    /// How often the tail was dropped.
    restarts: u64,
}

/// The last events of a log, an unbroken run.
#[derive(Default)]
struct Tail {
    events: VecDeque<Arc<EncodedEvent>>,
    bytes: usize,
    /// The next event follows on this `seq`, even if no event is cached; `None` until that is known.
    end: Option<i64>,
    /// The highest `seq` heard of.
    known: i64,
}

impl Tail {
    fn append(&mut self, batch: &[LogEvent], max_bytes: usize) {
        let (Some(first), Some(last)) = (batch.first(), batch.last()) else { return };
        let end = *self.end.get_or_insert(first.seq() - 1);
        if first.seq() > end + 1 || last.seq() <= end {
            return;
        }
        for event in batch.iter().filter(|event| event.seq() > end) {
            if let Some(erased) = event.job().filter(|event| event.kind == EventKind::Erased) {
                self.forget_before(erased);
            }
            let event = EncodedEvent::new(event.clone());
            self.bytes += event.weight();
            self.events.push_back(event);
        }
        self.end = Some(last.seq());
        while self.bytes > max_bytes
            && let Some(oldest) = self.events.pop_front()
        {
            self.bytes -= oldest.weight();
        }
    }

    /// Drops the events before an erasure: one of them may have what was erased. What the same command or bulk operation has
    /// written just before stays.
    fn forget_before(&mut self, erased: &JobEvent) {
        let is_part = |event: &&Arc<EncodedEvent>| {
            let is_part = |event: &JobEvent| {
                let by_command = event.kind == EventKind::Canceled && event.is_blank() && event.actor == erased.actor;
                event.kind == EventKind::Erased || by_command
            };
            event.job().is_some_and(is_part)
        };
        let stays = self.events.iter().rev().take_while(is_part).count();
        let goes = self.events.drain(..self.events.len() - stays);
        self.bytes -= goes.map(|event| event.weight()).sum::<usize>();
    }

    /// The committed events that the tail lacks.
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
    Events(Vec<Arc<EncodedEvent>>),
    /// The cursor is at the head of the log, as far as is known.
    AtHead,
    /// More events are committed, and the tail does not have them yet.
    Awaited,
    /// The tail does not cover the cursor.
    Behind,
}

/// One subscriber of a channel. Leaves it when dropped.
pub(super) struct Listener {
    channel: Arc<Channel>,
    signal: watch::Receiver<Signal>,
}

impl Listener {
    /// Events after the cursor, at most `max_events`, and no more once `max_bytes` is exceeded.
    pub(super) fn recent(&self, after: i64, max_events: usize, max_bytes: usize) -> Recent {
        let tail = self.channel.tail.lock();
        let Some(end) = tail.end else {
            // Nobody has reached the head yet, so the tail has no end.
            return Recent::Behind;
        };
        if after >= end {
            return if tail.known > after { Recent::Awaited } else { Recent::AtHead };
        }
        let Some(first) = tail.events.front() else { return Recent::Behind };
        match usize::try_from(after + 1 - first.seq()) {
            Ok(skip) => {
                let mut bytes = 0;
                let fits = |event: &&Arc<EncodedEvent>| {
                    let fits = bytes <= max_bytes;
                    bytes += event.weight();
                    fits
                };
                Recent::Events(tail.events.iter().skip(skip).take(max_events).take_while(fits).cloned().collect())
            }
            Err(_) => Recent::Behind,
        }
    }

    /// Records that a subscriber has read the log up to `head`, where it ended.
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

    /// The database's log id, as far as the hub knows.
    pub(super) fn log_id(&self) -> Option<LogId> {
        self.channel.hub.upgrade().and_then(|hub| hub.log_id.lock().1)
    }

    /// How often the tail was dropped; see [`Listener::news`].
    pub(super) fn restarts(&self) -> u64 {
        self.signal.borrow().restarts
    }

    /// Waits until there may be events after the cursor, or the tail was dropped since it had been `restarts` times.
    pub(super) async fn news(&mut self, after: i64, restarts: u64) {
        let found = self.signal.wait_for(|signal| signal.head > after || signal.restarts != restarts).await;
        // The channel, which this listener keeps alive, owns the sender.
        debug_assert!(found.is_ok());
    }
}

#[cfg(test)]
pub(super) mod tests;
