//! One model's waiting requests and their logits. Callers push requests; workers take batches and deliver logits.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use tokio::sync::oneshot;

use super::plan::{Slice, Waiting, WaitingList};
use super::types::{Deadline, QueuePermit, Scores};
use crate::batch::Pair;
use crate::error::RerankError;
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::telemetry::metrics;

/// A request for the queue, with the channel for its reply.
#[derive(Debug)]
pub(super) struct NewJob {
    pub(super) pairs: Arc<[Pair]>,
    pub(super) permit: QueuePermit,
    pub(super) deadline: Option<Deadline>,
    pub(super) reply: oneshot::Sender<Result<Scores, RerankError>>,
}

/// The pairs of one request that are in a batch: their range, and all pairs of the request.
type Part = (Slice, Arc<[Pair]>);

/// A batch that a worker has taken: pairs of one or several requests. If it is dropped before
/// [`BatchJob::deliver`] or [`BatchJob::fail`], as when the worker panics, its requests fail.
#[derive(Debug)]
pub(super) struct BatchJob {
    number: u64,
    parts: Vec<Part>,
    queue: Arc<Queue>,
    finished: bool,
}

/// One model's queue.
#[derive(Debug)]
pub(super) struct Queue {
    /// The model's name, for metrics.
    model: String,
    max_batch_tokens: usize,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: WaitingList,
    jobs: HashMap<u64, Job>,
    next_id: u64,
    closed: bool,
    last_success: Option<Instant>,
    /// Start of each batch that is being computed, by batch number: the first entry is the oldest batch.
    running: BTreeMap<u64, Instant>,
    batches_taken: u64,
}

/// A request in the queue or in batches, until its last logit is delivered.
#[derive(Debug)]
struct Job {
    new: NewJob,
    logits: Vec<f32>,
    missing: usize,
    arrived: Instant,
    started: Option<Instant>,
    batches: usize,
    /// Number of the last batch that was counted in `batches`.
    last_batch: Option<u64>,
}

impl BatchJob {
    pub(super) fn pairs(&self) -> impl Iterator<Item = &Pair> {
        self.parts.iter().flat_map(|(slice, all)| &all[slice.pairs.clone()])
    }

    /// Stores the logits, in the order of [`BatchJob::pairs`]; `None` is a pair for which the device has no memory. Requests
    /// without missing logits are answered.
    pub(super) fn deliver(mut self, logits: &[Option<f32>]) {
        self.finished = true;
        self.queue.deliver(&self, logits);
    }

    /// Answers every request of this batch with an error.
    pub(super) fn fail(mut self, error: impl Fn() -> RerankError) {
        self.finished = true;
        self.queue.fail(&self, error);
    }
}

impl Drop for BatchJob {
    fn drop(&mut self) {
        if !self.finished {
            self.queue.fail(self, || RerankError::Internal(anyhow::anyhow!("the worker panicked")));
        }
    }
}

impl Queue {
    pub(super) fn new(model: &str, max_batch_tokens: usize) -> Self {
        Self { model: model.to_owned(), max_batch_tokens, state: Mutex::default(), arrived: Condvar::new() }
    }

    pub(super) fn max_batch_tokens(&self) -> usize {
        self.max_batch_tokens
    }

    /// Adds a request to the queue; [`RerankError::ShuttingDown`] if the queue is closed.
    pub(super) fn push(&self, new: NewJob) -> Result<(), RerankError> {
        let mut state = self.lock();
        if state.closed {
            return Err(RerankError::ShuttingDown);
        }
        let missing = new.pairs.len();
        let job = Job {
            logits: vec![0.0; missing],
            missing,
            arrived: Instant::now(),
            started: None,
            batches: 0,
            last_batch: None,
            new,
        };
        if missing == 0 {
            job.finish();
            return Ok(());
        }
        let id = state.next_id;
        state.next_id += 1;
        let lengths = job.new.pairs.iter().map(Pair::tokens).collect();
        state.waiting.push(Waiting::new(id, job.new.permit.client, lengths));
        state.jobs.insert(id, job);
        self.arrived.notify_one();
        Ok(())
    }

    /// The next batch, waiting until there is one. `None` when the queue is closed and empty.
    pub(super) fn take(self: &Arc<Self>) -> Option<BatchJob> {
        let mut state = self.lock();
        loop {
            state.reap_cancelled(&self.model);
            let batch = state.waiting.next_batch(self.max_batch_tokens);
            if !batch.is_empty() {
                if !state.waiting.is_empty() {
                    self.arrived.notify_one(); // another worker can take a batch too
                }
                let (number, parts) = state.begin(batch);
                return Some(BatchJob { number, parts, queue: Arc::clone(self), finished: false });
            }
            if state.closed {
                return None;
            }
            state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn deliver(&self, batch: &BatchJob, logits: &[Option<f32>]) {
        let mut state = self.lock();
        if logits.iter().any(|logit| logit.is_some_and(f32::is_finite)) {
            state.last_success = Some(Instant::now());
        }
        state.running.remove(&batch.number);
        let mut rest = logits;
        for (slice, _) in &batch.parts {
            let (new, after) = rest.split_at(slice.pairs.len());
            rest = after;
            if new.iter().any(Option::is_none) {
                state.fail(slice.job, RerankError::OutOfMemory);
                continue;
            }
            if new.iter().flatten().any(|logit| !logit.is_finite()) {
                state.fail(slice.job, RerankError::NonFiniteScore);
                continue;
            }
            let Some(job) = state.jobs.get_mut(&slice.job) else { continue }; // cancelled meanwhile
            for (slot, &logit) in job.logits[slice.pairs.clone()].iter_mut().zip(new.iter().flatten()) {
                *slot = logit;
            }
            job.missing -= new.len();
            if job.missing == 0
                && let Some(job) = state.jobs.remove(&slice.job)
            {
                job.finish();
            }
        }
    }

    fn fail(&self, batch: &BatchJob, error: impl Fn() -> RerankError) {
        let mut state = self.lock();
        state.running.remove(&batch.number);
        for (slice, _) in &batch.parts {
            state.fail(slice.job, error());
        }
    }

    /// Answers all waiting and running requests with an error, and refuses later ones.
    pub(super) fn fail_all(&self, error: impl Fn() -> RerankError) {
        let mut state = self.lock();
        state.closed = true;
        for id in state.jobs.keys().copied().collect::<Vec<_>>() {
            state.fail(id, error());
        }
        self.arrived.notify_all();
    }

    /// Refuses new requests. [`Queue::take`] returns `None` once all waiting requests have been taken.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_all();
    }

    pub(super) fn is_open(&self) -> bool {
        !self.lock().closed
    }

    pub(super) fn last_success(&self) -> Option<Instant> {
        self.lock().last_success
    }

    /// Start of the oldest batch that is being computed.
    pub(super) fn running_since(&self) -> Option<Instant> {
        self.lock().running.values().next().copied()
    }

    /// No update of the state can panic halfway, so the state behind a poisoned lock is consistent.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Removes requests whose future was dropped or whose deadline has passed.
    fn reap_cancelled(&mut self, model: &str) {
        let now = Instant::now();
        let expired = |job: &Job| job.new.deadline.filter(|deadline| deadline.at <= now);
        let cancelled: Vec<u64> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.new.reply.is_closed() || expired(job).is_some())
            .map(|(&id, _)| id)
            .collect();
        for id in cancelled {
            let Some(job) = self.remove(id) else { continue };
            let expired = expired(&job);
            let reason = if expired.is_some() { "deadline" } else { "disconnected" };
            metrics::REQUESTS_CANCELLED.counter([model, reason].map(str::to_owned)).increment(1);
            if let Some(Deadline { seconds, .. }) = expired {
                job.new.reply.send(Err(RerankError::Deadline { seconds })).ok(); // the receiver may be dropped too
            }
        }
    }

    fn begin(&mut self, batch: Vec<Slice>) -> (u64, Vec<Part>) {
        let now = Instant::now();
        let number = self.batches_taken;
        self.batches_taken += 1;
        self.running.insert(number, now);
        let part = |slice: Slice| {
            let job = self.jobs.get_mut(&slice.job)?;
            job.started.get_or_insert(now);
            job.batches += usize::from(job.last_batch.replace(number) != Some(number));
            if !self.waiting.is_in_first_level(slice.job) {
                job.new.permit.first_service = None;
            }
            Some((slice, Arc::clone(&job.new.pairs)))
        };
        (number, batch.into_iter().filter_map(part).collect())
    }

    fn fail(&mut self, id: u64, error: RerankError) {
        if let Some(job) = self.remove(id) {
            job.new.reply.send(Err(error)).ok(); // the receiver may be dropped
        }
    }

    fn remove(&mut self, id: u64) -> Option<Job> {
        self.waiting.remove(id);
        self.jobs.remove(&id)
    }
}

impl Job {
    fn finish(self) {
        let now = Instant::now();
        let started = self.started.unwrap_or(now);
        let (queued, computed) = (started - self.arrived, now - started);
        let scores = Scores { logits: self.logits, queued, computed, batches: self.batches };
        drop(self.new.permit);
        self.new.reply.send(Ok(scores)).ok(); // the receiver may be dropped
    }
}

#[cfg(test)]
mod tests;
