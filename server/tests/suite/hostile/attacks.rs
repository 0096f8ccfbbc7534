//! Attacks by a tenant with a valid credential, and by strangers. Each goes on as fast as it can until it is dropped.

mod heavy;
mod reads;
mod strangers;
mod writes;

use std::{
    future::Future,
    io::{self, ErrorKind},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use jobledger_client::{
    Client, NewJob, RawClient, Report,
    proto::{BatchCreateJobsRequest, CreateJobRequest},
};
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::Status;

use super::{connect, victims::client};
use crate::{
    support::raw::{DATA, END_HEADERS, END_STREAM, HEADERS, RST_STREAM, Raw, WINDOW_UPDATE, frame, header_block},
    support::seeded::Seeded,
};

const SERVICE: &str = "/jobledger.v1.JobService/";
/// The most types in one filter.
const TYPES: usize = 100;
/// How long calls stay open before new ones replace them. No claim waits longer, and streams that take nothing end after 30 s.
const KEPT: Duration = Duration::from_secs(60);

/// The attacking tenant.
pub(super) struct Tenant {
    pub(super) address: String,
    pub(super) token: String,
}

/// An attack by a tenant. The number is the seed of its random choices.
pub(super) type Attack = fn(Arc<Tenant>, u64) -> Pin<Box<dyn Future<Output = ()> + Send>>;

/// All attacks, by name.
pub(super) const ATTACKS: [(&str, Attack); 46] = [
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
    ("labels that few have", |tenant, _| Box::pin(async move { tenant.labels().await })),
    ("large jobs, not taken", |tenant, _| Box::pin(async move { tenant.untaken_jobs().await })),
    ("all due at once", |tenant, _| Box::pin(async move { tenant.due_at_once().await })),
    ("leases of a second", |tenant, _| Box::pin(async move { tenant.short_leases().await })),
    ("noise with a good token", |tenant, seed| Box::pin(async move { tenant.noise(seed).await })),
    ("dialogues of reflection, not read", |tenant, _| Box::pin(async move { tenant.dialogues().await })),
    ("streams with 100 long types", |tenant, seed| Box::pin(async move { tenant.long_streams(seed).await })),
    ("claims with 100 long types", |tenant, seed| Box::pin(async move { tenant.long_claims(seed).await })),
    ("claims for 100 types, again and again", |tenant, seed| {
        Box::pin(async move { tenant.claims_of_types(seed).await })
    }),
    ("claims of large payloads, not taken", |tenant, _| Box::pin(async move { tenant.untaken_claims().await })),
    ("answers held by many", |tenant, _| Box::pin(async move { tenant.held_answers().await })),
    ("jobs that run", |tenant, _| Box::pin(async move { tenant.running_jobs().await })),
    ("6,000 live streams", |tenant, _| Box::pin(async move { tenant.live_streams().await })),
    ("all that can be held, at once", |tenant, _| Box::pin(async move { tenant.all_held().await })),
    ("signatures that are wrong", |tenant, seed| Box::pin(async move { tenant.bad_signatures(seed).await })),
    ("one request for all", |tenant, _| Box::pin(async move { tenant.one_request().await })),
    ("thousands given back at once", |tenant, _| Box::pin(async move { tenant.given_back().await })),
    ("claims of 100 jobs", |tenant, _| Box::pin(async move { tenant.large_claims().await })),
    ("32 labels a job", |tenant, seed| Box::pin(async move { tenant.random_labels(seed).await })),
    ("2,400 streams by 32 labels", |tenant, _| Box::pin(async move { tenant.labeled_streams().await })),
    ("jobs with long labels, due", |tenant, _| Box::pin(async move { tenant.long_and_due().await })),
    ("jobs with long labels, claimed", |tenant, _| Box::pin(async move { tenant.long_and_claimed().await })),
    ("jobs with long labels, reported on", |tenant, _| Box::pin(async move { tenant.long_and_reported().await })),
    ("jobs of every shape", |tenant, _| Box::pin(async move { tenant.jobs_of_every_shape().await })),
    ("claims that any of many jobs wakes", |tenant, _| Box::pin(async move { tenant.woken_claims().await })),
    ("one job's long history", |tenant, _| Box::pin(async move { tenant.long_history().await })),
    ("leases that are extended", |tenant, _| Box::pin(async move { tenant.extended_leases().await })),
    ("a type for each job", |tenant, _| Box::pin(async move { tenant.types().await })),
];

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

fn batch(jobs: impl IntoIterator<Item = NewJob>) -> BatchCreateJobsRequest {
    BatchCreateJobsRequest { requests: jobs.into_iter().map(CreateJobRequest::from).collect() }
}

/// As many new types as a filter may have: each is this prefix and 16 hex digits.
fn fresh_types(random: &mut Seeded, prefix: &str) -> Vec<String> {
    (0..TYPES).map(|_| format!("{prefix}{:016x}", random.next())).collect()
}

/// As [`fresh_types`], with the longest names: 100 characters, all but the digits of four bytes. Together they are 35 KB.
fn long_types(random: &mut Seeded) -> Vec<String> {
    fresh_types(random, &"🦀".repeat(84))
}

/// Creates a job, retrying until that succeeds. Returns its id.
async fn created(client: &Client, job: &NewJob) -> String {
    loop {
        match client.create(job.clone()).await {
            Ok(created) => return created.job.id,
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Begins a call, with this bearer token if there is one. Returns its stream id.
async fn begin(raw: &mut Raw, path: &str, token: Option<&str>) -> io::Result<u32> {
    let stream = raw.next_stream();
    let authorization = token.map(|token| format!("Bearer {token}"));
    let more = authorization.as_deref().map(|authorization| ("authorization", authorization));
    raw.send(HEADERS, END_HEADERS, stream, &header_block(path, more.as_slice())).await?;
    Ok(stream)
}

/// Sends a call's message in frames of the size that every server takes (RFC 9113, 4.2). The last one has these flags.
async fn send(raw: &mut Raw, stream: u32, message: &[u8], flags: u8) -> io::Result<()> {
    let message = frame(message);
    let mut pieces = message.chunks(16_384).peekable();
    while let Some(piece) = pieces.next() {
        raw.send(DATA, if pieces.peek().is_none() { flags } else { 0 }, stream, piece).await?;
    }
    Ok(())
}

impl Tenant {
    /// Creates what the attacks read: jobs in lists, events in pages, and types.
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

    /// Makes this many calls at once, again and again. A refused call is repeated after 5 ms.
    async fn flood<F: Future<Output = Result<(), Status>> + Send>(
        &self,
        at_once: usize,
        call: impl Fn(RawClient, u64) -> F + Clone + Send + 'static,
    ) {
        let mut calls = JoinSet::new();
        // 64 calls share a connection.
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

    /// Makes a call. Returns its stream id.
    async fn call(&self, raw: &mut Raw, call: &str, message: &[u8]) -> io::Result<u32> {
        let stream = begin(raw, &format!("{SERVICE}{call}"), Some(&self.token)).await?;
        send(raw, stream, message, END_STREAM).await?;
        Ok(stream)
    }

    /// A connection from one of many addresses, whose answers get no window.
    async fn windowless(&self, from: u32) -> Windowless {
        let to = self.address.parse().unwrap();
        loop {
            if let Ok(stream) = connect(to, from).await {
                return Windowless::over(stream).await;
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Runs an attack in several tasks. Each has its own connection, and begins anew when that is closed.
    async fn over_and_over<F: Future<Output = io::Result<()>> + Send>(
        self: &Arc<Self>,
        at_once: u32,
        attack: impl Fn(Arc<Self>) -> F + Clone + Send + 'static,
    ) {
        self.by_lane(at_once, move |tenant, _| attack(tenant)).await;
    }

    /// As [`Tenant::over_and_over`], with each task's number.
    async fn by_lane<F: Future<Output = io::Result<()>> + Send>(
        self: &Arc<Self>,
        lanes: u32,
        attack: impl Fn(Arc<Self>, u32) -> F + Clone + Send + 'static,
    ) {
        let mut tasks = JoinSet::new();
        for lane in 0..lanes {
            let (tenant, attack) = (Arc::clone(self), attack.clone());
            tasks.spawn(async move {
                loop {
                    let _ = attack(Arc::clone(&tenant), lane).await;
                    sleep(Duration::from_millis(10)).await;
                }
            });
        }
        tasks.join_all().await;
    }
}

/// A connection whose answers get no window. It keeps to the server's window, because the server would close it otherwise.
struct Windowless {
    raw: Raw,
    /// What is left of the server's window for the connection, in bytes.
    room: usize,
}

impl Windowless {
    async fn over(stream: TcpStream) -> Self {
        // SETTINGS_INITIAL_WINDOW_SIZE is 0 (RFC 9113, 6.5.2). The connection's window begins with 65,535 (6.9.2).
        Self { raw: Raw::with_settings(stream, &[0, 4, 0, 0, 0, 0]).await, room: 65_535 }
    }

    async fn call(&mut self, tenant: &Tenant, call: &str, message: &[u8]) -> io::Result<()> {
        self.send(&format!("{SERVICE}{call}"), Some(&tenant.token), message, END_STREAM).await
    }

    /// Makes a call with one message, whose last frame has these flags.
    async fn send(&mut self, path: &str, token: Option<&str>, message: &[u8], flags: u8) -> io::Result<()> {
        // With the message's prefix of 5 bytes.
        let length = message.len() + 5;
        while self.room < length {
            self.read().await?;
        }
        self.room -= length;
        let stream = begin(&mut self.raw, path, token).await?;
        send(&mut self.raw, stream, message, flags).await
    }

    /// Reads until an answer begins or a call is reset.
    async fn answered(&mut self) -> io::Result<()> {
        while !matches!(self.read().await?, HEADERS | RST_STREAM) {}
        Ok(())
    }

    /// Keeps the connection open for this time. Returns false if the server closed it.
    async fn stays(&mut self, time: Duration) -> bool {
        timeout(time, async { while self.read().await.is_ok() {} }).await.is_err()
    }

    /// Reads a frame, and adds what it opens of the window. Returns its kind.
    async fn read(&mut self) -> io::Result<u8> {
        let (kind, _, stream, payload) = self.raw.receive().await.ok_or(ErrorKind::ConnectionReset)?;
        if kind == WINDOW_UPDATE
            && stream == 0
            && let Ok(more) = <[u8; 4]>::try_from(payload)
        {
            self.room += u32::from_be_bytes(more) as usize;
        }
        Ok(kind)
    }
}
