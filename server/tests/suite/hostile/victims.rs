//! The clients that don't attack: one org that makes every kind of call at a steady pace, and how its calls fare.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use jobledger_client::{
    Client, Follow, Item, NewJob, Report, Token,
    proto::{
        ClaimJobsRequest, CreateJobRequest, GetJobRequest, GetStatisticsRequest, HeartbeatRequest, JobView,
        LeaseHeartbeat, ListJobsRequest, UpdateJobStatusRequest,
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};

/// The pause between calls of a kind.
const PACE: Duration = Duration::from_millis(25);
/// How many new tokens are presented a second.
pub(super) const TOKENS_A_SECOND: u32 = 10;
const PACE_OF_TOKENS: Duration = Duration::from_millis(1_000 / TOKENS_A_SECOND as u64);

/// How long calls took and when they ended, by kind, and which failed.
#[derive(Default)]
struct Record {
    took: BTreeMap<&'static str, Vec<(Duration, Instant)>>,
    failed: Vec<String>,
}

/// How the calls of one kind fared within some time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    /// Answered calls a second.
    pub(super) rate: f64,
    pub(super) p99: Duration,
    /// When the slowest calls ended.
    slowest: [Duration; 3],
}

impl fmt::Display for Kind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, second, third] = self.slowest.map(|at| at.as_secs_f64());
        write!(out, "{:.0}/s {:.1?} (slowest at {first:.1}, {second:.1}, {third:.1} s)", self.rate, self.p99)
    }
}

/// The running clients of the org that doesn't attack.
pub(super) struct Victims {
    record: Arc<Mutex<Record>>,
    _tasks: JoinSet<()>,
}

/// One of these clients.
#[derive(Clone)]
struct Victim {
    client: Client,
    record: Arc<Mutex<Record>>,
}

impl Victims {
    /// Starts the clients with this token. Each of the `fresh` tokens is presented once.
    pub(super) fn start(address: &str, token: &str, fresh: Vec<String>) -> Self {
        let record = Arc::<Mutex<Record>>::default();
        let client = client(address, token);
        let victim = Victim { client, record: Arc::clone(&record) };
        let mut tasks = JoinSet::new();
        let spawn = |tasks: &mut JoinSet<()>, of: fn(Victim) -> Tries| tasks.spawn(of(victim.clone()));
        spawn(&mut tasks, |victim| Box::pin(victim.creates()));
        spawn(&mut tasks, |victim| Box::pin(victim.reads()));
        spawn(&mut tasks, |victim| Box::pin(victim.lists()));
        spawn(&mut tasks, |victim| Box::pin(victim.counts()));
        spawn(&mut tasks, |victim| Box::pin(victim.works()));
        spawn(&mut tasks, |victim| Box::pin(victim.subscribes()));
        spawn(&mut tasks, |victim| Box::pin(victim.follows()));
        tasks.spawn(victim.clone().probes(address.to_owned()));
        tasks.spawn(victim.clone().presents(address.to_owned(), fresh));
        Self { record, _tasks: tasks }
    }

    /// Measures the calls that are answered within this time. Panics if a call failed.
    pub(super) async fn measure(&self, time: Duration) -> BTreeMap<&'static str, Kind> {
        self.measure_while(time, |_, _| false).await
    }

    /// Measures the calls that are answered within this time, or while `goes_on` holds of the number of kinds that were answered
    /// and the time that has passed. Panics if a call failed.
    pub(super) async fn measure_while(
        &self,
        time: Duration,
        goes_on: impl Fn(usize, Duration) -> bool,
    ) -> BTreeMap<&'static str, Kind> {
        let began = Instant::now();
        std::mem::take(&mut self.record.lock().unwrap().took);
        sleep(time).await;
        let answered = || self.record.lock().unwrap().took.len();
        while goes_on(answered(), began.elapsed()) {
            sleep(Duration::from_millis(20)).await;
        }
        let time = began.elapsed();
        let Record { took, failed } = std::mem::take(&mut *self.record.lock().unwrap());
        assert!(failed.is_empty(), "calls of those who don't attack fail: {failed:#?}");
        let kind = |(kind, mut took): (&'static str, Vec<(Duration, Instant)>)| {
            took.sort_unstable();
            // By nearest rank.
            let (p99, _) = took[(took.len() * 99).div_ceil(100) - 1];
            let slowest = [1, 2, 3].map(|n| took[took.len().saturating_sub(n)].1 - began);
            (kind, Kind { rate: took.len() as f64 / time.as_secs_f64(), p99, slowest })
        };
        took.into_iter().map(kind).collect()
    }
}

type Tries = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

pub(super) fn client(address: &str, token: &str) -> Client {
    let builder = Client::builder(format!("http://{address}")).token(Token::new(token).unwrap());
    builder.timeout(Duration::from_secs(60)).build().unwrap()
}

/// Makes calls at this pace. A late call delays the following ones.
async fn at_pace<F: Future<Output = ()>>(pace: Duration, mut call: impl FnMut() -> F) {
    let mut ticks = interval(pace);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        call().await;
    }
}

impl Victim {
    /// Makes a call and records how long it takes. Returns the answer, or `None` if the call failed.
    async fn call<T>(&self, kind: &'static str, call: impl Future<Output = Result<T, tonic::Status>>) -> Option<T> {
        self.since(Instant::now(), kind, call).await
    }

    async fn since<T>(
        &self,
        began: Instant,
        kind: &'static str,
        call: impl Future<Output = Result<T, tonic::Status>>,
    ) -> Option<T> {
        let answer = call.await;
        let mut record = self.record.lock().unwrap();
        match answer {
            Ok(answer) => {
                record.took.entry(kind).or_default().push((began.elapsed(), Instant::now()));
                Some(answer)
            }
            Err(error) => {
                record.failed.push(format!("{kind} after {:?}: {error:?}", began.elapsed()));
                None
            }
        }
    }

    /// Creates a job of a type, without recording the call.
    async fn create(&self, job_type: &str) -> Result<String, tonic::Status> {
        let created = self.client.raw().create_job(CreateJobRequest::from(NewJob::new(job_type))).await?;
        Ok(created.into_inner().job.expect("it has a job").id)
    }

    async fn creates(self) {
        at_pace(PACE, async || drop(self.call("create", self.create("created")).await)).await;
    }

    async fn reads(self) {
        let job_id = self.create("read").await.expect("there is nothing in its way yet");
        let request = || GetJobRequest { job_id: job_id.clone(), ..Default::default() };
        at_pace(PACE, async || drop(self.call("get", self.client.raw().get_job(request())).await)).await;
    }

    async fn lists(self) {
        let request = || ListJobsRequest { page_size: 20, view: JobView::Full.into(), ..Default::default() };
        at_pace(PACE, async || drop(self.call("list", self.client.raw().list_jobs(request())).await)).await;
    }

    async fn counts(self) {
        let request = GetStatisticsRequest::default;
        at_pace(PACE, async || drop(self.call("statistics", self.client.raw().get_statistics(request())).await)).await;
    }

    /// Claims a job that is created while the claim waits, sends a heartbeat, and reports success.
    async fn works(self) {
        at_pace(PACE, async || {
            let claim = ClaimJobsRequest {
                worker_id: "worker".to_owned(),
                types: vec!["worked".to_owned()],
                wait: Some(prost_types::Duration { seconds: 30, nanos: 0 }),
                ..Default::default()
            };
            let mut service = self.client.raw();
            let claimed = tokio::spawn(async move { service.claim_jobs(claim).await });
            sleep(Duration::from_millis(10)).await;
            let began = Instant::now();
            if self.call("create", self.create("worked")).await.is_none() {
                return;
            }
            let answer = async { claimed.await.expect("it ends") };
            let Some(answer) = self.since(began, "claim", answer).await else { return };
            let Some(lease) = answer.into_inner().leases.into_iter().next() else { return };
            let lease_token = lease.lease_token.clone();
            let leases = vec![LeaseHeartbeat { lease_token, progress: Some(1), ..Default::default() }];
            let beat = HeartbeatRequest { worker_id: "worker".to_owned(), leases, ..Default::default() };
            self.call("heartbeat", self.client.raw().heartbeat(beat)).await;
            let report = Report::succeeded(lease.job.expect("it has a job").id).lease(lease.lease_token);
            self.call("update", self.client.raw().update_job_status(UpdateJobStatusRequest::from(report))).await;
        })
        .await;
    }

    /// Streams a little of the past to its end.
    async fn subscribes(self) {
        at_pace(PACE, async || {
            let head = self.client.raw().get_statistics(GetStatisticsRequest::default()).await;
            let Ok(head) = head.map(|answer| answer.into_inner().as_of_seq) else { return };
            let request = Follow::org().after((head - 10).max(0)).history_only();
            let stream = async {
                let mut stream = self
                    .client
                    .raw()
                    .stream_job_events(jobledger_client::proto::StreamJobEventsRequest::from(request))
                    .await?
                    .into_inner();
                while stream.message().await?.is_some() {}
                Ok(())
            };
            self.call("new stream", stream).await;
        })
        .await;
    }

    /// Measures the time from a create until an open stream delivers its event.
    async fn follows(self) {
        let mut events = self.client.subscribe(Follow::org().types(["followed"])).await.expect("nothing is in its way");
        let (record, events) = (self.clone(), &mut events);
        let mut ticks = interval(PACE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let began = Instant::now();
            let Some(id) = self.call("create", self.create("followed")).await else { continue };
            let told = async {
                loop {
                    match events.next().await {
                        Some(Ok(Item::Event(event))) if event.job_id == id => return Ok(()),
                        Some(Ok(_)) => {}
                        other => return Err(tonic::Status::unknown(format!("the stream ends: {other:?}"))),
                    }
                }
            };
            record.since(began, "live stream", told).await;
        }
    }

    /// Checks readiness over a new connection each time.
    async fn probes(self, address: String) {
        at_pace(PACE, async || {
            let probe = async {
                let mut stream = TcpStream::connect(&address).await?;
                stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer).await?;
                Ok::<_, std::io::Error>(answer)
            };
            let is_ready = async {
                match probe.await {
                    Ok(answer) if answer.starts_with("HTTP/1.1 200") => Ok(()),
                    other => Err(tonic::Status::unknown(format!("it is not ready: {other:?}"))),
                }
            };
            self.call("readiness", is_ready).await;
        })
        .await;
    }

    /// Presents tokens that the server has to look up.
    async fn presents(self, address: String, fresh: Vec<String>) {
        // Whoever comes again is forgotten by then.
        let mut fresh = fresh.iter().cycle();
        at_pace(PACE_OF_TOKENS, || {
            let token = fresh.next().expect("there are tokens");
            let client = client(&address, token);
            let victim = self.clone();
            async move {
                let request = ListJobsRequest { page_size: 1, ..Default::default() };
                victim.call("new credential", client.raw().list_jobs(request)).await;
            }
        })
        .await;
    }
}
