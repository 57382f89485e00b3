//! Runs a workload and measures the time.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use indicatif::ProgressBar;

use crate::backend::BackendError;
use crate::batch::Batch;
use crate::cli::failure::Failure;
use crate::loading::LoadedModel;

/// Runs a workload `runs` times. Returns the seconds of each run, and the logits of the last run in the order of the pairs.
///
/// # Errors
/// The backend's error for a batch.
pub(super) fn measure(
    model: &LoadedModel,
    batches: &[Batch],
    runs: u32,
    bar: &ProgressBar,
) -> Result<(Vec<f64>, Vec<f32>), Failure> {
    let (mut seconds, mut logits) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let start = Instant::now();
        logits = score(model, batches).map_err(|error| Failure::Other(error.into()))?;
        seconds.push(start.elapsed().as_secs_f64());
        bar.inc(1);
    }
    Ok((seconds, logits))
}

/// Scores the batches on all of the model's execution contexts. The logits are in the order of the pairs.
fn score(model: &LoadedModel, batches: &[Batch]) -> Result<Vec<f32>, BackendError> {
    let next = AtomicUsize::new(0);
    let results: Vec<OnceLock<Result<Vec<f32>, BackendError>>> = batches.iter().map(|_| OnceLock::new()).collect();
    let score_remaining = || {
        loop {
            let i = next.fetch_add(1, Relaxed);
            let Some(batch) = batches.get(i) else { break };
            results[i].set(model.encoder.score(batch)).ok(); // each index is claimed once
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..model.encoder.max_concurrent_batches().min(batches.len()) {
            scope.spawn(score_remaining);
        }
        score_remaining();
    });
    let mut logits = Vec::new();
    for result in results.into_iter().filter_map(OnceLock::into_inner) {
        logits.extend(result?);
    }
    Ok(logits)
}
