//! Bulk operations: their beginning and end, and their steps, which sweeps take.

use std::sync::Arc;

use uuid::Uuid;

use super::{
    super::{LedgerError, Quantity, command::BulkCommand},
    Log,
};
use crate::{
    domain::{
        bulk::{BulkOperation, BulkOutcome, BulkRequest, BulkStatus},
        id::JobId,
        org_event::OrgChange,
        transition::TransitionError,
    },
    store::BulkStep,
};

/// Jobs that one step acts on. Other commands of the org are decided between two steps.
const STEP: usize = 64;
/// The same while callers of the org wait for its batches.
const STEP_IN_COMPANY: usize = 16;
/// Operations of an org that may be under way. They take turns: the oldest goes first.
const MOST_OPEN: usize = 8;

/// Most jobs of one step in a batch that may change only `most` jobs.
pub(super) fn step(most: Option<usize>, has_company: bool) -> usize {
    let step = if has_company { STEP_IN_COMPANY } else { STEP };
    most.map_or(step, |most| most.clamp(1, step))
}

impl Log {
    pub(super) fn bulk(&mut self, command: &BulkCommand) -> Result<BulkOperation, LedgerError> {
        match command {
            BulkCommand::Start(request) => self.start_bulk(request),
            BulkCommand::Stop(id) => self.stop_bulk(*id),
        }
    }

    fn start_bulk(&mut self, request: &BulkRequest) -> Result<BulkOperation, LedgerError> {
        if let Some(known) = self.operations.get(&request.id) {
            // An erasure that has ended no longer has what it was asked for.
            let is_forgotten = known.request.action.erases() && known.status.is_terminal();
            return if is_forgotten || known.request.digest == request.digest {
                Ok(known.clone())
            } else {
                Err(LedgerError::BulkOperationExists { id: request.id })
            };
        }
        if self.open_operations >= MOST_OPEN {
            return Err(LedgerError::QuotaExceeded { quantity: Quantity::BulkOperations, limit: MOST_OPEN as u64 });
        }
        self.may_work()?;
        self.open_operations += 1;
        let actor = self.by.clone().unwrap_or_default();
        let mut operation = BulkOperation::begin(request.clone(), actor.clone(), self.head.seq, self.now);
        self.append_org(
            OrgChange::BulkStarted {
                id: request.id,
                action: request.action,
                reason: if request.action.erases() { Arc::default() } else { Arc::clone(&request.reason) },
                is_dry_run: request.is_dry_run,
            },
            actor,
        );
        if operation.is_about_nothing() {
            // Jobs with these statuses are none that the action applies to.
            operation.count(0, None, self.now);
            if !operation.status.is_terminal() {
                operation.advance(None, self.now);
            }
            self.has_ended(&operation);
        }
        self.put_operation(operation.clone());
        Ok(operation)
    }

    fn stop_bulk(&mut self, id: Uuid) -> Result<BulkOperation, LedgerError> {
        let mut operation = self.operations.get(&id).cloned().ok_or(LedgerError::BulkOperationNotFound { id })?;
        if !operation.status.is_terminal() {
            operation.end(BulkStatus::Stopped, self.now);
            let actor = self.by.clone().unwrap_or_default();
            self.append_org(ended(&operation), actor);
            self.put_operation(operation.clone());
        }
        Ok(operation)
    }

    /// Takes the next step of the oldest operation under way. True if one is still under way.
    pub(super) fn step_bulk(&mut self) -> bool {
        let Some(BulkStep { operation, jobs, next }) = self.step.take() else { return false };
        let Some(mut operation) = self.operations.get(&operation).cloned() else { return false };
        match operation.status {
            BulkStatus::Counting => operation.count(jobs.len(), next, self.now),
            BulkStatus::Running => {
                self.operation = Some(operation.request.id);
                let cut = self.act(&mut operation, jobs);
                self.operation = None;
                // It is not over before all events are blank.
                let unblanked = (!self.changes.unblanked.is_empty()).then_some(operation.through_seq);
                operation.advance(cut.or(next).or(unblanked), self.now);
            }
            // It was stopped in this batch. There may be others.
            BulkStatus::Succeeded | BulkStatus::Refused | BulkStatus::Stopped => return true,
        }
        if operation.status.is_terminal() {
            self.has_ended(&operation);
        }
        self.put_operation(operation);
        // If this one has ended, the next step finds whether there is another.
        true
    }

    /// Acts on jobs of an operation. Returns the cursor if they are too much for one batch.
    fn act(&mut self, operation: &mut BulkOperation, jobs: Vec<JobId>) -> Option<i64> {
        let filter = operation.filter();
        for id in jobs {
            // This batch may have changed the job since it was read.
            let Some(job) = self.jobs.get(&id).filter(|job| filter.matches(job)) else { continue };
            if operation.request.action.erases() && !self.may_erase(job) {
                return Some(job.created_seq - 1);
            }
            let before = self.head.seq;
            let outcome = match self.apply(id, &operation.command()) {
                Ok(_) if self.head.seq == before => BulkOutcome::Unchanged,
                Ok(_) => BulkOutcome::Changed,
                Err(error) => BulkOutcome::Failed(reason(&error)),
            };
            operation.note(outcome);
        }
        None
    }

    /// Writes to the log that an operation has come to its end.
    fn has_ended(&mut self, operation: &BulkOperation) {
        self.append_org(ended(operation), operation.actor.clone());
    }

    /// Keeps the changed operation, and has the org swept at once if it is under way.
    fn put_operation(&mut self, operation: BulkOperation) {
        if !operation.status.is_terminal() {
            self.wake_at = Some(self.now);
        }
        self.changes.bulk.retain(|known| known.request.id != operation.request.id);
        self.changes.bulk.push(operation.clone());
        self.operations.insert(operation.request.id, operation);
    }
}

fn ended(operation: &BulkOperation) -> OrgChange {
    OrgChange::BulkEnded {
        id: operation.request.id,
        status: operation.status,
        matched: operation.matched,
        changed: operation.changed,
    }
}

/// The reason of the contract for which a job could not be changed.
fn reason(error: &LedgerError) -> &'static str {
    match error {
        LedgerError::Transition(TransitionError::InvalidTransition { .. } | TransitionError::Erased { .. }) => {
            "INVALID_TRANSITION"
        }
        LedgerError::QuotaExceeded { .. } => "QUOTA_EXCEEDED",
        LedgerError::StorageFull => "STORAGE_FULL",
        _ => "INTERNAL",
    }
}
