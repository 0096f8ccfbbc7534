//! Compares windows with the list of all ready jobs.

use chrono::TimeDelta;
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::domain::{job::JobSpec, status::JobStatus, tests::job_claimed};

const TYPES: [&str; 3] = ["t", "u", "v"];

#[derive(Debug, Clone)]
enum Step {
    /// A batch makes jobs ready, since so many seconds, or running. The flag says whether it is committed.
    Batch(Vec<(usize, Option<i64>)>, bool),
    /// Claims ask for so many jobs of these types, and of all types.
    Claim(Vec<usize>, usize, usize),
    Clear,
}

fn step() -> impl Strategy<Value = Step> {
    let change = (0..40usize, prop::option::of(0..50i64));
    prop_oneof![
        4 => (prop::collection::vec(change, 1..8), any::<bool>()).prop_map(|(changes, stays)| Step::Batch(changes, stays)),
        4 => (prop::collection::vec(0..3usize, 0..3), 0..12usize, 0..12usize)
            .prop_map(|(types, limit, all)| Step::Claim(types, limit + 1, all)),
        1 => Just(Step::Clear),
    ]
}

/// The job with this number.
fn job(n: usize) -> Job {
    let (job, _) = job_claimed();
    let job_type = TYPES[n % 3].into();
    let spec = Arc::new(JobSpec { job_type, priority: (n % 4) as i32, ..(*job.spec).clone() });
    Job { id: JobId(Uuid::from_u128(n as u128 + 1)), spec, created_seq: n as i64 + 1, ..job }
}

fn is_of(job: &Job, name: &Arc<str>) -> bool {
    *name == *ALL_TYPES || job.spec.job_type == *name
}

proptest! {
    /// Whatever batches change, committed or not, claims get the first ready jobs.
    #[test]
    fn windows_are_the_first_of_all(steps in prop::collection::vec(step(), 1..60)) {
        let (mut windows, mut jobs): (Windows, Vec<Job>) = (Windows::default(), (0..40).map(job).collect());
        for step in steps {
            match step {
                Step::Batch(changes, stays) => {
                    let before = jobs.clone();
                    windows.begin();
                    for (n, ready) in changes {
                        let job = &mut jobs[n];
                        job.status = if ready.is_some() { JobStatus::Queued } else { JobStatus::Running };
                        if let Some(seconds) = ready {
                            (job.due_at, job.ready_at) = (None, job.created_at + TimeDelta::seconds(seconds));
                        }
                        windows.follow(job);
                    }
                    if !stays {
                        windows.revert();
                        jobs = before;
                    }
                }
                Step::Claim(types, limit, all) => {
                    let of = types.into_iter().map(|n| (TYPES[n].into(), limit)).collect();
                    let wanted = Ready { of, all };
                    windows.make_room(&wanted);
                    for short in windows.short(&wanted) {
                        let is_there = |job: &&Job| {
                            let is_from = short.from.is_none_or(|from| ClaimOrder::of(job) >= from);
                            job.is_ready() && is_of(job, &short.name) && is_from
                        };
                        let mut found: Vec<_> = jobs.iter().filter(is_there).map(ready_job).collect();
                        found.sort_by_key(|job| job.order);
                        found.truncate(short.limit);
                        for id in windows.fill(&short, found, |_| false) {
                            let job = jobs.iter().find(|job| job.id == id).unwrap();
                            windows.know(job);
                        }
                    }
                    let first = |name: &Arc<str>, limit| {
                        let mut of: Vec<_> = jobs.iter().filter(|job| job.is_ready() && is_of(job, name)).map(ready_job).collect();
                        of.sort_by_key(|job| job.order);
                        of.truncate(limit);
                        of
                    };
                    let of_types = wanted.of.iter().flat_map(|(name, limit)| first(name, *limit)).collect();
                    let expected = FoundReady::new(&wanted, of_types, first(&ALL_TYPES, wanted.all));
                    prop_assert_eq!(windows.ready(&wanted), expected);
                }
                Step::Clear => windows.clear(),
            }
            for known in &jobs {
                prop_assert!(windows.get(known.id).is_none_or(|job| job == known), "{:?}", known);
            }
        }
    }
}

#[test]
fn a_window_is_no_larger_than_it_may_be() {
    let mut windows = Windows::default();
    let wanted = Ready { of: BTreeMap::from([(TYPES[0].into(), 1)]), all: 1 };
    windows.short(&wanted).iter().for_each(|short| _ = windows.fill(short, Vec::new(), |_| false));
    for n in 0..3 * MOST {
        let mut job = Job { status: JobStatus::Queued, due_at: None, ..job(3 * n) };
        job.ready_at = job.created_at - TimeDelta::seconds(n as i64);
        windows.begin();
        windows.follow(&job);
    }
    assert!(windows.of.values().all(|window| window.jobs.len() == MOST), "{}", windows.places.len());
    assert!(windows.places.len() <= 2 * MOST && windows.whole.len() <= MOST_WHOLE);
    assert!(windows.short(&wanted).is_empty());
}
