//! The state machine against its table, and against random histories.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use chrono::DateTime;
use proptest::prelude::*;
use uuid::Uuid;

use super::{
    clock::Time,
    event::{ACTOR_LEDGER, EventKind, JobError, JobEvent, Position},
    id::{Digest, JobId, LeaseToken, OrgId},
    job::{Job, JobSpec},
    json::Json,
    replay::{Replay, ReplayError},
    retry::RetryPolicy,
    status::JobStatus,
    transition::{Command, Ending, Outcome, Report, Step, Tick, Transition, TransitionError},
};

fn time(seconds: i64) -> Time {
    DateTime::from_timestamp(1_700_000_000 + seconds, 0).unwrap()
}

fn tick(seconds: i64, next_seq: i64) -> Tick {
    Tick { now: time(seconds), next_seq }
}

fn spec(max_attempts: i32) -> Arc<JobSpec> {
    Arc::new(JobSpec {
        job_type: "test".into(),
        priority: 0,
        max_attempts,
        retry_policy: RetryPolicy::default(),
        idempotency: None,
        requested_by: "tester".into(),
        labels: BTreeMap::new(),
    })
}

fn create(max_attempts: i32) -> Transition {
    Job::create(JobId(Uuid::now_v7()), OrgId::DEFAULT, spec(max_attempts), None, tick(0, 1))
}

/// A job as it stands in `status`, with another outcome on record than any test reports.
fn job_in(status: JobStatus, max_attempts: i32, cancel_requested: bool) -> Job {
    let mut job = create(max_attempts).job;
    job.status = status;
    job.cancel_requested = cancel_requested;
    if status != JobStatus::Queued {
        job.attempt = 1;
        job.started_at = Some(time(1));
        job.attempt_started_at = Some(time(1));
    }
    if status.is_terminal() {
        job.finished_at = Some(time(2));
        job.outcome = Some(Digest([255; 32]));
    }
    job.last_job_seq = 2;
    job.last_seq = 7;
    job
}

fn report(step: Option<Step>) -> Report {
    Report {
        step,
        stage: None,
        progress: None,
        message: Arc::default(),
        lease: None,
        etag: None,
        actor: "worker".into(),
    }
}

fn ending(outcome: Outcome) -> Option<Step> {
    // Tests need no more of a digest than that equal outcomes have equal ones.
    let mut digest = [0; 32];
    for (at, byte) in format!("{outcome:?}").bytes().enumerate() {
        digest[at % 31] = u8::wrapping_add(digest[at % 31], byte).rotate_left(3);
    }
    Some(Step::End(Ending { outcome, digest: Digest(digest) }))
}

fn error() -> JobError {
    JobError { code: "BROKEN".into(), message: "it broke".into() }
}

fn succeeded() -> Option<Step> {
    ending(Outcome::Succeeded { result: Some(Json::from_trusted("1")) })
}

fn failed(retryable: bool) -> Option<Step> {
    ending(Outcome::Failed { result: None, error: error(), retryable, retry_after: None })
}

fn released() -> Option<Step> {
    ending(Outcome::Released { retry_after: None })
}

fn canceled() -> Option<Step> {
    ending(Outcome::Canceled { result: None, error: None })
}

fn apply(job: &Job, report: Report) -> Result<Transition, TransitionError> {
    job.apply(&Command::Report(report), tick(10, 100))
}

/// What a table cell says of a decision: the kinds of its events, `same`, or the error.
fn cell(decision: &Result<Transition, TransitionError>) -> String {
    match decision {
        Ok(transition) if transition.events.is_empty() => "same".to_owned(),
        Ok(transition) => {
            let kinds: Vec<_> = transition.events.iter().map(|event| event.kind.as_str()).collect();
            kinds.join("+")
        }
        Err(TransitionError::InvalidTransition { .. }) => "invalid".to_owned(),
        Err(TransitionError::LeaseLost) => "lease lost".to_owned(),
        Err(TransitionError::EtagMismatch { .. }) => "etag".to_owned(),
    }
}

#[test]
fn every_status_answers_every_report_as_the_table_says() {
    let news = Report { progress: Some(50), ..report(None) };
    let run_with_news = Report { step: Some(Step::Run), ..news.clone() };
    let columns: [(&str, i32, Report); 11] = [
        ("nothing", 1, report(None)),
        ("news", 1, news),
        ("run", 1, report(Some(Step::Run))),
        ("run+news", 1, run_with_news),
        ("succeed", 1, report(succeeded())),
        ("fail", 1, report(failed(true))),
        ("fail, budget left", 3, report(failed(true))),
        ("fail for good, budget left", 3, report(failed(false))),
        ("give back", 1, report(released())),
        ("confirm cancel", 1, report(canceled())),
        ("wrong lease", 1, Report { lease: Some(LeaseToken("x".into())), ..report(succeeded()) }),
    ];
    // Canceling was not asked for | was asked for, where that makes a difference.
    let table: [(JobStatus, [&str; 11]); 6] = [
        (
            JobStatus::Queued,
            [
                "same",
                "invalid",
                "started",
                "started",
                "invalid",
                "invalid",
                "invalid",
                "invalid",
                "invalid",
                "invalid",
                "lease lost",
            ],
        ),
        (
            JobStatus::Running,
            [
                "same",
                "progress",
                "same",
                "progress",
                "succeeded",
                "failed|canceled",
                "failed+retry_scheduled|canceled",
                "failed|canceled",
                "released|canceled",
                "invalid|canceled",
                "lease lost",
            ],
        ),
        (JobStatus::Succeeded, FINAL),
        (JobStatus::Failed, FINAL),
        (JobStatus::Canceled, FINAL),
        (JobStatus::DeadLetter, FINAL),
    ];
    const FINAL: [&str; 11] = [
        "same",
        "invalid",
        "invalid",
        "invalid",
        "invalid",
        "invalid",
        "invalid",
        "invalid",
        "invalid",
        "invalid",
        "lease lost",
    ];
    for (status, cells) in table {
        for ((name, max_attempts, report), expected) in columns.iter().zip(cells) {
            let (plain, asked) = expected.split_once('|').unwrap_or((expected, expected));
            for (cancel_requested, expected) in [(false, plain), (true, asked)] {
                let job = job_in(status, *max_attempts, cancel_requested);
                let decision = apply(&job, report.clone());
                assert_eq!(cell(&decision), expected, "{status} × {name}, cancel requested: {cancel_requested}");
                if let Err(TransitionError::InvalidTransition { current }) = decision {
                    assert_eq!(current, status);
                }
            }
        }
    }
}

#[test]
fn a_used_up_budget_of_more_than_one_attempt_ends_in_dead_letter() {
    let mut job = job_in(JobStatus::Running, 3, false);
    job.failures = 2;
    let transition = apply(&job, report(failed(true))).unwrap();
    assert_eq!(cell(&Ok(transition.clone())), "failed+dead_lettered");
    assert_eq!(transition.job.status, JobStatus::DeadLetter);
    assert_eq!(transition.events[0].actor.as_ref(), "worker");
    assert_eq!(transition.events[1].actor.as_ref(), ACTOR_LEDGER);
    assert_eq!(transition.events[1].prev_status, Some(JobStatus::Failed));
}

#[test]
fn a_failure_that_is_retried_waits_as_the_policy_or_the_report_says() {
    let job = job_in(JobStatus::Running, 3, false);
    let transition = apply(&job, report(failed(true))).unwrap();
    let wait = transition.job.spec.retry_policy.delay(job.id, 1);
    assert_eq!(transition.job.scheduled_at, Some(time(10) + wait));
    assert_eq!(transition.job.ready_at, time(10) + wait);
    assert_eq!((transition.job.failures, transition.job.finished_at), (1, None));
    assert_eq!(transition.job.last_error, Some(error()));

    let retry_after = Some(Duration::from_secs(90));
    let step = ending(Outcome::Failed { result: None, error: error(), retryable: true, retry_after });
    assert_eq!(apply(&job, report(step)).unwrap().job.scheduled_at, Some(time(100)));
}

#[test]
fn giving_back_counts_no_failure_and_may_snooze() {
    let job = job_in(JobStatus::Running, 3, false);
    let at_once = apply(&job, report(released())).unwrap().job;
    assert_eq!((at_once.failures, at_once.attempt, at_once.scheduled_at), (0, 1, None));
    assert_eq!(at_once.ready_at, time(10));
    let step = ending(Outcome::Released { retry_after: Some(Duration::from_secs(5)) });
    assert_eq!(apply(&job, report(step)).unwrap().job.ready_at, time(15));
}

#[test]
fn a_cancellation_keeps_the_error_of_the_exit_that_led_to_it() {
    let job = job_in(JobStatus::Running, 3, true);
    let transition = apply(&job, report(failed(true))).unwrap();
    assert_eq!(transition.job.status, JobStatus::Canceled);
    assert_eq!(transition.events[0].error, Some(error()));
    assert_eq!(transition.job.failures, 0);
}

#[test]
fn the_same_outcome_again_is_fine_until_the_next_attempt_begins() {
    let running = job_in(JobStatus::Running, 3, false);
    for step in [succeeded(), failed(true), failed(false), released()] {
        let ended = apply(&running, report(step.clone())).unwrap().job;
        let etag = Some("stale".to_owned());
        let again = apply(&ended, Report { etag, ..report(step.clone()) }).unwrap();
        assert_eq!(again, Transition { job: ended.clone(), events: vec![] }, "repetition comes before the etag");
        let other = if step == succeeded() { failed(false) } else { succeeded() };
        let refused = TransitionError::InvalidTransition { current: ended.status };
        assert_eq!(apply(&ended, report(other)).unwrap_err(), refused);

        if ended.status == JobStatus::Queued {
            let next = apply(&ended, report(Some(Step::Run))).unwrap().job;
            assert!(!apply(&next, report(step)).unwrap().events.is_empty(), "of the next attempt it is a new report");
        }
    }
}

#[test]
fn an_etag_is_checked_before_the_transition_and_changes_with_it() {
    let job = job_in(JobStatus::Queued, 1, false);
    let with = |etag: &str, step| Report { etag: Some(etag.to_owned()), ..report(step) };
    let stale = TransitionError::EtagMismatch { current: job.etag() };
    assert_eq!(apply(&job, with("6", succeeded())).unwrap_err(), stale);
    let started = apply(&job, with(&job.etag(), Some(Step::Run))).unwrap().job;
    assert_ne!(started.etag(), job.etag());
}

#[test]
fn an_attempt_begins_without_the_last_ones_stage_progress_and_result() {
    let mut job = job_in(JobStatus::Queued, 3, false);
    (job.stage, job.progress) = (Some("old".into()), Some(70));
    job.result_at = Some(Position { seq: 5, recorded_at: time(1) });
    job.last_error = Some(error());
    let started = apply(&job, Report { stage: Some("new".into()), ..report(Some(Step::Run)) }).unwrap().job;
    assert_eq!((started.stage.as_deref(), started.progress, started.result_at), (Some("new"), None, None));
    assert_eq!(started.last_error, Some(error()), "the last error stays");
    let cleared = apply(&started, Report { stage: Some("".into()), ..report(None) }).unwrap().job;
    assert_eq!(cleared.stage, None);
}

#[test]
fn replay_refuses_what_is_not_a_history() {
    let created = create(1);
    let started = created.job.apply(&Command::Report(report(Some(Step::Run))), tick(1, 2)).unwrap();
    let ended = started.job.apply(&Command::Report(report(succeeded())), tick(2, 3)).unwrap();
    let whole = [&created.events[0], &started.events[0], &ended.events[0]];
    assert_eq!(Replay::fold(whole), Ok(Replay::of(&ended.job)));

    assert_eq!(Replay::fold([]), Err(ReplayError::Empty));
    let beheaded = Replay::fold([whole[1], whole[2]]);
    assert_eq!(beheaded, Err(ReplayError::NotDense { seq: 2, found: 2, expected: 1 }));
    let holed = Replay::fold([whole[0], whole[2]]);
    assert_eq!(holed, Err(ReplayError::NotDense { seq: 3, found: 3, expected: 2 }));
    for tampered in [
        JobEvent { prev_status: Some(JobStatus::Failed), ..whole[1].clone() },
        JobEvent { seq: 1, ..whole[1].clone() },
        JobEvent { ts: time(-1), ..whole[1].clone() },
    ] {
        let seq = tampered.seq;
        assert_eq!(Replay::fold([whole[0], &tampered, whole[2]]), Err(ReplayError::NotChained { seq }));
    }
}

fn any_report() -> impl Strategy<Value = Report> {
    let result = prop::option::of(Just(Json::from_trusted("{}")));
    let wait = prop::option::of((0u64..1_000).prop_map(Duration::from_secs));
    let outcome = prop_oneof![
        result.clone().prop_map(|result| Outcome::Succeeded { result }),
        (result.clone(), any::<bool>(), wait.clone()).prop_map(|(result, retryable, retry_after)| {
            Outcome::Failed { result, error: error(), retryable, retry_after }
        }),
        wait.prop_map(|retry_after| Outcome::Released { retry_after }),
        result.prop_map(|result| Outcome::Canceled { result, error: Some(error()) }),
    ];
    let step = prop_oneof![
        3 => Just(Some(Step::Run)),
        2 => Just(None),
        3 => outcome.prop_map(ending),
    ];
    let stage = prop::option::of("[ab]?").prop_map(|stage| stage.map(Arc::from));
    let message = "m?".prop_map(Arc::from);
    (step, stage, prop::option::of(0u8..=100), message).prop_map(|(step, stage, progress, message)| Report {
        stage,
        progress,
        message,
        ..report(step)
    })
}

proptest! {
    /// Whatever is reported in whatever order, the row stays the fold of its events.
    #[test]
    fn a_row_is_the_fold_of_its_events(
        max_attempts in 1i32..5,
        steps in prop::collection::vec((any_report(), 0i64..3, any::<bool>()), 0..40),
    ) {
        let Transition { mut job, mut events } = create(max_attempts);
        let (mut now, mut next_seq) = (0, 2);
        for (report, wait, ask_to_cancel) in steps {
            now += wait;
            // Other jobs' events lie in between.
            next_seq += wait;
            if ask_to_cancel && job.status == JobStatus::Running {
                job.cancel_requested = true;
            }
            let before = job.clone();
            let Ok(transition) = job.apply(&Command::Report(report), tick(now, next_seq)) else { continue };
            if transition.events.is_empty() {
                prop_assert_eq!(&transition.job, &before, "no event, no change");
            }
            next_seq += transition.events.len() as i64;
            job = transition.job;
            events.extend(transition.events);

            prop_assert!(job.attempt >= before.attempt);
            prop_assert_eq!(job.attempt - before.attempt, i32::from(before.status == JobStatus::Queued && job.status == JobStatus::Running));
            prop_assert_eq!(job.finished_at.is_some(), job.status.is_terminal());
            prop_assert_eq!(job.started_at.is_some(), job.attempt > 0);
            prop_assert!(job.failures <= max_attempts);
            prop_assert!(job.started_at.is_none_or(|started| job.created_at <= started));
            prop_assert!(job.finished_at.is_none_or(|finished| job.started_at.is_none_or(|started| started <= finished)));
            prop_assert!(job.attempt_started_at >= job.started_at);
        }
        prop_assert_eq!(Replay::fold(&events), Ok(Replay::of(&job)));
        for (at, event) in events.iter().enumerate() {
            prop_assert_eq!(event.job_seq, at as i64 + 1);
            prop_assert!(at == 0 || events[at - 1].seq < event.seq);
            prop_assert!(event.kind != EventKind::Created || at == 0);
        }
    }
}
