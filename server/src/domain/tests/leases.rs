//! Leases, timers, cancellation and redrives.

use super::*;

#[test]
fn a_claim_takes_the_job_under_a_lease_of_its_own() {
    let job = job_in(JobStatus::Queued, 3, false);
    let request = Some(Arc::from("r"));
    let claimed = job.apply(&Command::Claim(Claim { request, ..claim() }), tick(10, 100)).unwrap();
    let held = &claimed.job;
    let lease = held.lease.clone().unwrap();
    assert_eq!((&*lease.worker, lease.expires_at, lease.request.as_deref()), ("claimer", time(40), Some("r")));
    assert_eq!((held.attempt, held.due_at, &*claimed.events[0].actor), (1, Some(time(40)), "claimer"));

    // Given back and claimed again at the same instant, the job has another lease.
    let token = held.lease_token();
    let back = held.apply(&give_back(held, token.unwrap()), tick(10, 101)).unwrap().job;
    let again = back.apply(&Command::Claim(claim()), tick(10, 102)).unwrap().job;
    assert_ne!(again.lease_nonce, held.lease_nonce);
    let late = Report { lease: token, ..report(succeeded()) };
    assert_eq!(again.apply(&Command::Report(late), tick(11, 103)), Err(TransitionError::LeaseLost));

    let mut later = job;
    later.due_at = Some(time(11));
    assert!(later.apply(&Command::Claim(claim()), tick(10, 100)).is_err(), "its time has not come");
}

#[test]
fn a_heartbeat_extends_and_never_shortens() {
    let job = job_held(1, false);
    let token = job.lease_token().unwrap();
    let beat = |job: &Job, seconds, extend_by: Option<u64>, news| {
        let extend_by = extend_by.map(Duration::from_secs);
        job.apply(&Command::Heartbeat(Heartbeat { extend_by, news, ..heartbeat(token) }), tick(seconds, 100)).unwrap()
    };
    let extended = beat(&job, 10, None, News::default());
    let lease = extended.job.lease.clone().unwrap();
    assert_eq!((lease.expires_at, lease.is_confirmed, extended.job.due_at), (time(40), true, Some(time(40))));
    assert_eq!(extended.job.etag(), job.etag(), "no event, no new version");
    assert_eq!(beat(&extended.job, 11, Some(1), News::default()).job.lease.unwrap().expires_at, time(40));
    assert_eq!(beat(&job, 10, Some(100), News::default()).job.lease.unwrap().expires_at, time(110));
    let with_news = beat(&job, 10, None, news(7));
    assert_eq!((with_news.job.progress, &*with_news.events[0].actor), (Some(7), "holder"));
    let others = Heartbeat { worker: "other".into(), ..heartbeat(token) };
    assert_eq!(job.apply(&Command::Heartbeat(others), tick(10, 100)), Err(TransitionError::LeaseLost));
    // A lease that is over can be extended until the ledger ends it.
    assert_eq!(beat(&job, 50, None, News::default()).job.lease.unwrap().expires_at, time(80));
    let abandoned = extended.job.apply(&give_back(&extended.job, token), tick(11, 100)).unwrap();
    assert!(!abandoned.is_changed, "something was heard of it");
}

#[test]
fn of_the_answers_to_one_claim_the_last_gives_back() {
    let queued = job_in(JobStatus::Queued, 1, false);
    let first = queued.apply(&Command::Claim(claim()), tick(10, 100)).unwrap().job;
    let token = first.lease_token().unwrap();
    // In the same batch, and in a later one.
    for at in [10, 20] {
        let second = first.apply(&redeliver(token), tick(at, 101)).unwrap().job;
        assert_eq!(second.lease_token(), Some(token), "the same lease");
        assert!(second.lease.as_ref().unwrap().expires_at > first.lease.as_ref().unwrap().expires_at);
        assert!(
            !second.apply(&give_back(&first, token), tick(at, 101)).unwrap().is_changed,
            "the second is on its way"
        );
        let back = second.apply(&give_back(&second, token), tick(at, 101)).unwrap();
        assert_eq!((cell(&Ok(back.clone())).as_str(), back.job.status), ("released", JobStatus::Queued));
        let beat = Heartbeat { worker: "claimer".into(), ..heartbeat(token) };
        let heard = second.apply(&Command::Heartbeat(beat), tick(at, 101)).unwrap().job;
        assert!(!heard.apply(&give_back(&heard, token), tick(at, 101)).unwrap().is_changed);
    }
}

#[test]
fn an_attempt_whose_lease_expires_is_lost_and_followed_by_another() {
    let mut job = job_held(1, false);
    let early = job.apply(&look(), tick(30, 100)).unwrap();
    assert!(!early.is_changed);
    let token = job.lease_token();
    let expired = job.apply(&look(), tick(31, 100)).unwrap();
    let [event] = &expired.events[..] else { panic!("one event: {:?}", expired.events) };
    assert_eq!((event.kind, event.next_status, &*event.actor), (EventKind::Lost, JobStatus::Queued, ACTOR_LEDGER));
    assert_eq!(&*event.error.as_ref().unwrap().code, LEASE_EXPIRED);
    assert_eq!(expired.job.last_error, event.error);
    assert_eq!(expired.job.lease, None);
    assert_eq!((expired.job.failures, expired.job.lost_attempts), (0, 1));
    let delay = job.spec.retry_policy.delay(job.id, 1);
    assert_eq!(expired.job.scheduled_at, Some(time(31) + delay));
    for step in [succeeded(), failed(true), released()] {
        let late = Report { lease: token, ..report(step) };
        assert_eq!(expired.job.apply(&Command::Report(late), tick(32, 102)), Err(TransitionError::LeaseLost));
    }
    // Failures and lost attempts share one sequence of delays, so no draw repeats.
    job.failures = 2;
    job.lost_attempts = 1;
    let third = job.apply(&look(), tick(31, 100)).unwrap().job;
    assert_eq!(third.scheduled_at, Some(time(31) + job.spec.retry_policy.delay(job.id, 4)));
    job.cancel_requested = true;
    let canceled = job.apply(&look(), tick(31, 100)).unwrap();
    assert_eq!(cell(&Ok(canceled.clone())), "canceled");
    assert_eq!(canceled.job.lost_attempts, 1, "what cancels is not lost");
    assert_eq!(&*canceled.job.last_error.unwrap().code, LEASE_EXPIRED);

    // The lease was extended after `due_at` was set: the sweep moves `due_at` to its end.
    job.lease.as_mut().unwrap().expires_at = time(60);
    let later = job.apply(&look(), tick(31, 100)).unwrap();
    assert_eq!((cell(&Ok(later.clone())).as_str(), later.job.due_at), ("quietly", Some(time(60))));
}

#[test]
fn beyond_the_budget_of_lost_attempts_each_is_a_failure() {
    for (max_attempts, failures, expected) in
        [(1, 0, "failed"), (3, 1, "failed+retry_scheduled"), (3, 2, "failed+dead_lettered")]
    {
        let mut job = job_held(max_attempts, false);
        (job.failures, job.lost_attempts) = (failures, job.spec.max_lost_attempts);
        let expired = job.apply(&look(), tick(31, 100)).unwrap();
        assert_eq!(cell(&Ok(expired.clone())), expected);
        assert_eq!((expired.job.failures, expired.job.lost_attempts), (failures + 1, job.spec.max_lost_attempts));
        assert_eq!(&*expired.job.last_error.unwrap().code, LEASE_EXPIRED);
    }
    let mut once = job_held(1, false);
    once.spec = Arc::new(JobSpec { max_lost_attempts: 0, ..(*once.spec).clone() });
    assert_eq!(cell(&once.apply(&look(), tick(31, 100))), "failed", "work that must not be begun twice");
    let again = Job { lost_attempts: 3, ..job_in(JobStatus::Failed, 1, false) };
    assert_eq!(again.apply(&Command::Retry(retry()), tick(10, 100)).unwrap().job.lost_attempts, 0);
}

#[test]
fn what_a_clock_that_was_ahead_has_put_off_is_dated_anew() {
    const DAY: i64 = 86_400;
    let redate = |job: &Job, seconds| job.apply(&Command::Redate(Duration::from_secs(60)), tick(seconds, 200)).unwrap();
    let held = job_in(JobStatus::Queued, 3, false).apply(&Command::Claim(claim()), tick(DAY, 100)).unwrap().job;
    let right = redate(&held, 10);
    assert_eq!((right.job.lease.as_ref().unwrap().expires_at, right.job.due_at), (time(40), Some(time(40))));
    assert!(right.events.is_empty() && !redate(&right.job, 20).is_changed, "once is enough");
    assert!(!redate(&held, DAY + 1).is_changed, "it is not ahead");
    // Only the extension came from a clock that was ahead: no lease is that long.
    let mut extended = job_in(JobStatus::Queued, 3, false).apply(&Command::Claim(claim()), tick(5, 100)).unwrap().job;
    extended.lease.as_mut().unwrap().expires_at = time(2 * DAY);
    assert_eq!(redate(&extended, 10).job.lease.unwrap().expires_at, time(40));

    let lost = held.apply(&look(), tick(DAY + 30, 101)).unwrap().job;
    let wait = lost.due_at.unwrap() - time(DAY + 30);
    let right = redate(&lost, 10).job;
    assert_eq!((right.due_at, right.scheduled_at), (Some(time(10) + wait), lost.scheduled_at));
    assert!(!redate(&right, 11).is_changed);
    // A wait that the creator asked for stays.
    let tomorrow = Job::create(JobId(Uuid::now_v7()), OrgId::DEFAULT, spec(1), Some(time(DAY)), tick(5, 1)).job;
    assert!(!redate(&tomorrow, 1).is_changed);
}

#[test]
fn the_end_that_grace_gives_is_whole_microseconds() {
    let mut job = job_held(2, false);
    job.lease.as_mut().unwrap().granted = Duration::from_secs(22);
    for (reachable_for, by) in [(1_000_000_000, 0), (0, 0), (333_333_333, 0), (1, 7), (0, 123_456_789)] {
        let jump = (by > 0).then(|| Jump { at: time(30), by: TimeDelta::nanoseconds(by) });
        let look = Command::Sweep(Sweep { reachable_for: Duration::from_nanos(reachable_for), jump });
        let due_at = job.apply(&look, tick(31, 100)).unwrap().job.due_at.unwrap();
        assert_eq!(due_at, due_at.trunc_subsecs(6), "reachable for {reachable_for} ns, jump by {by} ns");
    }
}

#[test]
fn who_could_not_be_heard_gets_a_third_of_the_lease_to_be_heard_again() {
    let job = job_held(2, false);
    // The lease ended at 31; workers can reach the ledger since 90.
    let since_90 = |now| Command::Sweep(Sweep { reachable_for: Duration::from_secs(now as u64 - 90), jump: None });
    let at_90 = job.apply(&since_90(90), tick(90, 100)).unwrap();
    assert_eq!((cell(&Ok(at_90.clone())).as_str(), at_90.job.due_at), ("quietly", Some(time(100))));
    assert_eq!(cell(&job.apply(&since_90(99), tick(99, 100))), "quietly");
    assert_eq!(cell(&job.apply(&since_90(100), tick(100, 100))), "lost");
    // Grace is given once: another outage meanwhile does not add to it.
    let again = Command::Sweep(Sweep { reachable_for: Duration::ZERO, jump: None });
    assert_eq!(cell(&at_90.job.apply(&again, tick(100, 101))), "lost");
    // A lease that ends shortly after the outage gets the same grace; one that ends later gets none.
    let mut ends_at_95 = job.clone();
    ends_at_95.lease.as_mut().unwrap().expires_at = time(95);
    assert_eq!(cell(&ends_at_95.apply(&since_90(104), tick(104, 100))), "quietly");
    assert_eq!(cell(&ends_at_95.apply(&since_90(105), tick(105, 100))), "lost");
    let mut ends_at_101 = job;
    ends_at_101.lease.as_mut().unwrap().expires_at = time(101);
    assert_eq!(cell(&ends_at_101.apply(&since_90(101), tick(101, 100))), "lost");
}

/// A sweep after the first jump moves `due_at`. The second jump must not take that for the end.
#[test]
fn a_second_jump_of_the_clock_costs_no_lease_either() {
    let sweep = |at: i64, by: i64| {
        let jump = Some(Jump { at: time(at), by: TimeDelta::seconds(by) });
        Command::Sweep(Sweep { reachable_for: Duration::from_secs(3_600), jump })
    };
    // The lease of 30 s ends at 31. The clock jumps from 10 to 100.
    let first = job_held(2, false).apply(&sweep(100, 90), tick(100, 100)).unwrap();
    assert_eq!((cell(&Ok(first.clone())).as_str(), first.job.due_at), ("quietly", Some(time(121))));
    // It jumps from 110 to 250: together by 230.
    let second = first.job.apply(&sweep(250, 230), tick(250, 101)).unwrap();
    assert_eq!((cell(&Ok(second.clone())).as_str(), second.job.due_at), ("quietly", Some(time(261))));
    assert!(!second.job.apply(&sweep(250, 230), tick(260, 102)).unwrap().is_changed);
    assert_eq!(cell(&second.job.apply(&sweep(250, 230), tick(261, 102))), "lost");
}

#[test]
fn an_attempt_takes_no_longer_than_it_may_whatever_its_worker_says() {
    for held in [false, true] {
        let mut job = if held { job_held(1, false) } else { job_in(JobStatus::Queued, 1, false) };
        job.spec = Arc::new(JobSpec { run_timeout: Some(Duration::from_secs(20)), ..(*job.spec).clone() });
        if held {
            job.lease.as_mut().unwrap().expires_at = time(1_000);
            job.due_at = Some(time(21));
        } else {
            job = job.apply(&Command::Report(report(Some(Step::Run))), tick(1, 8)).unwrap().job;
            assert_eq!(job.due_at, Some(time(21)));
        }
        assert!(!job.apply(&look(), tick(20, 100)).unwrap().is_changed);
        let ended = job.apply(&look(), tick(21, 100)).unwrap();
        assert_eq!((cell(&Ok(ended.clone())).as_str(), ended.job.due_at), ("failed", None));
        assert_eq!(&*ended.job.last_error.as_ref().unwrap().code, RUN_TIMEOUT);
        let late = Report { lease: job.lease_token(), ..report(succeeded()) };
        assert!(ended.job.apply(&Command::Report(late), tick(22, 101)).is_err());
    }
}

#[test]
fn an_attempt_that_takes_too_long_is_lost_where_its_worker_is_silent() {
    // The lease of 30 s began at 1.
    for (run_timeout, heard_at, expected) in [
        (15, None, EventKind::Lost),
        (14, None, EventKind::Failed),
        (20, Some(10), EventKind::Failed),
        (45, Some(20), EventKind::Lost),
    ] {
        let mut job = job_held(1, false);
        job.spec = Arc::new(JobSpec { run_timeout: Some(Duration::from_secs(run_timeout)), ..(*job.spec).clone() });
        job.due_at = Some(time(1 + run_timeout as i64).min(time(31)));
        if let Some(at) = heard_at {
            let beat = Command::Heartbeat(heartbeat(job.lease_token().unwrap()));
            job = job.apply(&beat, tick(at, 50)).unwrap().job;
        }
        let ended = job.apply(&look(), tick(1 + run_timeout as i64, 100)).unwrap();
        assert_eq!(ended.events[0].kind, expected, "{run_timeout} s, heard at {heard_at:?}");
    }
}

#[test]
fn a_wait_that_is_over_makes_the_job_ready_without_an_event() {
    let job = Job::create(JobId(Uuid::now_v7()), OrgId::DEFAULT, spec(1), Some(time(50)), tick(0, 1)).job;
    assert!(!job.is_ready() && job.due_at == Some(time(50)));
    let early = job.apply(&look(), tick(49, 2)).unwrap();
    assert!(!early.is_changed);
    let ready = job.apply(&look(), tick(50, 2)).unwrap();
    assert!(ready.job.is_ready() && ready.is_changed && ready.events.is_empty());
    assert_eq!((ready.job.ready_at, ready.job.etag()), (time(50), job.etag()));
    let past = Job::create(JobId(Uuid::now_v7()), OrgId::DEFAULT, spec(1), Some(time(-9)), tick(0, 1)).job;
    assert!(past.is_ready());
}

#[test]
fn a_retry_is_known_by_its_request_and_brings_a_fresh_budget() {
    let mut job = job_in(JobStatus::DeadLetter, 2, true);
    job.failures = 2;
    let request = |request: &str| Command::Retry(Retry { request: Some(request.into()), ..retry() });
    let requeued = job.apply(&request("r"), tick(10, 100)).unwrap().job;
    assert_eq!((requeued.failures, requeued.cancel_requested, requeued.finished_at), (0, false, None));
    assert!(requeued.is_ready());
    let failed_again = job_in(JobStatus::Failed, 2, false);
    let failed_again = Job { retry_request: requeued.retry_request.clone(), ..failed_again };
    for job in [&requeued, &failed_again] {
        assert!(!job.apply(&request("r"), tick(11, 101)).unwrap().is_changed, "{}", job.status);
    }
    assert!(requeued.apply(&request("s"), tick(11, 101)).is_err());
    assert!(failed_again.apply(&request("s"), tick(11, 101)).unwrap().is_changed);
}

#[test]
fn the_same_outcome_under_the_same_lease_is_fine_until_another_attempt_has_ended() {
    let held = job_held(3, false);
    let token = held.lease_token();
    let report = |step| Command::Report(Report { lease: token, ..report(step) });
    let ended = held.apply(&report(failed(true)), tick(10, 100)).unwrap().job;
    let mut next = ended.clone();
    next.due_at = None;
    let next = next.apply(&Command::Claim(claim()), tick(20, 102)).unwrap().job;
    for job in [&ended, &next] {
        assert!(!job.apply(&report(failed(true)), tick(21, 103)).unwrap().is_changed);
        assert_eq!(job.apply(&report(succeeded()), tick(21, 103)), Err(TransitionError::LeaseLost));
    }
    let done = Command::Report(Report { lease: next.lease_token(), ..self::report(succeeded()) });
    let done = next.apply(&done, tick(22, 103)).unwrap().job;
    assert_eq!(done.apply(&report(failed(true)), tick(23, 104)), Err(TransitionError::LeaseLost));
}
