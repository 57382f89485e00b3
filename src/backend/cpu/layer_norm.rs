//! Layer norm of rows in place.

use std::ops::Range;

use super::quantize::{LowShared, lower};
use super::simd::{Isa, Op, load_partial, store_partial};
use super::workspace::Shared;

/// Layer norm in place, and the rows' lower form while they are at hand.
pub(super) struct LayerNorm<'a> {
    pub(super) x: Shared<'a, f32>,
    pub(super) weight: &'a [f32],
    pub(super) bias: &'a [f32],
    pub(super) eps: f32,
    pub(super) low: LowShared<'a>,
    /// No other thread touches these rows meanwhile.
    pub(super) rows: Range<usize>,
}

impl Op for LayerNorm<'_> {
    type Output = ();

    /// Three passes over a row in the first-level cache: the mean, the variance about it, the result.
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let c = self.weight.len();
        assert_eq!(self.bias.len(), c);
        for row in self.rows {
            // SAFETY: the row has c values, and is this thread's.
            unsafe {
                let x = self.x.row(row);
                let mut sum = isa.splat(0.0);
                for at in (0..c).step_by(I::LANES) {
                    sum = isa.add(sum, load_partial(isa, x.add(at), c - at, 0.0));
                }
                let mean = isa.sum(sum) / c as f32;
                let mean_lanes = isa.splat(mean);
                let mut squares = isa.splat(0.0);
                for at in (0..c).step_by(I::LANES) {
                    // Lanes beyond the row hold the mean, and add nothing.
                    let centred = isa.sub(load_partial(isa, x.add(at), c - at, mean), mean_lanes);
                    squares = isa.fma(centred, centred, squares);
                }
                let factor = isa.splat(1.0 / (isa.sum(squares) / c as f32 + self.eps).sqrt());
                for at in (0..c).step_by(I::LANES) {
                    let n = c - at;
                    let normed = isa.mul(isa.sub(load_partial(isa, x.add(at), n, 0.0), mean_lanes), factor);
                    let weight = load_partial(isa, self.weight.as_ptr().add(at), n, 0.0);
                    let bias = load_partial(isa, self.bias.as_ptr().add(at), n, 0.0);
                    store_partial(isa, x.add(at), n, isa.fma(normed, weight, bias));
                }
                lower(isa, x, c, self.low, row);
            }
        }
    }
}
