//! GEMM epilogues: activation, residual and rounding, applied to a vector of results before it is stored.

use super::activation::activate;
use super::simd::{Accuracy, Isa, MAX_LANES, store_partial, store_partial_bf16};
use super::workspace::{Matrix, SharedMatrix};
use crate::backend::Activation;

/// The result's rows: f32, or rounded to bf16.
#[derive(Debug, Clone, Copy)]
pub(super) enum OutputRows<'a> {
    F32(SharedMatrix<'a, f32>),
    Bf16(SharedMatrix<'a, u16>),
}

/// The position of a vector of values.
#[derive(Debug, Clone, Copy)]
pub(super) struct VectorPosition {
    pub(super) row: usize,
    /// The first value's output of the layer: a row of W.
    pub(super) output: usize,
    /// Column of the first value in the result. Column 0 is the first output that is computed.
    pub(super) column: usize,
}

/// Stores a vector of values: the GEMM's sums after scale and bias.
pub(super) trait StoreEpilogue: Copy {
    /// # Safety
    /// The result has a whole vector of columns at `at` ([`StoreClipped`] excepted), and no other thread accesses them
    /// at the same time.
    unsafe fn store<I: Isa>(self, isa: I, at: VectorPosition, value: I::Floats);
}

/// Rounds to bf16. For the QKV projection.
#[derive(Clone, Copy)]
pub(super) struct StoreBf16<'a>(pub(super) SharedMatrix<'a, u16>);

/// Applies GELU and rounds to bf16. For the first feed-forward layer.
#[derive(Clone, Copy)]
pub(super) struct StoreGeluBf16<'a>(pub(super) SharedMatrix<'a, u16>);

/// Adds the residual (first field) and stores f32. For the attention's output projection and the second feed-forward
/// layer.
#[derive(Clone, Copy)]
pub(super) struct StoreResidual<'a>(pub(super) &'a Matrix<f32>, pub(super) SharedMatrix<'a, f32>);

/// Any epilogue without a gate, for whole vectors.
#[derive(Clone, Copy)]
pub(super) struct StoreAny<'a> {
    pub(super) activation: Option<Activation>,
    pub(super) residual: Option<&'a Matrix<f32>>,
    pub(super) output: OutputRows<'a>,
}

/// Any epilogue without a gate, for vectors with outputs outside `start..end`, which are not stored.
#[derive(Clone, Copy)]
pub(super) struct StoreClipped<'a> {
    pub(super) inner: StoreAny<'a>,
    pub(super) start: usize,
    pub(super) end: usize,
}

/// Multiplies `activation(gate)` by the value. For the first layer of a gated feed-forward network.
#[derive(Clone, Copy)]
pub(super) struct StoreGated<'a> {
    pub(super) activation: Activation,
    /// Columns of the result.
    pub(super) columns: usize,
    pub(super) output: OutputRows<'a>,
}

impl StoreGated<'_> {
    /// Stores the lanes of a vector that are columns of the result; the first is at `column`.
    ///
    /// # Safety
    /// The result has this row, and no other thread accesses these columns at the same time.
    #[inline(always)]
    pub(super) unsafe fn store<I: Isa>(self, isa: I, row: usize, column: usize, gate: I::Floats, value: I::Floats) {
        if column >= self.columns {
            return;
        }
        let n = self.columns - column;
        // SAFETY: guaranteed by the caller; no access goes beyond n columns.
        unsafe {
            match self.output {
                OutputRows::F32(to) => {
                    let gate = activate(isa, self.activation, gate, Accuracy::F32);
                    store_partial(isa, to.row(row).add(column), n, isa.mul(gate, value));
                }
                OutputRows::Bf16(to) => {
                    let gate = activate(isa, self.activation, gate, Accuracy::Bf16);
                    store_partial_bf16(isa, to.row(row).add(column), n, isa.mul(gate, value));
                }
            }
        }
    }
}

impl StoreEpilogue for StoreBf16<'_> {
    #[inline(always)]
    unsafe fn store<I: Isa>(self, isa: I, at: VectorPosition, value: I::Floats) {
        // SAFETY: guaranteed by the caller.
        unsafe { isa.store_bf16(self.0.row(at.row).add(at.column), value) }
    }
}

impl StoreEpilogue for StoreGeluBf16<'_> {
    #[inline(always)]
    unsafe fn store<I: Isa>(self, isa: I, at: VectorPosition, value: I::Floats) {
        // SAFETY: guaranteed by the caller.
        unsafe { StoreBf16(self.0).store(isa, at, activate(isa, Activation::Gelu, value, Accuracy::Bf16)) }
    }
}

impl StoreEpilogue for StoreResidual<'_> {
    #[inline(always)]
    unsafe fn store<I: Isa>(self, isa: I, at: VectorPosition, value: I::Floats) {
        // SAFETY: guaranteed by the caller; the residual has the result's shape.
        unsafe {
            let other = isa.load(self.0.as_slice().as_ptr().add(at.row * self.0.stride() + at.column));
            isa.store(self.1.row(at.row).add(at.column), isa.add(value, other));
        }
    }
}

impl StoreEpilogue for StoreAny<'_> {
    #[inline(always)]
    unsafe fn store<I: Isa>(self, isa: I, at: VectorPosition, value: I::Floats) {
        let value = self.activated(isa, value);
        // SAFETY: guaranteed by the caller.
        unsafe {
            match (self.residual, self.output) {
                (Some(residual), OutputRows::F32(to)) => StoreResidual(residual, to).store(isa, at, value),
                (None, OutputRows::F32(to)) => isa.store(to.row(at.row).add(at.column), value),
                (None, OutputRows::Bf16(to)) => StoreBf16(to).store(isa, at, value),
                (Some(_), OutputRows::Bf16(_)) => unreachable!("the residual stream is f32"),
            }
        }
    }
}

impl StoreEpilogue for StoreClipped<'_> {
    #[inline(always)]
    unsafe fn store<I: Isa>(self, isa: I, at: VectorPosition, value: I::Floats) {
        let mut values = [0f32; MAX_LANES];
        // SAFETY: the array has room for the widest vector. Only values of outputs in `start..end` are stored, each in
        // its own column.
        unsafe {
            isa.store(values.as_mut_ptr(), self.inner.activated(isa, value));
            for (output, &value) in (at.output..).zip(&values[..I::LANES]) {
                if (self.start..self.end).contains(&output) {
                    self.inner.store_one(at.row, output - self.start, value);
                }
            }
        }
    }
}

impl StoreAny<'_> {
    #[inline(always)]
    fn activated<I: Isa>(self, isa: I, value: I::Floats) -> I::Floats {
        let accuracy = match self.output {
            OutputRows::F32(_) => Accuracy::F32,
            OutputRows::Bf16(_) => Accuracy::Bf16,
        };
        match self.activation {
            Some(activation) => activate(isa, activation, value, accuracy),
            None => value,
        }
    }

    /// # Safety
    /// The result has this row and column, and no other thread accesses the value at the same time.
    unsafe fn store_one(self, row: usize, column: usize, value: f32) {
        let value = value + self.residual.map_or(0.0, |residual| residual.row(row)[column]);
        // SAFETY: guaranteed by the caller.
        unsafe {
            match self.output {
                OutputRows::F32(to) => *to.row(row).add(column) = value,
                OutputRows::Bf16(to) => *to.row(row).add(column) = half::bf16::from_f32(value).to_bits(),
            }
        }
    }
}
