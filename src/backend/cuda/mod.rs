//! NVIDIA GPUs of compute capability 8.0 and later. GEMMs run on cuBLASLt, on Hopper some on a custom kernel; everything else runs on
//! the kernels in `kernels/`, which NVRTC compiles at start.
//!
//! | in reading order | |
//! |---|---|
//! | `options`, `dtype`, `error` | settings, number formats, the meaning of driver errors |
//! | `device`, `compile`, `cache` | opens a GPU, compiles the kernels, keeps results between starts |
//! | `batch_layout` | a batch as it is uploaded |
//! | `context`, `workspace`, `graphs`, `contexts` | the resources of a batch in flight, and the pool of them |
//! | `gemm`, `attention`, `cross_check` | kernels that are chosen by timing, after a numerical check |
//! | `elementwise` | norms, activations, gates, quantization, the classification head |
//! | `fp8`, `weights`, `launch`, `roofline` | fp8 scales, weights on the device, launch helpers, peak rates |
//!
//! A device has up to two execution contexts: while one batch computes, the host packs, uploads and launches the next, so the GPU
//! does not wait for the host. Buffer sizes are rounded and kernels read row counts from device memory, so a small batch can be
//! replayed from a CUDA graph that was captured for another batch of the same layout.
//!
//! Activations have one dtype, by default f16 (three more fraction bits than bf16, at the same speed); sums, norms and the head are
//! f32. The kernels in `kernels/` sum each row and sequence in an order that does not depend on the rest of the batch.
//! cuBLASLt's order may depend on the number of rows, so the last bits of a score depend on the batch composition, except in
//! batch-invariant mode.

#![allow(unsafe_code, reason = "unsafe is confined to this module: device memory and C libraries")]

mod attention;
mod batch_layout;
mod cache;
mod compile;
mod context;
mod contexts;
mod cross_check;
mod device;
mod dtype;
mod elementwise;
mod error;
mod fp8;
mod gemm;
mod graphs;
mod launch;
mod options;
mod roofline;
mod survey;
mod weights;
mod workspace;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use anyhow::Result;
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaEvent, CudaStream, PushKernelArg};

use self::attention::AttentionLauncher;
use self::cache::Cache;
pub use self::context::{Buffer, ExecContext};
use self::context::{BufferFormat, Rows, StagedBatch};
use self::contexts::ContextPool;
use self::device::Device;
pub use self::device::find_device;
pub use self::dtype::CudaDtype;
use self::fp8::{LayerGain, ValueBound};
use self::gemm::{GemmEpilogue, GemmOperands, GemmShape};
use self::launch::{
    GELU_ERF, GELU_TANH, IDENTITY, RELU, ROW_THREADS, SILU, device_address, function_number, launch, push,
};
pub use self::options::{CudaOptions, GemmChoice};
pub use self::survey::{memory_in_use, survey};
use self::weights::{DeviceTensor, Fp8Weight};
pub use self::weights::{Embeddings, Linear, Norm, Rotary};
use super::{
    Activation, AttentionShape, Backend, BackendError, EmbeddingTables, Epilogue, Graph, HostTensor, LayerRole,
    NormWeights, Roofline, RotaryTable, Timed,
};
use crate::batch::Batch;

/// A GPU, prepared for models of one shape.
#[derive(Debug)]
pub struct CudaBackend {
    device: Arc<Device>,
    attention: AttentionLauncher,
    local_attention: AttentionLauncher,
    options: CudaOptions,
    shape: AttentionShape,
    upload: Arc<CudaStream>,
    contexts: ContextPool,
}

impl CudaBackend {
    /// Opens GPU `ordinal` for models of this shape.
    ///
    /// # Errors
    /// No driver or device, a device that is too old, missing libraries, or an unsupported head size.
    pub fn open(ordinal: usize, shape: AttentionShape, options: CudaOptions) -> Result<Self> {
        anyhow::ensure!(
            matches!(shape.head_size, 32 | 64) && (shape.heads * shape.head_size).is_multiple_of(8),
            "a head size of {} is not supported on CUDA (supported: 32 and 64); use --device cpu",
            shape.head_size
        );
        let device = Arc::new(Device::open(ordinal, options.dtype, shape, Cache::new(options.cache.clone()))?);
        let attention = AttentionLauncher::choose(&device, &options, shape)?;
        let local_attention = AttentionLauncher::local(&device, options.dtype, shape);
        let upload = device.context.new_stream()?;
        let contexts = ContextPool::new(Arc::clone(&device), options.clone(), shape.heads * shape.head_size);
        Ok(Self { device, attention, local_attention, options, shape, upload, contexts })
    }

    fn upload(&self, bytes: &[u8]) -> Result<DeviceTensor, BackendError> {
        let bytes = self.upload.clone_htod(bytes)?;
        // Wait for the copy: the execution contexts read the tensor on other streams.
        self.upload.synchronize()?;
        Ok(DeviceTensor { at: device_address(&bytes, &self.upload), _bytes: bytes })
    }

    /// Uploads a tensor in the dtype of activations.
    fn upload_native(&self, tensor: &HostTensor) -> Result<DeviceTensor, BackendError> {
        self.upload(&self.options.dtype.encode(&tensor.data))
    }

    fn upload_f32(&self, tensor: &HostTensor) -> Result<DeviceTensor, BackendError> {
        self.upload(bytemuck::cast_slice(&tensor.data))
    }

    fn compute(&self, batch: &Batch, replay: bool, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        let longest = batch.ranges().map(|rows| rows.len()).max().unwrap_or(0);
        let run = || {
            let mut ctx = self.contexts.acquire(longest)?;
            let mut logits = Vec::with_capacity(batch.sequences());
            for part in batch_layout::split(batch, ctx.capacity()) {
                let sequences: Vec<usize> = part.collect();
                let partition = batch.select(&sequences);
                logits.extend(ctx.run(&partition, replay, |ctx| graph(ctx, &partition))?);
            }
            self.contexts.tune_once(&mut ctx)?;
            Ok(logits)
        };
        // After a panic the state of the context's stream is unknown, so the device counts as lost.
        catch_unwind(AssertUnwindSafe(run))
            .unwrap_or_else(|_| Err(BackendError::DeviceLost("a panic while a batch was launched".into())))
    }
}

fn unsupported(what: &str) -> BackendError {
    BackendError::Failed(format!("{what} is not supported on CUDA; use --device cpu").into())
}

impl Backend for CudaBackend {
    type ExecContext = ExecContext;
    type Buffer = Buffer;
    type Embeddings = Embeddings;
    type Linear = Linear;
    type Norm = Norm;
    type Rotary = Rotary;

    fn describe(&self) -> String {
        let invariant = if self.options.batch_invariant { ", batch-invariant" } else { "" };
        let short = self.contexts.capacity().filter(|&tokens| tokens < self.options.max_batch_tokens);
        let memory = short.map(|tokens| format!(", memory for {tokens} tokens at a time")).unwrap_or_default();
        let (dtype, name, ordinal) = (self.options.dtype.name(), &self.device.name, self.device.context.ordinal());
        format!("CUDA, {dtype}{invariant}, {name} (cuda:{ordinal}){memory}")
    }

    fn max_concurrent_batches(&self) -> usize {
        contexts::MAX_IN_FLIGHT
    }

    fn embeddings(&self, tables: EmbeddingTables) -> Result<Embeddings, BackendError> {
        Ok(Embeddings {
            words: self.upload_native(&tables.words)?,
            positions: tables.positions.map(|table| self.upload_native(&table)).transpose()?,
            types: tables.types.map(|table| self.upload_native(&table)).transpose()?,
            norm: self.norm(tables.norm)?,
        })
    }

    fn linear(&self, weight: HostTensor, bias: HostTensor, role: LayerRole) -> Result<Linear, BackendError> {
        let (outputs, inputs) = (weight.shape[0], weight.shape[1]);
        if role == LayerRole::Gated && self.options.dtype == CudaDtype::Fp8 {
            // The bound of gate times value is the product of two loose bounds; most values would round to zero.
            let problem = "--dtype fp8 does not support gated feed-forward layers; use --dtype f16";
            return Err(BackendError::Failed(problem.into()));
        }
        // A gated layer's result has half as many columns as the layer has outputs.
        let columns = if role == LayerRole::Gated { outputs / 2 } else { outputs };
        let multiple = if self.options.dtype == CudaDtype::Fp8 { 16 } else { 8 };
        if role != LayerRole::Head && (columns % multiple != 0 || inputs % multiple != 0) {
            return Err(unsupported(&format!(
                "a linear layer of {inputs} inputs and {outputs} outputs (not multiples of {multiple})"
            )));
        }
        let mut fp8 = None;
        let (weight, bias) = match role {
            LayerRole::Encoder if self.options.dtype == CudaDtype::Fp8 => {
                self.contexts.register_layer(outputs);
                let scale = fp8::weight_scale(&weight.data);
                fp8 = Some(Fp8Weight { scale, gain: LayerGain::of(&weight.data, &bias.data, inputs) });
                (self.upload(&fp8::encode(&weight.data, scale))?, self.upload_native(&bias)?)
            }
            LayerRole::Encoder | LayerRole::Gated => {
                self.contexts.register_layer(outputs);
                (self.upload_native(&weight)?, self.upload_native(&bias)?)
            }
            LayerRole::Head => (self.upload_f32(&weight)?, self.upload_f32(&bias)?),
        };
        Ok(Linear { weight, bias, outputs, inputs, role, fp8 })
    }

    fn norm(&self, weights: NormWeights) -> Result<Norm, BackendError> {
        Ok(Norm {
            weight: self.upload_f32(&weights.weight)?,
            bias: self.upload_f32(&weights.bias)?,
            eps: weights.eps as f32,
            bound: ValueBound::of_norm(&weights.weight.data, &weights.bias.data),
        })
    }

    fn rotary(&self, table: RotaryTable) -> Result<Rotary, BackendError> {
        let (cos, sin) = table.cos_sin();
        let upload = |values: &[f32]| self.upload(bytemuck::cast_slice(values));
        Ok(Rotary { cos: upload(&cos)?, sin: upload(&sin)? })
    }

    fn run(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        self.compute(batch, true, graph)
    }

    fn run_observed(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        self.compute(batch, false, graph)
    }

    fn embed(&self, ctx: &ExecContext, weights: &Embeddings, _: &Batch) -> Result<Buffer, BackendError> {
        let c = self.shape.heads * self.shape.head_size;
        let mut out = ctx.buffer(Rows::Tokens, c, self.options.dtype, BufferFormat::Native)?;
        let staged = ctx.staged();
        let layout = staged.layout;
        let [counts, ids, types, positions] =
            [layout.counts(), layout.ids(), layout.types(), layout.positions()].map(|index| staged.address(index));
        let Embeddings { words, norm, .. } = weights;
        let [table, type_table] =
            [&weights.positions, &weights.types].map(|table| table.as_ref().map_or(0, |table| table.at));
        let operand = self.operand_buffer(ctx, Rows::Tokens, norm)?;
        let (operand_at, scale) = (operand.as_ref().map_or(0, |operand| operand.at), norm.bound.scale());
        // SAFETY: embed_norm(counts, ids, types, positions, words, position_table, type_table, weight, bias, eps, out, operand,
        // scale). A table that the model does not have is a null pointer, which the kernel does not read. It writes
        // the operand only with fp8, where it is allocated.
        unsafe {
            let grid = self.row_grid(layout.token_rows);
            launch(&ctx.stream, &self.device.kernels.embed_norm, grid, ROW_THREADS, |arguments| {
                push(arguments, [&counts, &ids, &types, &positions, &words.at, &table, &type_table]);
                push(arguments, [&norm.weight.at, &norm.bias.at]);
                arguments.arg(&norm.eps);
                push(arguments, [&out.at, &operand_at]);
                arguments.arg(&scale);
            })
        }?;
        out.bound = operand.as_ref().and_then(|operand| operand.bound);
        out.operand = operand.map(Box::new);
        Ok(out)
    }

    fn apply(
        &self,
        ctx: &ExecContext,
        weights: &Linear,
        outputs: Range<usize>,
        x: &Buffer,
        epilogue: Epilogue<'_, Buffer>,
    ) -> Result<Buffer, BackendError> {
        if weights.role == LayerRole::Head {
            return match epilogue {
                Epilogue::Activation(activation) => self.head(ctx, weights, x, function_number(activation)),
                Epilogue::Bias => self.head(ctx, weights, x, IDENTITY),
                _ => Err(unsupported("this classification head")),
            };
        }
        if let Epilogue::Gated(activation) = epilogue {
            let both = self.apply(ctx, weights, outputs, x, Epilogue::Bias)?;
            return self.gate(ctx, &both, function_number(activation));
        }
        let dtype = self.options.dtype;
        let mut output = ctx.buffer(x.rows, outputs.len(), dtype, BufferFormat::Native)?;
        let (epilogue, residual, function) = match epilogue {
            Epilogue::Bias => (GemmEpilogue::Bias, None, None),
            Epilogue::Residual(residual) => (GemmEpilogue::BiasResidual, Some(residual), None),
            // cuBLASLt has only tanh GELU: if it runs the GEMM, erf GELU is a separate kernel afterwards.
            Epilogue::Activation(Activation::Gelu) if weights.fp8.is_none() => {
                (GemmEpilogue::BiasGelu, None, Some(GELU_ERF))
            }
            Epilogue::Activation(Activation::Gelu) => (GemmEpilogue::Bias, None, Some(GELU_ERF)),
            // In fp8, the kernel that quantizes the next GEMM's operand also applies the activation.
            Epilogue::Activation(Activation::GeluTanh) if weights.fp8.is_some() => {
                (GemmEpilogue::Bias, None, Some(GELU_TANH))
            }
            Epilogue::Activation(Activation::Relu) if weights.fp8.is_some() => (GemmEpilogue::Bias, None, Some(RELU)),
            Epilogue::Activation(Activation::GeluTanh) => (GemmEpilogue::BiasGeluTanh, None, None),
            Epilogue::Activation(Activation::Relu) => (GemmEpilogue::BiasRelu, None, None),
            Epilogue::Activation(Activation::Tanh) => return Err(unsupported("tanh in an encoder layer")),
            Epilogue::Activation(Activation::Silu) => (GemmEpilogue::Bias, None, Some(SILU)),
            Epilogue::Gated(_) => unreachable!("a gated layer is computed above"),
        };
        let operand = self.gemm_input(ctx, weights, x)?;
        let rows = ctx.staged().rows(x.rows);
        let shape = GemmShape { rows, outputs: outputs.len(), inputs: weights.inputs, epilogue };
        let operands = GemmOperands {
            x: operand.at,
            weight: weights.weight.at + (outputs.start * weights.inputs * dtype.operand_bytes()) as u64,
            bias: weights.bias.at + (outputs.start * dtype.bytes()) as u64,
            residual: residual.map_or(Ok(output.at), Buffer::native_address)?,
            output: output.at,
            alpha: operand.alpha,
        };
        let gelu_applied = ctx.gemms.launch(shape, operands)?;
        if let (Some(fp8), Some(bound)) = (&weights.fp8, x.bound) {
            let gemm_bound = fp8.gain.from(bound, outputs.len());
            output.bound = match residual {
                None => Some(gemm_bound),
                Some(residual) => residual.bound.map(|bound| gemm_bound.plus(bound)),
            };
        }
        match function.filter(|_| !gelu_applied) {
            None => Ok(output),
            Some(function) if weights.fp8.is_some() => self.quantize(ctx, &output, function),
            Some(function) => self.activate(ctx, &output, function).map(|()| output),
        }
    }

    fn layer_norm(&self, ctx: &ExecContext, weights: &Norm, mut x: Buffer) -> Result<Buffer, BackendError> {
        if x.format == BufferFormat::F32 {
            return self.head_norm(ctx, weights, x);
        }
        let from = x.native_address()?;
        self.norm_rows(ctx, weights, from, &mut x)?;
        Ok(x)
    }

    fn pre_norm(&self, ctx: &ExecContext, weights: &Norm, x: &Buffer) -> Result<Buffer, BackendError> {
        let mut out = ctx.buffer(x.rows, x.columns, self.options.dtype, BufferFormat::Native)?;
        self.norm_rows(ctx, weights, x.native_address()?, &mut out)?;
        Ok(out)
    }

    fn rotate(
        &self,
        ctx: &ExecContext,
        rotary: &Rotary,
        heads: usize,
        x: Buffer,
        _: &Batch,
    ) -> Result<Buffer, BackendError> {
        let at = x.native_address()?;
        let staged = ctx.staged();
        let layout = staged.layout;
        let [counts, positions] = [layout.counts(), layout.positions()].map(|index| staged.address(index));
        let (heads_in, columns) = (heads as u32, x.columns as u32);
        let vecs = layout.token_rows * heads * self.shape.head_size / 16;
        // SAFETY: rotate(counts, positions, cos, sin, heads, columns, x); the tables have a row for every position.
        unsafe {
            let grid = (vecs.div_ceil(256).min(16 * self.device.multiprocessors as usize), 1);
            launch(&ctx.stream, &self.device.kernels.rotate, grid, 256, |arguments| {
                push(arguments, [&counts, &positions, &rotary.cos.at, &rotary.sin.at]);
                arguments.arg(&heads_in).arg(&columns);
                push(arguments, [&at]);
            })
        }?;
        Ok(x)
    }

    fn attention(
        &self,
        ctx: &ExecContext,
        shape: AttentionShape,
        window: Option<usize>,
        qkv: &Buffer,
        _: &Batch,
    ) -> Result<Buffer, BackendError> {
        let c = shape.heads * shape.head_size;
        let mut out = ctx.buffer(Rows::Tokens, c, self.options.dtype, BufferFormat::Native)?;
        // Attention outputs are weighted means of rows of V, so the bound of values still holds.
        out.bound = qkv.bound.map(|bound| bound.with_columns(c));
        let from = qkv.native_address()?;
        let staged = ctx.staged();
        let (layout, upload) = (staged.layout, staged.address(0));
        let kernel = if window.is_some() { &self.local_attention } else { &self.attention };
        // SAFETY: `upload` is the staged batch; both buffers have its rows.
        unsafe { kernel.launch(&ctx.stream, (layout, upload), shape, shape.heads, window, (from, out.at)) }?;
        Ok(out)
    }

    fn cls_attention(
        &self,
        ctx: &ExecContext,
        shape: AttentionShape,
        window: Option<usize>,
        q: &Buffer,
        kv: &Buffer,
        _: &Batch,
    ) -> Result<Buffer, BackendError> {
        let c = shape.heads * shape.head_size;
        let mut out = ctx.buffer(Rows::Sequences, c, self.options.dtype, BufferFormat::Native)?;
        out.bound = kv.bound.map(|bound| bound.with_columns(c));
        let (q, kv) = (q.native_address()?, kv.native_address()?);
        let staged = ctx.staged();
        let layout = staged.layout;
        let [counts, offsets] = [layout.counts(), layout.offsets()].map(|index| staged.address(index));
        let scale = (shape.head_size as f32).sqrt().recip();
        // The first token is at position 0, so it attends to the first keys.
        let keys = window.map_or(u32::MAX, |window| window as u32 + 1);
        // SAFETY: cls_attention(counts, offsets, q, kv, out, scale, keys).
        unsafe {
            let grid = (layout.sequence_rows, shape.heads);
            launch(&ctx.stream, &self.device.kernels.cls_attention, grid, 128, |arguments| {
                push(arguments, [&counts, &offsets, &q, &kv, &out.at]);
                arguments.arg(&scale).arg(&keys);
            })
        }?;
        Ok(out)
    }

    fn gather_cls(&self, ctx: &ExecContext, x: &Buffer, _: &Batch) -> Result<Buffer, BackendError> {
        let mut out = ctx.buffer(Rows::Sequences, x.columns, self.options.dtype, BufferFormat::Native)?;
        out.bound = x.bound;
        let from = x.native_address()?;
        let staged = ctx.staged();
        let layout = staged.layout;
        let [counts, offsets] = [layout.counts(), layout.offsets()].map(|index| staged.address(index));
        let chunks = layout.sequence_rows * x.columns * self.options.dtype.bytes() / 16;
        // SAFETY: gather_cls(counts, offsets, x, out).
        unsafe {
            let grid = (chunks.div_ceil(256).min(8 * self.device.multiprocessors as usize), 1);
            launch(&ctx.stream, &self.device.kernels.gather_cls, grid, 256, |arguments| {
                push(arguments, [&counts, &offsets, &from, &out.at]);
            })
        }?;
        Ok(out)
    }

    fn mean_rows(&self, ctx: &ExecContext, x: &Buffer, _: &Batch) -> Result<Buffer, BackendError> {
        let out = ctx.buffer(Rows::Sequences, x.columns, self.options.dtype, BufferFormat::Native)?;
        let from = x.native_address()?;
        let staged = ctx.staged();
        let layout = staged.layout;
        let [counts, offsets] = [layout.counts(), layout.offsets()].map(|index| staged.address(index));
        // SAFETY: mean_rows(counts, offsets, x, out).
        unsafe {
            let grid = (layout.sequence_rows, x.columns.div_ceil(64));
            launch(&ctx.stream, &self.device.kernels.mean_rows, grid, 256, |arguments| {
                push(arguments, [&counts, &offsets, &from, &out.at]);
            })
        }?;
        Ok(out)
    }

    fn download(&self, ctx: &ExecContext, x: &Buffer) -> Result<Vec<f32>, BackendError> {
        let staged = ctx.staged();
        let length = row_count(&staged, x) * x.columns;
        if x.format == BufferFormat::F32 {
            return ctx.download(x.at, length);
        }
        let from = x.native_address()?;
        let converted = ctx.buffer(x.rows, x.columns, self.options.dtype, BufferFormat::F32)?;
        let (count, columns) = (staged.count(x.rows), x.columns as u32);
        // SAFETY: to_f32(rows, columns, x, out).
        unsafe {
            let grid = ((staged.rows(x.rows) * x.columns).div_ceil(256).min(1024), 1);
            launch(&ctx.stream, &self.device.kernels.to_f32, grid, 256, |arguments| {
                push(arguments, [&count]);
                arguments.arg(&columns);
                push(arguments, [&from, &converted.at]);
            })
        }?;
        ctx.download(converted.at, length)
    }
}

impl Timed for CudaBackend {
    type Event = CudaEvent;

    fn record_event(&self, ctx: &ExecContext) -> Result<CudaEvent, BackendError> {
        Ok(ctx.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?)
    }

    fn elapsed_seconds(&self, from: &CudaEvent, to: &CudaEvent) -> Result<f64, BackendError> {
        Ok(device::seconds_between(from, to)?)
    }

    fn roofline(&self) -> Result<Option<Roofline>, BackendError> {
        let ctx = self.contexts.acquire(1)?;
        roofline::measure(&ctx, self.options.dtype).map(Some)
    }
}

fn row_count(staged: &StagedBatch, x: &Buffer) -> usize {
    match x.rows {
        Rows::Tokens => staged.tokens,
        Rows::Sequences => staged.sequences,
    }
}
