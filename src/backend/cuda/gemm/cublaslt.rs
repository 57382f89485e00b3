//! Matrix gemms by cuBLASLt, with everything that can be decided before a batch decided before it: descriptors and layouts are
//! made once for each shape, and the algorithm is the fastest of those that were timed at start; or, in the invariant mode, one
//! for all row counts that is not timed, since a clock decides otherwise on another day.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result as lt, sys};
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaSlice, CudaStream, result};

use super::tuning_store::{TUNED_ROWS, TunedGemm, TuningStore};
use super::wgmma::{self, WgmmaGemm};
use crate::backend::BackendError;
use crate::backend::cuda::cross_check::{bound as agreement_bound, worst_row};
use crate::backend::cuda::device;
use crate::backend::cuda::dtype::CudaDtype;

/// What NVIDIA recommends for Hopper; smaller cards use less of it.
const WORKSPACE: usize = 32 << 20;
/// Algorithms of a shape that are timed against each other.
const CANDIDATES: usize = 8;
/// Rounds of such a measure, and runs of a round, after as many that are not counted.
const ROUNDS: usize = 4;
const RUNS: u32 = 4;
/// Rows of which our own kernel and the library must make the same, two of its tiles, and columns that are compared at a time, so that
/// a single wrong value weighs.
const AGREEMENT_ROWS: usize = 256;
const AGREEMENT_COLUMNS: usize = 64;
/// The row count that the invariant mode asks the library about.
const INVARIANT_ROWS: usize = 2048;
/// What a slice of weights that starts at a multiple of 8 outputs is aligned to, of 8 inputs or more and of two bytes; E4M3 has
/// multiples of 16.
const WEIGHT_ALIGNMENT: u32 = 128;
/// And a slice of their bias.
const BIAS_ALIGNMENT: u64 = 16;

/// What a product's result goes through, as cuBLASLt has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::backend::cuda) enum GemmEpilogue {
    Bias,
    /// The bias, and GELU by erf, which the library leaves to a kernel after it.
    BiasGelu,
    BiasGeluTanh,
    BiasRelu,
    /// The bias, and what the result's place, or another, held before.
    BiasResidual,
}

/// The shape of a product `x W^T`: x is `[rows, inputs]`, W `[outputs, inputs]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::backend::cuda) struct GemmShape {
    pub(in crate::backend::cuda) rows: usize,
    pub(in crate::backend::cuda) outputs: usize,
    pub(in crate::backend::cuda) inputs: usize,
    pub(in crate::backend::cuda) epilogue: GemmEpilogue,
}

/// Where a product's operands lie on the device.
#[derive(Debug, Clone, Copy)]
pub(in crate::backend::cuda) struct GemmOperands {
    pub(in crate::backend::cuda) x: u64,
    pub(in crate::backend::cuda) weight: u64,
    pub(in crate::backend::cuda) bias: u64,
    /// Read by [`GemmEpilogue::BiasResidual`]; the output elsewhere.
    pub(in crate::backend::cuda) residual: u64,
    pub(in crate::backend::cuda) output: u64,
    /// What the product is multiplied by before all else: the inverse of its operands' scales.
    pub(in crate::backend::cuda) alpha: f32,
}

/// One ctx's gemms: handles are not shared between threads.
#[derive(Debug)]
pub(in crate::backend::cuda) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    dtype: CudaDtype,
    stream: Arc<CudaStream>,
    workspace: CudaSlice<u8>,
    workspace_at: u64,
    tuning_store: Arc<TuningStore>,
    /// One algorithm for all row counts, without sums that are split: the same bits for a row whatever is beside it.
    invariant: bool,
    own: Option<WgmmaGemm>,
    plans: RefCell<HashMap<GemmShape, GemmKernel>>,
}

/// How gemms of one shape are computed.
#[derive(Debug)]
enum GemmKernel {
    Library(Plan),
    Ours(WgmmaGemm),
}

// SAFETY: a handle and its descriptors may be used by any thread, by one at a time; `CublasLt` is not Sync.
unsafe impl Send for CublasLt {}

/// Descriptors of one shape, and the algorithm.
#[derive(Debug)]
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    output: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// x Phi(x) of each value, on the processor.
fn gelu_erf(values: Vec<f32>) -> Result<Vec<f32>, BackendError> {
    let applied = candle_core::Tensor::new(values, &candle_core::Device::Cpu)
        .and_then(|values| values.gelu_erf())
        .and_then(|values| values.to_vec1());
    applied.map_err(|error| BackendError::Failed(Box::new(error)))
}

/// Which contender of a measure took least, of those that ran.
fn least(seconds: &[f64]) -> Option<usize> {
    (0..seconds.len()).filter(|&i| seconds[i].is_finite()).min_by(|&i, &j| seconds[i].total_cmp(&seconds[j]))
}

impl CublasLt {
    pub(in crate::backend::cuda) fn new(
        stream: Arc<CudaStream>,
        dtype: CudaDtype,
        tuning_store: Arc<TuningStore>,
        invariant: bool,
        own: Option<WgmmaGemm>,
    ) -> Result<Self, BackendError> {
        let workspace = stream.alloc_zeros::<u8>(WORKSPACE)?;
        let workspace_at = crate::backend::cuda::launch::device_address(&workspace, &stream);
        let handle = lt::create_handle()?;
        Ok(Self {
            handle,
            dtype,
            stream,
            workspace,
            workspace_at,
            tuning_store,
            invariant,
            own,
            plans: RefCell::default(),
        })
    }

    /// Launches the product on the ctx's stream, and says whether GELU by erf is applied where the shape has it.
    pub(in crate::backend::cuda) fn launch(
        &self,
        shape: GemmShape,
        operands: GemmOperands,
    ) -> Result<bool, BackendError> {
        let mut plans = self.plans.borrow_mut();
        let way = match plans.entry(shape) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(self.way(shape)?),
        };
        match way {
            GemmKernel::Library(plan) => self.run(plan, shape, operands)?,
            GemmKernel::Ours(own) => {
                own.launch(&self.stream, shape, operands)?;
                return Ok(shape.epilogue == GemmEpilogue::BiasGelu);
            }
        }
        Ok(false)
    }

    fn way(&self, shape: GemmShape) -> Result<GemmKernel, BackendError> {
        let own = self.own.as_ref().filter(|_| WgmmaGemm::takes(shape));
        match own.filter(|_| self.tuning_store.get(shape).is_some_and(|choice| choice.ours)) {
            Some(own) => Ok(GemmKernel::Ours(own.clone())),
            None => Ok(GemmKernel::Library(self.plan(shape)?)),
        }
    }

    /// Outputs, inputs and epilogue of each product launched so far.
    pub(in crate::backend::cuda) fn launched(&self) -> BTreeSet<(usize, usize, GemmEpilogue)> {
        self.plans.borrow().keys().map(|shape| (shape.outputs, shape.inputs, shape.epilogue)).collect()
    }

    /// Keeps what was tuned for the next start.
    pub(in crate::backend::cuda) fn keep_tuning(&self) {
        self.tuning_store.keep();
    }

    /// Has the next launch of each shape look again for what was tuned.
    pub(in crate::backend::cuda) fn forget_plans(&self) {
        self.plans.borrow_mut().clear();
    }

    /// Times the library's best candidates_for at each tuned row count up to `max_rows`, and our own kernel where it matches_library with them, and
    /// remembers the fastest. The operands must have room for `max_rows` rows.
    pub(in crate::backend::cuda) fn tune(
        &self,
        shape: GemmShape,
        max_rows: usize,
        operands: GemmOperands,
    ) -> Result<bool, BackendError> {
        let mut news = false;
        let mut matches_library = None;
        for rows in TUNED_ROWS {
            let shape = GemmShape { rows, ..shape };
            if rows > max_rows || self.tuning_store.get(shape).is_some() {
                continue;
            }
            let mut own = self.own.as_ref().filter(|_| WgmmaGemm::takes(shape));
            if let Some(kernel) = own {
                let matches_library = match matches_library {
                    Some(matches_library) => matches_library,
                    None => *matches_library.insert(self.matches_library(kernel, shape, max_rows, operands)?),
                };
                own = own.filter(|_| matches_library);
            }
            let candidates_for = self.candidates_for(self.dtype, shape)?;
            let run = |i: usize| match (candidates_for.get(i), own) {
                (None, Some(own)) => own.launch(&self.stream, shape, operands),
                _ => self.run(&candidates_for[i], shape, operands),
            };
            let seconds = self.measure(candidates_for.len() + usize::from(own.is_some()), run)?;
            let Some(best) = least(&seconds[..candidates_for.len()]) else { continue };
            // The library's is followed by a kernel that reads and writes all of it.
            let ours = match own {
                Some(own) if !own.always => {
                    let gelu = shape.epilogue == GemmEpilogue::BiasGelu;
                    let after = if gelu { self.time_of_a_pass(shape, operands)? } else { 0.0 };
                    seconds[candidates_for.len()] < seconds[best] + after
                }
                own => own.is_some(),
            };
            self.tuning_store.put(shape, TunedGemm { algorithm: candidates_for[best].algorithm.data, ours });
            news = true;
        }
        Ok(news)
    }

    /// Seconds of the fastest of the library's candidates_for for a product of this dtype, or `None` where it knows nothing for the shape.
    pub(in crate::backend::cuda) fn fastest(
        &self,
        dtype: CudaDtype,
        shape: GemmShape,
        operands: GemmOperands,
    ) -> Result<Option<f64>, BackendError> {
        let candidates_for = self.candidates_for(dtype, shape)?;
        let seconds = self.measure(candidates_for.len(), |i| self.run(&candidates_for[i], shape, operands))?;
        Ok(least(&seconds).map(|best| seconds[best]))
    }

    /// A plan for each of the library's candidates_for.
    fn candidates_for(&self, dtype: CudaDtype, shape: GemmShape) -> Result<Vec<Plan>, BackendError> {
        let candidates = self.candidates(&Plan::new(dtype, shape)?).unwrap_or_default();
        let planned = candidates.into_iter().map(|algorithm| {
            let mut plan = Plan::new(dtype, shape)?;
            plan.algorithm = algorithm;
            Ok(plan)
        });
        planned.collect()
    }

    /// Seconds of a run of each contender, by the device's clock, or infinity where it does not run after all. They take turns, and the
    /// least of a contender's rounds counts: a device that was idle is slow at first, and what disturbs a round only slows it. Runs that
    /// are not counted keep the device behind the host, whose launches are not to be timed.
    fn measure(
        &self,
        candidates: usize,
        run: impl Fn(usize) -> Result<(), BackendError>,
    ) -> Result<Vec<f64>, BackendError> {
        let mut seconds = vec![f64::INFINITY; candidates];
        let mut failed = vec![false; candidates];
        for _ in 0..ROUNDS {
            for i in 0..candidates {
                if failed[i] {
                    continue;
                }
                match run(i) {
                    Ok(()) => {}
                    Err(BackendError::Failed(_)) => {
                        failed[i] = true;
                        continue;
                    }
                    Err(error) => return Err(error),
                }
                (1..RUNS).try_for_each(|_| run(i))?;
                let record_event = || self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
                let begun = record_event()?;
                (0..RUNS).try_for_each(|_| run(i))?;
                let ended = record_event()?;
                ended.synchronize()?;
                seconds[i] = seconds[i].min(device::seconds_between(&begun, &ended)? / f64::from(RUNS));
            }
        }
        Ok(seconds)
    }

    /// Seconds of reading all of the product's output and writing it again: twice those of copying its first half to its second.
    fn time_of_a_pass(&self, shape: GemmShape, operands: GemmOperands) -> Result<f64, BackendError> {
        let half = shape.rows * shape.outputs * self.dtype.bytes() / 2;
        // SAFETY: both are the output's, apart from each other; the stream orders them.
        let copy = |_| unsafe {
            result::memcpy_dtod_async(operands.output + half as u64, operands.output, half, self.stream.cu_stream())
                .map_err(BackendError::from)
        };
        Ok(2.0 * self.measure(1, copy)?[0])
    }

    /// Whether our own kernel computes what the library does, on the numbers that are there and with several tiles a block, and
    /// tells where it does not. The library's GELU is the processor's here.
    fn matches_library(
        &self,
        own: &WgmmaGemm,
        shape: GemmShape,
        max_rows: usize,
        operands: GemmOperands,
    ) -> Result<bool, BackendError> {
        let rows = AGREEMENT_ROWS.min(max_rows).min(shape.inputs) / 128 * 128;
        let shape = GemmShape { rows, ..shape };
        if rows == 0 || !WgmmaGemm::takes(shape) {
            return Ok(false);
        }
        // A residual that stays what it is: the weight's first values, `inputs` rows of `outputs` of which `rows` are as many at most.
        let operands = GemmOperands { residual: operands.weight, ..operands };
        let output = || -> Result<Vec<f32>, BackendError> {
            let mut bytes = vec![0u8; shape.rows * shape.outputs * self.dtype.bytes()];
            // SAFETY: the output has so many bytes, and the host's block lives until the stream has been waited for.
            unsafe { result::memcpy_dtoh_async(&mut bytes, operands.output, self.stream.cu_stream()) }?;
            self.stream.synchronize()?;
            Ok(self.dtype.decode(&bytes))
        };
        self.run(&self.plan(shape)?, shape, operands)?;
        let mut expected = output()?;
        if shape.epilogue == GemmEpilogue::BiasGelu {
            expected = gelu_erf(expected)?;
        }
        let error = match own.launch_on(wgmma::AGREEMENT_BLOCKS, &self.stream, shape, operands).and_then(|()| output())
        {
            Ok(got) => worst_row(&expected, &got, AGREEMENT_COLUMNS),
            Err(BackendError::Failed(error)) => {
                tracing::warn!(%error, "the product kernel for Hopper does not run here and is left alone; please report it");
                f32::NAN
            }
            Err(error) => {
                tracing::error!(
                    "the product kernel for Hopper does not run; RERANKD_CUDA_PRODUCTS=library leaves it out"
                );
                return Err(error);
            }
        };
        let matches_library = error <= agreement_bound(self.dtype);
        if !matches_library {
            self.tuning_store.do_not_keep();
            tracing::warn!(
                ?shape,
                error,
                "the product kernel for Hopper gives other results than the library on this device and is left alone; please report it"
            );
        }
        Ok(matches_library)
    }

    fn plan(&self, shape: GemmShape) -> Result<Plan, BackendError> {
        let mut plan = Plan::new(self.dtype, shape)?;
        let algorithm = if self.invariant {
            self.for_all_rows(shape)?.filter(|algorithm| plan.runs(self.handle, algorithm))
        } else {
            let tuned = self.tuning_store.get(shape).map(|choice| sys::cublasLtMatmulAlgo_t { data: choice.algorithm });
            let tuned = tuned.filter(|algorithm| plan.runs(self.handle, algorithm));
            match tuned {
                Some(algorithm) => Some(algorithm),
                None => self.candidates(&plan)?.into_iter().next(),
            }
        };
        plan.algorithm = algorithm.ok_or(lt::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED))?;
        Ok(plan)
    }

    /// The library's first guess that runs at every row count. It depends on nothing but the library and the device, so all contexts,
    /// all cards of a kind and all starts have the same.
    fn for_all_rows(&self, shape: GemmShape) -> Result<Option<sys::cublasLtMatmulAlgo_t>, BackendError> {
        let at = |rows| Plan::new(self.dtype, GemmShape { rows, ..shape });
        let plans = TUNED_ROWS.into_iter().map(at).collect::<Result<Vec<_>, _>>()?;
        let candidates = self.candidates(&at(INVARIANT_ROWS)?)?;
        Ok(candidates.into_iter().find(|algorithm| plans.iter().all(|plan| plan.runs(self.handle, algorithm))))
    }

    /// The library's candidates_for at what is fastest, best first; in the invariant mode of those alone that sum in one piece.
    fn candidates(&self, plan: &Plan) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, BackendError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let schemes = if self.invariant {
            sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE
        } else {
            sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_MASK
        } as u32;
        let preference = lt::create_matmul_pref()?;
        // SAFETY: a result of zeros is a valid one; the library fills those that it counts. All handles are alive.
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
                    plan.product,
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

    fn run(&self, plan: &Plan, shape: GemmShape, operands: GemmOperands) -> Result<(), BackendError> {
        let (one, zero) = (1f32, 0f32);
        let alpha = operands.alpha;
        let beta = if shape.epilogue == GemmEpilogue::BiasResidual { &one } else { &zero };
        let residual = if shape.epilogue == GemmEpilogue::BiasResidual { operands.residual } else { operands.output };
        // SAFETY: the addresses are of buffers in the ctx's memory that hold the shape's rows, and of the layer's weights, which
        // live as long as the model; the stream orders this launch after those that wrote them. The pointer to the bias is
        // read before the call returns.
        unsafe {
            set(plan.product, sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &operands.bias)?;
            lt::matmul(
                self.handle,
                plan.product,
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
/// `product` is alive, and the attribute is of the type `T`.
unsafe fn set<T>(
    product: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<(), lt::CublasError> {
    // SAFETY: as the caller's.
    unsafe { lt::set_matmul_desc_attribute(product, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// # Safety
/// `preference` is alive, and the attribute is of the type `T`.
unsafe fn prefer<T>(
    preference: sys::cublasLtMatmulPreference_t,
    attribute: sys::cublasLtMatmulPreferenceAttributes_t,
    value: &T,
) -> Result<(), lt::CublasError> {
    // SAFETY: as the caller's.
    unsafe { lt::set_matmul_pref_attribute(preference, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

impl Plan {
    /// cuBLASLt is column-major: what it sees as W^T x^T, `[outputs, rows]`, is our `[rows, outputs]`.
    fn new(dtype: CudaDtype, shape: GemmShape) -> Result<Self, BackendError> {
        use sys::cublasLtEpilogue_t as Epilogue;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        use sys::cudaDataType_t as Numbers;
        // Sums of E4M3 are of f32, as the others are: cuBLASLt's faster mode (FAST_ACCUM), which leaves long ones in the tensor
        // core's fewer bits, stays off, since its error was not measured.
        let (multiplied, stored) = match dtype {
            CudaDtype::F16 => (Numbers::CUDA_R_16F, Numbers::CUDA_R_16F),
            CudaDtype::Bf16 => (Numbers::CUDA_R_16BF, Numbers::CUDA_R_16BF),
            CudaDtype::F32 => (Numbers::CUDA_R_32F, Numbers::CUDA_R_32F),
            CudaDtype::Fp8 => (Numbers::CUDA_R_8F_E4M3, Numbers::CUDA_R_16F),
        };
        let GemmShape { rows, outputs, inputs, epilogue } = shape;
        let [rows, outputs, inputs] = [rows, outputs, inputs].map(|n| n as u64);
        let product =
            lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)?;
        let mut plan = Self {
            product,
            weight: std::ptr::null_mut(),
            x: std::ptr::null_mut(),
            output: std::ptr::null_mut(),
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        plan.weight = lt::create_matrix_layout(multiplied, inputs, outputs, inputs as i64)?;
        plan.x = lt::create_matrix_layout(multiplied, inputs, rows, inputs as i64)?;
        plan.output = lt::create_matrix_layout(stored, outputs, rows, outputs as i64)?;
        let epilogue = match epilogue {
            GemmEpilogue::Bias | GemmEpilogue::BiasGelu | GemmEpilogue::BiasResidual => {
                Epilogue::CUBLASLT_EPILOGUE_BIAS
            }
            GemmEpilogue::BiasGeluTanh => Epilogue::CUBLASLT_EPILOGUE_GELU_BIAS,
            GemmEpilogue::BiasRelu => Epilogue::CUBLASLT_EPILOGUE_RELU_BIAS,
        };
        // The weight is read as its transpose (CUBLAS_OP_T). The heuristic wants to know that there is a bias, and how it is
        // aligned, not yet which; its address is set before each run.
        let (transposed, some) = (1i32, BIAS_ALIGNMENT);
        // SAFETY: the descriptor is alive, and each attribute has the type that its documentation gives it.
        unsafe {
            set(product, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed)?;
            set(product, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            set(product, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &some)?;
        }
        Ok(plan)
    }

    /// Whether the library runs `algorithm` on this shape within the workspace.
    fn runs(&self, handle: sys::cublasLtHandle_t, algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
        // SAFETY: all handles are alive; a result of zeros is a valid one.
        unsafe {
            let mut result = std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>();
            let status = sys::cublasLtMatmulAlgoCheck(
                handle,
                self.product,
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
        // SAFETY: made by `new`, and used by nothing after this.
        unsafe {
            for layout in [self.weight, self.x, self.output] {
                if !layout.is_null() {
                    lt::destroy_matrix_layout(layout).ok();
                }
            }
            lt::destroy_matmul_desc(self.product).ok();
        }
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.plans.borrow_mut().clear();
        self.stream.synchronize().ok();
        // SAFETY: made by `new`; the stream has nothing left that uses it.
        unsafe { lt::destroy_handle(self.handle).ok() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_of_those_that_ran_wins() {
        assert_eq!(least(&[3.0, f64::INFINITY, 1.0, 2.0]), Some(2));
        assert_eq!(least(&[f64::INFINITY]), None);
    }
}
