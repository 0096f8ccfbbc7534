//! Converts `google.protobuf.Value` to JSON text and back.

use std::{collections::BTreeMap, fmt};

use prost_types::{ListValue, Struct, Value, value::Kind};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};

use crate::domain::json::Json;

/// Why a value can't be stored.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unstorable {
    /// NaN or an infinity: JSON has none.
    Number,
    /// A number of ±2^53 or beyond. Doubles do not tell whole numbers apart there, so the caller may have meant another one.
    Inexact,
    /// The NUL character, which PostgreSQL cannot store in text.
    Nul,
    /// A `Value` message without a kind.
    Empty,
    /// Lists and objects that nest deeper than [`MAX_DEPTH`].
    TooDeep,
}

impl fmt::Display for Unstorable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Number => "must not hold NaN or an infinity",
            Self::Inexact => {
                "must not hold a number of ±2^53 or beyond, which a double can't represent exactly: send it as a string"
            }
            Self::Nul => "must not hold the NUL character",
            Self::TooDeep => "must not nest lists and objects more than 32 deep",
            Self::Empty => "must not hold a google.protobuf.Value without a kind",
        })
    }
}

/// The JSON text of a value.
pub(super) fn to_json(value: &Value) -> Result<Json, Unstorable> {
    check(value, 0)?;
    let text = serde_json::to_string(&Text(value)).expect("a checked value has string keys and finite numbers");
    Ok(Json::from_trusted(text))
}

/// The largest whole number that is its double's only one: 2^53 + 1 becomes the same double as 2^53.
const EXACT: f64 = ((1u64 << 53) - 1) as f64;

/// How deep lists and objects may nest. A level takes up to three nested messages, and decoders refuse more than a
/// hundred. A stored value also has to be readable inside answers that nest it deeper than its request did.
const MAX_DEPTH: usize = 32;

fn check(value: &Value, depth: usize) -> Result<(), Unstorable> {
    if depth > MAX_DEPTH {
        return Err(Unstorable::TooDeep);
    }
    match value.kind.as_ref().ok_or(Unstorable::Empty)? {
        Kind::NullValue(_) | Kind::BoolValue(_) => Ok(()),
        Kind::NumberValue(number) if !number.is_finite() => Err(Unstorable::Number),
        Kind::NumberValue(number) if number.abs() > EXACT => Err(Unstorable::Inexact),
        Kind::NumberValue(_) => Ok(()),
        Kind::StringValue(text) => check_text(text),
        Kind::ListValue(list) => list.values.iter().try_for_each(|value| check(value, depth + 1)),
        Kind::StructValue(object) => object.fields.iter().try_for_each(|(key, value)| {
            check_text(key)?;
            check(value, depth + 1)
        }),
    }
}

fn check_text(text: &str) -> Result<(), Unstorable> {
    if text.contains('\0') { Err(Unstorable::Nul) } else { Ok(()) }
}

/// Serialises a value that [`check`] has accepted.
struct Text<'a>(&'a Value);

impl Serialize for Text<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0.kind {
            None | Some(Kind::NullValue(_)) => serializer.serialize_unit(),
            Some(Kind::BoolValue(value)) => serializer.serialize_bool(*value),
            Some(Kind::NumberValue(number)) => {
                let is_negative_zero = *number == 0.0 && number.is_sign_negative();
                // An integer is shorter without ".0".
                if number.fract() == 0.0 && number.abs() <= EXACT && !is_negative_zero {
                    serializer.serialize_i64(*number as i64)
                } else {
                    serializer.serialize_f64(*number)
                }
            }
            Some(Kind::StringValue(text)) => serializer.serialize_str(text),
            Some(Kind::ListValue(list)) => serializer.collect_seq(list.values.iter().map(Text)),
            Some(Kind::StructValue(object)) => {
                serializer.collect_map(object.fields.iter().map(|(key, value)| (key, Text(value))))
            }
        }
    }
}

/// The value of stored JSON text. Text that can't be read becomes null, and is logged: the server never writes such text.
pub(crate) fn from_json(json: &Json) -> Value {
    serde_json::from_str(json.as_str()).map_or_else(
        |error| {
            tracing::error!(%error, "the database holds JSON that can't be read");
            value(Kind::NullValue(0))
        },
        |Parsed(value)| value,
    )
}

fn value(kind: Kind) -> Value {
    Value { kind: Some(kind) }
}

struct Parsed(Value);

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue).map(Self)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(value(Kind::NullValue(0)))
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(value(Kind::BoolValue(v)))
    }

    fn visit_i64<E: de::Error>(self, v: i64) -> Result<Value, E> {
        // JSON of the old REST calls and of imports may have integers with more digits than a double holds.
        if v.unsigned_abs() as f64 <= EXACT { self.visit_f64(v as f64) } else { self.visit_string(v.to_string()) }
    }

    fn visit_u64<E: de::Error>(self, v: u64) -> Result<Value, E> {
        if v as f64 <= EXACT { self.visit_f64(v as f64) } else { self.visit_string(v.to_string()) }
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(value(Kind::NumberValue(v)))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(value(Kind::StringValue(v.to_owned())))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(value(Kind::StringValue(v)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Parsed(value)) = seq.next_element()? {
            values.push(value);
        }
        Ok(value(Kind::ListValue(ListValue { values })))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = BTreeMap::new();
        while let Some((key, Parsed(value))) = map.next_entry()? {
            fields.insert(key, value);
        }
        Ok(value(Kind::StructValue(Struct { fields })))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_value() -> impl Strategy<Value = Value> {
        let number = any::<f64>().prop_filter("storable", |number| number.abs() <= EXACT);
        let whole = any::<i32>().prop_map(f64::from);
        let leaf = prop_oneof![
            Just(Kind::NullValue(0)),
            any::<bool>().prop_map(Kind::BoolValue),
            prop_oneof![number, whole, Just(-0.0), Just(EXACT), Just(5e-324)].prop_map(Kind::NumberValue),
            "[^\0]{0,12}".prop_map(Kind::StringValue),
        ]
        .prop_map(value);
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6)
                    .prop_map(|values| value(Kind::ListValue(ListValue { values }))),
                prop::collection::btree_map("[^\0]{0,6}", inner, 0..6)
                    .prop_map(|fields| value(Kind::StructValue(Struct { fields }))),
            ]
        })
    }

    proptest! {
        #[test]
        fn every_storable_value_comes_back(value in any_value()) {
            let json = to_json(&value).unwrap();
            let back = from_json(&json);
            // Debug output distinguishes -0.0 from 0.0, unlike ==.
            prop_assert_eq!(format!("{back:?}"), format!("{value:?}"));
        }
    }

    #[test]
    fn what_json_or_postgresql_lack_is_refused_at_any_depth() {
        let nested = |kind| value(Kind::ListValue(ListValue { values: vec![value(kind)] }));
        assert_eq!(to_json(&nested(Kind::NumberValue(f64::NAN))), Err(Unstorable::Number));
        assert_eq!(to_json(&nested(Kind::NumberValue(f64::NEG_INFINITY))), Err(Unstorable::Number));
        for number in [EXACT + 1.0, -EXACT - 1.0, 1e300] {
            assert_eq!(to_json(&nested(Kind::NumberValue(number))), Err(Unstorable::Inexact), "{number}");
        }
        assert_eq!(to_json(&nested(Kind::StringValue("a\0b".into()))), Err(Unstorable::Nul));
        assert_eq!(to_json(&Value { kind: None }), Err(Unstorable::Empty));
        let fields = BTreeMap::from([("\0".to_owned(), value(Kind::BoolValue(true)))]);
        assert_eq!(to_json(&value(Kind::StructValue(Struct { fields }))), Err(Unstorable::Nul));
    }

    #[test]
    fn digits_that_a_double_has_not_are_told_as_text() {
        let read = |text: &str| from_json(&Json::from_trusted(text)).kind.unwrap();
        for digits in ["9007199254740993", "-9007199254740993", "18446744073709551615"] {
            assert_eq!(read(digits), Kind::StringValue(digits.to_owned()));
        }
        assert_eq!(read("9007199254740991"), Kind::NumberValue(EXACT));
    }

    #[test]
    fn whole_numbers_are_written_without_a_fraction() {
        let json = |number| to_json(&value(Kind::NumberValue(number))).unwrap().as_str().to_owned();
        assert_eq!(json(3.0), "3");
        assert_eq!(json(0.5), "0.5");
        assert_eq!(json(-0.0), "-0.0");
        assert_eq!(json(-EXACT), "-9007199254740991");
        assert_eq!(json(1e-300), "1e-300");
    }
}
