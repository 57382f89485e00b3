//! Layer norm of rows (Ba, Kiros, Hinton 2016).

use std::ops::Range;

use super::quantize::{SharedQuantizedRows, quantize_row};
use super::simd::{Isa, SimdOp, load_partial, store_partial};
use super::workspace::{Matrix, SharedMatrix};

/// The rows to normalize.
#[derive(Clone, Copy)]
pub(super) enum NormRows<'a> {
    /// The result replaces the rows.
    InPlace(SharedMatrix<'a, f32>),
    /// The rows are kept. The f32 result, if it is needed, goes to the second matrix.
    Copy(&'a Matrix<f32>, Option<SharedMatrix<'a, f32>>),
}

/// Layer norm of rows. Also quantizes each row, while it is in cache.
pub(super) struct LayerNorm<'a> {
    pub(super) x: NormRows<'a>,
    pub(super) weight: &'a [f32],
    pub(super) bias: &'a [f32],
    pub(super) eps: f32,
    pub(super) quantized: SharedQuantizedRows<'a>,
    /// No other thread accesses these rows at the same time.
    pub(super) rows: Range<usize>,
}

impl SimdOp for LayerNorm<'_> {
    type Output = ();

    /// Three passes over a row, which stays in the L1 cache: mean, variance about the mean, result.
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let c = self.weight.len();
        assert_eq!(self.bias.len(), c);
        let mut scratch = Matrix::<f32>::acquire(1, c);
        let scratch = scratch.row_mut(0).as_mut_ptr();
        for row in self.rows {
            // SAFETY: the rows and the scratch have c values, and the rows that are written are this thread's.
            unsafe {
                let (x, to) = match self.x {
                    NormRows::InPlace(x) => (x.row(row).cast_const(), x.row(row)),
                    NormRows::Copy(x, Some(to)) => (x.row(row).as_ptr(), to.row(row)),
                    NormRows::Copy(x, None) => (x.row(row).as_ptr(), scratch),
                };
                let mut sum = isa.splat(0.0);
                for at in (0..c).step_by(I::LANES) {
                    sum = isa.add(sum, load_partial(isa, x.add(at), c - at, 0.0));
                }
                let mean = isa.reduce_sum(sum) / c as f32;
                let mean_lanes = isa.splat(mean);
                let mut squares = isa.splat(0.0);
                for at in (0..c).step_by(I::LANES) {
                    // Lanes beyond the row hold the mean, so they add zero.
                    let centered = isa.sub(load_partial(isa, x.add(at), c - at, mean), mean_lanes);
                    squares = isa.fma(centered, centered, squares);
                }
                let factor = isa.splat(1.0 / (isa.reduce_sum(squares) / c as f32 + self.eps).sqrt());
                for at in (0..c).step_by(I::LANES) {
                    let n = c - at;
                    let normalized = isa.mul(isa.sub(load_partial(isa, x.add(at), n, 0.0), mean_lanes), factor);
                    let weight = load_partial(isa, self.weight.as_ptr().add(at), n, 0.0);
                    let bias = load_partial(isa, self.bias.as_ptr().add(at), n, 0.0);
                    store_partial(isa, to.add(at), n, isa.fma(normalized, weight, bias));
                }
                quantize_row(isa, to, c, self.quantized, row);
            }
        }
    }
}
