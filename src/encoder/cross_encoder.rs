//! The trait [`CrossEncoder`].

use crate::backend::BackendError;
use crate::batch::Batch;

/// A model that scores pairs, on any device. Workers call it.
pub trait CrossEncoder: Send + Sync {
    /// Computes one logit for each sequence: `[S]`, in the batch's order.
    ///
    /// # Errors
    /// The device fails or has too little memory.
    fn score(&self, batch: &Batch) -> Result<Vec<f32>, BackendError>;

    /// Implementation, precision and device, for the start-up log.
    fn describe(&self) -> String;

    /// How many calls of [`CrossEncoder::score`] can compute at the same time. 1 if each batch uses the whole device.
    fn max_concurrent_batches(&self) -> usize {
        1
    }
}
