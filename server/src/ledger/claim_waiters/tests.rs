//! The order in which waiting claims are woken, tested without a ledger.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use super::*;

const ORG: OrgId = OrgId::DEFAULT;

fn types(names: &[&str]) -> Types {
    names.iter().map(|name| Arc::from(*name)).collect()
}

fn enter(waiting: &Arc<ClaimWaiters>, names: &[&str]) -> Visit {
    waiting.enter(ORG, types(names)).expect("there is room")
}

fn ready(jobs: &[(&str, usize)]) -> BTreeMap<Arc<str>, usize> {
    jobs.iter().map(|(name, n)| (Arc::from(*name), *n)).collect()
}

/// A claim that found nothing at some generation, and waits.
type Asleep<'a> = Pin<Box<dyn Future<Output = Result<(), LedgerError>> + 'a>>;

fn sleep(visit: &mut Visit, generation: i64) -> Asleep<'_> {
    visit.found(generation, false);
    let mut news: Asleep<'_> = Box::pin(visit.news(generation));
    assert!(!is_awake(&mut news));
    news
}

fn is_awake(news: &mut Asleep<'_>) -> bool {
    news.as_mut().poll(&mut Context::from_waker(Waker::noop())) == Poll::Ready(Ok(()))
}

fn awake(sleepers: &mut [Asleep<'_>]) -> Vec<bool> {
    sleepers.iter_mut().map(is_awake).collect()
}

#[test]
fn as_many_are_woken_as_jobs_became_ready() {
    let waiting = ClaimWaiters::new(100, 100);
    let mut visits: Vec<_> = (0..5).map(|_| enter(&waiting, &["a"])).collect();
    let mut others = [enter(&waiting, &["b"]), enter(&waiting, &[]), enter(&waiting, &["a", "b"])];
    let mut of_a: Vec<_> = visits.iter_mut().map(|visit| sleep(visit, 0)).collect();
    let mut others: Vec<_> = others.iter_mut().map(|visit| sleep(visit, 0)).collect();
    waiting.became_ready(ORG, 1, &ready(&[("a", 2), ("c", 9)]));
    assert_eq!(awake(&mut of_a[..3]), [false; 3]);
    assert_eq!(awake(&mut of_a[3..]), [true, true], "who came last");
    assert_eq!(awake(&mut others), [false, true, true], "one queue for each set of types");
    assert_eq!(waiting.sleeping(), 4);
}

#[test]
fn types_are_forgotten_with_the_last_claim_that_names_them() {
    let waiting = ClaimWaiters::new(100, 100);
    let mut visits = [&["a", "b"][..], &["a"], &["a"], &[]].map(|names| enter(&waiting, names));
    let org = Arc::clone(&visits[0].org);
    let [two, one, same, any] = &mut visits;
    let (asleep, others) = (sleep(two, 0), [sleep(one, 0), sleep(same, 0), sleep(any, 0)]);
    let named = || org.queues.lock().by_type.iter().map(|(name, _)| name.to_string()).collect::<Vec<_>>();
    assert_eq!(named(), ["a", "a", "b"], "those for the same types stand in one queue");
    drop(asleep);
    assert_eq!(named(), ["a"]);
    drop(others);
    assert!(named().is_empty());
}

#[test]
fn news_from_elsewhere_wakes_one_and_it_wakes_more_if_there_is_more() {
    let waiting = ClaimWaiters::new(100, 100);
    let mut visits: Vec<_> = (0..6).map(|_| enter(&waiting, &["a"])).collect();
    let (last, rest) = visits.split_last_mut().unwrap();
    let mut one = sleep(last, 0);
    let mut others: Vec<_> = rest.iter_mut().map(|visit| sleep(visit, 0)).collect();
    waiting.heard(ORG, 3);
    waiting.heard(ORG, 2);
    assert!(is_awake(&mut one));
    assert_eq!(awake(&mut others), [false; 5]);
    drop(one);
    last.found(3, true);
    assert_eq!(awake(&mut others[..3]), [false; 3]);
    assert_eq!(awake(&mut others[3..]), [true, true]);
}

#[test]
fn what_is_heard_while_somebody_looks_is_looked_into_after() {
    let waiting = ClaimWaiters::new(100, 100);
    let (mut second, mut first) = (enter(&waiting, &["a"]), enter(&waiting, &["a"]));
    let mut one = sleep(&mut first, 0);
    let mut other = sleep(&mut second, 0);
    waiting.heard(ORG, 1);
    assert!(is_awake(&mut one));
    drop(one);
    // It checked at generation 1, and 2 arrives meanwhile.
    waiting.heard(ORG, 2);
    assert!(!is_awake(&mut other));
    first.found(1, false);
    assert!(is_awake(&mut other));
}

#[test]
fn a_claim_hears_of_what_came_between_its_look_and_its_wait() {
    let waiting = ClaimWaiters::new(100, 100);
    let mut visit = enter(&waiting, &["a"]);
    waiting.became_ready(ORG, 1, &ready(&[("a", 1)]));
    visit.found(0, false);
    let mut news: Asleep<'_> = Box::pin(visit.news(0));
    assert!(is_awake(&mut news));
}

#[test]
fn what_one_queue_has_seen_is_news_to_another() {
    let waiting = ClaimWaiters::new(100, 100);
    let mut of_b = enter(&waiting, &["b"]);
    let mut news = sleep(&mut of_b, 4);
    // A claim for other types sees another server's batch before that is announced.
    enter(&waiting, &["a"]).found(5, false);
    waiting.heard(ORG, 5);
    assert!(is_awake(&mut news));
}

#[test]
fn news_that_is_not_true_is_looked_into_once() {
    let waiting = ClaimWaiters::new(100, 100);
    let mut visit = enter(&waiting, &["a"]);
    let mut news = sleep(&mut visit, 4);
    waiting.heard(ORG, 1_000);
    assert!(is_awake(&mut news));
    drop(news);
    let mut news = sleep(&mut visit, 4);
    waiting.heard(ORG, 5);
    assert!(is_awake(&mut news), "what is true is heard again");
}

#[test]
fn a_generation_that_was_skipped_is_looked_into() {
    let waiting = ClaimWaiters::new(100, 100);
    let mut visit = enter(&waiting, &["a"]);
    let mut news = sleep(&mut visit, 0);
    // Generation 1, another server's, may have made a job ready. Generation 2, this server's, has none for the claim.
    waiting.became_ready(ORG, 2, &ready(&[("b", 1)]));
    assert!(is_awake(&mut news));
    drop(news);
    visit.found(2, false);
    let mut news = sleep(&mut visit, 2);
    waiting.became_ready(ORG, 3, &ready(&[("b", 1)]));
    assert!(!is_awake(&mut news));
}

#[test]
fn whoever_was_woken_and_goes_hands_the_news_on() {
    // The claim leaves before it has noticed that it was woken, and after.
    for notices in [false, true] {
        let waiting = ClaimWaiters::new(100, 100);
        let mut visits: Vec<_> = (0..3).map(|_| enter(&waiting, &["a"])).collect();
        let mut goes = visits.pop().unwrap();
        let mut stays = visits.pop().unwrap();
        let mut last = visits.pop().unwrap();
        let mut going = sleep(&mut goes, 0);
        let mut going_too = sleep(&mut stays, 0);
        let mut staying = sleep(&mut last, 0);
        waiting.heard(ORG, 1);
        if notices {
            assert!(is_awake(&mut going));
        }
        drop(going);
        drop(goes);
        assert!(is_awake(&mut going_too));
        drop(going_too);
        drop(stays);
        assert!(is_awake(&mut staying));
    }
}

#[test]
fn nothing_is_left_of_claims_that_are_gone() {
    let waiting = ClaimWaiters::new(2, 2);
    let (mut first, second) = (enter(&waiting, &["a"]), enter(&waiting, &[]));
    assert!(matches!(waiting.enter(ORG, types(&[])), Err(LedgerError::Overloaded)));
    let news = sleep(&mut first, 0);
    waiting.heard(ORG, 1);
    drop(news);
    drop(first);
    assert_eq!((waiting.sleeping(), waiting.orgs().len()), (0, 1));
    drop(second);
    assert!(waiting.orgs.lock().is_empty() && waiting.state.lock().claims == 0);
}

#[test]
fn a_stop_sends_everyone_away() {
    let waiting = ClaimWaiters::new(10, 10);
    let mut visit = enter(&waiting, &["a"]);
    let mut news = sleep(&mut visit, 0);
    waiting.close();
    let sent = news.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert_eq!(sent, Poll::Ready(Err(LedgerError::Draining)));
    drop(news);
    let mut again: Asleep<'_> = Box::pin(visit.news(0));
    let sent = again.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert_eq!(sent, Poll::Ready(Err(LedgerError::Draining)));
    assert!(matches!(waiting.enter(ORG, types(&[])), Err(LedgerError::Draining)));
}
