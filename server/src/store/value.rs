//! Column values, the same for both databases. Each database maps them to its own types.

use std::{borrow::Cow, time::Duration};

use uuid::Uuid;

use crate::domain::clock::Time;

/// The value of one column.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value<'a> {
    Null,
    Flag(bool),
    Int(i32),
    Long(i64),
    Double(f64),
    Text(Cow<'a, str>),
    Bytes(&'a [u8]),
    Uuid(Uuid),
    Time(Time),
}

impl Value<'_> {
    /// True for null, zero and false, the defaults of most columns of `job`.
    pub(super) fn is_nothing(&self) -> bool {
        matches!(self, Self::Null | Self::Flag(false) | Self::Int(0) | Self::Long(0))
    }
}

impl From<bool> for Value<'_> {
    fn from(value: bool) -> Self {
        Self::Flag(value)
    }
}

impl From<i32> for Value<'_> {
    fn from(value: i32) -> Self {
        Self::Int(value)
    }
}

/// Saturates at the largest `INTEGER`.
impl From<u32> for Value<'_> {
    fn from(value: u32) -> Self {
        Self::Int(i32::try_from(value).unwrap_or(i32::MAX))
    }
}

impl From<i64> for Value<'_> {
    fn from(value: i64) -> Self {
        Self::Long(value)
    }
}

impl From<f64> for Value<'_> {
    fn from(value: f64) -> Self {
        Self::Double(value)
    }
}

/// In microseconds.
impl From<Duration> for Value<'_> {
    fn from(value: Duration) -> Self {
        Self::Long(i64::try_from(value.as_micros()).unwrap_or(i64::MAX))
    }
}

impl From<Uuid> for Value<'_> {
    fn from(value: Uuid) -> Self {
        Self::Uuid(value)
    }
}

impl From<Time> for Value<'_> {
    fn from(value: Time) -> Self {
        Self::Time(value)
    }
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(value: &'a str) -> Self {
        Self::Text(Cow::Borrowed(value))
    }
}

impl From<String> for Value<'_> {
    fn from(value: String) -> Self {
        Self::Text(Cow::Owned(value))
    }
}

impl<'a> From<&'a [u8]> for Value<'a> {
    fn from(value: &'a [u8]) -> Self {
        Self::Bytes(value)
    }
}

/// `None` becomes null.
impl<'a, T: Into<Value<'a>>> From<Option<T>> for Value<'a> {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}
