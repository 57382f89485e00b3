//! The only place that computes: some ten fused operations over packed buffers, and nothing about any model.
//!
//! An architecture is a graph over these operations ([`crate::encoder`]); a device is an implementation of them.
//! [`candle`] is the portable one and the definition of right: every other is held to it by the same property tests.
//! [`profile`] is none of its own: it goes around another and times it.
//!
//! A backend decides where the parallelism lives. [`Backend::run`] may cut a batch between sequences and have the graph run over
//! several pieces at once; each run of the graph has a [`Backend::ExecContext`] of its own (a thread's scratch memory, a stream), which
//! it hands to every operation and never looks into.

pub mod candle;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod profile;

use std::ops::Range;

use crate::batch::Batch;

/// A tensor on its way from a checkpoint to a backend: row-major f32 on the host. The backend takes it over.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// `shape.product()` values, row-major.
    pub data: Vec<f32>,
}

/// The three tables that an embedding sums, and the norm after them.
#[derive(Debug)]
pub struct EmbeddingTables {
    /// `[vocabulary, C]`
    pub words: HostTensor,
    /// `[positions, C]`, row 0 for a sequence's first token (a RoBERTa checkpoint's unused head rows are cut off at load).
    pub positions: HostTensor,
    /// `[types, C]`
    pub types: HostTensor,
    /// The layer norm over the sum.
    pub norm: NormWeights,
}

/// Layer norm: `(x - mean) / sqrt(variance + eps) * weight + bias`, over each row.
#[derive(Debug)]
pub struct NormWeights {
    /// `[C]`
    pub weight: HostTensor,
    /// `[C]`
    pub bias: HostTensor,
    /// Added to the variance.
    pub eps: f64,
}

/// An element-wise non-linearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * Phi(x)` with the error function: what checkpoints mean by `gelu`.
    Gelu,
    /// The tanh approximation of it (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// `max(x, 0)`
    Relu,
    /// Hyperbolic tangent, in the classification heads.
    Tanh,
}

/// What happens to a product `x W^T` before it is stored.
#[derive(Debug)]
pub enum Epilogue<'a, B> {
    /// Add the bias.
    Bias,
    /// Add the bias, then apply the function.
    Activation(Activation),
    /// Add the bias and this buffer, `[rows, outputs]`.
    Residual(&'a B),
}

/// Heads of an attention: C = `heads * head_size` columns of Q, of K and of V, head after head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// H
    pub heads: usize,
    /// D
    pub head_size: usize,
}

/// What a device can do at most, as it was measured on this one: the two sides of a roofline (Williams et al. 2009).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roofline {
    /// Operations a second in linear layers' products, a multiplication and an addition being two.
    pub gemms: f64,
    /// The same in attention, which has more bits where products have eight.
    pub attention: f64,
    /// Of the device's memory; nothing where caches hold what an operation reads.
    pub memory: Option<MemoryRoofline>,
}

/// How fast values come and go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryRoofline {
    /// Bytes a second, read and written.
    pub bytes: f64,
    /// Bytes of an activation.
    pub activation: usize,
    /// Bytes of a weight.
    pub weight: usize,
}

/// A backend could not compute. The cause is the device library's own error.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// This batch failed; the next may not.
    #[error("the backend failed: {0}")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// There is no memory on the device for so many tokens at once, and they cannot be divided further.
    #[error("the device's memory is exhausted: {0}")]
    OutOfMemory(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The device computes no more for this process (an illegal address, a card off the bus).
    #[error("the device is lost: {0}")]
    DeviceLost(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A graph over one batch, or a part of it, in a ctx: logits `[S]`, in the batch's order.
pub type Graph<'a, B> = &'a (dyn Fn(&<B as Backend>::ExecContext, &Batch) -> Result<Vec<f32>, BackendError> + Sync);

/// Where in a model a linear layer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerRole {
    /// In an encoder layer: nearly all the work, in the backend's working precision.
    Encoder,
    /// In the classification head: S rows only, which a backend computes as exactly as it can.
    Head,
}

/// A device and the arithmetic on it. Buffers are `[rows, columns]`; the graph names them and never looks inside.
pub trait Backend: Sized + Send + Sync + 'static {
    /// What one run of a graph has to itself.
    type ExecContext;
    /// Rows of activations on the device.
    type Buffer;
    /// [`EmbeddingTables`] on the device.
    type Embeddings: Send + Sync;
    /// A linear layer's weights on the device, in the layout of the backend's choice.
    type Linear: Send + Sync;
    /// [`NormWeights`] on the device.
    type Norm: Send + Sync;

    /// What start-up prints: implementation, precision, device.
    fn describe(&self) -> String;

    /// Calls of [`Backend::run`] that may compute at the same time.
    fn max_concurrent_batches(&self) -> usize {
        1
    }

    /// Takes the embedding tables over.
    fn embeddings(&self, tables: EmbeddingTables) -> Result<Self::Embeddings, BackendError>;
    /// Takes a linear layer over: `weight` is `[outputs, inputs]`, `bias` `[outputs]`.
    fn linear(&self, weight: HostTensor, bias: HostTensor, role: LayerRole) -> Result<Self::Linear, BackendError>;
    /// Takes a layer norm over.
    fn norm(&self, weights: NormWeights) -> Result<Self::Norm, BackendError>;

    /// Runs `graph` over `batch`, whole or cut between sequences, and returns the logits `[S]` in the batch's order.
    fn run(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError>;
    /// As [`Backend::run`], and `graph` is called for certain: a backend may answer `run` from a recording of an earlier call.
    fn run_observed(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        self.run(batch, graph)
    }

    /// `norm(words[id] + positions[position] + types[type])` for each token: `[T, C]`.
    fn embed(
        &self,
        ctx: &Self::ExecContext,
        weights: &Self::Embeddings,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError>;
    /// `epilogue(x W^T)` for the rows `outputs` of W (the columns of the result): `[rows, outputs.len()]`.
    fn apply(
        &self,
        ctx: &Self::ExecContext,
        weights: &Self::Linear,
        outputs: Range<usize>,
        x: &Self::Buffer,
        epilogue: Epilogue<'_, Self::Buffer>,
    ) -> Result<Self::Buffer, BackendError>;
    /// Layer norm of each row.
    fn layer_norm(
        &self,
        ctx: &Self::ExecContext,
        weights: &Self::Norm,
        x: Self::Buffer,
    ) -> Result<Self::Buffer, BackendError>;
    /// Bidirectional attention of every token to its own sequence. `qkv` is `[T, 3C]`; the result `[T, C]`.
    fn attention(
        &self,
        ctx: &Self::ExecContext,
        shape: AttentionShape,
        qkv: &Self::Buffer,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError>;
    /// Attention of each sequence's first token alone. `q` is `[S, C]`, `kv` `[T, 2C]`; the result `[S, C]`.
    fn cls_attention(
        &self,
        ctx: &Self::ExecContext,
        shape: AttentionShape,
        q: &Self::Buffer,
        kv: &Self::Buffer,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError>;
    /// Each sequence's first row: `[T, columns]` to `[S, columns]`.
    fn gather_cls(
        &self,
        ctx: &Self::ExecContext,
        x: &Self::Buffer,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError>;
    /// The buffer's values on the host, row-major.
    fn download(&self, ctx: &Self::ExecContext, x: &Self::Buffer) -> Result<Vec<f32>, BackendError>;
}

/// Timing of a backend's operations and measurement of its device, for `rerankd bench --profile`.
pub trait Timed: Backend {
    /// A point in the work of an execution context.
    type Event: Send;

    /// Marks the current end of the work queued on `ctx`.
    ///
    /// # Errors
    /// Failures of the device.
    fn record_event(&self, ctx: &Self::ExecContext) -> Result<Self::Event, BackendError>;
    /// Device seconds between two events of one execution context, once the run that recorded them has ended.
    ///
    /// # Errors
    /// Failures of the device.
    fn elapsed_seconds(&self, from: &Self::Event, to: &Self::Event) -> Result<f64, BackendError>;
    /// Measures the device's peak rates, if the backend knows how. Must not overlap with a run.
    ///
    /// # Errors
    /// Failures of the device.
    fn roofline(&self) -> Result<Option<Roofline>, BackendError> {
        Ok(None)
    }
}
