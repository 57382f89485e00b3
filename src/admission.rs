//! Admission control: a request's work is admitted as a whole or refused at once.
//!
//! Work is measured in units: tokens for the encoder, bytes for the tokenizer and for request bodies. Admitted work is limited in
//! units and in the seconds that it takes at the measured speed. A limit in seconds suits a laptop and a GPU alike.
//!
//! Several clients share a limit by dynamic thresholds (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory
//! packet switches", 1998): a client may add work as long as it then holds at most as much as is still free. So one client alone
//! can take half of the room, and n clients 1 / (n + 1) each. A client that holds nothing is excepted: its first request may take
//! all that is free.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use crate::client::ClientId;
use crate::error::{Bottleneck, RerankError};
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use crate::sync::{Mutex, MutexGuard};

/// Weight of a new job in the running estimate of the speed.
const SMOOTHING: f64 = 0.2;
/// Jobs that are measured before requests are refused because of time: the first jobs may be slow.
const MIN_MEASURED_JOBS: usize = 3;
/// Retry-After is increased by a random part of itself, up to this fraction, so that refused clients do not all return at once.
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

/// What is limited. Refusals name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// A model's queue.
    Queue,
    /// A model's tokenizer.
    Tokenizer,
    /// The memory of request bodies.
    Memory,
}

/// Maximum admitted units, and what sets this maximum.
#[derive(Debug, Clone, Copy)]
struct Limit {
    units: usize,
    bottleneck: Bottleneck,
}

/// Admission to one resource: the encoder's queue, the tokenizer, or the memory of request bodies.
#[derive(Debug)]
pub struct Admission {
    resource: Resource,
    limits: AdmissionLimits,
    admitted: Mutex<Admitted>,
    /// Jobs that run at the same time under full load.
    workers: usize,
    /// Estimated units per second, as the bits of an f64; 0 until a job has been measured.
    speed: AtomicU64,
    measured_jobs: AtomicUsize,
    gauge: metrics::Gauge,
}

/// Units that are admitted and not finished.
#[derive(Debug, Default)]
struct Admitted {
    total: usize,
    /// The part of each client that shares the limit with others; no entry is 0.
    by_client: HashMap<ClientId, usize>,
}

/// Admitted work. Dropping it, when the work is finished or abandoned, makes room for other work.
#[derive(Debug)]
pub struct Permit {
    units: usize,
    client: ClientId,
    admission: Arc<Admission>,
}

impl Admitted {
    fn of(&self, client: ClientId) -> usize {
        self.by_client.get(&client).copied().unwrap_or(0)
    }

    /// Units that `client` may add if `limit` units may be admitted in all.
    fn room(&self, client: ClientId, limit: usize) -> usize {
        let (own, free) = (self.of(client), limit.saturating_sub(self.total));
        match client {
            _ if own == 0 => free,
            ClientId::Only => free,
            // So that after adding units: own + units <= free - units.
            ClientId::Key(_) => free.saturating_sub(own) / 2,
        }
    }

    fn add(&mut self, client: ClientId, units: usize) {
        self.total += units;
        if client != ClientId::Only && units > 0 {
            *self.by_client.entry(client).or_default() += units;
        }
    }

    fn remove(&mut self, client: ClientId, units: usize) {
        self.total -= units;
        if let Some(own) = self.by_client.get_mut(&client) {
            *own -= units;
            if *own == 0 {
                self.by_client.remove(&client);
            }
        }
    }
}

impl Admission {
    /// `gauge` is the metric of admitted units.
    pub fn new(resource: Resource, gauge: metrics::Gauge, limits: AdmissionLimits, workers: usize) -> Self {
        Self {
            resource,
            limits,
            admitted: Mutex::default(),
            workers,
            speed: AtomicU64::new(0),
            measured_jobs: AtomicUsize::new(0),
            gauge,
        }
    }

    /// Admits `units` units of `client` or refuses them. `patience` is the time until the request's deadline. When nothing else
    /// is admitted, any amount that can finish within `patience` is accepted; other limits bound the size of a request.
    ///
    /// # Errors
    /// [`RerankError::Overloaded`] if there is no room; [`RerankError::CannotFinish`] if the request alone takes longer than
    /// `patience`.
    pub fn admit(
        self: &Arc<Self>,
        client: ClientId,
        units: usize,
        patience: Option<Duration>,
    ) -> Result<Permit, RerankError> {
        let needed = self.seconds_for(units).filter(|_| self.is_measured());
        if let (Some(patience), Some(needed)) = (patience, needed)
            && needed > patience.as_secs_f64()
        {
            return Err(RerankError::CannotFinish {
                needed_s: needed.ceil() as u64,
                patience_s: patience.as_secs_f64().ceil() as u64,
            });
        }
        self.add(client, units, 0, self.limit(patience))?;
        Ok(Permit { units, client, admission: Arc::clone(self) })
    }

    /// Adds `units` to work for which `held` units are admitted already.
    fn add(&self, client: ClientId, units: usize, held: usize, limit: Limit) -> Result<(), RerankError> {
        let mut admitted = self.lock();
        let room = admitted.room(client, limit.units);
        if units > room && admitted.total > held {
            drop(admitted);
            let retry_after_s = retry_after(self.seconds_for(units - room), fastrand::f64());
            return Err(RerankError::Overloaded { retry_after_s, bottleneck: limit.bottleneck });
        }
        admitted.add(client, units);
        self.gauge.increment(units as f64);
        Ok(())
    }

    /// Checks that `client` has room for more work, without taking any.
    ///
    /// # Errors
    /// [`RerankError::Overloaded`]
    pub fn has_room(&self, client: ClientId) -> Result<(), RerankError> {
        let (limit, admitted) = (self.limit(None), self.lock());
        if admitted.total == 0 || admitted.room(client, limit.units) > 0 {
            return Ok(());
        }
        drop(admitted);
        let retry_after_s = retry_after(self.seconds_for(1), fastrand::f64());
        Err(RerankError::Overloaded { retry_after_s, bottleneck: limit.bottleneck })
    }

    /// Units that are admitted and not finished.
    pub fn waiting(&self) -> usize {
        self.lock().total
    }

    /// Updates the speed estimate with a finished job. Callers pass large jobs only: small ones say little about the speed
    /// under load.
    pub fn done(&self, units: usize, took: Duration) {
        let new = (units * self.workers) as f64 / took.as_secs_f64().max(1e-6);
        let old = f64::from_bits(self.speed.load(Relaxed));
        let speed = if old == 0.0 { new } else { old + SMOOTHING * (new - old) };
        self.speed.store(speed.to_bits(), Relaxed);
        self.measured_jobs.fetch_add(1, Relaxed);
    }

    /// Estimated units per second; `None` until a job has been measured.
    fn speed(&self) -> Option<f64> {
        Some(f64::from_bits(self.speed.load(Relaxed))).filter(|&speed| speed > 0.0)
    }

    fn is_measured(&self) -> bool {
        self.measured_jobs.load(Relaxed) >= MIN_MEASURED_JOBS
    }

    fn seconds_for(&self, units: usize) -> Option<f64> {
        self.speed().map(|speed| units as f64 / speed)
    }

    /// Maximum admitted units: the fixed limit, or fewer if not all of them finish within the allowed wait and `patience`.
    fn limit(&self, patience: Option<Duration>) -> Limit {
        let wait = patience.map_or(self.limits.wait, |patience| patience.min(self.limits.wait));
        let speed = self.speed().filter(|_| self.is_measured());
        let by_time = speed.map_or(usize::MAX, |speed| (speed * wait.as_secs_f64()) as usize);
        let bottleneck = match self.resource {
            Resource::Tokenizer => Bottleneck::Tokenizer,
            Resource::Memory => Bottleneck::Memory,
            Resource::Queue if self.limits.units <= by_time => Bottleneck::QueueTokens,
            Resource::Queue if wait < self.limits.wait => Bottleneck::Deadline,
            Resource::Queue => Bottleneck::QueueWait,
        };
        Limit { units: self.limits.units.min(by_time), bottleneck }
    }

    /// No update of the counts can panic halfway, so the counts behind a poisoned lock are consistent.
    fn lock(&self) -> MutexGuard<'_, Admitted> {
        self.admitted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Permit {
    /// Admits more units of the same work, up to `units` in all.
    ///
    /// # Errors
    /// [`RerankError::Overloaded`] if there is no room.
    pub fn grow_to(&mut self, units: usize) -> Result<(), RerankError> {
        let more = units.saturating_sub(self.units);
        self.admission.add(self.client, more, self.units, self.admission.limit(None))?;
        self.units += more;
        Ok(())
    }
}

/// Retry-After in whole seconds: the estimated time until there is room (1 s if unknown), plus jitter from `random` in [0, 1).
fn retry_after(seconds: Option<f64>, random: f64) -> u64 {
    let seconds = seconds.unwrap_or(1.0).clamp(1.0, MAX_RETRY_AFTER_S);
    (seconds * (1.0 + RETRY_JITTER * random)).ceil().min(MAX_RETRY_AFTER_S) as u64
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.lock().remove(self.client, self.units);
        self.admission.gauge.decrement(self.units as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(units: usize, wait_s: u64) -> Arc<Admission> {
        Arc::new(Admission::new(
            Resource::Queue,
            metrics::Gauge::noop(),
            AdmissionLimits { units, wait: Duration::from_secs(wait_s) },
            1,
        ))
    }

    /// An admission with a measured speed of 1000 units per second.
    fn measured(units: usize, wait_s: u64) -> Arc<Admission> {
        let admission = admission(units, wait_s);
        (0..MIN_MEASURED_JOBS).for_each(|_| admission.done(1000, Duration::from_secs(1)));
        admission
    }

    fn admit(admission: &Arc<Admission>, units: usize, patience: Option<Duration>) -> Result<Permit, RerankError> {
        admission.admit(ClientId::Only, units, patience)
    }

    fn is_refused(result: Result<Permit, RerankError>) -> bool {
        matches!(result, Err(RerankError::Overloaded { .. }))
    }

    #[test]
    fn a_request_is_admitted_whole_or_refused() {
        let admission = admission(100, 3600);
        let first = admit(&admission, 80, None).unwrap();
        assert!(matches!(
            admit(&admission, 50, None),
            Err(RerankError::Overloaded { retry_after_s: 1..=2, bottleneck: Bottleneck::QueueTokens })
        ));
        let second = admit(&admission, 20, None).unwrap();
        assert_eq!(admission.waiting(), 100);
        assert!(admission.has_room(ClientId::Only).is_err());
        assert!(admission.lock().by_client.is_empty(), "the only client shares with nobody");
        drop((first, second));
        assert_eq!(admission.waiting(), 0);
        assert!(admission.has_room(ClientId::Only).is_ok());
        assert!(admit(&admission, 500, None).is_ok(), "any amount is admitted when nothing waits");
    }

    #[test]
    fn waiting_work_is_bounded_in_seconds_once_the_speed_is_known() {
        let admission = measured(1_000_000, 5);
        let _first = admit(&admission, 4000, None).unwrap();
        assert!(matches!(
            admit(&admission, 1001, None),
            Err(RerankError::Overloaded { retry_after_s: 1..=2, bottleneck: Bottleneck::QueueWait })
        ));
        assert!(admit(&admission, 1000, None).is_ok());
    }

    #[test]
    fn what_cannot_meet_its_deadline_is_refused_on_arrival() {
        let admission = measured(1_000_000, 5);
        let patience = Some(Duration::from_secs(2));
        assert!(matches!(
            admit(&admission, 2001, patience),
            Err(RerankError::CannotFinish { needed_s: 3, patience_s: 2 })
        ));
        assert!(admit(&admission, 2000, patience).is_ok(), "exactly in time");
        let _first = admit(&admission, 1500, patience).unwrap();
        // 1.5 s wait + 0.6 s > 2 s
        assert!(matches!(
            admit(&admission, 600, patience),
            Err(RerankError::Overloaded { bottleneck: Bottleneck::Deadline, .. })
        ));
    }

    #[test]
    fn one_measured_job_is_too_few_to_refuse_a_long_request() {
        let admission = admission(1_000_000, 5);
        admission.done(1, Duration::from_secs(1));
        let first = admit(&admission, 3, Some(Duration::from_secs(2)));
        assert!(first.is_ok() && admit(&admission, 3, Some(Duration::from_secs(2))).is_ok());
    }

    #[test]
    fn clients_with_keys_share_the_room_and_leave_some_to_others() {
        let admission = admission(120, 3600);
        let fill = |key| {
            let mut permits = Vec::new();
            while let Ok(permit) = admission.admit(ClientId::Key(key), 1, None) {
                permits.push(permit);
            }
            permits
        };
        let first = fill(1);
        assert_eq!(first.len(), 60, "one client takes half");
        assert!(admission.has_room(ClientId::Key(1)).is_err());
        assert!(admission.has_room(ClientId::Key(2)).is_ok());
        let second = fill(2);
        assert_eq!(second.len(), 30, "the next one half of the rest");
        let third = admission.admit(ClientId::Key(3), 30, None);
        assert!(third.is_ok(), "a client that holds nothing may use all that is free");
        drop((first, second, third));
        assert_eq!(admission.waiting(), 0);
        assert!(admission.lock().by_client.is_empty());
    }

    #[test]
    fn a_client_may_add_half_of_what_is_free_beyond_its_own_work() {
        let admission = admission(120, 3600);
        let key = ClientId::Key(1);
        let _nothing = admission.admit(ClientId::Key(2), 0, None).unwrap();
        let _first = admission.admit(key, 20, None).unwrap();
        assert_eq!(admission.lock().by_client.len(), 1, "a client that holds nothing has no entry");
        assert!(is_refused(admission.admit(key, 41, None)), "20 + 41 are more than the 59 that stay free");
        assert!(admission.admit(key, 40, None).is_ok());
    }

    #[test]
    fn a_permit_grows_within_the_limit_or_beyond_it_if_nothing_else_is_admitted() {
        let admission = admission(100, 3600);
        let mut first = admit(&admission, 0, None).unwrap();
        first.grow_to(500).unwrap();
        first.grow_to(10).unwrap();
        assert_eq!(admission.waiting(), 500, "a permit does not shrink");
        let mut second = admit(&admission, 0, None).unwrap_or_else(|error| panic!("{error}"));
        assert!(second.grow_to(1).is_err());
        drop(first);
        second.grow_to(100).unwrap();
        assert!(is_refused(admit(&admission, 1, None)));
    }

    #[test]
    fn the_speed_is_that_of_all_workers_and_is_smoothed() {
        let limits = AdmissionLimits { units: 100, wait: Duration::MAX };
        let admission = Admission::new(Resource::Queue, metrics::Gauge::noop(), limits, 4);
        let is_close = |expected: f64| (admission.speed().unwrap() - expected).abs() < 1e-6;
        admission.done(1000, Duration::from_secs(2));
        assert!(is_close(2000.0));
        admission.done(1000, Duration::from_secs(1));
        assert!(is_close(2000.0 + 0.2 * 2000.0));
    }

    #[test]
    fn retry_after_is_whole_seconds_with_jitter() {
        assert_eq!((retry_after(None, 0.0), retry_after(Some(0.01), 0.99)), (1, 2));
        assert_eq!((retry_after(Some(10.0), 0.0), retry_after(Some(10.0), 0.99)), (10, 15));
        assert_eq!(retry_after(Some(1e9), 0.99), 60);
    }
}

#[cfg(test)]
#[cfg(feature = "shuttle")]
mod schedules {
    use super::*;
    use crate::sync::schedules::{check_random, choose};
    use crate::sync::thread;

    const LIMIT: usize = 10;

    /// Three threads of two clients admit work of one size and let it grow to another.
    fn run(sizes: fn() -> (usize, usize)) {
        let limits = AdmissionLimits { units: LIMIT, wait: Duration::MAX };
        let admission = Arc::new(Admission::new(Resource::Queue, metrics::Gauge::noop(), limits, 1));
        let client = |number: u32| {
            let admission = Arc::clone(&admission);
            thread::spawn(move || {
                for _ in 0..2 {
                    let (first, more) = sizes();
                    let Ok(mut permit) = admission.admit(ClientId::Key(number % 2), first, None) else { continue };
                    check(&admission, &permit);
                    permit.grow_to(more).ok();
                    check(&admission, &permit);
                }
            })
        };
        let threads: Vec<_> = (0..3).map(client).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(admission.waiting(), 0);
        assert!(admission.lock().by_client.is_empty());
    }

    /// What a client may rely on while it holds a permit.
    fn check(admission: &Admission, permit: &Permit) {
        let total = admission.waiting();
        match permit.units {
            0 => {} // work of others, of any size
            1..=LIMIT => assert!((permit.units..=LIMIT).contains(&total), "{total}"),
            units => assert_eq!(total, units, "work beyond the limit is admitted alone"),
        }
    }

    #[test]
    fn shuttle_admitted_work_stays_within_the_limit_and_ends_at_zero() {
        check_random(|| run(|| (choose(6), choose(9))));
    }

    #[test]
    fn shuttle_work_beyond_the_limit_is_admitted_alone() {
        check_random(|| run(|| ([0, 4, 25][choose(3)], [0, 7, 30][choose(3)])));
    }
}
