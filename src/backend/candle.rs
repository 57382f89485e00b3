//! The portable backend, on candle tensors: f32 on the CPU, or on candle's CUDA kernels with the feature `candle-cuda`.
//!
//! It is written to be correct and readable; the CPU backend is tested against it. candle splits each GEMM over the threads of a
//! `rayon` pool.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::{layer_norm, softmax_last_dim};
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::{
    Activation, AttentionShape, Backend, BackendError, EmbeddingTables, Epilogue, Graph, HostTensor, LayerRole,
    NormWeights, RotaryTable, Timed,
};
use crate::batch::Batch;

/// Query rows per block of attention. The scores of a block are `[H, 256, L]` f32 for a sequence of L tokens: 128 MiB
/// at 16 heads and 8192 tokens, where the whole matrix would be 4 GiB. Blocks start at the sequence's first row, so
/// results do not depend on the batch.
const ATTENTION_ROWS: usize = 256;

/// The candle backend on one device.
#[derive(Debug, Clone)]
pub struct CandleBackend {
    device: Device,
    /// The threads of candle's GEMMs. candle's default is one per physical core, whatever the container's quota is.
    pool: Arc<ThreadPool>,
}

/// [`EmbeddingTables`] as candle tensors.
#[derive(Debug)]
pub struct Embeddings {
    words: Tensor,
    positions: Option<Tensor>,
    types: Option<Tensor>,
    norm: Norm,
}

/// A linear layer as candle tensors: W^T `[inputs, outputs]`, contiguous, and the bias `[outputs]`.
#[derive(Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
}

/// A layer norm as candle tensors, both `[C]`.
#[derive(Debug)]
pub struct Norm {
    weight: Tensor,
    bias: Tensor,
    eps: f32,
}

/// A rotary position embedding as candle tensors, both `[positions, D / 2]`.
#[derive(Debug)]
pub struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

/// Erf GELU of each value, on the CPU: the reference for kernels that apply it in their epilogue.
///
/// # Errors
/// candle fails.
#[cfg(feature = "cuda")]
pub(in crate::backend) fn gelu_erf(values: Vec<f32>) -> Result<Vec<f32>, BackendError> {
    Ok(Tensor::new(values, &Device::Cpu)?.gelu_erf()?.to_vec1()?)
}

impl CandleBackend {
    /// f32 on the CPU, on `threads` threads.
    ///
    /// # Errors
    /// The operating system cannot create the threads.
    pub fn cpu(threads: usize) -> Result<Self, BackendError> {
        Self::on(Device::Cpu, threads)
    }

    /// f32 on a CUDA device through candle's own kernels.
    ///
    /// # Errors
    /// There is no such CUDA device, or the operating system cannot create the threads.
    #[cfg(feature = "candle-cuda")]
    pub fn cuda(ordinal: usize, threads: usize) -> Result<Self, BackendError> {
        Self::on(Device::new_cuda(ordinal)?, threads)
    }

    fn on(device: Device, threads: usize) -> Result<Self, BackendError> {
        let pool = ThreadPoolBuilder::new().num_threads(threads.max(1)).build();
        Ok(Self { device, pool: Arc::new(pool.map_err(|error| BackendError::Failed(Box::new(error)))?) })
    }

    fn upload(&self, tensor: HostTensor) -> Result<Tensor, BackendError> {
        Ok(Tensor::from_vec(tensor.data, tensor.shape, &self.device)?)
    }

    fn indices(&self, values: &[u32]) -> Result<Tensor, BackendError> {
        Ok(Tensor::new(values, &self.device)?)
    }

    /// `softmax(q k^T / sqrt(D)) v` for one sequence. `q` is `[Lq, C]`, the first Lq of its L tokens; `k` and `v` are `[L,
    /// C]`. With a window, a query attends to keys at a distance of at most `window`. Returns `[Lq, C]`.
    fn attend(
        shape: AttentionShape,
        window: Option<usize>,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let AttentionShape { heads, head_size } = shape;
        let by_head = |x: &Tensor| x.reshape(((), heads, head_size))?.transpose(0, 1)?.contiguous(); // [H, L, D]
        let (q, k, v) = (by_head(&q.contiguous()?)?, by_head(&k.contiguous()?)?, by_head(&v.contiguous()?)?);
        let k = k.transpose(1, 2)?.contiguous()?; // [H, D, L]
        let q = (q / (head_size as f64).sqrt())?;
        let (rows, length) = (q.dim(1)?, k.dim(2)?);
        let mut blocks = Vec::with_capacity(rows.div_ceil(ATTENTION_ROWS));
        for start in (0..rows).step_by(ATTENTION_ROWS) {
            let queries = start..rows.min(start + ATTENTION_ROWS);
            let q = q.narrow(1, start, queries.len())?.contiguous()?;
            let scores = match window {
                None => q.matmul(&k)?,
                Some(window) => {
                    let keys = start.saturating_sub(window)..length.min(queries.end + window);
                    let k = k.narrow(2, keys.start, keys.len())?.contiguous()?;
                    let visible =
                        |query: usize, key: usize| if query.abs_diff(key) <= window { 0.0 } else { f32::NEG_INFINITY };
                    let keys = &keys;
                    let mask: Vec<f32> =
                        queries.clone().flat_map(|query| keys.clone().map(move |key| visible(query, key))).collect();
                    let mask = Tensor::from_vec(mask, (queries.len(), keys.len()), q.device())?;
                    q.matmul(&k)?.broadcast_add(&mask)?
                }
            };
            let weights = softmax_last_dim(&scores)?;
            let v = match window {
                None => v.clone(),
                Some(window) => v.narrow(1, start.saturating_sub(window), scores.dim(2)?)?.contiguous()?,
            };
            blocks.push(weights.matmul(&v)?);
        }
        Tensor::cat(&blocks, 1)?.transpose(0, 1)?.contiguous()?.reshape((rows, heads * head_size))
    }
}

impl Backend for CandleBackend {
    type ExecContext = ();
    type Buffer = Tensor;
    type Embeddings = Embeddings;
    type Linear = Linear;
    type Norm = Norm;
    type Rotary = Rotary;

    fn describe(&self) -> String {
        format!("candle, f32, {}", if self.device.is_cpu() { "CPU" } else { "CUDA" })
    }

    fn embeddings(&self, tables: EmbeddingTables) -> Result<Embeddings, BackendError> {
        Ok(Embeddings {
            words: self.upload(tables.words)?,
            positions: tables.positions.map(|table| self.upload(table)).transpose()?,
            types: tables.types.map(|table| self.upload(table)).transpose()?,
            norm: self.norm(tables.norm)?,
        })
    }

    fn linear(&self, weight: HostTensor, bias: HostTensor, _: LayerRole) -> Result<Linear, BackendError> {
        Ok(Linear { weight: self.upload(weight)?.t()?.contiguous()?, bias: self.upload(bias)? })
    }

    fn norm(&self, weights: NormWeights) -> Result<Norm, BackendError> {
        Ok(Norm { weight: self.upload(weights.weight)?, bias: self.upload(weights.bias)?, eps: weights.eps as f32 })
    }

    fn rotary(&self, table: RotaryTable) -> Result<Rotary, BackendError> {
        let shape = vec![table.positions, table.frequencies.len()];
        let (cos, sin) = table.cos_sin();
        let upload = |data| self.upload(HostTensor { shape: shape.clone(), data });
        Ok(Rotary { cos: upload(cos)?, sin: upload(sin)? })
    }

    fn run(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        self.pool.install(|| graph(&(), batch))
    }

    fn embed(&self, (): &(), weights: &Embeddings, batch: &Batch) -> Result<Tensor, BackendError> {
        let mut sum = weights.words.index_select(&self.indices(batch.ids())?, 0)?;
        for (table, indices) in [(&weights.types, batch.type_ids()), (&weights.positions, batch.positions())] {
            if let Some(table) = table {
                sum = (sum + table.index_select(&self.indices(indices)?, 0)?)?;
            }
        }
        self.layer_norm(&(), &weights.norm, sum)
    }

    fn apply(
        &self,
        (): &(),
        weights: &Linear,
        outputs: Range<usize>,
        x: &Tensor,
        epilogue: Epilogue<'_, Tensor>,
    ) -> Result<Tensor, BackendError> {
        let weight = weights.weight.narrow(1, outputs.start, outputs.len())?;
        let bias = weights.bias.narrow(0, outputs.start, outputs.len())?;
        let y = matmul(x, &weight)?.broadcast_add(&bias)?;
        Ok(match epilogue {
            Epilogue::Bias => y,
            Epilogue::Activation(activation) => activate(activation, &y)?,
            Epilogue::Gated(activation) => {
                let columns = y.dim(1)? / 2;
                (activate(activation, &y.narrow(1, 0, columns)?.contiguous()?)? * y.narrow(1, columns, columns)?)?
            }
            Epilogue::Residual(residual) => (y + residual)?,
        })
    }

    fn layer_norm(&self, (): &(), weights: &Norm, x: Tensor) -> Result<Tensor, BackendError> {
        Ok(layer_norm(&x, &weights.weight, &weights.bias, weights.eps)?)
    }

    fn pre_norm(&self, (): &(), weights: &Norm, x: &Tensor) -> Result<Tensor, BackendError> {
        self.layer_norm(&(), weights, x.clone())
    }

    fn rotate(&self, (): &(), rotary: &Rotary, heads: usize, x: Tensor, batch: &Batch) -> Result<Tensor, BackendError> {
        let (tokens, columns) = x.dims2()?;
        let half = rotary.cos.dim(1)?;
        let positions = self.indices(batch.positions())?;
        let angle = |table: &Tensor| table.index_select(&positions, 0)?.reshape((tokens, 1, half));
        let (cos, sin) = (angle(&rotary.cos)?, angle(&rotary.sin)?);
        let rotated = x.narrow(1, 0, heads * 2 * half)?.contiguous()?.reshape((tokens, heads, 2 * half))?;
        let (a, b) = (rotated.narrow(2, 0, half)?, rotated.narrow(2, half, half)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let rotated = Tensor::cat(&[first, second], 2)?.reshape((tokens, heads * 2 * half))?;
        let rest = x.narrow(1, heads * 2 * half, columns - heads * 2 * half)?.contiguous()?;
        Ok(Tensor::cat(&[rotated, rest], 1)?)
    }

    fn attention(
        &self,
        (): &(),
        shape: AttentionShape,
        window: Option<usize>,
        qkv: &Tensor,
        batch: &Batch,
    ) -> Result<Tensor, BackendError> {
        let c = shape.heads * shape.head_size;
        let mut contexts = Vec::with_capacity(batch.sequences());
        for rows in batch.ranges() {
            let own = qkv.narrow(0, rows.start, rows.len())?;
            let part = |i: usize| own.narrow(D::Minus1, i * c, c);
            contexts.push(Self::attend(shape, window, &part(0)?, &part(1)?, &part(2)?)?);
        }
        Ok(Tensor::cat(&contexts, 0)?)
    }

    fn cls_attention(
        &self,
        (): &(),
        shape: AttentionShape,
        window: Option<usize>,
        q: &Tensor,
        kv: &Tensor,
        batch: &Batch,
    ) -> Result<Tensor, BackendError> {
        let c = shape.heads * shape.head_size;
        let mut contexts = Vec::with_capacity(batch.sequences());
        for (sequence, rows) in batch.ranges().enumerate() {
            let own = kv.narrow(0, rows.start, rows.len())?;
            let part = |i: usize| own.narrow(D::Minus1, i * c, c);
            contexts.push(Self::attend(shape, window, &q.narrow(0, sequence, 1)?, &part(0)?, &part(1)?)?);
        }
        Ok(Tensor::cat(&contexts, 0)?)
    }

    fn gather_cls(&self, (): &(), x: &Tensor, batch: &Batch) -> Result<Tensor, BackendError> {
        Ok(x.index_select(&self.indices(&batch.cls_rows())?, 0)?)
    }

    fn mean_rows(&self, (): &(), x: &Tensor, batch: &Batch) -> Result<Tensor, BackendError> {
        let means = batch.ranges().map(|rows| x.narrow(0, rows.start, rows.len())?.mean_keepdim(0));
        Ok(Tensor::cat(&means.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
    }

    fn download(&self, (): &(), x: &Tensor) -> Result<Vec<f32>, BackendError> {
        Ok(x.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    }
}

impl Timed for CandleBackend {
    type Event = Instant;

    fn record_event(&self, (): &()) -> Result<Instant, BackendError> {
        self.device.synchronize()?;
        Ok(Instant::now())
    }

    fn elapsed_seconds(&self, from: &Instant, to: &Instant) -> Result<f64, BackendError> {
        Ok(to.duration_since(*from).as_secs_f64())
    }
}

fn activate(activation: Activation, x: &Tensor) -> candle_core::Result<Tensor> {
    match activation {
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::Relu => x.relu(),
        Activation::Silu => x.silu(),
        Activation::Tanh => x.tanh(),
    }
}

/// `x weight`, batch-invariant: each row of the result is bitwise the same whatever the other rows are.
///
/// The crate gemm, which candle uses, has separate kernels for a single row and for a single column, which sum in
/// another order. So a single row is duplicated first, and a single column is computed as a sum of element-wise
/// products.
fn matmul(x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    if weight.dim(1)? == 1 {
        return x.broadcast_mul(&weight.t()?)?.sum_keepdim(D::Minus1);
    }
    if x.dim(0)? == 1 {
        return Tensor::cat(&[x, x], 0)?.matmul(weight)?.narrow(0, 0, 1);
    }
    x.matmul(weight)
}

impl From<candle_core::Error> for BackendError {
    fn from(error: candle_core::Error) -> Self {
        Self::Failed(Box::new(error))
    }
}
