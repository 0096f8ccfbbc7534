//! A server's memory and open files, measured from outside its process.

use std::{fs, path::Path, time::Duration};

use jobledger_client::{Follow, Item, NewJob, Report, proto::StreamJobEventsRequest};
use serde_json::json;
use tokio::{
    io::AsyncWriteExt as _,
    net::TcpStream,
    time::{interval, timeout},
};

use crate::{
    support::harness::{Database, PATIENCE, on_both_databases, resident, short_or_long},
    support::program::Program,
    support::raw::{DATA, Raw},
};

on_both_databases! {
    subscribers_that_stop_reading_do_not_grow_the_server,
    a_subscriber_that_reads_one_event_a_second_misses_nothing_and_costs_no_memory,
}

/// The number of open files whose names begin with `prefix`.
fn open_files(process: u32, prefix: &str) -> usize {
    fs::read_dir(format!("/proc/{process}/fd"))
        .expect("the process runs")
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.to_string_lossy().starts_with(prefix))
        .count()
}

async fn subscribers_that_stop_reading_do_not_grow_the_server(database: Database) {
    const MIB: u64 = 1 << 10;
    let program = Program::start(&database);
    let client = program.client();
    let result = json!("x".repeat(500_000));
    let write = async |jobs: usize| {
        for _ in 0..jobs {
            let id = client.create(NewJob::new("t")).await.unwrap().job.id;
            client.update(Report::start(&id)).await.unwrap();
            client.update(Report::succeeded(&id).result(&result).unwrap()).await.unwrap();
        }
    };
    let request = StreamJobEventsRequest { after_seq: Some(0), ..Default::default() };
    let mut stuck = Vec::new();
    for _ in 0..8 {
        stuck.push(client.raw().stream_job_events(request.clone()).await.unwrap());
    }
    // One subscriber reads. When it is done, the server has sent the others all that it ever will.
    let mut reader = client.subscribe(Follow::org().after(0)).await.unwrap();
    let mut read_to = async |seq| loop {
        match timeout(PATIENCE, reader.next()).await.expect("events come").unwrap().unwrap() {
            Item::Event(event) if event.seq == seq => break,
            _ => {}
        }
    };
    // Fills what each subscriber may hold: three pages of 1.5 MB, and what the transport buffers.
    write(180).await;
    read_to(180 * 3).await;
    let full = resident(program.id());
    write(240).await;
    read_to(420 * 3).await;
    let after = resident(program.id());
    println!("resident with 8 stuck subscribers: {} MiB, after 120 MB more {} MiB", full / MIB, after / MIB);
    // Without a bound 8 queues of 120 MB would be added, or one if they shared it.
    assert!(after < full + 60 * MIB, "grew from {} MiB to {} MiB", full / MIB, after / MIB);
    drop(stuck);
}

async fn a_subscriber_that_reads_one_event_a_second_misses_nothing_and_costs_no_memory(database: Database) {
    const MIB: u64 = 1 << 10;
    const AT_ONCE: i64 = 500;
    let (events, a_second) = short_or_long((30_000, 10_000), (100_000, 1_500));
    // As large as a created job's event can be: 1.7 kB, and as much again on the wire.
    let (job_type, creator) = ("\u{1F980}".repeat(100), "\u{1F980}".repeat(255));
    let program = Program::start(&database);
    let client = program.client();
    let write = async |events: i64| {
        let mut tick = interval(Duration::from_secs(AT_ONCE as u64) / a_second);
        for _ in 0..events / AT_ONCE {
            tick.tick().await;
            let jobs = (0..AT_ONCE).map(|_| NewJob::new(&job_type).requested_by(&creator));
            assert!(client.create_all(jobs).await.unwrap().iter().all(Result::is_ok));
        }
    };
    // Fills the database's caches before the first measurement.
    write(events).await;
    let before = resident(program.id());
    let mut slow = client.subscribe(Follow::org()).await.unwrap();
    let mut seen = events;
    let mut take = async |slow: &mut jobledger_client::Subscription| {
        let item = timeout(PATIENCE, slow.next()).await.expect("it goes on").expect("without an end").unwrap();
        if let Item::Event(event) = item {
            seen += 1;
            assert_eq!(event.seq, seen, "nothing is missing, nothing comes twice");
        }
        seen
    };
    let mut a_second = interval(Duration::from_secs(1));
    let mut most = before;
    let writing = write(events);
    tokio::pin!(writing);
    loop {
        tokio::select! {
            () = &mut writing => break,
            _ = a_second.tick() => {
                take(&mut slow).await;
                most = most.max(resident(program.id()));
            }
        }
    }
    while take(&mut slow).await < 2 * events {}
    let after = resident(program.id());
    let (before, most, after) = (before / MIB, most.max(after) / MIB, after / MIB);
    println!(
        "resident before {events} events for a slow subscriber: {before} MiB, at most {most} MiB, then {after} MiB"
    );
    assert!(most < before + 40, "grew from {before} MiB to {most} MiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_in_many_pieces_takes_what_its_bytes_do() {
    const MIB: u64 = 1 << 10;
    // Fits into the first window of a stream.
    const PIECES: usize = 250_000;
    let database = Database::sqlite();
    // With one thread, the server takes each piece over before it reads more of the connection. With two, it could read
    // pieces while the thread that takes them over has no processor, until it ends the connection as a flood.
    let (times, threads) = (["--request-timeout", "10m", "--call-timeout", "10m"], Path::new("1"));
    let program = Program::serve_in("127.0.0.1:0", &database.url(), &times, &[("TOKIO_WORKER_THREADS", threads)]);
    let mut raw = Raw::over(TcpStream::connect(&program.address).await.unwrap()).await;
    raw.is_served().await;
    let before = resident(program.id());
    let stream = raw.call("/jobledger.v1.JobService/CreateJob", 0).await.unwrap();
    raw.send(DATA, 0, stream, &[0, 0, 0x10, 0, 0]).await.unwrap();
    let piece: Vec<_> = [&[0, 0, 1, DATA, 0][..], &stream.to_be_bytes(), b"x"].concat();
    for _ in 0..PIECES / 100 {
        raw.stream.write_all(&piece.repeat(100)).await.unwrap();
        // Paced, so that the server does not take the pieces for a flood.
        raw.is_served().await;
    }
    let after = resident(program.id());
    println!("resident before a message in {PIECES} pieces: {} MiB, with it {} MiB", before / MIB, after / MIB);
    assert!(after < before + 12 * MIB, "grew from {} MiB to {} MiB", before / MIB, after / MIB);
}

#[tokio::test]
async fn idle_subscribers_open_no_files_of_the_database() {
    const SUBSCRIBERS: usize = 100;
    let database = Database::sqlite();
    let program = Program::start(&database);
    let client = program.client();
    client.create(NewJob::new("t")).await.unwrap();
    let path = database.path();
    let prefix = path.to_string_lossy();
    let before = open_files(program.id(), &prefix);
    let mut subscribers = Vec::new();
    for _ in 0..SUBSCRIBERS {
        let mut events = client.subscribe(Follow::org()).await.unwrap();
        assert!(matches!(events.next().await, Some(Ok(Item::Bookmark(_)))));
        subscribers.push(events);
    }
    // Subscribers share a few readers, which are opened when they are needed.
    let after = open_files(program.id(), &prefix);
    assert!(after < before + SUBSCRIBERS / 2, "{before} files of the database were open, then {after}");
    assert_eq!(program.end_by("TERM").code(), Some(0));
}
