//! The only place that computes: some ten fused operations over packed buffers, and nothing about any model.
//!
//! An architecture is a graph over these operations ([`crate::encoder`]); a device is an implementation of them.
//! [`candle`] is the portable one and the definition of right: every other is held to it by the same property tests.
//!
//! How the fast backends fit, so that no graph changes when they come:
//! - A CPU backend packs weights into panels in [`Backend::linear`] (the loader's copy is dropped), cuts a saturated batch in
//!   [`Backend::run`] into pieces of some hundreds of tokens, and has each of its threads run the whole graph over one
//!   piece; a lone pair is one piece, and the operations split it inside. Buffers come from the thread's arena. A norm's output
//!   may carry its bf16 or int8 form along: a [`Backend::Buffer`] is the backend's affair.
//! - A CUDA backend has one launching thread per device. `run` takes one of two slots (pinned staging, arena, event), uploads
//!   the batch once, lets the graph launch, and waits for the event; two workers a replica keep two batches in flight.
//!   [`Backend::apply`] with a row range is the Q or KV half of one fused QKV weight; [`Epilogue`] is what cuBLASLt fuses;
//!   Buffers of a size are handed out in a fixed order, so CUDA graphs may replay.

pub mod candle;

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

/// A backend could not compute. The cause is the device library's own error.
#[derive(Debug, thiserror::Error)]
#[error("the backend failed: {0}")]
pub struct BackendError(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// A graph over one batch: logits `[S]`, in the batch's order.
pub type Graph<'a> = &'a (dyn Fn(&Batch) -> Result<Vec<f32>, BackendError> + Sync);

/// A device and the arithmetic on it. Buffers are `[rows, columns]`; the graph names them and never looks inside.
pub trait Backend: Send + Sync + 'static {
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

    /// Takes the embedding tables over.
    fn embeddings(&self, tables: EmbeddingTables) -> Result<Self::Embeddings, BackendError>;
    /// Takes a linear layer over: `weight` is `[outputs, inputs]`, `bias` `[outputs]`.
    fn linear(&self, weight: HostTensor, bias: HostTensor) -> Result<Self::Linear, BackendError>;
    /// Takes a layer norm over.
    fn norm(&self, weights: NormWeights) -> Result<Self::Norm, BackendError>;

    /// Runs `graph` over `batch`, whole or cut between sequences, and returns the logits `[S]` in the batch's order.
    /// Where the parallelism lives is decided here.
    fn run(&self, batch: &Batch, graph: Graph<'_>) -> Result<Vec<f32>, BackendError>;

    /// `norm(words[id] + positions[position] + types[type])` for each token: `[T, C]`.
    fn embed(&self, weights: &Self::Embeddings, batch: &Batch) -> Result<Self::Buffer, BackendError>;
    /// `epilogue(x W^T)` for the rows `outputs` of W (the columns of the result): `[rows, outputs.len()]`.
    fn apply(
        &self,
        weights: &Self::Linear,
        outputs: Range<usize>,
        x: &Self::Buffer,
        epilogue: Epilogue<'_, Self::Buffer>,
    ) -> Result<Self::Buffer, BackendError>;
    /// Layer norm of each row.
    fn layer_norm(&self, weights: &Self::Norm, x: Self::Buffer) -> Result<Self::Buffer, BackendError>;
    /// Bidirectional attention of every token to its own sequence. `qkv` is `[T, 3C]`; the result `[T, C]`.
    fn attention(&self, shape: AttentionShape, qkv: &Self::Buffer, batch: &Batch)
    -> Result<Self::Buffer, BackendError>;
    /// Attention of each sequence's first token alone. `q` is `[S, C]`, `kv` `[T, 2C]`; the result `[S, C]`.
    fn first_token_attention(
        &self,
        shape: AttentionShape,
        q: &Self::Buffer,
        kv: &Self::Buffer,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError>;
    /// The given rows, in the given order: `[rows.len(), columns]`.
    fn gather_rows(&self, x: &Self::Buffer, rows: &[u32]) -> Result<Self::Buffer, BackendError>;
    /// The buffer's values on the host, row-major.
    fn download(&self, x: &Self::Buffer) -> Result<Vec<f32>, BackendError>;
}
