//! Attention of a sequence's queries to its keys, one head at a time, in blocks. The full score matrix is never stored.
//!
//! ```text
//! pack K^T and V of the head as panels
//! for each block of queries:
//!     for each block of keys:                      a block's scores fit in cache
//!         scores = Q K^T                           the GEMM's microkernel
//!         weights = 2^((scores - new row_max) log2(e) / sqrt(D))
//!         context = context * 2^((old row_max - new row_max) log2(e) / sqrt(D)) + weights V
//!     output = context / row_sum
//! ```
//!
//! The online softmax is Milakov and Gimelshein's ("Online normalizer calculation for softmax", 2018), in blocks as in
//! FlashAttention (Dao et al. 2022). Results are batch-invariant and do not depend on how queries are split among threads:
//! each query's row is computed independently, and the boundaries between blocks of keys are relative to the sequence's first key.
//!
//! With a window, a block of queries reads only the panels with a key that at least one of them attends to, so the
//! multiplications are proportional to the window. Other keys in these panels have a weight of exactly zero, which changes no sum.

use std::ops::Range;

use super::attention_format::AttentionFormat;
use super::epilogue::OutputRows;
use super::gemm::{self, Operands};
use super::simd::{Isa, SimdOp, SimdPath, store_partial, store_partial_bf16};
use super::softmax::{KeyBlock, RowSoftmax};
use super::workspace::Matrix;
use crate::backend::AttentionShape;

/// Queries per block: four microkernel tiles of six rows.
const BLOCK_QUERIES: usize = 24;

/// Keys per block: a multiple of the panel width on every instruction set.
const BLOCK_KEYS: usize = 512;

/// The rows of a sequence's queries and keys.
#[derive(Debug, Clone)]
pub(super) struct Sequence {
    /// Rows of `q`, and of the output.
    pub(super) queries: Range<usize>,
    /// Rows of `kv`.
    pub(super) keys: Range<usize>,
}

/// Inputs and output of attention over packed sequences, for all heads.
#[derive(Debug)]
pub(super) struct Attention<'a, T> {
    pub(super) shape: AttentionShape,
    /// The largest distance between a query and its keys. Query i of a sequence then has the position of key i.
    pub(super) window: Option<usize>,
    /// Queries are columns 0 to C.
    pub(super) q: &'a Matrix<T>,
    /// Keys start at column `k_start`, values at `v_start`.
    pub(super) kv: &'a Matrix<T>,
    pub(super) k_start: usize,
    pub(super) v_start: usize,
    pub(super) sequences: &'a [Sequence],
    /// `[queries, C]`
    pub(super) output: OutputRows<'a>,
}

impl<T: bytemuck::Pod + Send + Sync> Attention<'_, T> {
    /// Computes one head of one sequence for `queries`, which are indices relative to the sequence's first query.
    ///
    /// # Safety
    /// No other thread accesses the same part of the output at the same time.
    pub(super) unsafe fn compute<E: AttentionFormat<Value = T>>(
        &self,
        path: SimdPath,
        sequence: usize,
        head: usize,
        queries: Range<usize>,
    ) {
        path.enter(HeadAttention::<E>(self.part(sequence, head, queries)));
    }

    /// Checks and returns one head of one sequence for `queries`, which are indices relative to the sequence's first query.
    pub(super) fn part(&self, sequence: usize, head: usize, queries: Range<usize>) -> AttentionPart<'_, T> {
        let Sequence { queries: all, keys } = &self.sequences[sequence];
        let c = self.shape.heads * self.shape.head_size;
        assert!(head < self.shape.heads && queries.end <= all.len() && !keys.is_empty());
        assert!(all.end <= self.q.rows() && keys.end <= self.kv.rows() && self.q.columns() >= c);
        assert!(self.kv.columns() >= c + self.k_start.max(self.v_start));
        let first_query = all.start;
        let queries = all.start + queries.start..all.start + queries.end;
        AttentionPart { attention: self, head, first_query, queries, keys: keys.clone() }
    }
}

/// One head of one sequence, for some of its queries.
pub(super) struct AttentionPart<'a, T> {
    pub(super) attention: &'a Attention<'a, T>,
    pub(super) head: usize,
    /// The row of the query at position 0.
    pub(super) first_query: usize,
    /// Rows of `q`.
    pub(super) queries: Range<usize>,
    /// Rows of `kv`.
    pub(super) keys: Range<usize>,
}

impl<T: bytemuck::Pod> AttentionPart<'_, T> {
    /// The positions of the keys that the queries in `rows` of `q` attend to, rounded to multiples of `step`.
    pub(super) fn visible_keys(&self, rows: Range<usize>, step: usize) -> Range<usize> {
        let (first, last) = (rows.start - self.first_query, rows.end - self.first_query);
        match self.attention.window {
            None => 0..self.keys.len(),
            Some(window) => {
                let start = first.saturating_sub(window) / step * step;
                start..self.keys.len().min((last + window).next_multiple_of(step))
            }
        }
    }

    /// The factor of a weight's exponent: `weight = 2^((score - max) factor)`.
    pub(super) fn exponent_factor(&self) -> f32 {
        std::f32::consts::LOG2_E / (self.attention.shape.head_size as f32).sqrt()
    }

    /// Stores a query's output: its context divided by its sum of weights.
    ///
    /// # Safety
    /// `query` is a row of `q`, `context` is valid for whole vectors up to the head size, and no other thread accesses this part of
    /// the output at the same time.
    #[inline(always)]
    pub(super) unsafe fn store<I: Isa>(&self, isa: I, query: usize, context: *const f32, sum: f32) {
        let Attention { shape: AttentionShape { head_size: d, .. }, output, .. } = *self.attention;
        let (column, inverse) = (self.head * d, isa.splat(1.0 / sum));
        for at in (0..d).step_by(I::LANES) {
            // SAFETY: guaranteed by the caller. The output has C columns, and D of them are this head's.
            unsafe {
                let value = isa.mul(isa.load(context.add(at)), inverse);
                match output {
                    OutputRows::F32(to) => store_partial(isa, to.row(query).add(column + at), d - at, value),
                    OutputRows::Bf16(to) => store_partial_bf16(isa, to.row(query).add(column + at), d - at, value),
                }
            }
        }
    }
}

struct HeadAttention<'a, E: AttentionFormat>(AttentionPart<'a, E::Value>);

impl<E: AttentionFormat> SimdOp for HeadAttention<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self(part) = self;
        let Attention { shape, window, q, kv, k_start, v_start, .. } = *part.attention;
        let (d, column, keys) = (shape.head_size, part.head * shape.head_size, part.keys.len());
        let k_groups = d.div_ceil(E::VALUES_PER_K_GROUP);
        let key_panels = keys.div_ceil(I::PANEL_COLUMNS);
        let value_k_groups = keys.div_ceil(E::VALUES_PER_K_GROUP);
        // Small heads use narrower panels of V: padding a panel with zero columns would waste multiplications.
        let vectors =
            if d <= I::LANES { 1 } else { 2.max(I::PANEL_VECTORS.min(d.div_ceil(I::LANES).next_power_of_two())) };
        let value_width = vectors * I::LANES;
        let value_panels = d.div_ceil(value_width);

        let mut packed_keys = Matrix::<u32>::acquire(key_panels * k_groups, I::PANEL_COLUMNS);
        let mut packed_values = Matrix::<u32>::acquire(1, value_panels * value_k_groups * value_width);
        // Also scratch for `pack_keys`, which packs LANES keys at a time; LANES is less than BLOCK_QUERIES.
        let mut packed_queries = Matrix::<u32>::acquire(1, BLOCK_QUERIES * k_groups);
        // At least a cache line wider than the block: with a power-of-two stride, rows would map to the same few cache sets.
        let block_keys = BLOCK_KEYS.min(keys.next_multiple_of(I::PANEL_COLUMNS));
        let mut scores = Matrix::<f32>::acquire(BLOCK_QUERIES, block_keys + 16);
        let mut weights = Matrix::<E::Value>::acquire(BLOCK_QUERIES, block_keys + 32);
        let mut context = Matrix::<f32>::acquire(BLOCK_QUERIES, value_panels * value_width);
        let mut softmax = [RowSoftmax::default(); BLOCK_QUERIES];
        let packed_keys = packed_keys.as_mut_slice();
        let packed_values = packed_values.as_mut_slice();
        let packed_queries = packed_queries.as_mut_slice();

        pack_keys::<I, E>(isa, kv, part.keys.clone(), k_start + column, d, packed_queries, packed_keys);
        for panel in 0..value_panels {
            let to = &mut packed_values[panel * value_k_groups * value_width..][..value_k_groups * value_width];
            let first = panel * value_width;
            let columns = v_start + column + first..v_start + column + d.min(first + value_width);
            pack_values::<E>(kv, part.keys.clone(), columns, value_width, to);
        }

        let (factor, columns) = (part.exponent_factor(), value_panels * value_width);
        for block in part.queries.clone().step_by(BLOCK_QUERIES) {
            let rows = BLOCK_QUERIES.min(part.queries.end - block);
            let (words, words_stride) = if whole_k_groups::<E>(d, column) {
                (q.row(block)[column..].as_ptr().cast::<u32>(), q.stride() / E::VALUES_PER_K_GROUP)
            } else {
                for row in 0..rows {
                    let from = &q.row(block + row)[column..][..d];
                    pack_row::<E>(from, &mut packed_queries[row * k_groups..][..k_groups]);
                }
                (packed_queries.as_ptr(), k_groups)
            };
            let position = block - part.first_query;
            let read_keys = part.visible_keys(block..block + rows, I::PANEL_COLUMNS);
            let mut next_key = read_keys.start;
            while next_key < read_keys.end {
                let first_key = next_key;
                let is_first = first_key == read_keys.start;
                // Blocks end at multiples of their size, wherever the first one starts.
                next_key = read_keys.end.min((first_key / BLOCK_KEYS + 1) * BLOCK_KEYS);
                let n = next_key - first_key;
                // SAFETY: the matrices acquired above have a row for each query of a block and a column for each of its
                // keys. The panels of packed K and V cover every key and every column.
                unsafe {
                    for panel in 0..n.div_ceil(I::PANEL_COLUMNS) {
                        let vectors = panel_vectors::<I>(n - panel * I::PANEL_COLUMNS);
                        for tile in gemm::tiles(0..rows) {
                            let operands = Operands {
                                a: words.add(tile.start * words_stride),
                                a_stride: words_stride,
                                b: packed_keys
                                    .as_ptr()
                                    .add((first_key / I::PANEL_COLUMNS + panel) * k_groups * I::PANEL_COLUMNS),
                                k_groups,
                                sums: scores.shared().row(tile.start).add(panel * I::PANEL_COLUMNS).cast(),
                                sums_stride: scores.stride(),
                                accumulate: false,
                                prefetch: std::ptr::null(),
                                prefetch_stride: 0,
                            };
                            gemm::multiply(isa, E::INSTANCE, operands, tile.len(), vectors);
                        }
                    }
                    let keys = KeyBlock { keys: first_key..next_key, is_first, window, factor, columns };
                    for (row, softmax) in softmax.iter_mut().enumerate().take(rows) {
                        let (scores, weights) = (scores.shared().row(row), weights.shared().row(row));
                        keys.add::<I, E>(isa, position + row, softmax, scores, weights, context.shared().row(row));
                    }
                    for panel in 0..value_panels {
                        let group = panel * value_k_groups + first_key / E::VALUES_PER_K_GROUP;
                        for tile in gemm::tiles(0..rows) {
                            let operands = Operands {
                                a: weights.shared().row(tile.start).cast(),
                                a_stride: weights.stride() / E::VALUES_PER_K_GROUP,
                                b: packed_values.as_ptr().add(group * value_width),
                                k_groups: n.div_ceil(E::VALUES_PER_K_GROUP),
                                sums: context.shared().row(tile.start).add(panel * value_width).cast(),
                                sums_stride: context.stride(),
                                accumulate: !is_first,
                                prefetch: std::ptr::null(),
                                prefetch_stride: 0,
                            };
                            gemm::multiply(isa, E::INSTANCE, operands, tile.len(), vectors);
                        }
                    }
                }
            }
            for (row, softmax) in softmax.iter().enumerate().take(rows) {
                // SAFETY: the context has a row for each query of the block.
                unsafe { part.store(isa, block + row, context.shared().row(row), softmax.sum) };
            }
        }
    }
}

/// Vectors of a panel of `keys` keys: one, two or four. The last panel may be narrower than the others.
#[inline(always)]
fn panel_vectors<I: Isa>(keys: usize) -> usize {
    keys.div_ceil(I::LANES).next_power_of_two().min(I::PANEL_VECTORS)
}

/// Packs keys as operand B: panels of `[k_groups, PANEL_COLUMNS]` words; the last may be narrower. Columns beyond the last
/// key are unspecified; their scores are not used. `rows` is scratch for one vector's keys.
#[inline(always)]
fn pack_keys<I: Isa, E: AttentionFormat>(
    isa: I,
    kv: &Matrix<E::Value>,
    keys: Range<usize>,
    column: usize,
    d: usize,
    rows: &mut [u32],
    to: &mut [u32],
) {
    let k_groups = d.div_ceil(E::VALUES_PER_K_GROUP);
    for (panel, to) in (0..keys.len()).step_by(I::PANEL_COLUMNS).zip(to.chunks_mut(k_groups * I::PANEL_COLUMNS)) {
        let in_panel = I::PANEL_COLUMNS.min(keys.len() - panel);
        let width = panel_vectors::<I>(in_panel) * I::LANES;
        for first in (0..in_panel).step_by(I::LANES) {
            let n = I::LANES.min(in_panel - first);
            let key = keys.start + panel + first;
            let (from, stride) = if n == I::LANES && whole_k_groups::<E>(d, column) {
                (kv.row(key)[column..].as_ptr().cast(), kv.stride() / E::VALUES_PER_K_GROUP)
            } else {
                for (row, key) in rows.chunks_mut(k_groups).zip(key..key + n) {
                    pack_row::<E>(&kv.row(key)[column..][..d], row);
                }
                (rows.as_ptr(), k_groups)
            };
            assert!(rows.len() >= I::LANES * k_groups && to.len() >= (k_groups - 1) * width + first + I::LANES);
            // SAFETY: `from` has LANES rows of `k_groups` words, and the panel has room for their columns.
            unsafe { isa.transpose(from, stride, k_groups, to[first..].as_mut_ptr(), width) };
        }
    }
}

/// Packs values as operand B: `[k_groups, width]` words, with zeros beyond the last key and column.
#[inline(always)]
pub(super) fn pack_values<E: AttentionFormat>(
    kv: &Matrix<E::Value>,
    keys: Range<usize>,
    columns: Range<usize>,
    width: usize,
    to: &mut [u32],
) {
    let row = |key: usize| &kv.row(key)[columns.clone()];
    for (group, to) in to.chunks_mut(width).enumerate() {
        let key = keys.start + group * E::VALUES_PER_K_GROUP;
        let (to, padding) = to.split_at_mut(columns.len());
        padding.fill(0);
        if E::VALUES_PER_K_GROUP == 1 {
            for (to, &value) in to.iter_mut().zip(row(key)) {
                *to = E::bits(value);
            }
        } else if key + 1 < keys.end {
            for ((to, &low), &high) in to.iter_mut().zip(row(key)).zip(row(key + 1)) {
                *to = E::bits(low) | E::bits(high) << 16;
            }
        } else {
            for (to, &low) in to.iter_mut().zip(row(key)) {
                *to = E::bits(low);
            }
        }
    }
}

/// Whether a head's columns are whole, aligned k-groups. If not (odd head size in bf16), rows are copied first.
#[inline(always)]
fn whole_k_groups<E: AttentionFormat>(d: usize, column: usize) -> bool {
    d.is_multiple_of(E::VALUES_PER_K_GROUP) && column.is_multiple_of(E::VALUES_PER_K_GROUP)
}

/// Packs one row into k-groups.
#[inline(always)]
fn pack_row<E: AttentionFormat>(from: &[E::Value], to: &mut [u32]) {
    for (to, values) in to.iter_mut().zip(from.chunks(E::VALUES_PER_K_GROUP)) {
        *to = values
            .iter()
            .rev()
            .fold(0, |word, &value| word.unbounded_shl(32 / E::VALUES_PER_K_GROUP as u32) | E::bits(value));
    }
}
