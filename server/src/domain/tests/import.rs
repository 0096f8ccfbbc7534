//! Imported jobs, and what happens to them afterwards.

use proptest::prelude::*;

use super::{
    flow::{flow_after, flow_of},
    replay::{any_command, held_by_its_holder},
    *,
};
use crate::domain::{
    flow::Flow,
    transition::{Import, ImportOutcome, ImportRefusal, ImportedState, Mark, Past},
};

fn past(ts: i64, prev_status: Option<JobStatus>, next_status: JobStatus) -> Past {
    Past {
        ts: time(ts),
        is_inferred: false,
        prev_status,
        next_status,
        attempt: 0,
        stage: None,
        progress: None,
        message: Arc::default(),
        result: None,
        error: None,
    }
}

fn state(status: JobStatus, updated_at: i64) -> ImportedState {
    ImportedState {
        status,
        attempt: 1,
        stage: Some("s".into()),
        progress: Some(40),
        result: None,
        error: None,
        created_at: time(-100),
        updated_at: time(updated_at),
        started_at: None,
        finished_at: None,
    }
}

/// A job that started elsewhere at -90 and last changed at -80.
fn running() -> Import {
    let past = vec![past(-100, None, JobStatus::Queued), past(-90, Some(JobStatus::Queued), JobStatus::Running)];
    let digest = Digest([1; 32]);
    Import { id: JobId(Uuid::from_u128(7)), spec: spec(1), state: state(JobStatus::Running, -80), past, digest }
}

fn bring(import: &Import, known: Option<(&Job, Option<&Mark>)>, at: Tick) -> (ImportOutcome, Transition) {
    Job::import(import, OrgId::DEFAULT, known, at).expect("it is brought in")
}

fn mark(import: &Import, job: &Job) -> Mark {
    Mark { seq: job.last_seq, digest: import.digest, past: import.past.iter().map(Past::key).collect() }
}

#[test]
fn a_job_comes_with_its_past_and_goes_on_here() {
    let import = running();
    let (outcome, brought) = bring(&import, None, tick(0, 5));
    assert_eq!(outcome, ImportOutcome::New);
    let kinds: Vec<_> = brought.events.iter().map(|event| (event.seq, event.kind, event.ts)).collect();
    let expected =
        [(5, EventKind::Created, time(-100)), (6, EventKind::Started, time(-90)), (7, EventKind::Imported, time(-80))];
    assert_eq!(kinds, expected);
    assert!(brought.events.iter().all(|event| event.recorded_at == time(0)));
    let job = &brought.job;
    assert_eq!((job.created_at, job.updated_at, job.created_seq), (time(-100), time(-80), 5));
    assert_eq!(Replay::fold(&brought.events), Ok(Replay::of(job)));

    let done = job.apply(&Command::Report(report(succeeded())), tick(9, 8)).unwrap();
    let events: Vec<_> = brought.events.iter().chain(&done.events).cloned().collect();
    assert_eq!(Replay::fold(&events), Ok(Replay::of(&done.job)));
    let Flow { created, started, succeeded, runs, .. } = flow_of(&events);
    assert_eq!((created, started, succeeded), (0, 0, 1), "what happened elsewhere is not counted");
    assert!(runs.is_empty(), "since when it ran is not known");
}

#[test]
fn what_comes_again_is_known_and_what_is_new_is_appended() {
    let import = running();
    let job = bring(&import, None, tick(0, 1)).1.job;
    let known = mark(&import, &job);
    let (outcome, transition) = bring(&import, Some((&job, Some(&known))), tick(1, 4));
    assert_eq!((outcome, transition.is_changed), (ImportOutcome::Unchanged, false));

    // The other system has changed the job, and an older entry was found.
    let mut later = import.clone();
    later.digest = Digest([2; 32]);
    later.state = state(JobStatus::Succeeded, -70);
    later.past.insert(1, past(-95, Some(JobStatus::Queued), JobStatus::Queued));
    later.past.push(past(-70, Some(JobStatus::Running), JobStatus::Succeeded));
    let (outcome, transition) = bring(&later, Some((&job, Some(&known))), tick(1, 4));
    assert_eq!(outcome, ImportOutcome::Updated);
    let kinds: Vec<_> = transition.events.iter().map(|event| event.kind).collect();
    assert_eq!(kinds, [EventKind::Progress, EventKind::Succeeded, EventKind::Imported]);
    assert_eq!(transition.job.finished_at, Some(time(-70)));
    assert_eq!((transition.job.created_seq, transition.job.last_job_seq), (1, 6));

    // A job that has changed here is not updated.
    let own = job.apply(&Command::Report(report(succeeded())), tick(2, 4)).unwrap().job;
    let refused = Job::import(&later, OrgId::DEFAULT, Some((&own, Some(&known))), tick(3, 5));
    assert_eq!(refused.unwrap_err(), ImportRefusal::BothChanged);
    let (outcome, transition) = bring(&import, Some((&own, Some(&known))), tick(3, 5));
    assert_eq!((outcome, transition.is_changed), (ImportOutcome::Ahead, false));
    let refused = Job::import(&import, OrgId::DEFAULT, Some((&own, None)), tick(3, 5));
    assert_eq!(refused.unwrap_err(), ImportRefusal::Own);
    // A job that was exported and has not changed since equals the ledger's.
    let mut written_back = later.clone();
    written_back.state.updated_at = own.updated_at;
    (written_back.state.stage, written_back.state.progress) = (own.stage.clone(), own.progress);
    written_back.state.result = own.result_at.map(|_| Json::from_trusted("1"));
    for known in [Some(&known), None] {
        let (outcome, transition) = bring(&written_back, Some((&own, known)), tick(3, 5));
        assert_eq!((outcome, transition.is_changed), (ImportOutcome::Unchanged, false));
    }

    // Inferred entries match whatever their time.
    let mut inferred = import.clone();
    inferred.past.iter_mut().for_each(|past| past.is_inferred = true);
    let mut redated = inferred.clone();
    redated.digest = Digest([3; 32]);
    redated.state = state(JobStatus::Failed, -60);
    redated.past[1].ts = time(-60);
    redated.past.push(Past { is_inferred: true, ..past(-60, Some(JobStatus::Running), JobStatus::Failed) });
    let transition = bring(&redated, Some((&job, Some(&known))), tick(3, 4)).1;
    let kinds: Vec<_> = transition.events.iter().map(|event| (event.kind, event.prev_status)).collect();
    let running = Some(JobStatus::Running);
    assert_eq!(kinds, [(EventKind::Failed, running), (EventKind::Imported, running)]);
    let mut other = later.clone();
    other.spec = Arc::new(JobSpec { job_type: "other".into(), ..(*import.spec).clone() });
    let (outcome, transition) = bring(&other, Some((&job, Some(&known))), tick(3, 4));
    assert_eq!((outcome, transition.job.status), (ImportOutcome::Updated, JobStatus::Succeeded));
    assert_eq!(transition.job.spec, job.spec, "what was asked for stays, where the job stands does not");
}

#[test]
fn an_old_worker_may_say_again_how_a_job_ended_elsewhere() {
    let mut import = running();
    import.state = ImportedState { result: Some(Json::from_trusted("1")), ..state(JobStatus::Succeeded, -70) };
    let job = bring(&import, None, tick(0, 1)).1.job;
    let reach = |outcome| {
        let Some(Step::End(ending)) = ending(outcome) else { unreachable!("it is an ending") };
        job.apply(
            &Command::LegacyReport(LegacyReport { to: Some(Target::Ended(ending)), news: News::default() }),
            tick(1, 4),
        )
    };
    for same in [Some(Json::from_trusted("1")), None] {
        assert!(!reach(Outcome::Succeeded { result: same }).unwrap().is_changed);
    }
    let refused = Err(TransitionError::InvalidTransition { current: JobStatus::Succeeded });
    assert_eq!(reach(Outcome::Failed { result: None, error: error(), retryable: true, retry_after: None }), refused);
}

fn any_status() -> impl Strategy<Value = JobStatus> {
    prop::sample::select(&JobStatus::ALL[..])
}

prop_compose! {
    fn any_state()(
        status in any_status(),
        attempt in 0i32..4,
        stage in prop::option::of("[ab]"),
        progress in prop::option::of(0u8..=100),
        has_result: bool,
        has_error: bool,
        // In any order, and also in the future.
        [created_at, updated_at] in [-100i64..10, -100i64..10],
        [started_at, finished_at] in [prop::option::of(-100i64..10), prop::option::of(-100i64..10)],
    ) -> ImportedState {
        ImportedState {
            status,
            attempt,
            stage: stage.map(Arc::from),
            progress,
            result: has_result.then(|| Json::from_trusted("[1]")),
            error: has_error.then(error),
            created_at: time(created_at),
            updated_at: time(updated_at),
            started_at: started_at.map(time),
            finished_at: finished_at.map(time),
        }
    }
}

prop_compose! {
    fn any_import()(
        state in any_state(),
        happened in prop::collection::vec((-100i64..10, prop::option::of(any_status()), any_status()), 0..6),
        digest in 0u8..3,
    ) -> Import {
        let first = past(-100, None, JobStatus::Queued);
        let rest = happened.into_iter().map(|(ts, prev, next)| past(ts, prev.or(Some(JobStatus::Queued)), next));
        let past = std::iter::once(first).chain(rest).collect();
        Import { digest: Digest([digest; 32]), state, past, ..running() }
    }
}

proptest! {
    /// A row is the fold of its events, whatever is imported and whatever happens to the job then.
    #[test]
    fn a_row_that_was_brought_in_is_the_fold_of_its_events(
        imports in prop::collection::vec(any_import(), 1..4),
        steps in prop::collection::vec((any_command(), 0i64..20), 0..20),
    ) {
        let (mut events, mut flow, mut known, mut next_seq) = (Vec::new(), Flow::default(), None::<(Job, Mark)>, 1);
        for import in imports {
            let of = known.as_ref().map(|(job, mark)| (job, Some(mark)));
            let brought = Job::import(&import, OrgId::DEFAULT, of, tick(0, next_seq));
            let (_, transition) = brought.expect("nothing has happened here");
            next_seq += transition.events.len() as i64;
            if let Some((before, _)) = &known {
                flow.add_all(&flow_after(before, &transition.events));
            }
            let mark = if transition.is_changed { mark(&import, &transition.job) } else { known.unwrap().1 };
            events.extend(transition.events);
            prop_assert_eq!(Replay::fold(&events), Ok(Replay::of(&transition.job)));
            known = Some((transition.job, mark));
        }
        let (mut job, _) = known.unwrap();
        prop_assert!(job.created_at <= time(0) && job.updated_at <= time(0));
        let mut now = 0;
        for ((command, is_holder), wait) in steps {
            now += wait;
            let command = if is_holder { held_by_its_holder(command, &job) } else { command };
            let Ok(transition) = job.apply(&command, tick(now, next_seq)) else { continue };
            next_seq += transition.events.len() as i64;
            flow.add_all(&flow_after(&job, &transition.events));
            job = transition.job;
            events.extend(transition.events);
        }
        prop_assert_eq!(Replay::fold(&events), Ok(Replay::of(&job)));
        prop_assert_eq!(flow, flow_of(&events), "a row tells as much as its history");
    }
}
