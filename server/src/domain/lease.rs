//! Leases: which worker works on a job, and until when unless a heartbeat extends that.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{
    clock::Time,
    id::{JobId, OrgId},
};

/// The longest time for which a lease is granted or extended.
pub const LONGEST_LEASE: Duration = Duration::from_secs(24 * 3_600);

/// A worker's right to work on a running job until a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The worker that has the lease.
    pub worker: Arc<str>,
    /// How long the lease was granted for. A heartbeat extends by this unless it asks for another time.
    pub granted: Duration,
    /// When the lease ends unless it is extended. The lease token works until an event in the log ends the lease.
    pub expires_at: Time,
    /// The `request_id` of the claim, to recognise the claim when it is repeated.
    pub request: Option<Arc<str>>,
    /// True once the worker has sent anything under this lease.
    pub is_confirmed: bool,
}

/// The proof of a lease: the job, its attempt, and a nonce that only the claim's answer reveals.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeaseToken {
    /// The job's org.
    pub org: OrgId,
    /// The job.
    pub job: JobId,
    /// The job's attempt.
    pub attempt: i32,
    /// The lease's [nonce](LeaseSecret::nonce).
    pub nonce: i64,
}

/// The secret from which the nonces of one batch's leases are derived. It is random and never stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct LeaseSecret(pub [u8; 16]);

impl LeaseSecret {
    /// Draws a new secret.
    ///
    /// # Errors
    ///
    /// If the system has no random numbers.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut secret = [0; 16];
        getrandom::fill(&mut secret)?;
        Ok(Self(secret))
    }

    /// The nonce of the lease that is granted on a job at this `seq`: 64 bits that nothing visible of any job reveals.
    /// No two leases share a nonce, even if the database is restored to an earlier state between them.
    pub fn nonce(&self, job: JobId, seq: i64) -> i64 {
        let digest = Sha256::new().chain_update(self.0).chain_update(job.0).chain_update(seq.to_be_bytes()).finalize();
        digest.first_chunk().copied().map_or(0, i64::from_be_bytes)
    }
}

/// Secrets don't belong in logs.
impl fmt::Debug for LeaseSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeaseSecret(…)")
    }
}

impl LeaseToken {
    /// Stands for a token that can't be parsed. It names no job, so no check accepts it.
    pub const NOBODYS: Self = Self { org: OrgId(Uuid::nil()), job: JobId(Uuid::nil()), attempt: 0, nonce: 0 };
}

impl fmt::Display for LeaseToken {
    /// The form on the wire, which a person can paste.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}-{:016x}", self.org.0.simple(), self.job.0.simple(), self.attempt, self.nonce)
    }
}

impl FromStr for LeaseToken {
    type Err = ();

    /// Parses the one valid form, that of `Display`.
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

/// Lease tokens don't belong in logs.
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
