//! Attention of a sequence's queries to its keys, a head at a time, without a matrix of L x L.
//!
//! ```text
//! pack K^T and V of the head as panels
//! for each block of queries:
//!     for each block of keys:                      scores of a block stay in cache
//!         scores = Q K^T                           the product's kernel
//!         weights = 2^((scores - largest so far) log2(e) / sqrt(D))
//!         context = context * 2^(what `largest` grew) + weights V
//!     context / sum of weights
//! ```
//!
//! The running maximum is Milakov and Gimelshein's ("Online normalizer calculation for softmax", 2018), by blocks as in
//! FlashAttention (Dao et al. 2022). Every query's row is computed by itself, and blocks of keys are counted from the
//! sequence's first: nothing depends on what else is in the batch, or on how queries are shared among threads.

use std::ops::Range;

use super::epilogue::Output;
use super::gemm::{self, Dot, Operands};
use super::simd::{Accuracy, exp2, store_partial, store_partial_bf16};
use super::simd::{Isa, Op, SimdPath};
use super::workspace::Matrix;
use crate::backend::AttentionShape;

/// Queries of a block: four tiles of six.
const BLOCK_QUERIES: usize = 24;

/// Keys of a block: a whole number of panels on every instruction set.
const BLOCK_KEYS: usize = 512;

/// A sequence's queries and keys, as rows.
#[derive(Debug, Clone)]
pub(super) struct Sequence {
    /// Rows of `q`, and of the output.
    pub(super) queries: Range<usize>,
    /// Rows of `kv`.
    pub(super) keys: Range<usize>,
}

/// Attention of every head of some sequences.
#[derive(Debug)]
pub(super) struct Attention<'a, T> {
    pub(super) shape: AttentionShape,
    /// Queries, from column 0.
    pub(super) q: &'a Matrix<T>,
    /// Keys from column `k_start`, values from `v_start`.
    pub(super) kv: &'a Matrix<T>,
    pub(super) k_start: usize,
    pub(super) v_start: usize,
    pub(super) sequences: &'a [Sequence],
    /// `[queries, C]`
    pub(super) output: Output<'a>,
}

/// Numbers that attention is computed in: what it adds to a product's [`Dot`].
pub(super) trait Element: Dot {
    /// As stored.
    type Value: bytemuck::Pod;
    /// Values of a k-step.
    const PER_STEP: usize;
    const EXACTNESS: Accuracy;
    const FORMAT: Self;

    /// Value by value, as words of k-steps.
    fn bits(value: Self::Value) -> u32;

    /// # Safety
    /// `to` may be written for n values, or a whole vector where n is more.
    unsafe fn store<I: Isa>(isa: I, to: *mut Self::Value, n: usize, x: I::F);
}

impl Element for gemm::F32 {
    type Value = f32;
    const PER_STEP: usize = 1;
    const EXACTNESS: Accuracy = Accuracy::F32;
    const FORMAT: Self = Self;

    #[inline(always)]
    fn bits(value: f32) -> u32 {
        value.to_bits()
    }
    #[inline(always)]
    unsafe fn store<I: Isa>(isa: I, to: *mut f32, n: usize, x: I::F) {
        // SAFETY: the caller's promise.
        unsafe { store_partial(isa, to, n, x) }
    }
}

impl Element for gemm::Bf16 {
    type Value = u16;
    const PER_STEP: usize = 2;
    const EXACTNESS: Accuracy = Accuracy::Bf16;
    const FORMAT: Self = Self;

    #[inline(always)]
    fn bits(value: u16) -> u32 {
        value.into()
    }
    #[inline(always)]
    unsafe fn store<I: Isa>(isa: I, to: *mut u16, n: usize, x: I::F) {
        // SAFETY: the caller's promise.
        unsafe { store_partial_bf16(isa, to, n, x) }
    }
}

impl<T: bytemuck::Pod + Send + Sync> Attention<'_, T> {
    /// Computes one head of one sequence, for the given ones of its queries (counted from its first).
    ///
    /// # Safety
    /// No other thread computes the same ones meanwhile.
    pub(super) unsafe fn compute<E: Element<Value = T>>(
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
        let queries = all.start + queries.start..all.start + queries.end;
        path.enter(Head::<E> { attention: self, head, queries, keys: keys.clone() });
    }
}

/// One head of one sequence.
struct Head<'a, E: Element> {
    attention: &'a Attention<'a, E::Value>,
    head: usize,
    queries: Range<usize>,
    keys: Range<usize>,
}

impl<E: Element> Op for Head<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Attention { shape, q, kv, k_start, v_start, output, .. } = *self.attention;
        let (d, column, keys) = (shape.head_size, self.head * shape.head_size, self.keys.len());
        let steps = d.div_ceil(E::PER_STEP);
        let key_panels = keys.div_ceil(I::PANEL);
        let value_steps = keys.div_ceil(E::PER_STEP);
        // Narrow heads have narrow panels of values: half a register tile of zeros would cost as much as a full one.
        let vectors =
            if d <= I::LANES { 1 } else { 2.max(I::PANEL_VECTORS.min(d.div_ceil(I::LANES).next_power_of_two())) };
        let value_width = vectors * I::LANES;
        let value_panels = d.div_ceil(value_width);

        let mut packed_keys = Matrix::<u32>::take(key_panels * steps, I::PANEL);
        let mut packed_values = Matrix::<u32>::take(1, value_panels * value_steps * value_width);
        // And before that the keys of a vector, which are fewer.
        let mut packed_queries = Matrix::<u32>::take(1, BLOCK_QUERIES * steps);
        // No wider than its keys, but for a line: rows a power of two apart would share few sets of the cache.
        let block_keys = BLOCK_KEYS.min(keys.next_multiple_of(I::PANEL));
        let mut scores = Matrix::<f32>::take(BLOCK_QUERIES, block_keys + 16);
        let mut weights = Matrix::<E::Value>::take(BLOCK_QUERIES, block_keys + 32);
        let mut context = Matrix::<f32>::take(BLOCK_QUERIES, value_panels * value_width);
        let (mut largest, mut total) = ([0f32; BLOCK_QUERIES], [0f32; BLOCK_QUERIES]);
        let packed_keys = packed_keys.all_mut();
        let packed_values = packed_values.all_mut();
        let packed_queries = packed_queries.all_mut();

        pack_keys::<I, E>(isa, kv, self.keys.clone(), k_start + column, d, packed_queries, packed_keys);
        for panel in 0..value_panels {
            let to = &mut packed_values[panel * value_steps * value_width..][..value_steps * value_width];
            let first = panel * value_width;
            let columns = v_start + column + first..v_start + column + d.min(first + value_width);
            pack_values::<E>(kv, self.keys.clone(), columns, value_width, to);
        }

        let factor = std::f32::consts::LOG2_E / (d as f32).sqrt();
        for block in (self.queries.start..self.queries.end).step_by(BLOCK_QUERIES) {
            let rows = BLOCK_QUERIES.min(self.queries.end - block);
            let (words, words_stride) = if whole_steps::<E>(d, column) {
                (q.row(block)[column..].as_ptr().cast::<u32>(), q.stride() / E::PER_STEP)
            } else {
                for row in 0..rows {
                    let from = &q.row(block + row)[column..][..d];
                    pack_words::<E>(from, &mut packed_queries[row * steps..][..steps]);
                }
                (packed_queries.as_ptr(), steps)
            };
            for first_key in (0..keys).step_by(BLOCK_KEYS) {
                let n = BLOCK_KEYS.min(keys - first_key);
                // SAFETY: all matrices were taken above with a row for each query of a block and a column for each key of it;
                // packed keys and values have a panel for every key and column.
                unsafe {
                    for panel in 0..n.div_ceil(I::PANEL) {
                        let vectors = key_vectors::<I>(n - panel * I::PANEL);
                        for tile in gemm::tiles(0..rows) {
                            let operands = Operands {
                                a: words.add(tile.start * words_stride),
                                a_stride: words_stride,
                                b: packed_keys.as_ptr().add((first_key / I::PANEL + panel) * steps * I::PANEL),
                                steps,
                                sums: scores.shared().row(tile.start).add(panel * I::PANEL).cast(),
                                sums_stride: scores.stride(),
                                resume: false,
                                ahead: std::ptr::null(),
                                ahead_stride: 0,
                            };
                            gemm::multiply(isa, E::FORMAT, operands, tile.len(), vectors);
                        }
                    }
                    for row in 0..rows {
                        let first = first_key == 0;
                        let before = if first { f32::NEG_INFINITY } else { largest[row] };
                        let (scores, to) = (scores.shared().row(row), weights.shared().row(row));
                        let (now, sum) = soften::<I, E>(isa, scores, n, factor, before, to);
                        largest[row] = now;
                        if first {
                            total[row] = sum;
                            continue;
                        }
                        let shrink = exp2(isa, isa.splat((before - now) * factor), Accuracy::F32);
                        total[row] = total[row] * isa.max_of(shrink) + sum;
                        let context = context.shared().row(row);
                        for at in (0..value_panels * value_width).step_by(I::LANES) {
                            isa.store(context.add(at), isa.mul(isa.load(context.add(at)), shrink));
                        }
                    }
                    for panel in 0..value_panels {
                        let step = panel * value_steps + first_key / E::PER_STEP;
                        for tile in gemm::tiles(0..rows) {
                            let operands = Operands {
                                a: weights.shared().row(tile.start).cast(),
                                a_stride: weights.stride() / E::PER_STEP,
                                b: packed_values.as_ptr().add(step * value_width),
                                steps: n.div_ceil(E::PER_STEP),
                                sums: context.shared().row(tile.start).add(panel * value_width).cast(),
                                sums_stride: context.stride(),
                                resume: first_key > 0,
                                ahead: std::ptr::null(),
                                ahead_stride: 0,
                            };
                            gemm::multiply(isa, E::FORMAT, operands, tile.len(), vectors);
                        }
                    }
                }
            }
            for (row, total) in total.iter().enumerate().take(rows) {
                let inverse = isa.splat(1.0 / total);
                for at in (0..d).step_by(I::LANES) {
                    // SAFETY: the output has C columns, d of them this head's, and nobody else writes them.
                    unsafe {
                        let value = isa.mul(isa.load(context.shared().row(row).add(at)), inverse);
                        match output {
                            Output::F32(to) => store_partial(isa, to.row(block + row).add(column + at), d - at, value),
                            Output::Bf16(to) => {
                                store_partial_bf16(isa, to.row(block + row).add(column + at), d - at, value)
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Weights of one query's scores of a block, before they are divided by their sum: `2^((score - largest) factor)`.
/// Returns the largest score up to here and the sum of these weights.
///
/// # Safety
/// `scores` has n values and may be read, as `to` may be written, to the end of the vector that n ends in.
#[inline(always)]
unsafe fn soften<I: Isa, E: Element>(
    isa: I,
    scores: *const f32,
    n: usize,
    factor: f32,
    before: f32,
    to: *mut E::Value,
) -> (f32, f32) {
    let whole = n / I::LANES * I::LANES;
    // SAFETY: the caller's promise.
    unsafe {
        // Four at a time: one after the other, each would wait for the one before.
        let mut parts = [isa.splat(before); 4];
        let unrolled = whole / (4 * I::LANES) * (4 * I::LANES);
        for at in (0..unrolled).step_by(4 * I::LANES) {
            for (i, part) in parts.iter_mut().enumerate() {
                *part = isa.max(*part, isa.load(scores.add(at + i * I::LANES)));
            }
        }
        for at in (unrolled..whole).step_by(I::LANES) {
            parts[0] = isa.max(parts[0], isa.load(scores.add(at)));
        }
        let mut most = isa.max(isa.max(parts[0], parts[1]), isa.max(parts[2], parts[3]));
        let last = if whole < n {
            isa.first_lanes(isa.load(scores.add(whole)), n - whole, f32::NEG_INFINITY)
        } else {
            isa.splat(f32::NEG_INFINITY)
        };
        most = isa.max(most, last);
        let largest = isa.max_of(most);
        let (scale, shift) = (isa.splat(factor), isa.splat(-largest * factor));
        let mut sum = isa.splat(0.0);
        for at in (0..whole).step_by(I::LANES) {
            let weight = power::<I, E>(isa, isa.fma(isa.load(scores.add(at)), scale, shift));
            sum = isa.add(sum, weight);
            E::store(isa, to.add(at), I::LANES, weight);
        }
        if whole < n {
            let weight = power::<I, E>(isa, isa.fma(last, scale, shift));
            let weight = isa.first_lanes(weight, n - whole, 0.0);
            sum = isa.add(sum, weight);
            // With the zeros that fill the last k-step.
            E::store(isa, to.add(whole), I::LANES, weight);
        }
        (largest, isa.sum(sum))
    }
}

/// `2^x` as exactly as the element needs.
#[inline(always)]
fn power<I: Isa, E: Element>(isa: I, x: I::F) -> I::F {
    match E::EXACTNESS {
        Accuracy::F32 => exp2(isa, x, Accuracy::F32),
        Accuracy::Bf16 => isa.exp2_for_bf16(x),
    }
}

/// Vectors of a panel of `keys` keys: a register tile has one, two or four, and the last keys need not fill the widest.
#[inline(always)]
fn key_vectors<I: Isa>(keys: usize) -> usize {
    keys.div_ceil(I::LANES).next_power_of_two().min(I::PANEL_VECTORS)
}

/// Keys as the second factor of a product: panels of `[steps, PANEL]` words, the last as wide as it must be. What is beyond the last
/// key is unspecified: its scores are not read. `rows` has room for a vector's keys.
#[inline(always)]
fn pack_keys<I: Isa, E: Element>(
    isa: I,
    kv: &Matrix<E::Value>,
    keys: Range<usize>,
    column: usize,
    d: usize,
    rows: &mut [u32],
    to: &mut [u32],
) {
    let steps = d.div_ceil(E::PER_STEP);
    for (panel, to) in (0..keys.len()).step_by(I::PANEL).zip(to.chunks_mut(steps * I::PANEL)) {
        let in_panel = I::PANEL.min(keys.len() - panel);
        let width = key_vectors::<I>(in_panel) * I::LANES;
        for first in (0..in_panel).step_by(I::LANES) {
            let n = I::LANES.min(in_panel - first);
            let key = keys.start + panel + first;
            let (from, stride) = if n == I::LANES && whole_steps::<E>(d, column) {
                (kv.row(key)[column..].as_ptr().cast(), kv.stride() / E::PER_STEP)
            } else {
                for (row, key) in rows.chunks_mut(steps).zip(key..key + n) {
                    pack_words::<E>(&kv.row(key)[column..][..d], row);
                }
                (rows.as_ptr(), steps)
            };
            assert!(rows.len() >= I::LANES * steps && to.len() >= (steps - 1) * width + first + I::LANES);
            // SAFETY: there are LANES rows of `steps` words from here on, and the panel has room for their columns.
            unsafe { isa.transpose(from, stride, steps, to[first..].as_mut_ptr(), width) };
        }
    }
}

/// Values as the second factor of a product: `[steps, width]` words of the columns, zeros beyond the last key and column.
#[inline(always)]
fn pack_values<E: Element>(
    kv: &Matrix<E::Value>,
    keys: Range<usize>,
    columns: Range<usize>,
    width: usize,
    to: &mut [u32],
) {
    let row = |key: usize| &kv.row(key)[columns.clone()];
    for (step, to) in to.chunks_mut(width).enumerate() {
        let key = keys.start + step * E::PER_STEP;
        let (to, beyond) = to.split_at_mut(columns.len());
        beyond.fill(0);
        if E::PER_STEP == 1 {
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

/// Whether a head's columns are whole words where they lie. Heads of odd width are copied.
#[inline(always)]
fn whole_steps<E: Element>(d: usize, column: usize) -> bool {
    d.is_multiple_of(E::PER_STEP) && column.is_multiple_of(E::PER_STEP)
}

/// One row as words of k-steps.
#[inline(always)]
fn pack_words<E: Element>(from: &[E::Value], to: &mut [u32]) {
    for (to, values) in to.iter_mut().zip(from.chunks(E::PER_STEP)) {
        *to = values.iter().rev().fold(0, |word, &value| word.unbounded_shl(32 / E::PER_STEP as u32) | E::bits(value));
    }
}
