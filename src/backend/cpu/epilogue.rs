//! Where the values of a product go, and what becomes of them on the way: activation, residual, rounding.

use super::activation::activate;
use super::simd::Isa;
use super::simd::{Accuracy, MAX_LANES};
use super::workspace::{Matrix, Shared};
use crate::backend::Activation;

/// Where the results go, rounded or not.
#[derive(Debug, Clone, Copy)]
pub(super) enum Output<'a> {
    F32(Shared<'a, f32>),
    Bf16(Shared<'a, u16>),
}

/// Where a vector of values belongs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) row: usize,
    /// The first one's output, of all that the weights have.
    pub(super) output: usize,
    /// Its column in the result, which may begin at a later output.
    pub(super) column: usize,
}

/// What becomes of a vector of finished values.
pub(super) trait Store: Copy {
    /// # Safety
    /// The result has a whole vector of columns there (but for [`Clipped`]), nobody else's meanwhile.
    unsafe fn store<I: Isa>(self, isa: I, at: Place, value: I::F);
}

/// Queries, keys and values.
#[derive(Clone, Copy)]
pub(super) struct Rounded<'a>(pub(super) Shared<'a, u16>);

/// A feed-forward layer's inside.
#[derive(Clone, Copy)]
pub(super) struct RoundedGelu<'a>(pub(super) Shared<'a, u16>);

/// Back into the residual stream.
#[derive(Clone, Copy)]
pub(super) struct Added<'a>(pub(super) &'a Matrix<f32>, pub(super) Shared<'a, f32>);

/// Anything.
#[derive(Clone, Copy)]
pub(super) struct General<'a> {
    pub(super) activation: Option<Activation>,
    pub(super) residual: Option<&'a Matrix<f32>>,
    pub(super) output: Output<'a>,
}

/// Anything, where the wanted outputs begin or end within the vector.
#[derive(Clone, Copy)]
pub(super) struct Clipped<'a> {
    pub(super) general: General<'a>,
    pub(super) start: usize,
    pub(super) end: usize,
}

impl Store for Rounded<'_> {
    #[inline(always)]
    unsafe fn store<I: Isa>(self, isa: I, at: Place, value: I::F) {
        // SAFETY: the caller's promise.
        unsafe { isa.store_bf16(self.0.row(at.row).add(at.column), value) }
    }
}

impl Store for RoundedGelu<'_> {
    #[inline(always)]
    unsafe fn store<I: Isa>(self, isa: I, at: Place, value: I::F) {
        // SAFETY: the caller's promise.
        unsafe { Rounded(self.0).store(isa, at, activate(isa, Activation::Gelu, value, Accuracy::Bf16)) }
    }
}

impl Store for Added<'_> {
    #[inline(always)]
    unsafe fn store<I: Isa>(self, isa: I, at: Place, value: I::F) {
        // SAFETY: the caller's promise; the residual has the result's shape.
        unsafe {
            let other = isa.load(self.0.all().as_ptr().add(at.row * self.0.stride() + at.column));
            isa.store(self.1.row(at.row).add(at.column), isa.add(value, other));
        }
    }
}

impl Store for General<'_> {
    #[inline(always)]
    unsafe fn store<I: Isa>(self, isa: I, at: Place, value: I::F) {
        let value = self.activated(isa, value);
        // SAFETY: the caller's promise.
        unsafe {
            match (self.residual, self.output) {
                (Some(residual), Output::F32(to)) => Added(residual, to).store(isa, at, value),
                (None, Output::F32(to)) => isa.store(to.row(at.row).add(at.column), value),
                (None, Output::Bf16(to)) => Rounded(to).store(isa, at, value),
                (Some(_), Output::Bf16(_)) => unreachable!("the residual stream is f32"),
            }
        }
    }
}

impl Store for Clipped<'_> {
    #[inline(always)]
    unsafe fn store<I: Isa>(self, isa: I, at: Place, value: I::F) {
        let mut values = [0f32; MAX_LANES];
        // SAFETY: the array has room for the widest vector; of its values, those of wanted outputs are stored, each in its own
        // column.
        unsafe {
            isa.store(values.as_mut_ptr(), self.general.activated(isa, value));
            for (output, &value) in (at.output..).zip(&values[..I::LANES]) {
                if (self.start..self.end).contains(&output) {
                    self.general.store_one(at.row, output - self.start, value);
                }
            }
        }
    }
}

impl General<'_> {
    #[inline(always)]
    fn activated<I: Isa>(self, isa: I, value: I::F) -> I::F {
        let accuracy = match self.output {
            Output::F32(_) => Accuracy::F32,
            Output::Bf16(_) => Accuracy::Bf16,
        };
        match self.activation {
            Some(activation) => activate(isa, activation, value, accuracy),
            None => value,
        }
    }

    /// # Safety
    /// The result has this row and column, nobody else's meanwhile.
    unsafe fn store_one(self, row: usize, column: usize, value: f32) {
        let value = value + self.residual.map_or(0.0, |residual| residual.row(row)[column]);
        // SAFETY: the caller's promise.
        unsafe {
            match self.output {
                Output::F32(to) => *to.row(row).add(column) = value,
                Output::Bf16(to) => *to.row(row).add(column) = half::bf16::from_f32(value).to_bits(),
            }
        }
    }
}
