//! Launches the custom GEMM kernel for Hopper, `gemm_wgmma` (kernels/gemm_wgmma.cuh). It overlaps the epilogue of one tile with the
//! tensor-core work of the next, and has an erf GELU epilogue, which cuBLASLt lacks.

use std::mem::MaybeUninit;
use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg, sys as driver};

use super::{GemmEpilogue, GemmOperands, GemmShape};
use crate::backend::BackendError;
use crate::backend::cuda::device::Device;
use crate::backend::cuda::dtype::CudaDtype;
use crate::backend::cuda::launch::{GELU_ERF, IDENTITY};
use crate::backend::cuda::options::{CudaOptions, GemmChoice};

/// These equal the kernel's `GEMM_TILE_ROWS`, `GEMM_TILE_COLUMNS`, `GEMM_TILE_DEPTH`, `GEMM_THREADS` and `GEMM_SHARED_BYTES`.
const ROWS: usize = 128;
const COLUMNS: usize = 256;
const DEPTH: usize = 64;
const THREADS: u32 = 384;
const SHARED_BYTES: u32 = 3 * (128 + 256) * 128 + 2 * 64 * 512 + 8 * (2 * 3 + 2 * 2);

/// Grid size of the cross-check: few blocks, so that each computes several tiles.
pub(in crate::backend::cuda) const CHECKED_BLOCKS: u32 = 2;

/// The kernel on one device.
#[derive(Debug, Clone)]
pub(in crate::backend::cuda) struct WgmmaGemm {
    function: CudaFunction,
    dtype: CudaDtype,
    multiprocessors: u32,
    /// Use it for every supported shape, not only where it is faster.
    pub(in crate::backend::cuda) always: bool,
}

/// A TMA descriptor.
#[repr(transparent)]
struct TensorMap(driver::CUtensorMap);

// SAFETY: 128 bytes written by the driver, which the kernel takes by value.
unsafe impl DeviceRepr for TensorMap {}

/// Maps launch errors. The device is not lost if the driver rejected the launch before starting it.
fn launch_error(error: DriverError) -> BackendError {
    use driver::CUresult::{CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, CUDA_ERROR_NOT_SUPPORTED};
    match error.0 {
        CUDA_ERROR_INVALID_VALUE | CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES | CUDA_ERROR_NOT_SUPPORTED => {
            BackendError::Failed(Box::new(error))
        }
        _ => error.into(),
    }
}

impl WgmmaGemm {
    /// The kernel, if the device has it and the options allow it. Batch-invariant mode excludes it: other row counts run on
    /// cuBLASLt, which sums in another order.
    pub(in crate::backend::cuda) fn of(device: &Device, options: &CudaOptions) -> Option<Self> {
        use driver::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED_SIZE;
        let function = device.kernels.gemm_wgmma.clone()?;
        if options.gemm == GemmChoice::CublasLt || options.batch_invariant {
            return None;
        }
        function.set_attribute(SHARED_SIZE, SHARED_BYTES as i32).ok()?;
        let (multiprocessors, always) = (device.multiprocessors, options.gemm == GemmChoice::Custom);
        Some(Self { function, dtype: options.dtype, multiprocessors, always })
    }

    pub(in crate::backend::cuda) fn supports(shape: GemmShape) -> bool {
        let GemmShape { rows, outputs, inputs, epilogue } = shape;
        matches!(epilogue, GemmEpilogue::Bias | GemmEpilogue::BiasResidual | GemmEpilogue::BiasGelu)
            && rows.is_multiple_of(ROWS)
            && outputs.is_multiple_of(COLUMNS)
            && inputs.is_multiple_of(DEPTH)
    }

    /// Launches a GEMM of a supported shape.
    pub(in crate::backend::cuda) fn launch(
        &self,
        stream: &Arc<CudaStream>,
        shape: GemmShape,
        operands: GemmOperands,
    ) -> Result<(), BackendError> {
        self.launch_on(self.multiprocessors, stream, shape, operands)
    }

    /// [`Self::launch`] with at most `blocks` blocks.
    ///
    /// # Errors
    /// [`BackendError::Failed`] if the driver rejects the descriptor or the launch; the context stays usable.
    pub(in crate::backend::cuda) fn launch_on(
        &self,
        blocks: u32,
        stream: &Arc<CudaStream>,
        shape: GemmShape,
        operands: GemmOperands,
    ) -> Result<(), BackendError> {
        let GemmShape { rows, outputs, inputs, epilogue } = shape;
        let x = self.tensor_map(operands.x, rows, inputs, ROWS).map_err(launch_error)?;
        let weight = self.tensor_map(operands.weight, outputs, inputs, COLUMNS).map_err(launch_error)?;
        let residual = if epilogue == GemmEpilogue::BiasResidual { operands.residual } else { 0 };
        let function = if epilogue == GemmEpilogue::BiasGelu { GELU_ERF } else { IDENTITY };
        let [rows_in, outputs_in, inputs_in] = [rows, outputs, inputs].map(|n| n as u32);
        let tiles = (rows / ROWS * (outputs / COLUMNS)) as u32;
        let config = LaunchConfig {
            grid_dim: (tiles.min(blocks), 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: SHARED_BYTES,
        };
        let mut launch = stream.launch_builder(&self.function);
        launch.arg(&x).arg(&weight).arg(&operands.bias).arg(&residual).arg(&operands.output);
        launch.arg(&rows_in).arg(&outputs_in).arg(&inputs_in).arg(&function);
        // SAFETY: the signature is gemm_wgmma(x_map, w_map, bias, residual, out, rows, outputs, inputs, function); the operands have
        // the shape's sizes, and the shape is supported.
        unsafe { launch.launch(config) }.map_err(launch_error)?;
        Ok(())
    }

    /// The TMA descriptor of a matrix `[rows, columns]` at `address`, with boxes of `box_rows` rows of 128 bytes.
    fn tensor_map(&self, address: u64, rows: usize, columns: usize, box_rows: usize) -> Result<TensorMap, DriverError> {
        use driver::CUtensorMapDataType as Type;
        let data_type = match self.dtype {
            CudaDtype::Bf16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let (sizes, row_bytes) = ([columns as u64, rows as u64], [(columns * self.dtype.bytes()) as u64]);
        let (box_sizes, steps) = ([DEPTH as u32, box_rows as u32], [1u32, 1]);
        let mut map = MaybeUninit::<driver::CUtensorMap>::uninit();
        // SAFETY: a 2D map has two sizes, one stride, two box sizes and two steps; on success the driver has initialized `map`. The
        // call does not access memory at `address`.
        unsafe {
            driver::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                data_type,
                2,
                address as *mut _,
                sizes.as_ptr(),
                row_bytes.as_ptr(),
                box_sizes.as_ptr(),
                steps.as_ptr(),
                driver::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                driver::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                driver::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                driver::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()?;
            Ok(TensorMap(map.assume_init()))
        }
    }
}
