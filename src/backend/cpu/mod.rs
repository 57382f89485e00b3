//! The fast backend for processors: packed weights, our own kernels by run-time detection, our own threads.
//!
//! In reading order: `simd` is what an instruction set offers; `panels` the weights' layout, `product` the kernel that reads
//! it, and `epilogue` what becomes of its sums; `attention`, `rows` (norms, forms of rows) and `math` (exp, GELU) are the
//! other operations; `partition` says how a batch is cut for the threads of `pool`; `matrix` is their memory; `probe` is for benches.
//! This file puts them behind [`Backend`].
//!
//! A saturated batch is cut into partition of some hundreds of tokens, and each thread runs the whole graph over its own, with
//! no barrier between operations; a lone request's operations are each split over the threads. Either way each value is
//! computed by the same instructions in the same order, so scores are the same bits, whatever the batch, its order and the
//! number of threads.
//!
//! The residual stream, norms and heads are f32 in every precision. With bf16, products and attention multiply bf16 and sum in
//! f32. With int8, products multiply bytes (a range per token, a scale per output) and sum in i32; attention is bf16.

#![allow(unsafe_code, reason = "its address: kernels, and memory that threads share in parts")]

mod activation;
mod attention;
mod dtype;
mod epilogue;
mod gemm;
mod layer_norm;
mod packed;
mod partition;
mod quantize;
pub mod roofline;
mod simd;
#[cfg(test)]
mod tests;
mod thread_pool;
mod workspace;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use half::f16;
use half::slice::HalfFloatSliceExt;

use self::attention::{Attention, Element, Sequence};
pub use self::dtype::CpuDtype;
use self::epilogue::Output;
use self::gemm::Gemm;
use self::layer_norm::LayerNorm;
use self::packed::{Format, PackedWeights};
use self::quantize::{Low, Lower, LowerFrom, gather, input, take_bf16};
use self::simd::SimdPath;
pub use self::thread_pool::ThreadPool;
use self::workspace::Matrix;
use super::{
    Activation, AttentionShape, Backend, BackendError, EmbeddingTables, Epilogue, Graph, HostTensor, LayerRole,
    NormWeights, Roofline, Timed,
};
use crate::batch::Batch;

/// The processor, in one precision.
#[derive(Debug, Clone)]
pub struct CpuBackend {
    path: SimdPath,
    format: Format,
    pool: Arc<ThreadPool>,
}

/// One run of a graph: by a thread alone, or by all in step.
#[derive(Debug)]
pub struct ExecContext {
    team: Option<Arc<ThreadPool>>,
}

/// `[rows, columns]`, as f32, in the form that products read, or both.
#[derive(Debug)]
pub struct Buffer {
    rows: usize,
    exact: Option<Matrix<f32>>,
    low: Option<Low>,
}

/// Embedding tables: f32 with f32 products, f16 (which has three more bits than bf16, and range enough) otherwise.
#[derive(Debug)]
pub struct Embeddings {
    words: Table,
    positions: Table,
    types: Table,
    norm: Norm,
}

/// `[rows, C]`
#[derive(Debug)]
enum Table {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

/// Packed weights of a linear layer.
#[derive(Debug)]
pub struct Linear(PackedWeights);

/// A layer norm's weights, both `[C]`.
#[derive(Debug)]
pub struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

impl CpuBackend {
    /// Products in `dtype` on the threads of `pool`, with the best instructions that this machine has.
    pub fn new(dtype: CpuDtype, pool: Arc<ThreadPool>) -> Self {
        Self::on(SimdPath::best(), dtype, pool)
    }

    fn on(path: SimdPath, dtype: CpuDtype, pool: Arc<ThreadPool>) -> Self {
        Self { path, format: Self::format_of(dtype), pool }
    }

    fn format_of(dtype: CpuDtype) -> Format {
        match dtype {
            CpuDtype::F32 => Format::F32,
            CpuDtype::Bf16 => Format::Bf16,
            CpuDtype::Int8 => Format::Int8,
        }
    }

    /// Whether this machine multiplies bf16 in one instruction. Where it does not, bf16 is slower than f32.
    pub fn has_bf16() -> bool {
        SimdPath::best().has_bf16()
    }

    /// The input of a product with `weights`.
    fn input<'a>(&self, x: &'a Buffer, weights: &PackedWeights) -> gemm::Input<'a> {
        match (weights.format, &x.exact, &x.low) {
            (Format::F32, Some(exact), _) => input(exact, &[]),
            (Format::Bf16 | Format::Int8, _, Some(low)) => low.input(),
            (format, ..) => unreachable!("a product in {format:?} of a buffer that was not made for it"),
        }
    }

    /// Computes a product, split over the ctx's threads by panels, and by rows too where panels are few.
    fn multiply(&self, ctx: &ExecContext, product: &Gemm<'_>) {
        let (panels, rows) = (product.panels(), product.input.rows);
        let Some(pool) = &ctx.team else {
            // SAFETY: this thread alone has the output.
            return unsafe { product.compute(self.path, panels, 0..rows) };
        };
        let blocks = (4 * pool.threads()).div_ceil(panels.len()).min(rows.div_ceil(TEAM_ROWS));
        ctx.split(panels.len() * blocks, |units| {
            for unit in units {
                let (panel, block) = (panels.start + unit / blocks, unit % blocks);
                let rows = rows * block / blocks..rows * (block + 1) / blocks;
                // SAFETY: each unit is one thread's: these rows of this panel's columns.
                unsafe { product.compute(self.path, panel..panel + 1, rows) };
            }
        });
    }

    /// The lower form of f32 rows that are not needed any more, or the rows themselves where products read f32.
    fn lowered(&self, ctx: &ExecContext, from: Matrix<f32>) -> Buffer {
        let (rows, columns) = (from.rows(), from.columns());
        let Some(mut low) = Low::take(self.format, rows, columns) else {
            return Buffer { rows, exact: Some(from), low: None };
        };
        self.lower(ctx, LowerFrom::F32(&from), columns, &mut low, rows);
        Buffer { rows, exact: None, low: Some(low) }
    }

    fn lower(&self, ctx: &ExecContext, from: LowerFrom<'_>, columns: usize, low: &mut Low, rows: usize) {
        let low = low.shared();
        ctx.split(rows, |rows| self.path.enter(Lower { from, columns, low, rows }));
    }

    /// Attention whose queries are the rows of `q` and whose keys and values are columns of `kv`.
    fn attend(
        &self,
        ctx: &ExecContext,
        shape: AttentionShape,
        q: &Buffer,
        kv: &Buffer,
        starts: [usize; 2],
        sequences: &[Sequence],
    ) -> Buffer {
        let columns = shape.heads * shape.head_size;
        match (&q.low, &kv.low) {
            (Some(Low::Bf16(q)), Some(Low::Bf16(kv))) => {
                let attention =
                    |output| Attention { shape, q, kv, k_start: starts[0], v_start: starts[1], sequences, output };
                if self.format == Format::Int8 {
                    // A row's bytes need the range of all its heads.
                    let mut context = Matrix::take(q.rows(), columns);
                    self.heads::<gemm::Bf16>(ctx, &attention(Output::F32(context.shared())));
                    return self.lowered(ctx, context);
                }
                let mut context = take_bf16(q.rows(), columns);
                self.heads::<gemm::Bf16>(ctx, &attention(Output::Bf16(context.shared())));
                Buffer { rows: context.rows(), exact: None, low: Some(Low::Bf16(context)) }
            }
            _ => {
                let (Some(q), Some(kv)) = (&q.exact, &kv.exact) else {
                    unreachable!("attention reads bf16 or f32 rows");
                };
                let mut context = Matrix::take(q.rows(), columns);
                let (k_start, v_start, output) = (starts[0], starts[1], Output::F32(context.shared()));
                self.heads::<gemm::F32>(ctx, &Attention { shape, q, kv, k_start, v_start, sequences, output });
                Buffer { rows: context.rows(), exact: Some(context), low: None }
            }
        }
    }

    /// Every head of every sequence, split over the ctx's threads; where heads are few, queries are split too.
    fn heads<E: Element<Value: Send + Sync>>(&self, ctx: &ExecContext, attention: &Attention<'_, E::Value>) {
        let heads = attention.shape.heads;
        let all = attention.sequences.len() * heads;
        let threads = ctx.team.as_ref().map_or(1, |pool| pool.threads());
        let parts = if threads == 1 { 1 } else { (2 * threads).div_ceil(all) };
        ctx.split(all * parts, |units| {
            for unit in units {
                let (sequence, head, part) = (unit / parts / heads, unit / parts % heads, unit % parts);
                let n = attention.sequences[sequence].queries.len();
                let queries = n * part / parts..n * (part + 1) / parts;
                if !queries.is_empty() {
                    // SAFETY: each unit is one thread's: these queries' columns of this head.
                    unsafe { attention.compute::<E>(self.path, sequence, head, queries) };
                }
            }
        });
    }

    fn table(&self, tensor: HostTensor) -> Table {
        match self.format {
            Format::F32 => Table::F32(tensor.data),
            Format::Bf16 | Format::Int8 => {
                let mut halves = vec![f16::ZERO; tensor.data.len()];
                let part = tensor.data.len().div_ceil(self.pool.threads()).max(1);
                let parts = halves.chunks_mut(part).zip(tensor.data.chunks(part)).collect();
                self.pool.for_each(parts, |(to, from): (&mut [f16], &[f32])| to.convert_from_f32_slice(from));
                Table::F16(halves)
            }
        }
    }
}

/// Rows below which a product is not split by rows among threads.
const TEAM_ROWS: usize = 24;

impl ExecContext {
    /// Calls `f` with parts of `0..n`, one for each thread that has any.
    fn split(&self, n: usize, f: impl Fn(Range<usize>) + Sync) {
        let Some(pool) = &self.team else { return f(0..n) };
        let threads = pool.threads();
        pool.broadcast(&|thread| {
            let part = n * thread / threads..n * (thread + 1) / threads;
            if !part.is_empty() {
                f(part);
            }
        });
    }
}

impl Table {
    /// Writes row `index` to `to`, or adds it.
    fn read(&self, index: u32, to: &mut [f32], scratch: &mut [f32], add: bool) {
        let at = index as usize * to.len();
        let row = match self {
            Self::F32(data) => &data[at..][..to.len()],
            Self::F16(data) => {
                data[at..][..to.len()].convert_to_f32_slice(scratch);
                scratch
            }
        };
        if !add {
            return to.copy_from_slice(row);
        }
        for (to, value) in to.iter_mut().zip(row) {
            *to += value;
        }
    }
}

impl Backend for CpuBackend {
    type ExecContext = ExecContext;
    type Buffer = Buffer;
    type Embeddings = Embeddings;
    type Linear = Linear;
    type Norm = Norm;
    /// And the share of the threads that the ctx has.

    fn describe(&self) -> String {
        let dtype = match self.format {
            Format::F32 => "f32",
            Format::Bf16 => "bf16",
            Format::Int8 => "int8",
        };
        format!("CPU, {dtype}, {}, {} threads", self.path.name(), self.pool.threads())
    }

    fn embeddings(&self, tables: EmbeddingTables) -> Result<Embeddings, BackendError> {
        Ok(Embeddings {
            words: self.table(tables.words),
            positions: self.table(tables.positions),
            types: self.table(tables.types),
            norm: self.norm(tables.norm)?,
        })
    }

    fn linear(&self, weight: HostTensor, bias: HostTensor, role: LayerRole) -> Result<Linear, BackendError> {
        let format = match role {
            LayerRole::Encoder => self.format,
            LayerRole::Head => Format::F32,
        };
        Ok(Linear(PackedWeights::pack(format, self.path.panel(), &weight, &bias, &self.pool)))
    }

    fn norm(&self, weights: NormWeights) -> Result<Norm, BackendError> {
        Ok(Norm { weight: weights.weight.data, bias: weights.bias.data, eps: weights.eps as f32 })
    }

    fn run(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        let lengths: Vec<usize> = batch.ranges().map(|rows| rows.len()).collect();
        let plan = partition::cut(&lengths, self.pool.threads());
        let outcome = Mutex::new((vec![f32::NAN; lengths.len()], Ok(())));
        let compute = |ctx: &ExecContext, piece: &[usize]| {
            let scores = graph(ctx, &batch.select(piece));
            let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
            match scores {
                Ok(scores) => piece.iter().zip(scores).for_each(|(&sequence, score)| outcome.0[sequence] = score),
                Err(error) => outcome.1 = Err(error),
            }
        };
        let _turn = self.pool.turn();
        let team = ExecContext { team: (self.pool.threads() > 1).then(|| Arc::clone(&self.pool)) };
        for piece in &plan.together {
            compute(&team, piece);
        }
        // A thread that is done early, since another was disturbed, takes over what that one has not begun.
        let left: Vec<Mutex<&[partition::Piece]>> =
            plan.apart.iter().map(|partition| Mutex::new(&partition[..])).collect();
        let take = |from: usize| {
            let mut partition = left[from].lock().unwrap_or_else(PoisonError::into_inner);
            let (first, rest) = partition.split_first()?;
            *partition = rest;
            Some(first)
        };
        if plan.apart.iter().any(|partition| !partition.is_empty()) {
            self.pool.broadcast(&|thread| {
                let alone = ExecContext { team: None };
                for from in (0..left.len()).map(|i| (thread + i) % left.len()) {
                    while let Some(piece) = take(from) {
                        compute(&alone, piece);
                    }
                }
            });
        }
        let (logits, outcome) = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
        outcome.map(|()| logits)
    }

    fn embed(&self, ctx: &ExecContext, weights: &Embeddings, batch: &Batch) -> Result<Buffer, BackendError> {
        let (rows, c) = (batch.tokens(), weights.norm.weight.len());
        let mut sum = Matrix::<f32>::take(rows, c);
        let shared = sum.shared();
        ctx.split(rows, |rows| {
            let mut scratch = Matrix::<f32>::take(1, c);
            for row in rows {
                // SAFETY: each row is one thread's, and has c values.
                let to = unsafe { std::slice::from_raw_parts_mut(shared.row(row), c) };
                let scratch = scratch.row_mut(0);
                weights.words.read(batch.ids()[row], to, scratch, false);
                weights.types.read(batch.type_ids()[row], to, scratch, true);
                weights.positions.read(batch.positions()[row], to, scratch, true);
            }
        });
        self.layer_norm(ctx, &weights.norm, Buffer { rows, exact: Some(sum), low: None })
    }

    fn apply(
        &self,
        ctx: &ExecContext,
        weights: &Linear,
        outputs: Range<usize>,
        x: &Buffer,
        epilogue: Epilogue<'_, Buffer>,
    ) -> Result<Buffer, BackendError> {
        let (weights, rows, columns) = (&weights.0, x.rows, outputs.len());
        let (activation, residual) = match epilogue {
            Epilogue::Bias => (None, None),
            Epilogue::Activation(activation) => (Some(activation), None),
            Epilogue::Residual(residual) => (None, Some(residual.exact.as_ref().expect("a residual stream is f32"))),
        };
        let input = self.input(x, weights);
        let product =
            |output| Gemm { input, weights, start: outputs.start, end: outputs.end, activation, residual, output };
        if weights.format == Format::F32 || residual.is_some() {
            let mut exact = Matrix::take(rows, columns);
            self.multiply(ctx, &product(Output::F32(exact.shared())));
            if activation == Some(Activation::Tanh) {
                (0..rows).for_each(|row| exact.row_mut(row).iter_mut().for_each(|value| *value = value.tanh()));
            }
            return Ok(Buffer { rows, exact: Some(exact), low: None });
        }
        let mut halves = take_bf16(rows, columns);
        self.multiply(ctx, &product(Output::Bf16(halves.shared())));
        // What attention reads stays bf16; what a product reads is lowered once its rows are whole.
        if weights.format == Format::Int8 && activation.is_some() {
            let mut low = Low::take(Format::Int8, rows, columns).expect("int8 is a lower form");
            self.lower(ctx, LowerFrom::Bf16(&halves), columns, &mut low, rows);
            return Ok(Buffer { rows, exact: None, low: Some(low) });
        }
        Ok(Buffer { rows, exact: None, low: Some(Low::Bf16(halves)) })
    }

    fn layer_norm(&self, ctx: &ExecContext, weights: &Norm, x: Buffer) -> Result<Buffer, BackendError> {
        let mut exact = x.exact.expect("norms are of f32 rows");
        let mut low = Low::take(self.format, x.rows, exact.columns());
        let (shared, low_shared) = (exact.shared(), quantize::shared(&mut low));
        ctx.split(x.rows, |rows| {
            let Norm { weight, bias, eps } = weights;
            self.path.enter(LayerNorm { x: shared, weight, bias, eps: *eps, low: low_shared, rows });
        });
        Ok(Buffer { rows: x.rows, exact: Some(exact), low })
    }

    fn attention(
        &self,
        ctx: &ExecContext,
        shape: AttentionShape,
        qkv: &Buffer,
        batch: &Batch,
    ) -> Result<Buffer, BackendError> {
        let c = shape.heads * shape.head_size;
        let sequences: Vec<Sequence> =
            batch.ranges().map(|rows| Sequence { queries: rows.clone(), keys: rows }).collect();
        Ok(self.attend(ctx, shape, qkv, qkv, [c, 2 * c], &sequences))
    }

    fn cls_attention(
        &self,
        ctx: &ExecContext,
        shape: AttentionShape,
        q: &Buffer,
        kv: &Buffer,
        batch: &Batch,
    ) -> Result<Buffer, BackendError> {
        let c = shape.heads * shape.head_size;
        let sequences: Vec<Sequence> =
            batch.ranges().enumerate().map(|(i, rows)| Sequence { queries: i..i + 1, keys: rows }).collect();
        Ok(self.attend(ctx, shape, q, kv, [0, c], &sequences))
    }

    fn gather_cls(&self, _: &ExecContext, x: &Buffer, batch: &Batch) -> Result<Buffer, BackendError> {
        let rows = batch.gather_cls();
        Ok(Buffer {
            rows: rows.len(),
            exact: x.exact.as_ref().map(|exact| gather(exact, &rows)),
            low: x.low.as_ref().map(|low| low.gather(&rows)),
        })
    }

    fn download(&self, _: &ExecContext, x: &Buffer) -> Result<Vec<f32>, BackendError> {
        let exact = x.exact.as_ref().expect("only f32 rows are read back");
        Ok((0..x.rows).flat_map(|row| exact.row(row).iter().copied()).collect())
    }
}

impl Timed for CpuBackend {
    type Event = (Instant, f64);

    fn record_event(&self, ctx: &ExecContext) -> Result<(Instant, f64), BackendError> {
        let share = if ctx.team.is_some() { 1.0 } else { 1.0 / self.pool.threads() as f64 };
        Ok((Instant::now(), share))
    }

    fn elapsed_seconds(&self, from: &(Instant, f64), to: &(Instant, f64)) -> Result<f64, BackendError> {
        Ok(to.0.duration_since(from.0).as_secs_f64() * to.1)
    }

    fn roofline(&self) -> Result<Option<Roofline>, BackendError> {
        let peak = |format| roofline::peak_of(format, self.pool.threads());
        let products = peak(self.format);
        let attention = if self.format == Format::Int8 { peak(Format::Bf16) } else { products };
        Ok(Some(Roofline { gemms: products, attention, memory: None }))
    }
}
