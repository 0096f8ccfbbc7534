use tokio::{sync::oneshot, time::timeout};
use uuid::Uuid;

use super::*;

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
    let flood = scheduler.spawn_connection(|owner| {
        owner.is_called_on_by(org(1));
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
    let other = scheduler.spawn_connection(|_| async move {
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
        let ended = scheduler.spawn_connection(|_| async { panic!("a defect") });
        assert!(tokio::spawn(ended).await.unwrap_err().is_panic());
    }
    struct Panics;
    impl Drop for Panics {
        fn drop(&mut self) {
            panic!("another defect");
        }
    }
    let panics = || {
        let panics = Panics;
        async move { drop(panics) }
    };
    assert!(tokio::spawn(scheduler.spawn_connection(|_| panics())).await.unwrap_err().is_panic());
    drop(scheduler.spawn_connection(|_| panics()));
    timeout(PATIENCE, scheduler.spawn_connection(|_| steps(1_000, || {}))).await.unwrap();
}

#[tokio::test]
async fn a_connection_that_several_orgs_call_on_is_none_of_theirs() {
    let (scheduler, _runners) = Scheduler::start();
    let (tell, told) = oneshot::channel();
    let connection = scheduler.spawn_connection(|owner| async move {
        assert!(!owner.is_known());
        for (n, expected) in [(1, org(1)), (1, org(1)), (2, OrgId(NO_ORG)), (1, OrgId(NO_ORG))] {
            owner.is_called_on_by(org(n));
            assert_eq!(owner.line(), Line::Org(expected));
        }
        let _ = tell.send(());
    });
    connection.await;
    told.await.unwrap();
}

/// Takes a lock while it is dropped, as the parts of an HTTP/2 connection do.
struct TakesLock(Arc<Mutex<usize>>);

impl Drop for TakesLock {
    fn drop(&mut self) {
        *self.0.lock() += 1;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_go_on_without_their_server_and_end_where_nobody_holds_a_lock() {
    let (scheduler, runners) = Scheduler::start();
    let ended = Arc::new(Mutex::new(0));
    let waits = |waits: oneshot::Receiver<()>| {
        let takes_lock = TakesLock(Arc::clone(&ended));
        scheduler.spawn_connection(|_| async move {
            let _ = waits.await;
            drop(takes_lock);
        })
    };
    let all_ended = async |n| {
        while *ended.lock() < n {
            yield_now().await
        }
    };
    let (wakes, woken): (Vec<_>, Vec<_>) = (0..3).map(|_| oneshot::channel()).unzip();
    let mut tasks: Vec<_> = woken.into_iter().map(waits).collect();
    drop(tasks.pop());
    timeout(PATIENCE, all_ended(1)).await.unwrap();
    drop(runners);
    for (n, wake) in wakes.into_iter().take(2).enumerate() {
        {
            let _held = ended.lock();
            wake.send(()).unwrap();
        }
        timeout(PATIENCE, all_ended(n + 2)).await.unwrap();
    }
    tasks.into_iter().for_each(Task::detach);
    // The last task was the last but for the runners.
    let over = async {
        while scheduler.state.lock().runners > 0 {
            yield_now().await
        }
    };
    timeout(PATIENCE, over).await.unwrap();
}

#[test]
fn tasks_end_after_their_runtime() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let ended = Arc::new(Mutex::new(0));
    let (wake, task, _runners) = runtime.block_on(async {
        let (scheduler, runners) = Scheduler::start();
        let (wake, woken) = oneshot::channel();
        let takes_lock = TakesLock(Arc::clone(&ended));
        let task = scheduler.spawn_connection(|_| async move {
            let _: Result<(), _> = woken.await;
            drop(takes_lock);
        });
        (wake, task, runners)
    });
    drop(runtime);
    {
        let _held = ended.lock();
        drop((wake, task));
    }
    while *ended.lock() == 0 {
        thread::yield_now();
    }
}
