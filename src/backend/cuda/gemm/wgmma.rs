//! CublasLt by a kernel of our own, `gemm_wgmma` in `kernels.cu`: it applies what follows a product to one tile while the tensor
//! cores are at the next, and cuBLASLt has no GELU by erf at all. `gemms` takes it for the shapes where it is faster.

use std::mem::MaybeUninit;
use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg, sys as driver};

use super::cublaslt::{GemmEpilogue, GemmOperands, GemmShape};
use crate::backend::BackendError;
use crate::backend::cuda::device::Device;
use crate::backend::cuda::dtype::CudaDtype;
use crate::backend::cuda::launch::{GELU_ERF, IDENTITY};
use crate::backend::cuda::options::{CudaOptions, GemmChoice};

/// A block's tile, how deep its panels are, its threads and its shared memory: `PRODUCT_ROWS` and so on in `kernels.cu`.
const ROWS: usize = 128;
const COLUMNS: usize = 256;
const DEPTH: usize = 64;
const THREADS: u32 = 384;
const SHARED_BYTES: u32 = 3 * (128 + 256) * 128 + 2 * 64 * 512 + 8 * (2 * 3 + 2 * 2);

/// Blocks of a trial: each makes several tiles in turn.
pub(in crate::backend::cuda) const AGREEMENT_BLOCKS: u32 = 2;

/// The kernel, on one device.
#[derive(Debug, Clone)]
pub(in crate::backend::cuda) struct WgmmaGemm {
    function: CudaFunction,
    dtype: CudaDtype,
    multiprocessors: u32,
    /// Not only where it is faster.
    pub(in crate::backend::cuda) always: bool,
}

/// A matrix as the copy engine knows it.
#[repr(transparent)]
struct TensorMap(driver::CUtensorMap);

// SAFETY: 128 bytes that the driver wrote, which the kernel takes by value.
unsafe impl DeviceRepr for TensorMap {}

/// The driver's word for what it did not begin is none for a lost device.
fn refusal(error: DriverError) -> BackendError {
    use driver::CUresult::{CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, CUDA_ERROR_NOT_SUPPORTED};
    match error.0 {
        CUDA_ERROR_INVALID_VALUE | CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES | CUDA_ERROR_NOT_SUPPORTED => {
            BackendError::Failed(Box::new(error))
        }
        _ => error.into(),
    }
}

impl WgmmaGemm {
    /// The kernel, if the device has it and the options allow it. It sums in another order than cuBLASLt's algorithms for other row
    /// counts, so the batch-invariant mode leaves it out.
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

    /// Whether the kernel is made for gemms of this shape.
    pub(in crate::backend::cuda) fn takes(shape: GemmShape) -> bool {
        let GemmShape { rows, outputs, inputs, epilogue } = shape;
        matches!(epilogue, GemmEpilogue::Bias | GemmEpilogue::BiasResidual | GemmEpilogue::BiasGelu)
            && rows.is_multiple_of(ROWS)
            && outputs.is_multiple_of(COLUMNS)
            && inputs.is_multiple_of(DEPTH)
    }

    /// Launches the product, of a shape that it takes.
    pub(in crate::backend::cuda) fn launch(
        &self,
        stream: &Arc<CudaStream>,
        shape: GemmShape,
        operands: GemmOperands,
    ) -> Result<(), BackendError> {
        self.launch_on(self.multiprocessors, stream, shape, operands)
    }

    /// The same on so many blocks at most.
    ///
    /// # Errors
    /// [`BackendError::Failed`] where the driver refuses the map or the launch, which leaves the context as it was.
    pub(in crate::backend::cuda) fn launch_on(
        &self,
        blocks: u32,
        stream: &Arc<CudaStream>,
        shape: GemmShape,
        operands: GemmOperands,
    ) -> Result<(), BackendError> {
        let GemmShape { rows, outputs, inputs, epilogue } = shape;
        let x = self.map(operands.x, rows, inputs, ROWS).map_err(refusal)?;
        let weight = self.map(operands.weight, outputs, inputs, COLUMNS).map_err(refusal)?;
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
        // SAFETY: gemm_wgmma(x_map, w_map, bias, residual, out, rows, outputs, inputs, function); the operands are the shape's, as
        // for the library, and the kernel takes it.
        unsafe { launch.launch(config) }.map_err(refusal)?;
        Ok(())
    }

    /// A matrix `[rows, columns]` at `address`, in boxes of `box_rows` rows of 128 bytes.
    fn map(&self, address: u64, rows: usize, columns: usize, box_rows: usize) -> Result<TensorMap, DriverError> {
        use driver::CUtensorMapDataType as Type;
        let numbers = match self.dtype {
            CudaDtype::Bf16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let (sizes, row_bytes) = ([columns as u64, rows as u64], [(columns * self.dtype.bytes()) as u64]);
        let (box_sizes, steps) = ([DEPTH as u32, box_rows as u32], [1u32, 1]);
        let mut map = MaybeUninit::<driver::CUtensorMap>::uninit();
        // SAFETY: two sizes, one stride, two sizes of the box and two steps, as for a matrix; the driver fills the map where it
        // succeeds, and looks at nothing that lies at the address.
        unsafe {
            driver::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                numbers,
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
