//! Numbers in payloads and results. They come back as they were given or are refused, and take no more room than they did.

use jobledger_client::{
    Claim, Client, Error, JobView, ListJobsRequest, NewJob, Report,
    prost_types::{ListValue, Value, value::Kind},
    proto::CreateJobRequest,
};
use sqlx::Row as _;

use crate::support::harness::{Database, TestServer, on_both_databases};

on_both_databases! {
    a_number_that_a_double_may_not_give_back_is_refused,
    negative_zero_and_the_smallest_numbers_come_back,
    numbers_take_no_more_room_than_they_were_given_with,
}

fn number(number: f64) -> Value {
    Value { kind: Some(Kind::NumberValue(number)) }
}

async fn created_and_claimed(client: &Client, payload: Value) -> (String, String) {
    let request = CreateJobRequest { r#type: "t".to_owned(), payload: Some(payload), ..Default::default() };
    let id = client.create(request).await.unwrap().job.id;
    let lease = client.claim(Claim::new("w")).await.unwrap().remove(0);
    assert_eq!(lease.job.unwrap().id, id);
    (id, lease.lease_token)
}

async fn a_number_that_a_double_may_not_give_back_is_refused(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let id = 9_007_199_254_740_993u64;
    let refused = NewJob::new("t").payload(&serde_json::json!({"account": {"id": id}})).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "payload.account.id: 9007199254740993 is ±2^53 or beyond, which a double can't represent exactly; send it as a string"
    );
    // Without the SDK's check.
    for payload in [number(9_007_199_254_740_992.0), number(-1e300)] {
        let request = CreateJobRequest { r#type: "t".to_owned(), payload: Some(payload), ..Default::default() };
        match client.create(request).await.unwrap_err() {
            Error::InvalidRequest { violations, .. } => assert_eq!(violations[0].field, "payload"),
            other => panic!("{other}"),
        }
    }
    let (id, lease) = created_and_claimed(&client, number(9_007_199_254_740_991.0)).await;
    let mut report: jobledger_client::proto::UpdateJobStatusRequest = Report::succeeded(&id).lease(lease).into();
    report.result = Some(number(1e16));
    match client.update(report).await.unwrap_err() {
        Error::InvalidRequest { violations, .. } => assert_eq!(violations[0].field, "result"),
        other => panic!("{other}"),
    }
    server.stop().await;
}

async fn negative_zero_and_the_smallest_numbers_come_back(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    let given = [-0.0, 0.0, 5e-324, 1e-308, 0.1, 9_007_199_254_740_991.0, 1.000_000_000_000_000_2];
    let values = ListValue { values: given.map(number).to_vec() };
    let value = Value { kind: Some(Kind::ListValue(values)) };
    let (id, lease) = created_and_claimed(&client, value.clone()).await;
    let mut report: jobledger_client::proto::UpdateJobStatusRequest = Report::succeeded(&id).lease(lease).into();
    report.result = Some(value.clone());
    client.update(report).await.unwrap();
    let job = client.get(&id).await.unwrap();
    let list = ListJobsRequest { view: JobView::Full.into(), ..Default::default() };
    let listed = client.list(list).await.unwrap().jobs.remove(0);
    // Debug output tells -0.0 from 0.0, `==` does not.
    for found in [job.payload, job.result, listed.payload, listed.result] {
        assert_eq!(format!("{:?}", found.unwrap()), format!("{value:?}"));
    }
    server.stop().await;
}

async fn numbers_take_no_more_room_than_they_were_given_with(database: Database) {
    let (server, client) = TestServer::on(&database).await;
    // 990 kB encoded, and 28 MB as jsonb prints it.
    let list = ListValue { values: vec![number(5e-324); 90_000] };
    let value = Value { kind: Some(Kind::ListValue(list)) };
    let (id, lease) = created_and_claimed(&client, value.clone()).await;
    let mut report: jobledger_client::proto::UpdateJobStatusRequest = Report::succeeded(&id).lease(lease).into();
    report.result = Some(value.clone());
    client.update(report).await.unwrap();
    let job = client.get(&id).await.unwrap();
    assert!(job.payload.as_ref() == Some(&value) && job.result.as_ref() == Some(&value));
    // A small result is also in the `detail_json` of its event.
    let small = Value { kind: Some(Kind::ListValue(ListValue { values: vec![number(5e-324); 5_000] })) };
    let (other, lease) = created_and_claimed(&client, small.clone()).await;
    let mut report: jobledger_client::proto::UpdateJobStatusRequest = Report::succeeded(&other).lease(lease).into();
    report.result = Some(small.clone());
    client.update(report).await.unwrap();
    server.stop().await;

    // What the database sends for these jobs, by the calls that the server makes.
    let sql = "SELECT octet_length(payload), octet_length(result) FROM jobledger.read_job($1, $2)";
    let events =
        "SELECT coalesce(sum(octet_length(result)), 0)::integer, coalesce(sum(octet_length(detail_json)), 0)::integer
        FROM jobledger.read_job_log($1, $2, 0, NULL, NULL, false, NULL, 100, 100000000)";
    if database.is_postgres() {
        let mut connection = database.connect_as(crate::support::cluster::SERVER).await;
        for (id, most) in [(&id, 1 << 20), (&other, 64 << 10)] {
            for sql in [sql, events] {
                let query = sqlx::query(sql).bind(uuid::Uuid::nil()).bind(id.parse::<uuid::Uuid>().unwrap());
                let row = query.fetch_one(&mut connection).await.unwrap();
                let sizes = [0, 1].map(|n| row.get::<i32, _>(n));
                assert!(sizes.iter().all(|bytes| *bytes < most), "{sizes:?} of {sql}");
            }
        }
    }
}
