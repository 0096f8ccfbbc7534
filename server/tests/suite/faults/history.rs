//! Callers that note what was acknowledged, and a check that it holds.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use jobledger_client::{
    Claim, Client, Error, Follow, Item, JobStatus, NewJob, Report,
    proto::{ClaimJobsRequest, CreateJobRequest, UpdateJobStatusRequest},
};
use jobledger_server::domain::event::EventKind;
use tokio::{sync::watch, task::JoinSet, time::timeout};

use crate::{
    support::harness::{Database, PATIENCE},
    work::crash::verify,
};

/// The duration of leases: shorter than some faults.
const LEASE: Duration = Duration::from_secs(3);
/// How long a caller without the SDK waits for an answer.
const BARE_PATIENCE: Duration = Duration::from_secs(8);

/// What was acknowledged to all callers.
#[derive(Default)]
struct Told {
    created: HashSet<String>,
    /// Job, attempt and kind of each report.
    reports: HashSet<(String, i32, EventKind)>,
    /// The results that were accepted, by job.
    results: HashMap<String, HashSet<String>>,
    /// The highest `seq` in an answer.
    head: i64,
}

/// The numbers of a run.
#[derive(Debug)]
#[expect(dead_code, reason = "printed")]
pub(super) struct Summary {
    created: usize,
    reports: usize,
    completed: usize,
    /// Completions that were sent twice with different results, of which at most one was accepted.
    contested: usize,
    events: usize,
    lost_attempts: usize,
}

/// The callers of one run, and what was acknowledged to them.
pub(super) struct Callers {
    told: Arc<Mutex<Told>>,
    is_over: Arc<AtomicBool>,
    tasks: JoinSet<()>,
    /// The number of successful calls, by caller.
    done: Vec<watch::Receiver<u64>>,
    subscribers: JoinSet<i64>,
    seen: Vec<watch::Receiver<i64>>,
    contested: Arc<Mutex<usize>>,
}

struct Caller {
    name: String,
    client: Client,
    told: Arc<Mutex<Told>>,
    is_over: Arc<AtomicBool>,
    done: watch::Sender<u64>,
    contested: Arc<Mutex<usize>>,
}

impl Callers {
    /// Starts on each client: callers with the SDK, which retries calls whose outcome is unknown, callers without it,
    /// which don't retry, and a subscriber.
    pub(super) fn start(clients: &[Client], of_each: usize) -> Self {
        let mut callers = Self {
            told: Arc::default(),
            is_over: Arc::default(),
            tasks: JoinSet::new(),
            done: Vec::new(),
            subscribers: JoinSet::new(),
            seen: Vec::new(),
            contested: Arc::default(),
        };
        for (n, client) in clients.iter().enumerate() {
            for m in 0..of_each {
                let sdk = callers.caller(format!("sdk-{n}-{m}"), client);
                callers.tasks.spawn(sdk.run_with_sdk());
                let bare = callers.caller(format!("bare-{n}-{m}"), client);
                callers.tasks.spawn(bare.run_without_sdk());
            }
            let (sender, seen) = watch::channel(0);
            callers.seen.push(seen);
            callers.subscribers.spawn(follow(client.clone(), sender, Arc::clone(&callers.is_over)));
        }
        callers
    }

    fn caller(&mut self, name: String, client: &Client) -> Caller {
        let (done, receiver) = watch::channel(0);
        self.done.push(receiver);
        Caller {
            name,
            client: client.clone(),
            told: Arc::clone(&self.told),
            is_over: Arc::clone(&self.is_over),
            done,
            contested: Arc::clone(&self.contested),
        }
    }

    /// Waits until each caller has completed another call, and each subscriber has received another event.
    pub(super) async fn go_on(&mut self) {
        let lengths: Vec<_> = self.done.iter().map(|done| *done.borrow()).collect();
        for (done, before) in self.done.iter_mut().zip(lengths) {
            let went_on = timeout(PATIENCE, done.wait_for(|now| *now > before)).await.expect("every caller goes on");
            if went_on.is_err() {
                panic!("a caller stopped: {}", reason(&mut self.tasks).await);
            }
        }
        for seen in &mut self.seen {
            let before = *seen.borrow();
            let went_on =
                timeout(PATIENCE, seen.wait_for(|now| *now > before)).await.expect("every subscriber goes on");
            if went_on.is_err() {
                panic!("a subscriber stopped: {}", reason(&mut self.subscribers).await);
            }
        }
    }

    /// Stops the callers and then the subscribers.
    pub(super) async fn end(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        while let Some(ended) = timeout(PATIENCE, self.tasks.join_next()).await.expect("callers end") {
            ended.expect("a caller was told nothing that it should not be");
        }
        // Each subscriber must see every acknowledged event first.
        let head = self.told.lock().unwrap().head;
        for seen in &mut self.seen {
            timeout(PATIENCE, seen.wait_for(|seen| *seen >= head)).await.expect("it sees all that was told").unwrap();
        }
        self.subscribers.shutdown().await;
    }

    /// Compares what was acknowledged with the database.
    pub(super) async fn check(&self, database: &Database) -> Summary {
        let events = verify(database, &HashMap::new()).await;
        let told = self.told.lock().unwrap();
        let mut found: HashSet<(String, i32, EventKind)> = HashSet::new();
        let mut ends: HashMap<String, usize> = HashMap::new();
        let mut results: HashMap<String, String> = HashMap::new();
        for event in &events {
            let id = event.job_id.to_string();
            found.insert((id.clone(), event.attempt, event.kind));
            if event.kind == EventKind::Succeeded {
                *ends.entry(id.clone()).or_default() += 1;
                results.insert(id, event.result.as_ref().map(|result| result.as_str().to_owned()).unwrap_or_default());
            }
        }
        for id in &told.created {
            assert!(found.contains(&(id.clone(), 0, EventKind::Created)), "{id} was acknowledged, and is lost");
        }
        for report in &told.reports {
            assert!(found.contains(report), "{report:?} was acknowledged, and is lost");
        }
        for (id, accepted) in &told.results {
            assert_eq!(accepted.len(), 1, "{id} ended more than once: {accepted:?}");
            let result = results.get(id).expect("an end that was acknowledged is there");
            assert!(accepted.contains(result), "{id} was said to have ended with {accepted:?}, not {result}");
        }
        assert!(ends.values().all(|ends| *ends == 1), "a job ended twice");
        Summary {
            created: told.created.len(),
            reports: told.reports.len(),
            completed: told.results.len(),
            contested: *self.contested.lock().unwrap(),
            events: events.len(),
            lost_attempts: events.iter().filter(|event| event.kind == EventKind::Lost).count(),
        }
    }
}

/// Returns why one of the tasks panicked.
async fn reason<T: 'static>(tasks: &mut JoinSet<T>) -> String {
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            return error.to_string();
        }
    }
    "nobody panicked".to_owned()
}

/// Checks that a subscriber gets every event once, in order.
async fn follow(client: Client, seen: watch::Sender<i64>, is_over: Arc<AtomicBool>) -> i64 {
    let mut events = loop {
        match client.subscribe(Follow::org().after(0)).await {
            Ok(events) => break events,
            Err(error) => assert!(may_be_told(&error), "a subscriber was told {error:?}"),
        }
    };
    let mut last = 0;
    while let Some(item) = events.next().await {
        match item {
            Ok(Item::Event(event)) => {
                assert_eq!(event.seq, last + 1, "nothing is missing, nothing comes twice");
                last = event.seq;
                seen.send_replace(last);
            }
            Ok(_) => {}
            Err(error) => panic!("a subscriber was told {error:?}"),
        }
        if is_over.load(Ordering::SeqCst) && seen.is_closed() {
            break;
        }
    }
    last
}

/// Whether a caller may get this error while there are faults.
fn may_be_told(error: &Error) -> bool {
    match error {
        Error::Unavailable { .. } | Error::DeadlineExceeded | Error::LeaseLost | Error::Exhausted { .. } => true,
        // The call was retried: it had taken effect, and another caller went on with the job.
        Error::InvalidTransition { .. } => true,
        _ => false,
    }
}

impl Caller {
    async fn run_with_sdk(self) {
        let mut n = 0;
        while !self.is_over.load(Ordering::SeqCst) {
            n += 1;
            let name = format!("{}-{n}", self.name);
            if let Some(created) = self.noted(self.client.create(NewJob::new("t").idempotency_key(&name)).await) {
                self.note_created(&created.job);
            }
            let claim = Claim::new(&self.name).lease(LEASE).max_jobs(2).wait(Duration::from_millis(200));
            let held_until = Instant::now() + LEASE;
            for lease in self.noted(self.client.claim(claim).await).unwrap_or_default() {
                let Some(job) = lease.job else { panic!("a lease of a job") };
                let report = |report: Report| report.lease(&lease.lease_token);
                let progress = report(Report::progress(&job.id).percent(50));
                if let Some(updated) = self.noted_holding(held_until, self.client.update(progress).await) {
                    self.note_report(&updated.job, EventKind::Progress);
                }
                let done = report(Report::succeeded(&job.id)).result(&name).expect("it has a JSON form");
                if let Some(updated) = self.noted_holding(held_until, self.client.update(done).await) {
                    self.note_end(&updated.job, &name);
                    self.read_back(&updated.job).await;
                }
            }
        }
    }

    async fn run_without_sdk(self) {
        let mut n = 0;
        while !self.is_over.load(Ordering::SeqCst) {
            n += 1;
            let name = format!("{}-{n}", self.name);
            let request = CreateJobRequest { r#type: "t".to_owned(), ..Default::default() };
            let mut service = self.client.raw();
            if let Some(created) = self.bare(service.create_job(request)).await {
                self.note_created(&created.job.expect("a job"));
            }
            let claim: ClaimJobsRequest = Claim::new(&self.name).lease(LEASE).max_jobs(1).into();
            let claimed = self.bare(service.claim_jobs(claim)).await;
            for lease in claimed.map(|claimed| claimed.leases).unwrap_or_default() {
                let id = lease.job.expect("a lease of a job").id;
                // Two different results are reported at once. The server must accept only one.
                *self.contested.lock().unwrap() += 1;
                let say = async |which: &str| {
                    let result = format!("{name}-{which}");
                    let done =
                        Report::succeeded(&id).lease(&lease.lease_token).result(&result).expect("it has a JSON form");
                    let request: UpdateJobStatusRequest = done.into();
                    let mut service = self.client.raw();
                    if let Some(updated) = self.bare(service.update_job_status(request)).await {
                        self.note_end(&updated.job.expect("a job"), &result);
                    }
                };
                tokio::join!(say("a"), say("b"));
            }
        }
    }

    /// A read after an acknowledgement must not return an older job.
    async fn read_back(&self, job: &jobledger_client::Job) {
        if let Some(read) = self.noted(self.client.get(&job.id).await) {
            assert!(read.last_seq >= job.last_seq, "{} was read as it had been", job.id);
            assert_eq!(read.status(), JobStatus::Succeeded);
        }
    }

    async fn bare<T>(&self, call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>) -> Option<T> {
        let answer = timeout(BARE_PATIENCE, call).await.ok()?;
        self.noted(answer.map(tonic::Response::into_inner).map_err(Error::from))
    }

    /// As [`Caller::noted`], for a call with a lease. No clock and no fault may end the lease before `until`.
    fn noted_holding<T>(&self, until: Instant, answer: Result<T, Error>) -> Option<T> {
        if matches!(answer, Err(Error::LeaseLost)) {
            let early = until.saturating_duration_since(Instant::now());
            assert!(early.is_zero(), "{} lost a lease {early:?} before its time", self.name);
        }
        self.noted(answer)
    }

    /// Counts a successful call and returns its answer. Panics at an error that no caller may get.
    fn noted<T>(&self, answer: Result<T, Error>) -> Option<T> {
        match answer {
            Ok(answer) => {
                self.done.send_modify(|done| *done += 1);
                Some(answer)
            }
            Err(error) => {
                assert!(may_be_told(&error), "{} was told {error:?}", self.name);
                None
            }
        }
    }

    fn note_created(&self, job: &jobledger_client::Job) {
        let mut told = self.told.lock().unwrap();
        told.created.insert(job.id.clone());
        told.head = told.head.max(job.last_seq);
    }

    fn note_report(&self, job: &jobledger_client::Job, kind: EventKind) {
        let mut told = self.told.lock().unwrap();
        told.reports.insert((job.id.clone(), job.attempt, kind));
        told.head = told.head.max(job.last_seq);
    }

    fn note_end(&self, job: &jobledger_client::Job, result: &str) {
        self.note_report(job, EventKind::Succeeded);
        let result = format!("{result:?}");
        self.told.lock().unwrap().results.entry(job.id.clone()).or_default().insert(result);
    }
}
