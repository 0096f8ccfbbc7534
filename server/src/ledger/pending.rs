//! Waiting commands, and turns of them.

use std::sync::Arc;

use tokio::time::Instant;

use super::{LedgerError, Limits, submission::Submission};
use crate::{domain::id::OrgId, store::StoreError};

/// A waiting command.
pub(super) struct Pending {
    pub(super) command: Submission,
    /// Actor of the command's events, as in [`Author`](super::command::Author).
    pub(super) actor: Option<Arc<str>>,
    pub(super) weight: usize,
    pub(super) since: Instant,
}

impl Pending {
    pub(super) fn new(command: Submission, actor: Option<Arc<str>>) -> Self {
        Self { weight: command.weight(), command, actor, since: Instant::now() }
    }

    /// True if the command has waited longer than it may.
    pub(super) fn is_late(&self, limits: &Limits) -> bool {
        self.command.is_awaited() && self.since.elapsed() > limits.queued_within
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
        if !pending.command.is_awaited() {
            self.unasked += 1;
            self.unasked_bytes += pending.weight;
        }
    }

    pub(super) fn remove(&mut self, pending: &Pending) {
        self.commands -= 1;
        self.bytes -= pending.weight;
        if !pending.command.is_awaited() {
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
    for pending in turn.into_iter().flat_map(|batch| batch.commands) {
        pending.command.refuse(error.clone());
    }
    is_outage
}
