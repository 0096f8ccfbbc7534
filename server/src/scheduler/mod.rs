//! Runs the tasks of connections and their calls. The runtime's own queue is first in, first out, whosever the tasks are: who
//! makes ten thousand of them ready at once delays every step of everybody else's calls. Here the tasks of an org wait in a line
//! of their own, and those of all strangers in another. The line that has used the least processor time is next. So a step of an
//! org that calls little waits for the step that is under way, and for nothing else.
//!
//! A few tasks of the runtime, as many as it has threads, run these tasks: each for a short while, and then the runtime's other
//! tasks (the writers, timers, what is received from sockets) have their turn.

mod contained;
mod run_queue;
#[cfg(test)]
mod tests;

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    iter,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use async_task::{Builder, Runnable, Task};
use hyper::rt::Executor;
use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};
use tokio::{
    runtime::Handle,
    task::{JoinSet, coop::has_budget_remaining, yield_now},
};

use self::{
    contained::Contained,
    run_queue::{FairQueue, OfOne},
};
use crate::domain::{access::NO_ORG, id::OrgId};

/// How long tasks run before the runtime's others have their turn.
const SLICE: Duration = Duration::from_micros(100);
/// A step that seems to take longer may have been interrupted by the system: then the thread's own time counts.
const MAY_BE_INTERRUPTED: Duration = Duration::from_micros(200);

type ReadyTask = Runnable<Arc<Owner>>;

thread_local! {
    /// Whose task runs on this thread.
    static CURRENT: RefCell<Option<Arc<Owner>>> = const { RefCell::new(None) };
}

/// The lines in which tasks wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Line {
    /// Callers that are not known.
    Strangers,
    /// Callers whose credentials are looked up.
    LookUps,
    Org(OrgId),
}

/// Whose a task is.
pub(crate) struct Owner {
    scheduler: Arc<Scheduler>,
    line: Mutex<Line>,
    connection: u64,
}

impl Owner {
    fn new(scheduler: &Arc<Scheduler>, line: Line, connection: u64) -> Arc<Self> {
        scheduler.owners.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self { scheduler: Arc::clone(scheduler), line: Mutex::new(line), connection })
    }

    fn line(&self) -> Line {
        *self.line.lock()
    }

    /// True if its caller is known.
    pub(crate) fn is_known(&self) -> bool {
        matches!(self.line(), Line::Org(_))
    }

    /// Counts a connection as this org's from now on, and the first steps of its calls. One on which several orgs call, as a proxy
    /// has, is none of theirs: nobody's calls wait in the line of who called before.
    pub(crate) fn is_called_on_by(&self, org: OrgId) {
        let mut line = self.line.lock();
        let is_others = matches!(*line, Line::Org(other) if other != org);
        *line = Line::Org(if is_others { OrgId(NO_ORG) } else { org });
    }

    /// Starts a task of the same connection, at first of the same org.
    fn spawn<F>(&self, future: F) -> Task<F::Output, Arc<Self>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        Self::new(&self.scheduler, self.line(), self.connection).run(|_| future)
    }

    fn run<F>(self: Arc<Self>, future: impl FnOnce(&Arc<Self>) -> F) -> Task<F::Output, Arc<Self>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let schedule = |task: ReadyTask| Arc::clone(&task.metadata().scheduler).schedule(task);
        let future = |owner: &Arc<Self>| Contained::new(future(owner));
        // A panic ends the task, and is passed to whoever awaits it.
        let (task, handle) = Builder::new().propagate_panic(true).metadata(self).spawn(future, schedule);
        task.schedule();
        handle
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if self.scheduler.owners.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.scheduler.end_if_closed();
        }
    }
}

/// Counts the task that runs now as this org's from now on.
pub(crate) fn now_runs_for(org: OrgId) {
    now_waits_in(Line::Org(org));
}

/// Counts the task that runs now as one whose caller is looked up. Such tasks have turns at that: if the one that has a turn waited
/// behind all strangers, so would those that wait for the turn.
pub(crate) fn now_looks_up() {
    now_waits_in(Line::LookUps);
}

fn now_waits_in(line: Line) {
    CURRENT.with_borrow(|owner| {
        if let Some(owner) = owner {
            *owner.line.lock() = line;
        }
    });
}

/// Starts a task that is part of the one that runs now.
pub(crate) fn spawn(future: impl Future<Output = ()> + Send + 'static) {
    match CURRENT.with_borrow(Option::clone) {
        Some(owner) => owner.spawn(future).detach(),
        None => drop(tokio::spawn(future)),
    }
}

/// Runs the tasks of a connection's calls as tasks of the connection.
#[derive(Clone)]
pub(crate) struct CallExecutor(pub(crate) Arc<Owner>);

impl<F> Executor<F> for CallExecutor
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn(future).detach();
    }
}

/// Queues the tasks of connections and calls, and runs them in fair order.
pub(crate) struct Scheduler {
    state: Mutex<State>,
    connections: AtomicU64,
    /// Owners of tasks that have not ended.
    owners: AtomicUsize,
}

struct Queued {
    line: Line,
    since: Instant,
    task: ReadyTask,
}

struct State {
    /// The tasks that are ready.
    ready: FairQueue<Line, OfOne<Queued>>,
    /// How many tasks are ready.
    n: usize,
    /// How long orgs' tasks were ready before they were run, all together, and their number; since this was last asked.
    waited: (Duration, u32),
    /// Those who run tasks and have none: they wait to be woken.
    idle: Vec<Option<Waker>>,
    /// How many run tasks. The runtime may end before its tasks do.
    runners: usize,
    is_closed: bool,
}

/// Those who run a scheduler's tasks. Once it is dropped, they end with the last task.
pub(crate) struct Runners {
    scheduler: Arc<Scheduler>,
    runners: JoinSet<()>,
}

impl Runners {
    /// Completes if one of them ends, which is a defect.
    pub(crate) async fn ended(&mut self) {
        self.runners.join_next().await;
    }
}

impl Drop for Runners {
    fn drop(&mut self) {
        self.runners.detach_all();
        self.scheduler.state.lock().is_closed = true;
        self.scheduler.end_if_closed();
    }
}

impl Scheduler {
    /// Runs tasks on the runtime in which this is called.
    pub(crate) fn start() -> (Arc<Self>, Runners) {
        let threads = Handle::current().metrics().num_workers();
        let idle = vec![None; threads];
        let (ready, waited) = (FairQueue::default(), (Duration::ZERO, 0));
        let state = State { ready, n: 0, waited, idle, runners: threads, is_closed: false };
        let (state, connections, owners) = (Mutex::new(state), AtomicU64::new(0), AtomicUsize::new(0));
        let scheduler = Arc::new(Self { state, connections, owners });
        let mut runners = JoinSet::new();
        for n in 0..threads {
            let runner = Runner(Arc::clone(&scheduler));
            runners.spawn(async move {
                let Runner(scheduler) = &runner;
                while poll_fn(|context| scheduler.run_slice(n, context)).await {
                    yield_now().await;
                }
            });
        }
        let runners = Runners { scheduler: Arc::clone(&scheduler), runners };
        (scheduler, runners)
    }

    /// Starts the task of a new connection. Dropping what it returns ends the task.
    pub(crate) fn spawn_connection<F>(
        self: &Arc<Self>,
        connection: impl FnOnce(Arc<Owner>) -> F,
    ) -> Task<(), Arc<Owner>>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        Owner::new(self, Line::Strangers, number).run(|owner| connection(Arc::clone(owner)))
    }

    /// How long orgs' tasks waited for a thread on average, since the last call.
    pub(crate) fn mean_wait(&self) -> Duration {
        let (waited, tasks) = std::mem::take(&mut self.state.lock().waited);
        waited / tasks.max(1)
    }

    /// Wakes the runners if no task is left and there will be none.
    fn end_if_closed(&self) {
        let idle: Vec<_> = {
            let mut state = self.state.lock();
            let idle = state.is_closed.then(|| state.idle.iter_mut().filter_map(Option::take));
            idle.into_iter().flatten().collect()
        };
        idle.into_iter().for_each(Waker::wake);
    }

    /// Drops the tasks that are ready, one by one and without the lock: what one drops may make others ready.
    fn drop_tasks(&self) {
        iter::from_fn(|| self.state.lock().pop(Instant::now())).for_each(drop);
    }

    /// Queues a task that was woken.
    fn schedule(self: Arc<Self>, task: ReadyTask) {
        let (line, connection) = (task.metadata().line(), task.metadata().connection);
        // Whoever runs a task here goes on with the one that it wakes.
        let is_from_here =
            CURRENT.with_borrow(|owner| owner.as_ref().is_some_and(|owner| Arc::ptr_eq(&owner.scheduler, &self)));
        let now = Instant::now();
        let wakes = {
            let mut state = self.state.lock();
            state.ready.push(line, connection, Queued { line, since: now, task });
            state.n += 1;
            if state.runners == 0 {
                drop(state);
                // Who wakes it may hold a lock that the end of the task takes.
                drop(thread::spawn(move || self.drop_tasks()));
                return;
            }
            if is_from_here && state.n == 1 { None } else { state.an_idle_one() }
        };
        if let Some(waker) = wakes {
            waker.wake();
        }
    }

    /// Runs tasks for a while. Pending once there are none; ready with false once there will be none.
    fn run_slice(&self, runner: usize, context: &Context<'_>) -> Poll<bool> {
        let mut meter = Meter::start();
        let mut used = None;
        loop {
            let mut state = self.state.lock();
            if let Some((line, connection, took)) = used.take() {
                state.ready.charge(line, connection, took);
            }
            if meter.is_over() {
                let wakes = (state.n > 0).then(|| state.an_idle_one()).flatten();
                drop(state);
                if let Some(waker) = wakes {
                    waker.wake();
                }
                return Poll::Ready(true);
            }
            let task = state.pop(meter.lap);
            state.idle[runner] = task.is_none().then(|| context.waker().clone());
            let is_closed = state.is_closed;
            drop(state);
            let Some((line, task)) = task else {
                let is_over = is_closed && self.owners.load(Ordering::Acquire) == 0;
                return if is_over { Poll::Ready(false) } else { Poll::Pending };
            };
            let owner = Arc::clone(task.metadata());
            let connection = owner.connection;
            CURRENT.set(Some(owner));
            task.run();
            CURRENT.set(None);
            used = Some((line, connection, meter.lap()));
        }
    }
}

impl State {
    /// Takes the next task, and tells from whose line.
    fn pop(&mut self, now: Instant) -> Option<(Line, ReadyTask)> {
        let Queued { line, since, task } = self.ready.pop()?;
        self.n -= 1;
        if let Line::Org(_) = line {
            let (waited, tasks) = &mut self.waited;
            *waited += now - since;
            *tasks = tasks.saturating_add(1);
        }
        Some((line, task))
    }

    fn an_idle_one(&mut self) -> Option<Waker> {
        self.idle.iter_mut().find_map(Option::take)
    }
}

/// A runner's hold on its scheduler. The last one that ends drops the tasks that are ready.
struct Runner(Arc<Scheduler>);

impl Drop for Runner {
    fn drop(&mut self) {
        let left = {
            let mut state = self.0.state.lock();
            state.runners -= 1;
            state.runners
        };
        if left == 0 {
            self.0.drop_tasks();
        }
    }
}

/// Measures the processor time of each task.
struct Meter {
    began: Instant,
    lap: Instant,
    /// The thread's processor time when the slice began, and what was counted since.
    thread: Duration,
    counted: Duration,
}

impl Meter {
    fn start() -> Self {
        let now = Instant::now();
        Self { began: now, lap: now, thread: thread_time(), counted: Duration::ZERO }
    }

    /// The processor time since the last call.
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        let mut took = now - self.lap;
        if took > MAY_BE_INTERRUPTED {
            took = took.min(thread_time().saturating_sub(self.thread + self.counted));
        }
        self.lap = now;
        self.counted += took;
        took
    }

    fn is_over(&self) -> bool {
        self.lap - self.began >= SLICE || !has_budget_remaining()
    }
}

fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}
