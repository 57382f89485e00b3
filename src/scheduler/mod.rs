//! Scheduling: requests are admitted whole, in tokens; wait in order; and run in batches of up to a token budget.
//!
//! There are no timers in the batcher: an idle worker takes what is there. A request may span batches, and a batch may span
//! requests.

mod plan;
mod queue;
mod supervisor;
mod worker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use queue::{NewJob, Queue};
pub use supervisor::EXIT_DEVICE_LOST;
use worker::Worker;

use crate::admission::{Admission, AdmissionLimits, Permit};
use crate::batch::Pair;
use crate::encoder::CrossEncoder;
use crate::error::RerankError;

/// Limits of one model's queue and batches.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerLimits {
    /// Token budget of one batch. A longer pair runs alone.
    pub max_batch_tokens: usize,
    /// Tokens that may be admitted and not yet computed.
    pub max_queue_tokens: usize,
    /// Time that waiting tokens may take to compute, at the measured speed.
    pub max_queue_wait: Duration,
    /// A batch that runs longer than this ends the process: the device hangs.
    pub batch_timeout: Duration,
}

/// The logits of one request's pairs, and where the time went.
#[derive(Debug)]
pub struct Scores {
    /// One for each pair, in the request's order.
    pub logits: Vec<f32>,
    /// From the request's arrival in the queue to its first batch.
    pub queued: Duration,
    /// From its first batch to its last.
    pub computed: Duration,
}

/// When a request's answer is no longer useful.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    pub at: Instant,
    /// Seconds from the request's arrival, for the message.
    pub seconds: u64,
}

impl Deadline {
    /// `seconds` from now.
    pub fn after(seconds: u64) -> Self {
        Self { at: Instant::now() + Duration::from_secs(seconds), seconds }
    }

    fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }
}

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
