//! E4M3, the number format of GEMM operands with `--dtype fp8`, and the power-of-two scales that bring values into its range.
//!
//! A weight's scale comes from its largest value. An activation's scale comes from an upper bound that follows from the weights. It
//! is fixed at load: no calibration, scores are batch-invariant, and values never saturate. The bounds are loose, which costs
//! little: E4M3 has the same relative error over fifteen powers of two, so the scale matters only for values below about 2^-14 of
//! the bound, where the step no longer shrinks. A scale eight times as large, with saturation, was measured on the 200 pairs of
//! tests/it/precision.rs: scores differ from f32 by up to 0.77 instead of 0.074, and Kendall's tau is 0.813 instead of 0.978.

/// The largest E4M3 value.
const E4M3_MAX: f32 = 448.0;
/// Factor by which rounding both operands to E4M3, each by at most a sixteenth, can increase a product.
const ROUNDING_GAIN: f32 = (17.0 / 16.0) * (17.0 / 16.0);

/// Upper bounds of activations that hold for every batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ValueBound {
    /// The magnitude of any value.
    value: f32,
    /// The Euclidean norm of any row.
    row: f32,
}

/// The norms of a linear layer from which a bound of its outputs follows, given a bound of its inputs.
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerGain {
    /// The largest Euclidean norm of an output's weights.
    weights: f32,
    /// The largest magnitude of a bias.
    bias: f32,
}

impl ValueBound {
    /// Bound of a layer norm's output. Before weight and bias, a row of C values has mean 0 and variance 1, so its norm, and any value,
    /// is at most sqrt(C).
    pub(super) fn of_norm(weight: &[f32], bias: &[f32]) -> Self {
        let length = (weight.len() as f32).sqrt();
        let values = weight.iter().zip(bias).map(|(weight, bias)| weight.abs() * length + bias.abs());
        Self { value: values.fold(0.0, f32::max), row: max_magnitude(weight) * length + euclidean_norm(bias) }
    }

    /// Bound of rows of `columns` values with magnitudes up to `value`.
    pub(super) fn of_values(value: f32, columns: usize) -> Self {
        Self { value, row: value * (columns as f32).sqrt() }
    }

    /// Bound of a sum of rows.
    pub(super) fn plus(self, other: Self) -> Self {
        Self { value: self.value + other.value, row: self.row + other.row }
    }

    /// The largest power of two for which no scaled value exceeds [`E4M3_MAX`].
    pub(super) fn scale(self) -> f32 {
        scale_for(self.value)
    }

    /// The same bound of values for another number of columns. It also holds for weighted means of values, and after GELU, SiLU
    /// and ReLU.
    pub(super) fn with_columns(self, columns: usize) -> Self {
        Self::of_values(self.value, columns)
    }
}

impl LayerGain {
    /// `weight` is `[outputs, inputs]`, `bias` `[outputs]`.
    pub(super) fn of(weight: &[f32], bias: &[f32], inputs: usize) -> Self {
        let lengths = weight.chunks(inputs).map(euclidean_norm);
        Self { weights: lengths.fold(0.0, f32::max), bias: max_magnitude(bias) }
    }

    /// Bound of the layer's `outputs` columns for rows within `input`, by the Cauchy-Schwarz inequality.
    pub(super) fn from(self, input: ValueBound, outputs: usize) -> ValueBound {
        ValueBound::of_values(self.weights * input.row * ROUNDING_GAIN + self.bias, outputs)
    }
}

/// The scale of a weight: the largest power of two for which no scaled value exceeds [`E4M3_MAX`].
pub(super) fn weight_scale(weight: &[f32]) -> f32 {
    scale_for(max_magnitude(weight))
}

/// A power of two, so that scaling is exact, limited to 2^-60 ..= 2^60, so that the product of two scales and its inverse are finite.
fn scale_for(value: f32) -> f32 {
    if value == 0.0 { 1.0 } else { (E4M3_MAX / value).log2().floor().clamp(-60.0, 60.0).exp2() }
}

fn max_magnitude(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max, value| max.max(value.abs()))
}

fn euclidean_norm(values: &[f32]) -> f32 {
    // Independent partial sums, which the compiler vectorizes.
    let mut sums = [0f32; 16];
    for chunk in values.chunks(16) {
        sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += value * value);
    }
    sums.iter().sum::<f32>().sqrt()
}

/// Encodes `values * scale` as E4M3: round to nearest even, saturating.
pub(super) fn encode(values: &[f32], scale: f32) -> Vec<u8> {
    values.iter().map(|value| encoded(value * scale)).collect()
}

fn encoded(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let magnitude = x.abs().min(E4M3_MAX);
    // Subnormal, below 2^-6: steps of 2^-9, which are those of f32 from 2^14 on. Normal: three fraction bits are kept, and the
    // exponent bias changes from 127 to 7.
    let subnormal = (magnitude + 16_384.0).to_bits() - 16_384f32.to_bits();
    let bits = magnitude.to_bits();
    let normal = (bits + 0x7_ffff + (bits >> 20 & 1)).wrapping_sub(120 << 23) >> 20;
    sign | if magnitude < 1.0 / 64.0 { subnormal } else { normal } as u8
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decoded(x: u8) -> f32 {
        let (exponent, fraction) = (i32::from(x >> 3 & 15), f32::from(x & 7));
        let magnitude =
            if exponent == 0 { fraction / 512.0 } else { (8.0 + fraction) * (exponent as f32 - 10.0).exp2() };
        if x & 0x80 == 0 { magnitude } else { -magnitude }
    }

    #[test]
    fn every_e4m3_value_is_encoded_exactly() {
        for x in (0..=255).filter(|x| x & 0x7f != 0x7f) {
            assert_eq!(encoded(decoded(x)), x);
        }
        assert_eq!([encoded(1e9), encoded(-1e9), encoded(f32::INFINITY)], [0x7e, 0xfe, 0x7e]);
    }

    #[test]
    fn ties_round_to_even() {
        for x in 0..0x7e {
            let tie = (decoded(x) + decoded(x + 1)) / 2.0;
            assert_eq!(encoded(tie), x + x % 2, "between {} and {}", decoded(x), decoded(x + 1));
            assert_eq!(encoded(tie * 0.9999), x);
            assert_eq!(encoded(tie * 1.0001), x + 1);
        }
    }

    #[test]
    fn scaled_values_reach_the_upper_half_of_the_range() {
        for value in [1e-3, 0.4, 1.0, 447.0, 448.0, 449.0, 1e5] {
            let scaled = value * scale_for(value);
            assert!(scaled <= E4M3_MAX && scaled > E4M3_MAX / 2.0, "{value}");
        }
        assert_eq!(scale_for(0.0), 1.0);
    }

    proptest! {
        #[test]
        fn norms_and_layer_outputs_stay_within_their_bounds(
            x in prop::collection::vec(-3f32..3.0, 24),
            gamma in prop::collection::vec(-2f32..2.0, 24),
            beta in prop::collection::vec(-1f32..1.0, 24),
            weight in prop::collection::vec(-1f32..1.0, 24 * 5),
            bias in prop::collection::vec(-1f32..1.0, 5),
        ) {
            let mean = x.iter().sum::<f32>() / 24.0;
            let deviation = (x.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 24.0 + 1e-5).sqrt();
            let normed: Vec<f32> =
                x.iter().zip(&gamma).zip(&beta).map(|((x, gamma), beta)| (x - mean) / deviation * gamma + beta).collect();
            let bound = ValueBound::of_norm(&gamma, &beta);
            prop_assert!(max_magnitude(&normed) <= bound.value && euclidean_norm(&normed) <= bound.row);

            // As on the GPU: both operands are rounded.
            let rounded = |values: &[f32], scale: f32| -> Vec<f32> {
                encode(values, scale).into_iter().map(|x| decoded(x) / scale).collect()
            };
            let (x, w) = (rounded(&normed, bound.scale()), rounded(&weight, weight_scale(&weight)));
            let outputs: Vec<f32> =
                (0..5).map(|i| x.iter().zip(&w[i * 24..]).map(|(x, w)| x * w).sum::<f32>() + bias[i]).collect();
            let bound = LayerGain::of(&weight, &bias, 24).from(bound, 5);
            prop_assert!(max_magnitude(&outputs) <= bound.value && euclidean_norm(&outputs) <= bound.row);
        }
    }
}
