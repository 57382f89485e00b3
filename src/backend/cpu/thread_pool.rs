//! The compute threads: the caller's thread and its helpers.
//!
//! [`ThreadPool::broadcast`] calls a function on every thread, with the thread's number, and returns when all have finished.
//! After a task, helpers spin for [`SPIN`], because the next operation of a small batch follows at once. Then they
//! sleep.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Condvar, IS_SIMULATED, Mutex, MutexGuard};

/// How long a helper spins before it sleeps: longer than the serial code between two operations.
const SPIN: Duration = if IS_SIMULATED { Duration::ZERO } else { Duration::from_micros(50) };

/// Threads that all run the same task, one task at a time.
#[derive(Debug)]
pub struct ThreadPool {
    shared: Arc<PoolState>,
    helpers: Vec<JoinHandle<()>>,
    /// Held by the caller that uses the threads.
    ticket_lock: TicketLock,
    /// The caller's core, if threads are pinned.
    caller_core: Option<core_affinity::CoreId>,
}

thread_local! {
    /// Whether this thread has been pinned as the caller of a pool.
    static PINNED: Cell<bool> = const { Cell::new(false) };
}

/// A FIFO lock. With a plain mutex, one model's worker could starve another's.
#[derive(Debug, Default)]
struct TicketLock {
    /// The next ticket to hand out, and the ticket that holds the lock.
    tickets: Mutex<(u64, u64)>,
    released: Condvar,
}

/// Exclusive use of the threads; dropping it releases them.
#[derive(Debug)]
pub(super) struct ThreadsGuard<'a>(&'a TicketLock);

impl Drop for ThreadsGuard<'_> {
    fn drop(&mut self) {
        self.0.tickets.lock().unwrap_or_else(PoisonError::into_inner).1 += 1;
        self.0.released.notify_all();
    }
}

#[derive(Debug, Default)]
struct PoolState {
    /// Increased for each new task, while `task` is locked, and when the pool is closed.
    epoch: AtomicUsize,
    /// Helpers that have not finished the current task.
    running: AtomicUsize,
    task: Mutex<TaskSlot>,
    task_available: Condvar,
}

#[derive(Debug, Default)]
struct TaskSlot {
    task: Option<Task>,
    closed: bool,
    panic: Option<Box<dyn Any + Send>>,
}

/// A borrowed function. [`ThreadPool::broadcast`] keeps the borrow alive until all helpers have finished.
#[derive(Clone, Copy)]
struct Task(*const (dyn Fn(usize) + Sync));

// SAFETY: the function may be called from any thread (`Sync`), and `broadcast` keeps it alive.
unsafe impl Send for Task {}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Task")
    }
}

impl PoolState {
    fn lock(&self) -> MutexGuard<'_, TaskSlot> {
        self.task.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ThreadPool {
    /// Starts `threads - 1` helpers beside the caller's thread. If `pinned`, thread i is pinned to core i, modulo the number of
    /// cores; the caller is pinned at its first task.
    ///
    /// # Errors
    /// The operating system cannot create the threads.
    pub fn new(threads: usize, pinned: bool) -> std::io::Result<Self> {
        let shared = Arc::new(PoolState::default());
        let cores = if pinned { core_affinity::get_core_ids().unwrap_or_default() } else { Vec::new() };
        let helper = |number: usize| {
            let shared = Arc::clone(&shared);
            let core = (!cores.is_empty()).then(|| cores[number % cores.len()]);
            thread::Builder::new().name(format!("compute-{number}")).spawn(move || {
                core.map(core_affinity::set_for_current);
                helper_loop(&shared, number);
            })
        };
        let helpers = (1..threads.max(1)).map(helper).collect::<std::io::Result<_>>()?;
        Ok(Self { shared, helpers, ticket_lock: TicketLock::default(), caller_core: cores.first().copied() })
    }

    /// The number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Waits until no other caller uses the threads. Callers are served in the order of their calls.
    pub(super) fn lock_threads(&self) -> ThreadsGuard<'_> {
        let mut tickets = self.ticket_lock.tickets.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = tickets.0;
        tickets.0 += 1;
        while tickets.1 != mine {
            tickets = self.ticket_lock.released.wait(tickets).unwrap_or_else(PoisonError::into_inner);
        }
        ThreadsGuard(&self.ticket_lock)
    }

    /// Runs `task(0)` on this thread and `task(1)`, `task(2)` ... on the helpers, and returns when all have finished.
    /// The caller holds [`Self::lock_threads`]. Tasks must not call `broadcast`.
    ///
    /// # Panics
    /// If a task panicked, on any thread, its panic is resumed here.
    pub(super) fn broadcast(&self, task: &(dyn Fn(usize) + Sync)) {
        if let Some(core) = self.caller_core.filter(|_| !PINNED.replace(true)) {
            core_affinity::set_for_current(core);
        }
        if self.helpers.is_empty() {
            return task(0);
        }
        // SAFETY: only the lifetime is erased. This function waits for every helper below, also after a panic.
        let task_for_helpers = unsafe {
            Task(std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(
                task,
            ))
        };
        {
            let mut slot = self.shared.lock();
            slot.task = Some(task_for_helpers);
            self.shared.running.store(self.helpers.len(), Ordering::Relaxed);
            self.shared.epoch.fetch_add(1, Ordering::Release);
        }
        self.shared.task_available.notify_all();
        let outcome = catch_unwind(AssertUnwindSafe(|| task(0)));
        let begun = Instant::now();
        while self.shared.running.load(Ordering::Acquire) > 0 {
            // With more threads than cores, a helper may need this thread's core to finish.
            if begun.elapsed() >= SPIN { thread::yield_now() } else { std::hint::spin_loop() }
        }
        let helper_panic = self.shared.lock().panic.take();
        if let Some(panic) = outcome.err().or(helper_panic) {
            resume_unwind(panic);
        }
    }

    /// Calls `f` with each item, on the next free thread. Waits for the threads as [`Self::lock_threads`] does.
    pub(super) fn for_each<T: Send>(&self, items: Vec<T>, f: impl Fn(T) + Sync) {
        let _threads = self.lock_threads();
        let items = Mutex::new(items.into_iter());
        let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
        self.broadcast(&|_| {
            while let Some(item) = next() {
                f(item);
            }
        });
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        {
            let mut slot = self.shared.lock();
            slot.closed = true;
            self.shared.epoch.fetch_add(1, Ordering::Release);
        }
        self.shared.task_available.notify_all();
        for helper in self.helpers.drain(..) {
            helper.join().ok();
        }
    }
}

/// Runs tasks until the pool is dropped.
fn helper_loop(shared: &PoolState, number: usize) {
    let mut seen = 0;
    loop {
        let begun = Instant::now();
        while shared.epoch.load(Ordering::Acquire) == seen && begun.elapsed() < SPIN {
            std::hint::spin_loop();
        }
        let task = {
            let mut slot = shared.lock();
            while shared.epoch.load(Ordering::Acquire) == seen {
                slot = shared.task_available.wait(slot).unwrap_or_else(PoisonError::into_inner);
            }
            if slot.closed {
                return;
            }
            seen = shared.epoch.load(Ordering::Acquire);
            slot.task.expect("the epoch changes only with a new task")
        };
        // SAFETY: `broadcast` keeps the function alive until `running` is 0.
        let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { (*task.0)(number) }));
        if let Err(panic) = outcome {
            shared.lock().panic = Some(panic);
        }
        shared.running.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_each_task_once() {
        for threads in [1, 2, 5] {
            let pool = ThreadPool::new(threads, false).unwrap();
            for _ in 0..200 {
                let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
                pool.broadcast(&|thread| {
                    counts[thread].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn for_each_passes_every_item_to_one_thread() {
        let pool = ThreadPool::new(3, false).unwrap();
        let sum = AtomicUsize::new(0);
        pool.for_each((0..1000).collect(), |item: usize| {
            sum.fetch_add(item, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 499_500);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_stays_usable() {
        let pool = ThreadPool::new(2, false).unwrap();
        for bad in 0..2 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.broadcast(&|thread| assert_ne!(thread, bad, "injected failure"));
            }));
            assert!(outcome.is_err());
        }
        pool.broadcast(&|_| {});
    }
}

#[cfg(test)]
#[cfg(feature = "shuttle")]
mod schedules {
    use super::*;
    use crate::sync::atomic::AtomicBool;
    use crate::sync::schedules::{check_all, check_random, choose};

    const THREADS: usize = 3;

    /// Calls `caller` with the pool and a number, on two threads at once. The pool is dropped by the one that ends last.
    fn two_callers(caller: impl Fn(&ThreadPool, usize) + Send + Sync + 'static) {
        let pool = Arc::new(ThreadPool::new(THREADS, false).unwrap());
        let caller = Arc::new(caller);
        let start = |number| {
            let (pool, caller) = (Arc::clone(&pool), Arc::clone(&caller));
            thread::spawn(move || caller(&pool, number))
        };
        let callers: Vec<_> = (0..2).map(start).collect();
        drop(pool);
        callers.into_iter().for_each(|caller| caller.join().unwrap());
    }

    #[test]
    fn shuttle_callers_take_turns_and_every_thread_runs_each_task_once() {
        check_random(|| {
            let is_busy = AtomicBool::new(false);
            two_callers(move |pool, _| {
                for _ in 0..2 {
                    let _threads = pool.lock_threads();
                    assert!(!is_busy.swap(true, Ordering::Relaxed), "two callers use the threads");
                    let runs = [const { AtomicUsize::new(0) }; THREADS];
                    pool.broadcast(&|thread| {
                        runs[thread].fetch_add(1, Ordering::Relaxed);
                    });
                    assert_eq!(runs.map(AtomicUsize::into_inner), [1; THREADS]);
                    is_busy.store(false, Ordering::Relaxed);
                }
            });
        });
    }

    #[test]
    fn shuttle_for_each_passes_every_item_to_one_thread() {
        check_random(|| {
            two_callers(|pool, _| {
                let seen = [const { AtomicUsize::new(0) }; 4];
                pool.for_each((0..4).collect(), |item: usize| {
                    seen[item].fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(seen.map(AtomicUsize::into_inner), [1; 4]);
            });
        });
    }

    #[test]
    fn shuttle_a_panic_reaches_the_caller_of_its_task_and_no_other() {
        check_random(|| {
            two_callers(|pool, number| {
                // One thread panics, then all, then none.
                for panics in [|thread, number| thread == number, |_, _| true, |_: usize, _: usize| false] {
                    let _threads = pool.lock_threads();
                    let task = |thread| {
                        if panics(thread, number) {
                            resume_unwind(Box::new("injected")); // `panic!` would call the panic hook, where shuttle reports a failed schedule
                        }
                    };
                    let outcome = catch_unwind(AssertUnwindSafe(|| pool.broadcast(&task)));
                    assert_eq!(outcome.is_err(), (0..THREADS).any(|thread| panics(thread, number)));
                }
            });
        });
    }

    #[test]
    fn shuttle_dropping_the_pool_ends_every_helper() {
        check_random(|| {
            let pool = ThreadPool::new(THREADS, false).unwrap();
            (0..choose(3)).for_each(|_| pool.broadcast(&|_| {}));
        });
    }

    #[test]
    fn shuttle_every_schedule_of_dropping_a_pool_ends() {
        check_all(|| drop(ThreadPool::new(2, false).unwrap()));
    }
}
