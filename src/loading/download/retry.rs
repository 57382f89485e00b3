//! Retries with exponential backoff and jitter.

use std::time::Duration;

use super::error::HubError;
use super::options::NetworkPolicy;

/// A longer `Retry-After` counts as this one. [`delay`] limits it further, to [`NetworkPolicy::max_delay`].
const LONGEST_RETRY_AFTER_S: u64 = 24 * 3600;

/// Counts failed attempts and sleeps between them.
#[derive(Debug)]
pub(super) struct Retries<'a> {
    policy: &'a NetworkPolicy,
    failed: u32,
}

impl<'a> Retries<'a> {
    pub(super) fn new(policy: &'a NetworkPolicy) -> Self {
        Self { policy, failed: 0 }
    }

    /// To be called after an attempt that made progress: only attempts without progress count.
    pub(super) fn reset(&mut self) {
        self.failed = 0;
    }

    /// Sleeps before the next attempt.
    ///
    /// # Errors
    /// The error itself if it is not temporary or no attempt is left.
    pub(super) fn wait_after(&mut self, error: HubError) -> Result<(), HubError> {
        let HubError::Unavailable { reason, retry_after } = error else { return Err(error) };
        self.failed += 1;
        if self.failed >= self.policy.attempts {
            let reason = format!("{reason} (gave up after {} attempts)", self.failed);
            return Err(HubError::Unavailable { reason, retry_after });
        }
        let delay = delay(self.policy, self.failed, retry_after, fastrand::f64());
        tracing::warn!(
            "{reason}; attempt {} of {} follows in {:.1} s",
            self.failed + 1,
            self.policy.attempts,
            delay.as_secs_f64()
        );
        std::thread::sleep(delay);
        Ok(())
    }

    /// Runs `attempt` until it succeeds, fails for good, or the attempts are used up.
    ///
    /// # Errors
    /// The last error.
    pub(super) fn run<T>(
        policy: &'a NetworkPolicy,
        mut attempt: impl FnMut() -> Result<T, HubError>,
    ) -> Result<T, HubError> {
        let mut retries = Self::new(policy);
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(error) => retries.wait_after(error)?,
            }
        }
    }
}

/// The delay after `failed` failures: doubled each time, reduced by up to half at random (`jitter` in 0..1) so that
/// clients do not return together, and never shorter than the server asks for, up to the policy's limit.
fn delay(policy: &NetworkPolicy, failed: u32, retry_after: Option<Duration>, jitter: f64) -> Duration {
    let doubled = policy.first_delay.saturating_mul(1 << failed.saturating_sub(1).min(16));
    let jittered = doubled.min(policy.max_delay).mul_f64(1.0 - jitter / 2.0);
    jittered.max(retry_after.unwrap_or_default()).min(policy.max_delay)
}

/// Reads `Retry-After` in seconds. A date is ignored, and the backoff decides.
pub(super) fn parse_retry_after(header: &str) -> Option<Duration> {
    let seconds: u64 = header.trim().parse().ok()?;
    Some(Duration::from_secs(seconds.min(LONGEST_RETRY_AFTER_S)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_with_jitter_up_to_the_limit() {
        let policy = NetworkPolicy::default();
        let seconds = |failed, jitter| delay(&policy, failed, None, jitter).as_secs_f64();
        assert_eq!([seconds(1, 0.0), seconds(2, 0.0), seconds(3, 0.0)], [0.5, 1.0, 2.0]);
        assert_eq!(seconds(3, 1.0), 1.0);
        assert_eq!(seconds(1000, 0.0), policy.max_delay.as_secs_f64());
    }

    #[test]
    fn retry_after_lengthens_the_delay_up_to_the_limit() {
        let policy = NetworkPolicy::default();
        let after = |header| delay(&policy, 1, parse_retry_after(header), 0.0);
        assert_eq!(after("7"), Duration::from_secs(7));
        assert_eq!(after("0"), policy.first_delay);
        assert_eq!(after("999999999"), policy.max_delay);
        assert_eq!(after("Fri, 31 Dec 1999 23:59:59 GMT"), policy.first_delay);
    }

    #[test]
    fn permanent_errors_are_not_retried() {
        let mut calls = 0;
        let result: Result<(), _> = Retries::run(&NetworkPolicy::default(), || {
            calls += 1;
            Err(HubError::Damaged("wrong".to_owned()))
        });
        assert!(result.is_err());
        assert_eq!(calls, 1);
    }
}
