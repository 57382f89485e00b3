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

use super::epilogue::OutputRows;
use super::gemm::{self, Dot, Operands};
use super::simd::{Accuracy, Isa, MAX_LANES, SimdOp, SimdPath, exp2, store_partial, store_partial_bf16};
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

/// A storage format for attention: adds to [`Dot`] what packing and softmax need.
pub(super) trait AttentionFormat: Dot {
    /// The type of a stored number of Q, K or V, or of a weight.
    type Value: bytemuck::Pod;
    /// Numbers in a k-group (see `packed.rs`).
    const VALUES_PER_K_GROUP: usize;
    /// Accuracy of the softmax's exponentials.
    const ACCURACY: Accuracy;
    const INSTANCE: Self;

    /// The value's bits, in the low bits of a word.
    fn bits(value: Self::Value) -> u32;

    /// # Safety
    /// `to` is valid for writes of `min(n, LANES)` values.
    unsafe fn store<I: Isa>(isa: I, to: *mut Self::Value, n: usize, x: I::Floats);
}

impl AttentionFormat for gemm::F32 {
    type Value = f32;
    const VALUES_PER_K_GROUP: usize = 1;
    const ACCURACY: Accuracy = Accuracy::F32;
    const INSTANCE: Self = Self;

    #[inline(always)]
    fn bits(value: f32) -> u32 {
        value.to_bits()
    }
    #[inline(always)]
    unsafe fn store<I: Isa>(isa: I, to: *mut f32, n: usize, x: I::Floats) {
        // SAFETY: guaranteed by the caller.
        unsafe { store_partial(isa, to, n, x) }
    }
}

impl AttentionFormat for gemm::Bf16 {
    type Value = u16;
    const VALUES_PER_K_GROUP: usize = 2;
    const ACCURACY: Accuracy = Accuracy::Bf16;
    const INSTANCE: Self = Self;

    #[inline(always)]
    fn bits(value: u16) -> u32 {
        value.into()
    }
    #[inline(always)]
    unsafe fn store<I: Isa>(isa: I, to: *mut u16, n: usize, x: I::Floats) {
        // SAFETY: guaranteed by the caller.
        unsafe { store_partial_bf16(isa, to, n, x) }
    }
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
        let Sequence { queries: all, keys } = &self.sequences[sequence];
        let c = self.shape.heads * self.shape.head_size;
        assert!(head < self.shape.heads && queries.end <= all.len() && !keys.is_empty());
        assert!(all.end <= self.q.rows() && keys.end <= self.kv.rows() && self.q.columns() >= c);
        assert!(self.kv.columns() >= c + self.k_start.max(self.v_start));
        let first_query = all.start;
        let queries = all.start + queries.start..all.start + queries.end;
        path.enter(HeadAttention::<E> { attention: self, head, first_query, queries, keys: keys.clone() });
    }
}

/// One head of one sequence.
struct HeadAttention<'a, E: AttentionFormat> {
    attention: &'a Attention<'a, E::Value>,
    head: usize,
    /// The row of the query at position 0.
    first_query: usize,
    queries: Range<usize>,
    keys: Range<usize>,
}

impl<E: AttentionFormat> SimdOp for HeadAttention<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Attention { shape, window, q, kv, k_start, v_start, output, .. } = *self.attention;
        let (d, column, keys) = (shape.head_size, self.head * shape.head_size, self.keys.len());
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
        let (mut row_max, mut row_sum) = ([0f32; BLOCK_QUERIES], [0f32; BLOCK_QUERIES]);
        let packed_keys = packed_keys.as_mut_slice();
        let packed_values = packed_values.as_mut_slice();
        let packed_queries = packed_queries.as_mut_slice();

        pack_keys::<I, E>(isa, kv, self.keys.clone(), k_start + column, d, packed_queries, packed_keys);
        for panel in 0..value_panels {
            let to = &mut packed_values[panel * value_k_groups * value_width..][..value_k_groups * value_width];
            let first = panel * value_width;
            let columns = v_start + column + first..v_start + column + d.min(first + value_width);
            pack_values::<E>(kv, self.keys.clone(), columns, value_width, to);
        }

        let factor = std::f32::consts::LOG2_E / (d as f32).sqrt();
        for block in (self.queries.start..self.queries.end).step_by(BLOCK_QUERIES) {
            let rows = BLOCK_QUERIES.min(self.queries.end - block);
            let (words, words_stride) = if whole_k_groups::<E>(d, column) {
                (q.row(block)[column..].as_ptr().cast::<u32>(), q.stride() / E::VALUES_PER_K_GROUP)
            } else {
                for row in 0..rows {
                    let from = &q.row(block + row)[column..][..d];
                    pack_row::<E>(from, &mut packed_queries[row * k_groups..][..k_groups]);
                }
                (packed_queries.as_ptr(), k_groups)
            };
            let position = block - self.first_query;
            let read_keys = match window {
                None => 0..keys,
                // Rounded to whole panels.
                Some(window) => {
                    let first = position.saturating_sub(window) / I::PANEL_COLUMNS * I::PANEL_COLUMNS;
                    first..keys.min((position + rows + window).next_multiple_of(I::PANEL_COLUMNS))
                }
            };
            let mut next_key = read_keys.start;
            while next_key < read_keys.end {
                let first_key = next_key;
                let first = first_key == read_keys.start;
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
                    for row in 0..rows {
                        let old_max = if first { f32::NEG_INFINITY } else { row_max[row] };
                        let (scores, to) = (scores.shared().row(row), weights.shared().row(row));
                        let (new_max, sum) = match window {
                            None => softmax_block::<I, E>(isa, scores, n, factor, old_max, to),
                            Some(window) => {
                                let visible = (position + row).saturating_sub(window)..position + row + window + 1;
                                let visible = visible.start.clamp(first_key, next_key) - first_key
                                    ..visible.end.clamp(first_key, next_key) - first_key;
                                softmax_window::<I, E>(isa, scores, n, visible, factor, old_max, to)
                            }
                        };
                        row_max[row] = new_max;
                        if first {
                            row_sum[row] = sum;
                            continue;
                        }
                        let (maxima, columns) = ([old_max, new_max], value_panels * value_width);
                        add_block(isa, maxima, factor, &mut row_sum[row], sum, context.shared().row(row), columns);
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
                                accumulate: !first,
                                prefetch: std::ptr::null(),
                                prefetch_stride: 0,
                            };
                            gemm::multiply(isa, E::INSTANCE, operands, tile.len(), vectors);
                        }
                    }
                }
            }
            for (row, sum) in row_sum.iter().enumerate().take(rows) {
                let inverse = isa.splat(1.0 / sum);
                for at in (0..d).step_by(I::LANES) {
                    // SAFETY: the output has C columns, d of them are this head's, and no other thread writes them.
                    unsafe {
                        let value = isa.mul(isa.load(context.shared().row(row).add(at)), inverse);
                        match output {
                            OutputRows::F32(to) => {
                                store_partial(isa, to.row(block + row).add(column + at), d - at, value)
                            }
                            OutputRows::Bf16(to) => {
                                store_partial_bf16(isa, to.row(block + row).add(column + at), d - at, value)
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Adds a block's sum of weights to a query's, and rescales both the query's sum and its context, `[columns]`, from the old
/// maximum to the new one.
///
/// # Safety
/// `context` is valid for reads and writes of whole vectors up to `columns`.
#[inline(always)]
pub(super) unsafe fn add_block<I: Isa>(
    isa: I,
    [old_max, new_max]: [f32; 2],
    factor: f32,
    row_sum: &mut f32,
    sum: f32,
    context: *mut f32,
    columns: usize,
) {
    if new_max == old_max {
        // Nothing to rescale. While no key has been visible, both are -infinity.
        *row_sum += sum;
        return;
    }
    let rescale = exp2(isa, isa.splat((old_max - new_max) * factor), Accuracy::F32);
    *row_sum = *row_sum * isa.reduce_max(rescale) + sum;
    for at in (0..columns).step_by(I::LANES) {
        // SAFETY: guaranteed by the caller.
        unsafe { isa.store(context.add(at), isa.mul(isa.load(context.add(at)), rescale)) };
    }
}

/// Unnormalized softmax of one query's scores for a block of keys: `weight = 2^((score - max) factor)`, where `max`
/// includes `old_max`, the maximum of earlier blocks. Returns `max` and the sum of the block's weights.
///
/// # Safety
/// `scores` has n values. It is valid for reads, and `to` for writes, up to the end of the last vector.
#[inline(always)]
pub(super) unsafe fn softmax_block<I: Isa, E: AttentionFormat>(
    isa: I,
    scores: *const f32,
    n: usize,
    factor: f32,
    old_max: f32,
    to: *mut E::Value,
) -> (f32, f32) {
    let whole = n / I::LANES * I::LANES;
    // SAFETY: guaranteed by the caller.
    unsafe {
        // Four independent maxima, because a single one would be limited by instruction latency.
        let mut parts = [isa.splat(old_max); 4];
        let unrolled = whole / (4 * I::LANES) * (4 * I::LANES);
        for at in (0..unrolled).step_by(4 * I::LANES) {
            for (i, part) in parts.iter_mut().enumerate() {
                *part = isa.max(*part, isa.load(scores.add(at + i * I::LANES)));
            }
        }
        for at in (unrolled..whole).step_by(I::LANES) {
            parts[0] = isa.max(parts[0], isa.load(scores.add(at)));
        }
        let mut max = isa.max(isa.max(parts[0], parts[1]), isa.max(parts[2], parts[3]));
        let last = if whole < n {
            isa.first_lanes(isa.load(scores.add(whole)), n - whole, f32::NEG_INFINITY)
        } else {
            isa.splat(f32::NEG_INFINITY)
        };
        max = isa.max(max, last);
        let max = isa.reduce_max(max);
        let (scale, shift) = (isa.splat(factor), isa.splat(-max * factor));
        let mut sum = isa.splat(0.0);
        for at in (0..whole).step_by(I::LANES) {
            let weight = exp2_with_accuracy::<I, E>(isa, isa.fma(isa.load(scores.add(at)), scale, shift));
            sum = isa.add(sum, weight);
            E::store(isa, to.add(at), I::LANES, weight);
        }
        if whole < n {
            let weight = exp2_with_accuracy::<I, E>(isa, isa.fma(last, scale, shift));
            let weight = isa.first_lanes(weight, n - whole, 0.0);
            sum = isa.add(sum, weight);
            // Stores a whole vector: its zeros pad the last k-group.
            E::store(isa, to.add(whole), I::LANES, weight);
        }
        (max, isa.reduce_sum(sum))
    }
}

/// [`softmax_block`] where only the keys in `visible` have weights; those of the other keys are zero. Without any visible key
/// it returns `old_max` and 0.
///
/// # Safety
/// As for [`softmax_block`]; `scores` must also be valid for writes.
#[inline(always)]
pub(super) unsafe fn softmax_window<I: Isa, E: AttentionFormat>(
    isa: I,
    scores: *mut f32,
    n: usize,
    visible: Range<usize>,
    factor: f32,
    old_max: f32,
    to: *mut E::Value,
) -> (f32, f32) {
    // From the first vector with a visible key to the last.
    let (start, end) = match visible.is_empty() {
        true => (0, 0),
        false => (visible.start / I::LANES * I::LANES, visible.end.next_multiple_of(I::LANES)),
    };
    // SAFETY: guaranteed by the caller: both are valid up to the end of the last vector.
    unsafe {
        for at in (0..start).step_by(I::LANES).chain((end..n).step_by(I::LANES)) {
            E::store(isa, to.add(at), I::LANES, isa.splat(0.0));
        }
        let mut max = isa.splat(old_max);
        for at in (start..end).step_by(I::LANES) {
            if at < visible.start || at + I::LANES > visible.end {
                for hidden in (at..visible.start).chain(visible.end.max(at)..at + I::LANES) {
                    *scores.add(hidden) = f32::NEG_INFINITY;
                }
            }
            max = isa.max(max, isa.load(scores.add(at)));
        }
        if end == start {
            return (old_max, 0.0);
        }
        let max = isa.reduce_max(max);
        let (scale, shift) = (isa.splat(factor), isa.splat(-max * factor));
        let mut sum = isa.splat(0.0);
        for at in (start..end).step_by(I::LANES) {
            let mut weight = exp2_with_accuracy::<I, E>(isa, isa.fma(isa.load(scores.add(at)), scale, shift));
            if at < visible.start || at + I::LANES > visible.end {
                weight = isa.first_lanes(weight, visible.end.saturating_sub(at).min(I::LANES), 0.0);
                weight = without_first_lanes(isa, weight, visible.start.saturating_sub(at));
            }
            sum = isa.add(sum, weight);
            E::store(isa, to.add(at), I::LANES, weight);
        }
        (max, isa.reduce_sum(sum))
    }
}

/// x with zeros in its first n lanes.
#[inline(always)]
fn without_first_lanes<I: Isa>(isa: I, x: I::Floats, n: usize) -> I::Floats {
    let mut lanes = [0f32; MAX_LANES];
    // SAFETY: the array has room for the widest vector.
    unsafe {
        isa.store(lanes.as_mut_ptr(), x);
        lanes[..n].fill(0.0);
        isa.load(lanes.as_ptr())
    }
}

/// `2^x`, as accurate as the storage format requires.
#[inline(always)]
fn exp2_with_accuracy<I: Isa, E: AttentionFormat>(isa: I, x: I::Floats) -> I::Floats {
    match E::ACCURACY {
        Accuracy::F32 => exp2(isa, x, Accuracy::F32),
        Accuracy::Bf16 => isa.exp2_for_bf16(x),
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
