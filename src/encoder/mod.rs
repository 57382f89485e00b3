//! The models' forward passes: one file per architecture family, generic over [`Backend`].

mod bert;
mod cross_encoder;
mod head;
mod replicas;

pub use bert::{Bert, Stage};
pub use cross_encoder::CrossEncoder;
pub use replicas::Replicas;

use std::sync::Arc;

use anyhow::Result;

use crate::backend::Backend;
use crate::checkpoint::config::{Architecture, ModelConfig};
use crate::checkpoint::weights::Weights;

/// Loads the model that `config` describes onto `backend`.
///
/// # Errors
/// A tensor is missing, unexpected, of the wrong shape or damaged, or the device fails.
pub fn load<B: Backend>(config: &ModelConfig, weights: Weights, backend: B) -> Result<Arc<dyn CrossEncoder>> {
    match config.architecture {
        Architecture::Bert | Architecture::Roberta => Ok(Arc::new(Bert::load(config, weights, backend)?)),
    }
}
