//! One thread owns one model on one device: take a batch, run it, deliver.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::admission::Admission;
use super::queue::{Queue, Work};
use crate::batch::Batch;
use crate::encoder::CrossEncoder;

/// Starts the worker. It ends when the queue is closed and empty.
pub(super) fn spawn(
    model: &str,
    encoder: Box<dyn CrossEncoder>,
    queue: Arc<Queue>,
    admission: Arc<Admission>,
) -> std::io::Result<JoinHandle<()>> {
    let model = model.to_owned();
    thread::Builder::new().name("worker".to_owned()).spawn(move || {
        let tokens_total = metrics::counter!("rerankd_tokens_total", "model" => model.clone());
        let batch_tokens = metrics::histogram!("rerankd_batch_tokens", "model" => model.clone());
        let batch_seconds = metrics::histogram!("rerankd_batch_seconds", "model" => model.clone());
        while let Some(work) = queue.take() {
            let batch = Batch::pack(work.iter().flat_map(Work::pairs));
            let start = Instant::now();
            match run(encoder.as_ref(), &batch) {
                Ok(logits) => queue.deliver(&work, &logits),
                Err(cause) => {
                    tracing::error!(%model, tokens = batch.tokens(), pairs = batch.sequences(), cause, "a batch failed");
                    metrics::counter!("rerankd_batches_failed_total", "model" => model.clone()).increment(1);
                    queue.fail(&work, &cause);
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

/// A failure, or a panic, is the batch's own: the worker goes on with the next.
fn run(encoder: &dyn CrossEncoder, batch: &Batch) -> Result<Vec<f32>, String> {
    let outcome = catch_unwind(AssertUnwindSafe(|| encoder.score(batch)));
    let logits = match outcome {
        Ok(result) => result.map_err(|error| error.to_string())?,
        Err(panic) => {
            let text =
                panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            return Err(format!("panic: {}", text.unwrap_or("without a message")));
        }
    };
    if logits.len() == batch.sequences() {
        Ok(logits)
    } else {
        Err(format!("the model gave {} logits for {} pairs", logits.len(), batch.sequences()))
    }
}
