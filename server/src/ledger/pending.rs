//! Commands that wait, what their callers are told, and turns of them.

use std::sync::Arc;

use tokio::{sync::oneshot, time::Instant};

use super::{
    LedgerError, Limits,
    claim::Undelivered,
    command::{Command, Reply},
};
use crate::{domain::id::OrgId, store::StoreError};

/// What the caller of a command is told.
pub(super) type Answer = Result<Answered, LedgerError>;

/// A reply on its way to its caller.
pub(super) struct Answered {
    pub(super) reply: Reply,
    /// What a claim took, until somebody takes delivery of it.
    pub(super) undelivered: Option<Undelivered>,
}

/// A command and who waits for its answer.
pub(super) struct Pending {
    pub(super) command: Command,
    /// See [`By`].
    pub(super) actor: Option<Arc<str>>,
    pub(super) weight: usize,
    pub(super) since: Instant,
    /// `None`: nobody waits for it, and it is decided all the same.
    pub(super) answer: Option<oneshot::Sender<Answer>>,
}

impl Pending {
    pub(super) fn new(command: Command, actor: Option<Arc<str>>, answer: Option<oneshot::Sender<Answer>>) -> Self {
        Self { weight: command.weight(), command, actor, since: Instant::now(), answer }
    }

    /// True of one that has waited longer than it may.
    pub(super) fn is_late(&self, limits: &Limits) -> bool {
        self.answer.is_some() && self.since.elapsed() > limits.queued_within
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.answer.as_ref().is_some_and(oneshot::Sender::is_closed)
    }
}

/// Commands that wait, and what they take in bytes.
#[derive(Default)]
pub(super) struct Load {
    pub(super) commands: usize,
    bytes: usize,
    /// Of these, what nobody waits for: it keeps nobody's out.
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

    /// How many somebody waits for, and their bytes.
    pub(super) fn asked(&self) -> (usize, usize) {
        (self.commands - self.unasked, self.bytes - self.unasked_bytes)
    }
}

/// One org's share of a transaction.
pub(super) struct OrgBatch {
    pub(super) org: OrgId,
    pub(super) commands: Vec<Pending>,
    /// Jobs that it may hand out, and as many that it may change because they are due, if others are to have their turns soon.
    pub(super) most: Option<usize>,
}

/// A transaction's worth of work.
pub(super) type Turn = Vec<OrgBatch>;

/// A turn that is under way.
pub(super) struct Begun {
    pub(super) turn: Turn,
    /// When it began, if others may share it.
    pub(super) shared: Option<Instant>,
}

/// True of a turn of one command.
pub(super) fn is_single(turn: &Turn) -> bool {
    turn.iter().map(|batch| batch.commands.len()).sum::<usize>() <= 1
}

/// The orgs of a turn one by one, or the commands of its only org.
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

/// Answers everyone in a turn with an error. True if it is that the database did not answer.
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
