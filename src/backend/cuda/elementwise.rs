//! Launches of the kernels around the GEMMs: layer norms, activations, gates, quantization to E4M3, and the classification head.

use cudarc::driver::PushKernelArg;

use super::context::{Buffer, BufferFormat, ExecContext, Rows};
use super::dtype::CudaDtype;
use super::launch::{IDENTITY, ROW_THREADS, launch, push};
use super::weights::{GemmOperand, Linear, Norm};
use super::{CudaBackend, unsupported};
use crate::backend::BackendError;

impl CudaBackend {
    /// Grid of a kernel that processes one row per warp and strides over the rows: at most 8 blocks per multiprocessor.
    pub(super) fn row_grid(&self, rows: usize) -> (usize, usize) {
        let warps = ROW_THREADS as usize / 32;
        (rows.div_ceil(warps).min(8 * self.device.multiprocessors as usize), 1)
    }

    /// Applies an elementwise function and quantizes to E4M3, for the next GEMM.
    pub(super) fn quantize(&self, ctx: &ExecContext, x: &Buffer, function: u32) -> Result<Buffer, BackendError> {
        let (Some(bound), Some(kernel)) = (x.bound, &self.device.kernels.quantize) else {
            return Err(unsupported("an fp8 GEMM of activations without a bound"));
        };
        let scale = bound.scale();
        let mut out = ctx.buffer(x.rows, x.columns, self.options.dtype, BufferFormat::E4m3 { scale })?;
        out.bound = x.bound;
        let staged = ctx.staged();
        let (count, columns, from) = (staged.count(x.rows), x.columns as u32, x.native_address()?);
        let grid = (staged.rows(x.rows) * x.columns / 8).div_ceil(256).min(16 * self.device.multiprocessors as usize);
        // SAFETY: quantize(rows, columns, function, x, out, scale).
        unsafe {
            launch(&ctx.stream, kernel, (grid, 1), 256, |arguments| {
                push(arguments, [&count]);
                arguments.arg(&columns).arg(&function);
                push(arguments, [&from, &out.at]);
                arguments.arg(&scale);
            })
        }?;
        Ok(out)
    }

    /// The layer's GEMM input: `x` itself, or for fp8 its quantized form.
    pub(super) fn gemm_input(
        &self,
        ctx: &ExecContext,
        weights: &Linear,
        x: &Buffer,
    ) -> Result<GemmOperand, BackendError> {
        let Some(fp8) = &weights.fp8 else {
            return Ok(GemmOperand { at: x.native_address()?, alpha: 1.0, _quantized: None });
        };
        let quantized = match (x.format, &x.operand) {
            (BufferFormat::E4m3 { .. }, _) | (_, Some(_)) => None,
            // `x` is an output of attention or of gather_cls, whose kernels store no quantized operand.
            _ => Some(self.quantize(ctx, x, IDENTITY)?),
        };
        let operand = quantized.as_ref().or(x.operand.as_deref()).unwrap_or(x);
        let BufferFormat::E4m3 { scale } = operand.format else { return Err(unsupported("this GEMM operand")) };
        Ok(GemmOperand { at: operand.at, alpha: 1.0 / (scale * fp8.scale), _quantized: quantized })
    }

    /// With fp8, a buffer for a norm's output as operand of the next GEMM; otherwise `None`.
    pub(super) fn operand_buffer(
        &self,
        ctx: &ExecContext,
        rows: Rows,
        norm: &Norm,
    ) -> Result<Option<Buffer>, BackendError> {
        if self.options.dtype != CudaDtype::Fp8 {
            return Ok(None);
        }
        let c = self.shape.heads * self.shape.head_size;
        let mut operand = ctx.buffer(rows, c, CudaDtype::Fp8, BufferFormat::E4m3 { scale: norm.bound.scale() })?;
        operand.bound = Some(norm.bound);
        Ok(Some(operand))
    }

    /// Applies an elementwise function in place.
    pub(super) fn activate(&self, ctx: &ExecContext, x: &Buffer, function: u32) -> Result<(), BackendError> {
        let staged = ctx.staged();
        let (count, columns) = (staged.count(x.rows), x.columns as u32);
        let grid = (staged.rows(x.rows) * x.columns / 8).div_ceil(256).min(16 * self.device.multiprocessors as usize);
        // SAFETY: activate(rows, columns, function, x).
        unsafe {
            launch(&ctx.stream, &self.device.kernels.activate, (grid, 1), 256, |arguments| {
                push(arguments, [&count]);
                arguments.arg(&columns).arg(&function);
                push(arguments, [&x.at]);
            })
        }
    }

    /// A linear layer of the classification head, in f32: either C outputs with an elementwise function, or one output.
    pub(super) fn head(
        &self,
        ctx: &ExecContext,
        weights: &Linear,
        x: &Buffer,
        function: u32,
    ) -> Result<Buffer, BackendError> {
        let c = self.shape.heads * self.shape.head_size;
        let kernels = &self.device.kernels;
        let is_dense = weights.outputs == c && weights.inputs == c && x.format == BufferFormat::Native;
        let is_out =
            weights.outputs == 1 && weights.inputs == c && x.format == BufferFormat::F32 && function == IDENTITY;
        let (kernel, outputs) = match (is_dense, is_out) {
            (true, _) => (&kernels.head_dense, c),
            (_, true) => (&kernels.head_out, 1),
            _ => return Err(unsupported("this classification head")),
        };
        let out = ctx.buffer(x.rows, outputs, self.options.dtype, BufferFormat::F32)?;
        let staged = ctx.staged();
        let count = staged.count(x.rows);
        let grid = (staged.rows(x.rows) * outputs).div_ceil(8).min(16 * self.device.multiprocessors as usize);
        // SAFETY: head_out(rows, x, weight, bias, out); the last parameter of head_dense is function.
        unsafe {
            launch(&ctx.stream, kernel, (grid, 1), ROW_THREADS, |arguments| {
                push(arguments, [&count, &x.at, &weights.weight.at, &weights.bias.at, &out.at]);
                if is_dense {
                    arguments.arg(&function);
                }
            })
        }?;
        Ok(out)
    }

    /// A norm of the classification head, in f32 and in place.
    pub(super) fn head_norm(&self, ctx: &ExecContext, weights: &Norm, x: Buffer) -> Result<Buffer, BackendError> {
        let staged = ctx.staged();
        let count = staged.count(x.rows);
        // SAFETY: head_norm(rows, x, weight, bias, eps).
        unsafe {
            let grid = self.row_grid(staged.rows(x.rows));
            launch(&ctx.stream, &self.device.kernels.head_norm, grid, ROW_THREADS, |arguments| {
                push(arguments, [&count, &x.at, &weights.weight.at, &weights.bias.at]);
                arguments.arg(&weights.eps);
            })
        }?;
        Ok(x)
    }

    /// `function(gate) * value` for rows of a gate and a value: `[rows, 2F]` to `[rows, F]`.
    pub(super) fn gate(&self, ctx: &ExecContext, x: &Buffer, function: u32) -> Result<Buffer, BackendError> {
        let columns = x.columns / 2;
        let out = ctx.buffer(x.rows, columns, self.options.dtype, BufferFormat::Native)?;
        let staged = ctx.staged();
        let (count, from, width) = (staged.count(x.rows), x.native_address()?, columns as u32);
        let grid = (staged.rows(x.rows) * columns / 8).div_ceil(256).min(16 * self.device.multiprocessors as usize);
        // SAFETY: gate(rows, columns, function, x, out).
        unsafe {
            launch(&ctx.stream, &self.device.kernels.gate, (grid, 1), 256, |arguments| {
                push(arguments, [&count]);
                arguments.arg(&width).arg(&function);
                push(arguments, [&from, &out.at]);
            })
        }?;
        Ok(out)
    }

    /// Layer norm of the rows at `from` to `out`, and with fp8 to its operand.
    pub(super) fn norm_rows(
        &self,
        ctx: &ExecContext,
        weights: &Norm,
        from: u64,
        out: &mut Buffer,
    ) -> Result<(), BackendError> {
        let staged = ctx.staged();
        let count = staged.count(out.rows);
        let operand = self.operand_buffer(ctx, out.rows, weights)?;
        let (operand_at, scale) = (operand.as_ref().map_or(0, |operand| operand.at), weights.bound.scale());
        // SAFETY: layer_norm(rows, x, weight, bias, eps, out, operand, scale); `out` may be x. The kernel writes the operand only
        // with fp8, where it is allocated.
        unsafe {
            let grid = self.row_grid(staged.rows(out.rows));
            launch(&ctx.stream, &self.device.kernels.layer_norm, grid, ROW_THREADS, |arguments| {
                push(arguments, [&count, &from, &weights.weight.at, &weights.bias.at]);
                arguments.arg(&weights.eps);
                push(arguments, [&out.at, &operand_at]);
                arguments.arg(&scale);
            })
        }?;
        out.bound = operand.as_ref().and_then(|operand| operand.bound);
        out.operand = operand.map(Box::new);
        Ok(())
    }
}
