//! Reads whole request bodies from the stream of `request_body.rs`. Memory is reserved as bytes arrive, not for the announced
//! length, and a client must send at a minimum rate.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use http_body_util::BodyExt;
use tokio::time::Instant;

use super::error::ApiError;
use crate::admission::{Admission, AdmissionLimits, Permit, Resource};
use crate::client::{Client, ClientId};
use crate::error::RerankError;
use crate::telemetry::metrics;

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
/// Bytes of memory charged for each byte of a body: an estimate of the body, its texts, their tokens and the response.
const MEMORY_PER_BODY_BYTE: usize = 4;
/// Minimum bytes of a body that arrive in each [`RATE_WINDOW`].
const MIN_BYTES_PER_WINDOW: usize = 1024;
const RATE_WINDOW: Duration = Duration::from_secs(5);

/// The memory budget of all requests, in bytes.
#[derive(Debug)]
pub(super) struct MemoryBudget(Arc<Admission>);

/// A complete body and its share of the memory budget.
pub(super) struct ReadBody {
    pub(super) bytes: Vec<u8>,
    pub(super) share: Permit,
}

impl MemoryBudget {
    pub(super) fn new(bytes: usize) -> Self {
        let limits = AdmissionLimits { units: bytes, wait: Duration::MAX };
        metrics::INFLIGHT_MAX_BYTES.only_gauge().set(bytes as f64);
        let gauge = metrics::INFLIGHT_BYTES.only_gauge();
        Self(Arc::new(Admission::new(Resource::Memory, gauge, limits, 1)))
    }

    /// Reads a whole body of a client.
    ///
    /// # Errors
    /// 429 if the client's rate limit is used up; 413 if it is too long, without reading it if Content-Length says so; 415 if it
    /// is compressed; 408 if it arrives too slowly; 400 if it ends early; 503 if the memory budget is used up.
    pub(super) async fn read(
        &self,
        client: &Client,
        headers: &HeaderMap,
        body: Body,
        limits: &ApiLimits,
    ) -> Result<ReadBody, ApiError> {
        client.take_request()?;
        check_headers(headers, limits)?;
        self.collect(client.id, body, limits).await
    }

    /// Copies the frames of a body into one buffer, because a frame keeps the connection's whole read buffer in memory.
    async fn collect(&self, client: ClientId, mut body: Body, limits: &ApiLimits) -> Result<ReadBody, ApiError> {
        let mut share = self.0.admit(client, 0, None)?;
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
                    share.grow_to(MEMORY_PER_BODY_BYTE * bytes.len())?;
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
                share.grow_to(capacity.min(limits.max_body_bytes))?;
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
}

/// Attaches a request's share of the memory budget to the response's bytes. The share is given back when they are written to the
/// socket or the connection ends.
///
/// # Errors
/// 503 if the budget has no room for the response.
pub(super) async fn hold_until_written(mut share: Permit, response: Response) -> Result<Response, ApiError> {
    struct Held {
        bytes: Bytes,
        _share: Permit,
    }
    impl AsRef<[u8]> for Held {
        fn as_ref(&self) -> &[u8] {
            &self.bytes
        }
    }
    let (parts, body) = response.into_parts();
    let collected = body.collect().await.map_err(|error| RerankError::Internal(error.into()))?;
    let bytes = collected.to_bytes();
    share.grow_to(bytes.len())?;
    Ok(Response::from_parts(parts, Body::from(Bytes::from_owner(Held { bytes, _share: share }))))
}

fn check_headers(headers: &HeaderMap, limits: &ApiLimits) -> Result<(), ApiError> {
    if headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        // The header is not quoted: the error has the message three times, and each unprintable byte takes several bytes of JSON.
        let message = "content-encoding: only \"identity\" is supported; send the JSON uncompressed".to_owned();
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
