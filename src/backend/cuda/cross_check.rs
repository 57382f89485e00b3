//! Numerical cross-check of two kernels for the same operation, run on the device before one of them is used.

use super::dtype::CudaDtype;

/// Largest relative difference of a row between two correct f16 or bf16 kernels: twice the error that tests/cuda/kernels.cpp allows
/// against the exact result. One wrong value in a row of 64 gives an error of about 1/8.
pub(super) fn bound(dtype: CudaDtype) -> f32 {
    if dtype == CudaDtype::Bf16 { 0.016 } else { 0.002 }
}

/// The largest relative error |got - expected| / |expected| of a row of `length` values; 0 for equal rows, infinity for a
/// difference from a row of zeros.
pub(super) fn worst_row(expected: &[f32], got: &[f32], length: usize) -> f32 {
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
    let rows = expected.chunks(length).zip(got.chunks(length));
    let errors = rows.map(|(expected, got)| {
        let difference = norm(&mut expected.iter().zip(got).map(|(a, b)| a - b));
        if difference == 0.0 { 0.0 } else { difference / norm(&mut expected.iter().copied()) }
    });
    errors.fold(0.0, worse)
}

/// The larger error; NaN is larger than any number.
fn worse(a: f32, b: f32) -> f32 {
    if a.is_nan() || b <= a { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_of_zeros_have_no_error_and_others_an_infinite_one() {
        assert_eq!(worst_row(&[0.0, 0.0, 3.0, 4.0], &[0.0, 0.0, 3.0, 4.5], 2), 0.1);
        assert_eq!(worst_row(&[0.0, 0.0], &[0.0, 0.1], 2), f32::INFINITY);
        assert!(worst_row(&[0.0, 0.0], &[0.0, f32::NAN], 2).is_nan());
    }

    #[test]
    fn nan_is_the_largest_error_in_any_position() {
        assert_eq!([0.1, 0.3, 0.2].into_iter().fold(0.0, worse), 0.3);
        for errors in [[f32::NAN, 0.1, 0.2], [0.1, f32::NAN, 0.2], [0.1, 0.2, f32::NAN]] {
            assert!(errors.into_iter().fold(0.0, worse).is_nan());
        }
    }
}
