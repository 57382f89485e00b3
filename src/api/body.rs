//! Request bodies. Memory is reserved for the bytes that have arrived, not for the announced length; a client must send at a
//! minimum rate.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::error::ApiError;
use crate::error::RerankError;

/// The server's limits on connections and requests; `TextLimits` has those on the text.
#[derive(Debug, Clone, Copy)]
pub struct ApiLimits {
    /// Maximum open connections.
    pub max_connections: usize,
    /// Maximum documents of one request.
    pub max_documents: usize,
    /// Maximum bytes of one body.
    pub max_body_bytes: usize,
    /// Maximum bytes of memory for all requests, and for all responses that are not yet written to their sockets.
    pub max_inflight_bytes: usize,
    /// Maximum time from the end of a request's header to the end of its body.
    pub body_timeout: Duration,
    /// Maximum time from a complete body to the response, in seconds.
    pub request_timeout_s: u64,
}

/// Initial capacity of a body's buffer, in bytes. It doubles when it is full.
const INITIAL_CAPACITY: usize = 4096;
/// Bytes of memory that a request takes for each byte of its body: the body, its texts, their tokens and the response.
const MEMORY_PER_BODY_BYTE: usize = 4;
/// Minimum bytes of a body that arrive in each [`RATE_WINDOW`].
const MIN_BYTES_PER_WINDOW: usize = 1024;
const RATE_WINDOW: Duration = Duration::from_secs(5);

/// Maximum bytes of a refused body that are read and discarded. A client that is still sending may miss the response if its
/// bytes are not read.
const MAX_DRAINED_BYTES: usize = 64 << 20;
const MAX_DRAIN_TIME: Duration = Duration::from_secs(10);
/// Maximum refused bodies that are drained at the same time. Further ones are not drained.
const MAX_DRAINS: usize = 64;

/// The memory budget of all requests.
#[derive(Debug)]
pub(super) struct MemoryBudget {
    /// One permit per KiB.
    memory: Arc<Semaphore>,
    /// One permit per refused body that is being drained.
    drains: Arc<Semaphore>,
}

/// Part of the memory budget. Dropping it returns the memory.
#[derive(Debug)]
pub(super) struct MemoryShare {
    budget: Arc<Semaphore>,
    held: Option<OwnedSemaphorePermit>,
    kib: usize,
}

/// A complete body and its share of the memory budget.
pub(super) struct ReadBody {
    pub(super) bytes: Vec<u8>,
    pub(super) share: MemoryShare,
}

impl MemoryBudget {
    pub(super) fn new(bytes: usize) -> Self {
        let kib = (bytes / 1024).clamp(1, Semaphore::MAX_PERMITS);
        Self { memory: Arc::new(Semaphore::new(kib)), drains: Arc::new(Semaphore::new(MAX_DRAINS)) }
    }

    fn share(&self) -> MemoryShare {
        MemoryShare { budget: Arc::clone(&self.memory), held: None, kib: 0 }
    }

    /// Reads a whole body.
    ///
    /// # Errors
    /// 413 if it is too long, without reading it if Content-Length says so; 415 if it is compressed; 408 if it arrives too
    /// slowly; 400 if it ends early; 503 if the memory budget is used up. The rest of a refused body is drained in the
    /// background.
    pub(super) async fn read(
        &self,
        headers: &HeaderMap,
        mut body: Body,
        limits: &ApiLimits,
    ) -> Result<ReadBody, ApiError> {
        let read = async {
            check_headers(headers, limits)?;
            self.collect(&mut body, limits).await
        };
        let result = read.await;
        if result.is_err() {
            self.drain(headers, body);
        }
        result
    }

    /// Copies the frames of a body into one buffer, because a frame keeps the connection's whole read buffer in memory.
    async fn collect(&self, body: &mut Body, limits: &ApiLimits) -> Result<ReadBody, ApiError> {
        let mut share = self.share();
        let mut bytes: Vec<u8> = Vec::new();
        let deadline = Instant::now() + limits.body_timeout;
        // The end of the current rate window, and the length that the body must have by then.
        let mut window = (Instant::now() + RATE_WINDOW, MIN_BYTES_PER_WINDOW);
        loop {
            let until = deadline.min(window.0);
            let frame = match tokio::time::timeout_at(until, body.frame()).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => return Err(ApiError::bad_request(format!("the body ended early: {error}"))),
                Ok(None) => {
                    share.grow(MEMORY_PER_BODY_BYTE * bytes.len())?;
                    return Ok(ReadBody { bytes, share });
                }
                Err(_) if until < deadline && bytes.len() >= window.1 => {
                    window = (Instant::now() + RATE_WINDOW, bytes.len() + MIN_BYTES_PER_WINDOW);
                    continue;
                }
                Err(_) => return Err(too_slow(limits)),
            };
            let Some(data) = frame.data_ref() else { continue }; // trailers
            if bytes.len() + data.len() > limits.max_body_bytes {
                return Err(too_large(limits));
            }
            if bytes.len() + data.len() > bytes.capacity() {
                let capacity = (bytes.len() + data.len()).next_power_of_two().max(INITIAL_CAPACITY);
                share.grow(capacity.min(limits.max_body_bytes))?;
                bytes.reserve_exact(capacity.min(limits.max_body_bytes) - bytes.len());
            }
            bytes.extend_from_slice(data);
            if Instant::now() >= window.0 {
                if bytes.len() < window.1 {
                    return Err(too_slow(limits));
                }
                window = (Instant::now() + RATE_WINDOW, bytes.len() + MIN_BYTES_PER_WINDOW);
            }
        }
    }

    /// Reads and discards the rest of a refused body, within limits, so that a client that is still sending gets the response.
    pub(super) fn drain(&self, headers: &HeaderMap, mut body: Body) {
        // Reading would make hyper send 100 Continue, which asks the client for the body.
        if headers.contains_key(header::EXPECT) {
            return;
        }
        let Ok(slot) = Arc::clone(&self.drains).try_acquire_owned() else { return };
        tokio::spawn(async move {
            let discard = async {
                let mut left = MAX_DRAINED_BYTES;
                while let Some(Ok(frame)) = body.frame().await {
                    let Some(rest) = left.checked_sub(frame.data_ref().map_or(1, Bytes::len)) else { break };
                    left = rest;
                }
            };
            tokio::time::timeout(MAX_DRAIN_TIME, discard).await.ok();
            drop(slot);
        });
    }
}

impl MemoryShare {
    /// Grows the share to `bytes` bytes.
    ///
    /// # Errors
    /// 503 if the budget is used up.
    pub(super) fn grow(&mut self, bytes: usize) -> Result<(), ApiError> {
        let more = bytes.div_ceil(1024).saturating_sub(self.kib);
        if more == 0 {
            return Ok(());
        }
        let count = u32::try_from(more).unwrap_or(u32::MAX);
        let new = Arc::clone(&self.budget).try_acquire_many_owned(count);
        let new = new.map_err(|_| ApiError::from(RerankError::Overloaded { retry_after_s: 1 }))?;
        match &mut self.held {
            Some(held) => held.merge(new),
            None => self.held = Some(new),
        }
        self.kib += more;
        Ok(())
    }

    /// Attaches the share to the response's bytes. The memory is returned when they are written to the socket or the connection
    /// ends.
    ///
    /// # Errors
    /// 503 if the budget has no room for the response.
    pub(super) async fn attach(mut self, response: Response) -> Result<Response, ApiError> {
        struct Held {
            bytes: Bytes,
            _share: MemoryShare,
        }
        impl AsRef<[u8]> for Held {
            fn as_ref(&self) -> &[u8] {
                &self.bytes
            }
        }
        let (parts, body) = response.into_parts();
        let collected = body.collect().await.map_err(|error| RerankError::Internal(error.into()))?;
        let bytes = collected.to_bytes();
        self.grow(bytes.len())?;
        Ok(Response::from_parts(parts, Body::from(Bytes::from_owner(Held { bytes, _share: self }))))
    }
}

fn check_headers(headers: &HeaderMap, limits: &ApiLimits) -> Result<(), ApiError> {
    if let Some(encoding) = headers.get(header::CONTENT_ENCODING).filter(|value| *value != "identity") {
        let message = format!("content-encoding {encoding:?} is not supported; send the JSON uncompressed");
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    if content_length(headers).is_some_and(|length| length > limits.max_body_bytes) {
        return Err(too_large(limits));
    }
    Ok(())
}

fn content_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn too_large(limits: &ApiLimits) -> ApiError {
    let message = format!("the body has more than {} bytes; send fewer documents at a time", limits.max_body_bytes);
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
}

fn too_slow(limits: &ApiLimits) -> ApiError {
    let (seconds, window) = (limits.body_timeout.as_secs(), RATE_WINDOW.as_secs());
    let message = format!(
        "the body did not arrive in time: it must be complete within {seconds} s, at {MIN_BYTES_PER_WINDOW} bytes per {window} s \
         or more"
    );
    ApiError::new(StatusCode::REQUEST_TIMEOUT, message)
}
