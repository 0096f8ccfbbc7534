//! Reads of single jobs: those that come while others are on their way gather, and go together. A lone one goes at once.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

use super::LedgerError;
use crate::{
    domain::{
        id::{JobId, OrgId},
        job::JobRecord,
    },
    store::{FoundJob, Store, StoreError},
};

/// Reads that are on their way at a time, at most.
const ON_THE_WAY: usize = 4;
/// Jobs that one of them brings, at most; another begins beside those that are on their way once so many wait.
const TOGETHER: usize = 64;

/// Those who wait for a job, and the reads that are on their way.
pub(super) struct Reads {
    store: Arc<dyn Store>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Wanted>,
    on_the_way: usize,
}

/// A job that somebody waits for.
struct Wanted {
    org: OrgId,
    id: JobId,
    answer: oneshot::Sender<Result<FoundJob, LedgerError>>,
}

impl Reads {
    pub(super) fn new(store: Arc<dyn Store>) -> Arc<Self> {
        Arc::new(Self { store, state: Mutex::default() })
    }

    /// Reads one job; it may be the work of another's call.
    pub(super) async fn job(self: &Arc<Self>, org: OrgId, id: JobId) -> Result<JobRecord, LedgerError> {
        let (answer, answered) = oneshot::channel();
        let may_go = {
            let mut state = self.state();
            state.waiting.push_back(Wanted { org, id, answer });
            let may_go = state.on_the_way == 0 || state.waiting.len() >= TOGETHER && state.on_the_way < ON_THE_WAY;
            state.on_the_way += usize::from(may_go);
            may_go
        };
        if may_go {
            // In a task of its own: others may wait for it when this caller has gone.
            tokio::spawn(OnTheWay { reads: Arc::clone(self), is_counted: true }.read());
        }
        let record = match answered.await.unwrap_or(Err(LedgerError::Unavailable))? {
            FoundJob::Whole(record) => Some(*record),
            FoundJob::Large => self.store.job(org, id).await?,
            FoundJob::Nothing => None,
        };
        record.ok_or(LedgerError::JobNotFound { job: id })
    }

    /// The next that go together. With none left there is, from the same moment on, one read fewer on its way.
    fn take(&self) -> Option<Vec<Wanted>> {
        let mut state = self.state();
        // Whoever has gone need not be read for.
        state.waiting.retain(|wanted| !wanted.answer.is_closed());
        let n = state.waiting.len().min(TOGETHER);
        if n == 0 {
            state.on_the_way -= 1;
            return None;
        }
        Some(state.waiting.drain(..n).collect())
    }

    /// The queue stays whole whatever panics beside it.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A read that is on its way, until it finds nothing more to do; or breaks off.
struct OnTheWay {
    reads: Arc<Reads>,
    is_counted: bool,
}

impl Drop for OnTheWay {
    fn drop(&mut self) {
        if self.is_counted {
            self.reads.state().on_the_way -= 1;
        }
    }
}

impl OnTheWay {
    async fn read(mut self) {
        while let Some(together) = self.reads.take() {
            let names: Vec<_> = together.iter().map(|wanted| (wanted.org, wanted.id)).collect();
            match self.reads.store.jobs(&names).await {
                Ok(found) => {
                    for (wanted, found) in together.into_iter().zip(found) {
                        let _ = wanted.answer.send(Ok(found));
                    }
                }
                // One of them can't be read: only who asked for it shall hear of it.
                Err(error) if together.len() > 1 && !matches!(error, StoreError::Unavailable(_)) => {
                    for wanted in together {
                        let _ = wanted.answer.send(Ok(FoundJob::Large));
                    }
                }
                Err(error) => {
                    let mut told = together;
                    if matches!(error, StoreError::Unavailable(_)) {
                        // Those who wait would hear the same, each after as long a time.
                        told.extend(self.reads.state().waiting.drain(..));
                    }
                    let error = LedgerError::from(error);
                    for wanted in told {
                        let _ = wanted.answer.send(Err(error.clone()));
                    }
                }
            }
        }
        self.is_counted = false;
    }
}
