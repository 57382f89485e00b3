//! A transformer encoder as a cross-encoder: embeddings, layers, and a head that computes one logit for each sequence.
//!
//! All families of encoders share this graph. A family's own file (`bert.rs`, `modernbert.rs`, `new_model.rs`) says where
//! its tensors are in a checkpoint.

use std::sync::{Mutex, PoisonError};

use super::cross_encoder::CrossEncoder;
use super::head::Head;
use super::layer::Layer;
use crate::backend::{Backend, BackendError};
use crate::batch::Batch;
use crate::checkpoint::config::Pooling;

/// A cross-encoder on a backend.
pub struct Transformer<B: Backend> {
    pub(super) backend: B,
    pub(super) embeddings: B::Embeddings,
    pub(super) layers: Vec<Layer<B>>,
    /// The norm after the last layer of a pre-norm encoder.
    pub(super) final_norm: Option<B::Norm>,
    pub(super) head: Head<B>,
}

/// The intermediate results of a forward pass, in order. Golden tests compare each, so that a failure names the layer.
///
/// With [`Pooling::Cls`], the last layer and the final norm are computed for the first tokens only: `[S, C]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The embeddings after their layer norm, `[T, C]`.
    Embeddings,
    /// The output of an encoder layer, `[T, C]`.
    Layer(usize),
    /// The output of the norm after the last layer, `[T, C]`; in pre-norm encoders only.
    FinalNorm,
    /// The mean of each sequence's rows, `[S, C]`; with [`Pooling::Mean`] only.
    Pooled,
    /// The output of the head, `[S, 1]`.
    Logits,
}

impl<B: Backend> Transformer<B> {
    /// Returns the values of every stage in order, row-major. The batch must be small enough that the backend does not split it.
    ///
    /// # Errors
    /// The device fails or has too little memory.
    pub fn stages(&self, batch: &Batch) -> Result<Vec<(Stage, Vec<f32>)>, BackendError> {
        let stages = Mutex::new(Vec::new());
        self.backend.run_observed(batch, &|ctx, part| {
            self.forward(ctx, part, |stage, buffer| {
                let values = self.backend.download(ctx, buffer)?;
                stages.lock().unwrap_or_else(PoisonError::into_inner).push((stage, values));
                Ok(())
            })
        })?;
        Ok(stages.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// The forward pass. Returns the logits `[S]` and calls `observe` with the result of every stage.
    fn forward(
        &self,
        ctx: &B::ExecContext,
        batch: &Batch,
        mut observe: impl FnMut(Stage, &B::Buffer) -> Result<(), BackendError>,
    ) -> Result<Vec<f32>, BackendError> {
        let backend = &self.backend;
        let mut hidden = backend.embed(ctx, &self.embeddings, batch)?;
        observe(Stage::Embeddings, &hidden)?;
        let cls_only = self.head.pooling == Pooling::Cls;
        for (i, layer) in self.layers.iter().enumerate() {
            hidden = if cls_only && i + 1 == self.layers.len() {
                layer.forward_cls(backend, ctx, &hidden, batch)?
            } else {
                layer.forward(backend, ctx, &hidden, batch)?
            };
            observe(Stage::Layer(i), &hidden)?;
        }
        if let Some(norm) = &self.final_norm {
            hidden = backend.layer_norm(ctx, norm, hidden)?;
            observe(Stage::FinalNorm, &hidden)?;
        }
        if !cls_only {
            hidden = backend.mean_rows(ctx, &hidden, batch)?;
            observe(Stage::Pooled, &hidden)?;
        }
        let logits = self.head.logits(backend, ctx, hidden)?;
        observe(Stage::Logits, &logits)?;
        backend.download(ctx, &logits)
    }
}

impl<B: Backend> CrossEncoder for Transformer<B> {
    fn score(&self, batch: &Batch) -> Result<Vec<f32>, BackendError> {
        self.backend.run(batch, &|ctx, part| self.forward(ctx, part, |_, _| Ok(())))
    }

    fn describe(&self) -> String {
        self.backend.describe()
    }

    fn max_concurrent_batches(&self) -> usize {
        self.backend.max_concurrent_batches()
    }
}
