//! A linear layer's weights (the GEMM's operand B), packed once at load in the order in which the microkernel reads
//! them.
//!
//! All storage formats share one layout, so one microkernel serves them all. A *k-group* is a 32-bit word of consecutive
//! values along the input dimension: one f32, two bf16 or four int8. A *panel* is `[k_groups, width]` words: its columns
//! are `width` outputs. For a tile unit, bf16 and int8 are packed in tiles instead ([`OperandLayout`]).

use bytemuck::cast_slice_mut;
use half::bf16;

use super::simd::{SimdPath, TILE_SIZE, TILE_WORDS};
use super::thread_pool::ThreadPool;
use super::workspace::CacheLine;
use crate::backend::HostTensor;

/// How a GEMM's operands are stored and multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StorageFormat {
    /// f32 times f32.
    F32,
    /// bf16 times bf16, summed in f32.
    Bf16,
    /// Unsigned activations times signed weights, summed in i32. A weight is `q * scale[output]` with q from -127 to
    /// 127, where `scale[output]` is the largest magnitude of the output's weights, divided by 127.
    Int8,
}

impl StorageFormat {
    /// Values in a k-group.
    pub(super) fn values_per_k_group(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
            Self::Int8 => 4,
        }
    }
}

/// Order of a GEMM's operands in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OperandLayout {
    /// For vectors. B is in panels of `width` columns, `[k_groups, width]` words each.
    Vectors { width: usize },
    /// For tiles. B is in panels of [`TILE_PANEL_COLUMNS`] columns, `[k_steps, 2, 16, 16]` words each: two tiles per step of 16
    /// k-groups, padded with zeros. In A, [`ROWS_BEHIND`] rows can be read behind the last, rows in bf16 have zeros up to a whole
    /// step, and rows are an odd number of cache lines apart: 16 rows then map to different cache sets.
    Tiles,
}

/// Columns of a panel in tiles.
pub(super) const TILE_PANEL_COLUMNS: usize = 2 * TILE_SIZE;

/// Rows that a block of two tiles, begun at any row, may read behind the last row.
pub(super) const ROWS_BEHIND: usize = 2 * TILE_SIZE - 1;

impl OperandLayout {
    /// The layout of GEMMs in `format` on `path`.
    pub(super) fn of(path: SimdPath, format: StorageFormat) -> Self {
        match path.has_tiles() && format != StorageFormat::F32 {
            true => Self::Tiles,
            false => Self::Vectors { width: path.panel_columns() },
        }
    }

    /// Columns of a panel of B.
    fn width(self) -> usize {
        match self {
            Self::Vectors { width } => width,
            Self::Tiles => TILE_PANEL_COLUMNS,
        }
    }

    /// Words of a panel of B.
    fn panel_words(self, k_groups: usize) -> usize {
        match self {
            Self::Vectors { width } => k_groups * width,
            Self::Tiles => k_groups.div_ceil(TILE_SIZE) * 2 * TILE_WORDS,
        }
    }

    /// The index of a word in a panel of B.
    fn index(self, k_group: usize, column: usize) -> usize {
        match self {
            Self::Vectors { width } => k_group * width + column,
            Self::Tiles => {
                let tile = k_group / TILE_SIZE * 2 + column / TILE_SIZE;
                tile * TILE_WORDS + k_group % TILE_SIZE * TILE_SIZE + column % TILE_SIZE
            }
        }
    }
}

/// Packed weights `[outputs, inputs]` and their bias. Padding columns and padding inputs are zero.
#[derive(Debug)]
pub(super) struct PackedWeights {
    pub(super) format: StorageFormat,
    pub(super) layout: OperandLayout,
    /// K-groups per column.
    pub(super) k_groups: usize,
    /// Columns per panel.
    pub(super) width: usize,
    words: Vec<CacheLine>,
    // The next three have one value for each column of every panel, padding included.
    pub(super) bias: Vec<f32>,
    /// int8: the scale of each column's weights.
    pub(super) scale: Vec<f32>,
    /// int8: the sum of each column's dequantized weights. The epilogue adds its product with the input row's `min`.
    pub(super) column_sum: Vec<f32>,
}

impl PackedWeights {
    /// Packs `weight`, `[outputs, inputs]`, and `bias`, `[outputs]`, in the given layout.
    pub(super) fn pack(
        format: StorageFormat,
        layout: OperandLayout,
        weight: &HostTensor,
        bias: &HostTensor,
        pool: &ThreadPool,
    ) -> Self {
        let (outputs, inputs, width) = (weight.shape[0], weight.shape[1], layout.width());
        let k_groups = inputs.div_ceil(format.values_per_k_group());
        let panels = outputs.div_ceil(width);
        let mut padded_bias = bias.data.clone();
        padded_bias.resize(panels * width, 0.0);
        let (mut scale, mut column_sum) = (vec![0.0; panels * width], vec![0.0; panels * width]);
        let panel_words = layout.panel_words(k_groups);
        let mut words = CacheLine::zeros(panels * panel_words * 4);
        let panel_lines = panel_words * 4 / 64;
        let columns = scale.chunks_mut(width).zip(column_sum.chunks_mut(width));
        pool.for_each(words.chunks_mut(panel_lines).zip(columns).enumerate().collect(), |(panel, (lines, columns))| {
            let words: &mut [u32] = cast_slice_mut(lines);
            let (scales, sums): (&mut [f32], &mut [f32]) = columns;
            for column in 0..width.min(outputs - panel * width) {
                let row = &weight.data[(panel * width + column) * inputs..][..inputs];
                if format == StorageFormat::Int8 {
                    let scale = int8_scale(row);
                    scales[column] = scale;
                    sums[column] = row.iter().map(|&w| i32::from(quantize_int8(w, scale))).sum::<i32>() as f32 * scale;
                }
                let scale = scales[column];
                for (group, values) in row.chunks(format.values_per_k_group()).enumerate() {
                    words[layout.index(group, column)] = match format {
                        StorageFormat::F32 => values[0].to_bits(),
                        StorageFormat::Bf16 => pack_word(values, |v| u32::from(bf16::from_f32(v).to_bits()), 16),
                        StorageFormat::Int8 => pack_word(values, |v| u32::from(quantize_int8(v, scale) as u8), 8),
                    };
                }
            }
        });
        Self { format, layout, k_groups, width, words, bias: padded_bias, scale, column_sum }
    }

    /// Packs the weights of a gated layer, `[2F, inputs]`. The first half of each panel has columns of the gate; the second half
    /// has the same columns of the value. In the last panel, both halves are padded with zeros.
    pub(super) fn pack_gated(
        format: StorageFormat,
        layout: OperandLayout,
        weight: &HostTensor,
        bias: &HostTensor,
        pool: &ThreadPool,
    ) -> Self {
        let (outputs, inputs, width) = (weight.shape[0] / 2, weight.shape[1], layout.width());
        let half = width / 2;
        let panels = outputs.div_ceil(half);
        let interleaved = |from: &HostTensor, columns: usize| {
            let mut data = vec![0.0; panels * width * columns];
            for (panel, to) in data.chunks_mut(width * columns).enumerate() {
                let rows = panel * half..outputs.min((panel + 1) * half);
                for (part, to) in to.chunks_mut(half * columns).enumerate() {
                    let from = &from.data[(part * outputs + rows.start) * columns..][..rows.len() * columns];
                    to[..from.len()].copy_from_slice(from);
                }
            }
            HostTensor { shape: vec![panels * width, columns], data }
        };
        Self::pack(format, layout, &interleaved(weight, inputs), &interleaved(bias, 1), pool)
    }

    /// The words of a panel, in the weights' layout.
    pub(super) fn panel(&self, panel: usize) -> &[u32] {
        let words: &[u32] = bytemuck::cast_slice(&self.words);
        let panel_words = self.layout.panel_words(self.k_groups);
        &words[panel * panel_words..][..panel_words]
    }
}

/// Packs values into a word, the first in its low bits.
fn pack_word(values: &[f32], bits: impl Fn(f32) -> u32, width: usize) -> u32 {
    values.iter().enumerate().fold(0, |word, (i, &value)| word | bits(value) << (i * width))
}

fn int8_scale(weights: &[f32]) -> f32 {
    weights.iter().fold(0f32, |largest, weight| largest.max(weight.abs())).max(f32::MIN_POSITIVE) / 127.0
}

/// `weight / scale` rounded to the nearest integer, ties to even. `f32::round_ties_even` would be a function call per weight.
fn quantize_int8(weight: f32, scale: f32) -> i8 {
    /// 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits of the sum.
    const ROUNDING: f32 = 12_582_912.0;
    ((weight / scale).clamp(-127.0, 127.0) + ROUNDING).to_bits() as i8
}
