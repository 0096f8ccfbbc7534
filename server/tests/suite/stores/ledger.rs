//! The ledger over a real database: order, bounds, and commits that break.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use jobledger_server::{
    domain::{
        bulk::{BulkAction, BulkRequest},
        clock::Clock,
        edit::EditableFields,
        id::{Digest, JobId, OrgId},
        job::{Idempotency, Job, JobSpec},
        job_filter::JobFilter,
        json::Json,
        transition::{self, Ending, News, Outcome, Report, Step},
    },
    ledger::{BulkCommand, Command, Create, Delivery, JobReply, Ledger, LedgerError, Limits, SubscribeRequest},
    store::{DueWork, EventFilter, EventQuery, StatisticsQuery, Store},
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
    a_reader_that_retention_overtakes_is_told,
    a_bookmark_on_the_way_does_not_claim_the_head,
    creates_with_one_key_in_one_batch_make_one_job,
    a_bulk_operation_stays_due_when_times_are_set_right,
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

pub(crate) fn breaking_with(store: Arc<dyn Store>, breaks: &[Break], limits: Limits) -> (Arc<Breaking>, Ledger) {
    let store = Breaking::new(store, breaks);
    let ledger = start(&(Arc::clone(&store) as Arc<dyn Store>), limits);
    (store, ledger)
}

pub(crate) fn create(job_type: &str) -> Command {
    create_with(job_type, None)
}

pub(crate) fn create_with(job_type: &str, payload: Option<Json>) -> Command {
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
            idempotency,
            payload_bytes: payload.as_ref().map_or(0, |payload| payload.len() as u32),
            ..JobSpec::of_type(job_type)
        }),
        payload,
        scheduled_at: None,
    })
}

pub(crate) fn created(reply: Result<JobReply, LedgerError>) -> Job {
    match reply {
        Ok(JobReply { job, deduplicated: false, .. }) => job,
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

    pub(crate) async fn report(&self, job: JobId, step: Step) {
        self.send(job, report(Some(step))).await;
    }

    pub(crate) async fn send(&self, job: JobId, report: Report) {
        let command = Command::Apply { job, command: Box::new(transition::Command::Report(report)) };
        self.ledger.submit(self.org, command).await.expect("the report is taken");
    }
}

pub(crate) async fn head(store: &dyn Store, org: OrgId) -> i64 {
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
        let Ok(JobReply { job, deduplicated, .. }) = answer.await.unwrap() else { panic!("not created") };
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
    assert_eq!(events.iter().map(|event| event.seq()).collect::<Vec<_>>(), [2, 3]);
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
    assert!(events.iter().zip(1..).all(|(event, seq)| event.seq() == seq));
    assert_eq!(statistics.as_of_seq, events.len() as i64);
    println!("{} of {} writes were acknowledged to callers that still listened", acknowledged.len(), events.len());
    assert!(acknowledged.len() < 808, "some callers gave up");
    assert!(acknowledged.len() <= events.len());
}

async fn a_bulk_operation_stays_due_when_times_are_set_right(database: Database) {
    let store = database.open().await;
    let (ledger, org) = (start(&store, Limits::default()), OrgId::DEFAULT);
    ledger.submit(org, create("t")).await.unwrap();
    let request = BulkRequest {
        id: Uuid::new_v4(),
        action: BulkAction::Cancel,
        edit: EditableFields::default(),
        filter: JobFilter::default(),
        reason: "".into(),
        is_dry_run: false,
        expected_count: Some(1),
        digest: Digest([0; 32]),
    };
    ledger.bulk(org, BulkCommand::Start(Box::new(request))).await.unwrap();
    // No job is due.
    ledger.redate(org, Duration::from_secs(3_600)).await.unwrap();
    assert_eq!(store.take_due(DueWork::Jobs, 10, Duration::ZERO).await.unwrap(), [org]);
}
