//! BatchJob is admitted whole and measured in tokens: a request either fits the queue's budget or is refused at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use crate::error::RerankError;

/// How much of a new batch's speed goes into the running estimate.
const SMOOTHING: f64 = 0.2;

/// The budget of one model's queue.
#[derive(Debug)]
pub(super) struct Admission {
    limit: usize,
    waiting: AtomicUsize,
    /// Batches that are computed at the same time, when there is enough to do.
    workers: usize,
    /// Bits of the estimated tokens per second; 0 until a batch has been measured.
    speed: AtomicU64,
    gauge: metrics::Gauge,
}

/// Room in the queue, held until the work is computed or given up.
#[derive(Debug)]
pub struct Permit {
    tokens: usize,
    admission: Arc<Admission>,
}

impl Admission {
    pub(super) fn new(model: &str, limit: usize, workers: usize) -> Self {
        let gauge = metrics::gauge!("rerankd_queue_tokens", "model" => model.to_owned());
        Self { limit, waiting: AtomicUsize::new(0), workers, speed: AtomicU64::new(0), gauge }
    }

    /// Takes room for `tokens`, at once or not at all. An empty queue takes any request: its own limit has judged it.
    pub(super) fn admit(self: &Arc<Self>, tokens: usize) -> Result<Permit, RerankError> {
        let fits = |waiting: usize| (waiting == 0 || waiting + tokens <= self.limit).then_some(waiting + tokens);
        match self.waiting.fetch_update(Relaxed, Relaxed, fits) {
            Ok(_) => {
                self.gauge.increment(tokens as f64);
                Ok(Permit { tokens, admission: Arc::clone(self) })
            }
            Err(waiting) => {
                Err(RerankError::Overloaded { retry_after_s: self.seconds_for(waiting + tokens - self.limit) })
            }
        }
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Relaxed)
    }

    /// Learns from a batch.
    pub(super) fn computed(&self, tokens: usize, took: Duration) {
        let new = (tokens * self.workers) as f64 / took.as_secs_f64().max(1e-6);
        let old = f64::from_bits(self.speed.load(Relaxed));
        let speed = if old == 0.0 { new } else { old + SMOOTHING * (new - old) };
        self.speed.store(speed.to_bits(), Relaxed);
    }

    fn seconds_for(&self, tokens: usize) -> u64 {
        let speed = f64::from_bits(self.speed.load(Relaxed)).max(1.0);
        ((tokens as f64 / speed).ceil() as u64).clamp(1, 60)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.waiting.fetch_sub(self.tokens, Relaxed);
        self.admission.gauge.decrement(self.tokens as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_fits_whole_or_is_refused_with_a_time() {
        let admission = Arc::new(Admission::new("m", 100, 1));
        let first = admission.admit(80).unwrap();
        admission.computed(10, Duration::from_secs(1));
        assert!(matches!(admission.admit(50), Err(RerankError::Overloaded { retry_after_s: 3 })));
        let second = admission.admit(20).unwrap();
        assert_eq!(admission.waiting(), 100);
        drop((first, second));
        assert_eq!(admission.waiting(), 0);
        assert!(admission.admit(500).is_ok(), "an empty queue takes any request");
    }
}
