//! What every store must do for statistics over time, whichever database it is on.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use chrono::TimeDelta;
use jobledger_server::{
    domain::{
        clock::{Clock as _, SystemClock, Time},
        flow::{Flow, Width},
        id::OrgId,
    },
    store::{Changes, Head, Needs, SeriesKind, StatisticsQuery, Store, Tally},
};

use crate::{
    stores::contract::contract,
    support::factory::{event, job, load, org, write},
    support::harness::Database,
};

contract! {
    windows_are_made_of_minutes_and_hours,
    what_is_too_old_of_the_series_goes,
}

/// Writes a flow at time `at`: `created` jobs were created, and one started after a wait of `created` seconds.
async fn happened(store: &dyn Store, org: OrgId, at: Time, created: i64, folds: bool) {
    let mut flow = Flow { created, started: 1, ..Flow::default() };
    flow.waits.add(Duration::from_secs(created.unsigned_abs()));
    let before = load(store, org, Needs::default()).await.head.seq;
    let head = Some(Head { seq: before + 1, recorded_at: Some(at), types: 1, ..Head::EMPTY });
    let tallies = BTreeMap::from([(Arc::from("t"), Tally { flow, ..Tally::default() })]);
    // A batch with events is not folded at once.
    let events = vec![Arc::new(event(&job(org, "t", before + 1), before + 1))];
    let new_minute = folds.then_some(at);
    write(store, org, &Changes { head, tallies, events, new_minute, ..Changes::default() }).await.unwrap();
}

async fn windows_are_made_of_minutes_and_hours(store: Arc<dyn Store>) {
    let org = org();
    let now = SystemClock.now();
    let ago = [TimeDelta::days(6), TimeDelta::hours(25), TimeDelta::minutes(90), TimeDelta::minutes(10)];
    for (n, ago) in ago.into_iter().enumerate() {
        happened(&*store, org, now - ago, 1 << n, true).await;
    }
    happened(&*store, org, now, 1 << 4, false).await;
    for (window, expected) in [
        (TimeDelta::minutes(5), 16),
        (TimeDelta::hours(1), 16 + 8),
        (TimeDelta::hours(2), 16 + 8 + 4),
        (TimeDelta::days(1), 16 + 8 + 4),
        (TimeDelta::hours(26), 16 + 8 + 4 + 2),
        (TimeDelta::days(7), 16 + 8 + 4 + 2 + 1),
    ] {
        for series in [SeriesKind::None, SeriesKind::Together, SeriesKind::ByType] {
            let query = StatisticsQuery { types: Vec::new(), window, series };
            let statistics = store.statistics(org, &query).await.unwrap();
            let of_type = &statistics.types[0];
            assert_eq!(of_type.flow.created, expected, "{window}");
            assert_eq!(of_type.flow.waits.total(), i64::from(expected.count_ones()), "{window}");
            let longest = Duration::from_secs(16).as_secs_f64();
            let told = of_type.flow.waits.quantile(1.0).unwrap().as_secs_f64();
            assert!((told / longest - 1.0).abs() < 0.091, "{told} s");
            let width = if window <= TimeDelta::days(1) { Width::Minute } else { Width::Hour };
            assert_eq!(statistics.since, width.start(statistics.since));
            assert!(statistics.as_of - statistics.since >= window, "{window}");
            let points: i64 = statistics.series.iter().map(|point| point.flow.created).sum();
            assert_eq!(points, if series == SeriesKind::None { 0 } else { expected }, "{window}");
            assert!(statistics.series.iter().all(|point| point.start == width.start(point.start)));
        }
    }
    let other = StatisticsQuery { types: vec!["u".to_owned()], ..StatisticsQuery::of(&[]) };
    assert!(store.statistics(org, &other).await.unwrap().types.is_empty());
}

async fn what_is_too_old_of_the_series_goes(store: Arc<dyn Store>) {
    let org = org();
    let now = SystemClock.now();
    for ago in [TimeDelta::days(10), TimeDelta::hours(27), TimeDelta::hours(23)] {
        happened(&*store, org, now - ago, 1, true).await;
    }
    let kept = async |width| {
        let series = store.audit().series(org, &["t".to_owned()]).await.unwrap();
        series.happened.keys().filter(|bucket| bucket.width == width).map(|bucket| bucket.start).collect::<Vec<_>>()
    };
    let minute = |ago| Width::Minute.start(now - ago);
    let hour = |ago| Width::Hour.start(now - ago);
    happened(&*store, org, now, 1, true).await;
    assert_eq!(kept(Width::Minute).await, [minute(TimeDelta::hours(23)), minute(TimeDelta::zero())]);
    assert_eq!(kept(Width::Hour).await, [TimeDelta::hours(27), TimeDelta::hours(23), TimeDelta::zero()].map(hour));
}
