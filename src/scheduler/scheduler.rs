//! One model's queue, workers and watchdog.

use std::sync::Arc;
use std::time::Instant;

use super::queue::{NewJob, Queue};
use super::supervisor;
use super::types::{Deadline, SchedulerLimits, Scores};
use super::worker::{self, Worker};
use crate::admission::{Admission, AdmissionLimits, Permit};
use crate::batch::Pair;
use crate::encoder::CrossEncoder;
use crate::error::RerankError;

/// One model's queue and its workers. Dropping it lets them finish their batches and ends them.
#[derive(Debug)]
pub struct Scheduler {
    admission: Arc<Admission>,
    queue: Arc<Queue>,
    workers: Vec<std::thread::JoinHandle<()>>,
}

impl Scheduler {
    /// Starts a worker for each batch that `encoder` can compute at the same time, and a watchdog. `model` names it in logs and
    /// metrics.
    ///
    /// # Errors
    /// The operating system refuses a thread.
    pub fn start(model: &str, encoder: Arc<dyn CrossEncoder>, limits: SchedulerLimits) -> std::io::Result<Self> {
        let count = encoder.max_concurrent_batches();
        let admission_limits = AdmissionLimits { units: limits.max_queue_tokens, wait: limits.max_queue_wait };
        let gauge = metrics::gauge!("rerankd_queue_tokens", "model" => model.to_owned());
        let admission = Arc::new(Admission::new(gauge, admission_limits, count));
        let queue = Arc::new(Queue::new(limits.max_batch_tokens));
        supervisor::watch(&queue, limits.batch_timeout, supervisor::end_process)?;
        let worker = Arc::new(Worker {
            model: model.to_owned(),
            encoder,
            queue: Arc::clone(&queue),
            admission: Arc::clone(&admission),
            end_process: supervisor::end_process,
        });
        let mut scheduler = Self { admission, queue, workers: Vec::with_capacity(count) };
        for _ in 0..count {
            scheduler.workers.push(worker::spawn(Arc::clone(&worker))?);
        }
        Ok(scheduler)
    }

    /// Room for `tokens` tokens of work, for as long as the permit lives.
    ///
    /// # Errors
    /// At once: [`RerankError::Overloaded`] if the queue is full, [`RerankError::CannotFinish`] if the deadline cannot be met.
    pub fn admit(&self, tokens: usize, deadline: Option<Deadline>) -> Result<Permit, RerankError> {
        self.admission.admit(tokens, deadline.map(|deadline| deadline.remaining()))
    }

    /// Scores `pairs`. Dropping the future removes the pairs that are not yet computed from the queue.
    ///
    /// # Errors
    /// The deadline passes first; the model fails.
    pub async fn score(
        &self,
        pairs: Vec<Pair>,
        permit: Permit,
        deadline: Option<Deadline>,
    ) -> Result<Scores, RerankError> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        self.queue.push(NewJob { pairs: pairs.into(), permit, deadline, reply })?;
        answer.await.map_err(|_| RerankError::Internal(anyhow::anyhow!("the worker ended without answering")))?
    }

    /// Token budget of one batch.
    pub fn max_batch_tokens(&self) -> usize {
        self.queue.max_batch_tokens()
    }

    /// When a batch last gave scores.
    pub fn last_success(&self) -> Option<Instant> {
        self.queue.last_success()
    }

    /// Start of the oldest batch that is being computed.
    pub fn running_since(&self) -> Option<Instant> {
        self.queue.running_since()
    }

    /// Whether the queue has any room: a request that will be refused need not be tokenized first.
    ///
    /// # Errors
    /// [`RerankError::Overloaded`]
    pub fn has_room(&self) -> Result<(), RerankError> {
        self.admit(1, None).map(|_| ())
    }

    /// Whether requests are taken at all: not after [`Scheduler::refuse_all`], nor when a device has failed.
    pub fn is_accepting(&self) -> bool {
        self.queue.is_open()
    }

    /// Answers every request with an error, now and later.
    pub fn refuse_all(&self) {
        self.queue.fail_all(|| RerankError::ShuttingDown);
    }

    /// Tokens admitted and not yet computed.
    pub fn waiting_tokens(&self) -> usize {
        self.admission.waiting()
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.queue.close();
        for worker in self.workers.drain(..) {
            worker.join().ok();
        }
    }
}
