//! The trait [`Backend`]: about ten fused operations over packed buffers, which do all of a model's computation. Backends know
//! no model.
//!
//! An architecture is a graph over these operations (`encoder`); a backend implements them for a device. [`candle`] is
//! the portable backend and the reference: tests compare [`cpu`] with it, operation by operation. The CUDA backend is compared with
//! [`cpu`]. [`profile`] wraps a backend and times its operations.
//!
//! A backend decides how to parallelize. [`Backend::run`] may split a batch between sequences and run the graph on
//! several parts at the same time. Each run of the graph has its own [`Backend::ExecContext`] (a thread, or a stream
//! and workspace), which the graph passes to every operation.

pub mod candle;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod gpus;
pub mod profile;

use std::ops::Range;

use crate::batch::Batch;

/// A tensor in host memory, as read from a checkpoint: f32, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// `shape.product()` values, row-major.
    pub data: Vec<f32>,
}

/// Weights of the embedding: tables whose rows are added, and the layer norm of the sum.
#[derive(Debug)]
pub struct EmbeddingTables {
    /// `[vocabulary, C]`
    pub words: HostTensor,
    /// `[positions, C]`. Row 0 is for a sequence's first token: the unused first rows of a RoBERTa checkpoint are
    /// removed at load. `None` if positions are rotary ([`RotaryTable`]).
    pub positions: Option<HostTensor>,
    /// `[types, C]`; `None` if the model does not distinguish token types.
    pub types: Option<HostTensor>,
    pub norm: NormWeights,
}

/// Weights of a layer norm: `(x - mean) / sqrt(variance + eps) * weight + bias` for each row.
#[derive(Debug)]
pub struct NormWeights {
    /// `[C]`
    pub weight: HostTensor,
    /// `[C]`; zeros if the model has none.
    pub bias: HostTensor,
    /// Added to the variance.
    pub eps: f64,
}

/// The angles of a rotary position embedding (Su et al. 2021): at position p, pair i of a head is rotated by
/// `p * frequencies[i]`.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryTable {
    /// Radians per position, `[D / 2]`. Pair i is columns i and i + D / 2 of the head ("rotate half").
    pub frequencies: Vec<f32>,
    /// The number of positions: 0 to `positions - 1` occur.
    pub positions: usize,
}

impl RotaryTable {
    /// Cosines and sines of all angles, each `[positions, D / 2]`. Angles are products in f32, as in `transformers`.
    pub fn cos_sin(&self) -> (Vec<f32>, Vec<f32>) {
        let angles = (0..self.positions).flat_map(|p| self.frequencies.iter().map(move |f| p as f32 * f));
        angles.map(|angle| (angle.cos(), angle.sin())).unzip()
    }
}

/// An element-wise non-linearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * Phi(x)`, computed with the error function: `gelu` in checkpoints.
    Gelu,
    /// The tanh approximation of GELU: `gelu_new` and `gelu_pytorch_tanh` in checkpoints.
    GeluTanh,
    /// `max(x, 0)`
    Relu,
    /// `x / (1 + exp(-x))`: `silu` or `swish` in checkpoints.
    Silu,
    /// Hyperbolic tangent. Used in classification heads only.
    Tanh,
}

/// The epilogue of a GEMM `x W^T`: applied to the result before it is stored.
#[derive(Debug)]
pub enum Epilogue<'a, B> {
    /// Add the bias.
    Bias,
    /// Add the bias, then apply the activation.
    Activation(Activation),
    /// Add the bias, then `activation(gate) * value`, where the first half of the outputs is the gate and the second
    /// half the value (GLU variants; Shazeer 2020). The result has half as many columns. Only for layers loaded with
    /// [`LayerRole::Gated`], and only for all of their outputs.
    Gated(Activation),
    /// Add the bias and the residual, `[rows, outputs]`.
    Residual(&'a B),
}

/// The heads of an attention layer. Q, K and V have C = `heads * head_size` columns each, head after head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// H
    pub heads: usize,
    /// D
    pub head_size: usize,
}

/// The device's measured peak rates: the two limits of the roofline model (Williams, Waterman, Patterson 2009).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roofline {
    /// Operations per second in the GEMMs of linear layers. A multiplication and an addition are two operations.
    pub gemms: f64,
    /// Operations per second in attention. It is computed in bf16 or f16 if GEMMs are in 8 bits.
    pub attention: f64,
    /// The device's memory; `None` if operations are limited by computation, because they read mostly from caches.
    pub memory: Option<MemoryRoofline>,
}

/// Memory bandwidth, and the size of values in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryRoofline {
    /// Reads and writes together.
    pub bytes_per_second: f64,
    /// Bytes per activation.
    pub activation_bytes: usize,
    /// Bytes per weight.
    pub weight_bytes: usize,
}

/// A failure of a backend. The source is the error of the device's library.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// This batch failed. The next one may succeed.
    #[error("the backend failed: {0}")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The device has too little memory for the batch. The caller may retry with a smaller one.
    #[error("the device's memory is exhausted: {0}")]
    OutOfMemory(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The device is no longer usable by this process, for example after an illegal address or a bus error.
    #[error("the device is lost: {0}")]
    DeviceLost(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A model's forward pass over a batch or a part of it: returns the logits `[S]` in the batch's order.
pub type Graph<'a, B> = &'a (dyn Fn(&<B as Backend>::ExecContext, &Batch) -> Result<Vec<f32>, BackendError> + Sync);

/// The role of a linear layer in a model. It determines the precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerRole {
    /// In an encoder layer, where nearly all of the work is. Computed in the backend's configured precision.
    Encoder,
    /// As [`LayerRole::Encoder`], for use with [`Epilogue::Gated`]: `weight` is `[2F, inputs]`.
    Gated,
    /// In the classification head, with only S rows. Computed in f32.
    Head,
}

/// A device and the operations on it. Buffers are `[rows, columns]` and opaque to the graph.
pub trait Backend: Sized + Send + Sync + 'static {
    /// The execution context of one run of a graph: its stream, thread or workspace.
    type ExecContext;
    /// Activations on the device, `[rows, columns]`.
    type Buffer;
    /// [`EmbeddingTables`] on the device.
    type Embeddings: Send + Sync;
    /// A linear layer's weights on the device, in a layout that the backend chooses.
    type Linear: Send + Sync;
    /// [`NormWeights`] on the device.
    type Norm: Send + Sync;
    /// [`RotaryTable`] on the device.
    type Rotary: Send + Sync;

    /// Implementation, precision and device, for the start-up log.
    fn describe(&self) -> String;

    /// How many concurrent calls of [`Backend::run`] keep the device busy. More gain nothing.
    fn max_concurrent_batches(&self) -> usize {
        1
    }

    /// Loads the embedding tables to the device.
    ///
    /// # Errors
    /// The device fails or has too little memory. The same holds for every method below.
    fn embeddings(&self, tables: EmbeddingTables) -> Result<Self::Embeddings, BackendError>;
    /// Loads a linear layer to the device: `weight` is `[outputs, inputs]`, `bias` is `[outputs]`.
    fn linear(&self, weight: HostTensor, bias: HostTensor, role: LayerRole) -> Result<Self::Linear, BackendError>;
    /// Loads a layer norm to the device.
    fn norm(&self, weights: NormWeights) -> Result<Self::Norm, BackendError>;
    /// Loads a rotary position embedding to the device.
    fn rotary(&self, table: RotaryTable) -> Result<Self::Rotary, BackendError>;

    /// Runs `graph` over `batch`, as a whole or in parts split between sequences. Returns the logits `[S]` in the
    /// batch's order.
    fn run(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError>;
    /// As [`Backend::run`], but always calls `graph`. `run` may instead replay a recorded launch sequence (a CUDA
    /// graph).
    fn run_observed(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        self.run(batch, graph)
    }

    /// `norm(words[id] + positions[position] + types[type])` for each token, without the tables that the model does not
    /// have. Returns `[T, C]`.
    fn embed(
        &self,
        ctx: &Self::ExecContext,
        weights: &Self::Embeddings,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError>;
    /// A linear layer, `epilogue(x W^T)`, for the rows `outputs` of W. `x` is `[rows, inputs]`; returns `[rows,
    /// outputs.len()]`, or half as many columns with [`Epilogue::Gated`].
    fn apply(
        &self,
        ctx: &Self::ExecContext,
        weights: &Self::Linear,
        outputs: Range<usize>,
        x: &Self::Buffer,
        epilogue: Epilogue<'_, Self::Buffer>,
    ) -> Result<Self::Buffer, BackendError>;
    /// Layer norm of each row, in place.
    fn layer_norm(
        &self,
        ctx: &Self::ExecContext,
        weights: &Self::Norm,
        x: Self::Buffer,
    ) -> Result<Self::Buffer, BackendError>;
    /// Layer norm of each row, as the input of a linear layer of the encoder: `[rows, C]`. Keeps `x`, which is also the
    /// residual of a pre-norm layer.
    fn pre_norm(
        &self,
        ctx: &Self::ExecContext,
        weights: &Self::Norm,
        x: &Self::Buffer,
    ) -> Result<Self::Buffer, BackendError>;
    /// Applies the rotary position embedding to the first `heads` heads of each row, in place. `x` is `[T, columns]`.
    fn rotate(
        &self,
        ctx: &Self::ExecContext,
        rotary: &Self::Rotary,
        heads: usize,
        x: Self::Buffer,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError>;
    /// Bidirectional attention of each token to the tokens of its sequence; with a window, to those at a distance of at
    /// most `window` only. `qkv` is `[T, 3C]`; returns `[T, C]`.
    fn attention(
        &self,
        ctx: &Self::ExecContext,
        shape: AttentionShape,
        window: Option<usize>,
        qkv: &Self::Buffer,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError>;
    /// The same attention, of each sequence's first token (CLS) only. `q` is `[S, C]`, `kv` is `[T, 2C]`; returns `[S,
    /// C]`.
    fn cls_attention(
        &self,
        ctx: &Self::ExecContext,
        shape: AttentionShape,
        window: Option<usize>,
        q: &Self::Buffer,
        kv: &Self::Buffer,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError>;
    /// The row of each sequence's first token (CLS): `[T, columns]` to `[S, columns]`.
    fn gather_cls(
        &self,
        ctx: &Self::ExecContext,
        x: &Self::Buffer,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError>;
    /// The mean of each sequence's rows: `[T, columns]` to `[S, columns]`.
    fn mean_rows(&self, ctx: &Self::ExecContext, x: &Self::Buffer, batch: &Batch)
    -> Result<Self::Buffer, BackendError>;
    /// Copies the buffer's values to the host, row-major.
    fn download(&self, ctx: &Self::ExecContext, x: &Self::Buffer) -> Result<Vec<f32>, BackendError>;
}

/// A backend whose operations can be timed, for `rerankd bench --profile`.
pub trait Timed: Backend {
    /// A point in the sequence of operations of an execution context.
    type Event: Send;

    /// Records an event after the operations queued on `ctx` so far.
    ///
    /// # Errors
    /// The device fails.
    fn record_event(&self, ctx: &Self::ExecContext) -> Result<Self::Event, BackendError>;
    /// Seconds between two events of one execution context, times the share of the device that the context uses: 1/N if it
    /// uses one of N threads. Called after the run that recorded the events.
    ///
    /// # Errors
    /// The device fails.
    fn elapsed_seconds(&self, from: &Self::Event, to: &Self::Event) -> Result<f64, BackendError>;
    /// Measures the device's peak rates; `None` if the backend cannot. Must not be called during a run.
    ///
    /// # Errors
    /// The device fails.
    fn roofline(&self) -> Result<Option<Roofline>, BackendError> {
        Ok(None)
    }
}
