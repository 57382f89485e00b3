//! Whether two kernels for the same thing compute the same, tried on the device itself before one is taken.

use super::dtype::CudaDtype;

/// How far two right kernels may be apart, as a share of a row: twice what tests/cuda/kernels.cpp allows each of them to be off
/// the exact result. A single wrong value of a row of 64 is worth more than 0.03.
pub(super) fn bound(dtype: CudaDtype) -> f32 {
    if dtype == CudaDtype::Bf16 { 0.016 } else { 0.002 }
}

/// The largest difference of a row of `length` values, as a share of what is expected.
pub(super) fn worst_row(expected: &[f32], got: &[f32], length: usize) -> f32 {
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
    let rows = expected.chunks(length).zip(got.chunks(length));
    let errors = rows.map(|(expected, got)| {
        norm(&mut expected.iter().zip(got).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied())
    });
    errors.fold(0.0, worse)
}

/// The larger error. A NaN is the worst, whatever follows.
fn worse(a: f32, b: f32) -> f32 {
    if a.is_nan() || b <= a { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nan_is_the_worst_error_wherever_it_stands() {
        assert_eq!([0.1, 0.3, 0.2].into_iter().fold(0.0, worse), 0.3);
        for errors in [[f32::NAN, 0.1, 0.2], [0.1, f32::NAN, 0.2], [0.1, 0.2, f32::NAN]] {
            assert!(errors.into_iter().fold(0.0, worse).is_nan());
        }
    }
}
