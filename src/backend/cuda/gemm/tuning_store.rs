//! What was found fastest for each shape of product: shared by the contexts of a device, and kept from one start to the next.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::sys;
use serde::{Deserialize, Serialize};

use super::cublaslt::GemmShape;
use crate::backend::cuda::cache::Cache;
use crate::backend::cuda::device::Device;
use crate::backend::cuda::dtype::CudaDtype;
use crate::backend::cuda::options::GemmChoice;

/// Row counts that gemms are tuned for. One in between takes the algorithm of the next larger.
pub(in crate::backend::cuda) const TUNED_ROWS: [usize; 10] =
    [64, 128, 256, 512, 1024, 2048, 4096, 8448, 16_896, 33_792];

/// Algorithms that were found fastest, shared by the contexts of a device and kept from one start to the next.
#[derive(Debug)]
pub(in crate::backend::cuda) struct TuningStore {
    cache: Cache,
    file: String,
    /// Our own kernel disagreed with the library: what was found is not kept, so that the next start tries again, and tells again.
    disagreed: AtomicBool,
    found: Mutex<BTreeMap<String, TunedGemm>>,
}

/// What was found for a shape.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(in crate::backend::cuda) struct TunedGemm {
    /// cuBLASLt's own 64 bytes, which its documentation allows to be kept for the same version of the library.
    pub(in crate::backend::cuda) algorithm: [u64; 8],
    /// Our own kernel is faster.
    pub(in crate::backend::cuda) ours: bool,
}

/// The row count whose algorithm gemms of `rows` rows take.
fn tuned_rows(rows: usize) -> usize {
    TUNED_ROWS.into_iter().find(|&tuned| tuned >= rows).unwrap_or(rows)
}

impl TuningStore {
    /// What earlier starts found for this device, library and dtype.
    pub(in crate::backend::cuda) fn open(device: &Device, dtype: CudaDtype, choice: GemmChoice) -> Self {
        // SAFETY: takes and gives a number.
        let version = unsafe { sys::cublasLtGetVersion() };
        let name = device.file_name();
        // Another text of the kernels may be faster or slower.
        let (kernels, dtype) = (&device.kernels_key[..16], dtype.name());
        let file = format!("gemms-{name}-{version}-{dtype}-{kernels}-{}.json", choice.name());
        let kept = device.cache.read(&file);
        // A file that cannot be read is one that is not there: what it held is found again.
        let found = kept.and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default();
        Self { cache: device.cache.clone(), file, found: Mutex::new(found), disagreed: AtomicBool::new(false) }
    }

    fn key(shape: GemmShape) -> String {
        let GemmShape { rows, outputs, inputs, epilogue } = shape;
        format!("{} x {outputs} x {inputs} {epilogue:?}", tuned_rows(rows))
    }

    pub(in crate::backend::cuda) fn get(&self, shape: GemmShape) -> Option<TunedGemm> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).get(&Self::key(shape)).copied()
    }

    pub(in crate::backend::cuda) fn put(&self, shape: GemmShape, choice: TunedGemm) {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).insert(Self::key(shape), choice);
    }

    /// Has this start keep nothing.
    pub(in crate::backend::cuda) fn do_not_keep(&self) {
        self.disagreed.store(true, Relaxed);
    }

    /// Keeps what was found for the next start.
    pub(in crate::backend::cuda) fn keep(&self) {
        if self.disagreed.load(Relaxed) {
            return;
        }
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(json) = serde_json::to_vec_pretty(&*found) {
            self.cache.write(&self.file, &json);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::cublaslt::GemmEpilogue;
    use super::*;

    fn store(cache: Cache) -> TuningStore {
        let (file, found) = ("gemms.json".to_owned(), Mutex::default());
        TuningStore { cache, file, found, disagreed: AtomicBool::new(false) }
    }

    fn shape(rows: usize) -> GemmShape {
        GemmShape { rows, outputs: 8, inputs: 4, epilogue: GemmEpilogue::Bias }
    }

    #[test]
    fn a_tuned_row_count_serves_smaller_ones() {
        let store = store(Cache::new(None));
        let choice = TunedGemm { algorithm: [7; 8], ours: true };
        store.put(shape(512), choice);
        assert_eq!(store.get(shape(320)), Some(choice));
        assert!(store.get(shape(256)).is_none() && store.get(shape(576)).is_none());
    }

    #[test]
    fn results_are_written_to_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(folder.path().to_owned()));
        let store = store(cache.clone());
        store.put(shape(64), TunedGemm { algorithm: [u64::MAX, 1, 2, 3, 4, 5, 6, 7], ours: false });
        store.keep();
        let kept: BTreeMap<String, TunedGemm> = serde_json::from_slice(&cache.read("gemms.json").unwrap()).unwrap();
        assert_eq!(kept, *store.found.lock().unwrap());
    }
}
