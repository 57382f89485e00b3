//! `epilogue(x W^T)`: nearly all of a model's work.
//!
//! A tile of up to six rows by one panel is summed in registers over the k-steps, written once to a few lines of stack, and
//! finished there by the epilogue. A panel stays in the second-level cache while all rows pass by it:
//!
//! ```text
//! for each panel of W:                         32 to 400 KB
//!     for each block of k-steps:               so that long rows do not push the panel out
//!         for each tile of rows:               the rows' words are broadcast, the panel's are loaded
//!             acc[row][vector] += row word * panel vector
//!             and a share of the words behind the block is fetched into the cache
//!     epilogue: scales, bias, activation, residual, rounding
//! ```
//!
//! Each element's sum is taken in the order of the k-steps, whatever tile it is in: a row's result does not depend on its
//! company, its place or the number of threads. (The blocking is Goto and van de Geijn's, "Anatomy of High-Performance
//! Matrix Multiplication", 2008, without the packing of x, whose rows are short enough.)

use std::ops::Range;

use super::epilogue::{Added, Clipped, General, Output, Place, Rounded, RoundedGelu, Store};
use super::packed::{Format, PackedWeights};
use super::simd::{Isa, Op, SimdPath};
use super::workspace::Matrix;
use crate::backend::Activation;

/// Rows of a tile: with a panel's vectors, as many accumulators as the registers hold beside their operands.
const TILE_ROWS: usize = 6;

/// K-steps of a block: 256 KB of a panel of 64 columns.
const BLOCK_STEPS: usize = 1024;

/// Rows whose sums wait for the next block of k-steps.
const BLOCK_ROWS: usize = 384;

/// The widest panel.
const MAX_PANEL: usize = 64;

/// The rows of x in the weights' format.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input<'a> {
    /// Row after row, `stride` words each.
    pub(super) words: &'a [u32],
    pub(super) stride: usize,
    pub(super) rows: usize,
    /// int8: what each row's bytes stand for.
    pub(super) ranges: &'a [ByteRange],
}

/// What a row of bytes stands for: `low + scale * byte`.
#[derive(Debug, Clone, Copy, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct ByteRange {
    pub(super) low: f32,
    pub(super) scale: f32,
}

/// A product and what happens to it before it is stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gemm<'a> {
    pub(super) input: Input<'a>,
    pub(super) weights: &'a PackedWeights,
    /// The first and the end of the outputs that are computed.
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) activation: Option<Activation>,
    /// Added to the result, `[rows, end - start]`.
    pub(super) residual: Option<&'a Matrix<f32>>,
    /// `[rows, end - start]`
    pub(super) output: Output<'a>,
}

impl Gemm<'_> {
    /// The panels that hold the outputs.
    pub(super) fn panels(&self) -> Range<usize> {
        self.start / self.weights.width..self.end.div_ceil(self.weights.width)
    }

    /// Computes the given rows of the outputs in the given panels.
    ///
    /// # Safety
    /// No other thread computes or touches the same ones meanwhile.
    pub(super) unsafe fn compute(&self, path: SimdPath, panels: Range<usize>, rows: Range<usize>) {
        assert!(rows.end <= self.input.rows && panels.end <= self.panels().end);
        assert!(self.input.words.len() >= (self.input.rows - 1) * self.input.stride + self.weights.steps);
        assert!(self.weights.format != Format::Int8 || self.input.ranges.len() >= self.input.rows);
        // One instance of the loops for each format: the kernel is chosen outside of them.
        match self.weights.format {
            Format::F32 => path.enter(Loops::<F32> { product: self, panels, rows, format: F32 }),
            Format::Bf16 => path.enter(Loops::<Bf16> { product: self, panels, rows, format: Bf16 }),
            Format::Int8 => path.enter(Loops::<Int8> { product: self, panels, rows, format: Int8 }),
        }
    }
}

/// A [`Format`] as a type: what one k-step does to an accumulator, and what a finished sum is worth.
pub(super) trait Dot: Copy {
    fn dot<I: Isa>(self, isa: I, acc: I::I, a: I::I, b: I::I) -> I::I;
    /// The value of a row's sums in some columns.
    fn value<I: Isa>(self, isa: I, sums: I::I, columns: &Columns<I>, range: ByteRange) -> I::F;
}

/// What belongs to a vector of columns.
pub(super) struct Columns<I: Isa> {
    bias: I::F,
    /// These two int8 alone.
    scale: I::F,
    column_sum: I::F,
}

impl<I: Isa> Columns<I> {
    /// # Safety
    /// The weights have a whole vector of columns there.
    #[inline(always)]
    unsafe fn load(isa: I, weights: &PackedWeights, column: usize) -> Self {
        // SAFETY: the caller's promise; what f32 and bf16 do not have is not read.
        unsafe {
            let bias = isa.load(weights.bias.as_ptr().add(column));
            if weights.format != Format::Int8 {
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
    fn dot<I: Isa>(self, isa: I, acc: I::I, a: I::I, b: I::I) -> I::I {
        isa.dot_f32(acc, a, b)
    }
    #[inline(always)]
    fn value<I: Isa>(self, isa: I, sums: I::I, columns: &Columns<I>, _: ByteRange) -> I::F {
        isa.add(isa.floats(sums), columns.bias)
    }
}

impl Dot for Bf16 {
    #[inline(always)]
    fn dot<I: Isa>(self, isa: I, acc: I::I, a: I::I, b: I::I) -> I::I {
        isa.dot_bf16(acc, a, b)
    }
    #[inline(always)]
    fn value<I: Isa>(self, isa: I, sums: I::I, columns: &Columns<I>, range: ByteRange) -> I::F {
        F32.value(isa, sums, columns, range)
    }
}

impl Dot for Int8 {
    #[inline(always)]
    fn dot<I: Isa>(self, isa: I, acc: I::I, a: I::I, b: I::I) -> I::I {
        isa.dot_int8(acc, a, b)
    }
    /// `sum (low + scale_x byte) (scale_w q) = scale_x scale_w (sum byte q) + low (sum scale_w q)`, and likewise for
    /// `byte - 128` from `low + 128 scale_x` on.
    #[inline(always)]
    fn value<I: Isa>(self, isa: I, sums: I::I, columns: &Columns<I>, range: ByteRange) -> I::F {
        let scale = isa.mul(columns.scale, isa.splat(range.scale));
        let low = if I::SIGNED_BYTES { range.low + 128.0 * range.scale } else { range.low };
        isa.fma(isa.i32_to_f32(sums), scale, isa.fma(columns.column_sum, isa.splat(low), columns.bias))
    }
}

/// A few lines of stack for a tile's sums.
#[repr(align(64))]
struct Tile([u32; TILE_ROWS * MAX_PANEL]);

struct Loops<'a, D> {
    product: &'a Gemm<'a>,
    panels: Range<usize>,
    rows: Range<usize>,
    format: D,
}

impl<D: Dot> Op for Loops<'_, D> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (steps, width) = (self.product.weights.steps, self.product.weights.width);
        assert_eq!(width, I::PANEL);
        if steps <= BLOCK_STEPS {
            let mut tile = Tile([0; TILE_ROWS * MAX_PANEL]);
            for panel in self.panels.clone() {
                for (i, rows) in tiles(self.rows.clone()).enumerate() {
                    let share = Share { index: i, of: tiles(self.rows.clone()).len() };
                    // SAFETY: a tile's sums fit; the panel and the rows are the product's.
                    unsafe {
                        self.sum(isa, panel, rows.clone(), 0..steps, share, tile.0.as_mut_ptr());
                        self.finish(isa, &tile.0, panel, rows);
                    }
                }
            }
            return;
        }
        let mut sums = Matrix::<u32>::take(BLOCK_ROWS, width);
        for panel in self.panels.clone() {
            for start in self.rows.clone().step_by(BLOCK_ROWS) {
                let block = start..(start + BLOCK_ROWS).min(self.rows.end);
                for step in (0..steps).step_by(BLOCK_STEPS) {
                    for (i, rows) in tiles(block.clone()).enumerate() {
                        let share = Share { index: i, of: tiles(block.clone()).len() };
                        // SAFETY: the sums have a row for each row of the block, and the stride of a panel's width.
                        unsafe {
                            let to = sums.shared().row(rows.start - start);
                            self.sum(isa, panel, rows, step..(step + BLOCK_STEPS).min(steps), share, to);
                        }
                    }
                }
                for rows in tiles(block) {
                    // SAFETY: the panel and the rows are the product's.
                    unsafe { self.finish(isa, &sums.all()[(rows.start - start) * width..], panel, rows) };
                }
            }
        }
    }
}

impl<D: Dot> Loops<'_, D> {
    /// A tile's sums over some k-steps, added to what is there where they are not the first.
    ///
    /// # Safety
    /// `sums` has a panel's width for each of the rows, which `compute` has checked to be the input's.
    #[inline(always)]
    unsafe fn sum<I: Isa>(
        &self,
        isa: I,
        panel: usize,
        rows: Range<usize>,
        steps: Range<usize>,
        share: Share,
        sums: *mut u32,
    ) {
        let Gemm { input, weights, .. } = *self.product;
        let block = steps.len() * weights.width;
        // SAFETY: the rows and the panel have all the weights' k-steps.
        unsafe {
            let b = weights.panel(panel).as_ptr().add(steps.start * weights.width);
            let operands = Operands {
                a: input.words.as_ptr().add(rows.start * input.stride + steps.start),
                a_stride: input.stride,
                b,
                steps: steps.len(),
                sums,
                sums_stride: weights.width,
                resume: steps.start > 0,
                // PackedWeights follow one another. Behind the last lies nothing that is wanted; fetching is no access.
                ahead: b.wrapping_add(block + block * share.index / share.of),
                ahead_stride: weights.width.div_ceil(share.of),
            };
            multiply(isa, self.format, operands, rows.len(), I::PANEL_VECTORS);
        }
    }

    /// The epilogue of a tile whose sums lie in `sums`, `[rows, width]`. What encoder layers end in is compiled each by itself.
    ///
    /// # Safety
    /// The panel and the rows are the product's, and nobody else's meanwhile.
    #[inline(always)]
    unsafe fn finish<I: Isa>(&self, isa: I, sums: &[u32], panel: usize, rows: Range<usize>) {
        let Gemm { weights, start, end, activation, residual, output, .. } = *self.product;
        assert!(sums.len() >= rows.len() * weights.width);
        let first = panel * weights.width;
        let whole = start <= first && first + weights.width <= end;
        let general = General { activation, residual, output };
        // SAFETY: passed on. Each arm says what the product's output and residual are.
        unsafe {
            match (whole, activation, residual, output) {
                (true, None, None, Output::Bf16(to)) => self.store(isa, sums, first, rows, Rounded(to)),
                (true, Some(Activation::Gelu), None, Output::Bf16(to)) => {
                    self.store(isa, sums, first, rows, RoundedGelu(to));
                }
                (true, None, Some(residual), Output::F32(to)) => {
                    self.store(isa, sums, first, rows, Added(residual, to));
                }
                (true, ..) => self.store(isa, sums, first, rows, general),
                (false, ..) => self.store(isa, sums, first, rows, Clipped { general, start, end }),
            }
        }
    }

    /// Values of a tile's sums, from the output `first` on, to where `store` puts them.
    ///
    /// # Safety
    /// As for [`Self::finish`].
    #[inline(always)]
    unsafe fn store<I: Isa, S: Store>(&self, isa: I, sums: &[u32], first: usize, rows: Range<usize>, store: S) {
        let Gemm { input, weights, start, .. } = *self.product;
        for vector in 0..I::PANEL_VECTORS {
            // SAFETY: the weights have whole panels; `finish` has checked the sums, `compute` the ranges.
            unsafe {
                let output = first + vector * I::LANES;
                let columns = Columns::load(isa, weights, output);
                for (i, row) in rows.clone().enumerate() {
                    let range = match weights.format {
                        Format::Int8 => *input.ranges.get_unchecked(row),
                        Format::F32 | Format::Bf16 => ByteRange::default(),
                    };
                    let words = isa.load_bits(sums.as_ptr().add(i * weights.width + vector * I::LANES));
                    let at = Place { row, output, column: output.wrapping_sub(start) };
                    store.store(isa, at, self.format.value(isa, words, &columns, range));
                }
            }
        }
    }
}

/// A tile's part in fetching what comes after a block.
#[derive(Clone, Copy)]
struct Share {
    index: usize,
    of: usize,
}

/// Cuts rows into tiles of like size.
#[inline(always)]
pub(super) fn tiles(rows: Range<usize>) -> impl ExactSizeIterator<Item = Range<usize>> {
    let (start, n) = (rows.start, rows.len());
    let count = n.div_ceil(TILE_ROWS);
    (0..count).map(move |i| start + n * i / count..start + n * (i + 1) / count)
}

/// The two factors of a tile and where its sums are kept.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    /// The rows' words, `steps` in each.
    pub(super) a: *const u32,
    /// Words from a row to the next one.
    pub(super) a_stride: usize,
    /// A panel's words, `[steps, columns]`.
    pub(super) b: *const u32,
    pub(super) steps: usize,
    /// `[rows, columns]`
    pub(super) sums: *mut u32,
    /// Words from a row's sums to the next one's.
    pub(super) sums_stride: usize,
    /// Whether to add to the sums that are there.
    pub(super) resume: bool,
    /// Words that will be wanted soon, wherever that is: a line is fetched into the second-level cache at each k-step.
    pub(super) ahead: *const u32,
    /// Words from one such place to the next one; none where it is 0.
    pub(super) ahead_stride: usize,
}

/// `sums[row][column] (+)= sum over steps of a[row][step] * b[step][column]`, for one to six rows and some vectors of columns.
///
/// # Safety
/// The pointers reach as far as [`Operands`] says, for `rows` rows and `vectors` vectors of columns.
#[inline(always)]
pub(super) unsafe fn multiply<I: Isa, D: Dot>(isa: I, format: D, operands: Operands, rows: usize, vectors: usize) {
    macro_rules! kernels {
        ($(($vectors:literal: $($rows:literal)+))+) => {
            match (vectors, rows) {
                $($(($vectors, $rows) => isa.enter(Kernel::<D, $rows, $vectors> { operands, format }),)+)+
                _ => unreachable!("tiles have one to six rows of one, two or four vectors"),
            }
        };
    }
    // Each instance is a function of its own, entered with the instruction set's features.
    kernels!((4: 1 2 3 4 5 6) (2: 1 2 3 4 5 6) (1: 1 2 3 4 5 6));
}

/// The microkernel: R rows by V vectors of sums in registers.
struct Kernel<D, const R: usize, const V: usize> {
    operands: Operands,
    format: D,
}

impl<D: Dot, const R: usize, const V: usize> Op for Kernel<D, R, V> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        // Known at compile time: an instruction set with fewer registers has no such tiles.
        if V > I::PANEL_VECTORS {
            unreachable!("wider than a panel");
        }
        let Operands { a, a_stride, mut b, steps, sums, sums_stride, resume, mut ahead, ahead_stride } = self.operands;
        let mut acc = [[isa.splat_bits(0); V]; R];
        // SAFETY: `multiply`'s caller has said how far each pointer reaches.
        unsafe {
            let at = |r: usize, v: usize| sums.add(r * sums_stride + v * I::LANES);
            if resume {
                for (r, row) in acc.iter_mut().enumerate() {
                    for (v, sum) in row.iter_mut().enumerate() {
                        *sum = isa.load_bits(at(r, v));
                    }
                }
            }
            for step in 0..steps {
                let mut columns = [isa.splat_bits(0); V];
                for (v, column) in columns.iter_mut().enumerate() {
                    *column = isa.load_bits(b.add(v * I::LANES));
                }
                for (r, row) in acc.iter_mut().enumerate() {
                    let value = isa.splat_bits(*a.add(r * a_stride + step));
                    for (sum, &column) in row.iter_mut().zip(&columns) {
                        *sum = self.format.dot(isa, *sum, value, column);
                    }
                }
                b = b.add(V * I::LANES);
                if ahead_stride > 0 {
                    isa.prefetch(ahead);
                    ahead = ahead.wrapping_add(ahead_stride);
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
