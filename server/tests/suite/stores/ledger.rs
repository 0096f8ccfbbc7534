//! The ledger over a real database: order, bounds, and commits that break.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use jobledger_server::{
    domain::{
        clock::{Clock, Time},
        id::{Digest, JobId, OrgId},
        job::{Idempotency, Job, JobSpec, Labels},
        json::Json,
        retry::RetryPolicy,
        transition::{self, Ending, News, Outcome, Report, Step},
    },
    ledger::{Command, Create, Delivery, JobReply, Ledger, LedgerError, Limits, SubscribeRequest},
    store::{EventFilter, EventQuery, StatisticsQuery, Store},
};
use tokio::{
    sync::oneshot,
    task::{JoinHandle, JoinSet},
    time::timeout,
};
use uuid::Uuid;

use crate::{
    support::breaking::{Break, Breaking},
    support::harness::{Database, ManualClock, PATIENCE, on_both_databases},
};

on_both_databases! {
    a_command_whose_caller_is_gone_before_its_batch_is_never_decided,
    a_command_that_was_taken_is_decided_though_its_caller_is_gone,
    what_gathers_while_a_head_is_won_goes_with_its_batch,
    queues_are_bounded_in_commands_and_in_bytes,
    what_keeps_jobs_alive_goes_before_creates_and_finds_room,
    a_large_create_is_not_passed_over_for_ever,
    batches_are_bounded_and_orgs_take_turns,
    batches_are_bounded_in_bytes_but_one_large_command_goes_through,
    one_command_that_the_database_refuses_fails_alone,
    a_commit_that_broke_after_it_happened_is_answered_and_not_repeated,
    a_commit_that_broke_before_it_happened_is_run_again,
    an_outcome_that_stays_unknown_is_said_to_be,
    a_commit_without_room_says_so_and_is_not_repeated,
    a_batch_that_got_in_the_way_of_another_is_run_again,
    subscribers_hear_of_an_undecided_commit_once_it_is_decided,
    a_reader_that_retention_overtakes_is_told,
    a_bookmark_on_the_way_does_not_claim_the_head,
    creates_with_one_key_in_one_batch_make_one_job,
    a_history_ends_where_the_log_did_when_it_was_asked_for,
    closing_answers_what_was_accepted_and_refuses_the_rest,
    no_acknowledged_write_is_lost_among_callers_that_give_up,
}

/// A ledger, and the task that runs its lanes.
fn start_lanes(store: &Arc<dyn Store>, limits: Limits) -> (Ledger, JoinHandle<()>) {
    let (ledger, work) = Ledger::new(Arc::clone(store), limits);
    (ledger, tokio::spawn(work))
}

pub(crate) fn start(store: &Arc<dyn Store>, limits: Limits) -> Ledger {
    start_lanes(store, limits).0
}

pub(crate) async fn breaking(database: &Database, breaks: &[Break]) -> (Arc<Breaking>, Ledger) {
    let limits = Limits { resolve_within: Duration::from_millis(300), ..Limits::default() };
    breaking_with(database.open().await, breaks, limits)
}

fn breaking_with(store: Arc<dyn Store>, breaks: &[Break], limits: Limits) -> (Arc<Breaking>, Ledger) {
    let store = Breaking::new(store, breaks);
    let ledger = start(&(Arc::clone(&store) as Arc<dyn Store>), limits);
    (store, ledger)
}

fn create(job_type: &str) -> Command {
    create_with(job_type, None)
}

fn create_with(job_type: &str, payload: Option<Json>) -> Command {
    Command::Create(new_job(job_type, payload, None))
}

pub(crate) fn create_once(key: &str) -> Command {
    let idempotency = Idempotency { key: key.into(), digest: Some(Digest([1; 32])) };
    Command::Create(new_job("t", None, Some(idempotency)))
}

pub(crate) fn new_job(job_type: &str, payload: Option<Json>, idempotency: Option<Idempotency>) -> Box<Create> {
    Box::new(Create {
        id: JobId(Uuid::now_v7()),
        spec: Arc::new(JobSpec {
            job_type: job_type.into(),
            priority: 0,
            max_attempts: 1,
            max_lost_attempts: 3,
            retry_policy: RetryPolicy::default(),
            idempotency,
            requested_by: "".into(),
            labels: Labels::default(),
            run_timeout: None,
            payload_bytes: payload.as_ref().map_or(0, |payload| payload.len() as u32),
        }),
        payload,
        scheduled_at: None,
    })
}

pub(crate) fn created(reply: Result<JobReply, LedgerError>) -> Job {
    match reply {
        Ok(JobReply { job, deduplicated: false }) => job,
        other => panic!("not created: {other:?}"),
    }
}

pub(crate) fn report(step: Option<Step>) -> Report {
    Report { step, news: News::default(), lease: None, etag: None, actor: "".into() }
}

/// Creates jobs of one org and reports on them without leases.
pub(crate) struct Work<'a> {
    pub(crate) ledger: &'a Ledger,
    pub(crate) org: OrgId,
}

impl Work<'_> {
    pub(crate) async fn create(&self) -> JobId {
        self.create_of("t").await
    }

    pub(crate) async fn create_of(&self, job_type: &str) -> JobId {
        created(self.ledger.submit(self.org, create(job_type)).await).id
    }

    pub(crate) async fn begin(&self, job: JobId) {
        self.report(job, Step::Run).await;
    }

    /// Starts a job and completes it.
    pub(crate) async fn finish(&self, job: JobId) {
        self.begin(job).await;
        self.end(job).await;
    }

    pub(crate) async fn progress(&self, job: JobId, progress: u8) {
        self.send(job, Report { news: News { progress: Some(progress), ..News::default() }, ..report(None) }).await;
    }

    pub(crate) async fn end(&self, job: JobId) {
        let outcome = Outcome::Succeeded { result: None };
        self.report(job, Step::End(Ending { outcome, digest: Digest([9; 32]) })).await;
    }

    async fn report(&self, job: JobId, step: Step) {
        self.send(job, report(Some(step))).await;
    }

    async fn send(&self, job: JobId, report: Report) {
        let command = Command::Apply { job, command: Box::new(transition::Command::Report(report)) };
        self.ledger.submit(self.org, command).await.expect("the report is taken");
    }
}

async fn head(store: &dyn Store, org: OrgId) -> i64 {
    let query = EventQuery { filter: EventFilter::default(), after: 0, max_events: 1, max_bytes: 0 };
    store.events(org, &query).await.unwrap().head
}

pub(crate) fn poll_once<T>(future: &mut Pin<Box<impl Future<Output = T>>>) -> Poll<T> {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

/// Submits a command without waiting for its answer. Commands enter the lane in the order of the calls.
pub(crate) fn submit(
    ledger: &Ledger,
    org: OrgId,
    command: Command,
) -> oneshot::Receiver<Result<JobReply, LedgerError>> {
    let (sender, receiver) = oneshot::channel();
    let mut answer = Box::pin({
        let ledger = ledger.clone();
        async move { ledger.submit(org, command).await }
    });
    // The first poll puts the command in its lane.
    match poll_once(&mut answer) {
        Poll::Ready(reply) => {
            let _ = sender.send(reply);
        }
        Poll::Pending => {
            tokio::spawn(async move {
                let _ = sender.send(answer.await);
            });
        }
    }
    receiver
}

async fn what_gathers_while_a_head_is_won_goes_with_its_batch(database: Database) {
    let store = database.open().await;
    let (store, ledger) = breaking_with(store, &[], Limits { batch_commands: 3, ..Limits::default() });
    let org = OrgId::DEFAULT;
    let held = store.inner.begin(&[org]).await.unwrap();
    let first = submit(&ledger, org, create("first"));
    store.has_begun(1).await;
    // The batch has room for two more commands.
    let more = ["second", "third", "next batch"].map(|name| Box::pin(ledger.submit(org, create(name))));
    let mut more = Vec::from(more);
    more.iter_mut().for_each(|more| assert!(poll_once(more).is_pending()));
    drop(held);
    let mut jobs = vec![created(first.await.unwrap())];
    for answer in more {
        jobs.push(created(answer.await));
    }
    assert_eq!(jobs.iter().map(|job| job.last_seq).collect::<Vec<_>>(), [1, 2, 3, 4]);
    let batches: Vec<_> = jobs.iter().map(|job| job.last_recorded_at == jobs[0].last_recorded_at).collect();
    assert_eq!(batches, [true, true, true, false]);
    assert_eq!(store.begun(), 2);
}

async fn a_command_whose_caller_is_gone_before_its_batch_is_never_decided(database: Database) {
    let store = database.open().await;
    let (store, ledger) = breaking_with(store, &[], Limits { batch_commands: 1, ..Limits::default() });
    let org = OrgId::DEFAULT;
    let held = store.inner.begin(&[org]).await.unwrap();
    // The first command is in a batch that waits for the head. The others wait behind it.
    let first = submit(&ledger, org, create("taken"));
    store.has_begun(1).await;
    let mut gone = Box::pin(ledger.submit(org, create("gone")));
    assert!(poll_once(&mut gone).is_pending());
    drop(gone);
    let last = submit(&ledger, org, create("stays"));
    drop(held);
    assert_eq!(created(first.await.unwrap()).last_seq, 1);
    assert_eq!(created(last.await.unwrap()).last_seq, 2, "nothing was decided in between");
}

async fn a_command_that_was_taken_is_decided_though_its_caller_is_gone(database: Database) {
    let (store, ledger) = breaking(&database, &[]).await;
    let org = OrgId::DEFAULT;
    let held = store.inner.begin(&[org]).await.unwrap();
    let mut subscription = ledger.subscribe(org, None, SubscribeRequest::default()).await.unwrap();
    let mut taken = Box::pin(ledger.submit(org, create("taken")));
    assert!(poll_once(&mut taken).is_pending());
    store.has_begun(1).await;
    drop(taken);
    drop(held);
    loop {
        match timeout(PATIENCE, subscription.next()).await.expect("the event comes").unwrap() {
            Delivery::Events(events, _) => break assert_eq!(events[0].job_type.as_ref(), "taken"),
            Delivery::Snapshot(..) | Delivery::Bookmark { .. } => {}
            Delivery::End => panic!("the org's stream does not end"),
        }
    }
}

async fn queues_are_bounded_in_commands_and_in_bytes(database: Database) {
    let store = database.open().await;
    let org = OrgId::DEFAULT;
    let limits = Limits { queued_commands: 3, queued_bytes: 100_000, batch_commands: 1, ..Limits::default() };
    let (store, ledger) = breaking_with(store, &[], limits);
    let held = store.inner.begin(&[org]).await.unwrap();
    let taken = submit(&ledger, org, create("t"));
    store.has_begun(1).await;
    let waiting: Vec<_> = (0..3).map(|_| submit(&ledger, org, create("t"))).collect();
    assert_eq!(ledger.submit(org, create("t")).await, Err(LedgerError::Overloaded));
    drop(held);
    for answer in waiting.into_iter().chain([taken]) {
        created(answer.await.unwrap());
    }
    let large = Json::from_trusted(format!("\"{}\"", "x".repeat(100_000)));
    assert_eq!(ledger.submit(org, create_with("t", Some(large))).await, Err(LedgerError::Overloaded));
    created(ledger.submit(org, create("t")).await);
}

async fn what_keeps_jobs_alive_goes_before_creates_and_finds_room(database: Database) {
    let store = database.open().await;
    let org = OrgId::DEFAULT;
    let limits = Limits { queued_commands: 4, batch_commands: 1, ..Limits::default() };
    let (store, ledger) = breaking_with(store, &[], limits);
    let work = Work { ledger: &ledger, org };
    let running = work.create().await;
    work.begin(running).await;
    let held = store.inner.begin(&[org]).await.unwrap();
    let taken = submit(&ledger, org, create("t"));
    store.has_begun(2 + 1).await;
    let waiting: Vec<_> = (0..4).map(|_| submit(&ledger, org, create("t"))).collect();
    assert_eq!(ledger.submit(org, create("t")).await, Err(LedgerError::Overloaded));
    let progress = |percent| {
        let report = Report { news: News { progress: Some(percent), ..News::default() }, ..report(None) };
        Command::Apply { job: running, command: Box::new(transition::Command::Report(report)) }
    };
    let report = submit(&ledger, org, progress(50));
    assert_eq!(ledger.submit(org, progress(60)).await, Err(LedgerError::Overloaded), "its room is bounded, too");
    drop(held);
    created(taken.await.unwrap());
    let reported = report.await.unwrap().unwrap().job.last_seq;
    for answer in waiting {
        assert!(created(answer.await.unwrap()).created_seq > reported, "whatever was there before");
    }
}

async fn a_large_create_is_not_passed_over_for_ever(database: Database) {
    // Batches that are full by bytes, and by commands.
    for (batch_commands, message_bytes) in [(512, 2_000), (4, 0)] {
        let limits = Limits { batch_bytes: 10_000, batch_commands, ..Limits::default() };
        let (store, ledger) = breaking_with(database.open().await, &[], limits);
        let org = OrgId(Uuid::now_v7());
        let work = Work { ledger: &ledger, org };
        let running = work.create().await;
        work.begin(running).await;
        let progress = |percent: u8| {
            let message = "x".repeat(message_bytes).into();
            let report = Report { news: News { progress: Some(percent), message, ..News::default() }, ..report(None) };
            Command::Apply { job: running, command: Box::new(transition::Command::Report(report)) }
        };
        let held = store.inner.begin(&[org]).await.unwrap();
        let first = submit(&ledger, org, create("t"));
        store.has_begun(3).await;
        let large = Json::from_trusted(format!("\"{}\"", "x".repeat(9_000)));
        let large = submit(&ledger, org, create_with("t", Some(large)));
        let reports: Vec<_> = (0..20).map(|n| submit(&ledger, org, progress(n))).collect();
        drop(held);
        created(first.await.unwrap());
        let created_at = created(large.await.unwrap()).created_seq;
        let mut after = 0;
        for answer in reports {
            after += usize::from(answer.await.unwrap().unwrap().job.last_seq > created_at);
        }
        assert!(after >= 10, "it waited for two batches at most, and {after} reports came after it");
        store.inner.close().await;
    }
}

async fn batches_are_bounded_and_orgs_take_turns(database: Database) {
    // Each transaction reads the clock once, so equal times mean the same transaction.
    let store = database.open_with(ManualClock::stepping(1_000_000)).await;
    let ledger = start(&store, Limits { batch_commands: 10, ..Limits::default() });
    let (busy, quiet) = (OrgId(Uuid::from_u128(1)), OrgId(Uuid::from_u128(2)));
    let held = store.begin(&[busy]).await.unwrap();
    let many: Vec<_> = (0..95).map(|_| submit(&ledger, busy, create("t"))).collect();
    let mut one = submit(&ledger, quiet, create("t"));
    // On PostgreSQL a head is a row, so a wait for one org's head does not delay another org.
    let early = if database.is_postgres() { Some(created((&mut one).await.unwrap())) } else { None };
    drop(held);
    let mut batches: BTreeMap<Time, usize> = BTreeMap::new();
    for answer in many {
        *batches.entry(created(answer.await.unwrap()).created_at).or_default() += 1;
    }
    assert!(batches.values().all(|size| *size <= 10), "{batches:?}");
    let quiet_at = match early {
        Some(job) => job.created_at,
        None => created(one.await.unwrap()).created_at,
    };
    let before = batches.keys().filter(|at| **at < quiet_at).count();
    assert!(before <= 2, "the quiet org waited for {before} batches of the busy one");
}

async fn batches_are_bounded_in_bytes_but_one_large_command_goes_through(database: Database) {
    let store = database.open_with(ManualClock::stepping(1_000_000)).await;
    let ledger = start(&store, Limits { batch_bytes: 10_000, ..Limits::default() });
    let org = OrgId::DEFAULT;
    let held = store.begin(&[org]).await.unwrap();
    let payload = |bytes| Some(Json::from_trusted(format!("\"{}\"", "x".repeat(bytes))));
    let answers: Vec<_> = [4_000, 4_000, 4_000, 50_000, 10]
        .map(|bytes| submit(&ledger, org, create_with("t", payload(bytes))))
        .into_iter()
        .collect();
    drop(held);
    let mut batches: BTreeMap<Time, Vec<i64>> = BTreeMap::new();
    for answer in answers {
        let job = created(answer.await.unwrap());
        batches.entry(job.created_at).or_default().push(job.last_seq);
    }
    // The first command is in a batch when the others arrive. Its batch has it alone or with the second.
    let sizes: Vec<_> = batches.values().map(Vec::len).collect();
    assert!(sizes.iter().all(|size| *size <= 2), "{batches:?}");
    assert!(batches.values().any(|seqs| seqs == &[4]), "the large one goes alone: {batches:?}");
}

#[tokio::test]
async fn recorded_time_never_falls_when_the_clock_does() {
    let database = Database::sqlite();
    let clock = ManualClock::stepping(1);
    let store = database.open_with(Arc::clone(&clock) as Arc<dyn Clock>).await;
    let ledger = start(&store, Limits::default());
    let first = created(ledger.submit(OrgId::DEFAULT, create("t")).await);
    clock.set_back(3_600_000_000);
    let second = created(ledger.submit(OrgId::DEFAULT, create("t")).await);
    assert_eq!(second.last_recorded_at, first.last_recorded_at);
    assert!(second.created_at < first.created_at, "when it happened the clock says, as it is");
    let other_org = created(ledger.submit(OrgId(Uuid::from_u128(1)), create("t")).await);
    assert!(other_org.created_at < first.created_at, "another log has a time of its own");
}

async fn one_command_that_the_database_refuses_fails_alone(database: Database) {
    let store = database.open().await;
    database.refuse_jobs_of_type("poison").await;
    let ledger = start(&store, Limits::default());
    let org = OrgId::DEFAULT;
    let held = store.begin(&[org]).await.unwrap();
    let answers: Vec<_> =
        ["a", "b", "poison", "c"].map(|job_type| submit(&ledger, org, create(job_type))).into_iter().collect();
    drop(held);
    let mut seqs = Vec::new();
    for (at, answer) in answers.into_iter().enumerate() {
        match answer.await.unwrap() {
            Err(error) => assert_eq!((at, error), (2, LedgerError::Refused)),
            reply => seqs.push(created(reply).last_seq),
        }
    }
    assert_eq!(seqs, [1, 2, 3], "and leaves no hole");
    let statistics = ledger.statistics(org, &StatisticsQuery::of(&[])).await.unwrap();
    assert_eq!(statistics.types.len(), 3);
}

async fn a_commit_that_broke_after_it_happened_is_answered_and_not_repeated(database: Database) {
    let (store, ledger) = breaking(&database, &[Break::After]).await;
    let org = OrgId::DEFAULT;
    let request = SubscribeRequest { after: Some(0), ..SubscribeRequest::default() };
    let mut subscription = ledger.subscribe(org, None, request).await.unwrap();
    assert!(matches!(subscription.next().await.unwrap(), Delivery::Bookmark { seq: 0, caught_up: true }));

    // The subscriber is live, and the tail never gets the first event. The event is delivered all the same, and at once.
    for (job_type, seq) in [("t", 1), ("u", 2)] {
        assert_eq!(created(ledger.submit(org, create(job_type)).await).last_seq, seq);
        assert_eq!(head(&*store, org).await, seq);
        let delivered = async {
            loop {
                match subscription.next().await.unwrap() {
                    Delivery::Events(events, _) => break events.iter().map(|event| event.seq).collect::<Vec<_>>(),
                    Delivery::Snapshot(..) | Delivery::Bookmark { .. } => {}
                    Delivery::End => panic!("the org's stream does not end"),
                }
            }
        };
        let delivered = timeout(Duration::from_secs(10), delivered).await.expect("sooner than the next bookmark");
        assert_eq!(delivered, [seq]);
    }
}

async fn a_commit_that_broke_before_it_happened_is_run_again(database: Database) {
    let (store, ledger) = breaking(&database, &[Break::Before]).await;
    assert_eq!(created(ledger.submit(OrgId::DEFAULT, create("t")).await).last_seq, 1);
    assert_eq!(head(&*store, OrgId::DEFAULT).await, 1);
    assert_eq!(store.begun(), 3, "the batch, the look, and the batch again");
}

async fn an_outcome_that_stays_unknown_is_said_to_be(database: Database) {
    let (store, ledger) = breaking(&database, &[Break::Away]).await;
    let org = OrgId::DEFAULT;
    assert_eq!(ledger.submit(org, create("t")).await, Err(LedgerError::OutcomeUnknown));
    assert_eq!(ledger.submit(org, create("t")).await, Err(LedgerError::Unavailable));
    store.come_back().await;
    assert_eq!(created(ledger.submit(org, create("t")).await).last_seq, 1);
}

async fn a_commit_without_room_says_so_and_is_not_repeated(database: Database) {
    let (store, ledger) = breaking(&database, &[Break::Full]).await;
    assert_eq!(ledger.submit(OrgId::DEFAULT, create("t")).await, Err(LedgerError::StorageFull));
    assert_eq!(store.begun(), 1);
    assert_eq!(created(ledger.submit(OrgId::DEFAULT, create("t")).await).last_seq, 1);
}

async fn a_batch_that_got_in_the_way_of_another_is_run_again(database: Database) {
    let (store, ledger) = breaking(&database, &[Break::Conflict; 7]).await;
    let org = OrgId::DEFAULT;
    assert_eq!(ledger.submit(org, create("t")).await, Err(LedgerError::Unavailable), "not for ever");
    assert_eq!(store.begun(), 4);
    assert_eq!(created(ledger.submit(org, create("t")).await).last_seq, 1);
    assert_eq!(store.begun(), 8);
}

async fn subscribers_hear_of_an_undecided_commit_once_it_is_decided(database: Database) {
    let (store, ledger) = breaking(&database, &[Break::Late]).await;
    let org = OrgId::DEFAULT;
    let request = SubscribeRequest { after: Some(0), ..SubscribeRequest::default() };
    let mut subscription = ledger.subscribe(org, None, request).await.unwrap();
    assert_eq!(ledger.submit(org, create("t")).await, Err(LedgerError::OutcomeUnknown));
    // The subscriber has read the log, found nothing, and is live again.
    assert!(matches!(subscription.next().await.unwrap(), Delivery::Bookmark { seq: 0, caught_up: true }));
    store.come_back().await;
    let heard = async {
        loop {
            if let Delivery::Events(events, _) = subscription.next().await.unwrap() {
                break events[0].seq;
            }
        }
    };
    assert_eq!(timeout(Duration::from_secs(10), heard).await.expect("sooner than the next bookmark"), 1);
    assert_eq!(created(ledger.submit(org, create("t")).await).last_seq, 2);
}

async fn a_reader_that_retention_overtakes_is_told(database: Database) {
    let store = database.open().await;
    let ledger = start(&store, Limits::default());
    let org = OrgId::DEFAULT;
    for _ in 0..300 {
        created(ledger.submit(org, create("t")).await);
    }
    let request = SubscribeRequest { after: Some(0), ..SubscribeRequest::default() };
    let mut subscription = ledger.subscribe(org, None, request).await.unwrap();
    assert!(matches!(subscription.next().await.unwrap(), Delivery::Events(events, _) if events.len() == 256));
    database.tamper("UPDATE org_head SET floor_seq = 280").await;
    let expired = subscription.next().await.unwrap_err();
    assert_eq!(expired, LedgerError::CursorExpired { oldest: 280, head: 300 });
}

async fn a_bookmark_on_the_way_does_not_claim_the_head(database: Database) {
    let store = database.open().await;
    // A bookmark is due each time.
    let ledger = start(&store, Limits { bookmark_interval: Duration::ZERO, ..Limits::default() });
    let org = OrgId::DEFAULT;
    created(ledger.submit(org, create("t")).await);
    let request = SubscribeRequest { after: Some(0), ..SubscribeRequest::default() };
    let mut behind = ledger.subscribe(org, None, request).await.unwrap();
    assert!(matches!(behind.next().await.unwrap(), Delivery::Bookmark { seq: 0, caught_up: false }));
}

async fn creates_with_one_key_in_one_batch_make_one_job(database: Database) {
    let (store, ledger) = breaking(&database, &[]).await;
    let org = OrgId::DEFAULT;
    let held = store.inner.begin(&[org]).await.unwrap();
    // The first command waits for the head, and the others go with it.
    let first = submit(&ledger, org, create("t"));
    store.has_begun(1).await;
    let answers: Vec<_> = (0..5).map(|_| submit(&ledger, org, create_once("k"))).collect();
    drop(held);
    created(first.await.unwrap());
    let mut ids = Vec::new();
    for (n, answer) in answers.into_iter().enumerate() {
        let Ok(JobReply { job, deduplicated }) = answer.await.unwrap() else { panic!("not created") };
        assert_eq!(deduplicated, n > 0);
        ids.push(job.id);
    }
    assert!(ids.iter().all(|id| *id == ids[0]));
    assert_eq!(store.begun(), 1, "the database never had to refuse one");
}

async fn a_history_ends_where_the_log_did_when_it_was_asked_for(database: Database) {
    let store = database.open().await;
    let ledger = start(&store, Limits::default());
    let org = OrgId::DEFAULT;
    for _ in 0..3 {
        created(ledger.submit(org, create("t")).await);
    }
    let request = SubscribeRequest { after: Some(1), history_only: true, ..SubscribeRequest::default() };
    let mut subscription = ledger.subscribe(org, None, request).await.unwrap();
    created(ledger.submit(org, create("t")).await);
    let Delivery::Events(events, _) = subscription.next().await.unwrap() else { panic!("no events") };
    assert_eq!(events.iter().map(|event| event.seq).collect::<Vec<_>>(), [2, 3]);
    assert!(matches!(subscription.next().await.unwrap(), Delivery::Bookmark { seq: 3, caught_up: true }));
    assert!(matches!(subscription.next().await.unwrap(), Delivery::End));
    assert!(matches!(subscription.next().await.unwrap(), Delivery::End));
}

async fn closing_answers_what_was_accepted_and_refuses_the_rest(database: Database) {
    let store = database.open().await;
    let (ledger, work) = Ledger::new(Arc::clone(&store), Limits { batch_commands: 4, ..Limits::default() });
    let org = OrgId::DEFAULT;
    let accepted: Vec<_> = (0..10).map(|_| submit(&ledger, org, create("t"))).collect();
    ledger.close();
    assert_eq!(ledger.submit(org, create("t")).await, Err(LedgerError::Draining));
    timeout(PATIENCE, work).await.expect("the lanes end once they are empty");
    for answer in accepted {
        created(answer.await.unwrap());
    }
}

/// No acknowledged write is lost when callers are dropped at any point of a command's life. sqlx 0.9.0 returned a connection
/// with an open transaction to its pool when a `begin` was dropped, and later writes on it were acknowledged and lost.
async fn no_acknowledged_write_is_lost_among_callers_that_give_up(database: Database) {
    let store = database.open().await;
    let (ledger, lanes) = start_lanes(&store, Limits { batch_commands: 8, ..Limits::default() });
    let org = OrgId::DEFAULT;
    let mut callers = JoinSet::new();
    for caller in 0..8u64 {
        let ledger = ledger.clone();
        callers.spawn(async move {
            let mut acknowledged = Vec::new();
            for round in 0..100u64 {
                let patience = Duration::from_micros(caller * round * 7 % 3_000);
                if let Ok(reply) = timeout(patience, ledger.submit(org, create("t"))).await {
                    acknowledged.push(created(reply).id);
                }
                let _ = timeout(patience / 2, ledger.statistics(org, &StatisticsQuery::of(&[]))).await;
            }
            acknowledged.push(created(ledger.submit(org, create("t")).await).id);
            acknowledged
        });
    }
    let acknowledged = callers.join_all().await.concat();
    ledger.close();
    lanes.await.unwrap();
    store.close().await;
    drop(store);
    let reopened = database.open().await;
    for id in &acknowledged {
        assert!(reopened.job(org, *id).await.unwrap().is_some(), "{id} was acknowledged and is gone");
    }
    let statistics = reopened.statistics(org, &StatisticsQuery::of(&[])).await.unwrap();
    let query = EventQuery { filter: EventFilter::default(), after: 0, max_events: 10_000, max_bytes: usize::MAX };
    let events = reopened.events(org, &query).await.unwrap().events;
    assert!(events.iter().zip(1..).all(|(event, seq)| event.seq == seq));
    assert_eq!(statistics.as_of_seq, events.len() as i64);
    println!("{} of {} writes were acknowledged to callers that still listened", acknowledged.len(), events.len());
    assert!(acknowledged.len() < 808, "some callers gave up");
    assert!(acknowledged.len() <= events.len());
}
