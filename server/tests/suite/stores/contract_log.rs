//! What every store must do for the log: pages, filters, months.

use std::sync::Arc;

use chrono::Months;
use jobledger_server::{
    domain::{event::JobEvent, job::Job, status::JobStatus},
    store::{Changed, Changes, EventFilter, EventQuery, Head, Needs, Store},
};

use crate::{
    stores::contract::contract,
    support::factory::{all, event, fill, job, load, org, time, write},
    support::harness::Database,
};

contract! {
    pages_are_cut_by_count_and_by_bytes_without_a_gap,
    filtered_pages_move_on_where_nothing_matches,
    a_log_goes_on_from_month_to_month,
}

async fn pages_are_cut_by_count_and_by_bytes_without_a_gap(store: Arc<dyn Store>) {
    let org = org();
    fill(&*store, org, "t", 25).await;
    for limits in [(7, usize::MAX), (1, usize::MAX), (100, 1), (100, 3_000)] {
        let (mut after, mut seen, mut pages) = (0, Vec::new(), 0);
        loop {
            let (max_events, max_bytes) = limits;
            let page = store.events(org, &EventQuery { max_events, max_bytes, ..all(after) }).await.unwrap();
            assert_eq!(page.head, 25);
            seen.extend(page.events.iter().map(|event| event.seq()));
            assert_eq!(page.through, *seen.last().unwrap());
            assert!(page.events.len() <= max_events);
            after = page.through;
            pages += 1;
            if after == page.head {
                break;
            }
        }
        assert_eq!(seen, (1..=25).collect::<Vec<_>>(), "{limits:?}");
        assert!(pages >= 3, "{limits:?} made {pages} pages");
    }
    let page = store.events(org, &all(25)).await.unwrap();
    assert_eq!((page.events.len(), page.through), (0, 25));
}

async fn filtered_pages_move_on_where_nothing_matches(store: Arc<dyn Store>) {
    let org = org();
    fill(&*store, org, "common", 5_000).await;
    let rare = fill(&*store, org, "rare", 1).await.remove(0);
    fill(&*store, org, "common", 10).await;
    let read = async |filter: EventFilter| {
        let (mut after, mut seen, mut pages) = (0, Vec::new(), 0);
        loop {
            let page = store.events(org, &EventQuery { filter: filter.clone(), ..all(after) }).await.unwrap();
            assert!(page.through > after, "a page that brings nothing still moves on");
            seen.extend(page.events.iter().map(|event| event.seq()));
            (after, pages) = (page.through, pages + 1);
            if after == page.head {
                break (seen, pages, page.job_status);
            }
        }
    };
    let by_type = EventFilter { types: vec!["none".to_owned(), "rare".to_owned()], ..EventFilter::default() };
    let (seen, pages, _) = read(by_type).await;
    assert_eq!(seen, [5_001]);
    assert!(pages >= 2, "one page must not scan the whole log");
    let by_status = EventFilter { statuses: vec![JobStatus::Failed], ..EventFilter::default() };
    assert!(read(by_status).await.0.is_empty());
    let by_job = EventFilter { job: Some(rare.id), ..EventFilter::default() };
    assert_eq!(read(by_job).await, (vec![5_001], 1, Some(JobStatus::Queued)));
}

async fn a_log_goes_on_from_month_to_month(store: Arc<dyn Store>) {
    let org = org();
    // A job with an event in each of three months, between jobs with events in one month each.
    let mut long = Job { created_at: time(0), ..job(org, "t", 1) };
    let after = |months: i64| time(0).checked_add_months(Months::new(months as u32)).expect("a time");
    let mut jobs = Vec::new();
    for (month, first) in [(0, 1), (1, 4), (2, 7)] {
        let at = after(month);
        let mut short = job(org, "t", first + 1);
        (short.created_at, short.updated_at, short.ready_at, short.last_recorded_at) = (at, at, at, at);
        (long.last_seq, long.last_recorded_at, long.last_job_seq) = (first, at, month + 1);
        let record = |job: &Job, seq| JobEvent { ts: at, recorded_at: at, ..event(job, seq) };
        let events = vec![record(&long, first), record(&short, first + 1), record(&short, first + 2)];
        let head = Some(Head { seq: first + 2, recorded_at: Some(at), ..Head::EMPTY });
        let (mut created, mut changed) = (vec![short.clone()], Vec::new());
        if month == 0 {
            created.push(long.clone())
        } else {
            changed.push(long.clone())
        }
        let events = events.into_iter().map(Arc::new).collect();
        write(
            &*store,
            org,
            &Changes {
                head,
                events,
                created,
                changed: changed.into_iter().map(Changed::from).collect(),
                ..Changes::default()
            },
        )
        .await
        .unwrap();
        jobs.push(short.id);
    }
    for after in 0..=9 {
        let page = store.events(org, &all(after)).await.unwrap();
        let seqs: Vec<_> = page.events.iter().map(|event| event.seq()).collect();
        assert_eq!((seqs, page.head), ((after + 1..=9).collect(), 9), "after {after}");
        let one = store.events(org, &EventQuery { max_events: 1, ..all(after) }).await.unwrap();
        assert_eq!(
            one.events.iter().map(|event| event.seq()).collect::<Vec<_>>(),
            (after + 1..=9).take(1).collect::<Vec<_>>()
        );
    }
    let of_job = |id| EventFilter { job: Some(id), ..EventFilter::default() };
    let page = store.events(org, &EventQuery { filter: of_job(long.id), ..all(0) }).await.unwrap();
    assert_eq!(page.events.iter().map(|event| event.seq()).collect::<Vec<_>>(), [1, 4, 7]);
    assert_eq!(store.job(org, long.id).await.unwrap().unwrap().job, long);
    let removed = load(&*store, org, Needs { jobs: vec![jobs[1], long.id], ..Needs::default() }).await.jobs;
    let head = Some(Head { seq: 9, floor: 8, recorded_at: Some(after(2)), ..Head::EMPTY });
    write(&*store, org, &Changes { head, removed, ..Changes::default() }).await.unwrap();
    let page = store.events(org, &all(0)).await.unwrap();
    assert_eq!(page.events.iter().map(|event| event.seq()).collect::<Vec<_>>(), [2, 3, 8, 9]);
    assert_eq!((page.head, page.floor), (9, 8));
}
