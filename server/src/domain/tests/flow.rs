//! The flow of jobs: a timeline from a job's row counts the same as one from its first event.

use chrono::TimeDelta;
use proptest::prelude::*;

use super::*;
use crate::domain::flow::{Flow, Histogram, Milestone, Timeline, Width, Window};

/// The flow of a job's events, from the first one on.
pub(super) fn flow_of(events: &[JobEvent]) -> Flow {
    let (mut timeline, mut flow) = (Timeline::default(), Flow::default());
    for event in events {
        timeline.follow(&Milestone::of(event), &mut flow);
    }
    flow
}

/// The flow of some events of a job, from its row before them.
pub(super) fn flow_after(before: &Job, events: &[JobEvent]) -> Flow {
    let (mut timeline, mut flow) = (Timeline::of(before), Flow::default());
    for event in events {
        timeline.follow(&Milestone::of(event), &mut flow);
    }
    flow
}

#[test]
fn waits_and_runs_are_measured_between_the_right_events() {
    let after = |job: &Job, command: Command, seconds: i64| {
        let transition = job.apply(&command, tick(seconds, job.last_seq + 1)).unwrap();
        (transition.job, transition.events)
    };
    let Transition { job, mut events, .. } =
        Job::create(JobId(Uuid::now_v7()), OrgId::DEFAULT, spec(3), Some(time(10)), tick(0, 1));
    // Ready at 10, started at 14, given back at 20 until 30, started early at 25, failed at 26, retried at once, started at
    // 28.
    let (job, more) = after(&job, Command::Report(report(Some(Step::Run))), 14);
    events.extend(more);
    let release = ending(Outcome::Released { retry_after: Some(Duration::from_secs(10)) });
    let (job, more) = after(&job, Command::Report(report(release)), 20);
    events.extend(more);
    let (job, more) = after(&job, Command::Report(report(Some(Step::Run))), 25);
    events.extend(more);
    let failed = Outcome::Failed { result: None, error: error(), retryable: true, retry_after: Some(Duration::ZERO) };
    let (job, more) = after(&job, Command::Report(report(ending(failed))), 26);
    events.extend(more);
    let (job, more) = after(&job, Command::Report(report(Some(Step::Run))), 28);
    events.extend(more);
    let (_, more) = after(&job, Command::Report(report(succeeded())), 33);
    events.extend(more);
    let flow = flow_of(&events);
    assert_eq!(flow.counts(), [1, 3, 1, 1, 1, 0, 0]);
    let expected = |seconds: &[u64]| {
        let mut histogram = Histogram::default();
        seconds.iter().for_each(|seconds| histogram.add(Duration::from_secs(*seconds)));
        histogram
    };
    assert_eq!(flow.waits, expected(&[4, 0, 2]));
    assert_eq!(flow.runs, expected(&[1, 5]), "what is given back has not run");
}

#[test]
fn a_lost_attempt_is_counted_as_such_and_has_not_run() {
    let held = job_held(1, false);
    let lost = held.apply(&look(), tick(31, 100)).unwrap();
    let flow = flow_after(&held, &lost.events);
    assert_eq!((flow.counts(), flow.runs.total()), ([0, 0, 0, 0, 0, 0, 1], 0));
    let mut timeline = Timeline::of(&held);
    timeline.follow(&Milestone::of(&lost.events[0]), &mut Flow::default());
    assert!(timeline.is_of(&lost.job), "its wait begins when the delay is over");
}

#[test]
fn what_happened_elsewhere_is_not_counted_but_followed() {
    let created = create(1);
    let started = created.job.apply(&Command::Report(report(Some(Step::Run))), tick(5, 2)).unwrap();
    let ended = started.job.apply(&Command::Report(report(succeeded())), tick(9, 3)).unwrap();
    let brought_in = |event: &JobEvent| JobEvent { recorded_at: time(100), is_past: true, ..event.clone() };
    let events = [brought_in(&created.events[0]), brought_in(&started.events[0]), ended.events[0].clone()];
    let flow = flow_of(&events);
    assert_eq!((flow.counts(), flow.waits.total(), flow.runs.total()), ([0, 0, 1, 0, 0, 0, 0], 0, 1));
}

#[test]
fn windows_begin_with_whole_buckets() {
    let at = |seconds: i64| DateTime::from_timestamp(seconds, 0).unwrap();
    let noon = 1_795_348_800;
    let now = at(noon + 20 * 60 + 30);
    let hour = Window::ending_at(now, TimeDelta::hours(1));
    assert_eq!((hour.since, hour.hours_since, hour.width), (at(noon - 40 * 60), at(noon), Width::Minute));
    let day = Window::ending_at(now, TimeDelta::days(1));
    assert_eq!((day.since, day.width), (at(noon + 20 * 60 - 86_400), Width::Minute));
    let longer = Window::ending_at(now, TimeDelta::days(1) + TimeDelta::seconds(1));
    assert_eq!((longer.since, longer.hours_since, longer.width), (at(noon - 86_400), at(noon - 86_400), Width::Hour));
    // A window that begins with an hour has no minute buckets before its hours.
    let whole = Window::ending_at(at(noon + 59), TimeDelta::hours(3));
    assert_eq!((whole.since, whole.hours_since), (at(noon - 3 * 3_600), at(noon - 3 * 3_600)));
    for window in [hour, day, longer, whole] {
        assert!(window.width.kept_since(now) < window.since);
    }
}

proptest! {
    /// The contract states this bound.
    #[test]
    fn a_quantile_is_within_its_bound(micros in prop::collection::vec(0u64..1 << 45, 1..200), share in 0.0f64..=1.0) {
        let mut histogram = Histogram::default();
        let mut micros: Vec<u64> = micros.into_iter().map(|micros| micros >> (micros % 40)).collect();
        for micros in &micros {
            histogram.add(Duration::from_micros(*micros));
        }
        micros.sort_unstable();
        let rank = ((micros.len() as f64 * share).ceil() as usize).max(1);
        let (exact, told) = (micros[rank - 1] as f64, histogram.quantile(share).unwrap().as_micros() as f64);
        prop_assert!((told - exact).abs() <= (exact * 0.091).max(1_000.0), "{told} for {exact}");
        prop_assert_eq!(Histogram::new(histogram.counts().to_vec()), histogram);
    }
}
