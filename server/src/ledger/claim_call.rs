//! A claim from the call to the delivery: attempts, waits, and giving back jobs that were not delivered.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::{Instant, timeout_at};

use super::{
    Ledger, LedgerError,
    command::{Author, Claim},
    lanes::Lanes,
    reader::ReadTurn,
    submission::Submission,
};
use crate::domain::{
    id::OrgId,
    job::{Job, JobRecord},
    transition::GiveBack,
};

/// What a batch decided on a claim.
pub(super) struct Claimed {
    /// The jobs, most urgent first, each with its lease.
    pub(super) jobs: Vec<Job>,
    /// True if there may be more jobs that the claim could have taken.
    pub(super) has_more: bool,
    /// The `ready_gen` that the claim saw: every job that became ready up to this generation was a candidate. Set once the
    /// whole batch is decided.
    pub(super) ready_gen: i64,
    /// Gives the jobs back unless they are delivered. Set once the batch has committed.
    pub(super) undelivered: Option<Undelivered>,
}

impl Claimed {
    pub(super) fn new(jobs: Vec<Job>, has_more: bool) -> Self {
        Self { jobs, has_more, ready_gen: 0, undelivered: None }
    }
}

/// Claimed jobs that are not delivered yet. Dropping this gives them back, unless a heartbeat or a repeat of the claim came
/// meanwhile.
pub(super) struct Undelivered {
    lanes: Arc<Lanes>,
    org: OrgId,
    answered: Vec<GiveBack>,
}

impl Undelivered {
    /// `None` if nothing was claimed.
    pub(super) fn of(lanes: &Arc<Lanes>, org: OrgId, claimed: &[Job]) -> Option<Self> {
        let answer = |job: &Job| {
            let expires_at = job.lease.as_ref()?.expires_at;
            Some(GiveBack { token: job.lease_token()?, expires_at })
        };
        let answered: Vec<_> = claimed.iter().filter_map(answer).collect();
        (!answered.is_empty()).then(|| Self { lanes: Arc::clone(lanes), org, answered })
    }
}

impl Drop for Undelivered {
    fn drop(&mut self) {
        self.lanes.give_back(self.org, self.answered.drain(..));
    }
}

/// Claimed jobs on their way to their worker. Dropping this before [`Leases::deliver`] gives them back.
#[must_use]
pub struct Leases {
    jobs: Vec<JobRecord>,
    undelivered: Option<Undelivered>,
    turn: Option<ReadTurn>,
}

impl Leases {
    fn none() -> Self {
        Self { jobs: Vec::new(), undelivered: None, turn: None }
    }

    /// The jobs, most urgent first, each with its lease.
    pub fn jobs(&self) -> &[JobRecord] {
        &self.jobs
    }

    /// The turn in which their payloads were read. The caller keeps it until its answer is made.
    pub fn take_turn(&mut self) -> Option<ReadTurn> {
        self.turn.take()
    }

    /// Confirms that the worker has the jobs.
    pub fn deliver(self) {
        self.into_delivery().deliver();
    }

    /// Takes the jobs' delivery, to be confirmed once the caller has taken the answer.
    pub fn into_delivery(self) -> LeaseDelivery {
        LeaseDelivery(self.undelivered)
    }
}

/// Delivery of an answer with claimed jobs. Dropping this before [`LeaseDelivery::deliver`] gives them back.
#[must_use]
pub struct LeaseDelivery(Option<Undelivered>);

impl LeaseDelivery {
    /// Confirms that the caller took the answer.
    pub fn deliver(mut self) {
        if let Some(undelivered) = &mut self.0 {
            undelivered.answered.clear();
        }
    }
}

impl Ledger {
    /// Claims ready jobs under leases. If there are none, waits for them up to `wait`.
    ///
    /// A waiting call that is dropped takes nothing. A later call with the same worker and `request_id` ends it with no jobs. A
    /// call with a `request_id` tries once more before it answers with none, since an earlier call of the claim at another
    /// server may have taken jobs meanwhile.
    ///
    /// # Errors
    ///
    /// As for [`Ledger::submit`]; also [`LedgerError::Overloaded`] if too many claims wait, and [`LedgerError::TooManyNames`]
    /// if claims and event streams name too much.
    pub async fn claim(&self, by: impl Into<Author>, claim: Claim, wait: Duration) -> Result<Leases, LedgerError> {
        let by = by.into();
        let latest = self.repeats.supersede(by.org, &claim);
        let _wish = self.wishes.of_claim(by.org, &claim)?;
        let Some(latest) = latest else {
            return self.await_work(by, claim, wait).await;
        };
        tokio::select! {
            biased;
            () = latest.superseded() => Ok(Leases::none()),
            found = self.await_work(by, claim, wait) => found,
        }
    }

    async fn await_work(&self, by: Author, claim: Claim, wait: Duration) -> Result<Leases, LedgerError> {
        let org = by.org;
        let until = Instant::now() + wait;
        let mut is_last = wait.is_zero();
        let mut visit = self.waiting.enter(org, Arc::clone(&claim.types))?;
        loop {
            let claimed = self.ask(by.clone(), Submission::Claim, Box::new(claim.clone())).await?;
            visit.found(claimed.ready_gen, claimed.has_more);
            if !claimed.jobs.is_empty() {
                drop(visit);
                return self.fill(org, claimed).await;
            }
            if claimed.has_more {
                continue;
            }
            if is_last {
                return Ok(Leases::none());
            }
            match timeout_at(until, visit.news(claimed.ready_gen)).await {
                Ok(news) => news?,
                Err(_) if claim.request.is_some() => is_last = true,
                Err(_) => return Ok(Leases::none()),
            }
        }
    }

    /// Reads the payloads, in a turn of the org because repeats of a claim read the same payloads each time.
    async fn fill(&self, org: OrgId, claimed: Claimed) -> Result<Leases, LedgerError> {
        let Claimed { jobs, undelivered, .. } = claimed;
        let with_payload: Vec<_> = jobs.iter().filter(|job| job.spec.payload_bytes > 0).map(|job| job.id).collect();
        let (mut contents, mut turn) = (HashMap::new(), None);
        if !with_payload.is_empty() {
            let begun = self.deliveries.begin(org).await?;
            contents.extend(begun.contents(org, with_payload).await?);
            turn = Some(begun);
        }
        let record = |job: Job| JobRecord { contents: contents.remove(&job.id).unwrap_or_default(), job };
        Ok(Leases { jobs: jobs.into_iter().map(record).collect(), undelivered, turn })
    }
}
