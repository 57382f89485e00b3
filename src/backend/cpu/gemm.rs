//! GEMM with a fused epilogue, `epilogue(x W^T)`: nearly all of a model's work.
//!
//! The microkernel computes a tile of up to six rows by one panel: it sums over the k-groups in registers and writes the sums to
//! memory, where the epilogue reads them. A panel of W stays in the L2 cache while all rows are multiplied by it:
//!
//! ```text
//! for each panel of W:                         96 KB, for example, if 64 columns have 768 inputs in bf16
//!     for each block of k-groups:              of 1024, so that it fits in the cache; usually there is only one
//!         for each tile of rows:
//!             for each k-group:                words of x are broadcast, vectors of the panel are loaded
//!                 acc[row][vector] += x word * panel vector
//!                 prefetch a cache line of the next block into L2
//!             in the last block, epilogue: scales, bias, activation, residual, rounding
//! ```
//!
//! Each element is summed in the order of the k-groups, in whichever tile it is. So a row's result does not depend on
//! the other rows, the row's index or the number of threads.
//!
//! The blocking is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), except
//! that x is not packed: its rows are short enough.

use std::ops::Range;

use super::epilogue::{
    OutputRows, StoreAny, StoreBf16, StoreClipped, StoreEpilogue, StoreGated, StoreGeluBf16, StoreResidual,
    VectorPosition,
};
use super::packed::{OperandLayout, PackedWeights, StorageFormat};
use super::simd::{Isa, SimdOp, SimdPath};
use super::workspace::Matrix;
use crate::backend::Activation;

/// Rows of a tile. Six rows by a panel's vectors are as many accumulators as fit into the registers beside the
/// operands.
const TILE_ROWS: usize = 6;

/// K-groups of a block: 256 KB of a panel of 64 columns.
const BLOCK_K_GROUPS: usize = 1024;

/// Rows whose partial sums are kept in memory between blocks of k-groups.
const BLOCK_ROWS: usize = 384;

/// Columns of the widest panel.
const MAX_PANEL_COLUMNS: usize = 64;

/// The rows of x (the GEMM's operand A) in the weights' storage format.
#[derive(Debug, Clone, Copy)]
pub(super) struct GemmInput<'a> {
    /// The k-groups of each row: `[rows, stride]` words.
    pub(super) words: &'a [u32],
    pub(super) stride: usize,
    pub(super) rows: usize,
    /// int8: the quantization parameters of each row, `[rows]`. Empty otherwise.
    pub(super) params: &'a [QuantParams],
}

/// Affine quantization of a row to unsigned bytes: `value = min + scale * byte`.
#[derive(Debug, Clone, Copy, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct QuantParams {
    pub(super) min: f32,
    pub(super) scale: f32,
}

/// One GEMM with its epilogue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gemm<'a> {
    pub(super) input: GemmInput<'a>,
    pub(super) weights: &'a PackedWeights,
    /// The computed outputs are `start..end`.
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) activation: Option<Activation>,
    /// F, if the weights are packed for a gated layer. All outputs are then computed, and the result has F columns.
    pub(super) gated: Option<usize>,
    /// Added to the result, `[rows, end - start]`.
    pub(super) residual: Option<&'a Matrix<f32>>,
    /// `[rows, end - start]`, or `[rows, F]` of a gated layer.
    pub(super) output: OutputRows<'a>,
}

impl Gemm<'_> {
    /// The panels that hold the computed outputs.
    pub(super) fn panels(&self) -> Range<usize> {
        self.start / self.weights.width..self.end.div_ceil(self.weights.width)
    }

    /// Computes the given rows of the outputs in the given panels. The operands are not in tiles.
    ///
    /// # Safety
    /// No other thread accesses these rows of these outputs at the same time.
    pub(super) unsafe fn compute(&self, path: SimdPath, panels: Range<usize>, rows: Range<usize>) {
        assert!(rows.end <= self.input.rows && panels.end <= self.panels().end);
        assert!(self.input.words.len() >= (self.input.rows - 1) * self.input.stride + self.weights.k_groups);
        assert!(self.weights.format != StorageFormat::Int8 || self.input.params.len() >= self.input.rows);
        // The loops are instantiated for each format, so that the microkernel is chosen outside of them.
        match self.weights.format {
            StorageFormat::F32 => path.enter(GemmLoops::<F32> { gemm: self, panels, rows, format: F32 }),
            StorageFormat::Bf16 => path.enter(GemmLoops::<Bf16> { gemm: self, panels, rows, format: Bf16 }),
            StorageFormat::Int8 => path.enter(GemmLoops::<Int8> { gemm: self, panels, rows, format: Int8 }),
        }
    }
}

/// A [`StorageFormat`] as a type: multiplies k-groups, and converts the sums to f32.
pub(super) trait Dot: Copy {
    /// `acc + a * b` for one k-group in each lane.
    fn dot<I: Isa>(self, isa: I, acc: I::Bits, a: I::Bits, b: I::Bits) -> I::Bits;
    /// Converts a row's sums for a vector of columns to f32, with scales and bias applied.
    fn value<I: Isa>(self, isa: I, sums: I::Bits, columns: &ColumnParams<I>, params: QuantParams) -> I::Floats;
}

/// Bias and scales of a vector of columns.
pub(super) struct ColumnParams<I: Isa> {
    bias: I::Floats,
    /// Used for int8 only, as is `column_sum`.
    scale: I::Floats,
    column_sum: I::Floats,
}

impl<I: Isa> ColumnParams<I> {
    /// # Safety
    /// The weights have a whole vector of columns at `column`.
    #[inline(always)]
    unsafe fn load(isa: I, weights: &PackedWeights, column: usize) -> Self {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let bias = isa.load(weights.bias.as_ptr().add(column));
            if weights.format != StorageFormat::Int8 {
                return Self { bias, scale: bias, column_sum: bias };
            }
            let scale = isa.load(weights.scale.as_ptr().add(column));
            Self { bias, scale, column_sum: isa.load(weights.column_sum.as_ptr().add(column)) }
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct F32;
#[derive(Debug, Clone, Copy)]
pub(super) struct Bf16;
#[derive(Debug, Clone, Copy)]
pub(super) struct Int8;

impl Dot for F32 {
    #[inline(always)]
    fn dot<I: Isa>(self, isa: I, acc: I::Bits, a: I::Bits, b: I::Bits) -> I::Bits {
        isa.dot_f32(acc, a, b)
    }
    #[inline(always)]
    fn value<I: Isa>(self, isa: I, sums: I::Bits, columns: &ColumnParams<I>, _: QuantParams) -> I::Floats {
        isa.add(isa.bits_to_f32(sums), columns.bias)
    }
}

impl Dot for Bf16 {
    #[inline(always)]
    fn dot<I: Isa>(self, isa: I, acc: I::Bits, a: I::Bits, b: I::Bits) -> I::Bits {
        isa.dot_bf16(acc, a, b)
    }
    #[inline(always)]
    fn value<I: Isa>(self, isa: I, sums: I::Bits, columns: &ColumnParams<I>, params: QuantParams) -> I::Floats {
        F32.value(isa, sums, columns, params)
    }
}

impl Dot for Int8 {
    #[inline(always)]
    fn dot<I: Isa>(self, isa: I, acc: I::Bits, a: I::Bits, b: I::Bits) -> I::Bits {
        isa.dot_int8(acc, a, b)
    }
    /// `sum (min + scale_x byte) (scale_w q) = scale_x scale_w (sum byte q) + min (sum scale_w q)`. With signed bytes,
    /// the sum is of `byte - 128`, and `min + 128 scale_x` takes the place of `min`.
    #[inline(always)]
    fn value<I: Isa>(self, isa: I, sums: I::Bits, columns: &ColumnParams<I>, params: QuantParams) -> I::Floats {
        let scale = isa.mul(columns.scale, isa.splat(params.scale));
        let min = if I::SIGNED_BYTES { params.min + 128.0 * params.scale } else { params.min };
        isa.fma(isa.i32_to_f32(sums), scale, isa.fma(columns.column_sum, isa.splat(min), columns.bias))
    }
}

/// A GEMM's epilogue: converts sums to values, and stores them.
pub(super) struct SumsEpilogue<'a, D> {
    pub(super) gemm: &'a Gemm<'a>,
    pub(super) format: D,
}

impl<D: Dot> SumsEpilogue<'_, D> {
    /// Runs the epilogue of a tile with `sums`, `[rows, width]`; a panel has `vectors` vectors. The epilogues of encoder layers
    /// are specialized.
    ///
    /// # Safety
    /// The panel and the rows are the GEMM's, and no other thread accesses these outputs at the same time.
    #[inline(always)]
    pub(super) unsafe fn run<I: Isa>(&self, isa: I, sums: &[u32], panel: usize, rows: Range<usize>, vectors: usize) {
        let Gemm { weights, start, end, activation, gated, residual, output, .. } = *self.gemm;
        assert!(sums.len() >= rows.len() * weights.width);
        if let (Some(columns), Some(activation)) = (gated, activation) {
            let at = StoreGated { activation, columns, output };
            // SAFETY: guaranteed by the caller.
            unsafe {
                match activation {
                    // A constant, so that the loop has no branch for it.
                    Activation::Gelu => {
                        self.store_gated(
                            isa,
                            sums,
                            panel,
                            rows,
                            vectors,
                            StoreGated { activation: Activation::Gelu, ..at },
                        );
                    }
                    _ => self.store_gated(isa, sums, panel, rows, vectors, at),
                }
            }
            return;
        }
        let first = panel * weights.width;
        let whole_panel = start <= first && first + weights.width <= end;
        let any = StoreAny { activation, residual, output };
        // SAFETY: guaranteed by the caller. Residual and output have the GEMM's shape.
        unsafe {
            match (whole_panel, activation, residual, output) {
                (true, None, None, OutputRows::Bf16(to)) => self.store(isa, sums, first, rows, vectors, StoreBf16(to)),
                (true, Some(Activation::Gelu), None, OutputRows::Bf16(to)) => {
                    self.store(isa, sums, first, rows, vectors, StoreGeluBf16(to));
                }
                (true, None, Some(residual), OutputRows::F32(to)) => {
                    self.store(isa, sums, first, rows, vectors, StoreResidual(residual, to));
                }
                (true, ..) => self.store(isa, sums, first, rows, vectors, any),
                (false, ..) => self.store(isa, sums, first, rows, vectors, StoreClipped { inner: any, start, end }),
            }
        }
    }

    /// Converts a tile's sums to values and passes them to `store`. `first` is the panel's first output.
    ///
    /// # Safety
    /// As for [`Self::run`].
    #[inline(always)]
    unsafe fn store<I: Isa, S: StoreEpilogue>(
        &self,
        isa: I,
        sums: &[u32],
        first: usize,
        rows: Range<usize>,
        vectors: usize,
        store: S,
    ) {
        let Gemm { input, weights, start, .. } = *self.gemm;
        for vector in 0..vectors {
            // SAFETY: the weights have whole panels; `run` has checked the sums and `compute` the parameters.
            unsafe {
                let output = first + vector * I::LANES;
                let columns = ColumnParams::load(isa, weights, output);
                for (i, row) in rows.clone().enumerate() {
                    let params = match weights.format {
                        StorageFormat::Int8 => *input.params.get_unchecked(row),
                        StorageFormat::F32 | StorageFormat::Bf16 => QuantParams::default(),
                    };
                    let words = isa.load_bits(sums.as_ptr().add(i * weights.width + vector * I::LANES));
                    let at = VectorPosition { row, output, column: output.wrapping_sub(start) };
                    store.store(isa, at, self.format.value(isa, words, &columns, params));
                }
            }
        }
    }

    /// Stores `activation(gate) * value` of a tile's sums: the first half of a panel is the gate, the second the value.
    ///
    /// # Safety
    /// As for [`Self::run`].
    #[inline(always)]
    unsafe fn store_gated<I: Isa>(
        &self,
        isa: I,
        sums: &[u32],
        panel: usize,
        rows: Range<usize>,
        vectors: usize,
        store: StoreGated<'_>,
    ) {
        let Gemm { input, weights, .. } = *self.gemm;
        let half = weights.width / 2;
        for vector in 0..vectors / 2 {
            // SAFETY: as in `store`. Both halves of a panel have whole vectors.
            unsafe {
                let (first, second) = (vector * I::LANES, half + vector * I::LANES);
                let gate_columns = ColumnParams::load(isa, weights, panel * weights.width + first);
                let value_columns = ColumnParams::load(isa, weights, panel * weights.width + second);
                for (i, row) in rows.clone().enumerate() {
                    let params = match weights.format {
                        StorageFormat::Int8 => *input.params.get_unchecked(row),
                        StorageFormat::F32 | StorageFormat::Bf16 => QuantParams::default(),
                    };
                    let sums = sums.as_ptr().add(i * weights.width);
                    let gate = self.format.value(isa, isa.load_bits(sums.add(first)), &gate_columns, params);
                    let value = self.format.value(isa, isa.load_bits(sums.add(second)), &value_columns, params);
                    store.store(isa, row, panel * half + first, gate, value);
                }
            }
        }
    }
}

/// Room for a tile's sums on the stack.
#[repr(align(64))]
struct Tile([u32; TILE_ROWS * MAX_PANEL_COLUMNS]);

struct GemmLoops<'a, D> {
    gemm: &'a Gemm<'a>,
    panels: Range<usize>,
    rows: Range<usize>,
    format: D,
}

impl<D: Dot> SimdOp for GemmLoops<'_, D> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (k_groups, width) = (self.gemm.weights.k_groups, self.gemm.weights.width);
        assert_eq!(self.gemm.weights.layout, OperandLayout::Vectors { width: I::PANEL_COLUMNS });
        let epilogue = SumsEpilogue { gemm: self.gemm, format: self.format };
        if k_groups <= BLOCK_K_GROUPS {
            let mut tile = Tile([0; TILE_ROWS * MAX_PANEL_COLUMNS]);
            for panel in self.panels.clone() {
                for (i, rows) in tiles(self.rows.clone()).enumerate() {
                    let share = PrefetchShare { index: i, of: tiles(self.rows.clone()).len() };
                    // SAFETY: the tile has room for the sums; the panel and the rows are the GEMM's.
                    unsafe {
                        self.sum(isa, panel, rows.clone(), 0..k_groups, share, tile.0.as_mut_ptr());
                        epilogue.run(isa, &tile.0, panel, rows, I::PANEL_VECTORS);
                    }
                }
            }
            return;
        }
        let mut sums = Matrix::<u32>::acquire(BLOCK_ROWS, width);
        for panel in self.panels.clone() {
            for start in self.rows.clone().step_by(BLOCK_ROWS) {
                let block = start..(start + BLOCK_ROWS).min(self.rows.end);
                for group in (0..k_groups).step_by(BLOCK_K_GROUPS) {
                    for (i, rows) in tiles(block.clone()).enumerate() {
                        let share = PrefetchShare { index: i, of: tiles(block.clone()).len() };
                        // SAFETY: `sums` has a row of a panel's width for each row of the block.
                        unsafe {
                            let to = sums.shared().row(rows.start - start);
                            self.sum(isa, panel, rows, group..(group + BLOCK_K_GROUPS).min(k_groups), share, to);
                        }
                    }
                }
                for rows in tiles(block) {
                    // SAFETY: the panel and the rows are the GEMM's.
                    unsafe {
                        let sums = &sums.as_slice()[(rows.start - start) * width..];
                        epilogue.run(isa, sums, panel, rows, I::PANEL_VECTORS);
                    }
                }
            }
        }
    }
}

impl<D: Dot> GemmLoops<'_, D> {
    /// Sums a tile over a range of k-groups. Adds to `sums` unless the range starts at 0.
    ///
    /// # Safety
    /// `sums` has a panel's width for each row. The rows are the input's, as `compute` has checked.
    #[inline(always)]
    unsafe fn sum<I: Isa>(
        &self,
        isa: I,
        panel: usize,
        rows: Range<usize>,
        k_groups: Range<usize>,
        share: PrefetchShare,
        sums: *mut u32,
    ) {
        let Gemm { input, weights, .. } = *self.gemm;
        let block = k_groups.len() * weights.width;
        // SAFETY: the rows and the panel have all the weights' k-groups.
        unsafe {
            let b = weights.panel(panel).as_ptr().add(k_groups.start * weights.width);
            let operands = Operands {
                a: input.words.as_ptr().add(rows.start * input.stride + k_groups.start),
                a_stride: input.stride,
                b,
                k_groups: k_groups.len(),
                sums,
                sums_stride: weights.width,
                accumulate: k_groups.start > 0,
                // Panels are contiguous. Prefetching past the last is harmless: prefetch never faults.
                prefetch: b.wrapping_add(block + block * share.index / share.of),
                prefetch_stride: weights.width.div_ceil(share.of),
            };
            multiply(isa, self.format, operands, rows.len(), I::PANEL_VECTORS);
        }
    }
}

/// A tile's share of prefetching the block after the current one: part `index` of `of`.
#[derive(Clone, Copy)]
struct PrefetchShare {
    index: usize,
    of: usize,
}

/// Splits rows into tiles of similar size, of at most six rows.
#[inline(always)]
pub(super) fn tiles(rows: Range<usize>) -> impl ExactSizeIterator<Item = Range<usize>> {
    let (start, n) = (rows.start, rows.len());
    let count = n.div_ceil(TILE_ROWS);
    (0..count).map(move |i| start + n * i / count..start + n * (i + 1) / count)
}

/// The operands of a tile and its sums.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    /// Words of x, `[rows, k_groups]`.
    pub(super) a: *const u32,
    /// Words from the start of a row to the start of the next.
    pub(super) a_stride: usize,
    /// Words of a panel, `[k_groups, columns]`, without gaps.
    pub(super) b: *const u32,
    pub(super) k_groups: usize,
    /// `[rows, columns]`
    pub(super) sums: *mut u32,
    /// Words from the start of a row's sums to the start of the next.
    pub(super) sums_stride: usize,
    /// Whether to add to `sums` instead of overwriting them.
    pub(super) accumulate: bool,
    /// The first address to prefetch into L2; each k-group prefetches one cache line. Any address is allowed.
    pub(super) prefetch: *const u32,
    /// Words between prefetched addresses. 0 disables prefetching.
    pub(super) prefetch_stride: usize,
}

/// `sums[row][column] (+)= sum over k of a[row][k] * b[k][column]`, for one to six rows and one, two or four vectors of
/// columns.
///
/// # Safety
/// The pointers are valid for the shapes in [`Operands`], with `rows` rows and `vectors` vectors of columns.
#[inline(always)]
pub(super) unsafe fn multiply<I: Isa, D: Dot>(isa: I, format: D, operands: Operands, rows: usize, vectors: usize) {
    macro_rules! kernels {
        ($(($vectors:literal: $($rows:literal)+))+) => {
            match (vectors, rows) {
                $($(($vectors, $rows) => isa.enter(Microkernel::<D, $rows, $vectors> { operands, format }),)+)+
                _ => unreachable!("a tile has 1 to 6 rows of 1, 2 or 4 vectors"),
            }
        };
    }
    // Each instance is a function of its own, compiled with the instruction set's target features.
    kernels!((4: 1 2 3 4 5 6) (2: 1 2 3 4 5 6) (1: 1 2 3 4 5 6));
}

/// The microkernel: sums of R rows by V vectors, in registers.
struct Microkernel<D, const R: usize, const V: usize> {
    operands: Operands,
    format: D,
}

impl<D: Dot, const R: usize, const V: usize> SimdOp for Microkernel<D, R, V> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        // Decided at compile time: no code is generated for tiles that are wider than a panel of this instruction set.
        if V > I::PANEL_VECTORS {
            unreachable!("the tile is wider than a panel");
        }
        let Operands { a, a_stride, mut b, k_groups, sums, sums_stride, accumulate, mut prefetch, prefetch_stride } =
            self.operands;
        let mut acc = [[isa.splat_bits(0); V]; R];
        // SAFETY: `multiply`'s caller guarantees that the pointers are valid.
        unsafe {
            let at = |r: usize, v: usize| sums.add(r * sums_stride + v * I::LANES);
            if accumulate {
                for (r, row) in acc.iter_mut().enumerate() {
                    for (v, sum) in row.iter_mut().enumerate() {
                        *sum = isa.load_bits(at(r, v));
                    }
                }
            }
            for group in 0..k_groups {
                let mut columns = [isa.splat_bits(0); V];
                for (v, column) in columns.iter_mut().enumerate() {
                    *column = isa.load_bits(b.add(v * I::LANES));
                }
                for (r, row) in acc.iter_mut().enumerate() {
                    let value = isa.splat_bits(*a.add(r * a_stride + group));
                    for (sum, &column) in row.iter_mut().zip(&columns) {
                        *sum = self.format.dot(isa, *sum, value, column);
                    }
                }
                b = b.add(V * I::LANES);
                if prefetch_stride > 0 {
                    isa.prefetch(prefetch);
                    prefetch = prefetch.wrapping_add(prefetch_stride);
                }
            }
            for (r, row) in acc.iter().enumerate() {
                for (v, &sum) in row.iter().enumerate() {
                    isa.store_bits(at(r, v), sum);
                }
            }
        }
    }
}
