//! The classification head: from each sequence's first token (CLS) to one logit.

use anyhow::Result;

use crate::backend::{Activation, Backend, BackendError, Epilogue, LayerRole};
use crate::checkpoint::config::{Architecture, ModelConfig};
use crate::checkpoint::weights::Weights;

/// `out(tanh(dense(cls)))`. The layers are named pooler and classifier in BERT, and classifier.dense and
/// classifier.out_proj in RoBERTa.
pub(super) struct Head<B: Backend> {
    dense: B::Linear,
    out: B::Linear,
    hidden_size: usize,
}

impl<B: Backend> Head<B> {
    pub(super) fn load(config: &ModelConfig, weights: &mut Weights, backend: &B) -> Result<Self> {
        let c = config.hidden_size;
        let (dense, out) = match config.architecture {
            Architecture::Bert => ("bert.pooler.dense", "classifier"),
            Architecture::Roberta => ("classifier.dense", "classifier.out_proj"),
        };
        let mut linear = |name: &str, outputs: usize| -> Result<B::Linear> {
            let weight = weights.take(&format!("{name}.weight"), &[outputs, c])?;
            Ok(backend.linear(weight, weights.take(&format!("{name}.bias"), &[outputs])?, LayerRole::Head)?)
        };
        Ok(Self { dense: linear(dense, c)?, out: linear(out, 1)?, hidden_size: c })
    }

    /// `[S, C]` to `[S, 1]`.
    pub(super) fn logits(&self, backend: &B, ctx: &B::ExecContext, cls: &B::Buffer) -> Result<B::Buffer, BackendError> {
        let dense =
            backend.apply(ctx, &self.dense, 0..self.hidden_size, cls, Epilogue::Activation(Activation::Tanh))?;
        backend.apply(ctx, &self.out, 0..1, &dense, Epilogue::Bias)
    }
}
