//! The waiting requests of one model and the slots of their scores. Callers push, workers take batches and deliver.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::oneshot;

use super::plan::{self, Slice, Waiting};
use super::{Deadline, Permit, Scores};
use crate::batch::Pair;
use crate::error::RerankError;

/// A request on its way into the queue, with the reply inside.
#[derive(Debug)]
pub(super) struct NewJob {
    pub(super) pairs: Arc<[Pair]>,
    pub(super) permit: Permit,
    pub(super) deadline: Option<Deadline>,
    pub(super) reply: oneshot::Sender<Result<Scores, RerankError>>,
}

/// A batch that a worker has taken: pairs of one request or several, to be delivered or failed.
#[derive(Debug)]
pub(super) struct BatchJob {
    number: u64,
    parts: Vec<(Slice, Arc<[Pair]>)>,
}

impl BatchJob {
    pub(super) fn pairs(&self) -> impl Iterator<Item = &Pair> {
        self.parts.iter().flat_map(|(slice, all)| &all[slice.pairs.clone()])
    }
}

/// One model's queue.
#[derive(Debug)]
pub(super) struct Queue {
    max_batch_tokens: usize,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Waiting>,
    jobs: HashMap<u64, Job>,
    next_id: u64,
    closed: bool,
    last_success: Option<Instant>,
    /// When each batch that is being computed was begun, by its number: the first is the oldest.
    running: BTreeMap<u64, Instant>,
    taken: u64,
}

/// A request in the queue or in batches, until its last score is there.
#[derive(Debug)]
struct Job {
    new: NewJob,
    logits: Vec<f32>,
    missing: usize,
    arrived: Instant,
    started: Option<Instant>,
}

impl Queue {
    pub(super) fn new(max_batch_tokens: usize) -> Self {
        Self { max_batch_tokens, state: Mutex::default(), arrived: Condvar::new() }
    }

    pub(super) fn max_batch_tokens(&self) -> usize {
        self.max_batch_tokens
    }

    /// Puts a request in the queue.
    pub(super) fn push(&self, new: NewJob) -> Result<(), RerankError> {
        let mut state = self.lock();
        if state.closed {
            return Err(RerankError::ShuttingDown);
        }
        let missing = new.pairs.len();
        let now = Instant::now();
        let job = Job { logits: vec![0.0; missing], missing, arrived: now, started: None, new };
        if missing == 0 {
            job.finish();
            return Ok(());
        }
        let id = state.next_id;
        state.next_id += 1;
        state.waiting.push_back(Waiting {
            job: id,
            lengths: job.new.pairs.iter().map(Pair::tokens).collect(),
            next: 0,
        });
        state.jobs.insert(id, job);
        self.arrived.notify_one();
        Ok(())
    }

    /// The next batch's pairs, waiting for some to come. `None` when the queue is closed and empty.
    pub(super) fn take(&self) -> Option<BatchJob> {
        let mut state = self.lock();
        loop {
            state.reap_cancelled();
            let batch = plan::next_batch(&mut state.waiting, self.max_batch_tokens);
            if !batch.is_empty() {
                if !state.waiting.is_empty() {
                    self.arrived.notify_one(); // there is a batch for another worker too
                }
                return Some(state.begin(batch));
            }
            if state.closed {
                return None;
            }
            state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Puts a batch's logits, in the order of its pairs, into their requests' slots. Complete requests are answered.
    pub(super) fn deliver(&self, work: &BatchJob, logits: &[f32]) {
        let mut state = self.lock();
        if logits.iter().all(|logit| logit.is_finite()) {
            state.last_success = Some(Instant::now());
        }
        state.running.remove(&work.number);
        let mut logits = logits.iter();
        for (slice, _) in &work.parts {
            let new: Vec<f32> = logits.by_ref().take(slice.pairs.len()).copied().collect();
            if new.iter().any(|logit| !logit.is_finite()) {
                state.fail(slice.job, RerankError::NonFiniteScore);
                continue;
            }
            let Some(job) = state.jobs.get_mut(&slice.job) else { continue }; // given up meanwhile
            job.logits[slice.pairs.clone()].copy_from_slice(&new);
            job.missing -= new.len();
            if job.missing == 0
                && let Some(job) = state.jobs.remove(&slice.job)
            {
                job.finish();
            }
        }
    }

    /// Answers every request that had pairs in a failed batch.
    pub(super) fn fail(&self, work: &BatchJob, error: impl Fn() -> RerankError) {
        let mut state = self.lock();
        state.running.remove(&work.number);
        for (slice, _) in &work.parts {
            state.fail(slice.job, error());
        }
    }

    /// Refuses new requests; `take` ends when those that wait are done.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_all();
    }

    pub(super) fn last_success(&self) -> Option<Instant> {
        self.lock().last_success
    }

    pub(super) fn running_since(&self) -> Option<Instant> {
        self.lock().running.values().next().copied()
    }

    /// The state stays coherent at every point where a panic could leave the lock, so a poisoned one is used on.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Forgets requests whose client has gone or whose deadline has passed.
    fn reap_cancelled(&mut self) {
        let now = Instant::now();
        let expired = |job: &Job| job.new.deadline.filter(|deadline| deadline.at <= now);
        let departed = |job: &Job| job.new.reply.is_closed() || expired(job).is_some();
        let given_up: Vec<u64> = self.jobs.iter().filter(|(_, job)| departed(job)).map(|(&id, _)| id).collect();
        for id in given_up {
            metrics::counter!("rerankd_requests_given_up_total").increment(1);
            let Some(job) = self.forget(id) else { continue };
            if let Some(Deadline { seconds, .. }) = expired(&job) {
                job.new.reply.send(Err(RerankError::Deadline { seconds })).ok(); // the client may have gone too
            }
        }
    }

    fn begin(&mut self, batch: Vec<Slice>) -> BatchJob {
        let now = Instant::now();
        let number = self.taken;
        self.taken += 1;
        self.running.insert(number, now);
        let part = |slice: Slice| {
            let job = self.jobs.get_mut(&slice.job)?;
            job.started.get_or_insert(now);
            Some((slice, Arc::clone(&job.new.pairs)))
        };
        BatchJob { number, parts: batch.into_iter().filter_map(part).collect() }
    }

    fn fail(&mut self, id: u64, error: RerankError) {
        if let Some(job) = self.forget(id) {
            job.new.reply.send(Err(error)).ok(); // the client may have gone
        }
    }

    fn forget(&mut self, id: u64) -> Option<Job> {
        self.waiting.retain(|waiting| waiting.job != id);
        self.jobs.remove(&id)
    }
}

impl Job {
    fn finish(self) {
        let now = Instant::now();
        let started = self.started.unwrap_or(now);
        let scores = Scores { logits: self.logits, queued: started - self.arrived, computed: now - started };
        drop(self.new.permit);
        self.new.reply.send(Ok(scores)).ok(); // the client may have gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::admission::Admission;

    fn job(pairs: usize) -> (NewJob, oneshot::Receiver<Result<Scores, RerankError>>) {
        let (reply, answer) = oneshot::channel();
        let permit = Arc::new(Admission::new("m", 1000, 1)).admit(pairs).unwrap();
        (NewJob { pairs: vec![Pair::new(vec![1], vec![0]); pairs].into(), permit, deadline: None, reply }, answer)
    }

    #[test]
    fn workers_deliver_one_request_out_of_order() {
        let queue = Queue::new(2);
        let (new, mut answer) = job(3);
        queue.push(new).unwrap();
        let (first, second) = (queue.take().unwrap(), queue.take().unwrap());
        let oldest = queue.running_since().unwrap();
        queue.deliver(&second, &[2.0]);
        assert_eq!(queue.running_since(), Some(oldest), "the end of a younger batch does not hide an older one");
        assert!(answer.try_recv().is_err());
        queue.deliver(&first, &[0.0, 1.0]);
        assert_eq!(answer.try_recv().unwrap().unwrap().logits, [0.0, 1.0, 2.0]);
        assert_eq!(queue.running_since(), None);
    }

    #[test]
    fn a_failed_batch_fails_its_requests_and_no_other() {
        let queue = Queue::new(2);
        let ((split, mut failed), (other, mut answered)) = (job(3), job(1));
        queue.push(split).unwrap();
        let first = queue.take().unwrap();
        queue.push(other).unwrap();
        let rest = queue.take().unwrap();
        queue.fail(&first, || RerankError::OutOfMemory);
        assert!(matches!(failed.try_recv().unwrap(), Err(RerankError::OutOfMemory)));
        queue.deliver(&rest, &[2.0, 7.0]);
        assert_eq!(answered.try_recv().unwrap().unwrap().logits, [7.0]);
    }

    #[test]
    fn what_a_worker_leaves_wakes_another() {
        let queue = Arc::new(Queue::new(1));
        let takers: Vec<_> = (0..2)
            .map(|_| {
                let queue = Arc::clone(&queue);
                std::thread::spawn(move || queue.take().map(|work| work.pairs().count()))
            })
            .collect();
        let (new, _answer) = job(2);
        queue.push(new).unwrap();
        assert!(takers.into_iter().all(|taker| taker.join().unwrap() == Some(1)));
    }
}
