//! Converts f32 or bf16 activations to the GEMMs' storage format: bf16, or int8 with quantization parameters per row. GEMMs in
//! f32 read the f32 rows.

use std::ops::Range;

use super::gemm::{GemmInput, QuantParams};
use super::packed::{OperandLayout, ROWS_BEHIND, StorageFormat};
use super::simd::{Isa, SimdOp, load_partial, store_partial_bf16};
use super::workspace::{Matrix, SharedMatrix};

/// Rows in the storage format of a bf16 or int8 GEMM.
#[derive(Debug)]
pub(super) enum QuantizedRows {
    Bf16(Matrix<u16>),
    /// Bytes, and the quantization parameters of each row: `[1, rows]`.
    Int8(Matrix<u8>, Matrix<QuantParams>),
}

/// Handle through which several threads write [`QuantizedRows`]. `Unused`: the GEMMs read the f32 rows directly.
#[derive(Debug, Clone, Copy)]
pub(super) enum SharedQuantizedRows<'a> {
    Unused,
    Bf16(SharedMatrix<'a, u16>),
    Int8(SharedMatrix<'a, u8>, SharedMatrix<'a, QuantParams>),
}

impl QuantizedRows {
    /// Acquires rows in `format`; `None` for f32. Their contents are unspecified.
    pub(super) fn acquire(format: StorageFormat, layout: OperandLayout, rows: usize, columns: usize) -> Option<Self> {
        match format {
            StorageFormat::F32 => None,
            StorageFormat::Bf16 => Some(Self::Bf16(acquire_bf16(layout, rows, columns))),
            StorageFormat::Int8 => Some(Self::Int8(acquire_rows(layout, rows, columns), Matrix::acquire(1, rows))),
        }
    }

    pub(super) fn shared(&mut self) -> SharedQuantizedRows<'_> {
        match self {
            Self::Bf16(rows) => SharedQuantizedRows::Bf16(rows.shared()),
            Self::Int8(rows, params) => SharedQuantizedRows::Int8(rows.shared(), params.shared()),
        }
    }

    pub(super) fn gemm_input(&self) -> GemmInput<'_> {
        match self {
            Self::Bf16(rows) => gemm_input(rows, &[]),
            Self::Int8(rows, params) => gemm_input(rows, params.row(0)),
        }
    }

    pub(super) fn gather_rows(&self, layout: OperandLayout, rows: &[u32]) -> Self {
        match self {
            Self::Bf16(from) => Self::Bf16(gather_rows(from, acquire_bf16(layout, rows.len(), from.columns()), rows)),
            Self::Int8(from, params) => {
                let mut gathered = Matrix::acquire(1, rows.len());
                for (to, &row) in gathered.row_mut(0).iter_mut().zip(rows) {
                    *to = params.row(0)[row as usize];
                }
                Self::Int8(gather_rows(from, acquire_rows(layout, rows.len(), from.columns()), rows), gathered)
            }
        }
    }
}

/// [`QuantizedRows::shared`], or [`SharedQuantizedRows::Unused`].
pub(super) fn shared(quantized: &mut Option<QuantizedRows>) -> SharedQuantizedRows<'_> {
    quantized.as_mut().map_or(SharedQuantizedRows::Unused, QuantizedRows::shared)
}

/// Acquires rows of bf16. The padding values in each row's last k-group (in tiles: in its last step) are set to zero. Their
/// weights are zero, but that is not enough: 0 * NaN is NaN.
pub(super) fn acquire_bf16(layout: OperandLayout, rows: usize, columns: usize) -> Matrix<u16> {
    let mut matrix = acquire_rows(layout, rows, columns);
    let padded = columns.next_multiple_of(match layout {
        OperandLayout::Vectors { .. } => 2,
        OperandLayout::Tiles => 32,
    });
    if padded > columns {
        let stride = matrix.stride();
        for row in 0..rows {
            matrix.as_mut_slice()[row * stride..][columns..padded].fill(0);
        }
    }
    matrix
}

/// Acquires rows of a GEMM's operand A.
fn acquire_rows<T: bytemuck::Pod>(layout: OperandLayout, rows: usize, columns: usize) -> Matrix<T> {
    match layout {
        OperandLayout::Vectors { .. } => Matrix::acquire(rows, columns),
        OperandLayout::Tiles => Matrix::acquire_odd(rows, columns, ROWS_BEHIND),
    }
}

/// Views rows as a GEMM's operand A: k-groups of one 32-bit word each.
pub(super) fn gemm_input<'a, T: bytemuck::Pod>(rows: &'a Matrix<T>, params: &'a [QuantParams]) -> GemmInput<'a> {
    GemmInput {
        words: bytemuck::cast_slice(rows.as_slice()),
        stride: rows.stride() * size_of::<T>() / 4,
        rows: rows.rows(),
        params,
    }
}

/// Copies the rows with the given indices, in that order, to `to`, which has the same columns and stride.
pub(super) fn gather_rows<T: bytemuck::Pod>(from: &Matrix<T>, mut to: Matrix<T>, rows: &[u32]) -> Matrix<T> {
    let (stride, from_stride) = (to.stride(), from.stride());
    for (i, &row) in rows.iter().enumerate() {
        // Copies the whole stride, including the padding of the row's last k-group.
        to.as_mut_slice()[i * stride..][..stride]
            .copy_from_slice(&from.as_slice()[row as usize * from_stride..][..stride]);
    }
    to
}

/// Converts rows to the GEMMs' storage format.
pub(super) struct QuantizeRows<'a> {
    pub(super) from: QuantizeSource<'a>,
    pub(super) columns: usize,
    pub(super) to: SharedQuantizedRows<'a>,
    /// No other thread accesses these rows at the same time.
    pub(super) rows: Range<usize>,
}

#[derive(Clone, Copy)]
pub(super) enum QuantizeSource<'a> {
    F32(&'a Matrix<f32>),
    Bf16(&'a Matrix<u16>),
}

impl SimdOp for QuantizeRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let c = self.columns;
        let mut as_f32 = Matrix::<f32>::acquire(1, c);
        let as_f32 = as_f32.row_mut(0).as_mut_ptr();
        for row in self.rows {
            // SAFETY: the rows have c columns, and only this thread accesses the output rows. `as_f32` has c values.
            unsafe {
                match self.from {
                    QuantizeSource::F32(from) => quantize_row(isa, from.row(row).as_ptr(), c, self.to, row),
                    QuantizeSource::Bf16(from) => {
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
                        quantize_row(isa, as_f32, c, self.to, row);
                    }
                }
            }
        }
    }
}

/// Rounds `x`, `[c]`, into row `row` of `to`. int8 is asymmetric: `value = min + scale * byte`, where byte 0 is the row's
/// smallest value and byte 255 its largest. The scale of a row with NaN or an infinity is NaN, so that the score is too.
///
/// # Safety
/// `x` is valid for reads of c values. The row has c columns, and no other thread accesses it at the same time.
#[inline(always)]
pub(super) unsafe fn quantize_row<I: Isa>(isa: I, x: *const f32, c: usize, to: SharedQuantizedRows<'_>, row: usize) {
    // SAFETY: guaranteed by the caller. No access goes beyond c values, except that bytes are stored into the row's padding.
    unsafe {
        match to {
            SharedQuantizedRows::Unused => {}
            SharedQuantizedRows::Bf16(to) => {
                let to = to.row(row);
                for at in (0..c).step_by(I::LANES) {
                    store_partial_bf16(isa, to.add(at), c - at, load_partial(isa, x.add(at), c - at, 0.0));
                }
            }
            SharedQuantizedRows::Int8(to, params) => {
                let (mut min, mut max) = (isa.splat(f32::INFINITY), isa.splat(f32::NEG_INFINITY));
                // Minimum and maximum may ignore NaN. The sum of 0 * value is NaN if a value is NaN or infinite, and else 0.
                let (mut zero_sum, zero) = (isa.splat(0.0), isa.splat(0.0));
                for at in (0..c).step_by(I::LANES) {
                    // Lanes beyond the row repeat its first value: minimum and maximum stay the same.
                    let value = load_partial(isa, x.add(at), c - at, *x);
                    (min, max) = (isa.min(min, value), isa.max(max, value));
                    zero_sum = isa.fma(zero, value, zero_sum);
                }
                let (min, max) = (isa.reduce_min(min), isa.reduce_max(max));
                let scale = ((max - min) / 255.0).max(f32::MIN_POSITIVE) + isa.reduce_sum(zero_sum);
                *params.row(0).add(row) = QuantParams { min, scale };
                let (to, min, inverse) = (to.row(row), isa.splat(min), isa.splat(1.0 / scale));
                for at in (0..c).step_by(I::LANES) {
                    let value = isa.mul(isa.sub(load_partial(isa, x.add(at), c - at, *x), min), inverse);
                    // A row of bytes is padded to whole cache lines, so a whole vector of bytes always fits.
                    isa.store_u8(to.add(at), value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::SimdPath;
    use super::*;

    #[test]
    fn a_nan_or_an_infinity_in_a_row_makes_its_scale_nan() {
        const COLUMNS: usize = 37;
        for path in SimdPath::supported() {
            for (bad, at) in [(f32::NAN, 0), (f32::NAN, 17), (f32::NAN, 36), (f32::INFINITY, 20), (1.0, 5)] {
                let mut from = Matrix::<f32>::acquire(1, COLUMNS);
                from.row_mut(0).iter_mut().zip(0..).for_each(|(x, i)| *x = i as f32 - 10.0);
                from.row_mut(0)[at] = bad;
                let mut quantized =
                    QuantizedRows::acquire(StorageFormat::Int8, OperandLayout::Vectors { width: 16 }, 1, COLUMNS)
                        .unwrap();
                let to = quantized.shared();
                path.enter(QuantizeRows { from: QuantizeSource::F32(&from), columns: COLUMNS, to, rows: 0..1 });
                let QuantizedRows::Int8(_, params) = &quantized else { unreachable!("int8 was asked for") };
                assert_eq!(params.row(0)[0].scale.is_nan(), !bad.is_finite(), "{}: {bad} at {at}", path.name());
            }
        }
    }
}
