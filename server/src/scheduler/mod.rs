//! Runs the tasks of connections and their calls. The runtime's own queue is first in, first out, whosever the tasks are: who
//! makes ten thousand of them ready at once delays every step of everybody else's calls. Here the tasks of an org, or of an
//! address that has not told who it is, wait in a line of their own, and the line that has used the least processor time is
//! next. So a step of an org that calls little waits for the step that is under way, and for nothing else.
//!
//! A few tasks of the runtime, as many as it has threads, run these tasks: each for a short while, and then the runtime's other
//! tasks (the writers, timers, what is received from sockets) have their turn.

mod run_queue;

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    iter,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
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

use self::run_queue::{FairQueue, OfOne};
use crate::{domain::id::OrgId, shares::Whose};

/// How long tasks run before the runtime's others have their turn.
const SLICE: Duration = Duration::from_micros(100);
/// A step that seems to take longer may have been interrupted by the system: then the thread's own time counts.
const MAY_BE_INTERRUPTED: Duration = Duration::from_micros(200);

type ReadyTask = Runnable<Arc<Owner>>;

thread_local! {
    /// Whose task runs on this thread.
    static CURRENT: RefCell<Option<Arc<Owner>>> = const { RefCell::new(None) };
}

/// Whose a task is.
pub(crate) struct Owner {
    scheduler: Arc<Scheduler>,
    whose: Mutex<Whose>,
    connection: u64,
}

impl Owner {
    /// True if its caller is known: the task is an org's.
    pub(crate) fn is_known(&self) -> bool {
        matches!(*self.whose.lock(), Whose::Org(_))
    }

    /// From now on counts the task as this org's, and those that it starts.
    pub(crate) fn is_of(&self, org: OrgId) {
        *self.whose.lock() = Whose::Org(org);
    }

    /// Starts a task of the same connection, at first of the same org.
    fn spawn<F>(&self, future: F) -> Task<F::Output, Arc<Self>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let (scheduler, connection) = (Arc::clone(&self.scheduler), self.connection);
        let owner = Arc::new(Self { scheduler, whose: Mutex::new(*self.whose.lock()), connection });
        owner.run(|_| future)
    }

    fn run<F>(self: Arc<Self>, future: impl FnOnce(&Arc<Self>) -> F) -> Task<F::Output, Arc<Self>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let schedule = |task: ReadyTask| Arc::clone(&task.metadata().scheduler).schedule(task);
        // A panic ends the task, and is passed to whoever awaits it.
        let (task, handle) = Builder::new().propagate_panic(true).metadata(self).spawn(future, schedule);
        task.schedule();
        handle
    }
}

/// Counts the task that runs now as this org's from now on.
pub(crate) fn now_runs_for(org: OrgId) {
    CURRENT.with_borrow(|owner| {
        if let Some(owner) = owner {
            owner.is_of(org);
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

/// See the module's comment.
pub(crate) struct Scheduler {
    state: Mutex<State>,
    connections: AtomicU64,
}

struct State {
    /// The tasks that are ready, and since when.
    ready: FairQueue<Whose, OfOne<(Instant, ReadyTask)>>,
    /// How many tasks are ready.
    n: usize,
    /// How long orgs' tasks were ready before they were run, all together, and their number; since this was last asked.
    waited: (Duration, u32),
    /// Those who run tasks and have none: they wait to be woken.
    idle: Vec<Option<Waker>>,
    is_closed: bool,
}

/// Those who run a scheduler's tasks. Dropping it ends all tasks.
pub(crate) struct Runners {
    scheduler: Arc<Scheduler>,
    _runners: JoinSet<()>,
}

impl Scheduler {
    /// Runs tasks on the runtime in which this is called.
    pub(crate) fn start() -> (Arc<Self>, Runners) {
        let threads = Handle::current().metrics().num_workers();
        let idle = vec![None; threads];
        let state = Mutex::new(State {
            ready: FairQueue::default(),
            n: 0,
            waited: (Duration::ZERO, 0),
            idle,
            is_closed: false,
        });
        let scheduler = Arc::new(Self { state, connections: AtomicU64::new(0) });
        let mut runners = JoinSet::new();
        for n in 0..threads {
            let scheduler = Arc::clone(&scheduler);
            runners.spawn(async move {
                loop {
                    poll_fn(|context| scheduler.run_slice(n, context)).await;
                    yield_now().await;
                }
            });
        }
        let runners = Runners { scheduler: Arc::clone(&scheduler), _runners: runners };
        (scheduler, runners)
    }

    /// Starts the task of a new connection. Dropping what it returns ends the task.
    pub(crate) fn spawn_connection<F>(
        self: &Arc<Self>,
        whose: Whose,
        connection: impl FnOnce(Arc<Owner>) -> F,
    ) -> Task<(), Arc<Owner>>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        let owner = Arc::new(Owner { scheduler: Arc::clone(self), whose: Mutex::new(whose), connection: number });
        owner.run(|owner| connection(Arc::clone(owner)))
    }

    /// How long orgs' tasks waited for a thread on average, since the last call.
    pub(crate) fn mean_wait(&self) -> Duration {
        let (waited, tasks) = std::mem::take(&mut self.state.lock().waited);
        waited / tasks.max(1)
    }

    /// Queues a task that was woken.
    fn schedule(self: Arc<Self>, task: ReadyTask) {
        let (whose, connection) = (*task.metadata().whose.lock(), task.metadata().connection);
        // Whoever runs a task here goes on with the one that it wakes.
        let is_from_here =
            CURRENT.with_borrow(|owner| owner.as_ref().is_some_and(|owner| Arc::ptr_eq(&owner.scheduler, &self)));
        let now = Instant::now();
        let wakes = {
            let mut state = self.state.lock();
            if state.is_closed {
                drop(state);
                return drop(task);
            }
            state.ready.push(whose, connection, (now, task));
            state.n += 1;
            if is_from_here && state.n == 1 { None } else { state.an_idle_one() }
        };
        if let Some(waker) = wakes {
            waker.wake();
        }
    }

    /// Runs tasks for a while. Pending once there are none.
    fn run_slice(&self, runner: usize, context: &Context<'_>) -> Poll<()> {
        let mut meter = Meter::start();
        let mut used = None;
        loop {
            let mut state = self.state.lock();
            if let Some((whose, connection, took)) = used.take() {
                state.ready.charge(whose, connection, took);
            }
            if meter.is_over() {
                let wakes = (state.n > 0).then(|| state.an_idle_one()).flatten();
                drop(state);
                if let Some(waker) = wakes {
                    waker.wake();
                }
                return Poll::Ready(());
            }
            let task = state.pop(meter.lap);
            state.idle[runner] = task.is_none().then(|| context.waker().clone());
            drop(state);
            let Some(task) = task else { return Poll::Pending };
            let owner = Arc::clone(task.metadata());
            CURRENT.set(Some(Arc::clone(&owner)));
            task.run();
            CURRENT.set(None);
            used = Some((*owner.whose.lock(), owner.connection, meter.lap()));
        }
    }
}

impl State {
    fn pop(&mut self, now: Instant) -> Option<ReadyTask> {
        let (since, task) = self.ready.pop()?;
        self.n -= 1;
        if task.metadata().is_known() {
            let (waited, tasks) = &mut self.waited;
            *waited += now - since;
            *tasks = tasks.saturating_add(1);
        }
        Some(task)
    }

    fn an_idle_one(&mut self) -> Option<Waker> {
        self.idle.iter_mut().find_map(Option::take)
    }
}

impl Drop for Runners {
    fn drop(&mut self) {
        let tasks = {
            let mut state = self.scheduler.state.lock();
            state.is_closed = true;
            iter::from_fn(|| state.ready.pop()).collect::<Vec<_>>()
        };
        // What they drop may wake others, which are then dropped as well.
        drop(tasks);
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

#[cfg(test)]
mod tests {
    use std::{
        net::{IpAddr, Ipv4Addr},
        sync::atomic::AtomicUsize,
    };

    use tokio::{sync::oneshot, time::timeout};
    use uuid::Uuid;

    use super::*;

    const STRANGER: Whose = Whose::Address(IpAddr::V4(Ipv4Addr::LOCALHOST));
    const PATIENCE: Duration = Duration::from_secs(20);

    fn org(n: u128) -> OrgId {
        OrgId(Uuid::from_u128(n))
    }

    /// Goes on as often as this.
    async fn steps(n: usize, mut step: impl FnMut()) {
        for _ in 0..n {
            step();
            let mut has_waited = false;
            poll_fn(|context| {
                context.waker().wake_by_ref();
                if std::mem::replace(&mut has_waited, true) { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
        }
    }

    #[tokio::test]
    async fn a_task_waits_for_one_step_of_another_orgs_flood_and_not_for_all() {
        let (scheduler, _runners) = Scheduler::start();
        let done = Arc::new(AtomicUsize::new(0));
        let busy = || {
            let since = Instant::now();
            while since.elapsed() < SLICE / 2 {}
        };
        let flood = scheduler.spawn_connection(Whose::Org(org(1)), |_| {
            let done = Arc::clone(&done);
            async move {
                for _ in 0..1_000 {
                    let done = Arc::clone(&done);
                    spawn(steps(10, move || {
                        busy();
                        done.fetch_add(1, Ordering::Relaxed);
                    }));
                }
            }
        });
        flood.await;
        let (tell, told) = oneshot::channel();
        let told_at = Arc::clone(&done);
        // It begins as a stranger's.
        let other = scheduler.spawn_connection(STRANGER, |_| async move {
            now_runs_for(org(2));
            let before = told_at.load(Ordering::Relaxed);
            steps(100, || {}).await;
            let _ = tell.send(told_at.load(Ordering::Relaxed) - before);
        });
        other.await;
        let between = told.await.unwrap();
        assert!(between < 1_000, "{between} of 10,000 steps came between");
        assert!(done.load(Ordering::Relaxed) < 10_000);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_panic_ends_its_task_alone() {
        let (scheduler, _runners) = Scheduler::start();
        for _ in 0..10 {
            let ended = scheduler.spawn_connection(STRANGER, |_| async { panic!("a defect") });
            assert!(tokio::spawn(ended).await.unwrap_err().is_panic());
        }
        timeout(PATIENCE, scheduler.spawn_connection(STRANGER, |_| steps(1_000, || {}))).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn tasks_end_with_their_connection_or_the_scheduler() {
        let (scheduler, runners) = Scheduler::start();
        let held = |held: &Arc<()>, scheduler: &Arc<Scheduler>, wakes: oneshot::Receiver<()>| {
            let held = Arc::clone(held);
            scheduler.spawn_connection(STRANGER, |_| async move {
                let _ = wakes.await;
                drop(held);
                std::future::pending().await
            })
        };
        let (of_one, of_other) = (Arc::new(()), Arc::new(()));
        let (_never, wakes) = oneshot::channel();
        let task = held(&of_one, &scheduler, wakes);
        let (wake, wakes) = oneshot::channel();
        held(&of_other, &scheduler, wakes).detach();
        drop(task);
        let is_dropped = async |held: &Arc<()>| {
            while Arc::strong_count(held) > 1 {
                yield_now().await
            }
        };
        timeout(PATIENCE, is_dropped(&of_one)).await.unwrap();
        assert_eq!(Arc::strong_count(&of_other), 2);
        // One that nothing runs any more is dropped when it is woken.
        drop(runners);
        wake.send(()).unwrap();
        timeout(PATIENCE, is_dropped(&of_other)).await.unwrap();
    }
}
