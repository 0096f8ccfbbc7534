//! Attacks by creating, claiming and reporting.

use std::{sync::Arc, time::Duration};

use jobledger_client::{
    Claim, NewJob, RawClient, Report,
    proto::{
        BatchCreateJobsRequest, BatchUpdateJobStatusRequest, CancelJobRequest, ClaimJobsRequest, CreateJobRequest,
        GetJobRequest, HeartbeatRequest, LeaseHeartbeat, RetryJobRequest, RetryPolicy, UpdateJobStatusRequest,
    },
};
use jobledger_server::domain::clock::{Clock as _, SystemClock};
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::sleep,
};
use uuid::Uuid;

use super::{KEPT, Tenant, batch, client, created, fresh_types, long_types, seconds};
use crate::support::seeded::Seeded;

impl Tenant {
    pub(super) async fn heavy_claims(self: Arc<Self>) {
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

    pub(super) async fn swelling(self: Arc<Self>) {
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

    pub(super) async fn claims_and_calls(self: Arc<Self>) {
        let claims = self.flood(6_000, async |mut service: RawClient, n| {
            let (worker_id, types) = (format!("w{n}"), vec![format!("none {}", n % 50)]);
            let claim = ClaimJobsRequest { worker_id, types, wait: seconds(60), ..Default::default() };
            service.claim_jobs(claim).await.map(drop)
        });
        let calls = self.flood(2_000, async |mut service: RawClient, _| {
            service.get_job(GetJobRequest { job_id: Uuid::new_v4().to_string(), ..Default::default() }).await.map(drop)
        });
        tokio::join!(claims, calls);
    }

    pub(super) async fn large_jobs(self: Arc<Self>) {
        let job = CreateJobRequest::from(NewJob::new("large").payload(&"x".repeat(1_000_000)).unwrap());
        self.flood(8, move |mut service: RawClient, _| {
            let job = job.clone();
            async move { service.create_job(job).await.map(drop) }
        })
        .await;
    }

    pub(super) async fn guessed_leases(self: Arc<Self>, seed: u64) {
        self.flood(64, move |mut service: RawClient, n| async move {
            let mut random = Seeded::new(seed ^ n);
            let job = Uuid::from_u64_pair(random.next(), random.next()).simple();
            let lease_token = format!("{}-{job}-1-{:016x}", Uuid::nil().simple(), random.next());
            let report = Report::succeeded(Uuid::new_v4().to_string()).lease(lease_token);
            service.update_job_status(UpdateJobStatusRequest::from(report)).await.map(drop)
        })
        .await;
    }

    pub(super) async fn batches(self: Arc<Self>) {
        self.flood(4, async |mut service: RawClient, _| {
            service.batch_create_jobs(batch((0..1_000).map(|_| NewJob::new("t")))).await.map(drop)
        })
        .await;
    }

    /// Batches whose jobs differ in changing columns, because columns that differ are written in another way.
    pub(super) async fn jobs_of_every_shape(self: Arc<Self>) {
        self.flood(4, async |mut service: RawClient, n| {
            let shape = n / 100_000 * 4 + n % 4;
            let job = |row: u32| {
                // A set bit gives the property to every second job, a clear bit to none.
                let varies = |bit: u64| shape >> bit & 1 == 1 && row.is_multiple_of(2);
                let mut job = NewJob::new(if varies(0) { "shape a" } else { "shape b" });
                job = if varies(1) { job.priority(1) } else { job };
                job = if varies(2) { job.max_attempts(2) } else { job };
                job = if varies(3) { job.max_lost_attempts(2) } else { job };
                job = if varies(4) { job.requested_by("another") } else { job };
                job = if varies(5) { job.run_timeout(Duration::from_secs(60)) } else { job };
                job = if varies(6) { job.label("a", "b") } else { job };
                job = if varies(7) { job.payload("x").unwrap() } else { job };
                job = if varies(8) { job.idempotency_key(Uuid::new_v4().to_string()) } else { job };
                let policy = RetryPolicy { multiplier: Some(1.0), ..Default::default() };
                if varies(9) { job.retry_policy(policy) } else { job }
            };
            service.batch_create_jobs(batch((0..256).map(job))).await.map(drop)
        })
        .await;
    }

    pub(super) async fn heartbeats(self: Arc<Self>, seed: u64) {
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

    pub(super) async fn retries(self: Arc<Self>) {
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

    pub(super) async fn one_key(self: Arc<Self>) {
        self.flood(64, async |mut service: RawClient, n| {
            let job = NewJob::new("t").idempotency_key("the same").label("n", (n % 3).to_string());
            service.create_job(CreateJobRequest::from(job)).await.map(drop)
        })
        .await;
    }

    pub(super) async fn types(self: Arc<Self>) {
        self.flood(16, async |mut service: RawClient, _| {
            service.create_job(CreateJobRequest::from(NewJob::new(Uuid::new_v4().to_string()))).await.map(drop)
        })
        .await;
    }

    pub(super) async fn due_at_once(self: Arc<Self>) {
        self.flood(2, async |mut service: RawClient, _| {
            let soon = SystemClock.now() + Duration::from_secs(1);
            let jobs = batch((0..1_000).map(|_| NewJob::new("due").scheduled_at(soon)));
            service.batch_create_jobs(jobs).await?;
            sleep(Duration::from_millis(500)).await;
            Ok(())
        })
        .await;
    }

    pub(super) async fn short_leases(self: Arc<Self>) {
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

    /// 6,000 claims wait, each with 35 KB of types that no other claim names.
    pub(super) async fn long_claims(self: Arc<Self>, seed: u64) {
        self.by_lane(6, move |tenant: Arc<Self>, lane| async move {
            let mut random = Seeded::new(seed ^ Uuid::new_v4().as_u64_pair().0);
            let mut connection = tenant.windowless(lane).await;
            for n in 0..1_000 {
                let (worker_id, types) = (format!("w{lane} {n}"), long_types(&mut random));
                let claim = ClaimJobsRequest { worker_id, types, wait: seconds(60), ..Default::default() };
                connection.call(&tenant, "ClaimJobs", &claim.encode_to_vec()).await?;
            }
            connection.stays(KEPT).await;
            Ok(())
        })
        .await;
    }

    pub(super) async fn claims_of_types(self: Arc<Self>, seed: u64) {
        self.flood(600, move |mut service: RawClient, n| async move {
            let (worker_id, types) = ("w".to_owned(), fresh_types(&mut Seeded::new(seed ^ n), ""));
            let claim = ClaimJobsRequest { worker_id, types, max_jobs: 100, ..Default::default() };
            service.claim_jobs(claim).await.map(drop)
        })
        .await;
    }

    /// One connection in four repeats its claim, which reads the same payloads each time. The others send 20 new claims
    /// at once. Each job is ready again when its lease of 1 s expires.
    pub(super) async fn untaken_claims(self: Arc<Self>) {
        // The shortest backoff, without growth.
        let wait = Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 });
        let policy = RetryPolicy { initial_backoff: wait, multiplier: Some(1.0), max_backoff: wait };
        let heavy = NewJob::new("heavy claim").payload(&"x".repeat(900_000)).unwrap();
        let heavy = heavy.retry_policy(policy).max_attempts(100).max_lost_attempts(100);
        let jobs = async {
            let client = client(&self.address, &self.token);
            for _ in 0..48 {
                created(&client, &heavy).await;
            }
        };
        let claims = self.by_lane(16, move |tenant: Arc<Self>, lane| async move {
            let repeats = lane.is_multiple_of(4);
            let claim = ClaimJobsRequest {
                worker_id: format!("w{lane}"),
                types: vec!["heavy claim".to_owned()],
                max_jobs: 100,
                lease_duration: seconds(1),
                request_id: if repeats { "the same".to_owned() } else { String::new() },
                ..Default::default()
            };
            let (claim, mut connection) = (claim.encode_to_vec(), tenant.windowless(lane).await);
            loop {
                for _ in 0..20 {
                    connection.call(&tenant, "ClaimJobs", &claim).await?;
                    if repeats {
                        // If it came earlier, the next claim would end this one.
                        connection.answered().await?;
                    }
                }
                if !connection.stays(Duration::from_millis(500)).await {
                    return Ok(());
                }
            }
        });
        tokio::join!(jobs, claims);
    }

    /// Many workers have leases by the same `request_id`, and others claim with it again and again.
    pub(super) async fn one_request(self: Arc<Self>) {
        let client = client(&self.address, &self.token);
        for n in 0..5_000 / 100 {
            let _ = client.create_all((0..100).map(|_| NewJob::new("requested"))).await;
            let claim = Claim::new(format!("{}{n}", "🦀".repeat(200))).types(["requested"]).max_jobs(100);
            let _ = client.claim(claim.lease(Duration::from_secs(3_600)).request_id("the same")).await;
        }
        self.flood(600, async |mut service: RawClient, n| {
            let (worker_id, types) = (format!("{}b{n}", "🦀".repeat(200)), vec!["none".to_owned()]);
            let request_id = "the same".to_owned();
            service.claim_jobs(ClaimJobsRequest { worker_id, types, request_id, ..Default::default() }).await.map(drop)
        })
        .await;
    }

    /// Thousands of jobs are claimed, and given back at once because nobody takes the answers.
    pub(super) async fn given_back(self: Arc<Self>) {
        let client = client(&self.address, &self.token);
        for _ in 0..10 {
            let jobs = (0..1_000).map(|_| NewJob::new("given back").max_lost_attempts(100));
            let _ = client.create_all(jobs).await;
        }
        self.by_lane(2, async |tenant: Arc<Self>, lane| {
            let mut connection = tenant.windowless(lane).await;
            for n in 0..50 {
                let (worker_id, types) = (format!("w{lane} {n}"), vec!["given back".to_owned()]);
                let claim = ClaimJobsRequest { worker_id, types, max_jobs: 100, ..Default::default() };
                connection.call(&tenant, "ClaimJobs", &claim.encode_to_vec()).await?;
            }
            connection.stays(Duration::from_secs(1)).await;
            Ok(())
        })
        .await;
    }

    /// Each claim takes as many jobs as it may, of types with many jobs. The leases expire after 1 s.
    pub(super) async fn large_claims(self: Arc<Self>) {
        let client = client(&self.address, &self.token);
        for n in 0..9 {
            let jobs = (0..1_000).map(|_| NewJob::new(format!("many {n}")).max_attempts(100).max_lost_attempts(100));
            let _ = client.create_all(jobs).await;
        }
        self.flood(128, async |mut service: RawClient, n| {
            let (worker_id, types) = ("w".to_owned(), vec![format!("many {}", n % 9)]);
            let lease_duration = seconds(1);
            let claim = ClaimJobsRequest { worker_id, types, max_jobs: 100, lease_duration, ..Default::default() };
            service.claim_jobs(claim).await.map(drop)
        })
        .await;
    }

    /// As many labels as a job may have, all of them different.
    pub(super) async fn random_labels(self: Arc<Self>, seed: u64) {
        self.flood(4, move |mut service: RawClient, n| async move {
            let mut random = Seeded::new(seed ^ n);
            let mut job = || {
                (0..32)
                    .fold(NewJob::new("labeled"), |job, n| job.label(format!("l{n}"), format!("{:x}", random.next())))
            };
            service.batch_create_jobs(batch((0..500).map(|_| job()))).await.map(drop)
        })
        .await;
    }
}
