//! Attention in tiles: the algorithm of `attention.rs` in bf16, for heads whose size is a multiple of 32, at most 128.
//!
//! ```text
//! pack K^T as tiles [16 keys][D / 32] and V as tiles [D / 16][32 keys]
//! for each block of 16 queries:
//!     for each block of up to 256 keys:
//!         scores = Q K^T               Q in T4 to T7, a tile of K in T2 or T3, 16 x 16 scores in T0 or T1
//!         weights = softmax            as in `attention.rs`
//!         context += weights V         weights in T6, a tile of V in T4, T5 or T7, 64 columns of the context in T0 to T3
//!     output = context / row_sum
//! ```
//!
//! The last block of queries reads rows behind the last query: each row of a tile product depends on its own row of A only, and
//! theirs are not stored. V and the weights have zeros for keys behind the last. K has not: those scores are not used.

use std::ops::Range;

use super::attention::{Attention, AttentionPart, pack_values};
use super::gemm::Bf16;
use super::packed::ROWS_BEHIND;
use super::simd::{Isa, SimdPath, TILE_SIZE, TILE_WORDS, TileOp, Tiles};
use super::softmax::{KeyBlock, RowSoftmax};
use super::workspace::Matrix;

/// Keys of a block: its scores and weights stay in the L1 cache.
const TILED_BLOCK_KEYS: usize = 256;

/// Keys of a step of `weights V`: 16 k-groups of two keys.
const STEP_KEYS: usize = 2 * TILE_SIZE;

/// The most keys whose K and V stay in L1. More are read by streaming loads.
const NEAR_KEYS: usize = 128;

/// Whether heads of this size are computed in tiles.
pub(super) fn is_head_size_tiled(head_size: usize) -> bool {
    head_size.is_multiple_of(32) && (32..=128).contains(&head_size)
}

/// [`Attention::compute`] in tiles.
///
/// # Safety
/// As for [`Attention::compute`].
pub(super) unsafe fn compute(
    path: SimdPath,
    attention: &Attention<'_, u16>,
    sequence: usize,
    head: usize,
    queries: Range<usize>,
) {
    assert!(is_head_size_tiled(attention.shape.head_size));
    for matrix in [attention.q, attention.kv] {
        assert!(matrix.as_slice().len() >= (matrix.rows() + ROWS_BEHIND) * matrix.stride());
    }
    path.enter_tiles(TileAttention(attention.part(sequence, head, queries)));
}

struct TileAttention<'a>(AttentionPart<'a, u16>);

impl TileOp for TileAttention<'_> {
    #[inline(always)]
    fn run<I: Isa, T: Tiles>(self, isa: I, tiles: &mut T) {
        let part = &self.0;
        let Attention { shape, window, q, .. } = *part.attention;
        let (d, column, keys) = (shape.head_size, part.head * shape.head_size, part.keys.len());
        let padded_keys = keys.next_multiple_of(STEP_KEYS);
        let block_keys = padded_keys.min(TILED_BLOCK_KEYS);
        let mut packed_keys = Matrix::<u32>::acquire(keys.div_ceil(TILE_SIZE), d / 2 * TILE_SIZE);
        let mut packed_values = Matrix::<u32>::acquire(d / TILE_SIZE, padded_keys / 2 * TILE_SIZE);
        // Rows are an odd number of cache lines apart.
        let mut scores = Matrix::<f32>::acquire(TILE_SIZE, block_keys + 16);
        let mut weights = Matrix::<u16>::acquire(TILE_SIZE, block_keys + 32);
        let mut context = Matrix::<f32>::acquire(TILE_SIZE, d + 16);
        let mut softmax = [RowSoftmax::default(); TILE_SIZE];
        self.pack(isa, &mut packed_keys, &mut packed_values);
        let strides = (scores.stride(), weights.stride() / 2, context.stride());
        let (scores_stride, weights_stride, context_stride) = strides;
        let (scores, weights, context) = (scores.shared(), weights.shared(), context.shared());
        let (packed_keys, packed_values) = (packed_keys.shared(), packed_values.shared());

        let is_near = keys <= NEAR_KEYS;
        let factor = part.exponent_factor();
        for block in part.queries.clone().step_by(TILE_SIZE) {
            let rows = TILE_SIZE.min(part.queries.end - block);
            let position = block - part.first_query;
            let read_keys = part.visible_keys(block..block + rows, STEP_KEYS);
            let mut next_key = read_keys.start;
            while next_key < read_keys.end {
                let first_key = next_key;
                let is_first = first_key == read_keys.start;
                // Blocks end at multiples of their size, wherever the first one starts.
                next_key = read_keys.end.min((first_key / TILED_BLOCK_KEYS + 1) * TILED_BLOCK_KEYS);
                let n = next_key - first_key;
                // SAFETY: Q has 16 rows from `block` on (`compute` has checked those behind the last) and d columns. The matrices
                // acquired above have a row for each query and a column for each key of a block, padded to whole steps. The packed
                // tiles cover all keys, and the head's columns.
                unsafe {
                    let queries = q.as_slice().as_ptr().add(block * q.stride() + column).cast();
                    load_queries(tiles, queries, q.stride() / 2, d / STEP_KEYS);
                    for tile in 0..n.div_ceil(TILE_SIZE) {
                        let keys = packed_keys.row(first_key / TILE_SIZE + tile);
                        let to = scores.row(0).add(tile * TILE_SIZE).cast();
                        score_tile(tiles, keys, d / STEP_KEYS, is_near, to, scores_stride);
                    }
                    let keys = KeyBlock { keys: first_key..next_key, is_first, window, factor, columns: d };
                    let written = n.next_multiple_of(I::LANES);
                    for (row, softmax) in softmax.iter_mut().enumerate().take(rows) {
                        let (scores, weights) = (scores.row(row), weights.row(row));
                        keys.add::<I, Bf16>(isa, position + row, softmax, scores, weights, context.row(row));
                        weights.add(written).write_bytes(0, n.next_multiple_of(STEP_KEYS) - written);
                    }
                    for first in (0..d).step_by(4 * TILE_SIZE) {
                        let columns = ContextColumns {
                            values: packed_values.row(first / TILE_SIZE).add(first_key / 2 * TILE_SIZE),
                            values_stride: padded_keys / 2 * TILE_SIZE,
                            weights: weights.row(0).cast(),
                            weights_stride,
                            context: context.row(0).add(first).cast(),
                            context_stride,
                        };
                        let steps = n.div_ceil(STEP_KEYS);
                        if d - first >= 4 * TILE_SIZE {
                            columns.add::<T, 4>(tiles, steps, is_first, is_near);
                        } else {
                            columns.add::<T, 2>(tiles, steps, is_first, is_near);
                        }
                    }
                }
            }
            for (row, softmax) in softmax.iter().enumerate().take(rows) {
                // SAFETY: the context has a row for each query of the block.
                unsafe { part.store(isa, block + row, context.row(row), softmax.sum) };
            }
        }
    }
}

impl TileAttention<'_> {
    /// Packs the head's keys, a row of tiles for each 16 keys, and its values, a row of tiles for each 16 columns.
    #[inline(always)]
    fn pack<I: Isa>(&self, isa: I, packed_keys: &mut Matrix<u32>, packed_values: &mut Matrix<u32>) {
        let Attention { shape, kv, k_start, v_start, .. } = *self.0.attention;
        let (d, column) = (shape.head_size, self.0.head * shape.head_size);
        let keys = packed_keys.shared();
        for (tile, key) in self.0.keys.clone().step_by(TILE_SIZE).enumerate() {
            for first in (0..TILE_SIZE).step_by(I::LANES) {
                // SAFETY: K has LANES rows from here on (`compute` has checked those behind the last) and d columns. A row of packed
                // keys is `[d / 2, 16]` words.
                unsafe {
                    let from = kv.as_slice().as_ptr().add((key + first) * kv.stride() + k_start + column);
                    isa.transpose(from.cast(), kv.stride() / 2, d / 2, keys.row(tile).add(first), TILE_SIZE);
                }
            }
        }
        let pairs = self.0.keys.len().div_ceil(2);
        for panel in 0..d / TILE_SIZE {
            let first = v_start + column + panel * TILE_SIZE;
            let (to, padding) = packed_values.row_mut(panel).split_at_mut(pairs * TILE_SIZE);
            pack_values::<Bf16>(kv, self.0.keys.clone(), first..first + TILE_SIZE, TILE_SIZE, to);
            padding.fill(0);
        }
    }
}

/// Loads the tiles of 16 queries, `[16, 16 parts]` words, into T4 and the following.
///
/// # Safety
/// `queries` is valid for these words, with `stride` words from row to row.
#[inline(always)]
unsafe fn load_queries<T: Tiles>(tiles: &mut T, queries: *const u32, stride: usize, parts: usize) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        tiles.load::<4>(queries, stride);
        if parts > 1 {
            tiles.load::<5>(queries.add(TILE_SIZE), stride);
        }
        if parts > 2 {
            tiles.load::<6>(queries.add(2 * TILE_SIZE), stride);
        }
        if parts > 3 {
            tiles.load::<7>(queries.add(3 * TILE_SIZE), stride);
        }
    }
}

/// Scores of the 16 queries in T4 and the following for 16 keys: `[parts, 16, 16]` words. Writes 16 x 16 scores to `to`.
///
/// # Safety
/// The pointers are valid for these shapes, `to` with `stride` words from row to row.
#[inline(always)]
unsafe fn score_tile<T: Tiles>(
    tiles: &mut T,
    keys: *const u32,
    parts: usize,
    is_near: bool,
    to: *mut u32,
    stride: usize,
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        tiles.zero::<0>();
        load_near::<T, 2>(tiles, is_near, keys);
        tiles.dot_bf16::<0, 4, 2>();
        if parts > 1 {
            load_near::<T, 3>(tiles, is_near, keys.add(TILE_WORDS));
            tiles.dot_bf16::<0, 5, 3>();
        }
        if parts > 2 {
            load_near::<T, 2>(tiles, is_near, keys.add(2 * TILE_WORDS));
            tiles.dot_bf16::<0, 6, 2>();
        }
        if parts > 3 {
            load_near::<T, 3>(tiles, is_near, keys.add(3 * TILE_WORDS));
            tiles.dot_bf16::<0, 7, 3>();
        }
        tiles.store::<0>(to, stride);
    }
}

/// Operands of `context += weights V`, for one block of queries, one block of keys and up to 64 columns.
struct ContextColumns {
    /// `[tiles of columns, steps, 16, 16]`
    values: *const u32,
    /// Words from one tile of columns to the next.
    values_stride: usize,
    /// `[16, steps * 16]`
    weights: *const u32,
    weights_stride: usize,
    /// `[16, 16 * tiles of columns]`
    context: *mut u32,
    context_stride: usize,
}

impl ContextColumns {
    /// Adds `steps` steps of 32 keys, for N tiles of columns: 2 or 4. Overwrites the context if `is_first`.
    ///
    /// # Safety
    /// The pointers are valid for these shapes.
    #[inline(always)]
    unsafe fn add<T: Tiles, const N: usize>(&self, tiles: &mut T, steps: usize, is_first: bool, is_near: bool) {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let context = |tile: usize| self.context.add(tile * TILE_SIZE);
            if is_first {
                tiles.zero::<0>();
                tiles.zero::<1>();
                if N == 4 {
                    tiles.zero::<2>();
                    tiles.zero::<3>();
                }
            } else {
                tiles.load::<0>(context(0), self.context_stride);
                tiles.load::<1>(context(1), self.context_stride);
                if N == 4 {
                    tiles.load::<2>(context(2), self.context_stride);
                    tiles.load::<3>(context(3), self.context_stride);
                }
            }
            for step in 0..steps {
                let values = |tile: usize| self.values.add(tile * self.values_stride + step * TILE_WORDS);
                tiles.load::<6>(self.weights.add(step * TILE_SIZE), self.weights_stride);
                load_near::<T, 4>(tiles, is_near, values(0));
                tiles.dot_bf16::<0, 6, 4>();
                load_near::<T, 5>(tiles, is_near, values(1));
                tiles.dot_bf16::<1, 6, 5>();
                if N == 4 {
                    load_near::<T, 7>(tiles, is_near, values(2));
                    tiles.dot_bf16::<2, 6, 7>();
                    load_near::<T, 4>(tiles, is_near, values(3));
                    tiles.dot_bf16::<3, 6, 4>();
                }
            }
            tiles.store::<0>(context(0), self.context_stride);
            tiles.store::<1>(context(1), self.context_stride);
            if N == 4 {
                tiles.store::<2>(context(2), self.context_stride);
                tiles.store::<3>(context(3), self.context_stride);
            }
        }
    }
}

/// Loads a tile without gaps between its rows: from L1 if `is_near`, else past it.
///
/// # Safety
/// `from` is valid for a tile.
#[inline(always)]
unsafe fn load_near<T: Tiles, const TILE: usize>(tiles: &mut T, is_near: bool, from: *const u32) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        if is_near {
            tiles.load::<TILE>(from, TILE_SIZE);
        } else {
            tiles.load_streaming::<TILE>(from, TILE_SIZE);
        }
    }
}
