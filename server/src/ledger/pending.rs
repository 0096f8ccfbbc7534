//! Waiting commands, their answers, and turns of them.

use std::sync::Arc;

use tokio::{sync::oneshot, time::Instant};

use super::{
    LedgerError, Limits,
    claim_call::Undelivered,
    command::{Command, Reply},
};
use crate::{domain::id::OrgId, store::StoreError};

/// The answer to a command.
pub(super) type Answer = Result<Answered, LedgerError>;

/// A reply on its way to its caller.
pub(super) struct Answered {
    pub(super) reply: Reply,
    /// Jobs that a claim took and that are not delivered yet.
    pub(super) undelivered: Option<Undelivered>,
}

/// A waiting command.
pub(super) struct Pending {
    pub(super) command: Command,
    /// Actor of the command's events, as in [`By`](super::command::By).
    pub(super) actor: Option<Arc<str>>,
    pub(super) weight: usize,
    pub(super) since: Instant,
    /// `None`: nobody waits for the answer, and the command is decided all the same.
    pub(super) answer: Option<oneshot::Sender<Answer>>,
}

impl Pending {
    pub(super) fn new(command: Command, actor: Option<Arc<str>>, answer: Option<oneshot::Sender<Answer>>) -> Self {
        Self { weight: command.weight(), command, actor, since: Instant::now(), answer }
    }

    /// True if the command has waited longer than it may.
    pub(super) fn is_late(&self, limits: &Limits) -> bool {
        self.answer.is_some() && self.since.elapsed() > limits.queued_within
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.answer.as_ref().is_some_and(oneshot::Sender::is_closed)
    }
}

/// Counts waiting commands and their bytes.
#[derive(Default)]
pub(super) struct Load {
    pub(super) commands: usize,
    bytes: usize,
    /// The commands among them that nobody waits for. They do not count against bounds.
    unasked: usize,
    unasked_bytes: usize,
}

impl Load {
    pub(super) fn add(&mut self, pending: &Pending) {
        self.commands += 1;
        self.bytes += pending.weight;
        if pending.answer.is_none() {
            self.unasked += 1;
            self.unasked_bytes += pending.weight;
        }
    }

    pub(super) fn remove(&mut self, pending: &Pending) {
        self.commands -= 1;
        self.bytes -= pending.weight;
        if pending.answer.is_none() {
            self.unasked -= 1;
            self.unasked_bytes -= pending.weight;
        }
    }

    /// Commands that somebody waits for, and their bytes.
    pub(super) fn asked(&self) -> (usize, usize) {
        (self.commands - self.unasked, self.bytes - self.unasked_bytes)
    }
}

/// One org's part of a transaction.
pub(super) struct OrgBatch {
    pub(super) org: OrgId,
    pub(super) commands: Vec<Pending>,
    /// Most jobs that its claims get, and most due jobs that it changes, while other orgs wait for their turns.
    pub(super) most: Option<usize>,
}

/// The batches of one transaction.
pub(super) type Turn = Vec<OrgBatch>;

/// A turn under way.
pub(super) struct Begun {
    pub(super) turn: Turn,
    /// When it began, if it is shared.
    pub(super) shared: Option<Instant>,
}

/// True if the turn has one command, or none.
pub(super) fn is_single(turn: &Turn) -> bool {
    turn.iter().map(|batch| batch.commands.len()).sum::<usize>() <= 1
}

/// Splits a turn into its orgs, or the batch of a single org into its commands.
pub(super) fn parts(turn: Turn) -> Vec<Turn> {
    let is_shared = turn.len() > 1;
    let part = |OrgBatch { org, commands, most }| {
        if is_shared {
            return vec![vec![OrgBatch { org, commands, most }]];
        }
        commands.into_iter().map(|pending| vec![OrgBatch { org, commands: vec![pending], most }]).collect()
    };
    turn.into_iter().flat_map(part).collect()
}

/// Answers every command of a turn with an error. True if the database did not answer.
pub(super) fn refuse(turn: Turn, error: StoreError) -> bool {
    for batch in &turn {
        tracing::warn!(org_id = %batch.org, commands = batch.commands.len(), %error, "a batch failed");
    }
    let is_outage = match &error {
        StoreError::Unavailable(_) | StoreError::OutcomeUnknown(_) => true,
        StoreError::Conflict(_) | StoreError::Refused(_) | StoreError::Full(_) | StoreError::Unusable(_) => false,
    };
    let error = LedgerError::from(error);
    for answer in turn.into_iter().flat_map(|batch| batch.commands).filter_map(|pending| pending.answer) {
        let _ = answer.send(Err(error.clone()));
    }
    is_outage
}
