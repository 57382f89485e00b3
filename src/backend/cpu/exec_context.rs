//! The threads of a run: each operation split over all threads, or whole partitions of the batch on one thread each.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::partition::{Partition, Partitioning};
use super::thread_pool::ThreadPool;

/// How a run of a graph executes its operations: on the calling thread, or each operation split over all threads.
#[derive(Debug)]
pub struct ExecContext {
    /// The threads that operations are split over; `None` for the calling thread only.
    pool: Option<Arc<ThreadPool>>,
}

impl ExecContext {
    /// Runs operations on the calling thread only.
    pub(super) fn single_thread() -> Self {
        Self { pool: None }
    }

    /// Splits operations over all threads of `pool`.
    pub(super) fn all_threads(pool: &Arc<ThreadPool>) -> Self {
        Self { pool: (pool.threads() > 1).then(|| Arc::clone(pool)) }
    }

    /// The number of threads that an operation is split over.
    pub(super) fn threads(&self) -> usize {
        self.pool.as_ref().map_or(1, |pool| pool.threads())
    }

    /// Splits `0..n` into contiguous ranges, one per thread, and calls `f` with each on its thread. Empty ranges are skipped.
    pub(super) fn split(&self, n: usize, f: impl Fn(Range<usize>) + Sync) {
        let Some(pool) = &self.pool else { return f(0..n) };
        let threads = pool.threads();
        pool.broadcast(&|thread| {
            let part = n * thread / threads..n * (thread + 1) / threads;
            if !part.is_empty() {
                f(part);
            }
        });
    }
}

/// Calls `compute` with each partition: first the shared ones, with all threads, then those of single threads. A thread that has
/// finished its own partitions continues with those of other threads (work stealing).
pub(super) fn run_partitions(
    pool: &Arc<ThreadPool>,
    partitioning: &Partitioning,
    compute: impl Fn(&ExecContext, &[usize]) + Sync,
) {
    let _threads = pool.lock_threads();
    let all_threads = ExecContext::all_threads(pool);
    for partition in &partitioning.shared {
        compute(&all_threads, partition);
    }
    if partitioning.per_thread.iter().all(|partitions| partitions.is_empty()) {
        return;
    }
    let queues: Vec<Mutex<&[Partition]>> =
        partitioning.per_thread.iter().map(|partitions| Mutex::new(&partitions[..])).collect();
    let pop = |owner: usize| {
        let mut queue = queues[owner].lock().unwrap_or_else(PoisonError::into_inner);
        let (first, rest) = queue.split_first()?;
        *queue = rest;
        Some(first)
    };
    pool.broadcast(&|thread| {
        let ctx = ExecContext::single_thread();
        for owner in (0..queues.len()).map(|i| (thread + i) % queues.len()) {
            while let Some(partition) = pop(owner) {
                compute(&ctx, partition);
            }
        }
    });
}
