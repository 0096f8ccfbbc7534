//! Leases: who works on a job, and until when unless they say that they still do.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{
    clock::Time,
    id::{JobId, OrgId},
};

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

/// What proves a hold: the job, its attempt, and a nonce of which nobody can know but who was told.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeaseToken {
    /// The job's org.
    pub org: OrgId,
    /// The job.
    pub job: JobId,
    /// Its attempt.
    pub attempt: i32,
    /// The lease's [nonce](LeaseSecret::nonce).
    pub nonce: i64,
}

/// What the nonces of one batch's leases are made from: random, and written nowhere.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct LeaseSecret(pub [u8; 16]);

impl LeaseSecret {
    /// One of its own.
    ///
    /// # Errors
    ///
    /// If the system has no random numbers.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut secret = [0; 16];
        getrandom::fill(&mut secret)?;
        Ok(Self(secret))
    }

    /// The nonce of the lease on a job that is granted at this `seq`: 64 bits that follow from nothing that is told of any job. No two
    /// leases share one, not even where a database was restored to an earlier state between them.
    pub fn nonce(&self, job: JobId, seq: i64) -> i64 {
        let digest = Sha256::new().chain_update(self.0).chain_update(job.0).chain_update(seq.to_be_bytes()).finalize();
        digest.first_chunk().copied().map_or(0, i64::from_be_bytes)
    }
}

/// Secrets don't belong into logs.
impl fmt::Debug for LeaseSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeaseSecret(…)")
    }
}

impl LeaseToken {
    /// What a caller holds whose token is none: of no job, and so never the right one.
    pub const NOBODYS: Self = Self { org: OrgId(Uuid::nil()), job: JobId(Uuid::nil()), attempt: 0, nonce: 0 };
}

impl fmt::Display for LeaseToken {
    /// As it travels: something that a person can paste.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}-{:016x}", self.org.0.simple(), self.job.0.simple(), self.attempt, self.nonce)
    }
}

impl FromStr for LeaseToken {
    type Err = ();

    /// The token in its one form; anything else is nobody's.
    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.splitn(4, '-');
        let mut part = || parts.next().ok_or(());
        let org = OrgId(Uuid::try_parse(part()?).map_err(|_| ())?);
        let job = JobId(Uuid::try_parse(part()?).map_err(|_| ())?);
        let attempt = part()?.parse().map_err(|_| ())?;
        let nonce = u64::from_str_radix(part()?, 16).map_err(|_| ())?.cast_signed();
        let token = Self { org, job, attempt, nonce };
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
        let token = LeaseToken { org: OrgId(Uuid::now_v7()), job: JobId(Uuid::now_v7()), attempt: 3, nonce: -7 };
        let text = token.to_string();
        assert_eq!(text.parse(), Ok(token));
        assert!(text.len() < 100, "{text}");
        for other in [text.to_uppercase(), format!(" {text}"), format!("{text}-"), text.replace("-3-", "-03-")] {
            assert_eq!(other.parse::<LeaseToken>(), Err(()), "{other}");
        }
        for other in ["", "x", "-", "--", "1-2-3", "1-2-3-4", "00000000000000000000000000000000"] {
            assert_eq!(other.parse::<LeaseToken>(), Err(()), "{other}");
        }
    }
}
