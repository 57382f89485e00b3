//! Admission control: a request's work is admitted whole, or refused at once.
//!
//! Work is measured in units: tokens for the encoder, bytes for the tokenizer. What may wait is bounded in units and in seconds.
//! Seconds are what a client feels; the number of units that they come to follows from the measured speed, so the same setting
//! holds on a laptop and on a GPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use crate::error::RerankError;

/// Weight of a new job in the running estimate of the speed.
const SMOOTHING: f64 = 0.2;
/// Retry-After is spread over this share of itself, so that refused clients do not all come back at once.
const RETRY_JITTER: f64 = 0.5;
/// The longest Retry-After, in seconds.
const MAX_RETRY_AFTER_S: f64 = 60.0;

/// Limits on admitted work.
#[derive(Debug, Clone, Copy)]
pub struct AdmissionLimits {
    /// Units that may be admitted and not yet done.
    pub units: usize,
    /// Time that the admitted units may take, at the measured speed.
    pub wait: Duration,
}

/// The budget of one resource.
#[derive(Debug)]
pub struct Admission {
    limits: AdmissionLimits,
    waiting: AtomicUsize,
    /// Jobs that are done at the same time when there is enough work.
    workers: usize,
    /// Bits of the estimated units per second (f64); 0 until a job has been measured.
    speed: AtomicU64,
    gauge: metrics::Gauge,
}

/// Admitted work. Dropping it, done or given up, makes room for other work.
#[derive(Debug)]
pub struct Permit {
    units: usize,
    admission: Arc<Admission>,
}

impl Admission {
    /// `gauge` shows the admitted units.
    pub fn new(gauge: metrics::Gauge, limits: AdmissionLimits, workers: usize) -> Self {
        Self { limits, waiting: AtomicUsize::new(0), workers, speed: AtomicU64::new(0), gauge }
    }

    /// Admits `units` units or refuses them. If nothing is waiting, any amount is admitted that can finish within `patience`: a
    /// request's size has its own limit.
    ///
    /// # Errors
    /// [`RerankError::Overloaded`] if there is no room; [`RerankError::CannotFinish`] if the request alone takes longer than
    /// `patience`.
    pub fn admit(self: &Arc<Self>, units: usize, patience: Option<Duration>) -> Result<Permit, RerankError> {
        let needed = self.seconds_for(units);
        if let (Some(patience), Some(needed)) = (patience, needed)
            && needed > patience.as_secs_f64()
        {
            return Err(RerankError::CannotFinish {
                needed_s: needed.ceil() as u64,
                patience_s: patience.as_secs_f64().ceil() as u64,
            });
        }
        let limit = self.limit(patience);
        let fits = |waiting: usize| (waiting == 0 || waiting + units <= limit).then_some(waiting + units);
        match self.waiting.fetch_update(Relaxed, Relaxed, fits) {
            Ok(_) => {
                self.gauge.increment(units as f64);
                Ok(Permit { units, admission: Arc::clone(self) })
            }
            Err(waiting) => Err(RerankError::Overloaded {
                retry_after_s: retry_after(self.seconds_for(waiting + units - limit), fastrand::f64()),
            }),
        }
    }

    /// Units admitted and not yet done.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Relaxed)
    }

    /// Updates the speed estimate with a job that was done. The caller passes large jobs only: a small one says little about how
    /// fast a busy resource is.
    pub fn done(&self, units: usize, took: Duration) {
        let new = (units * self.workers) as f64 / took.as_secs_f64().max(1e-6);
        let old = f64::from_bits(self.speed.load(Relaxed));
        let speed = if old == 0.0 { new } else { old + SMOOTHING * (new - old) };
        self.speed.store(speed.to_bits(), Relaxed);
    }

    /// Estimated units per second, once a job has been measured.
    fn speed(&self) -> Option<f64> {
        Some(f64::from_bits(self.speed.load(Relaxed))).filter(|&speed| speed > 0.0)
    }

    fn seconds_for(&self, units: usize) -> Option<f64> {
        self.speed().map(|speed| units as f64 / speed)
    }

    /// Units that may wait: the fixed limit, or what can be done within the allowed wait and within the client's patience.
    fn limit(&self, patience: Option<Duration>) -> usize {
        let wait = patience.map_or(self.limits.wait, |patience| patience.min(self.limits.wait));
        let by_time = self.speed().map_or(usize::MAX, |speed| (speed * wait.as_secs_f64()) as usize);
        self.limits.units.min(by_time)
    }
}

/// Whole seconds until there should be room, spread by `random` in [0, 1).
fn retry_after(seconds: Option<f64>, random: f64) -> u64 {
    let seconds = seconds.unwrap_or(1.0).clamp(1.0, MAX_RETRY_AFTER_S);
    (seconds * (1.0 + RETRY_JITTER * random)).ceil().min(MAX_RETRY_AFTER_S) as u64
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.waiting.fetch_sub(self.units, Relaxed);
        self.admission.gauge.decrement(self.units as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(units: usize, wait_s: u64) -> Arc<Admission> {
        Arc::new(Admission::new(
            metrics::Gauge::noop(),
            AdmissionLimits { units, wait: Duration::from_secs(wait_s) },
            1,
        ))
    }

    #[test]
    fn a_request_is_admitted_whole_or_refused() {
        let admission = admission(100, 3600);
        let first = admission.admit(80, None).unwrap();
        assert!(matches!(admission.admit(50, None), Err(RerankError::Overloaded { .. })));
        let second = admission.admit(20, None).unwrap();
        assert_eq!(admission.waiting(), 100);
        drop((first, second));
        assert_eq!(admission.waiting(), 0);
        assert!(admission.admit(500, None).is_ok(), "any amount is admitted when nothing waits");
    }

    #[test]
    fn waiting_work_is_bounded_in_seconds_once_the_speed_is_known() {
        let admission = admission(1_000_000, 5);
        admission.done(1000, Duration::from_secs(1));
        let _first = admission.admit(4000, None).unwrap();
        assert!(matches!(admission.admit(1001, None), Err(RerankError::Overloaded { retry_after_s: 1..=2 })));
        assert!(admission.admit(1000, None).is_ok());
    }

    #[test]
    fn what_cannot_meet_its_deadline_is_refused_on_arrival() {
        let admission = admission(1_000_000, 5);
        admission.done(1000, Duration::from_secs(1));
        let patience = Some(Duration::from_secs(2));
        assert!(matches!(
            admission.admit(2001, patience),
            Err(RerankError::CannotFinish { needed_s: 3, patience_s: 2 })
        ));
        let _first = admission.admit(1500, patience).unwrap();
        assert!(
            matches!(admission.admit(600, patience), Err(RerankError::Overloaded { .. })),
            "1.5 s wait + 0.6 s > 2 s"
        );
    }

    #[test]
    fn retry_after_is_whole_seconds_with_jitter() {
        assert_eq!((retry_after(None, 0.0), retry_after(Some(0.01), 0.99)), (1, 2));
        assert_eq!((retry_after(Some(10.0), 0.0), retry_after(Some(10.0), 0.99)), (10, 15));
        assert_eq!(retry_after(Some(1e9), 0.99), 60);
    }
}
