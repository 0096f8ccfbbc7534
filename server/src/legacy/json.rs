//! Checks JSON text: whether the ledger can store it, and its readers decode it.

use std::fmt;

use serde_json::Value;

use crate::domain::json::Json;

/// Bytes of the encoded `google.protobuf.Value` that readers get: the bound of every payload and result.
const MAX_BYTES: usize = 1 << 20;
/// Bytes of the text, which is stored and sent too.
const MAX_TEXT: usize = MAX_BYTES;
/// The bound of every payload and result. Deeper values can't be decoded in every message that nests them.
const MAX_DEPTH: usize = 32;

/// Why the ledger can't store some JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfit {
    /// It is not JSON, or has a number beyond the range of doubles.
    Malformed(String),
    /// It has the NUL character, which PostgreSQL can't store.
    Nul,
    /// Lists and objects nest more than 32 deep.
    TooDeep,
    /// It takes this many bytes; the bound is 1 MiB.
    TooLarge(usize),
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(reason) => write!(f, "it can't be read: {reason}"),
            Self::Nul => f.write_str("it holds the NUL character"),
            Self::TooDeep => write!(f, "its lists and objects nest more than {MAX_DEPTH} deep"),
            Self::TooLarge(bytes) => write!(f, "it takes {bytes} bytes encoded; the limit is {MAX_BYTES}"),
        }
    }
}

/// Returns the text unchanged if the ledger can store it, so numbers keep all their digits.
///
/// # Errors
///
/// [`Unfit`] if the ledger can't store it.
pub fn check_json(text: &str) -> Result<Json, Unfit> {
    let value: Value = serde_json::from_str(text).map_err(|error| Unfit::Malformed(error.to_string()))?;
    match encoded_len(&value, 0)? {
        bytes if bytes > MAX_BYTES => Err(Unfit::TooLarge(bytes)),
        // A number is nine bytes encoded, but may have hundreds of digits in the text.
        _ if text.len() > MAX_TEXT => Err(Unfit::TooLarge(text.len())),
        _ => Ok(Json::from_trusted(text)),
    }
}

/// Bytes of the value as an encoded `google.protobuf.Value`.
fn encoded_len(value: &Value, depth: usize) -> Result<usize, Unfit> {
    if depth > MAX_DEPTH {
        return Err(Unfit::TooDeep);
    }
    Ok(match value {
        Value::Null | Value::Bool(_) => 2,
        Value::Number(_) => 9,
        Value::String(text) => field(text_len(text)?),
        Value::Array(items) => {
            let mut list = 0;
            for item in items {
                list += field(encoded_len(item, depth + 1)?);
            }
            field(list)
        }
        Value::Object(fields) => {
            let mut object = 0;
            for (key, value) in fields {
                let key = match text_len(key)? {
                    0 => 0,
                    len => field(len),
                };
                object += field(key + field(encoded_len(value, depth + 1)?));
            }
            field(object)
        }
    })
}

fn text_len(text: &str) -> Result<usize, Unfit> {
    if text.contains('\0') { Err(Unfit::Nul) } else { Ok(text.len()) }
}

/// Bytes of a field with `len` bytes of content, its tag and its length.
fn field(len: usize) -> usize {
    let bits = usize::BITS - (len | 1).leading_zeros();
    1 + bits.div_ceil(7) as usize + len
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_held_is_kept_to_the_letter() {
        for text in ["null", "[1, 2]", "12345678901234567890", "1.50", "\"\\\\u0000 \u{1F980}\"", "{\"a\": {}}"] {
            assert_eq!(check_json(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn what_cannot_be_held_is_told() {
        let nested = |n: usize| format!("{}1{}", "[".repeat(n), "]".repeat(n));
        assert!(check_json(&nested(32)).is_ok());
        assert_eq!(check_json(&nested(33)), Err(Unfit::TooDeep));
        assert_eq!(check_json("\"\\u0000\""), Err(Unfit::Nul));
        assert_eq!(check_json("{\"\\u0000\": 1}"), Err(Unfit::Nul));
        assert!(matches!(check_json("1e400"), Err(Unfit::Malformed(_))));
        assert!(matches!(check_json("{"), Err(Unfit::Malformed(_))));
        // An element of a list takes eleven bytes.
        let many = |n: usize| format!("[{}1]", "1,".repeat(n - 1));
        assert!(check_json(&many(95_000)).is_ok());
        let long = format!("[{}1]", format!("{}.5,", "1".repeat(300)).repeat(3_500));
        assert_eq!(check_json(&long), Err(Unfit::TooLarge(long.len())), "35 kB encoded");
        assert_eq!(check_json(&many(96_000)), Err(Unfit::TooLarge(96_000 * 11 + 4)));
    }

    #[test]
    fn sizes_are_those_on_the_wire() {
        use prost::Message as _;
        for text in
            ["null", "true", "1.5", "\"\"", "\"text\"", "[]", "{}", "[1,[2],{\"\":null}]", "{\"k\":\"v\",\"l\":[]}"]
        {
            let value: Value = serde_json::from_str(text).unwrap();
            assert_eq!(encoded_len(&value, 0), Ok(to_wire(&value).encoded_len()), "{text}");
        }
    }

    fn to_wire(value: &Value) -> prost_types::Value {
        use prost_types::{ListValue, Struct, value::Kind};
        let kind = match value {
            Value::Null => Kind::NullValue(0),
            Value::Bool(value) => Kind::BoolValue(*value),
            Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap()),
            Value::String(text) => Kind::StringValue(text.clone()),
            Value::Array(items) => Kind::ListValue(ListValue { values: items.iter().map(to_wire).collect() }),
            Value::Object(fields) => {
                let fields = fields.iter().map(|(key, value)| (key.clone(), to_wire(value))).collect();
                Kind::StructValue(Struct { fields })
            }
        };
        prost_types::Value { kind: Some(kind) }
    }
}
