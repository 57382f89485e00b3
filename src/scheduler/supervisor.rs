//! Failures of workers and devices. A worker that panics is restarted. A device that is lost or hangs ends the process with an
//! exit code, so that the process manager starts it again: without its device, a process could answer with errors only.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::queue::Queue;
use crate::error::RerankError;
use crate::failpoint::failpoint;

/// Exit code when a device is lost or does not answer (EX_SOFTWARE in sysexits.h). Only a new process can use the device again.
pub const EXIT_DEVICE_LOST: i32 = 70;

/// Time for error responses to be written before the process ends.
const RESPONSE_FLUSH_GRACE: Duration = Duration::from_millis(250);
/// Maximum time of the exit handlers; afterwards they are skipped. The driver's exit handlers may wait for a device that hangs.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time between two checks of the watchdog.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// More restarts of one worker than this within [`RESTART_WINDOW`] end the process.
const MAX_RESTARTS: usize = 3;
const RESTART_WINDOW: Duration = Duration::from_secs(60);

/// A function that logs the given reason and ends the process.
pub(super) type EndProcess = fn(&str) -> !;

/// Logs the reason and ends the process with [`EXIT_DEVICE_LOST`], without exit handlers if they take longer than [`EXIT_TIMEOUT`].
pub(super) fn end_process(reason: &str) -> ! {
    tracing::error!("{reason}; ending with exit code {EXIT_DEVICE_LOST} so that the process can be started again");
    thread::sleep(RESPONSE_FLUSH_GRACE);
    let timer = thread::Builder::new().spawn(|| {
        thread::sleep(EXIT_TIMEOUT);
        signal_hook::low_level::exit(EXIT_DEVICE_LOST);
    });
    if timer.is_err() {
        signal_hook::low_level::exit(EXIT_DEVICE_LOST); // no timer could end exit handlers that hang
    }
    std::process::exit(EXIT_DEVICE_LOST);
}

/// Limits how often a worker is restarted; holds the times of recent restarts.
#[derive(Debug, Default)]
pub(super) struct RestartBudget(VecDeque<Instant>);

impl RestartBudget {
    /// Counts a restart at `now`; false if that is one too many within [`RESTART_WINDOW`].
    pub(super) fn allows(&mut self, now: Instant) -> bool {
        failpoint!("any-number-of-restarts", true);
        while self.0.front().is_some_and(|&at| now.duration_since(at) > RESTART_WINDOW) {
            self.0.pop_front();
        }
        self.0.push_back(now);
        self.0.len() <= MAX_RESTARTS
    }
}

/// Starts a thread that ends the process when a batch runs longer than `timeout`, because the device hangs and all later
/// batches would hang too. The thread ends when the queue is dropped.
pub(super) fn watch(queue: &Arc<Queue>, timeout: Duration, end: EndProcess) -> std::io::Result<()> {
    let queue = Arc::downgrade(queue);
    thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
        while let Some(overdue) = check(&queue, timeout, Instant::now()) {
            if overdue {
                let seconds = timeout.as_secs();
                end(&format!("a batch has been running for more than {seconds} s (--batch-timeout)"));
            }
            thread::sleep(WATCH_INTERVAL);
        }
    })?;
    Ok(())
}

/// Whether a batch runs longer than `timeout`; if so, all requests of the queue fail. `None` if the queue was dropped.
fn check(queue: &Weak<Queue>, timeout: Duration, now: Instant) -> Option<bool> {
    let queue = queue.upgrade()?;
    let overdue = queue.running_since().is_some_and(|since| now.duration_since(since) > timeout);
    if overdue {
        queue.fail_all(|| RerankError::Internal(anyhow::anyhow!("the device does not answer")));
    }
    Some(overdue)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::{Admission, AdmissionLimits, Resource};
    use crate::batch::Pair;
    use crate::client::ClientId;
    use crate::scheduler::queue::NewJob;
    use crate::scheduler::types::QueuePermit;

    #[test]
    fn the_fourth_restart_within_a_minute_is_one_too_many() {
        let (mut budget, start) = (RestartBudget::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!([0, 1, 2].into_iter().all(|second| budget.allows(at(second))));
        assert!(!budget.allows(at(3)));
        let mut budget = RestartBudget::default();
        assert!((0..10).all(|i| budget.allows(at(30 * i))), "one restart in 30 s is always allowed");
    }

    #[test]
    fn a_batch_beyond_its_timeout_fails_every_request() {
        let queue = Arc::new(Queue::new("m", 1));
        let limits = AdmissionLimits { units: 10, wait: Duration::MAX };
        let total = Arc::new(Admission::new(Resource::Queue, metrics::Gauge::noop(), limits, 1))
            .admit(ClientId::Only, 1, None)
            .unwrap();
        let permit = QueuePermit { client: ClientId::Only, _total: total, first_service: None };
        let (reply, mut answer) = tokio::sync::oneshot::channel();
        let pairs = Arc::new([Pair::new(vec![1], vec![0])]);
        queue.push(NewJob { pairs, permit, deadline: None, reply }).unwrap();
        let weak = Arc::downgrade(&queue);
        let timeout = Duration::from_secs(60);
        assert_eq!(check(&weak, timeout, Instant::now() + 2 * timeout), Some(false), "a waiting request does not hang");
        let batch = queue.take().unwrap();
        assert_eq!(check(&weak, timeout, Instant::now()), Some(false));
        assert_eq!(check(&weak, timeout, Instant::now() + 2 * timeout), Some(true));
        assert!(matches!(answer.try_recv().unwrap(), Err(RerankError::Internal(_))));
        drop((batch, queue));
        assert_eq!(check(&weak, timeout, Instant::now()), None);
    }
}
