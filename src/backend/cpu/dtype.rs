//! The precisions of the CPU backend.

use super::packed::StorageFormat;

/// Precision of the encoder layers' GEMMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuDtype {
    /// 32-bit floats. The most accurate, and the reference for the others.
    F32,
    /// bfloat16, summed in f32.
    Bf16,
    /// 8-bit integers, summed in i32. Activations are quantized per token, weights per output.
    Int8,
}

impl CpuDtype {
    /// The value of `--dtype`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }
    /// The storage format of the encoder layers' GEMMs.
    pub(super) fn storage_format(self) -> StorageFormat {
        match self {
            Self::F32 => StorageFormat::F32,
            Self::Bf16 => StorageFormat::Bf16,
            Self::Int8 => StorageFormat::Int8,
        }
    }
}
