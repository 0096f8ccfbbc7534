//! Payloads and results as Rust values.

use prost_types::{ListValue, Struct, Value, value::Kind};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Number, Value as Json};

use crate::Error;

/// Anything serialisable as the contract's JSON value. Numbers become doubles: whole ones are exact up to 2⁵³; NaN and
/// the infinities, which JSON lacks, become null.
///
/// # Errors
///
/// [`Error::Json`] if it has no JSON form, for instance a map with keys that aren't strings.
pub fn to_value<T: Serialize + ?Sized>(value: &T) -> Result<Value, Error> {
    Ok(encode(serde_json::to_value(value)?))
}

/// The contract's JSON value as a Rust value. Whole numbers read as integers; an absent value reads as null.
///
/// # Errors
///
/// [`Error::Json`] if it is not such a value.
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
    /// Up to here a double holds every whole number.
    const EXACT: f64 = (1u64 << 53) as f64;
    if number.fract() == 0.0 && number.abs() <= EXACT {
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
        let json = json!({"text": "a", "list": [1, -2.5, null, true], "nested": {"empty": {}}, "big": 1e300});
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
    fn nothing_reads_as_null() {
        assert_eq!(from_value::<Option<u32>>(None).unwrap(), None);
    }
}
