//! Images. The image of an event has everything of a running job that the event does not say itself. It lies in a column of the
//! event that no reader gets. So the log alone has all of a running job, and its row need not be written with every event. If
//! the job differs from its row only in what events say, the image is empty. If its lease was also extended, the image has the
//! lease alone ([`Differs`]). Progress reports have such images once the row was written.

use std::marker::PhantomData;

use chrono::TimeDelta;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    Differs, StoreError,
    extension::Extension,
    job_columns::{JOB_COLUMNS, JobColumn, Kind, Varies, read_job},
    rows::{Columns, damaged},
    value::Value,
};
use crate::domain::{clock::Time, job::Job, json::Json};

/// The format in which images are written. A server that does not know the format of an image can't go on.
const IMAGE_FORMAT: i64 = 1;
/// SQL for the [`Differs`] of the image of an event `e`, as a number.
pub(super) const DIFFERS: &str = "CASE WHEN e.image = '' THEN 0 WHEN e.image LIKE '[%' THEN 2 ELSE 1 END";

impl Differs {
    /// Maps the number that [`DIFFERS`] gives. `None` is for no image.
    pub(super) fn of_number(number: Option<i32>) -> Self {
        match number {
            None | Some(0) => Self::Nowhere,
            Some(1) => Self::InLease,
            _ => Self::InMore,
        }
    }
}

/// Columns of `job` that the event has itself, in the order of [`JOB_COLUMNS`].
const OF_EVENT: [&str; 6] = ["status", "attempt", "updated_at", "last_job_seq", "last_seq", "last_recorded_at"];

/// True of a column that images have. They have these in the order of [`JOB_COLUMNS`].
fn is_in_image(column: &JobColumn) -> bool {
    column.changes == Varies::InLife && !OF_EVENT.contains(&column.name)
}

/// A value in an image, as JSON. Numbers, flags and times are numbers: a time counts microseconds from that of the event
/// ([`Job::updated_at`]). Bytes are hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Item {
    Number(i64),
    Text(String),
}

impl Item {
    /// `None` for null.
    fn of(value: Value<'_>, at: Time) -> Option<Self> {
        Some(match value {
            Value::Flag(value) => Self::Number(value.into()),
            Value::Int(value) => Self::Number(value.into()),
            Value::Long(value) => Self::Number(value),
            Value::Time(value) => Self::Number(value.timestamp_micros() - at.timestamp_micros()),
            Value::Text(value) => Self::Text(value.into_owned()),
            Value::Bytes(value) => Self::Text(hex::encode(value)),
            // Values that never change, such as doubles and UUIDs, are in no image.
            Value::Null | Value::Double(_) | Value::Uuid(_) => return None,
        })
    }
}

/// The image of a running job: an empty text, the lease (an [`Extension`]), or all, by how the job differs from its row.
pub(super) fn write(job: &Job, differs: Differs) -> String {
    match differs {
        Differs::Nowhere => String::new(),
        Differs::InLease => Extension::of(job).map_or_else(|| of_all(job), Extension::text),
        Differs::InMore => of_all(job),
    }
}

/// A JSON array of the format and the values, without trailing nulls.
fn of_all(job: &Job) -> String {
    let columns = JOB_COLUMNS.iter().filter(|column| is_in_image(column));
    let mut items = vec![Some(Item::Number(IMAGE_FORMAT))];
    items.extend(columns.map(|column| Item::of((column.value)(job), job.updated_at)));
    items.truncate(items.iter().rposition(Option::is_some).map_or(0, |last| last + 1));
    serde_json::to_string(&items).expect("numbers and texts serialise")
}

/// A value that replaces that of the row.
#[derive(Debug, Clone, PartialEq)]
enum Later {
    Null,
    Long(i64),
    Text(String),
    Bytes(Vec<u8>),
    Time(Time),
}

/// An image and its event: the value of each of [`JOB_COLUMNS`] after the event. `None` keeps the value of the row.
struct Image {
    values: Vec<Option<Later>>,
    /// The lease, if the image has that alone.
    lease: Option<Extension>,
}

impl Image {
    /// Reads an image, then the columns [`OF_EVENT`] of the job's last event. A null image gives `None`: the row is as of that
    /// event.
    fn read<'r>(columns: &mut impl Columns<'r>) -> Result<Option<Self>, StoreError> {
        let image = columns.optional_text()?;
        let status = columns.optional_text()?.map(str::to_owned);
        let attempt = columns.optional_int()?;
        let updated_at = columns.optional_time()?;
        let (job_seq, seq) = (columns.optional_long()?, columns.optional_long()?);
        let recorded_at = columns.optional_time()?;
        if seq.is_none() {
            return Err(StoreError::Unusable(
                "the log lacks the last event of a job: the end of the log was lost".to_owned(),
            ));
        }
        let Some(image) = image else { return Ok(None) };
        let at = updated_at.ok_or_else(|| damaged("image"))?;
        let long = |value: Option<i64>| value.map_or(Later::Null, Later::Long);
        let time = |value: Option<Time>| value.map_or(Later::Null, Later::Time);
        let mut of_event = [
            status.map_or(Later::Null, Later::Text),
            long(attempt.map(i64::from)),
            time(updated_at),
            long(job_seq),
            long(seq),
            time(recorded_at),
        ]
        .into_iter();
        let has_all = image.starts_with('[');
        let lease = (!image.is_empty() && !has_all).then(|| Extension::read(image)).transpose()?;
        let mut items = Vec::new().into_iter();
        if has_all {
            let in_order: Vec<Option<Item>> = serde_json::from_str(image).map_err(|_| damaged("image"))?;
            items = in_order.into_iter();
            if items.next().flatten() != Some(Item::Number(IMAGE_FORMAT)) {
                return Err(StoreError::Unusable(
                    "the database holds an image in a format of a newer jobledger".to_owned(),
                ));
            }
        }
        let value = |column: &JobColumn| {
            Ok(match (column.changes, is_in_image(column)) {
                (Varies::Never | Varies::ByEdit, _) => None,
                (_, true) if !has_all => None,
                (_, true) => Some(later(column.kind, items.next().flatten(), at)?),
                (_, false) => of_event.next(),
            })
        };
        JOB_COLUMNS.iter().map(value).collect::<Result<_, _>>().map(|values| Some(Self { values, lease }))
    }
}

fn later(kind: Kind, item: Option<Item>, at: Time) -> Result<Later, StoreError> {
    Ok(match (kind, item) {
        (_, None) => Later::Null,
        (Kind::Time, Some(Item::Number(micros))) => {
            Later::Time(at.checked_add_signed(TimeDelta::microseconds(micros)).ok_or_else(|| damaged("image"))?)
        }
        (Kind::Int | Kind::Long | Kind::Flag, Some(Item::Number(value))) => Later::Long(value),
        (Kind::Text, Some(Item::Text(value))) => Later::Text(value),
        (Kind::Bytes, Some(Item::Text(value))) => Later::Bytes(hex::decode(value).map_err(|_| damaged("image"))?),
        _ => return Err(damaged("image")),
    })
}

/// A row of `job` with an image over it.
struct Over<'i, 'r, C> {
    row: &'i mut C,
    image: &'i Image,
    next: usize,
    of_row: PhantomData<&'r ()>,
}

impl<'i, 'r, C: Columns<'r>> Over<'i, 'r, C> {
    /// Reads the next column of the row, and returns the image's value instead if there is one.
    fn read<T>(
        &mut self,
        row: impl FnOnce(&mut C) -> Result<T, StoreError>,
        later: impl FnOnce(&'i Later) -> Option<T>,
    ) -> Result<T, StoreError> {
        let of_row = row(self.row)?;
        let image = self.image.values.get(self.next).and_then(Option::as_ref);
        self.next += 1;
        image.map_or(Ok(of_row), |image| later(image).ok_or_else(|| damaged("image")))
    }
}

impl Later {
    fn long(&self) -> Option<i64> {
        if let Self::Long(value) = self { Some(*value) } else { None }
    }
}

/// For columns that may be null. In all others a null is an error.
fn optional<'i, T>(value: impl FnOnce(&'i Later) -> Option<T>) -> impl FnOnce(&'i Later) -> Option<Option<T>> {
    |later| if *later == Later::Null { Some(None) } else { value(later).map(Some) }
}

impl<'i, 'r: 'i, C: Columns<'r>> Columns<'i> for Over<'i, 'r, C> {
    fn uuid(&mut self) -> Result<Uuid, StoreError> {
        self.read(C::uuid, |_| None)
    }

    fn flag(&mut self) -> Result<bool, StoreError> {
        self.read(C::flag, |later| later.long().map(|value| value != 0))
    }

    fn optional_flag(&mut self) -> Result<Option<bool>, StoreError> {
        self.read(C::optional_flag, optional(|later| later.long().map(|value| value != 0)))
    }

    fn int(&mut self) -> Result<i32, StoreError> {
        self.read(C::int, |later| i32::try_from(later.long()?).ok())
    }

    fn optional_int(&mut self) -> Result<Option<i32>, StoreError> {
        self.read(C::optional_int, optional(|later| i32::try_from(later.long()?).ok()))
    }

    fn long(&mut self) -> Result<i64, StoreError> {
        self.read(C::long, Later::long)
    }

    fn optional_long(&mut self) -> Result<Option<i64>, StoreError> {
        self.read(C::optional_long, optional(Later::long))
    }

    fn double(&mut self) -> Result<f64, StoreError> {
        self.read(C::double, |_| None)
    }

    fn optional_text(&mut self) -> Result<Option<&'i str>, StoreError> {
        let text = |later: &'i Later| if let Later::Text(value) = later { Some(&**value) } else { None };
        self.read(|row| row.optional_text(), optional(text))
    }

    fn optional_bytes(&mut self) -> Result<Option<&'i [u8]>, StoreError> {
        let bytes = |later: &'i Later| if let Later::Bytes(value) = later { Some(&**value) } else { None };
        self.read(|row| row.optional_bytes(), optional(bytes))
    }

    fn optional_time(&mut self) -> Result<Option<Time>, StoreError> {
        self.read(C::optional_time, optional(|later| if let Later::Time(value) = later { Some(*value) } else { None }))
    }

    fn result(&mut self) -> Result<Option<Json>, StoreError> {
        self.row.result()
    }

    fn result_beside_detail(&mut self) -> Result<Option<Json>, StoreError> {
        self.row.result_beside_detail()
    }
}

/// Reads the image of the job's last event, null if the row is as of that event; the columns [`OF_EVENT`] of that event; the
/// last [`Extension`] of the lease after it, or null; and then the columns of [`read_job`].
///
/// # Errors
///
/// If the log has no event of the job from its row's last one on. Then the row is ahead of a log that was cut, and the job is
/// unknown.
pub(super) fn read_job_over<'r>(columns: &mut impl Columns<'r>) -> Result<Job, StoreError> {
    let image = Image::read(columns)?;
    let extension = columns.optional_text()?.map(Extension::read).transpose()?;
    let mut job = match &image {
        None => read_job(columns)?,
        Some(image) => read_job(&mut Over { row: columns, image, next: 0, of_row: PhantomData })?,
    };
    image.and_then(|image| image.lease).into_iter().chain(extension).for_each(|lease| lease.apply(&mut job));
    Ok(job)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::{
        event::{EventKind, JobEvent},
        status::JobStatus,
        tests::replay::any_history,
    };

    /// A row as a list of values, from left to right.
    struct Row<'a>(std::vec::IntoIter<Value<'a>>);

    macro_rules! next {
        ($row:ident, $($pattern:pat => $value:expr),+) => {
            match $row.0.next() {
                $(Some($pattern) => Ok($value),)+
                other => panic!("{other:?} was not asked for"),
            }
        };
    }

    impl<'a> Columns<'a> for Row<'a> {
        fn uuid(&mut self) -> Result<Uuid, StoreError> {
            next!(self, Value::Uuid(value) => value)
        }

        fn flag(&mut self) -> Result<bool, StoreError> {
            next!(self, Value::Flag(value) => value)
        }

        fn optional_flag(&mut self) -> Result<Option<bool>, StoreError> {
            next!(self, Value::Null => None, Value::Flag(value) => Some(value))
        }

        fn int(&mut self) -> Result<i32, StoreError> {
            next!(self, Value::Int(value) => value)
        }

        fn optional_int(&mut self) -> Result<Option<i32>, StoreError> {
            next!(self, Value::Null => None, Value::Int(value) => Some(value))
        }

        fn long(&mut self) -> Result<i64, StoreError> {
            next!(self, Value::Long(value) => value)
        }

        fn optional_long(&mut self) -> Result<Option<i64>, StoreError> {
            next!(self, Value::Null => None, Value::Long(value) => Some(value))
        }

        fn double(&mut self) -> Result<f64, StoreError> {
            next!(self, Value::Double(value) => value)
        }

        fn optional_text(&mut self) -> Result<Option<&'a str>, StoreError> {
            let text = |value: std::borrow::Cow<'a, str>| -> &'a str { Box::leak(value.into_owned().into_boxed_str()) };
            next!(self, Value::Null => None, Value::Text(value) => Some(text(value)))
        }

        fn optional_bytes(&mut self) -> Result<Option<&'a [u8]>, StoreError> {
            next!(self, Value::Null => None, Value::Bytes(value) => Some(value))
        }

        fn optional_time(&mut self) -> Result<Option<Time>, StoreError> {
            next!(self, Value::Null => None, Value::Time(value) => Some(value))
        }

        fn result(&mut self) -> Result<Option<Json>, StoreError> {
            Ok(None)
        }

        fn result_beside_detail(&mut self) -> Result<Option<Json>, StoreError> {
            Ok(None)
        }
    }

    /// Reads a job from its row and its last event, which has an image if it is later than the row.
    fn read(row: &Job, later: Option<(&str, &JobEvent)>, shown: &JobEvent) -> Job {
        let (image, event) = later.map_or((None, shown), |(image, event)| (Some(image), event));
        let mut values: Vec<Value<'_>> = vec![
            image.into(),
            event.next_status.as_str().into(),
            event.attempt.into(),
            event.ts.into(),
            event.job_seq.into(),
            event.seq.into(),
            event.recorded_at.into(),
            Value::Null,
        ];
        values.extend(JOB_COLUMNS.iter().map(|column| (column.value)(row)));
        values.extend([shown.stage.as_deref().into(), shown.progress.map(i32::from).into()]);
        read_job_over(&mut Row(values.into_iter())).unwrap()
    }

    proptest! {
        /// A running job is its row, however old, with the image of its last event over it.
        #[test]
        fn a_row_with_an_image_over_it_is_the_job(history in any_history()) {
            let mut rows: Vec<&Job> = Vec::new();
            for (job, events) in &history {
                let Some(last) = events.last() else { continue };
                // An edit or an erasure writes the whole row.
                if events.iter().any(|event| matches!(event.kind, EventKind::Edited | EventKind::Erased)) {
                    rows.clear();
                }
                rows.push(job);
                prop_assert_eq!(&read(job, None, last), job);
                if job.status == JobStatus::Running {
                    let image = write(job, Differs::InMore);
                    for row in &rows {
                        prop_assert_eq!(&read(row, Some((&image, last)), last), job);
                        let differs = Differs::between(row, job);
                        if differs == Differs::Nowhere {
                            prop_assert_eq!(&read(row, Some(("", last)), last), job);
                        }
                        if differs <= Differs::InLease {
                            let image = write(job, Differs::InLease);
                            prop_assert!(job.lease.is_none() || image.len() < 40, "{}", image);
                            prop_assert_eq!(&read(row, Some((&image, last)), last), job);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn an_image_of_another_format_is_refused() {
        let mut values = vec![Value::from("[2,0]")];
        values.extend([Value::Null, Value::Null, Time::UNIX_EPOCH.into()]);
        values.extend([Value::Null, Value::Long(1), Value::Null, Value::Null]);
        let refused = read_job_over(&mut Row(values.into_iter()));
        assert!(matches!(refused, Err(StoreError::Unusable(reason)) if reason.contains("newer jobledger")));
    }
}
