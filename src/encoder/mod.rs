//! The models' forward passes, generic over [`Backend`]. `transformer` is the graph of all encoders; it consists of `layer`s and
//! a `head`. Each family has a file that says where its tensors are in a checkpoint. `replicas` runs a model on several devices.

mod bert;
mod cross_encoder;
mod head;
mod layer;
mod modernbert;
mod new_model;
mod parts;
mod replicas;
mod transformer;

pub use cross_encoder::CrossEncoder;
pub use replicas::Replicas;
pub use transformer::{Stage, Transformer};

use anyhow::Result;

use crate::backend::Backend;
use crate::checkpoint::config::{Architecture, ModelConfig};
use crate::checkpoint::weights::Weights;

/// Loads the model that `config` describes onto `backend`.
///
/// # Errors
/// A tensor is missing, unexpected, of the wrong shape or damaged, or the device fails.
pub fn load<B: Backend>(config: &ModelConfig, weights: Weights, backend: B) -> Result<Transformer<B>> {
    match config.architecture {
        Architecture::Bert | Architecture::Roberta | Architecture::Electra => bert::load(config, weights, backend),
        Architecture::ModernBert => modernbert::load(config, weights, backend),
        Architecture::NewModel => new_model::load(config, weights, backend),
    }
}
