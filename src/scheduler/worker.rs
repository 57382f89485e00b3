//! A worker thread: it takes a batch, runs it and delivers the logits.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::queue::{BatchJob, Queue};
use super::supervisor::{EndProcess, RestartBudget};
use crate::admission::Admission;
use crate::backend::BackendError;
use crate::batch::{Batch, Pair};
use crate::encoder::CrossEncoder;
use crate::error::RerankError;
use crate::failpoint::failpoint;
use crate::telemetry::metrics;

/// What the workers of one model share.
pub(super) struct Worker {
    pub(super) model: String,
    pub(super) encoder: Arc<dyn CrossEncoder>,
    pub(super) queue: Arc<Queue>,
    /// The queue's two admissions. They estimate waiting times from the times of large batches.
    pub(super) admissions: [Arc<Admission>; 2],
    pub(super) end_process: EndProcess,
}

/// Starts a worker thread, which ends when the queue is closed and empty. A worker that panics is restarted; if it panics too
/// often, the process ends.
pub(super) fn spawn(worker: Arc<Worker>) -> std::io::Result<JoinHandle<()>> {
    thread::Builder::new().name("worker".to_owned()).spawn(move || {
        let mut restarts = RestartBudget::default();
        let restarted = metrics::WORKER_RESTARTS.counter([worker.model.clone()]);
        while let Err(panic) = catch_unwind(AssertUnwindSafe(|| worker.run())) {
            tracing::error!(model = worker.model, "a worker panicked and is restarted: {}", message(panic.as_ref()));
            restarted.increment(1);
            if !restarts.allows(Instant::now()) {
                worker.queue.fail_all(|| RerankError::Internal(anyhow::anyhow!("the worker panicked too often")));
                (worker.end_process)("a worker panicked too often");
            }
        }
    })
}

impl Worker {
    fn run(&self) {
        let model = &self.model;
        let name = || [model.clone()];
        let (tokens_total, failed) = (metrics::TOKENS.counter(name()), metrics::BATCHES_FAILED.counter(name()));
        let [batch_tokens, batch_pairs, batch_seconds] =
            [metrics::BATCH_TOKENS, metrics::BATCH_PAIRS, metrics::BATCH_SECONDS]
                .map(|metric| metric.histogram(name()));
        while let Some(job) = self.queue.take() {
            failpoint!("worker-before-batch");
            let pairs: Vec<&Pair> = job.pairs().collect();
            let tokens: usize = pairs.iter().map(|pair| pair.tokens()).sum();
            let start = Instant::now();
            match score(self.encoder.as_ref(), &pairs) {
                Ok(logits) => {
                    let took = start.elapsed();
                    failpoint!("worker-after-batch");
                    if tokens * 4 >= self.queue.max_batch_tokens() {
                        self.admissions.iter().for_each(|admission| admission.done(tokens, took));
                    }
                    tokens_total.increment(tokens as u64);
                    batch_tokens.record(tokens as f64);
                    batch_pairs.record(pairs.len() as f64);
                    batch_seconds.record(took.as_secs_f64());
                    job.deliver(&logits);
                }
                Err(error) => {
                    tracing::error!(model, tokens, pairs = pairs.len(), %error, "a batch failed");
                    failed.increment(1);
                    self.fail(job, &error);
                }
            }
        }
    }

    /// Fails the requests of the batch. If the device is lost, ends the process; otherwise the worker continues.
    fn fail(&self, job: BatchJob, error: &BackendError) {
        let cause = error.to_string();
        job.fail(|| RerankError::Internal(anyhow::anyhow!("{cause}")));
        if let BackendError::DeviceLost(_) = error {
            self.queue.fail_all(|| RerankError::Internal(anyhow::anyhow!("the device is lost")));
            (self.end_process)("the device is lost");
        }
    }
}

/// One logit per pair; `None` if the device has too little memory even for this pair alone. A batch that does not fit is halved
/// and retried.
fn score(encoder: &dyn CrossEncoder, pairs: &[&Pair]) -> Result<Vec<Option<f32>>, BackendError> {
    let batch = Batch::pack(pairs.iter().copied());
    match run(encoder, &batch) {
        Ok(logits) => Ok(logits.into_iter().map(Some).collect()),
        Err(BackendError::OutOfMemory(_)) if pairs.len() > 1 => {
            let (first, second) = pairs.split_at(pairs.len() / 2);
            let mut logits = score(encoder, first)?;
            logits.extend(score(encoder, second)?);
            Ok(logits)
        }
        Err(BackendError::OutOfMemory(error)) => {
            tracing::warn!(tokens = batch.tokens(), %error, "the device has too little memory for a single pair");
            Ok(vec![None])
        }
        Err(error) => Err(error),
    }
}

fn run(encoder: &dyn CrossEncoder, batch: &Batch) -> Result<Vec<f32>, BackendError> {
    failpoint!("encoder-out-of-memory", Err(BackendError::OutOfMemory("injected".into())));
    failpoint!("encoder-error", Err(BackendError::Failed("injected".into())));
    let logits = catch_unwind(AssertUnwindSafe(|| encoder.score(batch)))
        .unwrap_or_else(|panic| Err(BackendError::Failed(format!("panic: {}", message(panic.as_ref())).into())))?;
    if logits.len() == batch.sequences() {
        Ok(logits)
    } else {
        let cause = format!("the model returned {} logits for {} pairs", logits.len(), batch.sequences());
        Err(BackendError::Failed(cause.into()))
    }
}

/// The message of a panic.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Has memory for `tokens` tokens at a time; the logit of a pair is its first token id.
    struct Small {
        tokens: usize,
    }

    impl CrossEncoder for Small {
        fn score(&self, batch: &Batch) -> Result<Vec<f32>, BackendError> {
            if batch.tokens() > self.tokens {
                return Err(BackendError::OutOfMemory("small".into()));
            }
            Ok(batch.ranges().map(|rows| batch.ids()[rows.start] as f32).collect())
        }

        fn describe(&self) -> String {
            "small".to_owned()
        }
    }

    #[test]
    fn a_batch_beyond_the_memory_is_split_until_only_the_pair_that_cannot_fit_fails() {
        let pairs: Vec<Pair> = [3, 9, 2, 4, 1].iter().map(|&n| Pair::new(vec![n as u32; n], vec![0; n])).collect();
        let logits = score(&Small { tokens: 6 }, &pairs.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!(logits, [Some(3.0), None, Some(2.0), Some(4.0), Some(1.0)]);
    }
}
