//! A linear layer's weights, packed once, at load, in the order in which the kernels read them.
//!
//! One geometry for three precisions: a *k-step* is four bytes along the inputs (one f32, two bf16, four int8), and a panel
//! holds, k-step after k-step, the four bytes of each of its columns (outputs). A kernel body then serves all three.

use bytemuck::cast_slice_mut;
use half::bf16;

use super::thread_pool::ThreadPool;
use super::workspace::Line;
use crate::backend::HostTensor;

/// The numbers that products are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// f32 times f32.
    F32,
    /// bf16 times bf16, summed in f32.
    Bf16,
    /// Unsigned activations times signed weights, summed in i32. A weight is `q * scale[output]` with q from -127 to 127
    /// and `scale` the output's largest weight over 127.
    Int8,
}

impl Format {
    /// Values in a k-step.
    pub(super) fn values_per_step(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
            Self::Int8 => 4,
        }
    }
}

/// Packed weights `[outputs, inputs]` and their bias. Columns beyond `outputs` and inputs beyond the last are zeros.
#[derive(Debug)]
pub(super) struct PackedWeights {
    pub(super) format: Format,
    /// K-steps of a column.
    pub(super) steps: usize,
    /// Columns of a panel.
    pub(super) width: usize,
    words: Vec<Line>,
    /// Each of these has a value for every column of every panel.
    pub(super) bias: Vec<f32>,
    /// int8: what a column's sum is multiplied by.
    pub(super) scale: Vec<f32>,
    /// int8: the sum of a column's weights, which an activation's zero point is multiplied by.
    pub(super) column_sum: Vec<f32>,
}

impl PackedWeights {
    /// Packs `weight`, `[outputs, inputs]`, and `bias`, `[outputs]`, into panels of `width` columns.
    pub(super) fn pack(
        format: Format,
        width: usize,
        weight: &HostTensor,
        bias: &HostTensor,
        pool: &ThreadPool,
    ) -> Self {
        let (outputs, inputs) = (weight.shape[0], weight.shape[1]);
        let steps = inputs.div_ceil(format.values_per_step());
        let panels = outputs.div_ceil(width);
        let mut padded_bias = bias.data.clone();
        padded_bias.resize(panels * width, 0.0);
        let (mut scale, mut column_sum) = (vec![0.0; panels * width], vec![0.0; panels * width]);
        let mut words = Line::zeros(panels * steps * width * 4);
        let panel_lines = steps * width * 4 / 64;
        let columns = scale.chunks_mut(width).zip(column_sum.chunks_mut(width));
        pool.for_each(words.chunks_mut(panel_lines).zip(columns).enumerate().collect(), |(panel, (lines, columns))| {
            let words: &mut [u32] = cast_slice_mut(lines);
            let (scales, sums): (&mut [f32], &mut [f32]) = columns;
            for column in 0..width.min(outputs - panel * width) {
                let row = &weight.data[(panel * width + column) * inputs..][..inputs];
                if format == Format::Int8 {
                    let scale = int8_scale(row);
                    scales[column] = scale;
                    sums[column] = row.iter().map(|&w| i32::from(int8(w, scale))).sum::<i32>() as f32 * scale;
                }
                let scale = scales[column];
                for (step, values) in row.chunks(format.values_per_step()).enumerate() {
                    words[step * width + column] = match format {
                        Format::F32 => values[0].to_bits(),
                        Format::Bf16 => word(values, |v| u32::from(bf16::from_f32(v).to_bits()), 16),
                        Format::Int8 => word(values, |v| u32::from(int8(v, scale) as u8), 8),
                    };
                }
            }
        });
        Self { format, steps, width, words, bias: padded_bias, scale, column_sum }
    }

    /// The words of a panel: `[steps, width]`.
    pub(super) fn panel(&self, panel: usize) -> &[u32] {
        let words: &[u32] = bytemuck::cast_slice(&self.words);
        &words[panel * self.steps * self.width..][..self.steps * self.width]
    }
}

/// Values side by side in a word, the first in its low bits.
fn word(values: &[f32], bits: impl Fn(f32) -> u32, width: usize) -> u32 {
    values.iter().enumerate().fold(0, |word, (i, &value)| word | bits(value) << (i * width))
}

fn int8_scale(weights: &[f32]) -> f32 {
    weights.iter().fold(0f32, |largest, weight| largest.max(weight.abs())).max(f32::MIN_POSITIVE) / 127.0
}

/// The nearest whole number of scales, ties to even. No library's `round`, which is a call for each weight.
fn int8(weight: f32, scale: f32) -> i8 {
    /// 1.5 * 2^23: the sum with it is rounded to a whole number, which is in its low bits.
    const ROUNDED: f32 = 12_582_912.0;
    ((weight / scale).clamp(-127.0, 127.0) + ROUNDED).to_bits() as i8
}
