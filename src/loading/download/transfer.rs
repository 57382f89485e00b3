//! The transfer of one blob: requests, resumed where the last one stopped, until all bytes are there and verified.

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::error::HubError;
use super::http::{ContentRange, HttpClient};
use super::names::Revision;
use super::options::NetworkPolicy;
use super::partial::Partial;
use super::response::{BodyAction, FileMetadata, body_action, strong_validator};
use super::retry::Retries;
use crate::telemetry;

/// An attempt that brings fewer new bytes counts as one without progress.
const PROGRESS_BYTES: u64 = 1 << 20;
const BUFFER_BYTES: usize = 1 << 16;

/// One file to transfer.
pub(super) struct Transfer<'a> {
    pub(super) client: &'a HttpClient,
    pub(super) policy: &'a NetworkPolicy,
    pub(super) at: &'a Revision,
    pub(super) file: &'a str,
    pub(super) metadata: &'a FileMetadata,
}

impl Transfer<'_> {
    /// Downloads into `incomplete`, continuing what is there, and returns the SHA-256 of the verified, synced file.
    ///
    /// # Errors
    /// The hub fails after all retries, the content is not the announced one (the file is removed), or the cache cannot be
    /// written (the file is kept for the next start).
    pub(super) fn run(&self, incomplete: &Path) -> Result<String, HubError> {
        let mut partial = Partial::open(incomplete, &self.metadata.etag)?;
        let mut may_restart = true;
        let size = self.metadata.size.map_or_else(|| "an unknown number of".to_owned(), |size| size.to_string());
        tracing::info!(
            "downloading {} of {}: {size} bytes, {} of them from an earlier attempt",
            self.file,
            self.at,
            partial.length
        );
        loop {
            self.receive(&mut partial)?;
            match partial.finish(&self.metadata.etag) {
                // Parts of different requests may not fit together: request the whole file, once.
                Err(HubError::Damaged(reason)) if may_restart && partial.is_resumed => {
                    tracing::warn!("{}: the resumed file is damaged ({reason}); downloading it again", self.file);
                    may_restart = false;
                    partial.clear()?;
                }
                Err(HubError::Damaged(reason)) => {
                    fs::remove_file(incomplete).map_err(HubError::cache("remove", incomplete))?;
                    return Err(HubError::Damaged(format!("{} arrived damaged and was removed: {reason}", self.file)));
                }
                result => return result,
            }
        }
    }

    /// Repeats requests until all bytes are there.
    fn receive(&self, partial: &mut Partial) -> Result<(), HubError> {
        let bar = telemetry::progress_bytes(
            self.metadata.size.unwrap_or(0),
            &format!("downloading {} of {}", self.file, self.at.repository),
        );
        let mut retries = Retries::new(self.policy);
        let mut progress_mark = partial.length;
        let result = loop {
            match self.attempt(partial, &bar) {
                Ok(()) => break Ok(()),
                Err(error) => {
                    if partial.length >= progress_mark + PROGRESS_BYTES {
                        progress_mark = partial.length;
                        retries.reset();
                    }
                    if let Err(error) = retries.wait_after(error) {
                        break Err(error);
                    }
                }
            }
        };
        bar.finish_and_clear();
        result
    }

    /// Makes one request. It ends with the whole file, or with an error after a part of it.
    fn attempt(&self, partial: &mut Partial, bar: &ProgressBar) -> Result<(), HubError> {
        if let Some(size) = self.metadata.size {
            if partial.length == size {
                return Ok(());
            }
            if partial.length > size {
                partial.clear()?;
            }
        } else if partial.length > 0 && partial.validator.is_none() {
            partial.clear()?;
        }
        let range = ContentRange { offset: partial.length, if_range: partial.validator.as_deref() };
        let content = self.client.content(self.at, &self.metadata.commit, self.file, range)?;
        let action = body_action(&content.headers, partial.length, self.metadata.size, partial.validator.as_deref())?;
        let total = match action {
            BodyAction::Append { total } => {
                partial.is_resumed = true;
                total
            }
            BodyAction::Restart { total } => {
                partial.clear()?;
                total
            }
            BodyAction::Discard { reason } => {
                partial.clear()?;
                return Err(HubError::unavailable(format!("{}: {reason}; starting over", self.file)));
            }
        };
        partial.validator = strong_validator(content.headers.etag.as_deref());
        if let Some(total) = total {
            bar.set_length(total);
        }
        bar.set_position(partial.length);
        self.copy(content.body, partial, total, bar)
    }

    fn copy(
        &self,
        mut body: Box<dyn Read>,
        partial: &mut Partial,
        total: Option<u64>,
        bar: &ProgressBar,
    ) -> Result<(), HubError> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut rate = RateWindow::new(self.policy, Instant::now());
        loop {
            let read = match body.read(&mut buffer) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.interrupted(partial.length, total, &error.to_string())),
            };
            if read == 0 {
                return match total {
                    Some(total) if partial.length < total => {
                        Err(self.interrupted(partial.length, Some(total), "the connection ended"))
                    }
                    _ => Ok(()),
                };
            }
            if total.is_some_and(|total| partial.length + read as u64 > total) {
                partial.clear()?;
                return Err(HubError::Damaged(format!("{}: the body is longer than announced", self.file)));
            }
            partial.append(&buffer[..read])?;
            bar.set_position(partial.length);
            if total == Some(partial.length) {
                return Ok(());
            }
            rate.check(read as u64, Instant::now())
                .map_err(|reason| self.interrupted(partial.length, total, &reason))?;
        }
    }

    fn interrupted(&self, length: u64, total: Option<u64>, reason: &str) -> HubError {
        let total = total.map_or_else(|| "an unknown number of".to_owned(), |total| total.to_string());
        HubError::unavailable(format!("{}: interrupted after {length} of {total} bytes: {reason}", self.file))
    }
}

/// Ends a body that arrives too slowly, which the timeout of a single read does not notice.
struct RateWindow {
    start: Instant,
    received: u64,
    window: Duration,
    minimum: u64,
}

impl RateWindow {
    fn new(policy: &NetworkPolicy, now: Instant) -> Self {
        let minimum = (policy.min_bytes_per_second as f64 * policy.read_timeout.as_secs_f64()) as u64;
        Self { start: now, received: 0, window: policy.read_timeout, minimum }
    }

    fn check(&mut self, received: u64, now: Instant) -> Result<(), String> {
        self.received += received;
        let elapsed = now.duration_since(self.start);
        if elapsed < self.window {
            return Ok(());
        }
        if self.received < self.minimum {
            return Err(format!("only {} bytes in {:.1} s", self.received, elapsed.as_secs_f64()));
        }
        (self.start, self.received) = (now, 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_below_the_minimum_over_a_whole_window_is_an_error() {
        let policy = NetworkPolicy {
            read_timeout: Duration::from_secs(10),
            min_bytes_per_second: 100,
            ..NetworkPolicy::default()
        };
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut rate = RateWindow::new(&policy, start);
        assert!(rate.check(1, at(9)).is_ok());
        assert!(rate.check(999, at(10)).is_ok());
        assert!(rate.check(999, at(19)).is_ok());
        assert!(rate.check(0, at(20)).is_err());
    }
}
