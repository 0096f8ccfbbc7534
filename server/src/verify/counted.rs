//! Counters and series, counted from the rows and events of an org.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::What;
use crate::{
    domain::{
        clock::Time,
        flow::{Flow, Milestone, Timeline, Width},
        status::JobStatus,
    },
    store::{Bucket, Series, Statistics},
};

/// The counters and series as they should be at the noted heads.
pub(super) struct Counted {
    /// The first bucket of each width that is compared.
    since: HashMap<Width, Time>,
    jobs: HashMap<(String, JobStatus), i64>,
    flows: BTreeMap<Bucket, Flow>,
}

impl Counted {
    /// For a series whose log was last written at `recorded_at`.
    pub(super) fn new(recorded_at: Option<Time>) -> Self {
        let last = recorded_at.unwrap_or(Time::UNIX_EPOCH);
        let since = |width: Width| (width, Width::Hour.start(last) - width.longest_window());
        Self { since: Width::ALL.into_iter().map(since).collect(), jobs: HashMap::new(), flows: BTreeMap::new() }
    }

    pub(super) fn job(&mut self, job_type: &str, status: JobStatus) {
        *self.jobs.entry((job_type.to_owned(), status)).or_default() += 1;
    }

    /// Follows a job through its next event, and counts the event.
    pub(super) fn event(&mut self, job_type: &Arc<str>, timeline: &mut Timeline, event: &Milestone) {
        let mut flow = Flow::default();
        timeline.follow(event, &mut flow);
        if flow.is_empty() {
            return;
        }
        for width in Width::ALL {
            let start = width.start(event.recorded_at);
            if start >= self.since[&width] {
                let bucket = Bucket { width, start, job_type: Arc::clone(job_type) };
                self.flows.entry(bucket).or_default().add_all(&flow);
            }
        }
    }

    pub(super) fn compare_counters(&mut self, stored: &Statistics, differences: &mut Vec<What>) {
        let mut differ = |job_type: &str, status, stored, counted| {
            if stored != counted {
                let job_type = job_type.to_owned();
                differences.push(What::Counter { job_type, status: Some(status), stored, counted });
            }
        };
        for of_type in &stored.types {
            for status in JobStatus::ALL {
                let counted = self.jobs.remove(&(of_type.job_type.clone(), status)).unwrap_or_default();
                differ(&of_type.job_type, status, of_type.counts.get(status), counted);
            }
        }
        for ((job_type, status), counted) in self.jobs.drain() {
            differ(&job_type, status, 0, counted);
        }
    }

    /// Compares the series with what was counted from the log plus what retention has removed from the log.
    pub(super) fn compare_series(mut self, stored: Vec<Series>, differences: &mut Vec<What>) {
        let (mut happened, mut removed) = (BTreeMap::new(), BTreeMap::new());
        for series in stored {
            happened.extend(series.happened);
            removed.extend(series.removed);
        }
        let nothing = Flow::default();
        let mut differ = |bucket: &Bucket, stored: &Flow, removed: &Flow, counted: &Flow| {
            let mut expected = counted.clone();
            expected.add_all(removed);
            for ((name, stored), (expected, counted)) in Flow::NAMES
                .into_iter()
                .zip(stored.counts())
                .zip(expected.counts().into_iter().zip(counted.counts()))
                .filter(|((_, stored), (expected, _))| stored != expected)
            {
                let stored = stored - (expected - counted);
                differences.push(What::Series {
                    bucket: bucket.clone(),
                    name,
                    stored: vec![stored],
                    counted: vec![counted],
                });
            }
            for (name, stored, expected) in
                [("waits", &stored.waits, &expected.waits), ("runs", &stored.runs, &expected.runs)]
            {
                if stored != expected {
                    let (stored, counted) = (stored.counts().to_vec(), expected.counts().to_vec());
                    differences.push(What::Series { bucket: bucket.clone(), name, stored, counted });
                }
            }
        };
        for (bucket, flow) in happened.iter().filter(|(bucket, _)| bucket.start >= self.since[&bucket.width]) {
            let counted = self.flows.remove(bucket).unwrap_or_default();
            differ(bucket, flow, removed.remove(bucket).as_ref().unwrap_or(&nothing), &counted);
        }
        for (bucket, counted) in &self.flows {
            differ(bucket, &nothing, removed.remove(bucket).as_ref().unwrap_or(&nothing), counted);
        }
        for (bucket, flow) in removed.iter().filter(|(bucket, _)| bucket.start >= self.since[&bucket.width]) {
            differ(bucket, &nothing, flow, &nothing);
        }
    }
}
