//! NVIDIA cards from compute capability 8.0 on: products by cuBLASLt, all else, and on Hopper some products, by kernels of our own
//! that NVRTC compiles at start.
//!
//! In reading order: `card` finds the driver and compiles `kernels.cu`; `layout` is what a batch looks like on the card; `attention`
//! chooses between two of the kernels (`agreement`: whether they compute the same); `lane` is what a batch in flight has to itself,
//! of which `arena` divides the memory; `lanes` are a card's; `products` are cuBLASLt's, or of `own_product` where that is faster,
//! as `tuning` remembers; `element` is what all of these compute in, and `e4m3` its numbers of eight bits; `failure` says what an
//! error means. This file puts them behind [`Backend`].
//!
//! Two lanes a card: while one batch computes, the thread of the other packs, uploads and launches the next, so the card does not
//! wait for the host. Every buffer is of rounded sizes and counts are read from the card's own memory, so a small batch is
//! replayed from a graph that was captured for another.
//!
//! Activations are of one element type throughout, f16 by default (three bits more than bf16, at the same speed); sums, norms and
//! the head are f32. The kernels sum each row and each sequence in an order of its own. cuBLASLt may choose another order for
//! another number of rows, so a score's last bits depend on its company, but in the invariant mode.

#![allow(unsafe_code, reason = "its address: a device's memory, and libraries in C")]

mod agreement;
mod arena;
mod attention;
mod card;
mod e4m3;
mod element;
mod failure;
mod lane;
mod lanes;
mod layout;
mod own_product;
mod products;
mod tuning;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use anyhow::Result;
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{
    CudaEvent, CudaFunction, CudaSlice, CudaStream, DevicePtr, LaunchArgs, LaunchConfig, PushKernelArg,
};

use self::attention::Attention;
use self::card::Card;
pub use self::card::is_there;
use self::e4m3::{Bound, Reach};
pub use self::element::Element;
pub use self::lane::{Buffer, Lane};
use self::lane::{Form, Rows, Staged};
use self::lanes::Lanes;
use self::products::{Finish, Operands, Shape};
use super::{
    Activation, AttentionShape, Backend, BackendError, EmbeddingTables, Epilogue, Graph, HostTensor, Limits,
    NormWeights, Place,
};
use crate::batch::Batch;

/// Threads of a block of the kernels that take a row a warp.
const ROW_THREADS: u32 = 256;
/// Functions by their numbers in `kernels.cu`.
const GELU_ERF: u32 = 0;
const GELU_TANH: u32 = 1;
const RELU: u32 = 2;
const ITSELF: u32 = 3;

/// How to use a card.
#[derive(Debug, Clone, Copy)]
pub struct CudaOptions {
    /// The precision.
    pub element: Element,
    /// Tokens of the largest batch: what memory is reserved for.
    pub max_batch_tokens: usize,
    /// The same bits for a pair whatever its company.
    pub invariant: bool,
}

/// A card with a model's weights on it.
#[derive(Debug)]
pub struct CudaBackend {
    card: Arc<Card>,
    attention: Attention,
    options: CudaOptions,
    shape: AttentionShape,
    upload: Arc<CudaStream>,
    lanes: Lanes,
}

/// Weights on the card: bytes, and where they are.
#[derive(Debug)]
struct Weights {
    at: u64,
    _bytes: CudaSlice<u8>,
}

/// Embedding tables on the card, of the element.
#[derive(Debug)]
pub struct Embeddings {
    words: Weights,
    positions: Weights,
    types: Weights,
    norm: Norm,
}

/// A linear layer on the card: of the element in an encoder layer, f32 in the head.
#[derive(Debug)]
pub struct Linear {
    weight: Weights,
    bias: Weights,
    outputs: usize,
    inputs: usize,
    place: Place,
    eight: Option<Eight>,
}

/// What is to know of a weight that is stored as E4M3.
#[derive(Debug)]
struct Eight {
    scale: f32,
    reach: Reach,
}

/// What a product multiplies, and what with, that it be undone.
struct Operand {
    at: u64,
    alpha: f32,
    /// Keeps what was made for this product alone until it is launched.
    _made: Option<Buffer>,
}

/// A layer norm on the card, f32.
#[derive(Debug)]
pub struct Norm {
    weight: Weights,
    bias: Weights,
    eps: f32,
    bound: Bound,
}

/// The device address of a slice whose uses are ordered by whoever asks.
fn address<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr(stream).0
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
        let card = Arc::new(Card::open(ordinal, options.element, shape)?);
        let attention = Attention::choose(&card, options.element, shape)?;
        let upload = card.context.new_stream()?;
        let lanes = Lanes::new(Arc::clone(&card), options, shape.heads * shape.head_size);
        Ok(Self { card, attention, options, shape, upload, lanes })
    }

    fn upload(&self, bytes: &[u8]) -> Result<Weights, BackendError> {
        let bytes = self.upload.clone_htod(bytes)?;
        // Lanes read on streams of their own.
        self.upload.synchronize()?;
        Ok(Weights { at: address(&bytes, &self.upload), _bytes: bytes })
    }

    fn upload_elements(&self, tensor: &HostTensor) -> Result<Weights, BackendError> {
        self.upload(&self.options.element.encode(&tensor.data))
    }

    fn upload_exact(&self, tensor: &HostTensor) -> Result<Weights, BackendError> {
        self.upload(bytemuck::cast_slice(&tensor.data))
    }

    fn compute(&self, batch: &Batch, replay: bool, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        let longest = batch.ranges().map(|rows| rows.len()).max().unwrap_or(0);
        let run = || {
            let mut lane = self.lanes.take(longest)?;
            let mut logits = Vec::with_capacity(batch.sequences());
            for part in layout::split(batch, lane.capacity()) {
                let sequences: Vec<usize> = part.collect();
                let piece = batch.select(&sequences);
                logits.extend(lane.run(&piece, replay, |lane| graph(lane, &piece))?);
            }
            self.lanes.tune_once(&mut lane)?;
            Ok(logits)
        };
        // Nobody knows what a panic has left on the lane's stream.
        catch_unwind(AssertUnwindSafe(run))
            .unwrap_or_else(|_| Err(BackendError::DeviceLost("a panic while a batch was launched".into())))
    }

    /// Launches `function` on the lane's stream.
    ///
    /// # Safety
    /// `arguments` pushes what the kernel's signature asks for, in its order, addresses of buffers as large as its contract says.
    unsafe fn launch<'a>(
        lane: &'a Lane,
        function: &'a CudaFunction,
        grid: (usize, usize),
        block: u32,
        shared_mem_bytes: usize,
        arguments: impl FnOnce(&mut LaunchArgs<'a>),
    ) -> Result<(), BackendError> {
        let mut launch = lane.stream.launch_builder(function);
        arguments(&mut launch);
        let config = LaunchConfig {
            grid_dim: (grid.0 as u32, grid.1 as u32, 1),
            block_dim: (block, 1, 1),
            shared_mem_bytes: shared_mem_bytes as u32,
        };
        // SAFETY: the caller's.
        unsafe { launch.launch(config) }?;
        Ok(())
    }

    /// Blocks for a kernel that takes a row a warp and strides over the rows: no more than the card runs at once.
    fn row_grid(&self, rows: usize) -> (usize, usize) {
        let warps = ROW_THREADS as usize / 32;
        (rows.div_ceil(warps).min(8 * self.card.multiprocessors as usize), 1)
    }

    /// A product's operand: what `function` makes of the values, in E4M3.
    fn quantise(&self, lane: &Lane, x: &Buffer, function: u32) -> Result<Buffer, BackendError> {
        let (Some(bound), Some(kernel)) = (x.bound, &self.card.kernels.quantise) else {
            return Err(unsupported("a product of values without a bound"));
        };
        let scale = bound.scale();
        let mut out = lane.buffer(x.rows, x.columns, self.options.element, Form::E4m3 { scale })?;
        out.bound = x.bound;
        let staged = lane.staged();
        let (count, columns, from) = (staged.count(x.rows), x.columns as u32, x.elements()?);
        let grid = (staged.rows(x.rows) * x.columns / 8).div_ceil(256).min(16 * self.card.multiprocessors as usize);
        // SAFETY: quantise(rows, columns, function, x, out, scale).
        unsafe {
            Self::launch(lane, kernel, (grid, 1), 256, 0, |arguments| {
                push(arguments, [&count]);
                arguments.arg(&columns).arg(&function);
                push(arguments, [&from, &out.at]);
                arguments.arg(&scale);
            })
        }?;
        Ok(out)
    }

    /// `x` as this layer multiplies it.
    fn operand(&self, lane: &Lane, weights: &Linear, x: &Buffer) -> Result<Operand, BackendError> {
        let Some(eight) = &weights.eight else {
            return Ok(Operand { at: x.elements()?, alpha: 1.0, _made: None });
        };
        let made = match (x.form, &x.operand) {
            (Form::E4m3 { .. }, _) | (_, Some(_)) => None,
            // Attention's context, and first rows. Attention could store its own.
            _ => Some(self.quantise(lane, x, ITSELF)?),
        };
        let operand = made.as_ref().or(x.operand.as_deref()).unwrap_or(x);
        let Form::E4m3 { scale } = operand.form else { return Err(unsupported("this operand")) };
        Ok(Operand { at: operand.at, alpha: 1.0 / (scale * eight.scale), _made: made })
    }

    /// Room for what a norm makes of rows, beside the rows themselves: the next product's operand, where that is of E4M3.
    fn room_for_operand(&self, lane: &Lane, rows: Rows, norm: &Norm) -> Result<Option<Buffer>, BackendError> {
        if self.options.element != Element::Fp8 {
            return Ok(None);
        }
        let c = self.shape.heads * self.shape.head_size;
        let mut room = lane.buffer(rows, c, Element::Fp8, Form::E4m3 { scale: norm.bound.scale() })?;
        room.bound = Some(norm.bound);
        Ok(Some(room))
    }

    /// Applies a function to a buffer in place, by its number in `kernels.cu`.
    fn activate(&self, lane: &Lane, x: &Buffer, function: u32) -> Result<(), BackendError> {
        let staged = lane.staged();
        let (count, columns) = (staged.count(x.rows), x.columns as u32);
        let grid = (staged.rows(x.rows) * x.columns / 8).div_ceil(256).min(16 * self.card.multiprocessors as usize);
        // SAFETY: activate(rows, columns, function, x).
        unsafe {
            Self::launch(lane, &self.card.kernels.activate, (grid, 1), 256, 0, |arguments| {
                push(arguments, [&count]);
                arguments.arg(&columns).arg(&function);
                push(arguments, [&x.at]);
            })
        }
    }

    /// The head's layers, in f32: `tanh` over C outputs, then one output.
    fn head(&self, lane: &Lane, weights: &Linear, x: &Buffer, tanh: bool) -> Result<Buffer, BackendError> {
        let c = self.shape.heads * self.shape.head_size;
        let kernels = &self.card.kernels;
        let (kernel, outputs) = match (tanh, weights.outputs, x.form) {
            (true, outputs, Form::Element) if outputs == c && weights.inputs == c => (&kernels.head_dense, c),
            (false, 1, Form::Exact) if weights.inputs == c => (&kernels.head_out, 1),
            _ => return Err(unsupported("this classification head")),
        };
        let out = lane.buffer(x.rows, outputs, self.options.element, Form::Exact)?;
        let staged = lane.staged();
        let count = staged.count(x.rows);
        let grid = (staged.rows(x.rows) * outputs).div_ceil(8).min(16 * self.card.multiprocessors as usize);
        // SAFETY: head_dense and head_out(rows, x, weight, bias, out).
        unsafe {
            Self::launch(lane, kernel, (grid, 1), ROW_THREADS, 0, |arguments| {
                push(arguments, [&count, &x.at, &weights.weight.at, &weights.bias.at, &out.at]);
            })
        }?;
        Ok(out)
    }
}

/// Pushes addresses, in order.
fn push<'a, const N: usize>(arguments: &mut LaunchArgs<'a>, addresses: [&'a u64; N]) {
    for address in addresses {
        arguments.arg(address);
    }
}

fn unsupported(what: &str) -> BackendError {
    BackendError::Failed(format!("{what} is not supported on CUDA; use --device cpu").into())
}

impl Backend for CudaBackend {
    type Lane = Lane;
    type Buffer = Buffer;
    type Embeddings = Embeddings;
    type Linear = Linear;
    type Norm = Norm;
    type Moment = CudaEvent;

    fn describe(&self) -> String {
        let invariant = if self.options.invariant { ", batch-invariant" } else { "" };
        let short = self.lanes.capacity().filter(|&tokens| tokens < self.options.max_batch_tokens);
        let memory = short.map(|tokens| format!(", memory for {tokens} tokens at a time")).unwrap_or_default();
        let (element, name, ordinal) = (self.options.element.name(), &self.card.name, self.card.context.ordinal());
        format!("CUDA, {element}{invariant}, {name} (cuda:{ordinal}){memory}")
    }

    fn lanes(&self) -> usize {
        lanes::IN_FLIGHT
    }

    fn moment(&self, lane: &Lane) -> Result<CudaEvent, BackendError> {
        Ok(lane.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?)
    }

    fn seconds(&self, from: &CudaEvent, to: &CudaEvent) -> Result<f64, BackendError> {
        Ok(card::seconds_between(from, to)?)
    }

    fn limits(&self) -> Result<Option<Limits>, BackendError> {
        let mut lane = self.lanes.take(1)?;
        self.lanes.limits(&mut lane).map(Some)
    }

    fn embeddings(&self, tables: EmbeddingTables) -> Result<Embeddings, BackendError> {
        Ok(Embeddings {
            words: self.upload_elements(&tables.words)?,
            positions: self.upload_elements(&tables.positions)?,
            types: self.upload_elements(&tables.types)?,
            norm: self.norm(tables.norm)?,
        })
    }

    fn linear(&self, weight: HostTensor, bias: HostTensor, place: Place) -> Result<Linear, BackendError> {
        let (outputs, inputs) = (weight.shape[0], weight.shape[1]);
        let multiple = if self.options.element == Element::Fp8 { 16 } else { 8 };
        if place == Place::Encoder && (outputs % multiple != 0 || inputs % multiple != 0) {
            return Err(unsupported(&format!("a layer of {inputs} to {outputs} values, no multiples of {multiple},")));
        }
        let mut eight = None;
        let (weight, bias) = match place {
            Place::Encoder if self.options.element == Element::Fp8 => {
                self.lanes.expect(outputs);
                let scale = e4m3::weight_scale(&weight.data);
                eight = Some(Eight { scale, reach: Reach::of(&weight.data, &bias.data, inputs) });
                (self.upload(&e4m3::encode(&weight.data, scale))?, self.upload_elements(&bias)?)
            }
            Place::Encoder => {
                self.lanes.expect(outputs);
                (self.upload_elements(&weight)?, self.upload_elements(&bias)?)
            }
            Place::Head => (self.upload_exact(&weight)?, self.upload_exact(&bias)?),
        };
        Ok(Linear { weight, bias, outputs, inputs, place, eight })
    }

    fn norm(&self, weights: NormWeights) -> Result<Norm, BackendError> {
        Ok(Norm {
            weight: self.upload_exact(&weights.weight)?,
            bias: self.upload_exact(&weights.bias)?,
            eps: weights.eps as f32,
            bound: Bound::of_norm(&weights.weight.data, &weights.bias.data),
        })
    }

    fn run(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        self.compute(batch, true, graph)
    }

    fn run_observed(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        self.compute(batch, false, graph)
    }

    fn embed(&self, lane: &Lane, weights: &Embeddings, _: &Batch) -> Result<Buffer, BackendError> {
        let c = self.shape.heads * self.shape.head_size;
        let mut out = lane.buffer(Rows::Tokens, c, self.options.element, Form::Element)?;
        let staged = lane.staged();
        let layout = staged.layout;
        let [counts, ids, types, positions] =
            [layout.counts(), layout.ids(), layout.types(), layout.positions()].map(|place| staged.address(place));
        let Embeddings { words, positions: table, types: type_table, norm } = weights;
        let operand = self.room_for_operand(lane, Rows::Tokens, norm)?;
        let (operand_at, scale) = (operand.as_ref().map_or(0, |operand| operand.at), norm.bound.scale());
        // SAFETY: embed_norm(counts, ids, types, positions, words, position_table, type_table, weight, bias, eps, out, operand,
        // scale). The operand is written where products are of E4M3, and then there is one.
        unsafe {
            let grid = self.row_grid(layout.token_rows);
            Self::launch(lane, &self.card.kernels.embed_norm, grid, ROW_THREADS, 0, |arguments| {
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
        lane: &Lane,
        weights: &Linear,
        outputs: Range<usize>,
        x: &Buffer,
        epilogue: Epilogue<'_, Buffer>,
    ) -> Result<Buffer, BackendError> {
        if weights.place == Place::Head {
            return match epilogue {
                Epilogue::Activation(Activation::Tanh) => self.head(lane, weights, x, true),
                Epilogue::Bias => self.head(lane, weights, x, false),
                _ => Err(unsupported("this classification head")),
            };
        }
        let element = self.options.element;
        let mut output = lane.buffer(x.rows, outputs.len(), element, Form::Element)?;
        let (finish, residual, function) = match epilogue {
            Epilogue::Bias => (Finish::Bias, None, None),
            Epilogue::Residual(residual) => (Finish::BiasResidual, Some(residual), None),
            // cuBLASLt's GELU is the tanh form: where the product is its, the one by erf is a kernel of its own.
            Epilogue::Activation(Activation::Gelu) if weights.eight.is_none() => {
                (Finish::BiasGelu, None, Some(GELU_ERF))
            }
            Epilogue::Activation(Activation::Gelu) => (Finish::Bias, None, Some(GELU_ERF)),
            // The kernel that makes the next product's operand applies these along.
            Epilogue::Activation(Activation::GeluTanh) if weights.eight.is_some() => {
                (Finish::Bias, None, Some(GELU_TANH))
            }
            Epilogue::Activation(Activation::Relu) if weights.eight.is_some() => (Finish::Bias, None, Some(RELU)),
            Epilogue::Activation(Activation::GeluTanh) => (Finish::BiasGeluTanh, None, None),
            Epilogue::Activation(Activation::Relu) => (Finish::BiasRelu, None, None),
            Epilogue::Activation(Activation::Tanh) => return Err(unsupported("tanh in an encoder layer")),
        };
        let operand = self.operand(lane, weights, x)?;
        let rows = lane.staged().rows(x.rows);
        let shape = Shape { rows, outputs: outputs.len(), inputs: weights.inputs, finish };
        let operands = Operands {
            x: operand.at,
            weight: weights.weight.at + (outputs.start * weights.inputs * element.operand_bytes()) as u64,
            bias: weights.bias.at + (outputs.start * element.bytes()) as u64,
            residual: residual.map_or(Ok(output.at), Buffer::elements)?,
            output: output.at,
            alpha: operand.alpha,
        };
        let gelu_applied = lane.products.launch(shape, operands)?;
        if let (Some(eight), Some(bound)) = (&weights.eight, x.bound) {
            let product = eight.reach.from(bound, outputs.len());
            output.bound = match residual {
                None => Some(product),
                Some(residual) => residual.bound.map(|bound| product.plus(bound)),
            };
        }
        match function.filter(|_| !gelu_applied) {
            None => Ok(output),
            Some(function) if weights.eight.is_some() => self.quantise(lane, &output, function),
            Some(function) => self.activate(lane, &output, function).map(|()| output),
        }
    }

    fn layer_norm(&self, lane: &Lane, weights: &Norm, mut x: Buffer) -> Result<Buffer, BackendError> {
        let staged = lane.staged();
        let (count, at) = (staged.count(x.rows), x.elements()?);
        let operand = self.room_for_operand(lane, x.rows, weights)?;
        let (operand_at, scale) = (operand.as_ref().map_or(0, |operand| operand.at), weights.bound.scale());
        // SAFETY: layer_norm(rows, x, weight, bias, eps, out, operand, scale), in place; the operand as in `embed`.
        unsafe {
            let grid = self.row_grid(staged.rows(x.rows));
            Self::launch(lane, &self.card.kernels.layer_norm, grid, ROW_THREADS, 0, |arguments| {
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

    fn attention(&self, lane: &Lane, shape: AttentionShape, qkv: &Buffer, _: &Batch) -> Result<Buffer, BackendError> {
        let c = shape.heads * shape.head_size;
        let mut out = lane.buffer(Rows::Tokens, c, self.options.element, Form::Element)?;
        // Weighted means of values.
        out.bound = qkv.bound.map(|bound| bound.narrowed(c));
        let from = qkv.elements()?;
        let staged = lane.staged();
        let (layout, upload) = (staged.layout, staged.address(0));
        // SAFETY: the staged batch, and buffers of its rows.
        unsafe { self.attention.launch(&lane.stream, layout, upload, shape, shape.heads, (from, out.at)) }?;
        Ok(out)
    }

    fn first_token_attention(
        &self,
        lane: &Lane,
        shape: AttentionShape,
        q: &Buffer,
        kv: &Buffer,
        _: &Batch,
    ) -> Result<Buffer, BackendError> {
        let c = shape.heads * shape.head_size;
        let mut out = lane.buffer(Rows::Sequences, c, self.options.element, Form::Element)?;
        out.bound = kv.bound.map(|bound| bound.narrowed(c));
        let (q, kv) = (q.elements()?, kv.elements()?);
        let staged = lane.staged();
        let layout = staged.layout;
        let [counts, offsets] = [layout.counts(), layout.offsets()].map(|place| staged.address(place));
        let scale = (shape.head_size as f32).sqrt().recip();
        // SAFETY: first_token_attention(counts, offsets, q, kv, out, scale).
        unsafe {
            let grid = (layout.sequence_rows, shape.heads);
            Self::launch(lane, &self.card.kernels.first_token_attention, grid, 128, 0, |arguments| {
                push(arguments, [&counts, &offsets, &q, &kv, &out.at]);
                arguments.arg(&scale);
            })
        }?;
        Ok(out)
    }

    fn first_rows(&self, lane: &Lane, x: &Buffer, _: &Batch) -> Result<Buffer, BackendError> {
        let mut out = lane.buffer(Rows::Sequences, x.columns, self.options.element, Form::Element)?;
        out.bound = x.bound;
        let from = x.elements()?;
        let staged = lane.staged();
        let layout = staged.layout;
        let [counts, offsets] = [layout.counts(), layout.offsets()].map(|place| staged.address(place));
        let pieces = layout.sequence_rows * x.columns * self.options.element.bytes() / 16;
        // SAFETY: first_rows(counts, offsets, x, out).
        unsafe {
            let grid = (pieces.div_ceil(256).min(8 * self.card.multiprocessors as usize), 1);
            Self::launch(lane, &self.card.kernels.first_rows, grid, 256, 0, |arguments| {
                push(arguments, [&counts, &offsets, &from, &out.at]);
            })
        }?;
        Ok(out)
    }

    fn download(&self, lane: &Lane, x: &Buffer) -> Result<Vec<f32>, BackendError> {
        let staged = lane.staged();
        let length = true_rows(&staged, x) * x.columns;
        if x.form == Form::Exact {
            return lane.download(x.at, length);
        }
        let from = x.elements()?;
        let wide = lane.buffer(x.rows, x.columns, self.options.element, Form::Exact)?;
        let (count, columns) = (staged.count(x.rows), x.columns as u32);
        // SAFETY: widen(rows, columns, x, out).
        unsafe {
            let grid = ((staged.rows(x.rows) * x.columns).div_ceil(256).min(1024), 1);
            Self::launch(lane, &self.card.kernels.widen, grid, 256, 0, |arguments| {
                push(arguments, [&count]);
                arguments.arg(&columns);
                push(arguments, [&from, &wide.at]);
            })
        }?;
        lane.download(wide.at, length)
    }
}

fn true_rows(staged: &Staged, x: &Buffer) -> usize {
    match x.rows {
        Rows::Tokens => staged.tokens,
        Rows::Sequences => staged.sequences,
    }
}
