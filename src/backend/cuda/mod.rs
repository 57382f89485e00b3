//! NVIDIA cards from compute capability 8.0 on: gemms by cuBLASLt, all else, and on Hopper some gemms, by kernels of our own
//! that NVRTC compiles at start.
//!
//! In reading order: `device` finds the driver and compiles `kernels.cu`; `layout` is what a batch looks like on the device; `attention`
//! chooses between two of the kernels (`agreement`: whether they compute the same); `ctx` is what a batch in flight has to itself,
//! of which `workspace` divides the memory; `contexts` are a device's; `gemms` are cuBLASLt's, or of `own_product` where that is faster,
//! as `tuning_store` remembers; `dtype` is what all of these compute in, and `fp8` its numbers of fp8 bits; `failure` says what an
//! error means. This file puts them behind [`Backend`].
//!
//! Two contexts a device: while one batch computes, the thread of the other packs, uploads and launches the next, so the device does not
//! wait for the host. Every buffer is of rounded sizes and counts are read from the device's own memory, so a small batch is
//! replayed from a graph that was captured for another.
//!
//! Activations are of one dtype type throughout, f16 by default (three bits more than bf16, at the same speed); sums, norms and
//! the head are f32. The kernels sum each row and each sequence in an order of its own. cuBLASLt may choose another order for
//! another number of rows, so a score's last bits depend on its company, but in the invariant mode.

#![allow(unsafe_code, reason = "its address: a device's memory, and libraries in C")]

mod attention;
mod batch_layout;
mod cache;
mod compile;
mod context;
mod contexts;
mod cross_check;
mod device;
mod dtype;
mod error;
mod fp8;
mod gemm;
mod launch;
mod options;
mod workspace;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use anyhow::Result;
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, PushKernelArg};

use self::attention::Attention;
use self::cache::Cache;
pub use self::context::{Buffer, ExecContext};
use self::context::{Rows, Staged, StorageFormat};
use self::contexts::ContextPool;
use self::device::Device;
pub use self::device::find_device;
pub use self::dtype::CudaDtype;
use self::fp8::{LayerGain, ValueBound};
use self::gemm::cublaslt::{GemmEpilogue, GemmOperands, GemmShape};
use self::launch::{GELU_ERF, GELU_TANH, IDENTITY, RELU, ROW_THREADS, device_address, launch, push};
pub use self::options::{CudaOptions, GemmChoice};
use super::{
    Activation, AttentionShape, Backend, BackendError, EmbeddingTables, Epilogue, Graph, HostTensor, LayerRole,
    NormWeights, Roofline, Timed,
};
use crate::batch::Batch;

/// A device with a model's weights on it.
#[derive(Debug)]
pub struct CudaBackend {
    device: Arc<Device>,
    attention: Attention,
    options: CudaOptions,
    shape: AttentionShape,
    upload: Arc<CudaStream>,
    contexts: ContextPool,
}

/// Weights on the device: bytes, and where they are.
#[derive(Debug)]
struct Weights {
    at: u64,
    _bytes: CudaSlice<u8>,
}

/// Embedding tables on the device, of the dtype.
#[derive(Debug)]
pub struct Embeddings {
    words: Weights,
    positions: Weights,
    types: Weights,
    norm: Norm,
}

/// A linear layer on the device: of the dtype in an encoder layer, f32 in the head.
#[derive(Debug)]
pub struct Linear {
    weight: Weights,
    bias: Weights,
    outputs: usize,
    inputs: usize,
    role: LayerRole,
    fp8: Option<Fp8Weight>,
}

/// What is to know of a weight that is stored as E4M3.
#[derive(Debug)]
struct Fp8Weight {
    scale: f32,
    gain: LayerGain,
}

/// What a product multiplies, and what with, that it be undone.
struct Operand {
    at: u64,
    alpha: f32,
    /// Keeps what was made for this product alone until it is launched.
    _made: Option<Buffer>,
}

/// A layer norm on the device, f32.
#[derive(Debug)]
pub struct Norm {
    weight: Weights,
    bias: Weights,
    eps: f32,
    bound: ValueBound,
}

impl CudaBackend {
    /// Device `ordinal` for models of this shape.
    ///
    /// # Errors
    /// No driver, no such device or one that is too old, libraries that are not there.
    pub fn open(ordinal: usize, shape: AttentionShape, options: CudaOptions) -> Result<Self> {
        anyhow::ensure!(
            matches!(shape.head_size, 32 | 64) && (shape.heads * shape.head_size).is_multiple_of(8),
            "attention heads of {} values are not supported on CUDA (32 and 64 are); use --device cpu",
            shape.head_size
        );
        let device = Arc::new(Device::open(ordinal, options.dtype, shape, Cache::new(options.cache.clone()))?);
        let attention = Attention::choose(&device, &options, shape)?;
        let upload = device.context.new_stream()?;
        let contexts = ContextPool::new(Arc::clone(&device), options.clone(), shape.heads * shape.head_size);
        Ok(Self { device, attention, options, shape, upload, contexts })
    }

    fn upload(&self, bytes: &[u8]) -> Result<Weights, BackendError> {
        let bytes = self.upload.clone_htod(bytes)?;
        // ContextPool read on streams of their own.
        self.upload.synchronize()?;
        Ok(Weights { at: device_address(&bytes, &self.upload), _bytes: bytes })
    }

    fn upload_elements(&self, tensor: &HostTensor) -> Result<Weights, BackendError> {
        self.upload(&self.options.dtype.encode(&tensor.data))
    }

    fn upload_exact(&self, tensor: &HostTensor) -> Result<Weights, BackendError> {
        self.upload(bytemuck::cast_slice(&tensor.data))
    }

    fn compute(&self, batch: &Batch, replay: bool, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        let longest = batch.ranges().map(|rows| rows.len()).max().unwrap_or(0);
        let run = || {
            let mut ctx = self.contexts.take(longest)?;
            let mut logits = Vec::with_capacity(batch.sequences());
            for part in batch_layout::split(batch, ctx.capacity()) {
                let sequences: Vec<usize> = part.collect();
                let piece = batch.select(&sequences);
                logits.extend(ctx.run(&piece, replay, |ctx| graph(ctx, &piece))?);
            }
            self.contexts.tune_once(&mut ctx)?;
            Ok(logits)
        };
        // Nobody knows what a panic has left on the ctx's stream.
        catch_unwind(AssertUnwindSafe(run))
            .unwrap_or_else(|_| Err(BackendError::DeviceLost("a panic while a batch was launched".into())))
    }

    /// Blocks for a kernel that takes a row a warp and strides over the rows: no more than the device runs at once.
    fn row_grid(&self, rows: usize) -> (usize, usize) {
        let warps = ROW_THREADS as usize / 32;
        (rows.div_ceil(warps).min(8 * self.device.multiprocessors as usize), 1)
    }

    /// A product's operand: what `function` makes of the values, in E4M3.
    fn quantize(&self, ctx: &ExecContext, x: &Buffer, function: u32) -> Result<Buffer, BackendError> {
        let (Some(bound), Some(kernel)) = (x.bound, &self.device.kernels.quantize) else {
            return Err(unsupported("a product of values without a bound"));
        };
        let scale = bound.scale();
        let mut out = ctx.buffer(x.rows, x.columns, self.options.dtype, StorageFormat::E4m3 { scale })?;
        out.bound = x.bound;
        let staged = ctx.staged();
        let (count, columns, from) = (staged.count(x.rows), x.columns as u32, x.elements()?);
        let grid = (staged.rows(x.rows) * x.columns / 8).div_ceil(256).min(16 * self.device.multiprocessors as usize);
        // SAFETY: quantize(rows, columns, function, x, out, scale).
        unsafe {
            launch(&ctx.stream, kernel, (grid, 1), 256, |arguments| {
                push(arguments, [&count]);
                arguments.arg(&columns).arg(&function);
                push(arguments, [&from, &out.at]);
                arguments.arg(&scale);
            })
        }?;
        Ok(out)
    }

    /// `x` as this layer multiplies it.
    fn operand(&self, ctx: &ExecContext, weights: &Linear, x: &Buffer) -> Result<Operand, BackendError> {
        let Some(fp8) = &weights.fp8 else {
            return Ok(Operand { at: x.elements()?, alpha: 1.0, _made: None });
        };
        let made = match (x.format, &x.operand) {
            (StorageFormat::E4m3 { .. }, _) | (_, Some(_)) => None,
            // Attention's context, and first rows. Attention could store its own.
            _ => Some(self.quantize(ctx, x, IDENTITY)?),
        };
        let operand = made.as_ref().or(x.operand.as_deref()).unwrap_or(x);
        let StorageFormat::E4m3 { scale } = operand.format else { return Err(unsupported("this operand")) };
        Ok(Operand { at: operand.at, alpha: 1.0 / (scale * fp8.scale), _made: made })
    }

    /// Room for what a norm makes of rows, beside the rows themselves: the next product's operand, where that is of E4M3.
    fn room_for_operand(&self, ctx: &ExecContext, rows: Rows, norm: &Norm) -> Result<Option<Buffer>, BackendError> {
        if self.options.dtype != CudaDtype::Fp8 {
            return Ok(None);
        }
        let c = self.shape.heads * self.shape.head_size;
        let mut room = ctx.buffer(rows, c, CudaDtype::Fp8, StorageFormat::E4m3 { scale: norm.bound.scale() })?;
        room.bound = Some(norm.bound);
        Ok(Some(room))
    }

    /// Applies a function to a buffer in place, by its number in `kernels.cu`.
    fn activate(&self, ctx: &ExecContext, x: &Buffer, function: u32) -> Result<(), BackendError> {
        let staged = ctx.staged();
        let (count, columns) = (staged.count(x.rows), x.columns as u32);
        let grid = (staged.rows(x.rows) * x.columns / 8).div_ceil(256).min(16 * self.device.multiprocessors as usize);
        // SAFETY: activate(rows, columns, function, x).
        unsafe {
            launch(&ctx.stream, &self.device.kernels.activate, (grid, 1), 256, |arguments| {
                push(arguments, [&count]);
                arguments.arg(&columns).arg(&function);
                push(arguments, [&x.at]);
            })
        }
    }

    /// The head's layers, in f32: `tanh` over C outputs, then one output.
    fn head(&self, ctx: &ExecContext, weights: &Linear, x: &Buffer, tanh: bool) -> Result<Buffer, BackendError> {
        let c = self.shape.heads * self.shape.head_size;
        let kernels = &self.device.kernels;
        let (kernel, outputs) = match (tanh, weights.outputs, x.format) {
            (true, outputs, StorageFormat::Native) if outputs == c && weights.inputs == c => (&kernels.head_dense, c),
            (false, 1, StorageFormat::F32) if weights.inputs == c => (&kernels.head_out, 1),
            _ => return Err(unsupported("this classification head")),
        };
        let out = ctx.buffer(x.rows, outputs, self.options.dtype, StorageFormat::F32)?;
        let staged = ctx.staged();
        let count = staged.count(x.rows);
        let grid = (staged.rows(x.rows) * outputs).div_ceil(8).min(16 * self.device.multiprocessors as usize);
        // SAFETY: head_dense and head_out(rows, x, weight, bias, out).
        unsafe {
            launch(&ctx.stream, kernel, (grid, 1), ROW_THREADS, |arguments| {
                push(arguments, [&count, &x.at, &weights.weight.at, &weights.bias.at, &out.at]);
            })
        }?;
        Ok(out)
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

    fn describe(&self) -> String {
        let invariant = if self.options.batch_invariant { ", batch-invariant" } else { "" };
        let short = self.contexts.capacity().filter(|&tokens| tokens < self.options.max_batch_tokens);
        let memory = short.map(|tokens| format!(", memory for {tokens} tokens at a time")).unwrap_or_default();
        let (dtype, name, ordinal) = (self.options.dtype.name(), &self.device.name, self.device.context.ordinal());
        format!("CUDA, {dtype}{invariant}, {name} (cuda:{ordinal}){memory}")
    }

    fn max_concurrent_batches(&self) -> usize {
        contexts::IN_FLIGHT
    }

    fn embeddings(&self, tables: EmbeddingTables) -> Result<Embeddings, BackendError> {
        Ok(Embeddings {
            words: self.upload_elements(&tables.words)?,
            positions: self.upload_elements(&tables.positions)?,
            types: self.upload_elements(&tables.types)?,
            norm: self.norm(tables.norm)?,
        })
    }

    fn linear(&self, weight: HostTensor, bias: HostTensor, role: LayerRole) -> Result<Linear, BackendError> {
        let (outputs, inputs) = (weight.shape[0], weight.shape[1]);
        let multiple = if self.options.dtype == CudaDtype::Fp8 { 16 } else { 8 };
        if role == LayerRole::Encoder && (outputs % multiple != 0 || inputs % multiple != 0) {
            return Err(unsupported(&format!("a layer of {inputs} to {outputs} values, no multiples of {multiple},")));
        }
        let mut fp8 = None;
        let (weight, bias) = match role {
            LayerRole::Encoder if self.options.dtype == CudaDtype::Fp8 => {
                self.contexts.expect(outputs);
                let scale = fp8::weight_scale(&weight.data);
                fp8 = Some(Fp8Weight { scale, gain: LayerGain::of(&weight.data, &bias.data, inputs) });
                (self.upload(&fp8::encode(&weight.data, scale))?, self.upload_elements(&bias)?)
            }
            LayerRole::Encoder => {
                self.contexts.expect(outputs);
                (self.upload_elements(&weight)?, self.upload_elements(&bias)?)
            }
            LayerRole::Head => (self.upload_exact(&weight)?, self.upload_exact(&bias)?),
        };
        Ok(Linear { weight, bias, outputs, inputs, role, fp8 })
    }

    fn norm(&self, weights: NormWeights) -> Result<Norm, BackendError> {
        Ok(Norm {
            weight: self.upload_exact(&weights.weight)?,
            bias: self.upload_exact(&weights.bias)?,
            eps: weights.eps as f32,
            bound: ValueBound::of_norm(&weights.weight.data, &weights.bias.data),
        })
    }

    fn run(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        self.compute(batch, true, graph)
    }

    fn run_observed(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        self.compute(batch, false, graph)
    }

    fn embed(&self, ctx: &ExecContext, weights: &Embeddings, _: &Batch) -> Result<Buffer, BackendError> {
        let c = self.shape.heads * self.shape.head_size;
        let mut out = ctx.buffer(Rows::Tokens, c, self.options.dtype, StorageFormat::Native)?;
        let staged = ctx.staged();
        let layout = staged.layout;
        let [counts, ids, types, positions] =
            [layout.counts(), layout.ids(), layout.types(), layout.positions()].map(|place| staged.address(place));
        let Embeddings { words, positions: table, types: type_table, norm } = weights;
        let operand = self.room_for_operand(ctx, Rows::Tokens, norm)?;
        let (operand_at, scale) = (operand.as_ref().map_or(0, |operand| operand.at), norm.bound.scale());
        // SAFETY: embed_norm(counts, ids, types, positions, words, position_table, type_table, weight, bias, eps, out, operand,
        // scale). The operand is written where gemms are of E4M3, and then there is one.
        unsafe {
            let grid = self.row_grid(layout.token_rows);
            launch(&ctx.stream, &self.device.kernels.embed_norm, grid, ROW_THREADS, |arguments| {
                push(arguments, [&counts, &ids, &types, &positions, &words.at, &table.at, &type_table.at]);
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
                Epilogue::Activation(Activation::Tanh) => self.head(ctx, weights, x, true),
                Epilogue::Bias => self.head(ctx, weights, x, false),
                _ => Err(unsupported("this classification head")),
            };
        }
        let dtype = self.options.dtype;
        let mut output = ctx.buffer(x.rows, outputs.len(), dtype, StorageFormat::Native)?;
        let (epilogue, residual, function) = match epilogue {
            Epilogue::Bias => (GemmEpilogue::Bias, None, None),
            Epilogue::Residual(residual) => (GemmEpilogue::BiasResidual, Some(residual), None),
            // cuBLASLt's GELU is the tanh format: where the product is its, the one by erf is a kernel of its own.
            Epilogue::Activation(Activation::Gelu) if weights.fp8.is_none() => {
                (GemmEpilogue::BiasGelu, None, Some(GELU_ERF))
            }
            Epilogue::Activation(Activation::Gelu) => (GemmEpilogue::Bias, None, Some(GELU_ERF)),
            // The kernel that makes the next product's operand applies these along.
            Epilogue::Activation(Activation::GeluTanh) if weights.fp8.is_some() => {
                (GemmEpilogue::Bias, None, Some(GELU_TANH))
            }
            Epilogue::Activation(Activation::Relu) if weights.fp8.is_some() => (GemmEpilogue::Bias, None, Some(RELU)),
            Epilogue::Activation(Activation::GeluTanh) => (GemmEpilogue::BiasGeluTanh, None, None),
            Epilogue::Activation(Activation::Relu) => (GemmEpilogue::BiasRelu, None, None),
            Epilogue::Activation(Activation::Tanh) => return Err(unsupported("tanh in an encoder layer")),
        };
        let operand = self.operand(ctx, weights, x)?;
        let rows = ctx.staged().rows(x.rows);
        let shape = GemmShape { rows, outputs: outputs.len(), inputs: weights.inputs, epilogue };
        let operands = GemmOperands {
            x: operand.at,
            weight: weights.weight.at + (outputs.start * weights.inputs * dtype.operand_bytes()) as u64,
            bias: weights.bias.at + (outputs.start * dtype.bytes()) as u64,
            residual: residual.map_or(Ok(output.at), Buffer::elements)?,
            output: output.at,
            alpha: operand.alpha,
        };
        let gelu_applied = ctx.gemms.launch(shape, operands)?;
        if let (Some(fp8), Some(bound)) = (&weights.fp8, x.bound) {
            let product = fp8.gain.from(bound, outputs.len());
            output.bound = match residual {
                None => Some(product),
                Some(residual) => residual.bound.map(|bound| product.plus(bound)),
            };
        }
        match function.filter(|_| !gelu_applied) {
            None => Ok(output),
            Some(function) if weights.fp8.is_some() => self.quantize(ctx, &output, function),
            Some(function) => self.activate(ctx, &output, function).map(|()| output),
        }
    }

    fn layer_norm(&self, ctx: &ExecContext, weights: &Norm, mut x: Buffer) -> Result<Buffer, BackendError> {
        let staged = ctx.staged();
        let (count, at) = (staged.count(x.rows), x.elements()?);
        let operand = self.room_for_operand(ctx, x.rows, weights)?;
        let (operand_at, scale) = (operand.as_ref().map_or(0, |operand| operand.at), weights.bound.scale());
        // SAFETY: layer_norm(rows, x, weight, bias, eps, out, operand, scale), in place; the operand as in `embed`.
        unsafe {
            let grid = self.row_grid(staged.rows(x.rows));
            launch(&ctx.stream, &self.device.kernels.layer_norm, grid, ROW_THREADS, |arguments| {
                push(arguments, [&count, &at, &weights.weight.at, &weights.bias.at]);
                arguments.arg(&weights.eps);
                push(arguments, [&at, &operand_at]);
                arguments.arg(&scale);
            })
        }?;
        x.bound = operand.as_ref().and_then(|operand| operand.bound);
        x.operand = operand.map(Box::new);
        Ok(x)
    }

    fn attention(
        &self,
        ctx: &ExecContext,
        shape: AttentionShape,
        qkv: &Buffer,
        _: &Batch,
    ) -> Result<Buffer, BackendError> {
        let c = shape.heads * shape.head_size;
        let mut out = ctx.buffer(Rows::Tokens, c, self.options.dtype, StorageFormat::Native)?;
        // Weighted means of values.
        out.bound = qkv.bound.map(|bound| bound.narrowed(c));
        let from = qkv.elements()?;
        let staged = ctx.staged();
        let (layout, upload) = (staged.layout, staged.address(0));
        // SAFETY: the staged batch, and buffers of its rows.
        unsafe { self.attention.launch(&ctx.stream, layout, upload, shape, shape.heads, (from, out.at)) }?;
        Ok(out)
    }

    fn cls_attention(
        &self,
        ctx: &ExecContext,
        shape: AttentionShape,
        q: &Buffer,
        kv: &Buffer,
        _: &Batch,
    ) -> Result<Buffer, BackendError> {
        let c = shape.heads * shape.head_size;
        let mut out = ctx.buffer(Rows::Sequences, c, self.options.dtype, StorageFormat::Native)?;
        out.bound = kv.bound.map(|bound| bound.narrowed(c));
        let (q, kv) = (q.elements()?, kv.elements()?);
        let staged = ctx.staged();
        let layout = staged.layout;
        let [counts, offsets] = [layout.counts(), layout.offsets()].map(|place| staged.address(place));
        let scale = (shape.head_size as f32).sqrt().recip();
        // SAFETY: cls_attention(counts, offsets, q, kv, out, scale).
        unsafe {
            let grid = (layout.sequence_rows, shape.heads);
            launch(&ctx.stream, &self.device.kernels.cls_attention, grid, 128, |arguments| {
                push(arguments, [&counts, &offsets, &q, &kv, &out.at]);
                arguments.arg(&scale);
            })
        }?;
        Ok(out)
    }

    fn gather_cls(&self, ctx: &ExecContext, x: &Buffer, _: &Batch) -> Result<Buffer, BackendError> {
        let mut out = ctx.buffer(Rows::Sequences, x.columns, self.options.dtype, StorageFormat::Native)?;
        out.bound = x.bound;
        let from = x.elements()?;
        let staged = ctx.staged();
        let layout = staged.layout;
        let [counts, offsets] = [layout.counts(), layout.offsets()].map(|place| staged.address(place));
        let pieces = layout.sequence_rows * x.columns * self.options.dtype.bytes() / 16;
        // SAFETY: gather_cls(counts, offsets, x, out).
        unsafe {
            let grid = (pieces.div_ceil(256).min(8 * self.device.multiprocessors as usize), 1);
            launch(&ctx.stream, &self.device.kernels.gather_cls, grid, 256, |arguments| {
                push(arguments, [&counts, &offsets, &from, &out.at]);
            })
        }?;
        Ok(out)
    }

    fn download(&self, ctx: &ExecContext, x: &Buffer) -> Result<Vec<f32>, BackendError> {
        let staged = ctx.staged();
        let length = true_rows(&staged, x) * x.columns;
        if x.format == StorageFormat::F32 {
            return ctx.download(x.at, length);
        }
        let from = x.elements()?;
        let wide = ctx.buffer(x.rows, x.columns, self.options.dtype, StorageFormat::F32)?;
        let (count, columns) = (staged.count(x.rows), x.columns as u32);
        // SAFETY: to_f32(rows, columns, x, out).
        unsafe {
            let grid = ((staged.rows(x.rows) * x.columns).div_ceil(256).min(1024), 1);
            launch(&ctx.stream, &self.device.kernels.to_f32, grid, 256, |arguments| {
                push(arguments, [&count]);
                arguments.arg(&columns);
                push(arguments, [&from, &wide.at]);
            })
        }?;
        ctx.download(wide.at, length)
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
        let mut ctx = self.contexts.take(1)?;
        self.contexts.roofline(&mut ctx).map(Some)
    }
}

fn true_rows(staged: &Staged, x: &Buffer) -> usize {
    match x.rows {
        Rows::Tokens => staged.tokens,
        Rows::Sequences => staged.sequences,
    }
}
