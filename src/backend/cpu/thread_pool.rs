//! The threads that compute: the caller's and its helpers.
//!
//! Helpers spin for some microseconds after each task, since the next operation of a lone request follows at once, and sleep
//! after that. A task is a function of a thread's number; nobody returns from [`ThreadPool::broadcast`] before all have.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a helper spins before it sleeps: longer than any step between two operations of a request.
const SPIN: Duration = Duration::from_micros(50);

/// Threads that run one task at a time, together.
#[derive(Debug)]
pub struct ThreadPool {
    shared: Arc<State>,
    helpers: Vec<JoinHandle<()>>,
    /// Who has the threads, and who is next.
    turns: Turns,
    /// The caller's processor, where threads are pinned.
    own: Option<core_affinity::CoreId>,
}

thread_local! {
    static PINNED: Cell<bool> = const { Cell::new(false) };
}

/// First come, first served: two models' workers take turns, where a plain lock might let one starve.
#[derive(Debug, Default)]
struct Turns {
    /// The next number to draw, and the one whose turn it is.
    numbers: Mutex<(u64, u64)>,
    moved: Condvar,
}

/// The threads are this holder's.
#[derive(Debug)]
pub(super) struct Turn<'a>(&'a Turns);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.numbers.lock().unwrap_or_else(PoisonError::into_inner).1 += 1;
        self.0.moved.notify_all();
    }
}

#[derive(Debug, Default)]
struct State {
    /// Counts tasks: a helper has work when it moves. Changed under `task`'s lock.
    epoch: AtomicUsize,
    /// Helpers that have not finished the task.
    running: AtomicUsize,
    task: Mutex<Slot>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Slot {
    task: Option<Task>,
    closed: bool,
    panic: Option<Box<dyn Any + Send>>,
}

/// A borrowed function, for as long as [`ThreadPool::broadcast`] waits for its helpers.
#[derive(Clone, Copy)]
struct Task(*const (dyn Fn(usize) + Sync));

// SAFETY: the function may be called from any thread (`Sync`), and `broadcast` keeps it alive.
unsafe impl Send for Task {}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Task")
    }
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.task.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ThreadPool {
    /// The caller's thread and `threads - 1` helpers, each on a processor of its own where they are `pinned`.
    ///
    /// # Errors
    /// The operating system has no more threads.
    pub fn new(threads: usize, pinned: bool) -> std::io::Result<Self> {
        let shared = Arc::new(State::default());
        let processors = if pinned { core_affinity::get_core_ids().unwrap_or_default() } else { Vec::new() };
        let helper = |number: usize| {
            let shared = Arc::clone(&shared);
            let processor = (!processors.is_empty()).then(|| processors[number % processors.len()]);
            std::thread::Builder::new().name(format!("compute-{number}")).spawn(move || {
                processor.map(core_affinity::set_for_current);
                help(&shared, number);
            })
        };
        let helpers = (1..threads.max(1)).map(helper).collect::<std::io::Result<_>>()?;
        Ok(Self { shared, helpers, turns: Turns::default(), own: processors.first().copied() })
    }

    /// Threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Waits until nobody else uses the threads.
    pub(super) fn turn(&self) -> Turn<'_> {
        let mut numbers = self.turns.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = numbers.0;
        numbers.0 += 1;
        while numbers.1 != mine {
            numbers = self.turns.moved.wait(numbers).unwrap_or_else(PoisonError::into_inner);
        }
        Turn(&self.turns)
    }

    /// Runs `task(0)` here and `task(1)`, `task(2)` ... on the helpers, and returns when all have. A panic of any is passed on
    /// to the caller. Tasks do not broadcast, and only the holder of the turn does.
    pub(super) fn broadcast(&self, task: &(dyn Fn(usize) + Sync)) {
        if let Some(own) = self.own.filter(|_| !PINNED.replace(true)) {
            core_affinity::set_for_current(own);
        }
        if self.helpers.is_empty() {
            return task(0);
        }
        // SAFETY: only the lifetime is taken away; below, this function waits for every helper, whatever happens.
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
        self.shared.arrived.notify_all();
        let own = catch_unwind(AssertUnwindSafe(|| task(0)));
        let begun = Instant::now();
        while self.shared.running.load(Ordering::Acquire) > 0 {
            // On a machine with fewer processors than threads, a helper may be waiting for this one's.
            if begun.elapsed() > SPIN { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        let theirs = self.shared.lock().panic.take();
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }

    /// Calls `f` with each item, on whichever thread is free. Takes the turn.
    pub(super) fn for_each<T: Send>(&self, items: Vec<T>, f: impl Fn(T) + Sync) {
        let _turn = self.turn();
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
            self.shared.lock().closed = true;
            self.shared.epoch.fetch_add(1, Ordering::Release);
        }
        self.shared.arrived.notify_all();
        for helper in self.helpers.drain(..) {
            helper.join().ok();
        }
    }
}

/// A helper's life.
fn help(shared: &State, number: usize) {
    let mut seen = 0;
    loop {
        let begun = Instant::now();
        while shared.epoch.load(Ordering::Acquire) == seen && begun.elapsed() < SPIN {
            std::hint::spin_loop();
        }
        let task = {
            let mut slot = shared.lock();
            while shared.epoch.load(Ordering::Acquire) == seen {
                slot = shared.arrived.wait(slot).unwrap_or_else(PoisonError::into_inner);
            }
            if slot.closed {
                return;
            }
            seen = shared.epoch.load(Ordering::Acquire);
            slot.task.expect("a task comes with its epoch")
        };
        // SAFETY: `broadcast` waits until `running` is 0, and so keeps the function alive.
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
    fn items_are_each_taken_once() {
        let pool = ThreadPool::new(3, false).unwrap();
        let sum = AtomicUsize::new(0);
        pool.for_each((0..1000).collect(), |item: usize| {
            sum.fetch_add(item, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 499_500);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = ThreadPool::new(2, false).unwrap();
        for bad in 0..2 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.broadcast(&|thread| assert_ne!(thread, bad, "a planted failure"));
            }));
            assert!(outcome.is_err());
        }
        pool.broadcast(&|_| {});
    }
}
