//! The graphs: one file per architecture, written once, generic over [`Backend`].

mod bert;
mod head;
mod replicas;

pub use bert::{Bert, Stage};
pub use replicas::Replicas;

use std::sync::Arc;

use anyhow::Result;

use crate::backend::{Backend, BackendError};
use crate::batch::Batch;
use crate::checkpoint::config::{Architecture, ModelConfig};
use crate::checkpoint::weights::Weights;

/// A model that scores pairs: what a worker drives, whatever the architecture and the device.
pub trait CrossEncoder: Send + Sync {
    /// One logit for each sequence of the batch, `[S]`, in its order. A score is `sigmoid(logit)`.
    ///
    /// # Errors
    /// The device's own failures.
    fn score(&self, batch: &Batch) -> Result<Vec<f32>, BackendError>;

    /// Implementation, precision and device, for start-up's summary.
    fn describe(&self) -> String;

    /// Batches that it computes at the same time, each by a caller of its own. One where a batch takes the whole device.
    fn max_concurrent_batches(&self) -> usize {
        1
    }
}

/// Builds the graph that `config` describes from the checkpoint, on `backend`.
///
/// # Errors
/// Any tensor that is missing, left over, mis-shaped or not finite.
pub fn load<B: Backend>(config: &ModelConfig, weights: Weights, backend: B) -> Result<Arc<dyn CrossEncoder>> {
    match config.architecture {
        Architecture::Bert | Architecture::Roberta => Ok(Arc::new(Bert::load(config, weights, backend)?)),
    }
}
