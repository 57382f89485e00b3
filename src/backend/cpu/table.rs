//! An embedding table, and how its rows are read.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::packed::StorageFormat;
use super::thread_pool::ThreadPool;

/// One embedding table, `[rows, C]`: f32 if GEMMs are f32, otherwise f16, which has three more mantissa bits than bf16 and
/// sufficient range.
#[derive(Debug)]
pub(super) enum Table {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl Table {
    /// The table for GEMMs in `format`, converted by all threads of `pool`.
    pub(super) fn new(values: Vec<f32>, format: StorageFormat, pool: &ThreadPool) -> Self {
        match format {
            StorageFormat::F32 => Self::F32(values),
            StorageFormat::Bf16 | StorageFormat::Int8 => {
                let mut halves = vec![f16::ZERO; values.len()];
                let part = values.len().div_ceil(pool.threads()).max(1);
                let parts = halves.chunks_mut(part).zip(values.chunks(part)).collect();
                pool.for_each(parts, |(to, from): (&mut [f16], &[f32])| to.convert_from_f32_slice(from));
                Self::F16(halves)
            }
        }
    }

    /// Copies row `index` to `to`, `[C]`, or adds it to `to` if `add`. `scratch` is `[C]`.
    pub(super) fn read(&self, index: u32, to: &mut [f32], scratch: &mut [f32], add: bool) {
        let at = index as usize * to.len();
        let row = match self {
            Self::F32(data) => &data[at..][..to.len()],
            Self::F16(data) => {
                data[at..][..to.len()].convert_to_f32_slice(scratch);
                scratch
            }
        };
        if !add {
            return to.copy_from_slice(row);
        }
        for (to, value) in to.iter_mut().zip(row) {
            *to += value;
        }
    }
}
