//! A fixed set of threads that run one parallel region at a time.
//!
//! Invariant: [`Pool::run`] returns only after every task index was either run or abandoned because another task
//! panicked; nothing borrowed by the region outlives it. The calling thread takes tasks too, so a pool of one thread
//! spawns nothing. Which thread runs which task is left to chance; no result may depend on it.
//!
//! Surprise: workers spin for a few microseconds before they sleep, since a decode step is a hundred regions of a few
//! microseconds each, and then really sleep, since an idle pod must not burn its CPU quota.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use thiserror::Error;

/// A task of a region panicked. The region's results are unspecified; the pool itself stays usable.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("a worker thread panicked: {0}")]
pub struct WorkerPanic(pub String);

/// Why a pool could not be made.
#[derive(Debug, Error)]
#[error("cannot start worker thread {index} of {count}")]
pub struct SpawnError {
    index: usize,
    count: usize,
    #[source]
    source: std::io::Error,
}

thread_local! {
    /// See [`current_thread`].
    static THREAD: Cell<usize> = const { Cell::new(0) };
}

/// The thread of a task among those of its pool, from 0 on, which is the caller of [`Pool::run`].
pub(crate) fn current_thread() -> usize {
    THREAD.get()
}

/// How often a waiting thread looks before it sleeps: about 10 µs.
const SPINS: u32 = 2_000;

/// A borrowed region with its lifetime erased; see the safety notes where it is made and used.
#[derive(Clone, Copy)]
struct Region {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: the pointee is `Sync`, and `Pool::run` keeps it alive until no worker can reach it any more.
#[allow(unsafe_code)]
unsafe impl Send for Region {}

#[derive(Default)]
struct State {
    region: Option<Region>,
    stopping: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Bumped (under the lock) for every region and when stopping; workers spin on it before they sleep.
    epoch: AtomicU64,
    wake: Condvar,
    next_task: AtomicUsize,
    /// Workers that have not yet left the current region.
    active: AtomicUsize,
    finished: Condvar,
    panicked: AtomicBool,
    panic_message: Mutex<Option<String>>,
}

/// See the module's description.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Pool")
            .field("threads", &self.threads())
            .finish()
    }
}

/// Threads this process may keep busy: its CPU affinity and its cgroup quota (v1 and v2), at least one.
pub fn available_threads() -> usize {
    // The standard library reads sched_getaffinity and the cgroup CPU quota, rounding the quota down but not below 1.
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Tasks run outside the locks, so a poisoned lock still guards a consistent state.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] being one of them.
    ///
    /// # Errors
    /// When the operating system refuses a thread.
    pub fn new(threads: usize) -> Result<Self, SpawnError> {
        let count = threads.max(1);
        let mut pool = Self {
            shared: Arc::default(),
            workers: Vec::with_capacity(count - 1),
        };
        for index in 1..count {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new()
                .name(format!("cpu-{index}"))
                .spawn(move || {
                    THREAD.set(index);
                    work(&shared);
                })
                .map_err(|source| SpawnError {
                    index,
                    count,
                    source,
                })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0)` … `task(tasks - 1)`, each once, on all threads, and waits for them.
    ///
    /// # Errors
    /// When a task panicked; the remaining tasks are then abandoned.
    pub fn run(&mut self, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Result<(), WorkerPanic> {
        let shared = &*self.shared;
        shared.next_task.store(0, Ordering::Relaxed);
        let alone = self.workers.is_empty() || tasks <= 1;
        if !alone {
            self.publish(task, tasks);
        }
        take_tasks(shared, tasks, task);
        if !alone {
            self.wait();
        }
        if !shared.panicked.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let message = lock(&shared.panic_message).take();
        Err(WorkerPanic(message.unwrap_or_default()))
    }

    fn publish(&self, task: &(dyn Fn(usize) + Sync), tasks: usize) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. `run` calls `wait` before it returns, and a worker drops its copy of the
        // pointer before it leaves the region, so nobody uses the pointer after the borrow ends. Nothing between
        // `publish` and `wait` can unwind: `take_tasks` catches panics.
        #[allow(unsafe_code)]
        let erased = unsafe {
            std::mem::transmute::<
                *const (dyn Fn(usize) + Sync + '_),
                *const (dyn Fn(usize) + Sync + 'static),
            >(std::ptr::from_ref(task))
        };
        let mut state = lock(&shared.state);
        shared.active.store(self.workers.len(), Ordering::Relaxed);
        state.region = Some(Region {
            task: erased,
            tasks,
        });
        shared.epoch.fetch_add(1, Ordering::Release);
        drop(state);
        shared.wake.notify_all();
    }

    fn wait(&self) {
        let shared = &*self.shared;
        for _ in 0..SPINS {
            if shared.active.load(Ordering::Acquire) == 0 {
                break;
            }
            std::hint::spin_loop();
        }
        let mut state = lock(&shared.state);
        while shared.active.load(Ordering::Acquire) != 0 {
            state = shared
                .finished
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.region = None;
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.state).stopping = true;
        self.shared.epoch.fetch_add(1, Ordering::Release);
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker cannot panic outside a task, and those are caught.
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared) {
    let mut seen = 0;
    loop {
        for _ in 0..SPINS {
            if shared.epoch.load(Ordering::Acquire) != seen {
                break;
            }
            std::hint::spin_loop();
        }
        let mut state = lock(&shared.state);
        while shared.epoch.load(Ordering::Acquire) == seen && !state.stopping {
            state = shared
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopping {
            return;
        }
        seen = shared.epoch.load(Ordering::Acquire);
        let region = state.region;
        drop(state);
        if let Some(Region { task, tasks }) = region {
            // SAFETY: `run` waits until this worker has decremented `active` below, and the borrow lives until then.
            #[allow(unsafe_code)]
            let task = unsafe { &*task };
            take_tasks(shared, tasks, task);
        }
        if shared.active.fetch_sub(1, Ordering::AcqRel) == 1 {
            // The lock orders this notification after the waiter's last look at `active`.
            drop(lock(&shared.state));
            shared.finished.notify_all();
        }
    }
}

fn take_tasks(shared: &Shared, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    let caught = catch_unwind(AssertUnwindSafe(|| {
        loop {
            let index = shared.next_task.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                return;
            }
            task(index);
        }
    }));
    if let Err(payload) = caught {
        let message = payload
            .downcast_ref::<&str>()
            .map(ToString::to_string)
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".into());
        *lock(&shared.panic_message) = Some(message);
        shared.panicked.store(true, Ordering::Release);
        // Nobody takes a further task of a failed region.
        shared.next_task.store(tasks, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 4] {
            let mut pool = Pool::new(threads).unwrap();
            for tasks in [0, 1, 2, 3, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|index| {
                    counts[index].fetch_add(1, Ordering::Relaxed);
                })
                .unwrap();
                assert!(
                    counts
                        .iter()
                        .all(|count| count.load(Ordering::Relaxed) == 1)
                );
            }
        }
    }

    #[test]
    fn a_panic_in_a_task_is_an_error_and_the_pool_goes_on() {
        for threads in [1, 2, 4] {
            let mut pool = Pool::new(threads).unwrap();
            for _ in 0..20 {
                let error = pool
                    .run(64, &|index| assert!(index != 17, "task 17 is broken"))
                    .unwrap_err();
                assert!(error.0.contains("task 17 is broken"), "{error}");
                let sum = AtomicUsize::new(0);
                pool.run(64, &|index| {
                    sum.fetch_add(index, Ordering::Relaxed);
                })
                .unwrap();
                assert_eq!(sum.load(Ordering::Relaxed), 64 * 63 / 2);
            }
        }
    }

    #[test]
    fn many_small_regions_with_pauses_never_hang() {
        let mut pool = Pool::new(3).unwrap();
        let sum = AtomicUsize::new(0);
        for round in 0..2000 {
            if round % 500 == 0 {
                // Long enough for the workers to fall asleep.
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            pool.run(5, &|_| {
                sum.fetch_add(1, Ordering::Relaxed);
            })
            .unwrap();
        }
        assert_eq!(sum.load(Ordering::Relaxed), 10_000);
    }
}
