//! Reads of one kind, in which orgs take turns. One org has a bound over all kinds, too.

use std::{future::Future, sync::Arc, time::Duration};

use tokio::time::timeout;

use super::{
    LedgerError,
    org_reads::{OrgRead, OrgReads, ReadKind},
};
use crate::{
    domain::{
        id::{JobId, OrgId},
        job::JobContents,
    },
    store::{JobPage, ListQuery, Store, StoreError},
    turns::{Turn, Turns},
};

/// Reads from a store, with bounded concurrency.
pub(super) struct Reader {
    store: Arc<dyn Store>,
    kind: ReadKind,
    org_reads: Arc<OrgReads>,
    turns: Arc<Turns<OrgId>>,
    /// How long a read waits for its turn.
    patience: Duration,
}

impl Reader {
    /// Reads of a kind, `at_a_time` over all orgs.
    pub(super) fn new(
        store: Arc<dyn Store>,
        kind: ReadKind,
        at_a_time: usize,
        org_reads: Arc<OrgReads>,
        patience: Duration,
    ) -> Arc<Self> {
        Arc::new(Self { store, kind, org_reads, turns: Turns::new(at_a_time), patience })
    }

    /// Takes a turn for an org.
    pub(super) async fn begin(&self, org: OrgId) -> Result<ReadTurn, LedgerError> {
        match timeout(self.patience, self.take(org)).await {
            Ok(turn) => Ok(turn),
            Err(_) => {
                // Either too many reads wait, or the ones under way do not end.
                let is_moving = self.turns.has_ended_one_within(self.patience);
                Err(if is_moving { LedgerError::Overloaded } else { LedgerError::Unavailable })
            }
        }
    }

    /// Takes a turn however long it takes, for callers that would only try again.
    pub(super) async fn begin_patiently(&self, org: OrgId) -> ReadTurn {
        self.take(org).await
    }

    async fn take(&self, org: OrgId) -> ReadTurn {
        // The org's own bound comes first: an org that waits for it keeps no turn from others.
        let mut of_org = self.org_reads.take(org, self.kind).await;
        let turn = self.turns.take(org).await;
        of_org.begin();
        ReadTurn { store: Arc::clone(&self.store), turns: Arc::new((turn, of_org)) }
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

/// A turn to read. It ends when it is dropped and its reads have ended. Callers keep it until their answer is made, so that no
/// more answers are in the making than there are turns.
#[derive(Clone)]
pub struct ReadTurn {
    store: Arc<dyn Store>,
    /// One among the orgs, and one among the org's own reads.
    turns: Arc<(Turn<OrgId>, OrgRead)>,
}

impl ReadTurn {
    /// Lists jobs.
    ///
    /// # Errors
    ///
    /// An error of the database.
    pub async fn list(&self, org: OrgId, query: &ListQuery) -> Result<JobPage, LedgerError> {
        let query = query.clone();
        self.read(move |store| async move { store.list(org, &query).await }).await
    }

    /// Reads the payloads and results of some jobs, in no order, without jobs that don't exist.
    ///
    /// # Errors
    ///
    /// An error of the database.
    pub async fn contents(&self, org: OrgId, ids: Vec<JobId>) -> Result<Vec<(JobId, JobContents)>, LedgerError> {
        self.read(move |store| async move { store.contents(org, &ids).await }).await
    }

    /// Reads. The read runs to its end and keeps the turn even if its caller has gone, so that calls that are given up at once
    /// take no more of the database than others.
    pub(super) async fn read<T, F>(&self, read: impl FnOnce(Arc<dyn Store>) -> F) -> Result<T, LedgerError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let (read, turns) = (read(Arc::clone(&self.store)), Arc::clone(&self.turns));
        let done = tokio::spawn(async move {
            let _turns = turns;
            read.await
        });
        match done.await {
            Ok(found) => Ok(found?),
            // A panic in the read is a defect, and is passed to its caller.
            Err(ended) if ended.is_panic() => std::panic::resume_unwind(ended.into_panic()),
            Err(_) => Err(LedgerError::Unavailable),
        }
    }
}
