//! E4M3, the numbers of fp8 bits that `--dtype fp8` multiplies, and the powers of two that bring values into their range.
//!
//! The scale of a weight comes from its own largest value. That of an activation comes from what the weights let it be at most,
//! so it is fixed at load: nothing is calibrated, a score does not depend on its company, and no value is ever cut. Such a bound
//! is loose, which costs little: over fifteen powers of two E4M3 has the same relative error, so a scale matters only for
//! values that are 2^-14 of the bound, below which its steps no longer shrink. A tighter scale was measured, fp8 times as large
//! and cutting what is beyond: on tests/precision.rs's 200 pairs, scores up to 0.77 from f32's instead of 0.074, and a Kendall
//! tau of 0.813 instead of 0.978.

/// The largest E4M3.
const LARGEST: f32 = 448.0;
/// What rounding both operands to E4M3, by a sixteenth at most, can make of a product's magnitude.
const ROUNDED: f32 = (17.0 / 16.0) * (17.0 / 16.0);

/// What rows of activations are at most, whatever the batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ValueBound {
    /// The magnitude of any value.
    value: f32,
    /// The length of any row: the root of its sum of squares.
    row: f32,
}

/// What a linear layer makes of a row at most.
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerGain {
    /// The length of any output's weights.
    weights: f32,
    /// The magnitude of any output's bias.
    bias: f32,
}

impl ValueBound {
    /// After a layer norm over C values. What it scales has mean 0 and variance 1, so it is a row of length sqrt(C), of which no
    /// value is more.
    pub(super) fn of_norm(weight: &[f32], bias: &[f32]) -> Self {
        let length = (weight.len() as f32).sqrt();
        let values = weight.iter().zip(bias).map(|(weight, bias)| weight.abs() * length + bias.abs());
        Self { value: values.fold(0.0, f32::max), row: largest(weight) * length + root_of_squares(bias) }
    }

    /// Of rows of `columns` values up to `value`.
    pub(super) fn of_values(value: f32, columns: usize) -> Self {
        Self { value, row: value * (columns as f32).sqrt() }
    }

    /// Of a sum of rows.
    pub(super) fn plus(self, other: Self) -> Self {
        Self { value: self.value + other.value, row: self.row + other.row }
    }

    /// The largest power of two that takes no value beyond E4M3.
    pub(super) fn scale(self) -> f32 {
        scale_for(self.value)
    }

    /// Of some of the columns: weighted means of such values are such values too, and so is what gelu and relu leave of them.
    pub(super) fn narrowed(self, columns: usize) -> Self {
        Self::of_values(self.value, columns)
    }
}

impl LayerGain {
    /// `weight` is `[outputs, inputs]`, `bias` `[outputs]`.
    pub(super) fn of(weight: &[f32], bias: &[f32], inputs: usize) -> Self {
        let lengths = weight.chunks(inputs).map(root_of_squares);
        Self { weights: lengths.fold(0.0, f32::max), bias: largest(bias) }
    }

    /// What comes of rows within `input`, by the inequality of Cauchy and Schwarz.
    pub(super) fn from(self, input: ValueBound, outputs: usize) -> ValueBound {
        ValueBound::of_values(self.weights * input.row * ROUNDED + self.bias, outputs)
    }
}

/// The scale of a weight.
pub(super) fn weight_scale(weight: &[f32]) -> f32 {
    scale_for(largest(weight))
}

/// Powers of two, so that scaling rounds nothing. Far from the ends of f32, so that two scales and their inverses can be
/// multiplied.
fn scale_for(value: f32) -> f32 {
    if value == 0.0 { 1.0 } else { (LARGEST / value).log2().floor().clamp(-60.0, 60.0).exp2() }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

fn root_of_squares(values: &[f32]) -> f32 {
    // ContextPool of their own, which the compiler adds side by side.
    let mut sums = [0f32; 16];
    for chunk in values.chunks(16) {
        sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += value * value);
    }
    sums.iter().sum::<f32>().sqrt()
}

/// The values times `scale`, each the nearest E4M3, ties to even; what is larger becomes the largest.
pub(super) fn encode(values: &[f32], scale: f32) -> Vec<u8> {
    values.iter().map(|value| encoded(value * scale)).collect()
}

fn encoded(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let magnitude = x.abs().min(LARGEST);
    // Below 2^-6 steps are of 2^-9, as they are for f32 from 2^14 on. Above, three bits of fraction stay, and the exponent
    // counts from 7, not from 127.
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
    fn every_number_is_itself() {
        for x in (0..=255).filter(|x| x & 0x7f != 0x7f) {
            assert_eq!(encoded(decoded(x)), x);
        }
        assert_eq!([encoded(1e9), encoded(-1e9), encoded(f32::INFINITY)], [0x7e, 0xfe, 0x7e]);
    }

    #[test]
    fn ties_go_to_the_even_neighbour() {
        for x in 0..0x7e {
            let tie = (decoded(x) + decoded(x + 1)) / 2.0;
            assert_eq!(encoded(tie), x + x % 2, "between {} and {}", decoded(x), decoded(x + 1));
            assert_eq!(encoded(tie * 0.9999), x);
            assert_eq!(encoded(tie * 1.0001), x + 1);
        }
    }

    #[test]
    fn a_scale_takes_the_largest_value_into_the_upper_half_of_the_range() {
        for value in [1e-3, 0.4, 1.0, 447.0, 448.0, 449.0, 1e5] {
            let scaled = value * scale_for(value);
            assert!(scaled <= LARGEST && scaled > LARGEST / 2.0, "{value}");
        }
        assert_eq!(scale_for(0.0), 1.0);
    }

    proptest! {
        #[test]
        fn nothing_exceeds_its_bound(
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
            prop_assert!(largest(&normed) <= bound.value && root_of_squares(&normed) <= bound.row);

            // As a device has them: both operands rounded.
            let rounded = |values: &[f32], scale: f32| -> Vec<f32> {
                encode(values, scale).into_iter().map(|x| decoded(x) / scale).collect()
            };
            let (x, w) = (rounded(&normed, bound.scale()), rounded(&weight, weight_scale(&weight)));
            let outputs: Vec<f32> =
                (0..5).map(|i| x.iter().zip(&w[i * 24..]).map(|(x, w)| x * w).sum::<f32>() + bias[i]).collect();
            let reached = LayerGain::of(&weight, &bias, 24).from(bound, 5);
            prop_assert!(largest(&outputs) <= reached.value && root_of_squares(&outputs) <= reached.row);
        }
    }
}
