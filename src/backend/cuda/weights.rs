//! A model's weights on the GPU.

use cudarc::driver::CudaSlice;

use super::context::Buffer;
use super::fp8::{LayerGain, ValueBound};
use crate::backend::LayerRole;

/// A tensor on the device.
#[derive(Debug)]
pub(super) struct DeviceTensor {
    pub(super) at: u64,
    pub(super) _bytes: CudaSlice<u8>,
}

/// Embedding tables, in the dtype of activations, and their layer norm.
#[derive(Debug)]
pub struct Embeddings {
    pub(super) words: DeviceTensor,
    pub(super) positions: Option<DeviceTensor>,
    pub(super) types: Option<DeviceTensor>,
    pub(super) norm: Norm,
}

/// A linear layer. In encoder layers the weight is in the dtype of GEMM operands and the bias in that of activations; in the head
/// both are f32.
#[derive(Debug)]
pub struct Linear {
    pub(super) weight: DeviceTensor,
    pub(super) bias: DeviceTensor,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) role: LayerRole,
    pub(super) fp8: Option<Fp8Weight>,
}

/// Scale of a weight stored as E4M3, and the layer's gain, which bounds its outputs.
#[derive(Debug)]
pub(super) struct Fp8Weight {
    pub(super) scale: f32,
    pub(super) gain: LayerGain,
}

/// A layer norm, in f32.
#[derive(Debug)]
pub struct Norm {
    pub(super) weight: DeviceTensor,
    pub(super) bias: DeviceTensor,
    pub(super) eps: f32,
    pub(super) bound: ValueBound,
}

/// The input of a GEMM, and the factor that undoes the scales of input and weight.
pub(super) struct GemmOperand {
    pub(super) at: u64,
    pub(super) alpha: f32,
    /// Keeps an operand that was quantized for this GEMM allocated until the launch.
    pub(super) _quantized: Option<Buffer>,
}

/// Cosines and sines of a rotary position embedding, each `[positions, D / 2]`, in f32.
#[derive(Debug)]
pub struct Rotary {
    pub(super) cos: DeviceTensor,
    pub(super) sin: DeviceTensor,
}
