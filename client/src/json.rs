//! Conversion of payloads and results to and from Rust values.

use prost_types::{ListValue, Struct, Value, value::Kind};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Number, Value as Json};

use crate::Error;

/// The largest whole number that no other whole number shares its double with: 2⁵³ + 1 has the same double as 2⁵³.
const EXACT: u64 = (1 << 53) - 1;

/// Converts a serialisable value to the contract's JSON value. Numbers become doubles. NaN and the infinities become null.
///
/// # Errors
///
/// [`Error::Json`] if the value has no JSON form, for instance a map whose keys are not strings; [`Error::Number`] if it
/// contains a number of ±2⁵³ or beyond, where a double no longer distinguishes whole numbers. Send such a number as a string.
pub fn to_value<T: Serialize + ?Sized>(value: &T) -> Result<Value, Error> {
    let json = serde_json::to_value(value)?;
    if let Some((path, number)) = inexact(&json) {
        return Err(Error::Number { path, number });
    }
    Ok(encode(json))
}

/// [`to_value`] for a field of a request. An error's path begins with the field.
pub(crate) fn to_field<T: Serialize + ?Sized>(field: &str, value: &T) -> Result<Value, Error> {
    to_value(value).map_err(|error| match error {
        Error::Number { path, number } => Error::Number { path: format!("{field}{path}"), number },
        error => error,
    })
}

/// The path (such as `.items[2].id`) and the text of the first number that a double may not represent exactly.
fn inexact(json: &Json) -> Option<(String, String)> {
    match json {
        Json::Number(number) => {
            let is_exact = match (number.as_i64(), number.as_u64(), number.as_f64()) {
                (Some(whole), _, _) => whole.unsigned_abs() <= EXACT,
                (None, Some(whole), _) => whole <= EXACT,
                (None, None, Some(double)) => double.abs() <= EXACT as f64,
                (None, None, None) => false,
            };
            (!is_exact).then(|| (String::new(), number.to_string()))
        }
        Json::Array(items) => items.iter().enumerate().find_map(|(n, item)| {
            let (path, number) = inexact(item)?;
            Some((format!("[{n}]{path}"), number))
        }),
        Json::Object(fields) => fields.iter().find_map(|(key, value)| {
            let (path, number) = inexact(value)?;
            Some((format!(".{key}{path}"), number))
        }),
        Json::Null | Json::Bool(_) | Json::String(_) => None,
    }
}

/// Converts the contract's JSON value to a Rust value. Whole numbers read as integers; an absent value reads as null.
///
/// # Errors
///
/// [`Error::Json`] if the value does not have the type `T`.
pub fn from_value<T: DeserializeOwned>(value: Option<&Value>) -> Result<T, Error> {
    Ok(serde_json::from_value(value.map_or(Json::Null, decode))?)
}

fn encode(json: Json) -> Value {
    let kind = match json {
        Json::Null => Kind::NullValue(0),
        Json::Bool(value) => Kind::BoolValue(value),
        Json::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or(f64::NAN)),
        Json::String(text) => Kind::StringValue(text),
        Json::Array(items) => Kind::ListValue(ListValue { values: items.into_iter().map(encode).collect() }),
        Json::Object(fields) => {
            Kind::StructValue(Struct { fields: fields.into_iter().map(|(key, value)| (key, encode(value))).collect() })
        }
    };
    Value { kind: Some(kind) }
}

fn decode(value: &Value) -> Json {
    match &value.kind {
        None | Some(Kind::NullValue(_)) => Json::Null,
        Some(Kind::BoolValue(value)) => Json::Bool(*value),
        Some(Kind::NumberValue(number)) => decode_number(*number),
        Some(Kind::StringValue(text)) => Json::String(text.clone()),
        Some(Kind::ListValue(list)) => list.values.iter().map(decode).collect(),
        Some(Kind::StructValue(object)) => {
            Json::Object(object.fields.iter().map(|(key, value)| (key.clone(), decode(value))).collect())
        }
    }
}

fn decode_number(number: f64) -> Json {
    let is_negative_zero = number == 0.0 && number.is_sign_negative();
    if number.fract() == 0.0 && number.abs() <= EXACT as f64 && !is_negative_zero {
        Json::from(number as i64)
    } else {
        Number::from_f64(number).map_or(Json::Null, Json::Number)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_survives_the_way_there_and_back() {
        let json = json!({"text": "a", "list": [1, -2.5, null, true], "nested": {"empty": {}}, "small": 5e-324});
        let value = to_value(&json).unwrap();
        assert_eq!(from_value::<Json>(Some(&value)).unwrap(), json);
    }

    #[test]
    fn whole_numbers_read_as_integers() {
        let value = to_value(&7u64).unwrap();
        assert_eq!(from_value::<u32>(Some(&value)).unwrap(), 7);
        assert!(matches!(from_value::<u32>(Some(&to_value(&7.5).unwrap())), Err(Error::Json(_))));
    }

    #[test]
    fn numbers_that_a_double_may_not_give_back_are_refused_by_name() {
        let refused = |json: Json| match to_field("payload", &json) {
            Err(Error::Number { path, number }) => (path, number),
            other => panic!("{other:?}"),
        };
        let id = 9_007_199_254_740_993u64;
        assert_eq!(refused(json!(id)), ("payload".to_owned(), id.to_string()));
        assert_eq!(refused(json!([0, {"ids": [1, id]}])).0, "payload[1].ids[1]");
        assert_eq!(refused(json!({"a": -9_007_199_254_740_993i64})).0, "payload.a");
        assert_eq!(refused(json!(u64::MAX)).1, u64::MAX.to_string());
        assert_eq!(refused(json!(1e300)).0, "payload");
        for exact in [json!(EXACT), json!(-(EXACT as i64)), json!(0.1), json!(5e-324)] {
            assert_eq!(from_value::<Json>(Some(&to_value(&exact).unwrap())).unwrap(), exact);
        }
        let negative_zero: f64 = from_value(Some(&to_value(&-0.0).unwrap())).unwrap();
        assert!(negative_zero == 0.0 && negative_zero.is_sign_negative());
    }

    #[test]
    fn nothing_reads_as_null() {
        assert_eq!(from_value::<Option<u32>>(None).unwrap(), None);
    }
}
