//! Quotas of an org, and what is refused once they are reached.
//!
//! An org that has all its bytes gets no new jobs and can't revive any. Its workers go on until it has a quarter more. Beyond
//! that no attempt begins and no progress is recorded. Jobs still end, are canceled, given back and removed, each only once.

use std::borrow::Cow;

use super::{
    super::{LedgerError, Limits, Quantity},
    Log,
};
use crate::domain::{
    event::EventKind,
    transition::{Command, Heartbeat, News, Transition},
};

/// Quotas of one org.
#[derive(Debug, Clone, Copy)]
pub(in crate::ledger) struct Quotas {
    /// Distinct types of its jobs.
    pub(in crate::ledger) types: usize,
    /// Jobs, finished ones included.
    pub(in crate::ledger) jobs: u64,
    /// Approximate bytes of its jobs and events.
    pub(in crate::ledger) bytes: u64,
    /// The same while the disk is nearly full: what the org had before, plus its share of the remaining space.
    pub(in crate::ledger) bytes_left: u64,
}

impl Quotas {
    pub(in crate::ledger) fn of(limits: &Limits, bytes_left: u64) -> Self {
        let Limits { types_per_org: types, jobs_per_org, bytes_per_org, .. } = *limits;
        let (jobs, bytes) = (jobs_per_org.unwrap_or(u64::MAX), bytes_per_org.unwrap_or(u64::MAX));
        Self { types, jobs, bytes, bytes_left }
    }
}

impl Log {
    /// Refuses more jobs, or more bytes, than the org may have.
    pub(super) fn add_to_stock(&self, jobs: u64, bytes: u64) -> Result<(), LedgerError> {
        let Quotas { jobs: most_jobs, bytes: most_bytes, bytes_left, .. } = self.quotas;
        if self.jobs_kept() + jobs > most_jobs {
            return Err(LedgerError::QuotaExceeded { quantity: Quantity::Jobs, limit: most_jobs });
        }
        if self.bytes_kept() + bytes > most_bytes {
            return Err(LedgerError::QuotaExceeded { quantity: Quantity::Bytes, limit: most_bytes });
        }
        if self.bytes_kept() + bytes > bytes_left { Err(LedgerError::StorageFull) } else { Ok(()) }
    }

    /// Refuses new attempts and progress to an org that exceeds its bytes by more than a quarter.
    pub(super) fn may_work(&self) -> Result<(), LedgerError> {
        let most = self.quotas.bytes;
        if self.bytes_kept() <= with_a_quarter(most) {
            return Ok(());
        }
        Err(LedgerError::QuotaExceeded { quantity: Quantity::Bytes, limit: most })
    }

    /// Reduces a command while the org exceeds its bytes by more than a quarter: a heartbeat then only extends its lease.
    pub(super) fn within_quota<'a>(&self, command: &'a Command) -> Cow<'a, Command> {
        match command {
            Command::Heartbeat(heartbeat) if self.may_work().is_err() => {
                Cow::Owned(Command::Heartbeat(Heartbeat { news: News::default(), ..heartbeat.clone() }))
            }
            _ => Cow::Borrowed(command),
        }
    }

    /// Refuses events that the org may not add to its log, whichever command causes them.
    pub(super) fn check_quota(&self, transition: &Transition) -> Result<(), LedgerError> {
        for event in &transition.events {
            match event.kind {
                EventKind::Requeued => self.add_to_stock(0, 1)?,
                EventKind::Claimed | EventKind::Started | EventKind::Progress => self.may_work()?,
                // New jobs are checked before they are made.
                EventKind::Created | EventKind::Imported => {}
                EventKind::Succeeded
                | EventKind::Failed
                | EventKind::RetryScheduled
                | EventKind::Released
                | EventKind::CancelRequested
                | EventKind::Canceled
                | EventKind::DeadLettered
                | EventKind::Erased
                | EventKind::Lost => {}
                EventKind::Edited => {
                    let growth = event.edit.as_ref().map_or(0, |edit| edit.payload_growth().max(0));
                    self.add_to_stock(0, event.weight() as u64 + growth.unsigned_abs())?;
                }
            }
        }
        Ok(())
    }

    fn jobs_kept(&self) -> u64 {
        self.head.stock.jobs.max(0).unsigned_abs()
    }

    fn bytes_kept(&self) -> u64 {
        self.head.stock.bytes.max(0).unsigned_abs()
    }
}

fn with_a_quarter(most: u64) -> u64 {
    most.saturating_add(most / 4)
}
