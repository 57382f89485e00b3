//! One model on several devices, as one [`CrossEncoder`].

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::cross_encoder::CrossEncoder;
use crate::backend::BackendError;
use crate::batch::Batch;

/// Replicas of a model, each on its own device. A batch goes to the replica with the fewest batches in flight.
pub struct Replicas(Vec<Replica>);

struct Replica {
    encoder: Arc<dyn CrossEncoder>,
    /// Batches in flight.
    batches: AtomicUsize,
}

impl Replicas {
    /// Combines replicas. A single one is returned unchanged.
    pub fn of(mut encoders: Vec<Arc<dyn CrossEncoder>>) -> Arc<dyn CrossEncoder> {
        if encoders.len() == 1 {
            return encoders.remove(0);
        }
        let replica = |encoder| Replica { encoder, batches: AtomicUsize::new(0) };
        Arc::new(Self(encoders.into_iter().map(replica).collect()))
    }

    /// Chooses the replica with the fewest batches in flight and adds one to their count; `None` without replicas.
    fn choose(&self) -> Option<&Replica> {
        loop {
            let least = self.0.iter().min_by_key(|replica| replica.batches.load(Relaxed))?;
            let batches = least.batches.load(Relaxed);
            if least.batches.compare_exchange(batches, batches + 1, Relaxed, Relaxed).is_ok() {
                return Some(least);
            }
        }
    }
}

/// Subtracts one from the count of batches in flight when dropped, also after an error or a panic.
struct BusyGuard<'a>(&'a AtomicUsize);

impl Drop for BusyGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl CrossEncoder for Replicas {
    fn score(&self, batch: &Batch) -> Result<Vec<f32>, BackendError> {
        let Some(replica) = self.choose() else {
            return Err(BackendError::Failed("there are no devices".into()));
        };
        let _in_flight = BusyGuard(&replica.batches);
        replica.encoder.score(batch)
    }

    fn describe(&self) -> String {
        self.0.iter().map(|replica| replica.encoder.describe()).collect::<Vec<_>>().join(" + ")
    }

    fn max_concurrent_batches(&self) -> usize {
        self.0.iter().map(|replica| replica.encoder.max_concurrent_batches()).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::batch::Pair;

    /// Returns its number once every replica has a batch.
    struct Numbered(f32, Arc<Barrier>);

    impl CrossEncoder for Numbered {
        fn score(&self, _: &Batch) -> Result<Vec<f32>, BackendError> {
            self.1.wait();
            Ok(vec![self.0])
        }

        fn describe(&self) -> String {
            format!("number {}", self.0)
        }
    }

    #[test]
    fn concurrent_batches_go_to_different_replicas() {
        let barrier = Arc::new(Barrier::new(3));
        let replica = |i| Arc::new(Numbered(i as f32, Arc::clone(&barrier))) as Arc<dyn CrossEncoder>;
        let replicas = Replicas::of((0..3).map(replica).collect());
        assert_eq!(
            (replicas.max_concurrent_batches(), replicas.describe().as_str()),
            (3, "number 0 + number 1 + number 2")
        );
        let batch = Batch::pack([&Pair::new(vec![1], vec![0])]);
        let mut scores = std::thread::scope(|scope| {
            let calls: Vec<_> = (0..3).map(|_| scope.spawn(|| replicas.score(&batch).unwrap()[0])).collect();
            calls.into_iter().map(|call| call.join().unwrap()).collect::<Vec<_>>()
        });
        scores.sort_by(f32::total_cmp);
        assert_eq!(scores, [0.0, 1.0, 2.0]);
    }
}
