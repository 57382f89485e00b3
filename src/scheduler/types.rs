//! Limits, deadlines and scores: the types that callers of the scheduler see.

use std::time::{Duration, Instant};

use crate::admission::Permit;
use crate::client::ClientId;

/// Limits of one model's queue and batches.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerLimits {
    /// Token budget of one batch. A pair longer than the budget is a batch of its own.
    pub max_batch_tokens: usize,
    /// Maximum tokens that are admitted and not yet computed.
    pub max_queue_tokens: usize,
    /// Maximum time that a new request waits for the requests in the first level of the queue, at the measured speed.
    pub max_queue_wait: Duration,
    /// Maximum time of one batch. If it runs longer, the device counts as hung and the process ends.
    pub batch_timeout: Duration,
}

/// The logits of one request's pairs, and its times.
#[derive(Debug)]
pub struct Scores {
    /// One for each pair, in the request's order.
    pub logits: Vec<f32>,
    /// From the request's arrival in the queue to its first batch.
    pub queued: Duration,
    /// From the start of its first batch to the end of its last.
    pub computed: Duration,
    /// Batches that contained pairs of the request.
    pub batches: usize,
}

/// The time at which a request without a result is answered with an error.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    pub at: Instant,
    /// Seconds from [`Deadline::after`] to the deadline, for the error message.
    pub seconds: u64,
}

impl Deadline {
    /// `seconds` from now.
    pub fn after(seconds: u64) -> Self {
        Self { at: Instant::now() + Duration::from_secs(seconds), seconds }
    }

    pub(super) fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }
}

/// A request's admission to the queue. Dropping it makes room for other requests.
#[derive(Debug)]
pub struct QueuePermit {
    /// Whose request it is.
    pub(super) client: ClientId,
    /// All tokens of the request.
    pub(super) _total: Permit,
    /// Its tokens in the first level of the queue, until they are in batches.
    pub(super) first_service: Option<Permit>,
}
