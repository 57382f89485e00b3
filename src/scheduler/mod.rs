//! Who runs what, when: work is admitted whole, in tokens; waits fairly; and runs in batches up to a token budget.
//!
//! No timers: an idle worker takes what is there. A request may span batches, and a batch may span requests.

mod admission;
mod plan;
mod queue;
mod worker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use admission::Admission;
pub use admission::Permit;
use queue::{NewJob, Queue};

use crate::batch::Pair;
use crate::encoder::CrossEncoder;
use crate::error::RerankError;

/// What bounds the work.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerLimits {
    /// Tokens of one batch. A longer pair runs alone.
    pub max_batch_tokens: usize,
    /// Tokens that may be admitted and not yet computed.
    pub max_queue_tokens: usize,
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

/// When a request's scores are of no use any more.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    /// The moment.
    pub at: Instant,
    /// Seconds from the request's arrival, for the message.
    pub seconds: u64,
}

impl Deadline {
    /// `seconds` from now.
    pub fn after(seconds: u64) -> Self {
        Self { at: Instant::now() + Duration::from_secs(seconds), seconds }
    }
}

/// One model's queue and the workers that drain it. Dropping it lets them finish their batches and ends them.
#[derive(Debug)]
pub struct Scheduler {
    admission: Arc<Admission>,
    queue: Arc<Queue>,
    workers: Vec<std::thread::JoinHandle<()>>,
}

impl Scheduler {
    /// Starts a worker for each of `encoder`'s lanes. `model` names it in logs and metrics.
    ///
    /// # Errors
    /// The operating system has no thread for one.
    pub fn start(model: &str, encoder: Arc<dyn CrossEncoder>, limits: SchedulerLimits) -> std::io::Result<Self> {
        let lanes = encoder.max_concurrent_batches();
        let admission = Arc::new(Admission::new(model, limits.max_queue_tokens, lanes));
        let queue = Arc::new(Queue::new(limits.max_batch_tokens));
        let mut scheduler = Self { admission, queue, workers: Vec::with_capacity(lanes) };
        for _ in 0..lanes {
            let (queue, admission) = (Arc::clone(&scheduler.queue), Arc::clone(&scheduler.admission));
            scheduler.workers.push(worker::spawn(model, Arc::clone(&encoder), queue, admission)?);
        }
        Ok(scheduler)
    }

    /// Room for `tokens` tokens of work, for as long as the permit lives.
    ///
    /// # Errors
    /// [`RerankError::Overloaded`], at once, when too much is waiting.
    pub fn admit(&self, tokens: usize) -> Result<Permit, RerankError> {
        Admission::admit(&self.admission, tokens)
    }

    /// Scores `pairs`. Dropping the future takes what has not yet been computed out of the queue.
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
        answer.await.map_err(|_| RerankError::Internal(anyhow::anyhow!("the worker ended without an answer")))?
    }

    /// Tokens of one batch.
    pub fn max_batch_tokens(&self) -> usize {
        self.queue.max_batch_tokens()
    }

    /// When a batch last came back with scores.
    pub fn last_success(&self) -> Option<Instant> {
        self.queue.last_success()
    }

    /// When the oldest of the batches that are being computed was begun.
    pub fn running_since(&self) -> Option<Instant> {
        self.queue.running_since()
    }

    /// Whether the queue has any room at all: a request need not be tokenised to be refused.
    ///
    /// # Errors
    /// [`RerankError::Overloaded`]
    pub fn has_room(&self) -> Result<(), RerankError> {
        self.admit(1).map(|_| ())
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
