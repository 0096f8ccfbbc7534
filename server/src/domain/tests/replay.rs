//! Compares rows with the fold of their events, over random histories.

use chrono::TimeDelta;
use proptest::prelude::*;

use super::{
    flow::{flow_after, flow_of},
    *,
};

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
        JobEvent { recorded_at: time(-1), ..whole[1].clone() },
    ] {
        let seq = tampered.seq;
        assert_eq!(Replay::fold([whole[0], &tampered, whole[2]]), Err(ReplayError::NotChained { seq }));
    }
}

/// Any command. With the flag, a report or heartbeat comes with the token of the job's lease, if there is one.
pub(super) fn any_command() -> impl Strategy<Value = (Command, bool)> {
    let request = || prop::option::of("[rs]").prop_map(|request| request.map(Arc::from));
    let command = prop_oneof![
        8 => any_report().prop_map(Command::Report),
        4 => request().prop_map(|request| Command::Claim(Claim { request, ..claim() })),
        2 => prop::option::of(0u8..=100).prop_map(|progress| {
            Command::Heartbeat(Heartbeat { news: News { progress, ..News::default() }, ..heartbeat(LeaseToken::NOBODYS) })
        }),
        1 => Just(redeliver(LeaseToken::NOBODYS)),
        1 => Just(Command::GiveBack(GiveBack { token: LeaseToken::NOBODYS, expires_at: time(0) })),
        1 => (0u64..100_000).prop_map(|by| Command::Redate(Duration::from_secs(by))),
        1 => Just(Command::Cancel(cancel())),
        1 => any::<bool>().prop_map(erase),
        3 => (any_target(), any_report()).prop_map(|(to, report)| Command::LegacyReport(LegacyReport { to, news: report.news })),
        3 => request().prop_map(|request| Command::Retry(Retry { request, ..retry() })),
        3 => (0i32..3, prop::option::of(prop::option::of((0i64..1_000).prop_map(time))))
            .prop_map(|(priority, at)| edit(priority, at)),
        3 => (0u64..100, clock_step()).prop_map(|(since, by)| {
            let jump = (by > 0).then(|| Jump { at: time(by), by: TimeDelta::seconds(by) });
            Command::Sweep(Sweep { reachable_for: Duration::from_secs(since), jump })
        }),
    ];
    (command, prop::bool::weighted(0.8))
}

/// Any status that an old worker may report.
fn any_target() -> impl Strategy<Value = Option<Target>> {
    let end = |outcome| match ending(outcome) {
        Some(Step::End(ending)) => ending,
        _ => unreachable!("it is an ending"),
    };
    let failed = Outcome::Failed { result: None, error: error(), retryable: true, retry_after: None };
    prop::sample::select(vec![
        None,
        Some(Target::Queued(end(Outcome::Released { retry_after: None }))),
        Some(Target::Running),
        Some(Target::Ended(end(Outcome::Succeeded { result: None }))),
        Some(Target::Ended(end(failed))),
        Some(Target::Canceled),
        Some(Target::DeadLetter),
    ])
}

/// The command with the token of the job's lease.
pub(super) fn held_by_its_holder(command: Command, job: &Job) -> Command {
    let (Some(token), Some(lease)) = (job.lease_token(), &job.lease) else { return command };
    match command {
        Command::Report(report) => Command::Report(Report { lease: Some(token), ..report }),
        Command::Heartbeat(heartbeat) => {
            Command::Heartbeat(Heartbeat { worker: Arc::clone(&lease.worker), token, ..heartbeat })
        }
        Command::Redeliver(_) => redeliver(token),
        Command::GiveBack(_) => give_back(job, token),
        other => other,
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
    (step, stage, prop::option::of(0u8..=100), message)
        .prop_map(|(step, stage, progress, message)| Report { news: News { stage, progress, message }, ..report(step) })
}

/// By how many seconds the clock is set.
fn clock_step() -> impl Strategy<Value = i64> {
    prop_oneof![9 => Just(0), 1 => -1_000i64..1_000]
}

prop_compose! {
    /// The job after its create and after each accepted command, with the events of each.
    pub(crate) fn any_history()(
        max_attempts in 1i32..5,
        run_timeout in prop::option::of(1u64..60),
        commands in prop::collection::vec((any_command(), 0i64..20), 0..40),
    ) -> Vec<(Job, Vec<JobEvent>)> {
        let spec = JobSpec { run_timeout: run_timeout.map(Duration::from_secs), ..(*spec(max_attempts)).clone() };
        let first = Job::create(JobId(Uuid::now_v7()), OrgId::DEFAULT, Arc::new(spec), None, tick(0, 1));
        let (mut now, mut job, mut history) = (0, first.job.clone(), vec![(first.job, first.events)]);
        for ((command, is_holder), wait) in commands {
            now += wait;
            let command = if is_holder { held_by_its_holder(command, &job) } else { command };
            let Ok(transition) = job.apply(&command, tick(now, job.last_seq + 1 + wait)) else { continue };
            job = transition.job.clone();
            history.push((transition.job, transition.events));
        }
        history
    }
}

proptest! {
    /// A row is the fold of its events, for any commands in any order and any changes of the clock.
    #[test]
    fn a_row_is_the_fold_of_its_events(
        max_attempts in 1i32..5,
        max_lost_attempts in 0i32..3,
        run_timeout in prop::option::of(1u64..60),
        steps in prop::collection::vec((any_command(), 0i64..20, clock_step()), 0..60),
    ) {
        let mut spec = (*spec(max_attempts)).clone();
        spec.run_timeout = run_timeout.map(Duration::from_secs);
        spec.max_lost_attempts = max_lost_attempts;
        let first = Job::create(JobId(Uuid::now_v7()), OrgId::DEFAULT, Arc::new(spec), None, tick(0, 1));
        let Transition { mut job, mut events, .. } = first;
        let (mut now, mut recorded, mut next_seq, mut is_steady) = (0, 0, 2, true);
        let mut flow = flow_of(&events);
        for ((command, is_holder), wait, step) in steps {
            now += wait + step;
            is_steady &= step == 0;
            recorded = recorded.max(now);
            // Events of other jobs lie in between.
            next_seq += wait;
            let command = if is_holder { held_by_its_holder(command, &job) } else { command };
            let before = job.clone();
            let Ok(transition) = job.apply(&command, Tick { recorded_at: time(recorded), ..tick(now, next_seq) }) else { continue };
            prop_assert!(transition.is_changed || transition.job == before);
            if transition.events.is_empty() {
                prop_assert_eq!(transition.job.last_seq, before.last_seq);
            }
            next_seq += transition.events.len() as i64;
            flow.add_all(&flow_after(&before, &transition.events));
            let begins = |event: &&JobEvent| matches!(event.kind, EventKind::Claimed | EventKind::Started);
            let begun = transition.events.iter().filter(begins).count() as i32;
            job = transition.job;
            events.extend(transition.events);

            prop_assert!(job.attempt >= before.attempt);
            prop_assert_eq!(job.attempt - before.attempt, begun);
            prop_assert_eq!(job.finished_at.is_some(), job.status.is_terminal());
            prop_assert_eq!(job.started_at.is_some(), job.attempt > 0);
            prop_assert!(job.failures <= max_attempts && job.lost_attempts <= max_lost_attempts);
            if is_steady {
                let ended = job.finished_at.filter(|_| job.started_at.is_some());
                prop_assert!(job.started_at.is_none_or(|started| job.created_at <= started));
                prop_assert!(ended.is_none_or(|ended| job.started_at <= Some(ended)));
                prop_assert!(job.attempt_started_at >= job.started_at);
            }
            prop_assert!(job.lease.is_none() || job.status == JobStatus::Running);
            prop_assert_eq!(job.lease_nonce != before.lease_nonce, matches!(command, Command::Claim(_)));
            let ends = job.lease.is_some() || job.status == JobStatus::Running && run_timeout.is_some();
            prop_assert!(!ends || job.due_at.is_some(), "somebody looks after it");
            prop_assert!(!job.status.is_terminal() || job.due_at.is_none());
        }
        prop_assert_eq!(Replay::fold(&events), Ok(Replay::of(&job)));
        prop_assert_eq!(flow, flow_of(&events), "a row tells as much as its history");
        for (at, event) in events.iter().enumerate() {
            prop_assert_eq!(event.job_seq, at as i64 + 1);
            prop_assert!(at == 0 || events[at - 1].seq < event.seq && events[at - 1].recorded_at <= event.recorded_at);
            prop_assert!(event.kind != EventKind::Created || at == 0);
        }
    }
}
