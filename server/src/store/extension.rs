//! Lease extensions in batch records: what a heartbeat without news changes in a running job has no event, and its row is not written for it.
//! The record of a batch has all of its extensions, as the text of a JSON object: under the job's id, in 32 hexadecimal digits, a string of
//! what an [`Extension`] is. Of a job the last one counts, if no event of the job came after it.

use std::fmt::Write as _;

use chrono::DateTime;

use super::{StoreError, rows::damaged};
use crate::domain::{clock::Time, job::Job};

/// Where an extension begins in the text, counted from the first digit of its job's id.
pub(super) const EXTENSION_AT: usize = 35;
/// An extension, and what follows on it, takes no more of the text.
pub(super) const EXTENSION_CHARS: usize = 64;

/// Records with extensions, and what these take in bytes, that a read of a job looks at which others wait for: where there are more, it takes a
/// turn of its org.
pub(super) const NEAR_RECORDS: usize = 64;
pub(super) const NEAR_BYTES: usize = 64 << 10;

/// What of a running job changes without an event while it is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extension {
    expires_at: Time,
    due_at: Option<Time>,
    is_confirmed: bool,
}

impl Extension {
    /// How a job stands in that; `None` where nobody holds it.
    pub(super) fn of(job: &Job) -> Option<Self> {
        let lease = job.lease.as_ref()?;
        Some(Self { expires_at: lease.expires_at, due_at: job.due_at, is_confirmed: lease.is_confirmed })
    }

    /// The job as it is after it.
    pub(super) fn apply(self, job: &mut Job) {
        if let Some(lease) = &mut job.lease {
            (lease.expires_at, lease.is_confirmed) = (self.expires_at, self.is_confirmed);
            job.due_at = self.due_at;
        }
    }

    /// The end of the lease; unless both are as usual, when time is to look at the job, and whether the holder was heard of; and the quote
    /// behind, so that no text is the beginning of another. Times in microseconds since 1970.
    pub(super) fn text(self) -> String {
        let mut text = self.expires_at.timestamp_micros().to_string();
        if self.due_at != Some(self.expires_at) || !self.is_confirmed {
            let due_at = self.due_at.map_or_else(String::new, |due_at| due_at.timestamp_micros().to_string());
            write!(text, ",{due_at},{}", u8::from(self.is_confirmed)).expect("writing to a string");
        }
        text.push('"');
        text
    }

    /// Reads it, with whatever follows.
    ///
    /// # Errors
    ///
    /// If it is none.
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

/// The text of a job's extension, as of the job itself; of one that nobody holds, when time is to look at it.
pub(super) fn lease_text(job: &Job) -> String {
    Extension::of(job).map_or_else(
        || format!(",{},0\"", job.due_at.map_or_else(String::new, |due_at| due_at.timestamp_micros().to_string())),
        Extension::text,
    )
}

/// The extensions of some jobs that are held; `None` if there are none.
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

    /// Where PostgreSQL's functions say them again.
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
