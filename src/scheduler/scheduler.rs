//! One model's queue, workers and watchdog.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::plan::FIRST_SERVICE_TOKENS;
use super::queue::{NewJob, Queue};
use super::supervisor;
use super::types::{Deadline, QueuePermit, SchedulerLimits, Scores};
use super::worker::{self, Worker};
use crate::admission::{Admission, AdmissionLimits, Resource};
use crate::batch::Pair;
use crate::client::ClientId;
use crate::encoder::CrossEncoder;
use crate::error::RerankError;
use crate::telemetry::metrics;

/// One model's queue and its workers. Dropping it waits until the workers have computed everything that is queued.
#[derive(Debug)]
pub struct Scheduler {
    /// All admitted tokens. A request is admitted only if it can be computed after them before its deadline.
    total: Arc<Admission>,
    /// The admitted tokens that wait in the first level of the queue, at most [`FIRST_SERVICE_TOKENS`] of each request. The
    /// first tokens of a new request wait for these only, and for the second level's share of each batch.
    first_service: Arc<Admission>,
    queue: Arc<Queue>,
    workers: Vec<std::thread::JoinHandle<()>>,
}

impl Scheduler {
    /// Starts `encoder.max_concurrent_batches()` workers and a watchdog. `model` is the model's name in logs and metrics.
    ///
    /// # Errors
    /// The operating system refuses a thread.
    pub fn start(model: &str, encoder: Arc<dyn CrossEncoder>, limits: SchedulerLimits) -> std::io::Result<Self> {
        let count = encoder.max_concurrent_batches();
        let name = || [model.to_owned()];
        let gauge = metrics::QUEUE_TOKENS.gauge(name());
        metrics::QUEUE_MAX_TOKENS.gauge(name()).set(limits.max_queue_tokens as f64);
        metrics::BATCH_MAX_TOKENS.gauge(name()).set(limits.max_batch_tokens as f64);
        metrics::WORKERS.gauge(name()).set(count as f64);
        for reason in ["disconnected", "deadline"] {
            metrics::REQUESTS_CANCELLED.counter([model, reason].map(str::to_owned)).increment(0);
        }
        let total_limits = AdmissionLimits { units: limits.max_queue_tokens, wait: Duration::MAX };
        let total = Arc::new(Admission::new(Resource::Queue, gauge, total_limits, count));
        let gauge = metrics::QUEUE_FIRST_SERVICE_TOKENS.gauge(name());
        let first_limits = AdmissionLimits { units: usize::MAX, wait: limits.max_queue_wait };
        let first_service = Arc::new(Admission::new(Resource::Queue, gauge, first_limits, count));
        let queue = Arc::new(Queue::new(model, limits.max_batch_tokens));
        supervisor::watch(&queue, limits.batch_timeout, supervisor::end_process)?;
        let worker = Arc::new(Worker {
            model: model.to_owned(),
            encoder,
            queue: Arc::clone(&queue),
            admissions: [Arc::clone(&total), Arc::clone(&first_service)],
            end_process: supervisor::end_process,
        });
        let mut scheduler = Self { total, first_service, queue, workers: Vec::with_capacity(count) };
        for _ in 0..count {
            scheduler.workers.push(worker::spawn(Arc::clone(&worker))?);
        }
        Ok(scheduler)
    }

    /// Admits `tokens` tokens of a client's work. Keep the permit until the work is finished.
    ///
    /// # Errors
    /// [`RerankError::Overloaded`] if the client has no room in the queue, or if the request would wait too long;
    /// [`RerankError::CannotFinish`] if it could not meet the deadline even without waiting.
    pub fn admit(
        &self,
        client: ClientId,
        tokens: usize,
        deadline: Option<Deadline>,
    ) -> Result<QueuePermit, RerankError> {
        let first_service = self.first_service.admit(client, tokens.min(FIRST_SERVICE_TOKENS), None)?;
        let total = self.total.admit(client, tokens, deadline.map(|deadline| deadline.remaining()))?;
        Ok(QueuePermit { client, _total: total, first_service: Some(first_service) })
    }

    /// Scores `pairs`. If the future is dropped, the pairs that are in no batch yet leave the queue before the next batch.
    ///
    /// # Errors
    /// The deadline passes first; the model fails; the scheduler refuses requests.
    pub async fn score(
        &self,
        pairs: Vec<Pair>,
        permit: QueuePermit,
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

    /// When the last successful batch ended.
    pub fn last_success(&self) -> Option<Instant> {
        self.queue.last_success()
    }

    /// Start of the oldest batch that is being computed.
    pub fn running_since(&self) -> Option<Instant> {
        self.queue.running_since()
    }

    /// Checks that the queue has any room for a client, so that no request is tokenized in vain.
    ///
    /// # Errors
    /// [`RerankError::Overloaded`]
    pub fn has_room(&self, client: ClientId) -> Result<(), RerankError> {
        self.first_service.has_room(client).and_then(|()| self.total.has_room(client))
    }

    /// Whether requests are accepted: not after [`Scheduler::refuse_all`], nor when the process is about to end because of a
    /// failure.
    pub fn is_accepting(&self) -> bool {
        self.queue.is_open()
    }

    /// Refuses all waiting, running and later requests with [`RerankError::ShuttingDown`].
    pub fn refuse_all(&self) {
        self.queue.fail_all(|| RerankError::ShuttingDown);
    }

    /// Tokens that are admitted and not yet computed.
    pub fn waiting_tokens(&self) -> usize {
        self.total.waiting()
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
