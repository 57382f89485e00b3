//! The fastest kernel per GEMM shape, as measured by autotuning.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::sys;
use serde::{Deserialize, Serialize};

use super::GemmShape;
use crate::backend::cuda::cache::Cache;
use crate::backend::cuda::device::Device;
use crate::backend::cuda::dtype::CudaDtype;
use crate::backend::cuda::options::GemmChoice;

/// Row counts that GEMMs are tuned for. Other row counts use the result of the next larger one; above the last there is none.
pub(in crate::backend::cuda) const TUNED_ROWS: [usize; 10] =
    [64, 128, 256, 512, 1024, 2048, 4096, 8448, 16_896, 33_792];

/// Tuning results, shared by the execution contexts of a device and kept in the cache between starts.
#[derive(Debug)]
pub(in crate::backend::cuda) struct TuningStore {
    cache: Cache,
    file: String,
    /// The custom kernel failed the cross-check. Results are then not saved, so that the next start checks again and logs it.
    check_failed: AtomicBool,
    results: Mutex<BTreeMap<String, TunedGemm>>,
}

/// The tuning result of one shape.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(in crate::backend::cuda) struct TunedGemm {
    /// cuBLASLt's opaque 64-byte algorithm, valid for the same library version.
    pub(in crate::backend::cuda) algorithm: [u64; 8],
    /// Whether to use the custom kernel instead.
    pub(in crate::backend::cuda) custom: bool,
}

/// The tuned row count that determines the kernel for GEMMs of `rows` rows.
fn tuned_rows(rows: usize) -> usize {
    TUNED_ROWS.into_iter().find(|&tuned| tuned >= rows).unwrap_or(rows)
}

impl TuningStore {
    /// Opens the results of earlier starts for this GPU model, cuBLASLt version, dtype, kernel sources and GEMM choice.
    pub(in crate::backend::cuda) fn open(device: &Device, dtype: CudaDtype, choice: GemmChoice) -> Self {
        // SAFETY: no arguments and no preconditions; returns a number.
        let version = unsafe { sys::cublasLtGetVersion() };
        let name = device.file_name();
        let (kernels, dtype) = (&device.kernels_key[..16], dtype.name());
        let file = format!("gemms-{name}-{version}-{dtype}-{kernels}-{}.json", choice.name());
        let saved = device.cache.read(&file);
        // An unreadable file counts as missing: its results are measured again.
        let results = saved.and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default();
        Self { cache: device.cache.clone(), file, results: Mutex::new(results), check_failed: AtomicBool::new(false) }
    }

    fn key(shape: GemmShape) -> String {
        let GemmShape { rows, outputs, inputs, epilogue } = shape;
        format!("{} x {outputs} x {inputs} {epilogue:?}", tuned_rows(rows))
    }

    pub(in crate::backend::cuda) fn get(&self, shape: GemmShape) -> Option<TunedGemm> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner).get(&Self::key(shape)).copied()
    }

    pub(in crate::backend::cuda) fn put(&self, shape: GemmShape, result: TunedGemm) {
        self.results.lock().unwrap_or_else(PoisonError::into_inner).insert(Self::key(shape), result);
    }

    /// Disables saving for this start.
    pub(in crate::backend::cuda) fn do_not_save(&self) {
        self.check_failed.store(true, Relaxed);
    }

    /// Writes the results to the cache, unless disabled.
    pub(in crate::backend::cuda) fn save(&self) {
        if self.check_failed.load(Relaxed) {
            return;
        }
        let results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(json) = serde_json::to_vec_pretty(&*results) {
            self.cache.write(&self.file, &json);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::GemmEpilogue;
    use super::*;

    fn store(cache: Cache) -> TuningStore {
        let (file, results) = ("gemms.json".to_owned(), Mutex::default());
        TuningStore { cache, file, results, check_failed: AtomicBool::new(false) }
    }

    fn shape(rows: usize) -> GemmShape {
        GemmShape { rows, outputs: 8, inputs: 4, epilogue: GemmEpilogue::Bias }
    }

    #[test]
    fn a_tuned_row_count_serves_smaller_ones() {
        let store = store(Cache::new(None));
        let result = TunedGemm { algorithm: [7; 8], custom: true };
        store.put(shape(512), result);
        assert_eq!(store.get(shape(320)), Some(result));
        assert!(store.get(shape(256)).is_none() && store.get(shape(576)).is_none());
    }

    #[test]
    fn results_are_written_to_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(folder.path().to_owned()));
        let store = store(cache.clone());
        store.put(shape(64), TunedGemm { algorithm: [u64::MAX, 1, 2, 3, 4, 5, 6, 7], custom: false });
        store.save();
        let saved: BTreeMap<String, TunedGemm> = serde_json::from_slice(&cache.read("gemms.json").unwrap()).unwrap();
        assert_eq!(saved, *store.results.lock().unwrap());
    }
}
