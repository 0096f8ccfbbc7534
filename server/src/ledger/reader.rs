//! Reads of one kind, of all orgs: each waits for its org's turn.

use std::{future::Future, sync::Arc, time::Duration};

use tokio::time::timeout;

use super::LedgerError;
use crate::{
    domain::id::OrgId,
    store::{Store, StoreError},
    turns::{Turn, Turns},
};

/// Reads from a store, so many at a time.
pub(super) struct Reader {
    store: Arc<dyn Store>,
    turns: Arc<Turns<OrgId>>,
    /// How long one waits for its turn.
    patience: Duration,
}

impl Reader {
    pub(super) fn new(store: Arc<dyn Store>, at_a_time: usize, patience: Duration) -> Arc<Self> {
        Arc::new(Self { store, turns: Turns::new(at_a_time), patience })
    }

    /// Reads for an org once it has a turn. The read goes on to its end, and holds its turn, also when its caller has gone: calls that
    /// are given up as soon as they are made take no more of the database than others.
    pub(super) async fn read<T, F>(&self, org: OrgId, read: impl FnOnce(Arc<dyn Store>) -> F) -> Result<T, LedgerError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let Ok(turn) = timeout(self.patience, self.turns.take(org)).await else {
            // Too many wait, or those that are under way don't end.
            let is_moving = self.turns.has_ended_one_within(self.patience);
            return Err(if is_moving { LedgerError::Overloaded } else { LedgerError::Unavailable });
        };
        self.read_on(turn, read).await
    }

    /// The same, however long its turn takes to come: for one who goes on, and would only come again.
    pub(super) async fn read_patiently<T, F>(
        &self,
        org: OrgId,
        read: impl FnOnce(Arc<dyn Store>) -> F,
    ) -> Result<T, LedgerError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let turn = self.turns.take(org).await;
        self.read_on(turn, read).await
    }

    async fn read_on<T, F>(&self, turn: Turn<OrgId>, read: impl FnOnce(Arc<dyn Store>) -> F) -> Result<T, LedgerError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let read = read(Arc::clone(&self.store));
        let done = tokio::spawn(async move {
            let _turn = turn;
            read.await
        });
        match done.await {
            Ok(found) => Ok(found?),
            // A defect is the call's that came to it.
            Err(ended) if ended.is_panic() => std::panic::resume_unwind(ended.into_panic()),
            Err(_) => Err(LedgerError::Unavailable),
        }
    }
}
