//! What callers and workers exchange.

use std::time::{Duration, Instant};

/// Limits of one model's queue and batches.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerLimits {
    /// Token budget of one batch. A longer pair runs alone.
    pub max_batch_tokens: usize,
    /// Tokens that may be admitted and not yet computed.
    pub max_queue_tokens: usize,
    /// Time that waiting tokens may take to compute, at the measured speed.
    pub max_queue_wait: Duration,
    /// A batch that runs longer than this ends the process: the device hangs.
    pub batch_timeout: Duration,
}

/// The logits of one request's pairs, and where the time went.
#[derive(Debug)]
pub struct Scores {
    /// One for each pair, in the request's order.
    pub logits: Vec<f32>,
    /// From the request's arrival in the queue to its first batch.
    pub queued: Duration,
    /// From its first batch to its last.
    pub computed: Duration,
}

/// When a request's answer is no longer useful.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    pub at: Instant,
    /// Seconds from the request's arrival, for the message.
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
