//! Tails and channels, tested without a ledger.

use chrono::DateTime;
use uuid::Uuid;

use super::*;
use crate::domain::{
    event::{EventKind, JobEvent},
    id::JobId,
    job::Labels,
    status::JobStatus,
};

pub(in crate::ledger) fn events(seqs: impl IntoIterator<Item = i64>) -> Vec<LogEvent> {
    let event = |seq| JobEvent {
        org_id: OrgId::DEFAULT,
        seq,
        job_id: JobId(Uuid::nil()),
        job_seq: seq,
        ts: DateTime::UNIX_EPOCH,
        recorded_at: DateTime::UNIX_EPOCH,
        kind: EventKind::Progress,
        prev_status: Some(JobStatus::Running),
        next_status: JobStatus::Running,
        attempt: 1,
        actor: "".into(),
        job_type: "t".into(),
        labels: Labels::default(),
        stage: None,
        progress: None,
        message: "".into(),
        result: None,
        error: None,
        scheduled_at: None,
        origin: None,
        is_past: false,
        bulk_operation: None,
        edit: None,
    };
    seqs.into_iter().map(|seq| LogEvent::Job(Arc::new(event(seq)))).collect()
}

/// The weight of one such event.
fn weight() -> usize {
    EncodedEvent::new(events([1]).remove(0)).weight()
}

fn listen(tail_bytes: usize) -> (Arc<Hub>, Listener) {
    let hub = Arc::new(Hub::new(tail_bytes));
    let listener = hub.listen(OrgId::DEFAULT);
    (hub, listener)
}

/// The `seq`s after a cursor, or why there are none.
fn after(listener: &Listener, cursor: i64) -> Result<Vec<i64>, &'static str> {
    match listener.recent(cursor, 100, usize::MAX) {
        Recent::Events(events) => Ok(events.iter().map(|event| event.seq()).collect()),
        Recent::AtHead => Err("at head"),
        Recent::Awaited => Err("awaited"),
        Recent::Behind => Err("behind"),
    }
}

/// The events with another kind and message.
fn of_kind(kind: EventKind, message: &str, seqs: impl IntoIterator<Item = i64>) -> Vec<LogEvent> {
    let event = |event: &LogEvent| JobEvent { kind, message: message.into(), ..JobEvent::clone(event.job().unwrap()) };
    events(seqs).iter().map(|of| LogEvent::Job(Arc::new(event(of)))).collect()
}

#[test]
fn a_tail_has_nothing_from_before_an_erasure() {
    let (hub, listener) = listen(usize::MAX);
    hub.publish(OrgId::DEFAULT, &of_kind(EventKind::Progress, "of a person", 1..=3));
    // A bulk operation: it cancels one job and erases it, and erases another.
    let batch = [
        of_kind(EventKind::Canceled, "", [4]),
        of_kind(EventKind::Erased, "", [5, 6]),
        of_kind(EventKind::Progress, "of another", [7]),
    ];
    hub.publish(OrgId::DEFAULT, &batch.concat());
    assert_eq!((after(&listener, 2), after(&listener, 3)), (Err("behind"), Ok(vec![4, 5, 6, 7])));
    // Somebody had canceled the job and said why.
    hub.publish(OrgId::DEFAULT, &of_kind(EventKind::Canceled, "of a person", [8]));
    hub.publish(OrgId::DEFAULT, &of_kind(EventKind::Erased, "", [9]));
    assert_eq!((after(&listener, 7), after(&listener, 8)), (Err("behind"), Ok(vec![9])));
    assert_eq!(hub.held_bytes.load(Ordering::Relaxed), weight());
}

#[test]
fn a_tail_is_an_unbroken_run_of_events() {
    let (hub, listener) = listen(usize::MAX);
    hub.publish(OrgId::DEFAULT, &events(5..=6));
    hub.publish(OrgId::DEFAULT, &events(7..=8));
    assert_eq!(after(&listener, 4), Ok(vec![5, 6, 7, 8]));
    assert_eq!(after(&listener, 6), Ok(vec![7, 8]));
    assert_eq!((after(&listener, 3), after(&listener, 8)), (Err("behind"), Err("at head")));
    // Another server wrote 9. Events after it are not added before 9 is read.
    hub.publish(OrgId::DEFAULT, &events(10..=11));
    assert_eq!((after(&listener, 8), hub.gap(OrgId::DEFAULT)), (Err("awaited"), Some(Gap { end: 8, known: 11 })));
    hub.publish(OrgId::DEFAULT, &events(9..=10));
    assert_eq!((after(&listener, 8), hub.gap(OrgId::DEFAULT)), (Ok(vec![9, 10]), Some(Gap { end: 10, known: 11 })));
    // Events published twice are added once.
    hub.publish(OrgId::DEFAULT, &events(9..=11));
    hub.publish(OrgId::DEFAULT, &events(10..=11));
    assert_eq!((after(&listener, 8), hub.gap(OrgId::DEFAULT)), (Ok(vec![9, 10, 11]), None));
}

#[tokio::test]
async fn what_is_heard_of_is_fetched_once_somebody_has_read_up_to_the_head() {
    let (hub, listener) = listen(usize::MAX);
    hub.heard(OrgId::DEFAULT, 5);
    assert_eq!((after(&listener, 3), hub.gap(OrgId::DEFAULT)), (Err("behind"), None));
    // The head was read before 5 was committed.
    listener.reached(4);
    assert_eq!((after(&listener, 4), hub.gap(OrgId::DEFAULT)), (Err("awaited"), Some(Gap { end: 4, known: 5 })));
    assert_eq!(hub.behind().await, [OrgId::DEFAULT]);
    hub.publish(OrgId::DEFAULT, &events([5]));
    assert_eq!((after(&listener, 4), after(&listener, 5)), (Ok(vec![5]), Err("at head")));
    hub.restart(OrgId::DEFAULT);
    assert_eq!((after(&listener, 5), hub.gap(OrgId::DEFAULT)), (Err("behind"), None));
}

#[test]
fn a_tail_keeps_no_more_than_its_share() {
    let (hub, listener) = listen(0);
    let fits = MIN_TAIL_BYTES / weight();
    hub.publish(OrgId::DEFAULT, &events(1..=1_000));
    let first = 1_000 - fits as i64 + 1;
    assert_eq!(after(&listener, first - 1).map(|seqs| seqs[0]), Ok(first));
    assert_eq!(after(&listener, first - 2), Err("behind"));

    let (hub, listener) = listen(0);
    let mut large = events([1]);
    let LogEvent::Job(first) = &mut large[0] else { unreachable!("they are of a job") };
    Arc::get_mut(first).unwrap().message = "x".repeat(MIN_TAIL_BYTES).into();
    hub.publish(OrgId::DEFAULT, &large);
    assert_eq!(after(&listener, 0), Err("behind"), "what no tail can hold is in the database");
}

#[test]
fn tails_of_many_orgs_stay_within_the_whole() {
    let weight = weight();
    let hub = Arc::new(Hub::new(1_000 * weight));
    // The first tail fills its share while it is alone; the others come later.
    let listeners: Vec<_> = (0..50)
        .map(|n| {
            let org = OrgId(Uuid::from_u128(n));
            let listener = hub.listen(org);
            hub.publish(org, &events(1..=2_000));
            listener
        })
        .collect();
    let held = hub.held_bytes.load(Ordering::Relaxed);
    assert!(held <= 1_000 * weight + 50 * MIN_TAIL_BYTES, "{held} bytes are held");
    drop(listeners);
    assert_eq!(hub.held_bytes.load(Ordering::Relaxed), 0);
}

#[test]
fn slices_are_bounded_in_events_and_bytes() {
    let (hub, listener) = listen(usize::MAX);
    hub.publish(OrgId::DEFAULT, &events(1..=10));
    let slice = |max_events, max_bytes| match listener.recent(0, max_events, max_bytes) {
        Recent::Events(events) => events.len(),
        Recent::AtHead | Recent::Awaited | Recent::Behind => 0,
    };
    assert_eq!((slice(4, usize::MAX), slice(100, 0), slice(100, 2 * weight() + 1)), (4, 1, 3));
}

#[test]
fn a_channel_lives_as_long_as_somebody_listens() {
    let (hub, first) = listen(usize::MAX);
    let second = hub.listen(OrgId::DEFAULT);
    drop(first);
    hub.publish(OrgId::DEFAULT, &events([1]));
    assert_eq!(after(&second, 0), Ok(vec![1]));
    drop(second);
    assert!(hub.channels.lock().is_empty());
}
