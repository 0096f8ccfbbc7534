//! A primary dies and its standby takes over: one that has every commit, and one that lacks some.

use std::time::Duration;

use jobledger_client::{Client, Error, Follow, Item, NewJob, Subscription};
use sqlx::Executor as _;
use tokio::{
    task::{JoinSet, block_in_place},
    time::timeout,
};
use uuid::Uuid;

use super::{
    history::Callers,
    link::{Fault, Link, Peer},
};
use crate::{
    support::cluster::{Cluster, Durability, OWNER, SERVER},
    support::harness::{Database, PATIENCE},
    support::program::{Program, command},
};

/// A primary, its standby, and servers that reach one of them through the link.
pub(super) struct Pair {
    pub(super) primary: &'static Cluster,
    pub(super) standby: &'static Cluster,
    pub(super) database: Database,
    link: Link,
    pub(super) programs: Vec<Program>,
}

/// Makes commits wait for the standby.
pub(super) async fn wait_for_standby(database: &Database) {
    let mut admin = database.connect_as("postgres").await;
    admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'").await.expect("a superuser may");
    admin.execute("SELECT pg_reload_conf()").await.expect("a superuser may");
}

impl Pair {
    pub(super) async fn start(servers: usize, options: &[&str]) -> Self {
        let primary: &'static Cluster = Box::leak(Box::new(Cluster::alone(Durability::Full).await));
        let database = Database::postgres_on(primary).await;
        let standby: &'static Cluster = Box::leak(Box::new(block_in_place(|| primary.standby())));
        let link = Link::to(Peer::Postgres(primary.socket())).await;
        let mut pair = Self { primary, standby, database, link, programs: Vec::new() };
        pair.programs = (0..servers).map(|_| pair.program(options)).collect();
        pair
    }

    /// As [`Pair::start`], but commits wait for the standby.
    pub(super) async fn start_synchronous(servers: usize, options: &[&str]) -> Self {
        let pair = Self::start(servers, options).await;
        wait_for_standby(&pair.database).await;
        pair
    }

    fn program(&self, options: &[&str]) -> Program {
        let url = format!("postgres://{SERVER}@{}/{}", self.link.address, self.database.name());
        block_in_place(|| Program::serve("127.0.0.1:0", &url, &[&["--log", "error"], options].concat()))
    }

    fn clients(&self) -> Vec<Client> {
        self.programs.iter().map(Program::client).collect()
    }

    /// Promotes the standby and leads new connections to it.
    pub(super) fn take_over(&mut self) {
        block_in_place(|| self.standby.promote());
        self.link.lead_to(Peer::Postgres(self.standby.socket()));
        self.database = self.database.moved_to(self.standby);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_synchronous_standby_takes_over_without_a_loss() {
    let mut pair = Pair::start_synchronous(2, &[]).await;
    let mut callers = Callers::start(&pair.clients(), 4);
    callers.go_on().await;
    callers.go_on().await;
    block_in_place(|| pair.primary.kill());
    pair.take_over();
    callers.go_on().await;
    callers.end().await;
    println!("{:?}", callers.check(&pair.database).await);
}

/// Reads until the event with this `seq`, or until an error.
async fn read_to(events: &mut Subscription, seq: i64) -> Result<(), Error> {
    let read = async {
        while let Some(item) = events.next().await {
            if matches!(item?, Item::Event(event) if event.seq == seq) {
                break;
            }
        }
        Ok(())
    };
    timeout(PATIENCE, read).await.expect("it comes")
}

/// Further orgs, whose logs lose their ends as well.
const OTHERS: u128 = 4;

async fn create(client: &Client, jobs: usize) {
    for _ in 0..jobs {
        client.create(NewJob::new("t")).await.expect("it is created");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cursors_of_a_log_that_lost_its_end_are_void() {
    check_cursors_of_a_log_that_lost_its_end(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cursors_of_a_log_that_lost_its_end_while_no_server_ran_are_void_once_told() {
    check_cursors_of_a_log_that_lost_its_end(true).await;
}

async fn check_cursors_of_a_log_that_lost_its_end(are_restarted: bool) {
    let mut pair = Pair::start(1, &[]).await;
    let client = pair.clients().remove(0);
    let others = |pair: &Pair| {
        let endpoint = format!("http://{}", pair.programs[0].address);
        let of_org =
            |n| Client::builder(&*endpoint).org(Uuid::from_u128(n)).timeout(PATIENCE).build().expect("an endpoint");
        (1..=OTHERS).map(of_org).collect::<Vec<_>>()
    };
    let create_in_all = async |client: &Client, others: Vec<Client>, jobs: usize| {
        let mut creating = JoinSet::new();
        for client in others.into_iter().chain([client.clone()]) {
            creating.spawn(async move { create(&client, jobs).await });
        }
        creating.join_all().await;
    };
    create_in_all(&client, others(&pair), 10).await;
    let mut admin = pair.database.connect_as("postgres").await;
    let replayed = "SELECT count(*) = 1 FROM pg_stat_replication WHERE replay_lsn >= pg_current_wal_lsn()";
    let is_there = async {
        while !sqlx::query_scalar::<_, bool>(replayed).fetch_one(&mut admin).await.expect("a superuser may") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, is_there).await.expect("the standby follows");
    drop(admin);
    block_in_place(|| pair.standby.stop());
    // These jobs are acknowledged, and only the primary has them.
    create_in_all(&client, others(&pair), 10).await;
    let mut follower = client.subscribe(Follow::org().after(0)).await.unwrap();
    read_to(&mut follower, 20).await.expect("all is there");
    let cursor = follower.cursor().expect("it was told of something").clone();

    block_in_place(|| {
        pair.primary.kill();
        pair.standby.start_again();
    });
    pair.link.set(Fault::Cut);
    pair.take_over();
    pair.link.set(Fault::None);
    // The subscriber learns at once that the log is another one.
    let told = timeout(PATIENCE, async {
        loop {
            match follower.next().await.expect("it doesn't end by itself") {
                Ok(_) => {}
                Err(error) => break error,
            }
        }
    });
    let told = told.await.expect("it is told");
    assert!(matches!(told, Error::CursorAhead { head_seq: 10, .. }), "{told:?}");
    if are_restarted {
        // Operators are told to do this. Without it a cursor is refused only while it is beyond the head.
        for program in pair.programs.drain(..) {
            assert!(program.end_by("TERM").success());
        }
        let renewed = command(&["renew-log-id", "--database-url", &pair.database.url_as(OWNER)]).output().unwrap();
        assert!(renewed.status.success(), "{}", String::from_utf8_lossy(&renewed.stderr));
        pair.programs.push(pair.program(&[]));
    }
    let client = pair.clients().remove(0);
    // The logs of all orgs have lost events, and the server finds this out in one of them first.
    create_in_all(&client, others(&pair), 20).await;
    // A cursor of the log as it is since the failover is valid on every server: the log id was renewed once.
    let mut follower = client.subscribe(Follow::org().after(0)).await.unwrap();
    read_to(&mut follower, 30).await.expect("all is there");
    let of_this = follower.cursor().expect("it was told of something").clone();
    pair.programs.push(pair.program(&[]));
    for client in pair.clients() {
        let refused = client.subscribe(Follow::org().resume(&cursor)).await;
        let told = match refused {
            Err(error) => error,
            Ok(mut events) => read_to(&mut events, i64::MAX).await.expect_err("the log is another"),
        };
        assert!(matches!(told, Error::EpochChanged { .. }), "{told:?}");
        create(&client, 1).await;
        let mut events = client.subscribe(Follow::org().resume(&of_this)).await.expect("it is this log's");
        read_to(&mut events, 31).await.expect("it goes on");
    }
    pair.database.verify().await;
}
