//! The detail columns of the old tables: what the ledger has a field for, and a message for people.

use std::{collections::BTreeMap, sync::Arc};

use serde::Deserialize;
use serde_json::{Map, Value, value::RawValue};

use crate::{
    domain::{event::JobError, job::MAX_ERROR_CODE_CHARS, json::Json},
    legacy::{check_json, fit_progress, fit_stage, fit_text},
};

/// What the old service stored beside a status.
#[derive(Debug, Clone, Default)]
pub(super) struct Detail {
    pub(super) stage: Option<Arc<str>>,
    pub(super) progress: Option<u8>,
    pub(super) message: Arc<str>,
    pub(super) result: Option<Json>,
    pub(super) error: Option<JobError>,
}

/// An error with the fields of the contract. What does not fit is cut, with a note.
pub(super) fn error(code: &str, message: &str, notes: &mut Vec<String>) -> JobError {
    let end = code.char_indices().nth(MAX_ERROR_CODE_CHARS).map(|(end, _)| end);
    if end.is_some() {
        notes.push(format!("error code of {} characters was cut", code.chars().count()));
    }
    JobError { code: code[..end.unwrap_or(code.len())].into(), message: fit_text("error", message, notes) }
}

impl Detail {
    /// The detail of a row without events.
    pub(super) fn of_row(
        stage: Option<&str>,
        progress: Option<f64>,
        found: Option<&RawValue>,
        notes: &mut Vec<String>,
    ) -> Self {
        Self {
            stage: stage.map(|stage| fit_stage(stage, notes)),
            progress: progress.map(|progress| fit_progress(progress, notes)),
            result: found.and_then(|text| result(text, notes)),
            ..Self::default()
        }
    }

    /// Reads an event's `detail_json`. Fields that the ledger does not have become the event's message.
    pub(super) fn of_event(text: &RawValue, notes: &mut Vec<String>) -> Self {
        /// The fields whose exact text is kept.
        #[derive(Deserialize)]
        struct Letters<'a> {
            #[serde(borrow)]
            result: Option<&'a RawValue>,
        }
        let mut detail = Self::default();
        // What is no object, or has a number that no double holds, is kept as a text.
        let as_text =
            |notes: &mut Vec<String>| Self { message: fit_text("detail_json", text.get(), notes), ..Self::default() };
        let Ok(letters) = serde_json::from_str::<Letters<'_>>(text.get()) else { return as_text(notes) };
        let mut rest = match serde_json::from_str::<Value>(text.get()) {
            Ok(Value::Null) => return detail,
            Ok(Value::Object(fields)) => fields,
            Ok(_) => return as_text(notes),
            Err(_) if letters.result.is_some() => readable(text),
            Err(_) => return as_text(notes),
        };
        detail.result = letters.result.and_then(|text| result(text, notes));
        rest.remove("result");
        // A null field carries nothing.
        rest.retain(|_, value| !value.is_null());
        detail.stage = rest.remove("stage").map(|stage| fit_stage(&in_words(stage), notes));
        detail.progress = match rest.get("progress").and_then(as_number) {
            None => None,
            Some(progress) => {
                rest.remove("progress");
                Some(fit_progress(progress, notes))
            }
        };
        let code = rest.remove("error_code").map(in_words);
        let message = rest.remove("error_message").or_else(|| rest.remove("error")).map(in_words);
        if code.is_some() || message.is_some() {
            detail.error = Some(error(&code.unwrap_or_default(), &message.unwrap_or_default(), notes));
        }
        detail.message = match remark(rest) {
            Some(remark) => fit_text("detail_json", &remark, notes),
            None => Arc::default(),
        };
        detail
    }
}

/// The fields of an object that has a number which no double holds. A field with such a number becomes its text.
fn readable(object: &RawValue) -> Map<String, Value> {
    let fields: BTreeMap<String, &RawValue> = serde_json::from_str(object.get()).unwrap_or_default();
    let value = |text: &RawValue| serde_json::from_str(text.get()).unwrap_or_else(|_| Value::from(text.get()));
    fields.into_iter().map(|(name, text)| (name, value(text))).collect()
}

/// The remaining fields of a detail as a message for people.
fn remark(mut rest: Map<String, Value>) -> Option<String> {
    match (rest.len(), rest.remove("message")) {
        (0, _) => None,
        (1, Some(Value::String(message))) => Some(message),
        (_, message) => {
            rest.extend(message.map(|message| ("message".to_owned(), message)));
            Some(Value::Object(rest).to_string())
        }
    }
}

fn as_number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.parse().ok(),
        _ => None,
    }
}

fn in_words(value: Value) -> String {
    match value {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

/// A result that the ledger can't hold is left out with a note: a job without its result is better than no job.
fn result(text: &RawValue, notes: &mut Vec<String>) -> Option<Json> {
    check_json(text.get()).map_err(|unfit| notes.push(format!("its result was left out: {unfit}"))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_event(text: &str) -> (Detail, Vec<String>) {
        let mut notes = Vec::new();
        let raw: &RawValue = serde_json::from_str(text).unwrap();
        (Detail::of_event(raw, &mut notes), notes)
    }

    #[test]
    fn a_number_that_no_double_holds_costs_no_other_field() {
        let (detail, notes) = of_event(r#"{"stage": "s", "progress": 7, "result": {"n": 1}, "odd": 1e999}"#);
        assert_eq!((detail.stage.as_deref(), detail.progress), (Some("s"), Some(7)));
        assert_eq!(detail.result.unwrap().as_str(), r#"{"n": 1}"#);
        assert_eq!((&*detail.message, notes), (r#"{"odd":"1e999"}"#, Vec::new()));
        let (detail, notes) = of_event(r#"{"message": "m", "result": 1e999}"#);
        assert_eq!((&*detail.message, detail.result, notes.len()), ("m", None, 1));
    }
}
