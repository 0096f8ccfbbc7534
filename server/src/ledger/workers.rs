//! The workers that this server has heard of, and what of them the database does not have yet.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::name_budget::{NameBudget, NameShare};
use crate::{
    domain::{id::OrgId, worker::WorkerAbout},
    store::HeardWorker,
};

/// A worker is written at most this often.
pub(super) const WRITTEN_EVERY: Duration = Duration::from_secs(10);
/// Bytes of what workers say of themselves that are written at once: a write of more would keep others from the database.
const BYTES_AT_ONCE: usize = 128 << 10;
/// What a claim said is told for this long after it. Later claims may have gone to another server.
const TOLD_FOR: Duration = Duration::from_secs(20);

/// Workers by org and id. If there is no room for one's texts, those that were silent for longest are forgotten.
pub(super) struct Workers {
    budget: NameBudget,
    known_for: Duration,
    known: Mutex<HashMap<OrgId, BTreeMap<Arc<str>, Known>>>,
    /// When others had to make room for a worker of an org, or it found none.
    refused: Mutex<HashMap<OrgId, Instant>>,
}

struct Known {
    about: Arc<WorkerAbout>,
    /// Its claims that wait.
    waiting: usize,
    /// When its last claim began or ended.
    claimed_at: Option<Instant>,
    heard_at: Instant,
    /// When it was last written, `None` if it never was.
    written_at: Option<Instant>,
    _share: NameShare,
}

impl Known {
    /// How long it has been silent. A worker whose claim waits is heard all the time.
    fn silent_for(&self, now: Instant) -> Duration {
        if self.waiting > 0 { Duration::ZERO } else { now.saturating_duration_since(self.heard_at) }
    }

    fn is_due(&self, now: Instant) -> bool {
        let Some(written_at) = self.written_at else { return true };
        now.saturating_duration_since(written_at) >= WRITTEN_EVERY && (self.waiting > 0 || self.heard_at > written_at)
    }
}

/// A claim of a worker, until it is dropped.
pub struct HeardClaim {
    workers: Arc<Workers>,
    org: OrgId,
    id: Arc<str>,
}

impl Drop for HeardClaim {
    fn drop(&mut self) {
        self.workers.ends_claim(self.org, &self.id, Instant::now());
    }
}

impl Workers {
    /// Keeps texts of `bytes` in all and of a third of that for one org, of workers that were silent for up to `known_for`.
    pub(super) fn new(bytes: usize, known_for: Duration) -> Arc<Self> {
        Arc::new(Self {
            budget: NameBudget::new(bytes, bytes / 3),
            known_for,
            known: Mutex::default(),
            refused: Mutex::default(),
        })
    }

    pub(super) fn known_for(&self) -> Duration {
        self.known_for
    }

    /// Notes a claim. `None` if there is no room for its worker.
    pub(super) fn claims(
        self: &Arc<Self>,
        org: OrgId,
        id: &Arc<str>,
        about: WorkerAbout,
        now: Instant,
    ) -> Option<HeardClaim> {
        let mut known = self.known.lock();
        let of_org = known.entry(org).or_default();
        match of_org.get_mut(id) {
            Some(known) if *known.about == about => {
                known.waiting += 1;
                known.claimed_at = Some(now);
            }
            found => {
                let (waiting, written_at) = found.map_or((0, None), |known| (known.waiting, known.written_at));
                let share = self.share(org, of_org, id, &about, now)?;
                let (about, waiting, claimed_at) = (Arc::new(about), waiting + 1, Some(now));
                let noted = Known { about, waiting, claimed_at, heard_at: now, written_at, _share: share };
                of_org.insert(Arc::clone(id), noted);
            }
        }
        Some(HeardClaim { workers: Arc::clone(self), org, id: Arc::clone(id) })
    }

    fn ends_claim(&self, org: OrgId, id: &Arc<str>, now: Instant) {
        if let Some(known) = self.known.lock().get_mut(&org).and_then(|of_org| of_org.get_mut(id)) {
            known.waiting = known.waiting.saturating_sub(1);
            (known.claimed_at, known.heard_at) = (Some(now), now);
        }
    }

    /// Notes a heartbeat.
    pub(super) fn beats(&self, org: OrgId, id: &Arc<str>, now: Instant) {
        let mut known = self.known.lock();
        let of_org = known.entry(org).or_default();
        if let Some(known) = of_org.get_mut(id) {
            known.heard_at = now;
        } else if let Some(share) = self.share(org, of_org, id, &WorkerAbout::default(), now) {
            let (about, waiting, claimed_at, written_at) = (Arc::default(), 0, None, None);
            let noted = Known { about, waiting, claimed_at, heard_at: now, written_at, _share: share };
            of_org.insert(Arc::clone(id), noted);
        }
    }

    /// Room for what a worker says of itself. If there is none, the half of the org's workers that were silent for longer is
    /// forgotten: who claims under ever new names loses these, not the workers that go on.
    fn share(
        &self,
        org: OrgId,
        of_org: &mut BTreeMap<Arc<str>, Known>,
        id: &str,
        about: &WorkerAbout,
        now: Instant,
    ) -> Option<NameShare> {
        if let Some(share) = self.budget.of_worker(org, id, about) {
            return Some(share);
        }
        self.refused.lock().insert(org, now);
        let mut heard: Vec<_> =
            of_org.values().filter(|known| known.waiting == 0).map(|known| known.heard_at).collect();
        if heard.is_empty() {
            return None;
        }
        let middle = heard.len() / 2;
        let (_, middle, _) = heard.select_nth_unstable(middle);
        of_org.retain(|_, known| known.waiting > 0 || known.heard_at > *middle);
        self.budget.of_worker(org, id, about)
    }

    /// Takes workers that are to be written now, up to `most` and [`BYTES_AT_ONCE`], of each org an equal part of them and at
    /// least one. Returns whether there may be more. Forgets workers that are gone.
    pub(super) fn take_due(&self, most: usize, now: Instant) -> (Vec<HeardWorker>, bool) {
        let mut known = self.known.lock();
        known.retain(|_, of_org| {
            of_org.retain(|_, known| known.silent_for(now) < self.known_for);
            !of_org.is_empty()
        });
        self.refused.lock().retain(|_, refused| now.saturating_duration_since(*refused) < self.known_for);
        let has_due = |of_org: &BTreeMap<_, Known>| of_org.values().any(|known| known.is_due(now));
        let orgs = known.values().filter(|of_org| has_due(of_org)).count().max(1);
        let (most, most_bytes) = ((most / orgs).max(1), BYTES_AT_ONCE / orgs);
        let (mut due, mut has_more) = (Vec::new(), false);
        for (org, of_org) in known.iter_mut() {
            let (mut n, mut bytes) = (0, 0);
            for (id, known) in of_org.iter_mut().filter(|(_, known)| known.is_due(now)) {
                if n >= most || bytes >= most_bytes {
                    has_more = true;
                    break;
                }
                (n, bytes) = (n + 1, bytes + id.len() + known.about.bytes());
                known.written_at = Some(now);
                due.push(heard(*org, id, known, now));
            }
        }
        (due, has_more)
    }

    /// Has workers written again that could not be written.
    pub(super) fn put_back(&self, taken: &[HeardWorker]) {
        let mut known = self.known.lock();
        for worker in taken {
            if let Some(known) = known.get_mut(&worker.org).and_then(|of_org| of_org.get_mut(&worker.id)) {
                known.written_at = None;
            }
        }
    }

    /// True if workers of the org may be unknown, because there was no room for them.
    pub(super) fn lacks_some(&self, org: OrgId) -> bool {
        self.refused.lock().contains_key(&org)
    }

    /// At most `limit` workers of an org whose ids come after `after`, in ascending order.
    pub(super) fn of_org(&self, org: OrgId, after: &str, limit: usize, now: Instant) -> Vec<HeardWorker> {
        let known = self.known.lock();
        let Some(of_org) = known.get(&org) else { return Vec::new() };
        let left = of_org.range::<str, _>((Bound::Excluded(after), Bound::Unbounded));
        let left = left.filter(|(_, known)| known.silent_for(now) < self.known_for);
        left.take(limit).map(|(id, known)| heard(org, id, known, now)).collect()
    }
}

fn heard(org: OrgId, id: &Arc<str>, known: &Known, now: Instant) -> HeardWorker {
    let is_told = |claimed_at| now.saturating_duration_since(claimed_at) < TOLD_FOR;
    HeardWorker {
        org,
        id: Arc::clone(id),
        about: (known.waiting > 0 || known.claimed_at.is_some_and(is_told)).then(|| Arc::clone(&known.about)),
        is_waiting: known.waiting > 0,
        silent_for: known.silent_for(now),
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const KNOWN_FOR: Duration = Duration::from_secs(300);

    fn about(version: &str) -> WorkerAbout {
        WorkerAbout { types: Some([Arc::from("t")].into()), version: version.into(), host: "h".into() }
    }

    fn due(workers: &Workers, now: Instant) -> Vec<(String, bool)> {
        let (due, has_more) = workers.take_due(100, now);
        assert!(!has_more);
        due.into_iter().map(|worker| (worker.id.to_string(), worker.is_waiting)).collect()
    }

    #[test]
    fn a_worker_is_written_once_in_ten_seconds_and_forgotten_after_five_minutes() {
        let workers = Workers::new(1 << 20, KNOWN_FOR);
        let (org, id, mut now) = (OrgId(Uuid::from_u128(1)), Arc::<str>::from("w"), Instant::now());
        let claim = workers.claims(org, &id, about("1"), now).unwrap();
        assert_eq!(due(&workers, now), [("w".to_owned(), true)]);
        for _ in 0..50 {
            now += Duration::from_millis(199);
            workers.beats(org, &id, now);
            assert_eq!(due(&workers, now), []);
        }
        now += Duration::from_millis(50);
        assert_eq!(due(&workers, now), [("w".to_owned(), true)]);
        // A worker whose claim waits is heard all the time.
        now += KNOWN_FOR * 2;
        assert_eq!(due(&workers, now), [("w".to_owned(), true)]);
        now += WRITTEN_EVERY;
        workers.ends_claim(org, &id, now);
        assert_eq!(due(&workers, now), [("w".to_owned(), false)]);
        now += WRITTEN_EVERY;
        assert_eq!((due(&workers, now).len(), workers.of_org(org, "", 9, now).len()), (0, 1));
        now += KNOWN_FOR;
        assert_eq!((workers.of_org(org, "", 9, now).len(), due(&workers, now).len()), (0, 0));
        assert!(workers.known.lock().is_empty());
        drop(claim);
    }

    #[test]
    fn what_could_not_be_written_is_due_again_and_a_new_version_replaces_the_old_one() {
        let workers = Workers::new(1 << 20, KNOWN_FOR);
        let (org, id, now) = (OrgId(Uuid::from_u128(1)), Arc::<str>::from("w"), Instant::now());
        workers.claims(org, &id, about("1"), now);
        workers.ends_claim(org, &id, now);
        let (taken, _) = workers.take_due(100, now);
        workers.put_back(&taken);
        assert_eq!(workers.take_due(100, now), (taken, false));
        workers.claims(org, &id, about("2"), now);
        let found = workers.of_org(org, "", 9, now);
        assert_eq!((found.len(), &*found[0].about.as_ref().unwrap().version), (1, "2"));
        // Its next claims may be at another server, which then knows better.
        workers.ends_claim(org, &id, now);
        assert!(workers.of_org(org, "", 9, now + TOLD_FOR)[0].about.is_none());
        assert_eq!(workers.of_org(org, "w", 9, now), []);
    }

    #[test]
    fn orgs_have_equal_parts_of_a_write_that_is_bounded() {
        let workers = Workers::new(64 << 20, KNOWN_FOR);
        let [greedy, other] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
        let now = Instant::now();
        let long = || WorkerAbout { types: Some([Arc::from("t".repeat(10_000))].into()), ..about("1") };
        for n in 0..100 {
            let _ = workers.claims(greedy, &Arc::from(format!("w{n:02}")), long(), now);
        }
        let _ = workers.claims(other, &Arc::from("w"), about("1"), now);
        let (mut found, mut writes) = (Vec::new(), 0);
        loop {
            let (due, has_more) = workers.take_due(500, now);
            assert!(
                due.iter().map(|worker| worker.about.as_ref().unwrap().bytes()).sum::<usize>() < BYTES_AT_ONCE + 20_000
            );
            assert!(writes > 0 || due.iter().any(|worker| worker.org == other), "the other's comes in the first write");
            found.extend(due.into_iter().map(|worker| worker.id));
            writes += 1;
            if !has_more {
                break;
            }
        }
        found.sort();
        found.dedup();
        assert_eq!(found.len(), 101);
        assert!((8..12).contains(&writes), "{writes}");
        assert!(workers.take_due(2, now).0.is_empty());
    }

    #[test]
    fn an_org_with_very_many_workers_leaves_room_for_others() {
        let workers = Workers::new(30_000, KNOWN_FOR);
        let [greedy, other] = [1, 2].map(|n| OrgId(Uuid::from_u128(n)));
        let mut now = Instant::now();
        for n in 0..1_000 {
            workers.beats(greedy, &Arc::from(format!("w{n:04}")), now);
        }
        assert!((10..100).contains(&workers.of_org(greedy, "", 1_000, now).len()));
        workers.beats(other, &Arc::from("w"), now);
        assert_eq!(workers.of_org(other, "", 9, now).len(), 1);
        assert!(workers.lacks_some(greedy) && !workers.lacks_some(other));
        // A worker that goes on is known, whatever names come.
        let working = Arc::from("working");
        for n in 0..1_000 {
            now += Duration::from_millis(1);
            workers.beats(greedy, &Arc::from(format!("x{n:04}")), now);
            workers.beats(greedy, &working, now);
        }
        assert_eq!(&*workers.of_org(greedy, "wo", 1_000, now)[0].id, "working");
        now += KNOWN_FOR;
        assert!(workers.take_due(1_000, now).0.is_empty() && !workers.lacks_some(greedy));
        workers.beats(greedy, &Arc::from("later"), now);
        assert_eq!(workers.of_org(greedy, "", 9, now).len(), 1);
    }
}
