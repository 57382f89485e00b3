//! Number formats of the CUDA backend, and their encoding on the device.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Number formats of activations and GEMM operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CudaDtype {
    F16,
    Bf16,
    /// Single precision, for comparison.
    F32,
    /// f16 activations, E4M3 GEMM operands.
    Fp8,
}

impl CudaDtype {
    /// The value of `--dtype`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
            Self::Fp8 => "fp8",
        }
    }

    /// Bytes per activation.
    pub(super) fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Bytes per GEMM operand.
    pub(super) fn operand_bytes(self) -> usize {
        if self == Self::Fp8 { 1 } else { self.bytes() }
    }

    /// Encodes values in the format of activations.
    pub(super) fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F16 | Self::Fp8 => {
                let mut halves = vec![f16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                bytemuck::cast_slice::<u16, u8>(halves.reinterpret_cast()).to_vec()
            }
            Self::Bf16 => {
                let mut halves = vec![bf16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                bytemuck::cast_slice::<u16, u8>(halves.reinterpret_cast()).to_vec()
            }
            Self::F32 => bytemuck::cast_slice(values).to_vec(),
        }
    }

    /// Decodes values in the format of activations.
    pub(super) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let half = |pair: &[u8]| u16::from_ne_bytes([pair[0], pair[1]]);
        match self {
            Self::F16 | Self::Fp8 => bytes.chunks_exact(2).map(|pair| f16::from_bits(half(pair)).to_f32()).collect(),
            Self::Bf16 => bytes.chunks_exact(2).map(|pair| bf16::from_bits(half(pair)).to_f32()).collect(),
            Self::F32 => bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }
}
