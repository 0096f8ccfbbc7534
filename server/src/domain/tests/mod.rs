//! Tests the state machine against its table, and against random histories.

mod flow;
mod import;
mod leases;
pub(crate) mod replay;

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, SubsecRound, TimeDelta};
use uuid::Uuid;

use super::{
    clock::Time,
    edit::EditableFields,
    event::{ACTOR_LEDGER, EventKind, JobError, JobEvent, Position},
    id::{Digest, JobId, OrgId},
    job::{Ended, Job, JobSpec},
    json::Json,
    lease::{Lease, LeaseSecret, LeaseToken},
    replay::{Replay, ReplayError},
    status::JobStatus,
    transition::{
        Cancel, Claim, Command, Edit, Ending, Erase, FoundPayload, GiveBack, Heartbeat, Jump, LEASE_EXPIRED,
        LegacyReport, News, Outcome, RUN_TIMEOUT, Redeliver, Report, Retry, Step, Sweep, Target, Tick, Transition,
        TransitionError,
    },
};

fn time(seconds: i64) -> Time {
    DateTime::from_timestamp(1_700_000_000 + seconds, 0).unwrap()
}

fn tick(seconds: i64, next_seq: i64) -> Tick {
    Tick { now: time(seconds), recorded_at: time(seconds), next_seq, secret: LeaseSecret([7; 16]) }
}

fn spec(max_attempts: i32) -> Arc<JobSpec> {
    Arc::new(JobSpec { max_attempts, requested_by: "tester".into(), ..JobSpec::of_type("test") })
}

fn create(max_attempts: i32) -> Transition {
    Job::create(JobId(Uuid::now_v7()), OrgId::DEFAULT, spec(max_attempts), None, tick(0, 1))
}

/// A job in this status. Its recorded outcome differs from every outcome that tests report.
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
        job.outcome = Some(Ended { digest: Digest([255; 32]), nonce: None });
    }
    job.last_job_seq = 2;
    job.last_seq = 7;
    job
}

/// The same job, running under a lease of 30 s that was granted at time 1.
fn job_held(max_attempts: i32, cancel_requested: bool) -> Job {
    let mut job = job_in(JobStatus::Running, max_attempts, cancel_requested);
    job.lease_nonce = 5;
    let granted = Duration::from_secs(30);
    let worker = "holder".into();
    job.lease = Some(Lease { worker, granted, expires_at: time(31), request: None, is_confirmed: false });
    job.due_at = Some(time(31));
    job
}

/// A ready job of a type, whose first event has this `seq`.
pub(crate) fn ready_job(job_type: &str, seq: i64) -> Job {
    Job::create(JobId(Uuid::now_v7()), OrgId::DEFAULT, Arc::new(JobSpec::of_type(job_type)), None, tick(0, seq)).job
}

/// A job that a worker has just claimed, and the event of the claim.
pub(crate) fn job_claimed() -> (Job, JobEvent) {
    let claimed = job_in(JobStatus::Queued, 1, false).apply(&Command::Claim(claim()), tick(10, 100)).unwrap();
    (claimed.job, claimed.events[0].clone())
}

fn report(step: Option<Step>) -> Report {
    Report { step, news: News::default(), lease: None, etag: None, actor: "worker".into() }
}

fn news(progress: u8) -> News {
    News { progress: Some(progress), ..News::default() }
}

fn staged(stage: &str) -> News {
    News { stage: Some(stage.into()), ..News::default() }
}

fn claim() -> Claim {
    Claim { worker: "claimer".into(), lease: Duration::from_secs(30), request: None }
}

fn heartbeat(token: LeaseToken) -> Heartbeat {
    Heartbeat { worker: "holder".into(), token, news: News::default(), extend_by: None }
}

fn redeliver(token: LeaseToken) -> Command {
    Command::Redeliver(Redeliver { token, lease: Duration::from_secs(30) })
}

/// Gives back the job as the last answer delivered it.
fn give_back(job: &Job, token: LeaseToken) -> Command {
    let expires_at = job.lease.as_ref().map_or(time(0), |lease| lease.expires_at);
    Command::GiveBack(GiveBack { token, expires_at })
}

fn cancel() -> Cancel {
    Cancel { reason: Arc::default(), etag: None, actor: "boss".into() }
}

fn retry() -> Retry {
    Retry { etag: None, request: None, actor: "boss".into() }
}

/// An edit of the priority, and of the time if there is one.
fn edit(priority: i32, at: Option<Option<Time>>) -> Command {
    let fields = EditableFields { priority: Some(priority), scheduled_at: at, ..EditableFields::default() };
    let found = FoundPayload::default();
    Command::Edit(Box::new(Edit { fields, payload: None, found, etag: None, actor: "boss".into() }))
}

fn erase(cancel: bool) -> Command {
    Command::Erase(Erase { cancel, etag: None, actor: "boss".into() })
}

/// A sweep without an outage before it.
fn look() -> Command {
    Command::Sweep(Sweep { reachable_for: Duration::from_secs(3_600), jump: None })
}

fn ending(outcome: Outcome) -> Option<Step> {
    // For tests, a digest only has to be equal for equal outcomes.
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

/// The table cell of a decision: the kinds of its events, `quietly` for a change without an event, `same`, or the error.
fn cell(decision: &Result<Transition, TransitionError>) -> String {
    match decision {
        Ok(transition) if transition.events.is_empty() && transition.is_changed => "quietly".to_owned(),
        Ok(transition) if transition.events.is_empty() => "same".to_owned(),
        Ok(transition) => {
            let kinds: Vec<_> = transition.events.iter().map(|event| event.kind.as_str()).collect();
            kinds.join("+")
        }
        Err(TransitionError::InvalidTransition { .. }) => "invalid".to_owned(),
        Err(TransitionError::LeaseLost) => "lost".to_owned(),
        Err(TransitionError::EtagMismatch { .. }) => "etag".to_owned(),
        Err(TransitionError::PayloadOutdated) => "outdated".to_owned(),
        Err(TransitionError::Erased { .. }) => "gone".to_owned(),
    }
}

fn assert_makes_sense(job: &Job, decision: Result<Transition, TransitionError>, of: &str) {
    match decision {
        Err(TransitionError::InvalidTransition { current }) => assert_eq!(current, job.status, "{of}"),
        Ok(transition) => {
            let is_held = transition.job.lease.is_some();
            assert!(!is_held || transition.job.status == JobStatus::Running, "{of}");
            assert_eq!(transition.job == *job, !transition.is_changed, "{of}");
        }
        Err(_) => {}
    }
}

#[test]
fn every_status_answers_every_command_as_the_table_says() {
    let under = |lease| move |report: Report| Command::Report(Report { lease, ..report });
    let token = |job: &Job| LeaseToken { org: job.org_id, job: job.id, attempt: 1, nonce: 5 };
    let stale = |job: &Job| LeaseToken { nonce: 4, ..token(job) };
    let elsewhere = |job: &Job| LeaseToken { job: JobId(Uuid::now_v7()), ..token(job) };
    type Make<'a> = Box<dyn Fn(&Job) -> Command + 'a>;
    let by_reporter = |report: Report| -> Make<'_> { Box::new(move |_| under(None)(report.clone())) };
    let by_holder = |report: Report| -> Make<'_> { Box::new(move |job| under(Some(token(job)))(report.clone())) };
    let with_news = |step| Report { news: news(50), ..report(step) };
    // `a|b`: without and with a requested cancellation, where these differ.
    #[rustfmt::skip]
    let table: [(&str, i32, Make<'_>, [&str; 7]); 32] = [
        //                                                      queued     running               held                 succeeded failed     canceled   dead_letter
        ("nothing",             1, by_reporter(report(None)),           ["same",    "same",               "lost",              "same",    "same",     "same",     "same"]),
        ("news",                1, by_reporter(with_news(None)),        ["invalid", "progress",           "lost",              "invalid", "invalid",  "invalid",  "invalid"]),
        ("run",                 1, by_reporter(report(Some(Step::Run))), ["started", "same",              "lost",              "invalid", "invalid",  "invalid",  "invalid"]),
        ("run with news",       1, by_reporter(with_news(Some(Step::Run))), ["started", "progress",       "lost",              "invalid", "invalid",  "invalid",  "invalid"]),
        ("succeed",             1, by_reporter(report(succeeded())),    ["invalid", "succeeded",          "lost",              "invalid", "invalid",  "invalid",  "invalid"]),
        ("fail",                1, by_reporter(report(failed(true))),   ["invalid", "failed|canceled",    "lost",              "invalid", "invalid",  "invalid",  "invalid"]),
        ("fail, budget left",   3, by_reporter(report(failed(true))),   ["invalid", "failed+retry_scheduled|canceled", "lost", "invalid", "invalid",  "invalid",  "invalid"]),
        ("fail for good",       3, by_reporter(report(failed(false))),  ["invalid", "failed|canceled",    "lost",              "invalid", "invalid",  "invalid",  "invalid"]),
        ("give back",           1, by_reporter(report(released())),     ["invalid", "released|canceled",  "lost",              "invalid", "invalid",  "invalid",  "invalid"]),
        ("confirm cancel",      1, by_reporter(report(canceled())),     ["invalid", "invalid|canceled",   "lost",              "invalid", "invalid",  "invalid",  "invalid"]),
        ("nothing, held",       1, by_holder(report(None)),             ["lost",    "lost",               "same",              "lost",    "lost",     "lost",     "lost"]),
        ("news, held",          1, by_holder(with_news(None)),          ["lost",    "lost",               "progress",          "lost",    "lost",     "lost",     "lost"]),
        ("run, held",           1, by_holder(report(Some(Step::Run))),  ["lost",    "lost",               "same",              "lost",    "lost",     "lost",     "lost"]),
        ("succeed, held",       1, by_holder(report(succeeded())),      ["lost",    "lost",               "succeeded",         "lost",    "lost",     "lost",     "lost"]),
        ("fail, held",          1, by_holder(report(failed(true))),     ["lost",    "lost",               "failed|canceled",   "lost",    "lost",     "lost",     "lost"]),
        ("fail, left, held",    3, by_holder(report(failed(true))),     ["lost",    "lost",               "failed+retry_scheduled|canceled", "lost", "lost", "lost", "lost"]),
        ("give back, held",     1, by_holder(report(released())),       ["lost",    "lost",               "released|canceled", "lost",    "lost",     "lost",     "lost"]),
        ("confirm, held",       1, by_holder(report(canceled())),       ["lost",    "lost",               "invalid|canceled",  "lost",    "lost",     "lost",     "lost"]),
        ("stale lease",         1, Box::new(|job| under(Some(stale(job)))(report(succeeded()))),     ["lost", "lost", "lost", "lost", "lost", "lost", "lost"]),
        ("another job's lease", 1, Box::new(|job| under(Some(elsewhere(job)))(report(succeeded()))), ["lost", "lost", "lost", "lost", "lost", "lost", "lost"]),
        ("claim",               1, Box::new(|_| Command::Claim(claim())),                            ["claimed", "invalid", "invalid", "invalid", "invalid", "invalid", "invalid"]),
        ("heartbeat",           1, Box::new(|job| Command::Heartbeat(heartbeat(token(job)))),        ["lost", "lost", "quietly", "lost", "lost", "lost", "lost"]),
        ("stale heartbeat",     1, Box::new(|job| Command::Heartbeat(heartbeat(stale(job)))),        ["lost", "lost", "lost", "lost", "lost", "lost", "lost"]),
        ("redeliver",               1, Box::new(|job| redeliver(token(job))),                                ["lost", "lost", "quietly", "lost", "lost", "lost", "lost"]),
        ("give back",             1, Box::new(|job| give_back(job, token(job))),                         ["same", "same", "released|canceled", "same", "same", "same", "same"]),
        ("cancel",              1, Box::new(|_| Command::Cancel(cancel())),                          ["canceled", "canceled|same", "cancel_requested|same", "invalid", "invalid", "same", "invalid"]),
        ("retry",               1, Box::new(|_| Command::Retry(retry())),                            ["invalid", "invalid", "invalid", "invalid", "requeued", "requeued", "requeued"]),
        ("edit",                1, Box::new(|_| edit(7, None)),                                      ["edited", "invalid", "invalid", "invalid", "invalid", "invalid", "invalid"]),
        ("edit to the same",    1, Box::new(|job| edit(job.spec.priority, None)),                    ["same", "same", "same", "same", "same", "same", "same"]),
        ("look",                1, Box::new(|_| look()),                                             ["same", "same", "same", "same", "same", "same", "same"]),
        ("erase",               1, Box::new(|_| erase(false)),          ["invalid", "invalid",            "invalid",           "erased",  "erased",   "erased",   "erased"]),
        ("cancel and erase",    1, Box::new(|_| erase(true)),           ["canceled+erased", "canceled+erased", "canceled+erased", "erased", "erased", "erased",   "erased"]),
    ];
    for (name, max_attempts, command, cells) in &table {
        for (cell_no, expected) in cells.iter().enumerate() {
            let (plain, asked) = expected.split_once('|').unwrap_or((expected, expected));
            for (cancel_requested, expected) in [(false, plain), (true, asked)] {
                let job = match cell_no {
                    2 => job_held(*max_attempts, cancel_requested),
                    n => {
                        let n = if n > 2 { n - 1 } else { n };
                        job_in(JobStatus::ALL[n], *max_attempts, cancel_requested)
                    }
                };
                let decision = job.apply(&command(&job), tick(10, 100));
                let of =
                    format!("{} × {name}, held: {}, cancel requested: {cancel_requested}", job.status, cell_no == 2);
                assert_eq!(cell(&decision), expected, "{of}");
                assert_makes_sense(&job, decision, &of);
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
        assert_eq!(
            again,
            Transition { job: ended.clone(), events: vec![], is_changed: false },
            "repetition comes before the etag"
        );
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
    let started = apply(&job, Report { news: staged("new"), ..report(Some(Step::Run)) }).unwrap().job;
    assert_eq!((started.stage.as_deref(), started.progress, started.result_at), (Some("new"), None, None));
    assert_eq!(started.last_error, Some(error()), "the last error stays");
    let cleared = apply(&started, Report { news: staged(""), ..report(None) }).unwrap().job;
    assert_eq!(cleared.stage, None);
}

#[test]
fn an_erased_job_is_blank_and_stays_as_it_is() {
    let requester: Arc<str> = "tester".into();
    let mut job = job_in(JobStatus::Failed, 3, false);
    job.last_error = Some(error());
    job.stage = Some("stage".into());
    job.retry_request = Some("again".into());
    job.result_at = Some(Position { seq: 7, recorded_at: time(2) });
    let erased = job.apply(&erase(false), tick(9, 8)).unwrap();
    let (blank, event) = (erased.job, &erased.events[0]);
    assert_eq!((&blank.last_error, &blank.stage, &blank.retry_request, blank.result_at), (&None, &None, &None, None));
    assert_eq!((&*blank.spec.requested_by, blank.outcome, blank.erased_at), ("", None, Some(time(9))));
    assert_eq!((blank.finished_at, blank.attempt, blank.status), (job.finished_at, job.attempt, job.status));
    assert!(event.is_blank() && &*event.actor == "boss" && event.next_status == job.status);
    // Nobody brings it back.
    let again = job_in(JobStatus::Failed, 3, false);
    let revivals =
        [Command::Retry(retry()), Command::LegacyReport(LegacyReport { to: Some(Target::Running), news: news(1) })];
    for revival in revivals {
        assert!(again.apply(&revival, tick(10, 9)).is_ok());
        let refused = blank.apply(&revival, tick(10, 9));
        assert_eq!(refused, Err(TransitionError::Erased { current: JobStatus::Failed }));
    }
    assert_eq!(cell(&blank.apply(&erase(true), tick(10, 9))), "same");
    // Events that name the requester as their actor lose that as well.
    let mut created = create(1).events.remove(0);
    assert_eq!(created.actor, requester);
    created.blank(&requester);
    assert!(created.is_blank() && created.actor.is_empty());
}
