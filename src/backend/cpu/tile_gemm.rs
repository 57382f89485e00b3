//! A GEMM in tiles: blocks of 32 rows by one panel of 32 columns, the sums in four tile registers.
//!
//! ```text
//! T0 T1     T4                T4, T5: rows 0 to 15 and 16 to 31 of x, as they are in memory
//! T2 T3  += T5  x  (T6 T7)    T6, T7: columns 0 to 15 and 16 to 31 of a panel of W
//!
//! for each slab of rows:                        512: their part of x stays in the L2 cache
//!     for each sweep of k-steps:                all of them, if a panel fits in L2; else 24
//!         for each panel of W:
//!             for each block of rows:
//!                 for each k-step:              16 k-groups: 64 bytes of each row
//!                     four tile products
//!                     prefetch a part of the next panel into L2
//!                     epilogue of some rows of the block before
//! ```
//!
//! A product takes 16 cycles, and loading a tile 8 from L1 and 16 to 20 from L2, so not all four tiles can come from L2. The first
//! 16 k-steps of a panel stay in L1, while x and the rest of the panel are loaded by streaming loads, which leave L1 alone.
//! The epilogue's vector instructions run between the tile instructions, because these leave the vector units idle. (Measured in a
//! study on one core of a Sapphire Rapids; this code has not run on a tile unit yet.)
//!
//! Each sum adds the k-steps in ascending order, whatever the blocks are. Sums that wait for the next sweep in memory stay exact.
//! So a row's result does not depend on the other rows, the row's index or the number of threads. The last block of rows reads
//! rows behind the last one: each row of a tile product depends on its own row of A only, and theirs are not stored.

use std::ops::Range;

use super::epilogue::OutputRows;
use super::gemm::{Bf16, Dot, Gemm, Int8, SumsEpilogue};
use super::packed::{OperandLayout, ROWS_BEHIND, StorageFormat, TILE_PANEL_COLUMNS};
use super::simd::{Isa, SimdPath, TILE_SIZE, TILE_WORDS, TileOp, Tiles};
use super::workspace::Matrix;

/// Rows of a block.
const BLOCK_ROWS: usize = 2 * TILE_SIZE;

/// Words of a panel's k-step: two tiles.
const STEP_WORDS: usize = 2 * TILE_WORDS;

/// Words of a cache line.
const LINE_WORDS: usize = 16;

/// Words of a block's sums, `[BLOCK_ROWS, TILE_PANEL_COLUMNS]`.
const BLOCK_WORDS: usize = BLOCK_ROWS * TILE_PANEL_COLUMNS;

/// Rows that are multiplied by a panel before the next panel is.
const SLAB_ROWS: usize = 512;

/// The most k-steps of a panel (64 KB) that are summed in one sweep. With more, x would not stay in L2.
const MAX_SWEEP: usize = 32;

/// K-steps of a sweep if there are several: 768 KB of a slab's x.
const SWEEP: usize = 24;

/// K-steps of a panel that stay in L1: 32 KB.
const NEAR_K_STEPS: usize = 16;

/// The most cache lines of the next panel that are prefetched in a k-step.
const MAX_PREFETCHES: usize = 8;

/// The tile product of a storage format.
trait TileDot: Dot {
    fn tile_dot<T: Tiles, const SUMS: usize, const A: usize, const B: usize>(self, tiles: &mut T);
}

impl TileDot for Bf16 {
    #[inline(always)]
    fn tile_dot<T: Tiles, const SUMS: usize, const A: usize, const B: usize>(self, tiles: &mut T) {
        tiles.dot_bf16::<SUMS, A, B>();
    }
}

impl TileDot for Int8 {
    #[inline(always)]
    fn tile_dot<T: Tiles, const SUMS: usize, const A: usize, const B: usize>(self, tiles: &mut T) {
        tiles.dot_int8::<SUMS, A, B>();
    }
}

/// Computes the given rows of the outputs in the given panels.
///
/// # Safety
/// No other thread accesses these rows of these outputs at the same time.
pub(super) unsafe fn compute(path: SimdPath, gemm: &Gemm<'_>, panels: Range<usize>, rows: Range<usize>) {
    let (input, weights) = (&gemm.input, gemm.weights);
    let words = weights.k_groups.next_multiple_of(TILE_SIZE);
    assert!(rows.end <= input.rows && panels.end <= gemm.panels().end && weights.layout == OperandLayout::Tiles);
    assert!(input.words.len() >= (input.rows + ROWS_BEHIND - 1) * input.stride + words && input.stride >= words);
    assert!(weights.format != StorageFormat::Int8 || input.params.len() >= input.rows);
    match weights.format {
        StorageFormat::Bf16 => path.enter_tiles(TileGemm { gemm, panels, rows, format: Bf16 }),
        StorageFormat::Int8 => path.enter_tiles(TileGemm { gemm, panels, rows, format: Int8 }),
        StorageFormat::F32 => unreachable!("f32 is not multiplied in tiles"),
    }
}

struct TileGemm<'a, D> {
    gemm: &'a Gemm<'a>,
    panels: Range<usize>,
    rows: Range<usize>,
    format: D,
}

/// Room for the sums of a block.
#[repr(align(64))]
struct BlockSums([u32; BLOCK_WORDS]);

/// A part of a block's sums: the given k-steps.
struct BlockPart {
    panel: usize,
    /// The block's rows, at most [`BLOCK_ROWS`].
    rows: Range<usize>,
    k_steps: Range<usize>,
    /// The block's index in its slab, and the slab's number of blocks: its share of prefetching.
    share: (usize, usize),
    /// The sums of earlier k-steps, if there are any.
    from: Option<*const u32>,
    to: *mut u32,
}

/// A block whose sums are complete, and the rows whose epilogue has not run yet.
struct PendingBlock {
    panel: usize,
    /// The row of the first sums.
    start: usize,
    rows: Range<usize>,
}

impl<D: TileDot> TileOp for TileGemm<'_, D> {
    #[inline(always)]
    fn run<I: Isa, T: Tiles>(self, isa: I, tiles: &mut T) {
        let all_steps = self.gemm.weights.k_groups.div_ceil(TILE_SIZE);
        let sweep = if all_steps <= MAX_SWEEP { all_steps } else { SWEEP };
        // Sums that wait for the next sweep: a row for each block of the slab and each panel.
        let slab_blocks = self.rows.len().min(SLAB_ROWS).div_ceil(BLOCK_ROWS);
        let waiting_blocks = if sweep < all_steps { self.panels.len() * slab_blocks } else { 0 };
        let mut waiting = Matrix::<u32>::acquire(waiting_blocks, BLOCK_WORDS);
        let waiting = waiting.shared();
        // While the sums of a block are computed, the epilogue reads those of the block before.
        let (mut first, mut second) = (BlockSums([0; BLOCK_WORDS]), BlockSums([0; BLOCK_WORDS]));
        let (mut sums, mut pending_sums) = (&mut first, &mut second);
        let mut pending = PendingBlock { panel: 0, start: 0, rows: 0..0 };
        for start in self.rows.clone().step_by(SLAB_ROWS) {
            let slab = start..(start + SLAB_ROWS).min(self.rows.end);
            let blocks = slab.len().div_ceil(BLOCK_ROWS);
            for first in (0..all_steps).step_by(sweep) {
                let k_steps = first..(first + sweep).min(all_steps);
                for panel in self.panels.clone() {
                    for (block, row) in slab.clone().step_by(BLOCK_ROWS).enumerate() {
                        let rows = row..(row + BLOCK_ROWS).min(slab.end);
                        let is_last_sweep = k_steps.end == all_steps;
                        // SAFETY: if there are several sweeps, `waiting` has a row for each block of each panel. The rows and the
                        // panel are the GEMM's, as `compute` has checked.
                        unsafe {
                            let waits = || waiting.row((panel - self.panels.start) * slab_blocks + block);
                            let part = BlockPart {
                                panel,
                                rows: rows.clone(),
                                k_steps: k_steps.clone(),
                                share: (block, blocks),
                                from: (first > 0).then(|| waits().cast_const()),
                                to: if is_last_sweep { sums.0.as_mut_ptr() } else { waits() },
                            };
                            self.sum(isa, tiles, part, &mut pending, pending_sums);
                        }
                        if is_last_sweep {
                            pending = PendingBlock { panel, start: row, rows };
                            std::mem::swap(&mut sums, &mut pending_sums);
                        }
                    }
                }
            }
        }
        self.run_epilogue(isa, &mut pending, pending_sums, BLOCK_ROWS);
    }
}

impl<D: TileDot> TileGemm<'_, D> {
    /// Sums a part of a block, and meanwhile completes the pending block.
    ///
    /// # Safety
    /// The rows and the panel are the GEMM's. `part.to` and `part.from` have a block's sums.
    #[inline(always)]
    unsafe fn sum<I: Isa, T: Tiles>(
        &self,
        isa: I,
        tiles: &mut T,
        part: BlockPart,
        pending: &mut PendingBlock,
        pending_sums: &BlockSums,
    ) {
        let Gemm { input, weights, .. } = *self.gemm;
        let BlockPart { panel, rows, k_steps, share, from, to } = part;
        let (steps, stride) = (k_steps.len(), input.stride);
        // Rows of the pending block for each k-step: with these, it is complete when the sums are.
        let epilogue_rows = BLOCK_ROWS.div_ceil(steps).max(2);
        let lines = (steps * STEP_WORDS / LINE_WORDS).div_ceil(share.1 * steps).min(MAX_PREFETCHES);
        // SAFETY: guaranteed by the caller. `compute` has checked that the input has `ROWS_BEHIND` rows behind its last and whole
        // k-steps; the weights have whole k-steps. Prefetched addresses need not be valid.
        unsafe {
            match from {
                None => {
                    tiles.zero::<0>();
                    tiles.zero::<1>();
                    tiles.zero::<2>();
                    tiles.zero::<3>();
                }
                Some(from) => {
                    tiles.load::<0>(from, TILE_PANEL_COLUMNS);
                    tiles.load::<1>(from.add(TILE_SIZE), TILE_PANEL_COLUMNS);
                    tiles.load::<2>(from.add(BLOCK_WORDS / 2), TILE_PANEL_COLUMNS);
                    tiles.load::<3>(from.add(BLOCK_WORDS / 2 + TILE_SIZE), TILE_PANEL_COLUMNS);
                }
            }
            let panel_words = weights.panel(panel).len();
            let mut a = input.words.as_ptr().add(rows.start * stride + k_steps.start * TILE_SIZE);
            let mut b = weights.panel(panel).as_ptr().add(k_steps.start * STEP_WORDS);
            let mut ahead = b.wrapping_add(panel_words + share.0 * steps * lines * LINE_WORDS);
            for step in 0..steps {
                if step < NEAR_K_STEPS {
                    tiles.load::<6>(b, TILE_SIZE);
                } else {
                    tiles.load_streaming::<6>(b, TILE_SIZE);
                }
                tiles.load_streaming::<4>(a, stride);
                self.format.tile_dot::<T, 0, 4, 6>(tiles);
                if step < NEAR_K_STEPS {
                    tiles.load::<7>(b.add(TILE_WORDS), TILE_SIZE);
                } else {
                    tiles.load_streaming::<7>(b.add(TILE_WORDS), TILE_SIZE);
                }
                self.format.tile_dot::<T, 1, 4, 7>(tiles);
                tiles.load_streaming::<5>(a.add(TILE_SIZE * stride), stride);
                self.format.tile_dot::<T, 2, 5, 6>(tiles);
                self.format.tile_dot::<T, 3, 5, 7>(tiles);
                (a, b) = (a.wrapping_add(TILE_SIZE), b.wrapping_add(STEP_WORDS));
                for _ in 0..lines {
                    isa.prefetch(ahead);
                    ahead = ahead.wrapping_add(LINE_WORDS);
                }
                self.run_epilogue(isa, pending, pending_sums, epilogue_rows);
                if k_steps.end == weights.k_groups.div_ceil(TILE_SIZE) {
                    self.prefetch_residual(isa, panel, rows.start + step * epilogue_rows, rows.end, epilogue_rows);
                }
            }
            tiles.store::<0>(to, TILE_PANEL_COLUMNS);
            tiles.store::<1>(to.add(TILE_SIZE), TILE_PANEL_COLUMNS);
            tiles.store::<2>(to.add(BLOCK_WORDS / 2), TILE_PANEL_COLUMNS);
            tiles.store::<3>(to.add(BLOCK_WORDS / 2 + TILE_SIZE), TILE_PANEL_COLUMNS);
        }
        debug_assert!(pending.rows.is_empty());
    }

    /// Runs the epilogue of the pending block's next `rows` rows, or of those that are left.
    #[inline(always)]
    fn run_epilogue<I: Isa>(&self, isa: I, pending: &mut PendingBlock, sums: &BlockSums, rows: usize) {
        let rows = pending.rows.start..pending.rows.end.min(pending.rows.start + rows);
        if rows.is_empty() {
            return;
        }
        pending.rows.start = rows.end;
        let sums = &sums.0[(rows.start - pending.start) * TILE_PANEL_COLUMNS..];
        let epilogue = SumsEpilogue { gemm: self.gemm, format: self.format };
        // SAFETY: the panel and the rows are the GEMM's, and only this thread computes these outputs.
        unsafe { epilogue.run(isa, sums, pending.panel, rows, TILE_PANEL_COLUMNS / I::LANES) };
    }

    /// Prefetches what the epilogue of these rows will read and write, if there is a residual.
    #[inline(always)]
    fn prefetch_residual<I: Isa>(&self, isa: I, panel: usize, row: usize, end: usize, rows: usize) {
        let (Some(residual), OutputRows::F32(output)) = (self.gemm.residual, self.gemm.output) else { return };
        let column = (panel * TILE_PANEL_COLUMNS).saturating_sub(self.gemm.start);
        for row in row..end.min(row + rows) {
            let from = residual.as_slice().as_ptr().wrapping_add(row * residual.stride() + column);
            // SAFETY: the output has this row.
            let to = unsafe { output.row(row) }.wrapping_add(column);
            for line in [from, from.wrapping_add(LINE_WORDS), to, to.wrapping_add(LINE_WORDS)] {
                isa.prefetch(line.cast());
            }
        }
    }
}
