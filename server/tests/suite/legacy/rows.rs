//! What rows of the old tables should be in the ledger, and what the ledger has.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use jobledger_client::{Job, from_value};
use serde_json::Value;

use crate::legacy::database::LegacyDatabase;

fn text(value: &Value) -> String {
    value.as_str().expect("a text").to_owned()
}

/// What a row of either table should be in the ledger. Computed by SQL, without code of the import.
#[derive(Debug, PartialEq)]
pub(crate) struct Expected {
    status: String,
    job_type: String,
    attempt: i32,
    priority: i32,
    key: String,
    requested_by: String,
    stage: Option<String>,
    progress: Option<i32>,
    result: Option<Value>,
    error: (String, String),
    times: [Option<DateTime<Utc>>; 4],
}

/// Each row has the id and [`Expected`] as JSON.
const EXPECTED: &str = r#"
    SELECT o.id::text, jsonb_build_object(
        'status', CASE o.status WHEN 'pending' THEN 'queued' WHEN 'processing' THEN 'running' WHEN 'completed' THEN 'succeeded' ELSE o.status END,
        'type', 'mock_process', 'attempt', (o.status NOT IN ('pending', 'canceled')
            OR o.status = 'canceled' AND (o.stage IS NOT NULL OR coalesce(o.progress, 0) > 0))::integer,
        'priority', 0, 'key', '', 'by', '', 'stage', o.stage, 'progress', CASE WHEN o.progress IS NOT NULL THEN greatest(0, least(100, o.progress)) END,
        'result', nullif(o.result, 'null'), 'code', '', 'message', coalesce(o.error, ''),
        'times', jsonb_build_array(o.created_at, coalesce(o.updated_at, o.created_at), NULL,
            CASE WHEN o.status IN ('completed', 'failed', 'canceled') THEN coalesce(o.updated_at, o.created_at) END))
    FROM jobs o WHERE o.status IN ('pending', 'processing', 'completed', 'failed', 'canceled')
    UNION ALL
    SELECT o.id::text, jsonb_build_object(
        'status', o.status, 'type', o.type, 'attempt', o.attempt, 'priority', least(o.priority, 1000),
        'key', coalesce(o.idempotency_key, ''), 'by', coalesce(o.requested_by, ''),
        'stage', e.detail_json -> 'stage', 'progress', CASE WHEN e.detail_json ->> 'progress' IS NOT NULL THEN greatest(0, least(100, (e.detail_json ->> 'progress')::integer)) END,
        'result', e.detail_json -> 'result', 'code', coalesce(o.last_error_code, ''), 'message', coalesce(o.last_error_message, ''),
        'times', jsonb_build_array(o.created_at, o.updated_at, o.started_at,
            CASE WHEN o.status NOT IN ('queued', 'running') THEN coalesce(o.finished_at, o.updated_at) END))
    FROM job o LEFT JOIN LATERAL (
        SELECT CASE jsonb_typeof(e.detail_json) WHEN 'object' THEN e.detail_json END AS detail_json
        FROM job_event e WHERE e.job_id = o.id AND e.next_status <> 'resting'
        -- Of those of one time, the one comes later that begins where the other has led.
        ORDER BY e.ts DESC, (e.prev_status = 'running') DESC NULLS LAST LIMIT 1
    ) e ON true
    WHERE o.status <> 'archived'
        AND NOT EXISTS (SELECT FROM job d WHERE d.org_id = o.org_id AND d.idempotency_key = o.idempotency_key
            AND (d.created_at, d.id) < (o.created_at, o.id))"#;

pub(crate) async fn expected(legacy: &LegacyDatabase) -> BTreeMap<String, Expected> {
    let sql = format!("SELECT id, row::text FROM ({EXPECTED}) rows (id, row)");
    let mut connection = legacy.connect().await;
    let rows: Vec<(String, String)> =
        sqlx::query_as(sqlx::AssertSqlSafe(sql)).fetch_all(&mut connection).await.expect("the SQL runs");
    let rows: Vec<(String, Value)> =
        rows.into_iter().map(|(id, row)| (id, serde_json::from_str(&row).expect("JSON"))).collect();
    let time = |value: &Value| value.as_str().map(|time| DateTime::parse_from_rfc3339(time).unwrap().to_utc());
    let number = |value: &Value| i32::try_from(value.as_i64().expect("a number")).unwrap();
    let expected = |row: Value| Expected {
        status: text(&row["status"]),
        job_type: text(&row["type"]),
        attempt: number(&row["attempt"]),
        priority: number(&row["priority"]),
        key: text(&row["key"]),
        requested_by: text(&row["by"]),
        stage: row["stage"].as_str().map(str::to_owned),
        progress: Some(&row["progress"]).filter(|progress| !progress.is_null()).map(number),
        result: Some(&row["result"]).filter(|result| !result.is_null()).cloned().map(doubles),
        error: (text(&row["code"]), text(&row["message"])),
        times: std::array::from_fn(|n| time(&row["times"][n])),
    };
    rows.into_iter().map(|(id, row)| (id, expected(row))).collect()
}

pub(crate) fn found(job: &Job) -> Expected {
    let time = |time: Option<prost_types::Timestamp>| {
        time.map(|time| DateTime::from_timestamp(time.seconds, time.nanos as u32).expect("a valid time"))
    };
    Expected {
        status: job.status().as_str_name().trim_start_matches("JOB_STATUS_").to_lowercase(),
        job_type: job.r#type.clone(),
        attempt: job.attempt,
        priority: job.priority,
        key: job.idempotency_key.clone(),
        requested_by: job.requested_by.clone(),
        stage: job.stage.clone(),
        progress: job.progress,
        result: job.result.as_ref().map(|value| from_value::<Value>(Some(value)).expect("JSON")).map(doubles),
        error: (job.last_error_code.clone(), job.last_error_message.clone()),
        times: [job.created_at, job.updated_at, job.started_at, job.finished_at].map(time),
    }
}

/// Numbers as a `google.protobuf.Value` holds them.
fn doubles(value: Value) -> Value {
    match value {
        // An integer that a double can't hold is returned as text.
        Value::Number(number) if number.as_u64().is_some_and(|whole| whole >= 1 << 53) => number.to_string().into(),
        Value::Number(number) => number.as_f64().map_or(Value::Null, Value::from),
        Value::Array(items) => items.into_iter().map(doubles).collect(),
        Value::Object(fields) => fields.into_iter().map(|(key, value)| (key, doubles(value))).collect(),
        other => other,
    }
}
