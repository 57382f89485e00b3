//! Rows of activations in the precision that GEMMs read: f32, bf16, or int8 with a range for each row.

use std::ops::Range;

use super::gemm::{ByteRange, Input};
use super::packed::Format;
use super::simd::{Isa, Op, load_partial, store_partial_bf16};
use super::workspace::{Matrix, Shared};

/// Rows as a product of a lower precision reads them.
#[derive(Debug)]
pub(super) enum Low {
    Bf16(Matrix<u16>),
    /// Bytes, and in the one row of the second what each row's stand for.
    Int8(Matrix<u8>, Matrix<ByteRange>),
}

/// [`Low`] while several threads write it; `Exact` where products read the f32 themselves.
#[derive(Debug, Clone, Copy)]
pub(super) enum LowShared<'a> {
    Exact,
    Bf16(Shared<'a, u16>),
    Int8(Shared<'a, u8>, Shared<'a, ByteRange>),
}

impl Low {
    /// Memory for rows in `format`; none for f32.
    pub(super) fn take(format: Format, rows: usize, columns: usize) -> Option<Self> {
        match format {
            Format::F32 => None,
            Format::Bf16 => Some(Self::Bf16(take_bf16(rows, columns))),
            Format::Int8 => Some(Self::Int8(Matrix::take(rows, columns), Matrix::take(1, rows))),
        }
    }

    pub(super) fn shared(&mut self) -> LowShared<'_> {
        match self {
            Self::Bf16(rows) => LowShared::Bf16(rows.shared()),
            Self::Int8(rows, ranges) => LowShared::Int8(rows.shared(), ranges.shared()),
        }
    }

    pub(super) fn input(&self) -> Input<'_> {
        match self {
            Self::Bf16(rows) => input(rows, &[]),
            Self::Int8(rows, ranges) => input(rows, ranges.row(0)),
        }
    }

    pub(super) fn gather(&self, rows: &[u32]) -> Self {
        match self {
            Self::Bf16(from) => Self::Bf16(gather(from, rows)),
            Self::Int8(from, ranges) => {
                let mut gathered = Matrix::take(1, rows.len());
                for (to, &row) in gathered.row_mut(0).iter_mut().zip(rows) {
                    *to = ranges.row(0)[row as usize];
                }
                Self::Int8(gather(from, rows), gathered)
            }
        }
    }
}

/// [`Low::shared`], or nothing to write.
pub(super) fn shared(low: &mut Option<Low>) -> LowShared<'_> {
    low.as_mut().map_or(LowShared::Exact, Low::shared)
}

/// Rows of bf16. A last k-step that is half filled ends in a zero, since whatever number is there is multiplied (by zero).
pub(super) fn take_bf16(rows: usize, columns: usize) -> Matrix<u16> {
    let mut matrix = Matrix::take(rows, columns);
    if !columns.is_multiple_of(2) {
        let stride = matrix.stride();
        for row in 0..rows {
            matrix.all_mut()[row * stride + columns] = 0;
        }
    }
    matrix
}

/// Rows as words of k-steps.
pub(super) fn input<'a, T: bytemuck::Pod>(rows: &'a Matrix<T>, ranges: &'a [ByteRange]) -> Input<'a> {
    Input {
        words: bytemuck::cast_slice(rows.all()),
        stride: rows.stride() * size_of::<T>() / 4,
        rows: rows.rows(),
        ranges,
    }
}

/// The given rows, in the given order.
pub(super) fn gather<T: bytemuck::Pod>(from: &Matrix<T>, rows: &[u32]) -> Matrix<T> {
    let mut to = Matrix::take(rows.len(), from.columns());
    let (stride, from_stride) = (to.stride(), from.stride());
    for (i, &row) in rows.iter().enumerate() {
        // With the row's end, which holds a half k-step's zero.
        to.all_mut()[i * stride..][..stride].copy_from_slice(&from.all()[row as usize * from_stride..][..stride]);
    }
    to
}

/// The lower form of rows.
pub(super) struct Lower<'a> {
    pub(super) from: LowerFrom<'a>,
    pub(super) columns: usize,
    pub(super) low: LowShared<'a>,
    /// No other thread touches these rows meanwhile.
    pub(super) rows: Range<usize>,
}

/// Rows that are to be lowered.
#[derive(Clone, Copy)]
pub(super) enum LowerFrom<'a> {
    F32(&'a Matrix<f32>),
    Bf16(&'a Matrix<u16>),
}

impl Op for Lower<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let c = self.columns;
        let mut as_f32 = Matrix::<f32>::take(1, c);
        let as_f32 = as_f32.row_mut(0).as_mut_ptr();
        for row in self.rows {
            // SAFETY: the rows have c columns; the low ones are this thread's; a row's stride holds whole vectors.
            unsafe {
                match self.from {
                    LowerFrom::F32(from) => lower(isa, from.row(row).as_ptr(), c, self.low, row),
                    LowerFrom::Bf16(from) => {
                        let from = from.row(row);
                        for at in (0..c).step_by(I::LANES) {
                            if at + I::LANES <= c {
                                isa.store(as_f32.add(at), isa.load_bf16(from.as_ptr().add(at)));
                            } else {
                                for (i, &bits) in from.iter().enumerate().skip(at) {
                                    *as_f32.add(i) = f32::from_bits(u32::from(bits) << 16);
                                }
                            }
                        }
                        lower(isa, as_f32, c, self.low, row);
                    }
                }
            }
        }
    }
}

/// Rounds `x`, `[c]`, into row `row` of `low`.
///
/// # Safety
/// x has c values; the row is this thread's and has c columns.
#[inline(always)]
pub(super) unsafe fn lower<I: Isa>(isa: I, x: *const f32, c: usize, low: LowShared<'_>, row: usize) {
    // SAFETY: the caller's promise; no access goes beyond c values.
    unsafe {
        match low {
            LowShared::Exact => {}
            LowShared::Bf16(to) => {
                let to = to.row(row);
                for at in (0..c).step_by(I::LANES) {
                    store_partial_bf16(isa, to.add(at), c - at, load_partial(isa, x.add(at), c - at, 0.0));
                }
            }
            LowShared::Int8(to, ranges) => {
                let (mut least, mut most) = (isa.splat(f32::INFINITY), isa.splat(f32::NEG_INFINITY));
                for at in (0..c).step_by(I::LANES) {
                    // Lanes beyond the row repeat its first value.
                    let value = load_partial(isa, x.add(at), c - at, *x);
                    (least, most) = (isa.min(least, value), isa.max(most, value));
                }
                let (least, most) = (isa.min_of(least), isa.max_of(most));
                let scale = ((most - least) / 255.0).max(f32::MIN_POSITIVE);
                *ranges.row(0).add(row) = ByteRange { low: least, scale };
                let (to, least, inverse) = (to.row(row), isa.splat(least), isa.splat(1.0 / scale));
                for at in (0..c).step_by(I::LANES) {
                    let value = isa.mul(isa.sub(load_partial(isa, x.add(at), c - at, *x), least), inverse);
                    // A byte matrix's rows are whole cache lines: a vector of bytes is always within one.
                    isa.store_u8(to.add(at), value);
                }
            }
        }
    }
}
