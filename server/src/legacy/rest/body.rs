//! Reads the bodies of the old REST calls. Errors have the form that pydantic gave them.

use std::{borrow::Cow, collections::HashMap};

use axum::http::{HeaderMap, header};
use serde_json::{Map, Value, json, value::RawValue};

use super::{
    super::{check_json, fit_progress, fit_stage, fit_text, parse_status},
    error::Problem,
};
use crate::domain::{job::MAX_TYPE_CHARS, json::Json, name::is_seen, status::JobStatus, transition::News};

/// The words for a status, as the error message lists them.
const WORDS: &str =
    "'pending', 'processing', 'completed', 'failed', 'canceled', 'queued', 'running', 'succeeded' or 'dead_letter'";

/// A body that was parsed as JSON.
pub(super) struct Body<'a> {
    text: &'a str,
    value: Value,
}

impl<'a> Body<'a> {
    /// Parses a body that is declared as JSON. A body without a content type is parsed too, unless a browser sends it:
    /// browsers let pages of other sites send anything but JSON without asking the server first.
    pub(super) fn read(headers: &HeaderMap, bytes: &'a [u8]) -> Result<Self, Problem> {
        if bytes.is_empty() {
            return Err(missing());
        }
        let text = str::from_utf8(bytes).map_err(|error| malformed(error.valid_up_to(), "Invalid UTF-8"))?;
        let kind = headers.get(header::CONTENT_TYPE).map(|kind| kind.to_str().unwrap_or_default());
        let is_of_browser = headers.contains_key(header::ORIGIN) || headers.contains_key("sec-fetch-site");
        let is_json = kind.map_or(!is_of_browser, |kind| {
            let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
            kind == "application/json" || kind.starts_with("application/") && kind.ends_with("+json")
        });
        if !is_json {
            return Err(no_object(Value::String(text.to_owned())));
        }
        let value = serde_json::from_str(text).map_err(|error| malformed(place(text, &error), &error.to_string()))?;
        if value == Value::Null {
            return Err(missing());
        }
        Ok(Self { text, value })
    }
}

fn missing() -> Problem {
    Problem::invalid(vec![json!({"type": "missing", "loc": ["body"], "msg": "Field required", "input": null})])
}

/// The position of a parse error in the text, in characters.
fn place(text: &str, error: &serde_json::Error) -> usize {
    let before = text.split_inclusive('\n').take(error.line().saturating_sub(1)).map(|line| line.chars().count());
    before.sum::<usize>() + error.column().saturating_sub(1)
}

fn malformed(place: usize, reason: &str) -> Problem {
    Problem::invalid(vec![json!({
        "type": "json_invalid", "loc": ["body", place], "msg": "JSON decode error", "input": {}, "ctx": {"error": reason}
    })])
}

fn no_object(input: Value) -> Problem {
    Problem::invalid(vec![json!({
        "type": "model_attributes_type", "loc": ["body"],
        "msg": "Input should be a valid dictionary or object to extract fields from", "input": input
    })])
}

/// The fields of a body. Collects all errors; unknown fields are ignored.
pub(super) struct Fields<'a> {
    text: &'a str,
    fields: &'a Map<String, Value>,
    errors: Vec<Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn of(body: &'a Body<'_>) -> Result<Self, Problem> {
        let fields = body.value.as_object().ok_or_else(|| no_object(body.value.clone()))?;
        Ok(Self { text: body.text, fields, errors: Vec::new() })
    }

    pub(super) fn finish(self) -> Result<(), Problem> {
        if self.errors.is_empty() { Ok(()) } else { Err(Problem::invalid(self.errors)) }
    }

    fn refuse(&mut self, kind: &str, field: &str, message: &str, input: &Value, context: Value) {
        let mut error = json!({"type": kind, "loc": ["body", field], "msg": message, "input": input});
        if !context.is_null() {
            error["ctx"] = context;
        }
        self.errors.push(error);
    }

    /// Adds an error of pydantic's kind `value_error`.
    fn refuse_value(&mut self, field: &str, reason: &str, input: &Value) {
        self.refuse("value_error", field, &format!("Value error, {reason}"), input, json!({"error": reason}));
    }

    /// The value of a field; `None` if it is absent or null.
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    fn text(&mut self, field: &str) -> Option<&'a str> {
        let value = self.get(field)?;
        match value {
            Value::String(text) if text.contains('\0') => {
                self.refuse_value(field, "must not hold the NUL character", value);
                None
            }
            Value::String(text) => Some(text),
            other => {
                self.refuse("string_type", field, "Input should be a valid string", other, Value::Null);
                None
            }
        }
    }

    pub(super) fn job_type(&mut self) -> String {
        const FIELD: &str = "type";
        let Some(value) = self.fields.get(FIELD) else {
            let body = Value::Object(self.fields.clone());
            self.refuse("missing", FIELD, "Field required", &body, Value::Null);
            return String::new();
        };
        if value.is_null() {
            self.refuse("string_type", FIELD, "Input should be a valid string", value, Value::Null);
        }
        let Some(name) = self.text(FIELD) else { return String::new() };
        if name.is_empty() {
            let message = "String should have at least 1 character";
            self.refuse("string_too_short", FIELD, message, value, json!({"min_length": 1}));
        }
        if name.chars().count() > MAX_TYPE_CHARS {
            let message = format!("String should have at most {MAX_TYPE_CHARS} characters");
            self.refuse("string_too_long", FIELD, &message, value, json!({"max_length": MAX_TYPE_CHARS}));
        }
        if !is_seen(name) {
            self.refuse_value(FIELD, "must not contain control or bidirectional formatting characters", value);
        }
        name.to_owned()
    }

    pub(super) fn status(&mut self) -> Option<JobStatus> {
        const FIELD: &str = "status";
        let word = self.text(FIELD)?;
        let status = parse_status(word);
        if status.is_none() {
            let message = format!("Input should be {WORDS}");
            self.refuse("literal_error", FIELD, &message, &json!(word), json!({"expected": WORDS}));
        }
        status
    }

    /// Stage and progress. The old service bounded neither, so values beyond the ledger's bounds are cut.
    pub(super) fn news(&mut self) -> News {
        let mut cuts = Vec::new();
        let stage = self.text("stage").map(|stage| fit_stage(stage, &mut cuts));
        let progress = self.get("progress").and_then(|value| {
            // pydantic accepts a string that holds a number.
            let number = match value {
                Value::Bool(value) => Some(f64::from(*value)),
                Value::String(text) => text.trim().parse().ok().filter(|number: &f64| number.is_finite()),
                other => other.as_f64(),
            };
            if number.is_none() {
                let (kind, message) = match value {
                    Value::String(_) => {
                        ("int_parsing", "Input should be a valid integer, unable to parse string as an integer")
                    }
                    _ => ("int_type", "Input should be a valid integer"),
                };
                self.refuse(kind, "progress", message, value, Value::Null);
            }
            number.map(|number| fit_progress(number, &mut cuts))
        });
        News { stage, progress, ..News::default() }
    }

    /// The result with its exact text.
    pub(super) fn result(&mut self) -> Option<Json> {
        const FIELD: &str = "result";
        let value = self.get(FIELD)?;
        // As in Python, the last value of a repeated name counts.
        let letters: HashMap<Cow<'_, str>, &RawValue> = serde_json::from_str(self.text).ok()?;
        match check_json(letters.get(FIELD)?.get()) {
            Ok(json) => Some(json),
            Err(unfit) => {
                self.refuse_value(FIELD, &unfit.to_string(), value);
                None
            }
        }
    }

    pub(super) fn error(&mut self) -> Option<String> {
        let error = self.text("error")?;
        Some(fit_text("error", error, &mut Vec::new()).to_string())
    }
}
