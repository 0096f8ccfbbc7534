//! Lease extensions in batch records. A heartbeat without news has no event, and its job's row is not written. Instead the
//! record of its batch has all extensions of the batch, as the text of a JSON object. A key is a job's id in 32 hexadecimal
//! digits, a value the text of an [`Extension`]. The last extension of a job counts, if no event of the job came after it.

use std::fmt::Write as _;

use chrono::DateTime;

use super::{StoreError, rows::damaged};
use crate::domain::{clock::Time, job::Job};

/// Where an extension begins in the text, in characters from the first digit of its job's id.
pub(super) const EXTENSION_AT: usize = 35;
/// Characters that are enough to read an extension from there.
pub(super) const EXTENSION_CHARS: usize = 64;

/// Records with extensions, and their bytes, that a shared read of jobs may scan for the last extension of one job. A job that
/// needs more is read alone, in a turn of its org.
pub(super) const NEAR_RECORDS: usize = 64;
pub(super) const NEAR_BYTES: usize = 64 << 10;

/// What a heartbeat without news changes in a running job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extension {
    expires_at: Time,
    due_at: Option<Time>,
    is_confirmed: bool,
}

impl Extension {
    /// The values of a job. `None` without a lease.
    pub(super) fn of(job: &Job) -> Option<Self> {
        let lease = job.lease.as_ref()?;
        Some(Self { expires_at: lease.expires_at, due_at: job.due_at, is_confirmed: lease.is_confirmed })
    }

    /// Sets the values in a job that has a lease.
    pub(super) fn apply(self, job: &mut Job) {
        if let Some(lease) = &mut job.lease {
            (lease.expires_at, lease.is_confirmed) = (self.expires_at, self.is_confirmed);
            job.due_at = self.due_at;
        }
    }

    /// The end of the lease, then `due_at` and `is_confirmed` unless `due_at` is that end and the lease is confirmed. Times are
    /// microseconds since 1970. The closing quote ends the text, so that no text is the beginning of another.
    pub(super) fn text(self) -> String {
        let mut text = self.expires_at.timestamp_micros().to_string();
        if self.due_at != Some(self.expires_at) || !self.is_confirmed {
            let due_at = self.due_at.map_or_else(String::new, |due_at| due_at.timestamp_micros().to_string());
            write!(text, ",{due_at},{}", u8::from(self.is_confirmed)).expect("writing to a string");
        }
        text.push('"');
        text
    }

    /// Reads an extension, and ignores the text after its closing quote.
    ///
    /// # Errors
    ///
    /// If the text does not begin with an extension.
    pub(super) fn read(text: &str) -> Result<Self, StoreError> {
        let refused = || damaged("lease extension");
        let time = |text: &str| text.parse().ok().and_then(DateTime::from_timestamp_micros).ok_or_else(refused);
        let mut parts = text.split_once('"').ok_or_else(refused)?.0.split(',');
        let expires_at = parts.next().map(time).ok_or_else(refused)??;
        let (due_at, is_confirmed) = match (parts.next(), parts.next()) {
            (None, _) => (Some(expires_at), true),
            (Some(""), Some(confirmed)) => (None, confirmed == "1"),
            (Some(due_at), Some(confirmed)) => (Some(time(due_at)?), confirmed == "1"),
            _ => return Err(refused()),
        };
        Ok(Self { expires_at, due_at, is_confirmed })
    }
}

/// The text of an extension with the job's own values. Without a lease it has only `due_at`.
pub(super) fn lease_text(job: &Job) -> String {
    Extension::of(job).map_or_else(
        || format!(",{},0\"", job.due_at.map_or_else(String::new, |due_at| due_at.timestamp_micros().to_string())),
        Extension::text,
    )
}

/// The JSON object with the extensions of all of these jobs that have a lease. `None` if none has.
pub(super) fn write<'a>(jobs: impl Iterator<Item = &'a Job>) -> Option<String> {
    let mut text = String::new();
    for (job, extension) in jobs.filter_map(|job| Some((job, Extension::of(job)?))) {
        let before = if text.is_empty() { '{' } else { ',' };
        write!(text, "{before}\"{}\":\"{}", job.id.0.simple(), extension.text()).expect("writing to a string");
    }
    (!text.is_empty()).then(|| text + "}")
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;
    use crate::domain::{id::JobId, tests::job_claimed};

    /// PostgreSQL's functions repeat these constants.
    #[test]
    fn functions_look_where_extensions_are() {
        let place = format!("strpos(x.extensions, digits) + {EXTENSION_AT}, {EXTENSION_CHARS})");
        let near = format!("LIMIT {}) near;\n", NEAR_RECORDS + 1);
        let far = format!("records > {NEAR_RECORDS} OR bytes > {NEAR_BYTES} THEN '?'");
        for said in [place, near, far] {
            assert!(crate::store::migrations::FUNCTIONS.sql.contains(&said), "{said}");
        }
    }

    #[test]
    fn extensions_are_found_in_the_text_of_all() {
        let (first, _) = job_claimed();
        let (mut second, _) = job_claimed();
        second.due_at = second.due_at.map(|due| due - TimeDelta::seconds(1));
        let (mut third, _) = job_claimed();
        (third.due_at, third.lease.as_mut().unwrap().is_confirmed) = (None, true);
        let jobs = [first, second, third].map(|job| Job { id: JobId(uuid::Uuid::now_v7()), ..job });
        let text = write(jobs.iter()).unwrap();
        serde_json::from_str::<serde_json::Map<_, _>>(&text).unwrap();
        for job in &jobs {
            let at = text.find(&job.id.0.simple().to_string()).unwrap() + EXTENSION_AT;
            let rest: String = text[at..].chars().take(EXTENSION_CHARS).collect();
            let extension = Extension::of(job).unwrap();
            assert!(rest.starts_with(&extension.text()), "{rest}");
            assert_eq!(Extension::read(&rest).unwrap(), extension);
            let mut other = job.clone();
            (other.lease.as_mut().unwrap().expires_at, other.due_at) = (Time::UNIX_EPOCH, None);
            extension.apply(&mut other);
            assert_eq!(other, *job);
        }
        assert_eq!(write([].iter()), None);
        assert!(Extension::read("12").is_err() && Extension::read("x\"").is_err() && Extension::read("1,2\"").is_err());
    }
}
