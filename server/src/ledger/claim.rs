//! A claim from the call to the delivery: looking, waiting, and giving back what nobody took.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::{Instant, timeout_at};

use super::{
    Ledger, LedgerError,
    command::{By, Claim, Claimed, Command, Reply},
    lanes::Lanes,
};
use crate::domain::{
    id::OrgId,
    job::{Job, JobRecord},
    lease::LeaseToken,
    transition,
};

/// Jobs that were claimed and are not delivered yet. Dropped, they are given back at once, unless something was heard of
/// their holder by then: a heartbeat, or the same claim again.
pub(super) struct Undelivered {
    lanes: Arc<Lanes>,
    org: OrgId,
    tokens: Vec<LeaseToken>,
}

impl Undelivered {
    /// `None` where nothing was claimed.
    pub(super) fn of(lanes: &Arc<Lanes>, org: OrgId, claimed: &[Job]) -> Option<Self> {
        let tokens: Vec<_> = claimed.iter().filter_map(Job::lease_token).collect();
        (!tokens.is_empty()).then(|| Self { lanes: Arc::clone(lanes), org, tokens })
    }
}

impl Drop for Undelivered {
    fn drop(&mut self) {
        let give_back = |token: LeaseToken| Command::Apply {
            job: token.job,
            command: Box::new(transition::Command::Abandon(token)),
        };
        self.lanes.enqueue_unasked(self.org, self.tokens.drain(..).map(give_back));
    }
}

/// Claimed jobs on their way to their worker. Dropped before they are [delivered](Leases::deliver) they are given back.
#[must_use]
pub struct Leases {
    jobs: Vec<JobRecord>,
    undelivered: Option<Undelivered>,
}

impl Leases {
    /// The jobs, the most urgent first, each held under its lease.
    pub fn jobs(&self) -> &[JobRecord] {
        &self.jobs
    }

    /// Says that the worker has them, or that its call has been answered.
    pub fn deliver(mut self) {
        if let Some(mut undelivered) = self.undelivered.take() {
            undelivered.tokens.clear();
        }
    }
}

impl Ledger {
    /// Takes jobs that are ready, under leases; where there are none, waits for them as long as `wait`.
    ///
    /// Dropped while it waits it takes nothing.
    ///
    /// # Errors
    ///
    /// As for [`Ledger::submit`]; [`LedgerError::Overloaded`] also where too many claims wait.
    pub async fn claim(&self, by: impl Into<By>, claim: Claim, wait: Duration) -> Result<Leases, LedgerError> {
        let by = by.into();
        let org = by.org;
        let until = Instant::now() + wait;
        let mut visit = self.waiting.enter(org, Arc::clone(&claim.types))?;
        loop {
            let (claimed, undelivered) = self.look_for_work(&by, &claim).await?;
            visit.found(claimed.ready_gen, claimed.has_more);
            if !claimed.jobs.is_empty() {
                drop(visit);
                return self.fill(org, claimed.jobs, undelivered).await;
            }
            if claimed.has_more {
                continue;
            }
            if Instant::now() >= until {
                return Ok(Leases { jobs: Vec::new(), undelivered: None });
            }
            match timeout_at(until, visit.news(claimed.ready_gen)).await {
                Ok(news) => news?,
                Err(_) => return Ok(Leases { jobs: Vec::new(), undelivered: None }),
            }
        }
    }

    async fn look_for_work(&self, by: &By, claim: &Claim) -> Result<(Claimed, Option<Undelivered>), LedgerError> {
        let answered = self.ask(by.clone(), Command::Claim(Box::new(claim.clone()))).await?;
        match answered.reply {
            Reply::Claimed(claimed) => Ok((claimed, answered.undelivered)),
            _ => Err(LedgerError::Refused),
        }
    }

    /// Adds what the jobs carry.
    async fn fill(&self, org: OrgId, jobs: Vec<Job>, undelivered: Option<Undelivered>) -> Result<Leases, LedgerError> {
        let with_payload: Vec<_> = jobs.iter().filter(|job| job.spec.payload_bytes > 0).map(|job| job.id).collect();
        let mut contents = HashMap::new();
        if !with_payload.is_empty() {
            contents.extend(self.store.contents(org, &with_payload).await?);
        }
        let record = |job: Job| JobRecord { contents: contents.remove(&job.id).unwrap_or_default(), job };
        Ok(Leases { jobs: jobs.into_iter().map(record).collect(), undelivered })
    }
}
