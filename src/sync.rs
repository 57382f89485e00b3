//! Locks, atomics and threads for code whose thread schedules are tested.
//!
//! They are those of std. In unit tests with the feature `shuttle` they are simulated: one thread runs at a time, and at each
//! lock, notification and atomic operation a scheduler chooses the thread that runs next. tests/README.md says how to run these
//! tests.
//!
//! The simulation has limits: every atomic operation counts as `SeqCst`, and condition variables do not wake up spuriously.

#[cfg(all(test, feature = "shuttle"))]
pub(crate) use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread,
};
#[cfg(not(all(test, feature = "shuttle")))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread,
};

/// Whether threads are simulated. A loop that spins must then yield: otherwise the PCT scheduler may run it for ever, because
/// its thread has the highest priority.
pub(crate) const IS_SIMULATED: bool = cfg!(all(test, feature = "shuttle"));

#[cfg(test)]
#[cfg(feature = "shuttle")]
pub(crate) mod schedules {
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use shuttle::rand::{Rng, thread_rng};
    use shuttle::scheduler::{DfsScheduler, PctScheduler, RandomScheduler, Scheduler};
    use shuttle::{Config, Runner};

    /// Number of schedules that [`check_random`] tries, unless the variable `SHUTTLE_SCHEDULES` says otherwise.
    const DEFAULT_SCHEDULES: usize = 1000;
    /// Bug depth of the PCT scheduler (Burckhardt et al., "A randomized scheduler with probabilistic guarantees of finding bugs",
    /// 2010): a schedule has at most `PCT_DEPTH - 1` random changes of priority.
    const PCT_DEPTH: usize = 3;

    /// Runs `test` on random schedules. Half of them choose each next thread uniformly; the other half use random priorities that
    /// change a few times (PCT).
    pub(crate) fn check_random(test: impl Fn() + Send + Sync + 'static) {
        let schedules = std::env::var("SHUTTLE_SCHEDULES").map_or(DEFAULT_SCHEDULES, |text| text.parse().unwrap());
        let test = Arc::new(test);
        run(RandomScheduler::new(schedules.div_ceil(2)), Arc::clone(&test));
        run(PctScheduler::new(PCT_DEPTH, schedules.div_ceil(2)), test);
    }

    /// Runs `test` on every schedule. It must not spin.
    pub(crate) fn check_all(test: impl Fn() + Send + Sync + 'static) {
        run(DfsScheduler::new(None, false), Arc::new(test));
    }

    /// A random number below `n`, which is part of the schedule.
    pub(crate) fn choose(n: usize) -> usize {
        thread_rng().gen_range(0..n)
    }

    fn run(scheduler: impl Scheduler + 'static, test: Arc<impl Fn() + Send + Sync + 'static>) {
        let mut config = Config::new();
        config.stack_size = 256 * 1024;
        config.silence_warnings = true;
        let begun = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&begun);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            Runner::new(scheduler, config).run(move || {
                counter.fetch_add(1, Relaxed);
                test();
            })
        }));
        match outcome {
            Ok(schedules) => eprintln!("{schedules} schedules passed"),
            Err(panic) => {
                eprintln!("schedule number {} failed", begun.load(Relaxed));
                resume_unwind(panic);
            }
        }
    }
}
