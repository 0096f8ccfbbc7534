//! What an org may have, and what is refused to one that has as much.
//!
//! An org with all the bytes that it may have gets no new jobs and brings none back. What its workers do goes on in a quarter more. Beyond that
//! nothing begins and no progress is taken: jobs still end, are canceled, given back and removed, each of which a job can do but once.

use std::borrow::Cow;

use super::{
    super::{LedgerError, Limits, Quantity},
    Log,
};
use crate::domain::{
    event::EventKind,
    transition::{Command, Heartbeat, News, Transition},
};

/// What one org may have.
#[derive(Debug, Clone, Copy)]
pub(in crate::ledger) struct Quotas {
    /// Distinct types of its jobs.
    pub(in crate::ledger) types: usize,
    /// Jobs, those that have ended among them.
    pub(in crate::ledger) jobs: u64,
    /// What they and their events take, about, in bytes.
    pub(in crate::ledger) bytes: u64,
    /// The same while the disk is nearly full: its part of what is left.
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
    /// Refuses so many more jobs, with so many bytes, to an org that may not have them.
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

    /// Refuses what begins, or tells of progress, to an org that has a quarter more than it may.
    pub(super) fn may_work(&self) -> Result<(), LedgerError> {
        let most = self.quotas.bytes;
        if self.bytes_kept() <= with_a_quarter(most) {
            return Ok(());
        }
        Err(LedgerError::QuotaExceeded { quantity: Quantity::Bytes, limit: most })
    }

    /// What a command comes to in an org that has a quarter more than it may: a heartbeat extends its lease and tells nothing.
    pub(super) fn within_quota<'a>(&self, command: &'a Command) -> Cow<'a, Command> {
        match command {
            Command::Heartbeat(heartbeat) if self.may_work().is_err() => {
                Cow::Owned(Command::Heartbeat(Heartbeat { news: News::default(), ..heartbeat.clone() }))
            }
            _ => Cow::Borrowed(command),
        }
    }

    /// Refuses what a command would add to the log of an org that may not have it, whichever command it is.
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
                | EventKind::Lost => {}
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
