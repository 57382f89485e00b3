//! Measures a GPU's peak rates: operations per second of a large GEMM, and bytes per second of a copy.

use std::time::Instant;

use cudarc::driver::result;

use super::context::ExecContext;
use super::dtype::CudaDtype;
use super::fp8;
use super::gemm::{GemmEpilogue, GemmOperands, GemmShape};
use super::workspace::ALIGNMENT;
use crate::backend::{BackendError, MemoryRoofline, Roofline};

/// Rows and columns of the largest square matrices; enough to fill any GPU.
const MAX_SIDE: usize = 8192;
/// Timed copies, of half of a context's memory each.
const COPIES: usize = 10;

/// Measures the peak rates with GEMMs and copies in the context's activation memory.
pub(super) fn measure(ctx: &ExecContext, dtype: CudaDtype) -> Result<Roofline, BackendError> {
    // Attention computes in the dtype of activations; with fp8, that is f16, not the dtype of GEMMs.
    let attention_dtype = if dtype == CudaDtype::Fp8 { CudaDtype::F16 } else { dtype };
    let gemms = operations_per_second(ctx, dtype)?;
    let attention = if attention_dtype == dtype { gemms } else { operations_per_second(ctx, attention_dtype)? };

    let (base, bytes) = ctx.activation_memory();
    let half = bytes / 2 / ALIGNMENT * ALIGNMENT;
    let copy = || {
        // SAFETY: both halves belong to the context, whose stream is idle.
        unsafe { result::memcpy_dtod_async(base + half as u64, base, half, ctx.stream.cu_stream()) }
    };
    copy()?;
    ctx.stream.synchronize()?;
    let start = Instant::now();
    (0..COPIES).try_for_each(|_| copy())?;
    ctx.stream.synchronize()?;
    let memory = MemoryRoofline {
        bytes_per_second: (COPIES * 2 * half) as f64 / start.elapsed().as_secs_f64(),
        activation_bytes: dtype.bytes(),
        weight_bytes: dtype.operand_bytes(),
    };
    Ok(Roofline { gemms, attention, memory: Some(memory) })
}

/// Operations per second of the largest square GEMM that fits in the context's memory, up to `MAX_SIDE`.
fn operations_per_second(ctx: &ExecContext, dtype: CudaDtype) -> Result<f64, BackendError> {
    let (base, bytes) = ctx.activation_memory();
    let side = (bytes / 3 / dtype.bytes()).isqrt().min(MAX_SIDE) / 128 * 128;
    let random = RandomBlock::new(dtype);
    random.fill(ctx)?;
    let matrix_bytes = (side * side * dtype.bytes()) as u64;
    let (x, output) = (base + matrix_bytes, base + 2 * matrix_bytes);
    let operands = GemmOperands { x, weight: base, bias: base, residual: output, output, alpha: random.alpha };
    let shape = GemmShape { rows: side, outputs: side, inputs: side, epilogue: GemmEpilogue::Bias };
    let seconds = ctx
        .gemms
        .cublaslt_seconds(dtype, shape, operands)?
        .ok_or_else(|| BackendError::Failed("cuBLASLt supports no large square GEMM on this GPU".into()))?;
    Ok(2.0 * (side as f64).powi(3) / seconds)
}

/// Random values that resemble activations. With zeros, GEMMs would run faster, because the GPU draws less power.
pub(super) struct RandomBlock {
    bytes: Vec<u8>,
    /// The factor that undoes the values' scale in a GEMM.
    pub(super) alpha: f32,
}

impl RandomBlock {
    pub(super) fn new(dtype: CudaDtype) -> Self {
        let mut random = fastrand::Rng::with_seed(1);
        // A prime number of values, so that repetitions do not coincide with rows and every tile differs.
        let values: Vec<f32> = (0..262_139).map(|_| random.f32() - 0.5).collect();
        match dtype {
            CudaDtype::Fp8 => Self { bytes: fp8::encode(&values, 16.0), alpha: 1.0 / 256.0 },
            _ => Self { bytes: dtype.encode(&values), alpha: 1.0 },
        }
    }

    /// Fills the context's activation memory.
    pub(super) fn fill(&self, ctx: &ExecContext) -> Result<(), BackendError> {
        let (base, bytes) = ctx.activation_memory();
        for offset in (0..bytes).step_by(self.bytes.len()) {
            let part = &self.bytes[..self.bytes.len().min(bytes - offset)];
            // SAFETY: within the context's memory; the host block outlives the synchronization below.
            unsafe { result::memcpy_htod_async(base + offset as u64, part, ctx.stream.cu_stream()) }?;
        }
        Ok(ctx.stream.synchronize()?)
    }
}
