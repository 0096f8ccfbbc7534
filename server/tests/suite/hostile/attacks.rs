//! What a tenant with a good credential may do to others, and strangers to all: each goes on until it is dropped, as fast as it can.

use std::{future::Future, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use jobledger_client::{
    Follow, NewJob, RawClient, Report,
    proto::{
        BatchCreateJobsRequest, BatchUpdateJobStatusRequest, CancelJobRequest, ClaimJobsRequest, CreateJobRequest,
        GetJobRequest, GetStatisticsRequest, HeartbeatRequest, JobView, LeaseHeartbeat, ListJobsRequest,
        RetryJobRequest, StreamJobEventsRequest, UpdateJobStatusRequest,
    },
};
use jobledger_server::domain::clock::{Clock as _, SystemClock};
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::sleep,
};
use tonic::Status;
use uuid::Uuid;

use super::{connect, victims::client};
use crate::{
    raw::{DATA, END_HEADERS, END_STREAM, HEADERS, RST_STREAM, Raw, frame, header_block},
    seeded::Seeded,
};

const SERVICE: &str = "/jobledger.v1.JobService/";

/// Whoever attacks.
pub(super) struct Tenant {
    pub(super) address: String,
    pub(super) token: String,
}

/// An attack by a tenant, some of whose choices follow from a number.
pub(super) type Attack = fn(Arc<Tenant>, u64) -> Pin<Box<dyn Future<Output = ()> + Send>>;

/// All of them, by name.
pub(super) const ATTACKS: [(&str, Attack); 24] = [
    ("claims that wait, each with 3.9 MiB", |tenant, _| Box::pin(async move { tenant.heavy_claims().await })),
    ("160 streams of the past that take nothing", |tenant, _| Box::pin(async move { tenant.untaken_streams().await })),
    ("requests of 4 MiB that swell", |tenant, _| Box::pin(async move { tenant.swelling().await })),
    ("300 lists of everything", |tenant, _| Box::pin(async move { tenant.lists().await })),
    ("lists that are reset", |tenant, _| Box::pin(async move { tenant.reset_lists().await })),
    ("statistics of 5,000 types", |tenant, _| Box::pin(async move { tenant.statistics().await })),
    ("6,000 claims that wait, 2,000 calls", |tenant, _| Box::pin(async move { tenant.claims_and_calls().await })),
    ("jobs of a mebibyte", |tenant, _| Box::pin(async move { tenant.large_jobs().await })),
    ("leases guessed", |tenant, seed| Box::pin(async move { tenant.guessed_leases(seed).await })),
    ("2,000 connections of strangers", |tenant, seed| Box::pin(async move { tenant.strangers(seed).await })),
    ("tokens guessed", |tenant, seed| Box::pin(async move { tenant.guessed_tokens(seed).await })),
    ("1,000 streams that match nothing", |tenant, _| Box::pin(async move { tenant.matching_nothing().await })),
    ("creates in batches of 1,000", |tenant, _| Box::pin(async move { tenant.batches().await })),
    ("the past again and again", |tenant, _| Box::pin(async move { tenant.past().await })),
    ("snapshots again and again", |tenant, _| Box::pin(async move { tenant.snapshots().await })),
    ("heartbeats of 1,000 leases", |tenant, seed| Box::pin(async move { tenant.heartbeats(seed).await })),
    ("canceled and retried", |tenant, _| Box::pin(async move { tenant.retries().await })),
    ("one key for all", |tenant, _| Box::pin(async move { tenant.one_key().await })),
    ("a type for each job", |tenant, _| Box::pin(async move { tenant.types().await })),
    ("labels that few have", |tenant, _| Box::pin(async move { tenant.labels().await })),
    ("large jobs, not taken", |tenant, _| Box::pin(async move { tenant.untaken_jobs().await })),
    ("all due at once", |tenant, _| Box::pin(async move { tenant.due_at_once().await })),
    ("leases of a second", |tenant, _| Box::pin(async move { tenant.short_leases().await })),
    ("noise with a good token", |tenant, seed| Box::pin(async move { tenant.noise(seed).await })),
];

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

fn batch(jobs: impl IntoIterator<Item = NewJob>) -> BatchCreateJobsRequest {
    BatchCreateJobsRequest { requests: jobs.into_iter().map(CreateJobRequest::from).collect() }
}

impl Tenant {
    /// What the attacks find: jobs in lists, events in pages, and types.
    pub(super) async fn prepare(&self) {
        let client = client(&self.address, &self.token);
        for n in 0..4 {
            let jobs = (0..500).map(|m| NewJob::new(format!("t{n}")).label("n", m.to_string()));
            let jobs = jobs.map(|job| job.payload(&"x".repeat(2_000)).unwrap());
            client.create_all(jobs).await.expect("there is room");
        }
        for n in 0..5 {
            client.create_all((0..1_000).map(|m| NewJob::new(format!("type {n} {m}")))).await.expect("there is room");
        }
        for _ in 0..20 {
            let id = client.create(NewJob::new("large")).await.unwrap().job.id;
            client.update(Report::start(&id)).await.unwrap();
            client.update(Report::succeeded(&id).result(&"x".repeat(500_000)).unwrap()).await.unwrap();
        }
    }

    /// Calls so many times at once, again and again; what is refused, after a moment.
    async fn flood<F: Future<Output = Result<(), Status>> + Send>(
        &self,
        at_once: usize,
        call: impl Fn(RawClient, u64) -> F + Clone + Send + 'static,
    ) {
        let mut calls = JoinSet::new();
        // By a few connections.
        for lane in 0..at_once.div_ceil(64) {
            let client = client(&self.address, &self.token);
            for n in 0..at_once.min(64) {
                let (service, call) = (client.raw(), call.clone());
                calls.spawn(async move {
                    let mut number = (lane * 64 + n) as u64;
                    loop {
                        if call(service.clone(), number).await.is_err() {
                            sleep(Duration::from_millis(5)).await;
                        }
                        number += 100_000;
                    }
                });
            }
        }
        calls.join_all().await;
    }

    async fn raw(&self, window: bool) -> Raw {
        loop {
            if let Ok(stream) = TcpStream::connect(&self.address).await {
                let mut raw = if window { Raw::over(stream).await } else { Raw::without_window(stream).await };
                if raw.drain(Duration::from_millis(20)).await {
                    return raw;
                }
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Makes a call, as far as the connection takes it.
    async fn call(&self, raw: &mut Raw, call: &str, message: &[u8]) -> std::io::Result<u32> {
        let stream = raw.next_stream();
        let authorization = format!("Bearer {}", self.token);
        let headers = header_block(&format!("{SERVICE}{call}"), &[("authorization", &authorization)]);
        raw.send(HEADERS, END_HEADERS, stream, &headers).await?;
        let message = frame(message);
        let mut pieces = message.chunks(16_384).peekable();
        while let Some(piece) = pieces.next() {
            raw.send(DATA, if pieces.peek().is_none() { END_STREAM } else { 0 }, stream, piece).await?;
        }
        Ok(stream)
    }

    /// By several tasks, each on a connection of its own, anew whenever that is closed.
    async fn over_and_over<F: Future<Output = std::io::Result<()>> + Send>(
        self: &Arc<Self>,
        at_once: usize,
        attack: impl Fn(Arc<Self>) -> F + Clone + Send + 'static,
    ) {
        let mut tasks = JoinSet::new();
        for _ in 0..at_once {
            let (tenant, attack) = (Arc::clone(self), attack.clone());
            tasks.spawn(async move {
                loop {
                    let _ = attack(Arc::clone(&tenant)).await;
                    sleep(Duration::from_millis(10)).await;
                }
            });
        }
        tasks.join_all().await;
    }

    async fn heavy_claims(self: Arc<Self>) {
        self.over_and_over(4, async |tenant: Arc<Self>| {
            let claim = ClaimJobsRequest {
                worker_id: "w".to_owned(),
                types: vec!["none".to_owned()],
                wait: seconds(60),
                ..Default::default()
            };
            let mut message = claim.encode_to_vec();
            // A field that no version of the contract has.
            message.extend([0xfa, 0x7f]);
            prost::encoding::encode_varint(3_900_000, &mut message);
            message.resize(message.len() + 3_900_000, 0);
            let mut raw = tenant.raw(true).await;
            for _ in 0..8 {
                tenant.call(&mut raw, "ClaimJobs", &message).await?;
            }
            while raw.drain(Duration::from_secs(1)).await {}
            Ok(())
        })
        .await;
    }

    async fn untaken_streams(self: Arc<Self>) {
        self.over_and_over(4, async |tenant: Arc<Self>| {
            let mut raw = tenant.raw(false).await;
            let request = StreamJobEventsRequest { after_seq: Some(0), ..Default::default() }.encode_to_vec();
            for _ in 0..40 {
                tenant.call(&mut raw, "StreamJobEvents", &request).await?;
            }
            while raw.drain(Duration::from_secs(1)).await {}
            Ok(())
        })
        .await;
    }

    async fn swelling(self: Arc<Self>) {
        let legacy = self.over_and_over(1, async |tenant: Arc<Self>| {
            let mut stream = TcpStream::connect(&tenant.address).await?;
            let body = format!(r#"{{"type":"t","payload":[{}0]}}"#, "0,".repeat(2_000_000));
            let (token, length) = (&tenant.token, body.len());
            let head = format!(
                "POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAuthorization: Bearer {token}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(body.as_bytes()).await?;
            stream.read_to_end(&mut Vec::new()).await.map(drop)
        });
        const EMPTY: usize = 2_000_000;
        let requests = self.flood(1, async |mut service: RawClient, _| {
            let requests = vec![CreateJobRequest::default(); EMPTY];
            service.batch_create_jobs(BatchCreateJobsRequest { requests }).await.map(drop)
        });
        let updates = self.flood(1, async |mut service: RawClient, _| {
            let updates = vec![UpdateJobStatusRequest::default(); EMPTY];
            service.batch_update_job_status(BatchUpdateJobStatusRequest { updates }).await.map(drop)
        });
        let leases = self.flood(1, async |mut service: RawClient, _| {
            let leases = vec![LeaseHeartbeat::default(); EMPTY];
            service.heartbeat(HeartbeatRequest { worker_id: "w".to_owned(), leases, extend_by: None }).await.map(drop)
        });
        tokio::join!(legacy, requests, updates, leases);
    }

    async fn lists(self: Arc<Self>) {
        self.flood(300, async |mut service: RawClient, _| {
            let request = ListJobsRequest { page_size: 1_000, view: JobView::Full.into(), ..Default::default() };
            service.list_jobs(request).await.map(drop)
        })
        .await;
    }

    async fn reset_lists(self: Arc<Self>) {
        self.over_and_over(4, async |tenant: Arc<Self>| {
            let request = ListJobsRequest { page_size: 1_000, view: JobView::Full.into(), ..Default::default() };
            let (request, mut raw) = (request.encode_to_vec(), tenant.raw(true).await);
            loop {
                let stream = tenant.call(&mut raw, "ListJobs", &request).await?;
                sleep(Duration::from_millis(1)).await;
                raw.send(RST_STREAM, 0, stream, &8_u32.to_be_bytes()).await?;
                if !raw.drain(Duration::ZERO).await {
                    return Ok(());
                }
            }
        })
        .await;
    }

    async fn statistics(self: Arc<Self>) {
        self.flood(100, async |mut service: RawClient, _| {
            let request = GetStatisticsRequest { window: seconds(7 * 86_400), series: true, ..Default::default() };
            service.get_statistics(request).await.map(drop)
        })
        .await;
    }

    async fn claims_and_calls(self: Arc<Self>) {
        let claims = self.flood(6_000, async |mut service: RawClient, n| {
            let (worker_id, types) = (format!("w{n}"), vec![format!("none {}", n % 50)]);
            let claim = ClaimJobsRequest { worker_id, types, wait: seconds(60), ..Default::default() };
            service.claim_jobs(claim).await.map(drop)
        });
        let calls = self.flood(2_000, async |mut service: RawClient, _| {
            service.get_job(GetJobRequest { job_id: Uuid::new_v4().to_string() }).await.map(drop)
        });
        tokio::join!(claims, calls);
    }

    async fn large_jobs(self: Arc<Self>) {
        let job = CreateJobRequest::from(NewJob::new("large").payload(&"x".repeat(1_000_000)).unwrap());
        self.flood(8, move |mut service: RawClient, _| {
            let job = job.clone();
            async move { service.create_job(job).await.map(drop) }
        })
        .await;
    }

    async fn guessed_leases(self: Arc<Self>, seed: u64) {
        self.flood(64, move |mut service: RawClient, n| async move {
            let mut random = Seeded::new(seed ^ n);
            let job = Uuid::from_u64_pair(random.next(), random.next()).simple();
            let lease_token = format!("{}-{job}-1-{:016x}", Uuid::nil().simple(), random.next());
            let report = Report::succeeded(Uuid::new_v4().to_string()).lease(lease_token);
            service.update_job_status(UpdateJobStatusRequest::from(report)).await.map(drop)
        })
        .await;
    }

    /// Half of them say nothing, and half speak HTTP/2, from a few addresses.
    async fn strangers(self: Arc<Self>, seed: u64) {
        let to: SocketAddr = self.address.parse().unwrap();
        let mut tasks = JoinSet::new();
        for n in 0..2_000_u32 {
            let from = (seed % 1_000) as u32 + n % 4;
            tasks.spawn(async move {
                loop {
                    if let Ok(stream) = connect(to, from).await {
                        if n % 2 == 0 {
                            sleep(Duration::from_secs(60)).await;
                            drop(stream);
                        } else {
                            let mut raw = Raw::over(stream).await;
                            while raw.drain(Duration::from_secs(1)).await {}
                        }
                    }
                    sleep(Duration::from_millis(500)).await;
                }
            });
        }
        tasks.join_all().await;
    }

    async fn guessed_tokens(self: Arc<Self>, seed: u64) {
        let (to, good): (SocketAddr, _) = (self.address.parse().unwrap(), self.token.clone());
        let mut tasks = JoinSet::new();
        for lane in 0..16_u32 {
            let good = good.clone();
            tasks.spawn(async move {
                let mut random = Seeded::new(seed ^ u64::from(lane));
                loop {
                    let Ok(stream) = connect(to, lane).await else { continue };
                    let mut raw = Raw::over(stream).await;
                    loop {
                        // Of the right form, and nobody's.
                        let guess: String = good
                            .char_indices()
                            .map(|(n, c)| {
                                if n > 30 && c.is_ascii_lowercase() {
                                    (b'a' + random.below(26) as u8).into()
                                } else {
                                    c
                                }
                            })
                            .collect();
                        let stream = raw.next_stream();
                        let headers =
                            header_block(&format!("{SERVICE}GetJob"), &[("authorization", &format!("Bearer {guess}"))]);
                        let sent = async {
                            raw.send(HEADERS, END_HEADERS, stream, &headers).await?;
                            raw.send(DATA, END_STREAM, stream, &frame(&[])).await
                        };
                        if sent.await.is_err() || !raw.drain(Duration::from_millis(1)).await {
                            break;
                        }
                    }
                }
            });
        }
        tasks.join_all().await;
    }

    async fn matching_nothing(self: Arc<Self>) {
        let mut streams = JoinSet::new();
        for lane in 0..2 {
            let client = client(&self.address, &self.token);
            for n in 0..500 {
                let mut service = client.raw();
                streams.spawn(async move {
                    let types = (0..100).map(|type_| format!("none {lane} {n} {type_}"));
                    loop {
                        let request = StreamJobEventsRequest::from(Follow::org().types(types.clone()));
                        if let Ok(stream) = service.stream_job_events(request).await {
                            let mut stream = stream.into_inner();
                            while let Ok(Some(_)) = stream.message().await {}
                        }
                        sleep(Duration::from_millis(50)).await;
                    }
                });
            }
        }
        let creates = self.flood(16, async |mut service: RawClient, _| {
            service.create_job(CreateJobRequest::from(NewJob::new("t"))).await.map(drop)
        });
        tokio::join!(streams.join_all(), creates);
    }

    async fn batches(self: Arc<Self>) {
        self.flood(4, async |mut service: RawClient, _| {
            service.batch_create_jobs(batch((0..1_000).map(|_| NewJob::new("t")))).await.map(drop)
        })
        .await;
    }

    async fn past(self: Arc<Self>) {
        self.flood(50, async |mut service: RawClient, _| {
            let request = StreamJobEventsRequest::from(Follow::org().after(0).history_only());
            let mut stream = service.stream_job_events(request).await?.into_inner();
            while stream.message().await?.is_some() {}
            Ok(())
        })
        .await;
    }

    async fn snapshots(self: Arc<Self>) {
        self.flood(50, async |mut service: RawClient, _| {
            let request = StreamJobEventsRequest::from(Follow::org().snapshot().history_only());
            let mut stream = service.stream_job_events(request).await?.into_inner();
            while stream.message().await?.is_some() {}
            Ok(())
        })
        .await;
    }

    async fn heartbeats(self: Arc<Self>, seed: u64) {
        self.flood(8, move |mut service: RawClient, n| async move {
            let mut random = Seeded::new(seed ^ n);
            let mut lease = || {
                let job = Uuid::from_u64_pair(random.next(), random.next()).simple();
                let lease_token = format!("{}-{job}-1-{:016x}", Uuid::nil().simple(), random.next());
                LeaseHeartbeat { lease_token, ..Default::default() }
            };
            let leases = (0..1_000).map(|_| lease()).collect();
            service.heartbeat(HeartbeatRequest { worker_id: "w".to_owned(), leases, extend_by: None }).await.map(drop)
        })
        .await;
    }

    async fn retries(self: Arc<Self>) {
        self.flood(16, async |mut service: RawClient, _| {
            let created = service.create_job(CreateJobRequest::from(NewJob::new("t"))).await?.into_inner();
            let job_id = created.job.unwrap_or_default().id;
            for _ in 0..50 {
                service.cancel_job(CancelJobRequest { job_id: job_id.clone(), ..Default::default() }).await?;
                service.retry_job(RetryJobRequest { job_id: job_id.clone(), ..Default::default() }).await?;
            }
            Ok(())
        })
        .await;
    }

    async fn one_key(self: Arc<Self>) {
        self.flood(64, async |mut service: RawClient, n| {
            let job = NewJob::new("t").idempotency_key("the same").label("n", (n % 3).to_string());
            service.create_job(CreateJobRequest::from(job)).await.map(drop)
        })
        .await;
    }

    async fn types(self: Arc<Self>) {
        self.flood(16, async |mut service: RawClient, _| {
            service.create_job(CreateJobRequest::from(NewJob::new(Uuid::new_v4().to_string()))).await.map(drop)
        })
        .await;
    }

    async fn labels(self: Arc<Self>) {
        self.flood(100, async |mut service: RawClient, n| {
            let labels = [("n".to_owned(), (n % 500).to_string()), ("none".to_owned(), "none".to_owned())].into();
            service.list_jobs(ListJobsRequest { labels, page_size: 1_000, ..Default::default() }).await.map(drop)
        })
        .await;
    }

    async fn untaken_jobs(self: Arc<Self>) {
        let client = client(&self.address, &self.token);
        let large = NewJob::new("large").payload(&"x".repeat(1_000_000)).unwrap();
        let Ok(created) = client.create(large).await else { return };
        let request = GetJobRequest { job_id: created.job.id }.encode_to_vec();
        self.over_and_over(16, move |tenant: Arc<Self>| {
            let request = request.clone();
            async move {
                let mut raw = tenant.raw(false).await;
                for _ in 0..100 {
                    tenant.call(&mut raw, "GetJob", &request).await?;
                }
                while raw.drain(Duration::from_secs(1)).await {}
                Ok(())
            }
        })
        .await;
    }

    async fn due_at_once(self: Arc<Self>) {
        self.flood(2, async |mut service: RawClient, _| {
            let soon = SystemClock.now() + Duration::from_secs(1);
            let jobs = batch((0..1_000).map(|_| NewJob::new("due").scheduled_at(soon)));
            service.batch_create_jobs(jobs).await?;
            sleep(Duration::from_millis(500)).await;
            Ok(())
        })
        .await;
    }

    async fn short_leases(self: Arc<Self>) {
        let jobs = self.flood(1, async |mut service: RawClient, _| {
            service.batch_create_jobs(batch((0..500).map(|_| NewJob::new("leased").max_attempts(9)))).await?;
            sleep(Duration::from_millis(300)).await;
            Ok(())
        });
        let claims = self.flood(4, async |mut service: RawClient, _| {
            let claim = ClaimJobsRequest {
                worker_id: "w".to_owned(),
                types: vec!["leased".to_owned()],
                max_jobs: 100,
                lease_duration: seconds(1),
                wait: seconds(1),
                ..Default::default()
            };
            service.claim_jobs(claim).await.map(drop)
        });
        tokio::join!(jobs, claims);
    }

    async fn noise(self: Arc<Self>, seed: u64) {
        const CALLS: [&str; 6] =
            ["CreateJob", "BatchCreateJobs", "ClaimJobs", "Heartbeat", "ListJobs", "StreamJobEvents"];
        self.over_and_over(8, move |tenant: Arc<Self>| async move {
            let mut random = Seeded::new(seed ^ Uuid::new_v4().as_u64_pair().0);
            let mut raw = tenant.raw(true).await;
            loop {
                let noise: Vec<u8> = (0..random.below(2_000)).map(|_| random.below(256) as u8).collect();
                let call = CALLS[random.below(CALLS.len() as u64) as usize];
                tenant.call(&mut raw, call, &noise).await?;
                if !raw.drain(Duration::from_millis(1)).await {
                    return Ok(());
                }
            }
        })
        .await;
    }
}
