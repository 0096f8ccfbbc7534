//! Hostile clients: other clients keep at least half their rate, and the server's memory stays bounded.
//!
//! Attackers run on this machine, too, and take its processors. Together they send as many frames a second as the other
//! clients complete calls.

mod attackers;
mod attacks;
mod tenants;
mod victims;

use std::{
    future::Future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use jobledger_client::{
    Client, Error, NewJob, Report,
    proto::{JobView, ListJobsRequest, StreamJobEventsRequest},
};
use prost::Message as _;
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::{interval, sleep, timeout},
};

use crate::{
    support::harness::{Database, PATIENCE, on_both_databases, resident, short_or_long},
    support::program::Program,
    support::raw::{CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, RST_STREAM, Raw, frame, header_block},
    support::seeded::Seeded,
};

on_both_databases! {
    hostile_clients_take_neither_others_rate_nor_memory,
}

/// The most memory that an attacked server may take with its default bounds.
const MEMORY_MIB: u64 = 512;
/// The number of clients that don't attack.
const NORMAL: usize = 8;

const CREATE: &str = "/jobledger.v1.JobService/CreateJob";
const LIST: &str = "/jobledger.v1.JobService/ListJobs";
const STREAM: &str = "/jobledger.v1.JobService/StreamJobEvents";
/// The call that needs no credential.
const CHECK: &str = "/grpc.health.v1.Health/Check";

/// Connects from one of many addresses of this machine.
async fn connect(to: SocketAddr, from: u32) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    let [_, _, high, low] = (from % 60_000).to_be_bytes();
    socket.bind(([127, 1, high, low.max(1)], 0).into())?;
    socket.connect(to).await
}

/// One attacker, which is started again whenever it ends.
type Attack = fn(SocketAddr, u32, Pace) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// How often an attacker sends something, and the seed of its random choices.
#[derive(Clone, Copy)]
struct Pace {
    every: Duration,
    seed: u64,
}

/// Resets calls as soon as they are made.
async fn reset(to: SocketAddr, from: u32, every: Duration) -> std::io::Result<()> {
    let mut raw = Raw::over(connect(to, from).await?).await;
    let mut pace = interval(every);
    loop {
        pace.tick().await;
        let stream = raw.call(CREATE, 0).await?;
        raw.send(RST_STREAM, 0, stream, &8_u32.to_be_bytes()).await?;
        if !raw.drain(Duration::ZERO).await {
            return Ok(());
        }
    }
}

/// Sends headers that never end.
async fn headers_without_end(to: SocketAddr, from: u32, every: Duration) -> std::io::Result<()> {
    let mut raw = Raw::over(connect(to, from).await?).await;
    let stream = raw.next_stream();
    raw.send(HEADERS, 0, stream, &header_block(CREATE, &[])).await?;
    let filler: Vec<_> =
        (0..100).flat_map(|_| header_block("", &[("x-filler", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx")])).collect();
    let mut pace = interval(every);
    loop {
        pace.tick().await;
        raw.send(CONTINUATION, 0, stream, &filler).await?;
        if !raw.drain(Duration::ZERO).await {
            return Ok(());
        }
    }
}

/// Opens streams of the whole log without a window for any of them.
async fn zero_window(to: SocketAddr, from: u32) -> std::io::Result<()> {
    let mut raw = Raw::without_window(connect(to, from).await?).await;
    let request = frame(&StreamJobEventsRequest { after_seq: Some(0), ..Default::default() }.encode_to_vec());
    for _ in 0..short_or_long(5, 50) {
        let stream = raw.call(STREAM, 0).await?;
        raw.send(DATA, END_STREAM, stream, &request).await?;
    }
    while raw.drain(Duration::from_secs(1)).await {}
    Ok(())
}

/// Asks for large answers without a window for any of them. They are work for the server whoever asks, so all attackers
/// together ask for ten a second.
async fn untaken(to: SocketAddr, from: u32) -> std::io::Result<()> {
    let mut raw = Raw::without_window(connect(to, from).await?).await;
    let request = frame(&ListJobsRequest { view: JobView::Full.into(), ..Default::default() }.encode_to_vec());
    let mut pace = interval(Duration::from_millis(400));
    loop {
        pace.tick().await;
        let stream = raw.call(LIST, 0).await?;
        raw.send(DATA, END_STREAM, stream, &request).await?;
        if !raw.drain(Duration::ZERO).await {
            return Ok(());
        }
    }
}

/// Sends the first bytes of a connection one at a time, in either protocol.
async fn slowly(to: SocketAddr, from: u32) -> std::io::Result<()> {
    let mut stream = connect(to, from).await?;
    let text: &[u8] = if from.is_multiple_of(2) {
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    } else {
        b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nX-Long: a header that takes its time\r\n"
    };
    for byte in text {
        stream.write_all(&[*byte]).await?;
        sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

/// Connects and sends nothing.
async fn silent(to: SocketAddr, from: u32) -> std::io::Result<()> {
    let _stream = connect(to, from).await?;
    std::future::pending().await
}

/// Sends messages that claim to be huge, and messages that end half way.
async fn oversize(to: SocketAddr, from: u32, every: Duration) -> std::io::Result<()> {
    let mut raw = Raw::over(connect(to, from).await?).await;
    raw.is_served().await;
    let mut pace = interval(every);
    for n in 0.. {
        pace.tick().await;
        let (path, length, sent) = match n % 4 {
            0 => (CREATE, u32::MAX, 4_096),
            1 => (CREATE, 4 << 20, 4_096),
            2 => (CHECK, 4 << 20, 4_096),
            _ => (CHECK, 4 << 20, 5),
        };
        let stream = raw.call(path, 0).await?;
        let mut bytes = vec![0];
        bytes.extend(length.to_be_bytes());
        bytes.resize(sent, 0xff);
        raw.send(DATA, 0, stream, &bytes).await?;
        if !raw.drain(Duration::ZERO).await {
            return Ok(());
        }
    }
    Ok(())
}

/// Sends random bytes, frames of random kinds with random contents, and random messages.
async fn garbage(to: SocketAddr, from: u32, Pace { every, seed }: Pace) -> std::io::Result<()> {
    let mut random = Seeded::new(seed ^ u64::from(from));
    let mut raw = Raw::over(connect(to, from).await?).await;
    let mut pace = interval(every);
    loop {
        pace.tick().await;
        let noise: Vec<u8> = (0..random.below(512)).map(|_| random.below(256) as u8).collect();
        match random.below(3) {
            0 => raw.stream.write_all(&noise).await?,
            1 => {
                let (kind, flags) = (random.below(12) as u8, random.below(256) as u8);
                raw.send(kind, flags, random.below(9) as u32, &noise).await?;
            }
            _ => {
                let stream = raw.next_stream();
                raw.send(HEADERS, END_HEADERS, stream, &header_block(CREATE, &[])).await?;
                raw.send(DATA, END_STREAM, stream, &noise).await?;
            }
        }
        if !raw.drain(Duration::ZERO).await {
            return Ok(());
        }
    }
}

/// How many calls a second the other clients complete.
async fn rate(done: &AtomicU64, time: Duration) -> f64 {
    let (before, began) = (done.load(Ordering::Relaxed), Instant::now());
    sleep(time).await;
    (done.load(Ordering::Relaxed) - before) as f64 / began.elapsed().as_secs_f64()
}

/// Creates jobs and reads them. Ends with the first error.
async fn work(client: Client, done: Arc<AtomicU64>, is_over: Arc<AtomicBool>) -> Result<(), Error> {
    while !is_over.load(Ordering::Relaxed) {
        let job = client.create(NewJob::new("t").label("k", "v")).await?.job;
        client.get(&job.id).await?;
        done.fetch_add(2, Ordering::Relaxed);
    }
    Ok(())
}

async fn hostile_clients_take_neither_others_rate_nor_memory(database: Database) {
    let seconds = Duration::from_secs(short_or_long(2, 20));
    let many = short_or_long(1_000, 10_000);
    let seed = Seeded::from_environment("hostile clients");
    let program = Program::start_with(&database, &["--log", "error", "--first-bytes-timeout", "2s"]);
    let to: SocketAddr = program.address.parse().unwrap();
    let (done, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    // The log that the streams ask for.
    let filler = program.client();
    for _ in 0..40 {
        let job = filler.create(NewJob::new("t")).await.unwrap().job;
        filler.update(Report::start(&job.id)).await.unwrap();
        filler.update(Report::succeeded(&job.id).result(&"x".repeat(500_000)).unwrap()).await.unwrap();
    }
    let mut normal = JoinSet::new();
    for _ in 0..NORMAL {
        normal.spawn(work(program.client(), Arc::clone(&done), Arc::clone(&is_over)));
    }
    rate(&done, Duration::from_secs(1)).await;
    let attacks: [(&str, usize, Attack); 9] = [
        ("rapid resets", 4, |to, from, pace| Box::pin(async move { drop(reset(to, from, pace.every).await) })),
        ("headers without end", 4, |to, from, pace| {
            Box::pin(async move { drop(headers_without_end(to, from, pace.every).await) })
        }),
        ("windows of nothing", 4, |to, from, _| Box::pin(async move { drop(zero_window(to, from).await) })),
        ("untaken answers", 4, |to, from, _| Box::pin(async move { drop(untaken(to, from).await) })),
        ("slow headers", 200, |to, from, _| Box::pin(async move { drop(slowly(to, from).await) })),
        ("silent sockets", many, |to, from, _| Box::pin(async move { drop(silent(to, from).await) })),
        ("huge messages", 4, |to, from, pace| Box::pin(async move { drop(oversize(to, from, pace.every).await) })),
        ("garbage", 4, |to, from, pace| Box::pin(async move { drop(garbage(to, from, pace).await) })),
        ("connections", many, |to, from, _| {
            Box::pin(async move {
                if let Ok(stream) = connect(to, from).await {
                    let mut raw = Raw::over(stream).await;
                    while raw.drain(Duration::from_secs(1)).await {}
                }
            })
        }),
    ];
    let mut most = 0;
    for (what, attackers, attack) in attacks {
        let before = rate(&done, Duration::from_secs(1)).await;
        let pace = Pace { every: Duration::from_secs_f64(attackers as f64 / before), seed };
        let mut hostile = JoinSet::new();
        for n in 0..attackers as u32 {
            hostile.spawn(async move {
                for again in 0.. {
                    attack(to, n + again * attackers as u32, pace).await;
                    // A connection that is refused at once is tried again, but not in a busy loop.
                    sleep(Duration::from_millis(10)).await;
                }
            });
        }
        let during = rate(&done, seconds).await;
        let memory = resident(program.id()) >> 10;
        most = most.max(memory);
        println!("{what}: {during:.0} of {before:.0} calls a second, {memory} MiB");
        assert!(during >= before / 2.0, "{what}: {during:.0} of {before:.0} calls a second are left");
        assert!(memory <= MEMORY_MIB, "{what}: {memory} MiB");
        hostile.shutdown().await;
    }
    is_over.store(true, Ordering::Relaxed);
    for ended in timeout(PATIENCE, normal.join_all()).await.expect("they end") {
        ended.expect("nothing went wrong for those who don't attack");
    }
    assert!(program.end_by("TERM").success());
    println!("{most} MiB at most");
}
