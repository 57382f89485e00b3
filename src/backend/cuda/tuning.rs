//! What was found fastest for each shape of product: shared by the lanes of a card, and kept from one start to the next.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::sys;
use serde::{Deserialize, Serialize};

use super::card::{self, Card};
use super::products::Shape;
use super::{Element, own_product};

/// Row counts that products are tuned for. One in between takes the algorithm of the next larger.
pub(super) const TUNED_ROWS: [usize; 10] = [64, 128, 256, 512, 1024, 2048, 4096, 8448, 16_896, 33_792];

/// Algorithms that were found fastest, shared by the lanes of a card and kept from one start to the next.
#[derive(Debug)]
pub(super) struct Tuning {
    file: Option<PathBuf>,
    /// Our own kernel disagreed with the library: what was found is not kept, so that the next start tries again, and tells again.
    disagreed: AtomicBool,
    found: Mutex<BTreeMap<String, Choice>>,
}

/// What was found for a shape.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Choice {
    /// cuBLASLt's own 64 bytes, which its documentation allows to be kept for the same version of the library.
    pub(super) algorithm: [u64; 8],
    /// Our own kernel is faster.
    pub(super) ours: bool,
}

/// The row count whose algorithm products of `rows` rows take.
fn tuned_rows(rows: usize) -> usize {
    TUNED_ROWS.into_iter().find(|&tuned| tuned >= rows).unwrap_or(rows)
}

impl Tuning {
    /// What earlier starts found for this card, library and element.
    pub(super) fn open(card: &Card, element: Element) -> Self {
        // SAFETY: takes and gives a number.
        let version = unsafe { sys::cublasLtGetVersion() };
        let name: String = card.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        // Another text of the kernels may be faster or slower.
        let (kernels, element) = (&card.kernels_key[..16], element.name());
        // What is found with a kernel left out, or forced, holds for that alone.
        let wanted = own_product::wanted();
        let file = card::cache_folder()
            .map(|folder| folder.join(format!("products-{name}-{version}-{element}-{kernels}-{wanted}.json")));
        let kept = file.as_ref().and_then(|file| std::fs::read(file).ok());
        // A file that cannot be read is one that is not there: what it held is found again.
        let found = kept.and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default();
        Self { file, found: Mutex::new(found), disagreed: AtomicBool::new(false) }
    }

    fn key(shape: Shape) -> String {
        let Shape { rows, outputs, inputs, finish } = shape;
        format!("{} x {outputs} x {inputs} {finish:?}", tuned_rows(rows))
    }

    pub(super) fn get(&self, shape: Shape) -> Option<Choice> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).get(&Self::key(shape)).copied()
    }

    pub(super) fn put(&self, shape: Shape, choice: Choice) {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).insert(Self::key(shape), choice);
    }

    /// Has this start keep nothing.
    pub(super) fn do_not_keep(&self) {
        self.disagreed.store(true, Relaxed);
    }

    /// Keeps what was found for the next start.
    pub(super) fn keep(&self) {
        if self.disagreed.load(Relaxed) {
            return;
        }
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(file), Ok(json)) = (&self.file, serde_json::to_vec_pretty(&*found)) {
            card::store(file, &json);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::products::Finish;
    use super::*;

    fn tuning(file: Option<PathBuf>) -> Tuning {
        Tuning { file, found: Mutex::default(), disagreed: AtomicBool::new(false) }
    }

    fn shape(rows: usize) -> Shape {
        Shape { rows, outputs: 8, inputs: 4, finish: Finish::Bias }
    }

    #[test]
    fn what_is_tuned_for_a_row_count_serves_those_below() {
        let tuning = tuning(None);
        let choice = Choice { algorithm: [7; 8], ours: true };
        tuning.put(shape(512), choice);
        assert_eq!(tuning.get(shape(320)), Some(choice));
        assert!(tuning.get(shape(256)).is_none() && tuning.get(shape(576)).is_none());
    }

    #[test]
    fn what_was_found_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("deeper/products.json");
        let tuning = tuning(Some(file.clone()));
        tuning.put(shape(64), Choice { algorithm: [u64::MAX, 1, 2, 3, 4, 5, 6, 7], ours: false });
        tuning.keep();
        let kept: BTreeMap<String, Choice> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        assert_eq!(kept, *tuning.found.lock().unwrap());
    }
}
