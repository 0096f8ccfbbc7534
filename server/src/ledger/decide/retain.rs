//! Retention: removal of finished jobs.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use super::{super::command::Removed, Log};
use crate::{
    domain::{
        flow::{Flow, Timeline, Width},
        id::JobId,
        job::Job,
    },
    store::{Bucket, Expired, Most, Retention},
};

/// Most jobs that one batch removes.
const REMOVED_JOBS: usize = 500;
/// Most events that one batch removes, and most bytes of these events and their jobs.
const REMOVED: Most = Most { events: 10_000, bytes: 16 << 20 };
/// The history of a job with more events than this is not loaded.
const MAX_HISTORY: i64 = 200_000;
/// The shortest and the longest wait between two checks of an org's retention.
const LEAST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(3_600);

/// What a batch with a retention command loads.
pub(super) fn expired(retention: &Retention) -> Expired {
    Expired { retention: *retention, limit: REMOVED_JOBS, most: REMOVED, max_history: MAX_HISTORY }
}

impl Log {
    /// Removes finished jobs whose retention is over. A job that this batch changed is judged as it is now.
    pub(super) fn retain(&mut self, retention: &Retention) -> Removed {
        let candidates = std::mem::take(&mut self.expired);
        if self.trust.is_retention_barred {
            // The org stays due, and the retention service waits before it tries again.
            return Removed { jobs: 0, has_more: false };
        }
        if self.changes.erases() {
            // What this batch has blanked takes fewer bytes than were loaded.
            self.changes.next_retention = Some(self.now);
            return Removed { jobs: 0, has_more: true };
        }
        if let Some(outdated) = self.outdated.take() {
            self.head.stock.bytes -= outdated.bytes;
            self.changes.removed_org_events = Some(outdated);
        }
        if let Some(slice) = self.slice.take() {
            self.head.stock.bytes -= slice.bytes;
            self.changes.removed_slice = Some(slice);
            self.changes.next_retention = Some(self.now);
            return Removed { jobs: 0, has_more: true };
        }
        let mut has_more = candidates.len() >= REMOVED_JOBS;
        let (mut jobs, mut events, mut bytes) = (0, 0, 0);
        for id in candidates {
            let Some(job) = self.jobs.get(&id) else { continue };
            let expires_at =
                retention.get(job.status).zip(job.finished_at).map(|(keep, finished_at)| finished_at + keep);
            if expires_at.is_none_or(|at| at >= self.now) {
                continue;
            }
            let is_told = job.last_recorded_at >= self.told_since;
            if is_told && job.last_job_seq > MAX_HISTORY {
                continue;
            }
            events += job.last_job_seq;
            let size = self.sizes.get(&id).copied();
            let weight = job.weight();
            bytes += size.unwrap_or_default() + weight;
            let fits = events <= REMOVED.events && bytes <= REMOVED.bytes;
            // The series still covers the job. Without its history, its part of the series can't be recorded as removed.
            let is_known = size.is_some() && (!is_told || self.histories.contains_key(&id));
            if !is_known || !fits && jobs > 0 {
                has_more = true;
                break;
            }
            jobs += 1;
            self.remove(id);
            self.head.stock.jobs -= 1;
            self.head.stock.bytes -= weight;
            if fits {
                self.head.stock.bytes -= size.unwrap_or_default();
            } else {
                self.changes.remaining.insert(id);
                has_more = true;
                break;
            }
        }
        // If no job could be removed, another attempt at once would find the same.
        has_more &= jobs > 0;
        self.changes.next_retention = retention.shortest().map(|keep| {
            if has_more {
                return self.now;
            }
            // A job that finishes from now on expires after the shortest retention, at the earliest.
            let next = self.next_expiry.map_or(self.now + keep, |next| next.min(self.now + keep));
            next.max(self.now + (keep / 100).clamp(LEAST_WAIT, LONGEST_WAIT))
        });
        Removed { jobs, has_more }
    }

    fn remove(&mut self, id: JobId) {
        let Some(job) = self.jobs.remove(&id) else { return };
        self.touched.remove(&id);
        if let Some(idempotency) = &job.spec.idempotency {
            self.keys.remove(&idempotency.key);
        }
        self.head.floor = self.head.floor.max(job.last_seq + 1);
        self.tally(&job).counts.add(job.status, -1);
        self.forget(&job);
        self.changes.removed.push(job);
    }

    /// Forgets types whose last job is removed, or whose settings are, if nothing else is left of them.
    pub(super) fn forget_types(&mut self) {
        let removed = self.changes.removed.iter().map(|job| &job.spec.job_type);
        let candidates: BTreeSet<_> = removed.chain(self.reset_types()).collect();
        let is_gone = |name: &&Arc<str>| {
            let before = self.populations.get(*name);
            let added = self.changes.tallies.get(*name).map_or(0, |tally| tally.counts.total());
            before.is_some_and(|before| before + added == 0) && !self.settings.types.contains_key(*name)
        };
        self.changes.forgotten = candidates.into_iter().filter(is_gone).cloned().collect();
        self.head.types -= self.changes.forgotten.len() as i64;
    }

    /// Records what the log loses of the job's history, for the buckets that the series still keeps.
    fn forget(&mut self, job: &Job) {
        let Some(log_time) = self.loaded_head.recorded_at else { return };
        let mut timeline = Timeline::default();
        for milestone in self.histories.remove(&job.id).unwrap_or_default() {
            let mut flow = Flow::default();
            timeline.follow(&milestone, &mut flow);
            for width in Width::ALL {
                let start = width.start(milestone.recorded_at);
                if start >= width.kept_since(log_time) && !flow.is_empty() {
                    let bucket = Bucket { width, start, job_type: Arc::clone(&job.spec.job_type) };
                    self.changes.removed_flow.entry(bucket).or_default().add_all(&flow);
                }
            }
        }
    }
}
