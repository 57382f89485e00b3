//! Rotary position embedding of rows, in place (Su et al. 2021).

use std::ops::Range;

use super::simd::{Isa, SimdOp, load_partial, load_partial_bf16, store_partial, store_partial_bf16};
use super::workspace::SharedMatrix;

/// Cosines and sines for every position and every two columns that are rotated together, each `[positions, D / 2]`; D is the
/// head size.
#[derive(Debug)]
pub struct Rotary {
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
    /// D / 2
    pub(super) half: usize,
}

/// The rows to rotate: f32 or bf16.
#[derive(Clone, Copy)]
pub(super) enum RotatedRows<'a> {
    F32(SharedMatrix<'a, f32>),
    Bf16(SharedMatrix<'a, u16>),
}

/// Rotates the first `heads` heads of each row by the row's position.
pub(super) struct Rotate<'a> {
    pub(super) x: RotatedRows<'a>,
    pub(super) rotary: &'a Rotary,
    pub(super) heads: usize,
    /// The position of every row, `[T]`.
    pub(super) positions: &'a [u32],
    /// No other thread accesses these rows at the same time.
    pub(super) rows: Range<usize>,
}

impl SimdOp for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let half = self.rotary.half;
        for row in self.rows {
            let angles = self.positions[row] as usize * half..(self.positions[row] as usize + 1) * half;
            let (cos, sin) = (&self.rotary.cos[angles.clone()], &self.rotary.sin[angles]);
            for head in 0..self.heads {
                for at in (0..half).step_by(I::LANES) {
                    let (first, n) = (2 * head * half + at, half - at);
                    // SAFETY: the row has 2 * half columns for each head and is this thread's. No access goes beyond n
                    // values of each half.
                    unsafe {
                        let cos = load_partial(isa, cos.as_ptr().add(at), n, 0.0);
                        let sin = load_partial(isa, sin.as_ptr().add(at), n, 0.0);
                        match self.x {
                            RotatedRows::F32(x) => {
                                let (a, b) = (x.row(row).add(first), x.row(row).add(first + half));
                                let pair = (load_partial(isa, a, n, 0.0), load_partial(isa, b, n, 0.0));
                                let (to_a, to_b) = rotate(isa, pair, cos, sin);
                                store_partial(isa, a, n, to_a);
                                store_partial(isa, b, n, to_b);
                            }
                            RotatedRows::Bf16(x) => {
                                let (a, b) = (x.row(row).add(first), x.row(row).add(first + half));
                                let pair = (load_partial_bf16(isa, a, n), load_partial_bf16(isa, b, n));
                                let (to_a, to_b) = rotate(isa, pair, cos, sin);
                                store_partial_bf16(isa, a, n, to_a);
                                store_partial_bf16(isa, b, n, to_b);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Rotates vectors of pairs by their angles.
#[inline(always)]
fn rotate<I: Isa>(isa: I, (a, b): (I::Floats, I::Floats), cos: I::Floats, sin: I::Floats) -> (I::Floats, I::Floats) {
    (isa.sub(isa.mul(a, cos), isa.mul(b, sin)), isa.add(isa.mul(b, cos), isa.mul(a, sin)))
}
