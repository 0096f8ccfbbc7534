//! A command on an org's log together with where its reply goes.
//!
//! Each kind of command has the type of its reply next to it, so that a caller can get no other.

use std::time::Duration;

use tokio::sync::oneshot;

use super::{
    LedgerError,
    claim_call::Claimed,
    command::{
        BulkCommand, Claim, Command, Explain, Explanation, Import, Imported, JobReply, Removed, SweepRequest, Swept,
        TypeReply,
    },
};
use crate::{
    domain::{bulk::BulkOperation, job_type::TypeCommand, transition::GiveBack},
    store::Retention,
};

/// What a caller waits for.
pub(super) type Receiver<R> = oneshot::Receiver<Result<R, LedgerError>>;

/// Where a command's reply goes. Its batch decides the reply, and the caller gets it once the batch has committed.
pub(super) struct ReplyTo<R> {
    decided: Option<Result<R, LedgerError>>,
    caller: oneshot::Sender<Result<R, LedgerError>>,
}

impl<R> ReplyTo<R> {
    pub(super) fn channel() -> (Self, Receiver<R>) {
        let (caller, receiver) = oneshot::channel();
        (Self { decided: None, caller }, receiver)
    }

    /// Sets the reply. A batch that is run again sets it again.
    pub(super) fn decide(&mut self, reply: Result<R, LedgerError>) {
        self.decided = Some(reply);
    }

    /// The reply, if the command was accepted.
    pub(super) fn decided_mut(&mut self) -> Option<&mut R> {
        self.decided.as_mut()?.as_mut().ok()
    }

    /// Sends the reply. If the caller has gone, the reply is dropped here: claimed jobs are then given back.
    fn send(self) {
        if let Some(reply) = self.decided {
            let _ = self.caller.send(reply);
        }
    }

    fn refuse(self, error: LedgerError) {
        let _ = self.caller.send(Err(error));
    }

    fn is_abandoned(&self) -> bool {
        self.caller.is_closed()
    }
}

/// One command on one org's log.
pub(super) enum Submission {
    /// Create a job, or change one.
    Job(Command, ReplyTo<JobReply>),
    /// Change the settings of a type.
    Type(TypeCommand, ReplyTo<TypeReply>),
    /// Start or stop a bulk operation.
    Bulk(BulkCommand, ReplyTo<BulkOperation>),
    /// Import a job of another system.
    Import(Box<Import>, ReplyTo<Imported>),
    /// Explain why a job does not run.
    Explain(Box<Explain>, ReplyTo<Explanation>),
    /// Claim ready jobs.
    Claim(Box<Claim>, ReplyTo<Claimed>),
    /// Give back a claimed job that was not delivered. Nobody waits for a reply.
    GiveBack(GiveBack),
    /// Sweep: handle jobs that are due, as many as a batch may.
    Sweep(SweepRequest, ReplyTo<Swept>),
    /// Re-date jobs that the clock postponed while it was ahead, by this much at most: as many jobs as a batch may.
    Redate(Duration, ReplyTo<Swept>),
    /// Remove finished jobs whose retention is over, as many as a batch may.
    Retain(Retention, ReplyTo<Removed>),
}

impl Submission {
    /// True of commands that keep a running job alive, begin it or end it: reports, heartbeats, cancellations, claims, sweeps.
    /// They go before creates and have reserved room in queues, as most of their calls have (`api/rpc.rs`).
    pub(super) fn is_vital(&self) -> bool {
        match self {
            Self::Job(command, _) => command.is_vital(),
            Self::Claim(..) | Self::GiveBack(_) | Self::Sweep(..) | Self::Redate(..) => true,
            Self::Type(..) | Self::Bulk(..) | Self::Import(..) | Self::Explain(..) | Self::Retain(..) => false,
        }
    }

    /// True of commands that add a job or revive one. They are bounded or refused while the disk is nearly full.
    pub(super) fn grows(&self) -> bool {
        match self {
            Self::Job(command, _) => command.grows(),
            Self::Import(..) => true,
            Self::Type(..)
            | Self::Bulk(..)
            | Self::Explain(..)
            | Self::Claim(..)
            | Self::GiveBack(_)
            | Self::Sweep(..)
            | Self::Redate(..)
            | Self::Retain(..) => false,
        }
    }

    /// True of commands that share no transaction with other orgs, because the database work they cause is not bounded by their
    /// size.
    pub(super) fn goes_alone(&self) -> bool {
        match self {
            Self::Import(..) | Self::Retain(..) => true,
            Self::Job(command, _) => command.is_erasure(),
            Self::Type(..)
            | Self::Bulk(..)
            | Self::Explain(..)
            | Self::Claim(..)
            | Self::GiveBack(_)
            | Self::Sweep(..)
            | Self::Redate(..) => false,
        }
    }

    /// The labels that the command adds. Each is a row of its own.
    pub(super) fn labels(&self) -> usize {
        if let Self::Job(command, _) = self { command.labels() } else { 0 }
    }

    /// Approximate bytes that the command takes in memory. Queues and batches are bounded by this.
    pub(super) fn weight(&self) -> usize {
        const FIXED: usize = 512;
        let texts = match self {
            Self::Job(command, _) => command.text_bytes(),
            Self::Type(command, _) => command.text_bytes(),
            Self::Bulk(command, _) => command.text_bytes(),
            Self::Import(import, _) => import.text_bytes(),
            Self::Explain(explain, _) => explain.claim.types.iter().map(|name| name.len()).sum(),
            Self::Claim(claim, _) => claim.types.iter().map(|name| name.len()).sum(),
            Self::GiveBack(_) | Self::Sweep(..) | Self::Redate(..) | Self::Retain(..) => 0,
        };
        FIXED + texts
    }

    /// The claim that it is or asks about.
    pub(super) fn claim(&self) -> Option<&Claim> {
        match self {
            Self::Claim(claim, _) => Some(claim),
            Self::Explain(explain, _) => Some(&explain.claim),
            _ => None,
        }
    }

    /// True if a caller waits for the reply.
    pub(super) fn is_awaited(&self) -> bool {
        !matches!(self, Self::GiveBack(_))
    }

    /// True if the caller that waited for the reply has gone.
    pub(super) fn is_abandoned(&self) -> bool {
        match self {
            Self::Job(_, reply) => reply.is_abandoned(),
            Self::Type(_, reply) => reply.is_abandoned(),
            Self::Bulk(_, reply) => reply.is_abandoned(),
            Self::Import(_, reply) => reply.is_abandoned(),
            Self::Explain(_, reply) => reply.is_abandoned(),
            Self::Claim(_, reply) => reply.is_abandoned(),
            Self::GiveBack(_) => false,
            Self::Sweep(_, reply) | Self::Redate(_, reply) => reply.is_abandoned(),
            Self::Retain(_, reply) => reply.is_abandoned(),
        }
    }

    /// Sends the reply that was decided.
    pub(super) fn send(self) {
        match self {
            Self::Job(_, reply) => reply.send(),
            Self::Type(_, reply) => reply.send(),
            Self::Bulk(_, reply) => reply.send(),
            Self::Import(_, reply) => reply.send(),
            Self::Explain(_, reply) => reply.send(),
            Self::Claim(_, reply) => reply.send(),
            Self::GiveBack(_) => {}
            Self::Sweep(_, reply) | Self::Redate(_, reply) => reply.send(),
            Self::Retain(_, reply) => reply.send(),
        }
    }

    /// Answers with an error instead of what may have been decided.
    pub(super) fn refuse(self, error: LedgerError) {
        match self {
            Self::Job(_, reply) => reply.refuse(error),
            Self::Type(_, reply) => reply.refuse(error),
            Self::Bulk(_, reply) => reply.refuse(error),
            Self::Import(_, reply) => reply.refuse(error),
            Self::Explain(_, reply) => reply.refuse(error),
            Self::Claim(_, reply) => reply.refuse(error),
            Self::GiveBack(_) => {}
            Self::Sweep(_, reply) | Self::Redate(_, reply) => reply.refuse(error),
            Self::Retain(_, reply) => reply.refuse(error),
        }
    }
}
