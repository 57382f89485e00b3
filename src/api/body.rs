//! Reading bodies with bounded memory and patience.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::ApiError;
use crate::error::RerankError;

/// The server's limits on requests, beside those of their text.
#[derive(Debug, Clone, Copy)]
pub struct ApiLimits {
    /// Documents of one request.
    pub max_documents: usize,
    /// Bytes of one body.
    pub max_body_bytes: usize,
    /// Bytes of all bodies that are being read or answered.
    pub max_inflight_bytes: usize,
    /// From a request's header to its last byte.
    pub body_timeout: Duration,
    /// From a request's body to its answer.
    pub request_timeout_s: u64,
}

/// The memory that all bodies share, counted in KiB.
#[derive(Debug)]
pub(super) struct BodyBudget(Arc<Semaphore>);

/// A body, and its share of the memory for as long as it lives.
pub(super) struct ReadBody {
    pub(super) bytes: Bytes,
    _share: OwnedSemaphorePermit,
}

impl BodyBudget {
    pub(super) fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new((bytes / 1024).clamp(1, Semaphore::MAX_PERMITS))))
    }

    /// Reads a whole body. What is declared too long is refused before any of it is read.
    pub(super) async fn read(&self, request: Request, limits: &ApiLimits) -> Result<ReadBody, ApiError> {
        let (parts, body) = request.into_parts();
        if let Some(encoding) = parts.headers.get(header::CONTENT_ENCODING).filter(|value| *value != "identity") {
            let message = format!("content-encoding {encoding:?} is not supported; send the JSON as it is");
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let declared = content_length(&parts.headers);
        if declared.is_some_and(|length| length > limits.max_body_bytes) {
            return Err(too_large(limits));
        }
        let share = self.share(declared.unwrap_or(limits.max_body_bytes))?;
        let read = Limited::new(body, limits.max_body_bytes).collect();
        match tokio::time::timeout(limits.body_timeout, read).await {
            Ok(Ok(body)) => Ok(ReadBody { bytes: body.to_bytes(), _share: share }),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large(limits)),
            Ok(Err(error)) => Err(ApiError::bad_request(format!("the body ended early: {error}"))),
            Err(_) => {
                let message = format!("the body was not complete after {} s", limits.body_timeout.as_secs());
                Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
            }
        }
    }

    fn share(&self, bytes: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
        let share = Arc::clone(&self.0).try_acquire_many_owned(kib);
        share.map_err(|_| RerankError::Overloaded { retry_after_s: 1 }.into())
    }
}

fn content_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn too_large(limits: &ApiLimits) -> ApiError {
    let message = format!("the body has more than {} bytes; send fewer documents at a time", limits.max_body_bytes);
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
}
