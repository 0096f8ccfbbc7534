//! Linearizability: concurrent calls answer as if each had happened at one moment between its beginning and its end,
//! and the log is the order of those moments.
//!
//! Callers make random calls on a few jobs, with lease tokens that they share. Then a model that shares no code with
//! the server goes along the log. Each event must be allowed where it stands. Each call that changed something must be
//! one event within its time. Every other answer must be true at some `seq` within the call's time.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use jobledger_client::{
    Claim, Client, Edit, Error, JobStatus, NewJob, Report, RetryPolicy,
    proto::{
        CancelJobRequest, ClaimJobsRequest, CreateJobRequest, EraseJobRequest, GetJobRequest, HeartbeatRequest, Job,
        LeaseHeartbeat, RetryJobRequest, UpdateJobRequest, UpdateJobStatusRequest,
    },
};
use jobledger_server::domain::{
    clock::Time,
    event::{EventKind, JobEvent},
    status::JobStatus as Status,
};
use tokio::{task::JoinSet, time::sleep};

use crate::{
    support::harness::{Database, PATIENCE, on_both_databases, short_or_long},
    support::program::Program,
    support::seeded::Seeded,
    work::crash::verify,
};

on_both_databases! {
    calls_that_are_made_at_once_have_an_order,
}

const CALLERS: usize = 8;
/// The number of jobs that callers choose from.
const JOBS: usize = 5;
const LEASE: Duration = Duration::from_secs(1);

/// A lease that callers share.
#[derive(Debug, Clone)]
struct Held {
    job: String,
    attempt: i32,
    token: String,
}

#[derive(Debug, Clone)]
enum Call {
    Create,
    Claim,
    /// Under a lease, with a stage that no other call sets.
    Progress(Held, String),
    /// Under a lease, with a result.
    Succeed(Held, String),
    Fail(Held),
    Release(Held),
    Heartbeat(Held),
    Cancel(String),
    Retry(String),
    /// With labels that no other call sets.
    Edit(String, String),
    Erase(String),
    Get(String),
}

/// The answer to a call.
#[derive(Debug, Clone)]
enum Told {
    Job(Box<Job>),
    Leases(Vec<Job>),
    /// The lease lasts until this time.
    Until(Time),
    LeaseLost,
    InvalidTransition,
}

/// A call with its answer, and when it began and ended.
#[derive(Debug)]
struct Made {
    call: Call,
    told: Told,
    began: Instant,
    ended: Instant,
    /// The highest `seq` that was acknowledged to any caller before it began.
    after: i64,
}

/// What the callers share.
struct Shared {
    client: Client,
    jobs: Mutex<Vec<String>>,
    leases: Mutex<Vec<Held>>,
    acknowledged: AtomicI64,
    made: Mutex<Vec<Made>>,
    is_over: AtomicBool,
}

fn job(told: Option<Job>) -> Told {
    Told::Job(Box::new(told.expect("a job")))
}

fn forget_but(last: usize, of: &mut Vec<impl Sized>) {
    of.drain(..of.len().saturating_sub(last));
}

impl Shared {
    fn draw(&self, random: &mut Seeded) -> Call {
        let one = |random: &mut Seeded, of: usize| random.below(of as u64) as usize;
        let jobs = self.jobs.lock().unwrap();
        let leases = self.leases.lock().unwrap();
        let what = random.below(23);
        if jobs.is_empty() || what == 0 {
            return Call::Create;
        }
        let job = jobs[one(random, jobs.len())].clone();
        match what {
            1..=3 => return Call::Get(job),
            4 => return Call::Cancel(job),
            5..=6 => return Call::Retry(job),
            20..=21 => return Call::Edit(job, random.next().to_string()),
            22 => return Call::Erase(job),
            _ if leases.is_empty() => return Call::Claim,
            _ => {}
        }
        let lease = leases[one(random, leases.len())].clone();
        let unique = random.next().to_string();
        match what {
            7..=10 => Call::Claim,
            11..=12 => Call::Progress(lease, unique),
            // Another caller may report the same result, or the other one.
            13..=14 => Call::Succeed(lease, ["a", "b"][one(random, 2)].to_owned()),
            15..=16 => Call::Fail(lease),
            17 => Call::Release(lease),
            _ => Call::Heartbeat(lease),
        }
    }

    async fn make(&self, call: &Call) -> Result<Told, Error> {
        let mut service = self.client.raw();
        let mut update = async |report: Report, held: &Held| {
            let request: UpdateJobStatusRequest = report.lease(&held.token).into();
            Ok(job(service.update_job_status(request).await?.into_inner().job))
        };
        match call {
            Call::Progress(held, stage) => update(Report::progress(&held.job).stage(stage), held).await,
            Call::Succeed(held, result) => update(Report::succeeded(&held.job).result(result)?, held).await,
            Call::Fail(held) => update(Report::failed(&held.job, "E", "it was so"), held).await,
            Call::Release(held) => update(Report::released(&held.job), held).await,
            Call::Create => {
                let soon = jobledger_client::prost_types::Duration { seconds: 0, nanos: 1_000_000 };
                let policy = RetryPolicy { initial_backoff: Some(soon), max_backoff: Some(soon), ..Default::default() };
                let request: CreateJobRequest = NewJob::new("t").max_attempts(2).retry_policy(policy).into();
                Ok(job(service.create_job(request).await?.into_inner().job))
            }
            Call::Claim => {
                let request: ClaimJobsRequest = Claim::new("w").lease(LEASE).max_jobs(2).into();
                let mut jobs = Vec::new();
                for lease in service.claim_jobs(request).await?.into_inner().leases {
                    let job = lease.job.expect("a job");
                    let held = Held { job: job.id.clone(), attempt: job.attempt, token: lease.lease_token };
                    let mut leases = self.leases.lock().unwrap();
                    leases.push(held);
                    forget_but(JOBS, &mut leases);
                    jobs.push(job);
                }
                Ok(Told::Leases(jobs))
            }
            Call::Heartbeat(held) => {
                let lease = LeaseHeartbeat { lease_token: held.token.clone(), ..Default::default() };
                let request = HeartbeatRequest { worker_id: "w".to_owned(), leases: vec![lease], extend_by: None };
                let result = service.heartbeat(request).await?.into_inner().results.remove(0);
                Ok(result.expires_at.map_or(Told::LeaseLost, |end| {
                    let nanos = u32::try_from(end.nanos).expect("a valid time");
                    Told::Until(Time::from_timestamp(end.seconds, nanos).expect("a valid time"))
                }))
            }
            Call::Cancel(id) => {
                let request = CancelJobRequest { job_id: id.clone(), ..Default::default() };
                Ok(job(service.cancel_job(request).await?.into_inner().job))
            }
            Call::Retry(id) => {
                let request = RetryJobRequest { job_id: id.clone(), ..Default::default() };
                Ok(job(service.retry_job(request).await?.into_inner().job))
            }
            Call::Edit(id, label) => {
                let request: UpdateJobRequest = Edit::of(id).labels([("of", label)]).at_once().into();
                Ok(job(service.update_job(request).await?.into_inner().job))
            }
            Call::Erase(id) => {
                let request = EraseJobRequest { job_id: id.clone(), ..Default::default() };
                Ok(job(service.erase_job(request).await?.into_inner().job))
            }
            Call::Get(id) => {
                let request = GetJobRequest { job_id: id.clone(), ..Default::default() };
                Ok(job(service.get_job(request).await?.into_inner().job))
            }
        }
    }

    async fn run(&self, mut random: Seeded) {
        while !self.is_over.load(Ordering::SeqCst) {
            let call = self.draw(&mut random);
            let after = self.acknowledged.load(Ordering::SeqCst);
            let began = Instant::now();
            let told = match self.make(&call).await {
                Ok(told) => told,
                Err(Error::LeaseLost) => Told::LeaseLost,
                Err(Error::InvalidTransition { .. }) => Told::InvalidTransition,
                Err(error) => panic!("{call:?}: {error:?}"),
            };
            let ended = Instant::now();
            let told_of: &[Job] = match &told {
                Told::Job(job) => std::slice::from_ref(&**job),
                Told::Leases(jobs) => jobs,
                _ => &[],
            };
            for job in told_of {
                self.acknowledged.fetch_max(job.last_seq, Ordering::SeqCst);
            }
            if let (Call::Create, Told::Job(job)) = (&call, &told) {
                let mut jobs = self.jobs.lock().unwrap();
                jobs.push(job.id.clone());
                forget_but(JOBS, &mut jobs);
            }
            self.made.lock().unwrap().push(Made { call, told, began, ended, after });
            // Sometimes a caller is so slow that leases expire.
            if random.below(50) == 0 {
                sleep(LEASE + Duration::from_millis(random.below(1_000))).await;
            }
        }
    }
}

/// The state of a job in the model.
#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    status: Status,
    attempt: i32,
    cancel_requested: bool,
    is_erased: bool,
    /// Failures since the job was last queued afresh.
    failures: i32,
    last_seq: i64,
}

impl State {
    fn is_held_by(&self, held: &Held) -> bool {
        self.status == Status::Running && self.attempt == held.attempt
    }

    /// The state after an event, which must be allowed in this one. All jobs here are claimed, and fail twice at most.
    fn after(&self, event: &JobEvent) -> Self {
        let Self { status, attempt, cancel_requested, is_erased, failures, .. } = *self;
        let last_seq = event.seq;
        let is_allowed = match event.kind {
            EventKind::Claimed => status == Status::Queued && event.attempt == attempt + 1,
            EventKind::Progress | EventKind::Succeeded => status == Status::Running,
            EventKind::CancelRequested => status == Status::Running && !cancel_requested,
            // If cancellation was requested, the end of the attempt is `Canceled` instead.
            EventKind::Failed | EventKind::Released | EventKind::Lost => status == Status::Running && !cancel_requested,
            EventKind::RetryScheduled => status == Status::Failed && failures < 2,
            EventKind::DeadLettered => status == Status::Failed && failures == 2,
            EventKind::Canceled => status == Status::Queued || status == Status::Running && cancel_requested,
            EventKind::Requeued => {
                !is_erased && matches!(status, Status::Failed | Status::DeadLetter | Status::Canceled)
            }
            EventKind::Erased => !is_erased && status.is_terminal(),
            EventKind::Edited => status == Status::Queued,
            EventKind::Created | EventKind::Started | EventKind::Imported => false,
        };
        assert!(is_allowed, "{event:?} happened to {self:?}");
        assert_eq!(event.prev_status, Some(status), "{event:?}");
        let next = Self { status: event.next_status, attempt: event.attempt, last_seq, ..self.clone() };
        match event.kind {
            EventKind::Claimed => Self { status: Status::Running, ..next },
            EventKind::Progress => Self { status: Status::Running, ..next },
            EventKind::CancelRequested => Self { status: Status::Running, cancel_requested: true, ..next },
            EventKind::Succeeded => Self { status: Status::Succeeded, ..next },
            EventKind::Failed => Self { status: Status::Failed, failures: failures + 1, ..next },
            EventKind::Released | EventKind::RetryScheduled | EventKind::Lost => {
                Self { status: Status::Queued, ..next }
            }
            EventKind::DeadLettered => Self { status: Status::DeadLetter, ..next },
            EventKind::Edited => Self { status: Status::Queued, ..next },
            EventKind::Canceled => Self { status: Status::Canceled, ..next },
            EventKind::Erased => Self { status, is_erased: true, ..next },
            _ => Self { status: Status::Queued, failures: 0, cancel_requested: false, ..next },
        }
    }
}

/// The log, and what the model derives from it.
struct Model {
    events: Vec<Arc<JobEvent>>,
    /// The state of each job after each of its events.
    jobs: HashMap<String, Vec<State>>,
}

impl Model {
    fn of(events: Vec<Arc<JobEvent>>) -> Self {
        let mut jobs: HashMap<String, Vec<State>> = HashMap::new();
        for event in &events {
            let states = jobs.entry(event.job_id.to_string()).or_default();
            let next = match states.last() {
                Some(state) => state.after(event),
                None => {
                    assert_eq!((event.kind, event.attempt), (EventKind::Created, 0), "{event:?} is a job's first");
                    State {
                        status: Status::Queued,
                        attempt: 0,
                        cancel_requested: false,
                        is_erased: false,
                        failures: 0,
                        last_seq: event.seq,
                    }
                }
            };
            assert_eq!(next.status, event.next_status, "{event:?}");
            states.push(next);
        }
        Self { events, jobs }
    }

    /// Whether a job was in such a state at some `seq` of this range.
    fn was(&self, job: &str, (after, until): (i64, i64), like: impl Fn(&State) -> bool) -> bool {
        let states = &self.jobs[job];
        let first = states.partition_point(|state| state.last_seq <= after).saturating_sub(1);
        states[first..].iter().take_while(|state| state.last_seq <= until.max(states[first].last_seq)).any(like)
    }

    /// The events of these kinds in an attempt.
    fn of_attempt(&self, held: &Held, kinds: &[EventKind]) -> Vec<&JobEvent> {
        let is_wanted = |event: &&Arc<JobEvent>| {
            event.job_id.to_string() == held.job && event.attempt == held.attempt && kinds.contains(&event.kind)
        };
        self.events.iter().filter(is_wanted).map(|event| &**event).collect()
    }

    /// True if the job is erased in the end.
    fn is_erased(&self, job: &str) -> bool {
        self.jobs.get(job).and_then(|states| states.last()).is_some_and(|last| last.is_erased)
    }

    /// The `seq`s of the events that a call must have written.
    fn made_by(&self, made: &Made) -> Vec<i64> {
        match (&made.call, &made.told) {
            (Call::Create, Told::Job(job)) => vec![job.last_seq],
            (Call::Retry(_) | Call::Edit(..), Told::Job(job)) => vec![job.last_seq],
            (Call::Claim, Told::Leases(jobs)) => jobs.iter().map(|job| job.last_seq).collect(),
            // Whose progress it was is gone with the stage.
            (Call::Progress(held, _), Told::Job(_)) if self.is_erased(&held.job) => Vec::new(),
            (Call::Progress(held, stage), Told::Job(_)) => {
                let progress = self.of_attempt(held, &[EventKind::Progress]);
                let mine = progress.iter().find(|event| event.stage.as_deref() == Some(stage));
                vec![mine.unwrap_or_else(|| panic!("{made:?} left nothing")).seq]
            }
            _ => Vec::new(),
        }
    }

    /// Whether a call's answer was true at some `seq` within its time.
    fn explains(&self, made: &Made, time: (i64, i64)) -> bool {
        let is_of = |event: &JobEvent| event.seq <= time.1;
        match (&made.call, &made.told) {
            // `check` looks at the events of these calls.
            (Call::Create | Call::Claim | Call::Progress(..), Told::Job(_) | Told::Leases(_)) => true,
            (Call::Retry(job), Told::Job(told)) => {
                self.events[told.last_seq as usize - 1].kind == EventKind::Requeued && told.id == *job
            }
            (Call::Edit(job, label), Told::Job(told)) => {
                let event = &self.events[told.last_seq as usize - 1];
                let is_it = event.labels.get("of") == Some(label) || self.is_erased(job);
                event.kind == EventKind::Edited && is_it && told.id == *job
            }
            (Call::Erase(job), Told::Job(told)) => {
                self.events[told.last_seq as usize - 1].kind == EventKind::Erased && told.id == *job
            }
            (Call::Erase(job), Told::InvalidTransition) => self.was(job, time, |state| !state.status.is_terminal()),
            (Call::Get(id), Told::Job(job)) => self.was(id, time, |state| {
                state.last_seq == job.last_seq && state.attempt == job.attempt && same(state.status, job.status())
            }),
            (Call::Cancel(job), Told::Job(_)) => self.was(job, time, |state| {
                state.status == Status::Canceled || state.status == Status::Running && state.cancel_requested
            }),
            // The same outcome may have been reported before, but no other one.
            (Call::Succeed(held, result), Told::Job(_)) => {
                let found = self.of_attempt(held, &[EventKind::Succeeded]);
                let said = format!("{result:?}");
                found.iter().any(|event| {
                    let is_it = event.result.as_ref().is_some_and(|text| text.as_str() == said);
                    is_of(event) && (is_it || self.is_erased(&held.job))
                })
            }
            (Call::Fail(held), Told::Job(_)) => {
                let found = self.of_attempt(held, &[EventKind::Failed, EventKind::Canceled]);
                found.iter().any(|event| is_of(event) && event.error.as_ref().is_none_or(|error| &*error.code == "E"))
            }
            (Call::Release(held), Told::Job(_)) => {
                self.of_attempt(held, &[EventKind::Released, EventKind::Canceled]).iter().any(|event| is_of(event))
            }
            (Call::Heartbeat(held), Told::Until(end)) => {
                // The lease must not expire before this end.
                let expired = self
                    .of_attempt(held, &[EventKind::Failed, EventKind::Lost])
                    .into_iter()
                    .find(|event| event.error.as_ref().is_some_and(|error| &*error.code == "LEASE_EXPIRED"));
                expired.is_none_or(|event| event.recorded_at >= *end)
                    && self.was(&held.job, time, |state| state.is_held_by(held))
            }
            (
                Call::Progress(held, _)
                | Call::Succeed(held, _)
                | Call::Fail(held)
                | Call::Release(held)
                | Call::Heartbeat(held),
                Told::LeaseLost,
            ) => self.was(&held.job, time, |state| !state.is_held_by(held)),
            (Call::Cancel(job), Told::InvalidTransition) => self.was(job, time, |state| {
                matches!(state.status, Status::Succeeded | Status::Failed | Status::DeadLetter)
            }),
            (Call::Edit(job, _), Told::InvalidTransition) => {
                self.was(job, time, |state| state.status != Status::Queued)
            }
            (Call::Retry(job), Told::InvalidTransition) => self.was(job, time, |state| {
                state.is_erased || matches!(state.status, Status::Queued | Status::Running | Status::Succeeded)
            }),
            _ => false,
        }
    }
}

fn same(status: Status, told: JobStatus) -> bool {
    told.as_str_name().trim_start_matches("JOB_STATUS_").eq_ignore_ascii_case(status.as_str())
}

/// Checks all answers against the log.
fn check(model: &Model, mut made: Vec<Made>) {
    made.sort_by_key(|made| made.began);
    let head = model.events.len() as i64;
    // A call that began after another one had ended comes after it: its first event ends the other one's time.
    let mut first_of_later = BTreeMap::new();
    let mut first = head + 1;
    let mut owners: HashMap<i64, usize> = HashMap::new();
    for (n, made) in made.iter().enumerate().rev() {
        for seq in model.made_by(made) {
            first = first.min(seq);
            assert!(owners.insert(seq, n).is_none(), "event {seq} is of two calls: {made:?}");
        }
        first_of_later.insert(made.began, first);
    }
    let mut refused = 0;
    for made in &made {
        let until = first_of_later.range(made.ended..).next().map_or(head, |(_, first)| first - 1);
        let time = (made.after, until);
        for seq in model.made_by(made) {
            assert!(made.after < seq && seq <= until, "{made:?}: event {seq} is not within its time, {time:?}");
        }
        assert!(model.explains(made, time), "nothing within its time, {time:?}, explains {made:?}");
        refused += usize::from(matches!(made.told, Told::LeaseLost | Told::InvalidTransition));
    }
    let expired =
        model.events.iter().filter(|event| event.error.as_ref().is_some_and(|error| &*error.code == "LEASE_EXPIRED"));
    println!("{} calls, {refused} refused, {head} events, {} leases that ended", made.len(), expired.count());
}

async fn calls_that_are_made_at_once_have_an_order(database: Database) {
    let seed = Seeded::from_environment("calls at once");
    let program = Program::start_with(&database, &["--log", "error"]);
    let client = Client::builder(format!("http://{}", program.address)).timeout(PATIENCE).build().unwrap();
    let shared = Arc::new(Shared {
        client,
        jobs: Mutex::default(),
        leases: Mutex::default(),
        acknowledged: AtomicI64::new(0),
        made: Mutex::default(),
        is_over: AtomicBool::new(false),
    });
    let mut callers = JoinSet::new();
    for n in 0..CALLERS {
        let shared = Arc::clone(&shared);
        callers.spawn(async move { shared.run(Seeded::new(seed.wrapping_add(n as u64))).await });
    }
    sleep(Duration::from_secs(short_or_long(10, 300))).await;
    shared.is_over.store(true, Ordering::SeqCst);
    while let Some(ended) = callers.join_next().await {
        ended.expect("callers are told nothing that they should not be");
    }
    assert!(program.end_by("TERM").success());
    let model = Model::of(verify(&database, &HashMap::new()).await);
    check(&model, std::mem::take(&mut *shared.made.lock().unwrap()));
}
