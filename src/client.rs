//! The client that sends a request, known by its API key, and the rate limits of each client.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

use crate::error::RerankError;

/// A client, for sharing queues and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum ClientId {
    /// The server has one key or none, so everybody is the same client.
    #[default]
    Only,
    /// The number of one of several keys.
    Key(u32),
}

/// Limits on what each client may send. `None` is no limit.
#[derive(Debug, Clone, Copy, Default)]
pub struct RateLimits {
    /// Requests per minute; all of them may come at once.
    pub requests_per_minute: Option<NonZeroU32>,
    /// Tokens to score per minute; all of them may come at once.
    pub tokens_per_minute: Option<NonZeroU32>,
}

/// The sender of a request. Clones share what is left of its rate limits.
#[derive(Debug, Clone, Default)]
pub struct Client {
    /// Identifies the client where clients share queues and memory.
    pub id: ClientId,
    /// The name of its API key in metrics; `None` if the server has no keys.
    pub key_name: Option<Arc<str>>,
    requests: Option<Arc<RateLimit>>,
    tokens: Option<Arc<RateLimit>>,
}

/// A rate limit per minute: the generic cell rate algorithm, with a burst of one minute.
#[derive(Debug)]
struct RateLimit {
    /// `requests` or `tokens`, for messages.
    unit: &'static str,
    per_minute: NonZeroU32,
    limiter: DefaultDirectRateLimiter,
}

impl Client {
    pub fn new(id: ClientId, limits: RateLimits) -> Self {
        let limit = |unit, per_minute: Option<NonZeroU32>| per_minute.map(|n| Arc::new(RateLimit::new(unit, n)));
        Self {
            id,
            key_name: None,
            requests: limit("requests", limits.requests_per_minute),
            tokens: limit("tokens", limits.tokens_per_minute),
        }
    }

    /// The same client, with the name of its API key.
    #[must_use]
    pub fn named(self, key_name: &str) -> Self {
        Self { key_name: Some(key_name.into()), ..self }
    }

    /// This client with the id `id`. A rate limit that `old` has with the same amount continues with what is left of it; another one
    /// starts full.
    #[must_use]
    pub fn continuing(&self, old: Option<&Self>, id: ClientId) -> Self {
        let limit = |new: &Option<Arc<RateLimit>>, old: Option<&Arc<RateLimit>>| match (new, old) {
            (Some(new), Some(old)) if new.per_minute == old.per_minute => Some(Arc::clone(old)),
            (new, _) => new.clone(),
        };
        let requests = limit(&self.requests, old.and_then(|old| old.requests.as_ref()));
        let tokens = limit(&self.tokens, old.and_then(|old| old.tokens.as_ref()));
        Self { id, requests, tokens, key_name: self.key_name.clone() }
    }

    /// Counts a request.
    ///
    /// # Errors
    /// [`RerankError::RateLimited`]
    pub fn take_request(&self) -> Result<(), RerankError> {
        self.requests.as_ref().map_or(Ok(()), |limit| limit.take(1))
    }

    /// Counts the tokens that a request has to score.
    ///
    /// # Errors
    /// [`RerankError::RateLimited`]; [`RerankError::TooMuchWork`] if the request alone exceeds the limit of a minute.
    pub fn take_tokens(&self, tokens: usize) -> Result<(), RerankError> {
        self.tokens.as_ref().map_or(Ok(()), |limit| limit.take(tokens))
    }
}

impl RateLimit {
    fn new(unit: &'static str, per_minute: NonZeroU32) -> Self {
        Self { unit, per_minute, limiter: RateLimiter::direct(Quota::per_minute(per_minute)) }
    }

    fn take(&self, count: usize) -> Result<(), RerankError> {
        let limit = self.per_minute.get();
        let too_much = || RerankError::TooMuchWork { tokens: count, limit: limit as usize };
        let Some(count) = NonZeroU32::new(u32::try_from(count).map_err(|_| too_much())?) else { return Ok(()) };
        let refused = match self.limiter.check_n(count) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(refused)) => refused,
            Err(_) => return Err(too_much()),
        };
        let wait: Duration = refused.wait_time_from(DefaultClock::default().now());
        let retry_after_s = wait.as_secs_f64().ceil().max(1.0) as u64;
        Err(RerankError::RateLimited { limit, unit: self.unit, retry_after_s })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minutes_quota_may_be_used_at_once_and_more_is_refused() {
        let limits = RateLimits { requests_per_minute: NonZeroU32::new(2), tokens_per_minute: NonZeroU32::new(1000) };
        let client = Client::new(ClientId::Key(0), limits);
        let clone = client.clone();
        assert!(client.take_request().is_ok() && clone.take_request().is_ok());
        assert!(matches!(
            client.take_request(),
            Err(RerankError::RateLimited { limit: 2, unit: "requests", retry_after_s: 1..=30 })
        ));
        assert!(client.take_tokens(900).is_ok());
        assert!(matches!(client.take_tokens(900), Err(RerankError::RateLimited { unit: "tokens", .. })));
        assert!(matches!(client.take_tokens(1001), Err(RerankError::TooMuchWork { tokens: 1001, limit: 1000 })));
        assert!(client.take_tokens(0).is_ok(), "a request without tokens is always allowed");
    }

    #[test]
    fn without_limits_everything_is_allowed() {
        let client = Client::default();
        assert!((0..1000).all(|_| client.take_request().is_ok() && client.take_tokens(usize::MAX).is_ok()));
    }
}
