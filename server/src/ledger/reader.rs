//! Reads of one kind, of all orgs: each waits for its org's turn.

use std::{future::Future, sync::Arc, time::Duration};

use tokio::time::timeout;

use super::LedgerError;
use crate::{
    domain::{
        id::{JobId, OrgId},
        job::JobContents,
    },
    store::{JobPage, ListQuery, Store, StoreError},
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

    /// A turn of an org to read.
    pub(super) async fn begin(&self, org: OrgId) -> Result<ReadTurn, LedgerError> {
        match timeout(self.patience, self.turns.take(org)).await {
            Ok(turn) => Ok(self.with(turn)),
            Err(_) => {
                // Too many wait, or those that are under way don't end.
                let is_moving = self.turns.has_ended_one_within(self.patience);
                Err(if is_moving { LedgerError::Overloaded } else { LedgerError::Unavailable })
            }
        }
    }

    /// The same, however long its turn takes to come: for one who goes on, and would only come again.
    pub(super) async fn begin_patiently(&self, org: OrgId) -> ReadTurn {
        self.with(self.turns.take(org).await)
    }

    fn with(&self, turn: Turn<OrgId>) -> ReadTurn {
        ReadTurn { store: Arc::clone(&self.store), turn: Arc::new(turn) }
    }

    /// Reads for an org once it has a turn.
    pub(super) async fn read<T, F>(&self, org: OrgId, read: impl FnOnce(Arc<dyn Store>) -> F) -> Result<T, LedgerError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        self.begin(org).await?.read(read).await
    }
}

/// A turn to read: the next one's comes when it was dropped and its reads have ended. Whoever keeps it until its answer is made has no more
/// answers in the making than there are turns.
#[derive(Clone)]
pub struct ReadTurn {
    store: Arc<dyn Store>,
    turn: Arc<Turn<OrgId>>,
}

impl ReadTurn {
    /// Lists jobs.
    ///
    /// # Errors
    ///
    /// That of the database.
    pub async fn list(&self, org: OrgId, query: &ListQuery) -> Result<JobPage, LedgerError> {
        let query = query.clone();
        self.read(move |store| async move { store.list(org, &query).await }).await
    }

    /// Reads the payloads and results of some jobs, in no order; without those that don't exist.
    ///
    /// # Errors
    ///
    /// That of the database.
    pub async fn contents(&self, org: OrgId, ids: Vec<JobId>) -> Result<Vec<(JobId, JobContents)>, LedgerError> {
        self.read(move |store| async move { store.contents(org, &ids).await }).await
    }

    /// Reads. It goes on to its end, and holds the turn, also when its caller has gone: calls that are given up as soon as they are made take
    /// no more of the database than others.
    pub(super) async fn read<T, F>(&self, read: impl FnOnce(Arc<dyn Store>) -> F) -> Result<T, LedgerError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let (read, turn) = (read(Arc::clone(&self.store)), Arc::clone(&self.turn));
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
