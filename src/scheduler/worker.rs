//! A worker thread drives one lane of a model: take a batch, run it, deliver.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::admission::Admission;
use super::queue::{BatchJob, Queue};
use crate::backend::BackendError;
use crate::batch::Batch;
use crate::encoder::CrossEncoder;
use crate::error::RerankError;

/// EX_SOFTWARE: the device is lost, and only a new process gets it back.
const DEVICE_LOST: i32 = 70;
/// For the answers that tell of it to leave the process.
const RESPONSE_FLUSH_GRACE: Duration = Duration::from_millis(250);
/// How long the process may take to end in good order.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// Starts a worker. It ends when the queue is closed and empty.
pub(super) fn spawn(
    model: &str,
    encoder: Arc<dyn CrossEncoder>,
    queue: Arc<Queue>,
    admission: Arc<Admission>,
) -> std::io::Result<JoinHandle<()>> {
    let model = model.to_owned();
    thread::Builder::new().name("worker".to_owned()).spawn(move || {
        let tokens_total = metrics::counter!("rerankd_tokens_total", "model" => model.clone());
        let batch_tokens = metrics::histogram!("rerankd_batch_tokens", "model" => model.clone());
        let batch_seconds = metrics::histogram!("rerankd_batch_seconds", "model" => model.clone());
        while let Some(work) = queue.take() {
            let batch = Batch::pack(work.pairs());
            let start = Instant::now();
            match run(encoder.as_ref(), &batch) {
                Ok(logits) => queue.deliver(&work, &logits),
                Err(error) => {
                    tracing::error!(%model, tokens = batch.tokens(), pairs = batch.sequences(), %error, "a batch failed");
                    metrics::counter!("rerankd_batches_failed_total", "model" => model.clone()).increment(1);
                    fail(&queue, &work, &error);
                }
            }
            let took = start.elapsed();
            admission.computed(batch.tokens(), took);
            tokens_total.increment(batch.tokens() as u64);
            batch_tokens.record(batch.tokens() as f64);
            batch_seconds.record(took.as_secs_f64());
        }
    })
}

/// A failure, or a panic, is the batch's own: the worker goes on with the next. A lost device is the end of the process,
/// which would otherwise stay up and answer nothing but errors.
fn fail(queue: &Queue, work: &BatchJob, error: &BackendError) {
    let cause = error.to_string();
    match error {
        BackendError::OutOfMemory(_) => queue.fail(work, || RerankError::OutOfMemory),
        _ => queue.fail(work, || RerankError::Internal(anyhow::anyhow!("{cause}"))),
    }
    if let BackendError::DeviceLost(_) = error {
        thread::sleep(RESPONSE_FLUSH_GRACE);
        tracing::error!("the device is lost: ending with code {DEVICE_LOST}, to be started again");
        // The driver's own exit handlers run now, and may wait for a card that never answers.
        thread::spawn(|| {
            thread::sleep(EXIT_TIMEOUT);
            std::process::abort();
        });
        std::process::exit(DEVICE_LOST);
    }
}

fn run(encoder: &dyn CrossEncoder, batch: &Batch) -> Result<Vec<f32>, BackendError> {
    let logits = catch_unwind(AssertUnwindSafe(|| encoder.score(batch))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        Err(BackendError::Failed(format!("panic: {}", text.unwrap_or("without a message")).into()))
    })?;
    if logits.len() == batch.sequences() {
        Ok(logits)
    } else {
        let cause = format!("the model gave {} logits for {} pairs", logits.len(), batch.sequences());
        Err(BackendError::Failed(cause.into()))
    }
}
