//! Reads of single jobs. A lone read starts at once. Reads that arrive while others are under way gather, and are read
//! together, orgs in turn. Of a cached job, the database is only asked whether it is unchanged.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::oneshot;

use super::{
    LedgerError,
    org_reads::OrgReads,
    reader::{ReadTurn, Reader},
};
use crate::{
    domain::{
        id::{JobId, OrgId},
        job::JobRecord,
    },
    generations::Generations,
    store::{FoundJob, Store, StoreError},
};

/// Most reads under way at a time.
const ON_THE_WAY: usize = 4;
/// Most jobs in one read. Once this many wait, another read starts beside those under way.
const TOGETHER: usize = 64;

/// Most cached jobs, and most bytes of the texts of one of them.
const REMEMBERED: usize = 4_096;
const REMEMBERED_TEXT: usize = 4 << 10;

/// The waiting callers, and the reads under way.
pub(super) struct ReadCoalescer {
    store: Arc<dyn Store>,
    /// Reads of large jobs take turns here.
    lists: Arc<Reader>,
    org_reads: Arc<OrgReads>,
    state: Mutex<ReadQueue>,
    read_before: Mutex<Generations<(OrgId, JobId), Arc<JobRecord>>>,
}

#[derive(Default)]
struct ReadQueue {
    /// By org; no entry is empty.
    waiting: HashMap<OrgId, VecDeque<Wanted>>,
    /// The orgs in `waiting`, each once; the first is next.
    orgs: VecDeque<OrgId>,
    in_all: usize,
    on_the_way: usize,
}

impl ReadQueue {
    fn push(&mut self, wanted: Wanted) {
        let of_org = self.waiting.entry(wanted.org).or_insert_with_key(|org| {
            self.orgs.push_back(*org);
            VecDeque::new()
        });
        of_org.push_back(wanted);
        self.in_all += 1;
    }

    /// The next wanted job, of the org whose turn it is.
    fn pop(&mut self) -> Option<Wanted> {
        let org = self.orgs.pop_front()?;
        let of_org = self.waiting.get_mut(&org)?;
        let wanted = of_org.pop_front();
        if of_org.is_empty() {
            self.waiting.remove(&org);
        } else {
            self.orgs.push_back(org);
        }
        self.in_all -= 1;
        wanted
    }
}

/// A job that a caller waits for.
struct Wanted {
    org: OrgId,
    id: JobId,
    answer: oneshot::Sender<Result<FoundJob, LedgerError>>,
}

impl ReadCoalescer {
    pub(super) fn new(store: Arc<dyn Store>, lists: Arc<Reader>, org_reads: Arc<OrgReads>) -> Arc<Self> {
        let read_before = Mutex::new(Generations::new(REMEMBERED));
        Arc::new(Self { store, lists, org_reads, state: Mutex::default(), read_before })
    }

    /// Reads one job, possibly in a read that another call started. A large job comes with the read turn it took.
    pub(super) async fn job(
        self: &Arc<Self>,
        org: OrgId,
        id: JobId,
    ) -> Result<(Arc<JobRecord>, Option<ReadTurn>), LedgerError> {
        self.org_reads.called(org);
        let (answer, answered) = oneshot::channel();
        let may_go = {
            let mut state = self.state();
            state.push(Wanted { org, id, answer });
            let may_go = state.on_the_way == 0 || state.in_all >= TOGETHER && state.on_the_way < ON_THE_WAY;
            state.on_the_way += usize::from(may_go);
            may_go
        };
        if may_go {
            // In its own task, since other callers may still wait for it when this one has gone.
            tokio::spawn(OnTheWay { reads: Arc::clone(self), is_counted: true }.read());
        }
        let (record, turn) = match answered.await.unwrap_or(Err(LedgerError::Unavailable))? {
            FoundJob::Whole(record) => (Some(record), None),
            FoundJob::Large => {
                let turn = self.lists.begin(org).await?;
                let record = turn.read(move |store| async move { store.job(org, id).await }).await?;
                (record.map(Arc::new), Some(turn))
            }
            FoundJob::Nothing => (None, None),
        };
        Ok((record.ok_or(LedgerError::JobNotFound { job: id })?, turn))
    }

    /// Drops a job that was erased. Nobody gets what is cached of it, but it need not stay in memory.
    pub(super) fn forget(&self, org: OrgId, id: JobId) {
        self.read_before().remove(&(org, id));
    }

    /// Finds the wanted jobs, in order.
    async fn find(&self, wanted: &[Wanted]) -> Result<Vec<FoundJob>, StoreError> {
        // Several callers may wait for the same job.
        let names: BTreeSet<_> = wanted.iter().map(|wanted| (wanted.org, wanted.id)).collect();
        let names: Vec<_> = names.into_iter().collect();
        let found = self.find_each(&names).await?;
        let place = |wanted: &Wanted| names.binary_search(&(wanted.org, wanted.id)).expect("it is one of them");
        Ok(wanted.iter().map(|wanted| found[place(wanted)].clone()).collect())
    }

    /// Finds these jobs, which are distinct.
    async fn find_each(&self, names: &[(OrgId, JobId)]) -> Result<Vec<FoundJob>, StoreError> {
        let mut found = vec![FoundJob::Nothing; names.len()];
        let known: Vec<_> = {
            let mut read_before = self.read_before();
            names.iter().enumerate().filter_map(|(n, name)| Some((n, Arc::clone(read_before.get(name)?)))).collect()
        };
        let mut rest: BTreeSet<_> = (0..names.len()).collect();
        if !known.is_empty() {
            let jobs: Vec<_> = known.iter().map(|(_, record)| &record.job).collect();
            let unchanged = self.store.unchanged(&jobs).await?;
            for ((n, record), _) in known.into_iter().zip(unchanged).filter(|(_, is_unchanged)| *is_unchanged) {
                rest.remove(&n);
                found[n] = FoundJob::Whole(record);
            }
        }
        if !rest.is_empty() {
            let rest: Vec<_> = rest.into_iter().collect();
            let read = self.store.jobs(&rest.iter().map(|n| names[*n]).collect::<Vec<_>>()).await?;
            let mut read_before = self.read_before();
            for (n, job) in rest.into_iter().zip(read) {
                match &job {
                    FoundJob::Whole(record) if record.job.text_bytes() + record.contents.len() <= REMEMBERED_TEXT => {
                        read_before.insert(names[n], Arc::clone(record));
                    }
                    _ => read_before.remove(&names[n]),
                }
                found[n] = job;
            }
        }
        Ok(found)
    }

    fn read_before(&self) -> MutexGuard<'_, Generations<(OrgId, JobId), Arc<JobRecord>>> {
        self.read_before.lock()
    }

    /// The next jobs to read together. If there are none, lowers the count of reads under the same lock.
    fn take(&self) -> Option<Vec<Wanted>> {
        let mut state = self.state();
        let state = &mut *state;
        // Skips callers that have gone.
        let together: Vec<_> =
            std::iter::from_fn(|| state.pop()).filter(|wanted| !wanted.answer.is_closed()).take(TOGETHER).collect();
        if together.is_empty() {
            state.on_the_way -= 1;
            return None;
        }
        Some(together)
    }

    fn state(&self) -> MutexGuard<'_, ReadQueue> {
        self.state.lock()
    }
}

/// A read under way, until no job is left to read or its task is dropped.
struct OnTheWay {
    reads: Arc<ReadCoalescer>,
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
            match self.reads.find(&together).await {
                Ok(found) => {
                    for (wanted, found) in together.into_iter().zip(found) {
                        let _ = wanted.answer.send(Ok(found));
                    }
                }
                // One of the jobs can't be read. Each caller reads its job alone, so that only one of them fails.
                Err(error) if together.len() > 1 && !matches!(error, StoreError::Unavailable(_)) => {
                    for wanted in together {
                        let _ = wanted.answer.send(Ok(FoundJob::Large));
                    }
                }
                Err(error) => {
                    let mut told = together;
                    if matches!(error, StoreError::Unavailable(_)) {
                        // Other waiting callers would get the same error, each after as long a wait.
                        let mut state = self.reads.state();
                        told.extend(std::iter::from_fn(|| state.pop()));
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
