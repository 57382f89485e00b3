//! Selects and launches a kernel for each GEMM shape. Autotuning times cuBLASLt's candidate algorithms and the custom wgmma kernel at
//! start; the custom kernel must first pass a numerical cross-check against cuBLASLt.

use std::cell::RefCell;
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaStream, result};

use super::cublaslt::{CublasLt, Plan};
use super::tuning_store::{TUNED_ROWS, TunedGemm, TuningStore};
use super::wgmma::{self, WgmmaGemm};
use super::{GemmEpilogue, GemmOperands, GemmShape};
use crate::backend::BackendError;
use crate::backend::candle::gelu_erf;
use crate::backend::cuda::cross_check::{bound, worst_row};
use crate::backend::cuda::device;
use crate::backend::cuda::dtype::CudaDtype;

/// Rounds of a measurement, and timed runs per round. Each round first does the same number of untimed runs.
const ROUNDS: usize = 4;
const RUNS: u32 = 4;
/// Maximum rows of the cross-check: those of two tiles of the custom kernel.
const CHECKED_ROWS: usize = 256;
/// Columns per compared row segment: few enough that a single wrong value exceeds the error bound.
const CHECKED_COLUMNS: usize = 64;

/// The GEMMs of one execution context.
#[derive(Debug)]
pub(in crate::backend::cuda) struct Gemms {
    /// First, so that plans are dropped before the cuBLASLt handle.
    selected: RefCell<HashMap<GemmShape, GemmKernel>>,
    cublaslt: CublasLt,
    custom: Option<WgmmaGemm>,
    dtype: CudaDtype,
    stream: Arc<CudaStream>,
    tuning_store: Arc<TuningStore>,
}

/// The kernel for GEMMs of one shape.
#[derive(Debug)]
enum GemmKernel {
    CublasLt(Plan),
    Custom(WgmmaGemm),
}

impl Gemms {
    pub(in crate::backend::cuda) fn new(
        stream: Arc<CudaStream>,
        dtype: CudaDtype,
        tuning_store: Arc<TuningStore>,
        batch_invariant: bool,
        custom: Option<WgmmaGemm>,
    ) -> Result<Self, BackendError> {
        let cublaslt = CublasLt::new(Arc::clone(&stream), dtype, Arc::clone(&tuning_store), batch_invariant)?;
        Ok(Self { cublaslt, custom, dtype, stream, tuning_store, selected: RefCell::default() })
    }

    /// Launches a GEMM. Returns whether the kernel applied the erf GELU of [`GemmEpilogue::BiasGelu`]; if not, the caller must.
    pub(in crate::backend::cuda) fn launch(
        &self,
        shape: GemmShape,
        operands: GemmOperands,
    ) -> Result<bool, BackendError> {
        let mut selected = self.selected.borrow_mut();
        let kernel = match selected.entry(shape) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(self.select(shape)?),
        };
        match kernel {
            GemmKernel::CublasLt(plan) => self.cublaslt.run(plan, shape, operands)?,
            GemmKernel::Custom(custom) => {
                custom.launch(&self.stream, shape, operands)?;
                return Ok(shape.epilogue == GemmEpilogue::BiasGelu);
            }
        }
        Ok(false)
    }

    fn select(&self, shape: GemmShape) -> Result<GemmKernel, BackendError> {
        let custom = self.custom_for(shape).filter(|_| self.tuning_store.get(shape).is_some_and(|tuned| tuned.custom));
        match custom {
            Some(custom) => Ok(GemmKernel::Custom(custom.clone())),
            None => Ok(GemmKernel::CublasLt(self.cublaslt.plan(shape)?)),
        }
    }

    fn custom_for(&self, shape: GemmShape) -> Option<&WgmmaGemm> {
        self.custom.as_ref().filter(|_| WgmmaGemm::supports(shape))
    }

    /// Outputs, inputs and epilogue of every GEMM launched so far.
    pub(in crate::backend::cuda) fn launched(&self) -> BTreeSet<(usize, usize, GemmEpilogue)> {
        self.selected.borrow().keys().map(|shape| (shape.outputs, shape.inputs, shape.epilogue)).collect()
    }

    /// Writes tuning results to the cache.
    pub(in crate::backend::cuda) fn save_tuning(&self) {
        self.tuning_store.save();
    }

    /// Makes the next launch of each shape look up the tuning results again.
    pub(in crate::backend::cuda) fn forget_selected(&self) {
        self.selected.borrow_mut().clear();
    }

    /// Tunes a GEMM at each tuned row count up to `max_rows` that has no result yet, and stores the fastest kernel. The operands must
    /// have room for `max_rows` rows. Returns whether anything was measured.
    pub(in crate::backend::cuda) fn tune(
        &self,
        shape: GemmShape,
        max_rows: usize,
        operands: GemmOperands,
    ) -> Result<bool, BackendError> {
        let mut measured = false;
        let mut check_passed = None;
        for rows in TUNED_ROWS {
            let shape = GemmShape { rows, ..shape };
            if rows > max_rows || self.tuning_store.get(shape).is_some() {
                continue;
            }
            let mut custom = self.custom_for(shape);
            if let Some(kernel) = custom {
                let passed = match check_passed {
                    Some(passed) => passed,
                    None => *check_passed.insert(self.cross_check(kernel, shape, max_rows, operands)?),
                };
                custom = custom.filter(|_| passed);
            }
            let plans = self.cublaslt.candidate_plans(self.dtype, shape)?;
            let run = |i: usize| match (plans.get(i), custom) {
                (None, Some(custom)) => custom.launch(&self.stream, shape, operands),
                _ => self.cublaslt.run(&plans[i], shape, operands),
            };
            let seconds = self.measure(plans.len() + usize::from(custom.is_some()), run)?;
            let (cublaslt_seconds, custom_seconds) = seconds.split_at(plans.len());
            let Some(best) = fastest_index(cublaslt_seconds) else { continue };
            let choose_custom = match custom {
                Some(custom) => {
                    let gelu = shape.epilogue == GemmEpilogue::BiasGelu && !custom.always;
                    let gelu_seconds = if gelu { self.elementwise_seconds(shape, operands)? } else { 0.0 };
                    chooses_custom(custom.always, custom_seconds[0], cublaslt_seconds[best], gelu_seconds)
                }
                None => false,
            };
            self.tuning_store.put(shape, TunedGemm { algorithm: plans[best].algorithm.data, custom: choose_custom });
            measured = true;
        }
        Ok(measured)
    }

    /// Seconds of cuBLASLt's fastest algorithm for a GEMM of this dtype, or `None` if it supports none.
    pub(in crate::backend::cuda) fn cublaslt_seconds(
        &self,
        dtype: CudaDtype,
        shape: GemmShape,
        operands: GemmOperands,
    ) -> Result<Option<f64>, BackendError> {
        let plans = self.cublaslt.candidate_plans(dtype, shape)?;
        let seconds = self.measure(plans.len(), |i| self.cublaslt.run(&plans[i], shape, operands))?;
        Ok(fastest_index(&seconds).map(|best| seconds[best]))
    }

    /// Seconds per run of each candidate, measured with CUDA events; infinity for a candidate that fails to launch. Candidates
    /// take turns and the minimum over rounds counts, because an idle GPU starts at a low clock and disturbances only add time.
    /// The untimed runs before each measurement keep the GPU busy, so that the host's launch overhead is not measured.
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
                match self.time_runs(|| run(i)) {
                    Ok(time) => seconds[i] = seconds[i].min(time),
                    Err(BackendError::Failed(_)) => (failed[i], seconds[i]) = (true, f64::INFINITY),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(seconds)
    }

    /// Seconds per run, after untimed runs.
    fn time_runs(&self, run: impl Fn() -> Result<(), BackendError>) -> Result<f64, BackendError> {
        (0..RUNS).try_for_each(|_| run())?;
        let record_event = || self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let start = record_event()?;
        (0..RUNS).try_for_each(|_| run())?;
        let end = record_event()?;
        end.synchronize()?;
        Ok(device::seconds_between(&start, &end)? / f64::from(RUNS))
    }

    /// Seconds to read and write the whole output, as an elementwise kernel does: twice the time of copying its first half to its
    /// second.
    fn elementwise_seconds(&self, shape: GemmShape, operands: GemmOperands) -> Result<f64, BackendError> {
        let half = shape.rows * shape.outputs * self.dtype.bytes() / 2;
        // SAFETY: both halves belong to the output and do not overlap; the stream orders the copies.
        let copy = |_| unsafe {
            result::memcpy_dtod_async(operands.output + half as u64, operands.output, half, self.stream.cu_stream())
                .map_err(BackendError::from)
        };
        Ok(2.0 * self.measure(1, copy)?[0])
    }

    /// Whether the custom kernel, with several tiles per block, agrees with cuBLASLt on the operands. cuBLASLt has no erf GELU,
    /// so the CPU applies it to the expected values. Logs a failure.
    fn cross_check(
        &self,
        custom: &WgmmaGemm,
        shape: GemmShape,
        max_rows: usize,
        operands: GemmOperands,
    ) -> Result<bool, BackendError> {
        let rows = CHECKED_ROWS.min(max_rows).min(shape.inputs) / 128 * 128;
        let shape = GemmShape { rows, ..shape };
        if rows == 0 || !WgmmaGemm::supports(shape) {
            return Ok(false);
        }
        // A residual that the runs do not overwrite: the weight, whose `outputs * inputs` values suffice because rows <= inputs.
        let operands = GemmOperands { residual: operands.weight, ..operands };
        let output = || -> Result<Vec<f32>, BackendError> {
            let mut bytes = vec![0u8; shape.rows * shape.outputs * self.dtype.bytes()];
            // SAFETY: the output has this many bytes, and the host buffer outlives the synchronization.
            unsafe { result::memcpy_dtoh_async(&mut bytes, operands.output, self.stream.cu_stream()) }?;
            self.stream.synchronize()?;
            Ok(self.dtype.decode(&bytes))
        };
        self.cublaslt.run(&self.cublaslt.plan(shape)?, shape, operands)?;
        let mut expected = output()?;
        if shape.epilogue == GemmEpilogue::BiasGelu {
            expected = gelu_erf(expected)?;
        }
        let launched = custom.launch_on(wgmma::CHECKED_BLOCKS, &self.stream, shape, operands).and_then(|()| output());
        let error = match launched {
            Ok(got) => worst_row(&expected, &got, CHECKED_COLUMNS),
            Err(BackendError::Failed(error)) => {
                tracing::warn!(%error, "the custom GEMM kernel does not launch on this GPU");
                f32::NAN
            }
            Err(error) => {
                tracing::error!(
                    "the custom GEMM kernel fails on this GPU; start with --cuda-gemm cublaslt to disable it"
                );
                return Err(error);
            }
        };
        let passed = error <= bound(self.dtype);
        if !passed {
            self.tuning_store.do_not_save();
            tracing::warn!(
                ?shape,
                error,
                bound = bound(self.dtype),
                "the custom GEMM kernel did not pass the cross-check with cuBLASLt on this GPU and is not used; please report this"
            );
        }
        Ok(passed)
    }
}

/// The index of the shortest time. Candidates that failed have an infinite time.
fn fastest_index(seconds: &[f64]) -> Option<usize> {
    (0..seconds.len()).filter(|&i| seconds[i].is_finite()).min_by(|&i, &j| seconds[i].total_cmp(&seconds[j]))
}

/// Whether to use the custom kernel: it runs, and is preferred (`always`) or faster than cuBLASLt followed by a GELU kernel of
/// `gelu_seconds` (0 without GELU). The time of a kernel that fails is infinite.
fn chooses_custom(always: bool, custom_seconds: f64, cublaslt_seconds: f64, gelu_seconds: f64) -> bool {
    custom_seconds.is_finite() && (always || custom_seconds < cublaslt_seconds + gelu_seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_candidate_that_ran_is_chosen() {
        assert_eq!(fastest_index(&[3.0, f64::INFINITY, 1.0, 2.0]), Some(2));
        assert_eq!(fastest_index(&[f64::INFINITY]), None);
    }

    #[test]
    fn the_custom_kernel_is_compared_with_cublaslt_and_its_gelu_kernel() {
        assert!(chooses_custom(false, 1.2, 1.0, 0.5));
        assert!(!chooses_custom(false, 1.2, 1.0, 0.0));
        assert!(chooses_custom(true, 1.2, 1.0, 0.0));
        assert!([false, true].iter().all(|&always| !chooses_custom(always, f64::INFINITY, 1.0, 0.5)));
    }
}
