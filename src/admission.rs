//! Admission control: a request's work is admitted as a whole or refused at once.
//!
//! Work is measured in units: tokens for the encoder, bytes for the tokenizer. Admitted work is limited in units and in the
//! seconds that it takes at the measured speed. A limit in seconds suits a laptop and a GPU alike.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use crate::error::RerankError;

/// Weight of a new job in the running estimate of the speed.
const SMOOTHING: f64 = 0.2;
/// Retry-After is increased by a random share of itself, at most this one, so that refused clients do not all return at once.
const RETRY_JITTER: f64 = 0.5;
/// Maximum Retry-After, in seconds.
const MAX_RETRY_AFTER_S: f64 = 60.0;

/// Limits on admitted work.
#[derive(Debug, Clone, Copy)]
pub struct AdmissionLimits {
    /// Maximum units that are admitted and not finished.
    pub units: usize,
    /// Maximum time that the admitted units take at the measured speed.
    pub wait: Duration,
}

/// Admission to one resource: the encoder's queue or the tokenizer.
#[derive(Debug)]
pub struct Admission {
    limits: AdmissionLimits,
    waiting: AtomicUsize,
    /// Jobs that run at the same time under full load.
    workers: usize,
    /// Estimated units per second, as the bits of an f64; 0 until a job has been measured.
    speed: AtomicU64,
    gauge: metrics::Gauge,
}

/// Admitted work. Dropping it, when the work is finished or abandoned, makes room for other work.
#[derive(Debug)]
pub struct Permit {
    units: usize,
    admission: Arc<Admission>,
}

impl Admission {
    /// `gauge` is the metric of admitted units.
    pub fn new(gauge: metrics::Gauge, limits: AdmissionLimits, workers: usize) -> Self {
        Self { limits, waiting: AtomicUsize::new(0), workers, speed: AtomicU64::new(0), gauge }
    }

    /// Admits `units` units or refuses them. When nothing is admitted, any amount is accepted that can finish within
    /// `patience`, the time until the request's deadline: the size of a request has its own limit.
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

    /// Whether there is room for more work, without taking any.
    ///
    /// # Errors
    /// [`RerankError::Overloaded`]
    pub fn has_room(&self) -> Result<(), RerankError> {
        let (waiting, limit) = (self.waiting(), self.limit(None));
        if waiting == 0 || waiting < limit {
            return Ok(());
        }
        let retry_after_s = retry_after(self.seconds_for(waiting + 1 - limit), fastrand::f64());
        Err(RerankError::Overloaded { retry_after_s })
    }

    /// Units that are admitted and not finished.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Relaxed)
    }

    /// Updates the speed estimate with a finished job. Callers pass large jobs only: small ones say little about the speed
    /// under load.
    pub fn done(&self, units: usize, took: Duration) {
        let new = (units * self.workers) as f64 / took.as_secs_f64().max(1e-6);
        let old = f64::from_bits(self.speed.load(Relaxed));
        let speed = if old == 0.0 { new } else { old + SMOOTHING * (new - old) };
        self.speed.store(speed.to_bits(), Relaxed);
    }

    /// Estimated units per second; `None` until a job has been measured.
    fn speed(&self) -> Option<f64> {
        Some(f64::from_bits(self.speed.load(Relaxed))).filter(|&speed| speed > 0.0)
    }

    fn seconds_for(&self, units: usize) -> Option<f64> {
        self.speed().map(|speed| units as f64 / speed)
    }

    /// Maximum admitted units: the fixed limit, or fewer if not all of them finish within the allowed wait and `patience`.
    fn limit(&self, patience: Option<Duration>) -> usize {
        let wait = patience.map_or(self.limits.wait, |patience| patience.min(self.limits.wait));
        let by_time = self.speed().map_or(usize::MAX, |speed| (speed * wait.as_secs_f64()) as usize);
        self.limits.units.min(by_time)
    }
}

/// Retry-After in whole seconds: the estimated time until there is room (1 s if unknown), plus jitter from `random` in [0, 1).
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
