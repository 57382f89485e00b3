//! GEMMs by cuBLASLt. Descriptors and layouts are created once per shape. The algorithm is the fastest of those that were timed at
//! start; in batch-invariant mode it is chosen without timing, because timings differ between starts.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result as lt, sys};
use cudarc::driver::{CudaSlice, CudaStream};

use super::tuning_store::{TUNED_ROWS, TuningStore};
use super::{GemmEpilogue, GemmOperands, GemmShape};
use crate::backend::BackendError;
use crate::backend::cuda::dtype::CudaDtype;
use crate::backend::cuda::launch::device_address;

/// Bytes of workspace: NVIDIA's recommendation for Hopper; other GPUs need less and get the same.
const WORKSPACE: usize = 32 << 20;
/// Algorithms requested from the heuristic per shape.
const CANDIDATES: usize = 8;
/// The row count of the heuristic query in batch-invariant mode.
const INVARIANT_ROWS: usize = 2048;
/// Alignment in bytes of a weight slice, which has some of a layer's rows (Q, or K and V). It starts at a row number divisible by
/// 8, and a row has at least 8 values of two bytes: 8 x 8 x 2 = 128. In fp8 it is 16 rows of 16 values of one byte: 256.
const WEIGHT_ALIGNMENT: u32 = 128;
/// Alignment in bytes of a bias slice.
const BIAS_ALIGNMENT: u64 = 16;

/// A cuBLASLt handle with its workspace. One per execution context, since a handle is used by one thread at a time.
#[derive(Debug)]
pub(in crate::backend::cuda) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    dtype: CudaDtype,
    stream: Arc<CudaStream>,
    workspace: CudaSlice<u8>,
    workspace_at: u64,
    tuning_store: Arc<TuningStore>,
    /// Use one algorithm for all row counts, without split-K: a row's result is then bitwise the same in any batch.
    batch_invariant: bool,
}

// SAFETY: a handle and its descriptors may be used from any thread, one at a time; `CublasLt` is not Sync.
unsafe impl Send for CublasLt {}

/// cuBLASLt descriptors of one shape, and the algorithm.
#[derive(Debug)]
pub(super) struct Plan {
    matmul: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    output: sys::cublasLtMatrixLayout_t,
    pub(super) algorithm: sys::cublasLtMatmulAlgo_t,
}

impl CublasLt {
    pub(in crate::backend::cuda) fn new(
        stream: Arc<CudaStream>,
        dtype: CudaDtype,
        tuning_store: Arc<TuningStore>,
        batch_invariant: bool,
    ) -> Result<Self, BackendError> {
        let workspace = stream.alloc_zeros::<u8>(WORKSPACE)?;
        let workspace_at = device_address(&workspace, &stream);
        let handle = lt::create_handle()?;
        Ok(Self { handle, dtype, stream, workspace, workspace_at, tuning_store, batch_invariant })
    }

    /// A plan for each algorithm that cuBLASLt's heuristic proposes, best first. Empty if it knows none for the shape.
    pub(super) fn candidate_plans(&self, dtype: CudaDtype, shape: GemmShape) -> Result<Vec<Plan>, BackendError> {
        let candidates = self.candidates(&Plan::new(dtype, shape)?).unwrap_or_default();
        let plans = candidates.into_iter().map(|algorithm| {
            let mut plan = Plan::new(dtype, shape)?;
            plan.algorithm = algorithm;
            Ok(plan)
        });
        plans.collect()
    }

    /// The plan for a shape: the tuned algorithm, or the heuristic's first. Batch-invariant: one algorithm for all row counts.
    ///
    /// # Errors
    /// cuBLASLt supports no algorithm for the shape.
    pub(super) fn plan(&self, shape: GemmShape) -> Result<Plan, BackendError> {
        let mut plan = Plan::new(self.dtype, shape)?;
        let algorithm = if self.batch_invariant {
            self.algorithm_for_all_rows(shape)?.filter(|algorithm| plan.supports(self.handle, algorithm))
        } else {
            let tuned = self.tuning_store.get(shape).map(|tuned| sys::cublasLtMatmulAlgo_t { data: tuned.algorithm });
            let tuned = tuned.filter(|algorithm| plan.supports(self.handle, algorithm));
            match tuned {
                Some(algorithm) => Some(algorithm),
                None => self.candidates(&plan)?.into_iter().next(),
            }
        };
        plan.algorithm = algorithm.ok_or(lt::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED))?;
        Ok(plan)
    }

    /// The heuristic's first algorithm that supports every tuned row count. It depends only on the library and the device, so all
    /// contexts, all GPUs of the same type and all starts use the same.
    fn algorithm_for_all_rows(&self, shape: GemmShape) -> Result<Option<sys::cublasLtMatmulAlgo_t>, BackendError> {
        let at = |rows| Plan::new(self.dtype, GemmShape { rows, ..shape });
        let plans = TUNED_ROWS.into_iter().map(at).collect::<Result<Vec<_>, _>>()?;
        let candidates = self.candidates(&at(INVARIANT_ROWS)?)?;
        Ok(candidates.into_iter().find(|algorithm| plans.iter().all(|plan| plan.supports(self.handle, algorithm))))
    }

    /// Algorithms that the heuristic proposes, best first; in batch-invariant mode only those without split-K.
    fn candidates(&self, plan: &Plan) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, BackendError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let schemes = if self.batch_invariant {
            sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE
        } else {
            sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_MASK
        } as u32;
        let preference = lt::create_matmul_pref()?;
        // SAFETY: all-zero bytes are a valid result; the library fills `count` of them. All handles are alive.
        let (outcome, results) = unsafe {
            let mut results = vec![std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>(); CANDIDATES];
            let mut count = 0;
            let prefer = || {
                prefer(preference, Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)?;
                prefer(preference, Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &WEIGHT_ALIGNMENT)?;
                prefer(preference, Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes)
            };
            let outcome = prefer().and_then(|()| {
                sys::cublasLtMatmulAlgoGetHeuristic(
                    self.handle,
                    plan.matmul,
                    plan.weight,
                    plan.x,
                    plan.output,
                    plan.output,
                    preference,
                    CANDIDATES as i32,
                    results.as_mut_ptr(),
                    &raw mut count,
                )
                .result()
            });
            lt::destroy_matmul_pref(preference).ok();
            results.truncate(count.max(0) as usize);
            (outcome, results)
        };
        outcome?;
        let usable =
            |result: &sys::cublasLtMatmulHeuristicResult_t| result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        Ok(results.into_iter().filter(usable).map(|result| result.algo).collect())
    }

    /// Launches a plan that was made for `shape`.
    pub(super) fn run(&self, plan: &Plan, shape: GemmShape, operands: GemmOperands) -> Result<(), BackendError> {
        let (one, zero) = (1f32, 0f32);
        let alpha = operands.alpha;
        let beta = if shape.epilogue == GemmEpilogue::BiasResidual { &one } else { &zero };
        let residual = if shape.epilogue == GemmEpilogue::BiasResidual { operands.residual } else { operands.output };
        // SAFETY: the addresses are of buffers in the context's memory that hold the shape's rows, and of the layer's weights,
        // which live as long as the model; the stream orders this launch after those that wrote its inputs. The pointer to the
        // bias is read before the call returns.
        unsafe {
            set(plan.matmul, sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &operands.bias)?;
            lt::matmul(
                self.handle,
                plan.matmul,
                (&raw const alpha).cast(),
                std::ptr::from_ref(beta).cast(),
                operands.weight as *const c_void,
                plan.weight,
                operands.x as *const c_void,
                plan.x,
                residual as *const c_void,
                plan.output,
                operands.output as *mut c_void,
                plan.output,
                &raw const plan.algorithm,
                self.workspace_at as *mut c_void,
                self.workspace.len(),
                self.stream.cu_stream().cast(),
            )?;
        }
        Ok(())
    }
}

/// # Safety
/// `matmul` is alive, and the attribute has type `T`.
unsafe fn set<T>(
    matmul: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<(), lt::CublasError> {
    // SAFETY: the caller's contract.
    unsafe { lt::set_matmul_desc_attribute(matmul, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// # Safety
/// `preference` is alive, and the attribute has type `T`.
unsafe fn prefer<T>(
    preference: sys::cublasLtMatmulPreference_t,
    attribute: sys::cublasLtMatmulPreferenceAttributes_t,
    value: &T,
) -> Result<(), lt::CublasError> {
    // SAFETY: the caller's contract.
    unsafe { lt::set_matmul_pref_attribute(preference, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

impl Plan {
    /// cuBLASLt is column-major: it computes W x^T, `[outputs, rows]`, which is the row-major x W^T, `[rows, outputs]`.
    fn new(dtype: CudaDtype, shape: GemmShape) -> Result<Self, BackendError> {
        use sys::cublasLtEpilogue_t as Epilogue;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        use sys::cudaDataType_t as DataType;
        // fp8 GEMMs also accumulate in f32. cuBLASLt's FAST_ACCUM mode, which keeps long sums in the tensor core's lower
        // precision, stays off, since its error was not measured.
        let (operand, result) = match dtype {
            CudaDtype::F16 => (DataType::CUDA_R_16F, DataType::CUDA_R_16F),
            CudaDtype::Bf16 => (DataType::CUDA_R_16BF, DataType::CUDA_R_16BF),
            CudaDtype::F32 => (DataType::CUDA_R_32F, DataType::CUDA_R_32F),
            CudaDtype::Fp8 => (DataType::CUDA_R_8F_E4M3, DataType::CUDA_R_16F),
        };
        let GemmShape { rows, outputs, inputs, epilogue } = shape;
        let [rows, outputs, inputs] = [rows, outputs, inputs].map(|n| n as u64);
        let matmul =
            lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)?;
        let mut plan = Self {
            matmul,
            weight: std::ptr::null_mut(),
            x: std::ptr::null_mut(),
            output: std::ptr::null_mut(),
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        plan.weight = lt::create_matrix_layout(operand, inputs, outputs, inputs as i64)?;
        plan.x = lt::create_matrix_layout(operand, inputs, rows, inputs as i64)?;
        plan.output = lt::create_matrix_layout(result, outputs, rows, outputs as i64)?;
        let epilogue = match epilogue {
            GemmEpilogue::Bias | GemmEpilogue::BiasGelu | GemmEpilogue::BiasResidual => {
                Epilogue::CUBLASLT_EPILOGUE_BIAS
            }
            GemmEpilogue::BiasGeluTanh => Epilogue::CUBLASLT_EPILOGUE_GELU_BIAS,
            GemmEpilogue::BiasRelu => Epilogue::CUBLASLT_EPILOGUE_RELU_BIAS,
        };
        // The weight is read transposed (CUBLAS_OP_T). The heuristic needs to know the bias's alignment, so a dummy address with
        // that alignment is set here; `run` sets the real one.
        let (transposed, dummy_bias) = (1i32, BIAS_ALIGNMENT);
        // SAFETY: the descriptor is alive, and each attribute has its documented type.
        unsafe {
            set(matmul, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed)?;
            set(matmul, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            set(matmul, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &dummy_bias)?;
        }
        Ok(plan)
    }

    /// Whether `algorithm` supports this shape within the workspace.
    fn supports(&self, handle: sys::cublasLtHandle_t, algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
        // SAFETY: all handles are alive; all-zero bytes are a valid result.
        unsafe {
            let mut result = std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>();
            let status = sys::cublasLtMatmulAlgoCheck(
                handle,
                self.matmul,
                self.weight,
                self.x,
                self.output,
                self.output,
                algorithm,
                &raw mut result,
            );
            status.result().is_ok() && result.workspaceSize <= WORKSPACE
        }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: created by `new`; nothing uses them after this.
        unsafe {
            for layout in [self.weight, self.x, self.output] {
                if !layout.is_null() {
                    lt::destroy_matrix_layout(layout).ok();
                }
            }
            lt::destroy_matmul_desc(self.matmul).ok();
        }
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.stream.synchronize().ok();
        // SAFETY: created by `new`; no launch on the stream still uses it.
        unsafe { lt::destroy_handle(self.handle).ok() };
    }
}
