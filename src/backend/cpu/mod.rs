//! The fast CPU backend: packed weights, SIMD kernels selected at run time, and a thread pool.
//!
//! Modules in reading order: `dtype` (precisions), `simd` (instruction sets), `packed` (layout of weights), `gemm` and its
//! `epilogue`, `attention` with its formats and its `softmax`, both once more for a tile unit (`tile_gemm`, `tile_attention`),
//! `rotary`, `layer_norm`, `quantize` (storage formats of activations), `activation` (GELU and others), `partition` (how a batch
//! is split for the threads), `exec_context` (threads of a run), `thread_pool`, `workspace` (scratch memory). [`roofline`] and
//! [`gemm_benchmark`] are for benchmarks. This file implements [`Backend`].
//!
//! Batches are split into partitions of up to 512 tokens. A thread runs the whole graph on a partition, without barriers.
//! Sequences that cannot be divided evenly among the threads, as in a batch of one, have each operation split over all threads
//! instead. Either way, each value is computed by the same instructions in the same order: scores are bitwise identical for any
//! batch composition, batch order and number of threads.
//!
//! The residual stream, norms and the classification head are f32 in every precision. With bf16, GEMMs and attention multiply
//! bf16 and sum in f32. With int8, GEMMs multiply bytes (quantized per token, weights per output) and sum in i32; attention is
//! bf16.

#![allow(
    unsafe_code,
    reason = "unsafe is confined to this module: SIMD kernels, and memory that threads share in disjoint parts"
)]

mod activation;
mod attention;
mod attention_format;
mod dtype;
mod epilogue;
mod exec_context;
mod gemm;
pub mod gemm_benchmark;
mod layer_norm;
mod packed;
mod partition;
mod quantize;
pub mod roofline;
mod rotary;
mod simd;
mod softmax;
mod table;
#[cfg(test)]
mod tests;
mod thread_pool;
mod tile_attention;
mod tile_gemm;
#[cfg(test)]
mod tile_tests;
mod workspace;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use self::attention::{Attention, Sequence};
pub use self::dtype::CpuDtype;
use self::epilogue::OutputRows;
pub use self::exec_context::ExecContext;
use self::exec_context::run_partitions;
use self::gemm::Gemm;
use self::layer_norm::{LayerNorm, NormRows};
use self::packed::{OperandLayout, PackedWeights, StorageFormat};
use self::partition::partition_batch;
use self::quantize::{QuantizeRows, QuantizeSource, QuantizedRows, acquire_bf16, gather_rows, gemm_input};
use self::roofline::best_path;
pub use self::rotary::Rotary;
use self::rotary::{Rotate, RotatedRows};
use self::simd::SimdPath;
use self::table::Table;
pub use self::thread_pool::ThreadPool;
use self::workspace::Matrix;
use super::{
    Activation, AttentionShape, Backend, BackendError, EmbeddingTables, Epilogue, Graph, HostTensor, LayerRole,
    NormWeights, Roofline, RotaryTable, Timed,
};
use crate::batch::Batch;

/// The CPU backend in one precision.
#[derive(Debug, Clone)]
pub struct CpuBackend {
    path: SimdPath,
    format: StorageFormat,
    pool: Arc<ThreadPool>,
}

/// Activations `[rows, columns]`: as f32, as bf16 or int8 (`quantized`), or both.
#[derive(Debug)]
pub struct Buffer {
    rows: usize,
    f32_rows: Option<Matrix<f32>>,
    quantized: Option<QuantizedRows>,
}

/// Embedding tables and their layer norm.
#[derive(Debug)]
pub struct Embeddings {
    words: Table,
    positions: Option<Table>,
    types: Option<Table>,
    norm: Norm,
}

/// A linear layer's packed weights and bias.
#[derive(Debug)]
pub struct Linear {
    weights: PackedWeights,
    /// F, if the weights are packed for [`Epilogue::Gated`].
    gated: Option<usize>,
}

/// A layer norm's weights, both `[C]`.
#[derive(Debug)]
pub struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

impl CpuBackend {
    /// Computes on the threads of `pool`, with GEMMs in `dtype` and the best instruction set of this machine.
    pub fn new(dtype: CpuDtype, pool: Arc<ThreadPool>) -> Self {
        Self::on(best_path(), dtype, pool)
    }

    /// Computes what [`Self::new`] computes on a processor with Intel AMX, by a portable model of its instructions. Slow; for
    /// tests.
    pub fn with_tile_twin(dtype: CpuDtype, pool: Arc<ThreadPool>) -> Self {
        Self::on(SimdPath::tile_twin(), dtype, pool)
    }

    fn on(path: SimdPath, dtype: CpuDtype, pool: Arc<ThreadPool>) -> Self {
        Self { path, format: dtype.storage_format(), pool }
    }

    /// Instruction sets with kernels for this architecture that the machine does not have, for reports.
    pub fn missing_instruction_sets() -> Vec<&'static str> {
        SimdPath::missing()
    }

    /// The best instruction set of this machine that the kernels support, as in logs; `portable` if there is none.
    pub fn instruction_set() -> &'static str {
        best_path().name()
    }

    /// The layout of the encoder layers' operands, and of attention's.
    fn layout(&self) -> OperandLayout {
        OperandLayout::of(self.path, self.format)
    }

    /// The operand A of a GEMM with `weights`.
    fn gemm_input<'a>(&self, x: &'a Buffer, weights: &PackedWeights) -> gemm::GemmInput<'a> {
        match (weights.format, &x.f32_rows, &x.quantized) {
            (StorageFormat::F32, Some(rows), _) => gemm_input(rows, &[]),
            (StorageFormat::Bf16 | StorageFormat::Int8, _, Some(rows)) => rows.gemm_input(),
            (format, ..) => unreachable!("the buffer does not hold rows for a GEMM in {format:?}"),
        }
    }

    /// Computes a GEMM, split over the context's threads by panels, and also by rows if there are few panels.
    fn gemm(&self, ctx: &ExecContext, gemm: &Gemm<'_>) {
        let (panels, rows) = (gemm.panels(), gemm.input.rows);
        if ctx.threads() == 1 {
            // SAFETY: only this thread writes the output.
            return unsafe { self.gemm_part(gemm, panels, 0..rows) };
        }
        let blocks = (4 * ctx.threads()).div_ceil(panels.len()).min(rows.div_ceil(MIN_SPLIT_ROWS));
        ctx.split(panels.len() * blocks, |units| {
            for unit in units {
                let (panel, block) = (panels.start + unit / blocks, unit % blocks);
                let rows = rows * block / blocks..rows * (block + 1) / blocks;
                // SAFETY: each unit is computed by one thread, and units are disjoint rows or panels of the output.
                unsafe { self.gemm_part(gemm, panel..panel + 1, rows) };
            }
        });
    }

    /// Computes the given rows of the outputs in the given panels.
    ///
    /// # Safety
    /// No other thread accesses these rows of these outputs at the same time.
    unsafe fn gemm_part(&self, gemm: &Gemm<'_>, panels: Range<usize>, rows: Range<usize>) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            match gemm.weights.layout {
                OperandLayout::Vectors { .. } => gemm.compute(self.path, panels, rows),
                OperandLayout::Tiles => tile_gemm::compute(self.path, gemm, panels, rows),
            }
        }
    }

    /// Converts rows to the GEMMs' storage format. f32 rows are dropped, unless GEMMs read f32.
    fn quantized_buffer(&self, ctx: &ExecContext, from: Matrix<f32>) -> Buffer {
        let (rows, columns) = (from.rows(), from.columns());
        let Some(mut quantized) = QuantizedRows::acquire(self.format, self.layout(), rows, columns) else {
            return Buffer { rows, f32_rows: Some(from), quantized: None };
        };
        self.quantize(ctx, QuantizeSource::F32(&from), columns, &mut quantized, rows);
        Buffer { rows, f32_rows: None, quantized: Some(quantized) }
    }

    fn quantize(
        &self,
        ctx: &ExecContext,
        from: QuantizeSource<'_>,
        columns: usize,
        to: &mut QuantizedRows,
        rows: usize,
    ) {
        let to = to.shared();
        ctx.split(rows, |rows| self.path.enter(QuantizeRows { from, columns, to, rows }));
    }

    /// Attention with queries from `q`, `[queries, C or more]`, and keys and values from the columns of `kv` that start
    /// at `starts[0]` and `starts[1]`.
    fn attend(
        &self,
        ctx: &ExecContext,
        (shape, window): (AttentionShape, Option<usize>),
        q: &Buffer,
        kv: &Buffer,
        starts: [usize; 2],
        sequences: &[Sequence],
    ) -> Buffer {
        let columns = shape.heads * shape.head_size;
        match (&q.quantized, &kv.quantized) {
            (Some(QuantizedRows::Bf16(q)), Some(QuantizedRows::Bf16(kv))) => {
                let (k_start, v_start) = (starts[0], starts[1]);
                let attention = |output| Attention { shape, window, q, kv, k_start, v_start, sequences, output };
                if self.format == StorageFormat::Int8 {
                    // A row's int8 scale depends on all of its heads, so all heads are first computed in f32.
                    let mut context = Matrix::acquire(q.rows(), columns);
                    self.attend_bf16(ctx, &attention(OutputRows::F32(context.shared())));
                    return self.quantized_buffer(ctx, context);
                }
                let mut context = acquire_bf16(self.layout(), q.rows(), columns);
                self.attend_bf16(ctx, &attention(OutputRows::Bf16(context.shared())));
                Buffer { rows: context.rows(), f32_rows: None, quantized: Some(QuantizedRows::Bf16(context)) }
            }
            _ => {
                let (Some(q), Some(kv)) = (&q.f32_rows, &kv.f32_rows) else {
                    unreachable!("attention needs bf16 or f32 rows");
                };
                let mut context = Matrix::acquire(q.rows(), columns);
                let (k_start, v_start, output) = (starts[0], starts[1], OutputRows::F32(context.shared()));
                let attention = Attention { shape, window, q, kv, k_start, v_start, sequences, output };
                self.attend_heads(ctx, &attention, |sequence, head, queries| {
                    // SAFETY: each head and query is computed by one thread.
                    unsafe { attention.compute::<gemm::F32>(self.path, sequence, head, queries) };
                });
                Buffer { rows: context.rows(), f32_rows: Some(context), quantized: None }
            }
        }
    }

    /// Attention in bf16: in tiles if there are any and they fit the heads.
    fn attend_bf16(&self, ctx: &ExecContext, attention: &Attention<'_, u16>) {
        let is_tiled = self.path.has_tiles() && tile_attention::is_head_size_tiled(attention.shape.head_size);
        self.attend_heads(ctx, attention, |sequence, head, queries| {
            // SAFETY: each head and query is computed by one thread.
            unsafe {
                match is_tiled {
                    true => tile_attention::compute(self.path, attention, sequence, head, queries),
                    false => attention.compute::<gemm::Bf16>(self.path, sequence, head, queries),
                }
            }
        });
    }

    /// Calls `compute` for every head of every sequence: with the sequence, the head, and a range of its queries. Split over the
    /// context's threads by sequences and heads, and also by queries if there are few of these.
    fn attend_heads<T>(
        &self,
        ctx: &ExecContext,
        attention: &Attention<'_, T>,
        compute: impl Fn(usize, usize, Range<usize>) + Sync,
    ) {
        let heads = attention.shape.heads;
        let all = attention.sequences.len() * heads;
        let lengths: Vec<usize> = attention.sequences.iter().map(|sequence| sequence.queries.len()).collect();
        let threads = ctx.threads();
        let parts = if threads == 1 { 1 } else { (2 * threads).div_ceil(all) };
        ctx.split(all * parts, |units| {
            // Units are disjoint heads or queries of the output.
            for unit in units {
                let (sequence, head, part) = (unit / parts / heads, unit / parts % heads, unit % parts);
                let n = lengths[sequence];
                let queries = n * part / parts..n * (part + 1) / parts;
                if !queries.is_empty() {
                    compute(sequence, head, queries);
                }
            }
        });
    }
}

/// If a GEMM is split by rows, the number of parts is at most `rows / MIN_SPLIT_ROWS`, rounded up.
const MIN_SPLIT_ROWS: usize = 24;

impl Backend for CpuBackend {
    type ExecContext = ExecContext;
    type Buffer = Buffer;
    type Embeddings = Embeddings;
    type Linear = Linear;
    type Norm = Norm;
    type Rotary = Rotary;

    fn describe(&self) -> String {
        let dtype = match self.format {
            StorageFormat::F32 => "f32",
            StorageFormat::Bf16 => "bf16",
            StorageFormat::Int8 => "int8",
        };
        format!("CPU, {dtype}, {}, {} threads", self.path.name(), self.pool.threads())
    }

    fn embeddings(&self, tables: EmbeddingTables) -> Result<Embeddings, BackendError> {
        let table = |tensor: HostTensor| Table::new(tensor.data, self.format, &self.pool);
        Ok(Embeddings {
            words: table(tables.words),
            positions: tables.positions.map(table),
            types: tables.types.map(table),
            norm: self.norm(tables.norm)?,
        })
    }

    fn linear(&self, weight: HostTensor, bias: HostTensor, role: LayerRole) -> Result<Linear, BackendError> {
        let format = match role {
            LayerRole::Encoder | LayerRole::Gated => self.format,
            LayerRole::Head => StorageFormat::F32,
        };
        let (layout, pool) = (OperandLayout::of(self.path, format), &self.pool);
        if role == LayerRole::Gated {
            let weights = PackedWeights::pack_gated(format, layout, &weight, &bias, pool);
            return Ok(Linear { weights, gated: Some(weight.shape[0] / 2) });
        }
        Ok(Linear { weights: PackedWeights::pack(format, layout, &weight, &bias, pool), gated: None })
    }

    fn norm(&self, weights: NormWeights) -> Result<Norm, BackendError> {
        Ok(Norm { weight: weights.weight.data, bias: weights.bias.data, eps: weights.eps as f32 })
    }

    fn rotary(&self, table: RotaryTable) -> Result<Rotary, BackendError> {
        let (cos, sin) = table.cos_sin();
        Ok(Rotary { cos, sin, half: table.frequencies.len() })
    }

    fn run(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        let lengths: Vec<usize> = batch.ranges().map(|rows| rows.len()).collect();
        let outcome = Mutex::new((vec![f32::NAN; lengths.len()], Ok(())));
        run_partitions(&self.pool, &partition_batch(&lengths, self.pool.threads()), |ctx, partition| {
            let logits = graph(ctx, &batch.select(partition));
            let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
            match logits {
                Ok(logits) => partition.iter().zip(logits).for_each(|(&sequence, logit)| outcome.0[sequence] = logit),
                Err(error) => outcome.1 = Err(error),
            }
        });
        let (logits, outcome) = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
        outcome.map(|()| logits)
    }

    fn embed(&self, ctx: &ExecContext, weights: &Embeddings, batch: &Batch) -> Result<Buffer, BackendError> {
        let (rows, c) = (batch.tokens(), weights.norm.weight.len());
        let mut sum = Matrix::<f32>::acquire(rows, c);
        let shared = sum.shared();
        ctx.split(rows, |rows| {
            let mut scratch = Matrix::<f32>::acquire(1, c);
            for row in rows {
                // SAFETY: each row is written by one thread and has c values.
                let to = unsafe { std::slice::from_raw_parts_mut(shared.row(row), c) };
                let scratch = scratch.row_mut(0);
                weights.words.read(batch.ids()[row], to, scratch, false);
                if let Some(types) = &weights.types {
                    types.read(batch.type_ids()[row], to, scratch, true);
                }
                if let Some(positions) = &weights.positions {
                    positions.read(batch.positions()[row], to, scratch, true);
                }
            }
        });
        self.layer_norm(ctx, &weights.norm, Buffer { rows, f32_rows: Some(sum), quantized: None })
    }

    fn apply(
        &self,
        ctx: &ExecContext,
        weights: &Linear,
        outputs: Range<usize>,
        x: &Buffer,
        epilogue: Epilogue<'_, Buffer>,
    ) -> Result<Buffer, BackendError> {
        let (gated, weights, rows) = (weights.gated, &weights.weights, x.rows);
        let columns = gated.unwrap_or(outputs.len());
        let (activation, residual) = match epilogue {
            Epilogue::Bias => (None, None),
            Epilogue::Activation(activation) | Epilogue::Gated(activation) => (Some(activation), None),
            Epilogue::Residual(residual) => {
                (None, Some(residual.f32_rows.as_ref().expect("the residual stream is f32")))
            }
        };
        // A gated layer computes all of its packed outputs, padding included.
        let (start, end) = match gated {
            None => (outputs.start, outputs.end),
            Some(_) => (0, weights.bias.len()),
        };
        let input = self.gemm_input(x, weights);
        let gemm = |output| Gemm { input, weights, start, end, activation, gated, residual, output };
        if weights.format == StorageFormat::F32 || residual.is_some() {
            let mut f32_rows = Matrix::acquire(rows, columns);
            self.gemm(ctx, &gemm(OutputRows::F32(f32_rows.shared())));
            if activation == Some(Activation::Tanh) {
                (0..rows).for_each(|row| f32_rows.row_mut(row).iter_mut().for_each(|value| *value = value.tanh()));
            }
            return Ok(Buffer { rows, f32_rows: Some(f32_rows), quantized: None });
        }
        let mut bf16_rows = acquire_bf16(self.layout(), rows, columns);
        self.gemm(ctx, &gemm(OutputRows::Bf16(bf16_rows.shared())));
        // With an activation, the result is the input of the next GEMM, and an int8 scale needs the whole row. Without one, it is
        // the input of attention, which reads bf16.
        if weights.format == StorageFormat::Int8 && activation.is_some() {
            let quantized = QuantizedRows::acquire(StorageFormat::Int8, self.layout(), rows, columns);
            let mut quantized = quantized.expect("int8 rows are quantized");
            self.quantize(ctx, QuantizeSource::Bf16(&bf16_rows), columns, &mut quantized, rows);
            return Ok(Buffer { rows, f32_rows: None, quantized: Some(quantized) });
        }
        Ok(Buffer { rows, f32_rows: None, quantized: Some(QuantizedRows::Bf16(bf16_rows)) })
    }

    fn layer_norm(&self, ctx: &ExecContext, weights: &Norm, x: Buffer) -> Result<Buffer, BackendError> {
        let mut f32_rows = x.f32_rows.expect("the residual stream is f32");
        let mut quantized = QuantizedRows::acquire(self.format, self.layout(), x.rows, f32_rows.columns());
        let (x_shared, quantized_shared) = (f32_rows.shared(), quantize::shared(&mut quantized));
        ctx.split(x.rows, |rows| {
            let (Norm { weight, bias, eps }, x) = (weights, NormRows::InPlace(x_shared));
            self.path.enter(LayerNorm { x, weight, bias, eps: *eps, quantized: quantized_shared, rows });
        });
        Ok(Buffer { rows: x.rows, f32_rows: Some(f32_rows), quantized })
    }

    fn pre_norm(&self, ctx: &ExecContext, weights: &Norm, x: &Buffer) -> Result<Buffer, BackendError> {
        let from = x.f32_rows.as_ref().expect("the residual stream is f32");
        let mut quantized = QuantizedRows::acquire(self.format, self.layout(), x.rows, from.columns());
        // GEMMs read the quantized rows only, if there are any.
        let mut f32_rows = quantized.is_none().then(|| Matrix::acquire(x.rows, from.columns()));
        let to = f32_rows.as_mut().map(Matrix::shared);
        let quantized_shared = quantize::shared(&mut quantized);
        ctx.split(x.rows, |rows| {
            let (Norm { weight, bias, eps }, x) = (weights, NormRows::Copy(from, to));
            self.path.enter(LayerNorm { x, weight, bias, eps: *eps, quantized: quantized_shared, rows });
        });
        Ok(Buffer { rows: x.rows, f32_rows, quantized })
    }

    fn rotate(
        &self,
        ctx: &ExecContext,
        rotary: &Rotary,
        heads: usize,
        mut x: Buffer,
        batch: &Batch,
    ) -> Result<Buffer, BackendError> {
        let rows = match (&mut x.quantized, &mut x.f32_rows) {
            (Some(QuantizedRows::Bf16(rows)), _) => RotatedRows::Bf16(rows.shared()),
            (None, Some(rows)) => RotatedRows::F32(rows.shared()),
            _ => unreachable!("queries and keys are bf16 or f32"),
        };
        let positions = batch.positions();
        ctx.split(x.rows, |range| self.path.enter(Rotate { x: rows, rotary, heads, positions, rows: range }));
        Ok(x)
    }

    fn attention(
        &self,
        ctx: &ExecContext,
        shape: AttentionShape,
        window: Option<usize>,
        qkv: &Buffer,
        batch: &Batch,
    ) -> Result<Buffer, BackendError> {
        let c = shape.heads * shape.head_size;
        let sequences: Vec<Sequence> =
            batch.ranges().map(|rows| Sequence { queries: rows.clone(), keys: rows }).collect();
        Ok(self.attend(ctx, (shape, window), qkv, qkv, [c, 2 * c], &sequences))
    }

    fn cls_attention(
        &self,
        ctx: &ExecContext,
        shape: AttentionShape,
        window: Option<usize>,
        q: &Buffer,
        kv: &Buffer,
        batch: &Batch,
    ) -> Result<Buffer, BackendError> {
        let c = shape.heads * shape.head_size;
        // The first token is at position 0, so it attends to the first keys.
        let keys = |rows: Range<usize>| rows.start..rows.end.min(rows.start + window.unwrap_or(rows.len()) + 1);
        let sequences: Vec<Sequence> =
            batch.ranges().enumerate().map(|(i, rows)| Sequence { queries: i..i + 1, keys: keys(rows) }).collect();
        Ok(self.attend(ctx, (shape, None), q, kv, [0, c], &sequences))
    }

    fn gather_cls(&self, _: &ExecContext, x: &Buffer, batch: &Batch) -> Result<Buffer, BackendError> {
        let rows = batch.cls_rows();
        Ok(Buffer {
            rows: rows.len(),
            f32_rows: x
                .f32_rows
                .as_ref()
                .map(|f32_rows| gather_rows(f32_rows, Matrix::acquire(rows.len(), f32_rows.columns()), &rows)),
            quantized: x.quantized.as_ref().map(|quantized| quantized.gather_rows(self.layout(), &rows)),
        })
    }

    fn mean_rows(&self, _: &ExecContext, x: &Buffer, batch: &Batch) -> Result<Buffer, BackendError> {
        let from = x.f32_rows.as_ref().expect("the residual stream is f32");
        let mut means = Matrix::<f32>::acquire(batch.sequences(), from.columns());
        let mut sums = vec![0f64; from.columns()];
        for (sequence, rows) in batch.ranges().enumerate() {
            sums.fill(0.0);
            let count = rows.len() as f64;
            for row in rows {
                sums.iter_mut().zip(from.row(row)).for_each(|(sum, &value)| *sum += f64::from(value));
            }
            means.row_mut(sequence).iter_mut().zip(&sums).for_each(|(mean, sum)| *mean = (sum / count) as f32);
        }
        Ok(Buffer { rows: batch.sequences(), f32_rows: Some(means), quantized: None })
    }

    fn download(&self, _: &ExecContext, x: &Buffer) -> Result<Vec<f32>, BackendError> {
        let f32_rows = x.f32_rows.as_ref().expect("graphs download only f32 rows");
        Ok((0..x.rows).flat_map(|row| f32_rows.row(row).iter().copied()).collect())
    }
}

impl Timed for CpuBackend {
    /// The time, and the share of the threads that the execution context uses.
    type Event = (Instant, f64);

    fn record_event(&self, ctx: &ExecContext) -> Result<(Instant, f64), BackendError> {
        let share = ctx.threads() as f64 / self.pool.threads() as f64;
        Ok((Instant::now(), share))
    }

    fn elapsed_seconds(&self, from: &(Instant, f64), to: &(Instant, f64)) -> Result<f64, BackendError> {
        Ok(to.0.duration_since(from.0).as_secs_f64() * to.1)
    }

    fn roofline(&self) -> Result<Option<Roofline>, BackendError> {
        let peak =
            |format| roofline::peak_of(format, self.pool.threads()).map_err(|error| BackendError::Failed(error.into()));
        let gemms = peak(self.format)?;
        let attention = if self.format == StorageFormat::Int8 { peak(StorageFormat::Bf16)? } else { gemms };
        Ok(Some(Roofline { gemms, attention, memory: None }))
    }
}
