//! Leases: who works on a job, and until when unless they say that they still do.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use uuid::Uuid;

use super::{clock::Time, id::JobId};

/// No lease is granted, or extended, for longer.
pub const LONGEST_LEASE: Duration = Duration::from_secs(24 * 3_600);

/// A worker's hold on a running job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Who holds it.
    pub worker: Arc<str>,
    /// How long it was granted for, and is extended by where the holder doesn't say.
    pub granted: Duration,
    /// When it ends unless it is extended. It really ends by an event in the log: until then its token works.
    pub expires_at: Time,
    /// The `request_id` of the claim that took it, by which the claim is known when it comes again.
    pub request: Option<Arc<str>>,
    /// Whether the holder was heard of since it claimed.
    pub is_confirmed: bool,
}

/// What proves a hold: the job, its attempt, and an epoch that no other claim of the job has had or will have.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeaseToken {
    /// The job.
    pub job: JobId,
    /// Its attempt.
    pub attempt: i32,
    /// Rises with every claim and every expiry.
    pub epoch: i64,
}

impl LeaseToken {
    /// What a caller holds whose token is none: of no job, and so never the right one.
    pub const NOBODYS: Self = Self { job: JobId(Uuid::nil()), attempt: 0, epoch: 0 };
}

impl fmt::Display for LeaseToken {
    /// As it travels: something that a person can paste.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{:x}", self.job.0.simple(), self.attempt, self.epoch)
    }
}

impl FromStr for LeaseToken {
    type Err = ();

    /// The token in its one form; anything else is nobody's.
    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.splitn(3, '-');
        let mut part = || parts.next().ok_or(());
        let job = JobId(Uuid::try_parse(part()?).map_err(|_| ())?);
        let attempt = part()?.parse().map_err(|_| ())?;
        let epoch = i64::from_str_radix(part()?, 16).map_err(|_| ())?;
        let token = Self { job, attempt, epoch };
        (token.to_string() == text).then_some(token).ok_or(())
    }
}

/// Tokens don't belong into logs.
impl fmt::Debug for LeaseToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeaseToken(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_one_form() {
        let token = LeaseToken { job: JobId(Uuid::now_v7()), attempt: 3, epoch: 1_700_000_000_000_000 };
        let text = token.to_string();
        assert_eq!(text.parse(), Ok(token));
        assert!(text.len() < 64, "{text}");
        for other in [text.to_uppercase(), format!(" {text}"), format!("{text}-"), text.replace("-3-", "-03-")] {
            assert_eq!(other.parse::<LeaseToken>(), Err(()), "{other}");
        }
        for other in ["", "x", "-", "--", "1-2-3", "00000000000000000000000000000000"] {
            assert_eq!(other.parse::<LeaseToken>(), Err(()), "{other}");
        }
    }
}
