//! Error responses, and the table from [`RerankError`] to HTTP statuses. `body.rs`, `host.rs` and `ops.rs` choose the statuses of
//! errors of HTTP itself.
//!
//! One body serves the clients of all dialects but `texts` and Weaviate's: `code`, `message` and `data` as SiliconFlow has them,
//! `detail` as a string, and `error` with the `type` that SDKs map to their exception classes. It never contains `results`.

use std::any::Any;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::observe::RefusalReason;
use crate::error::RerankError;

/// An error response.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    /// SiliconFlow's number for this error if there is one, else the status.
    code: u16,
    message: String,
    retry_after_s: Option<u64>,
    closes_connection: bool,
    /// Whether `error` in the body is a text ([`TextErrorBody`]).
    has_text: bool,
    /// The cause in metrics.
    cause_name: &'static str,
    /// The reason for the log, if the message may repeat parts of the request's text.
    log_reason: Option<String>,
    cause: Option<anyhow::Error>,
}

/// The body of an error, in every dialect but `texts` and Weaviate's.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ErrorBody {
    /// SiliconFlow's number (20012 unknown model, 20015 bad parameter, 50505 overloaded), else the HTTP status.
    code: u16,
    /// What is wrong, and how to correct it.
    message: String,
    /// Always null.
    #[schema(value_type = Option<String>)]
    data: (),
    /// The message again, where some clients expect it.
    detail: String,
    error: ErrorDetail,
}

/// The body of errors for clients of text-embeddings-inference and Weaviate, which read `error` as a text.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TextErrorBody {
    /// What is wrong, and how to correct it.
    error: String,
    /// `Validation`, `Overloaded` or `Backend`.
    error_type: &'static str,
    /// As in other errors.
    code: u16,
    /// The message again.
    message: String,
    /// Always null.
    #[schema(value_type = Option<String>)]
    data: (),
    /// The message again.
    detail: String,
}

/// The part of an error body that SDKs map to exception classes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ErrorDetail {
    message: String,
    /// One of `invalid_request_error`, `authentication_error`, `not_found_error`, `request_too_large`, `rate_limit_error`,
    /// `overloaded_error`, `timeout_error`, `api_error`.
    #[serde(rename = "type")]
    kind: &'static str,
    code: u16,
}

impl ApiError {
    /// An error with the status as its code.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            code: status.as_u16(),
            message: message.into(),
            retry_after_s: None,
            closes_connection: false,
            has_text: false,
            cause_name: cause_of(status),
            log_reason: None,
            cause: None,
        }
    }

    /// Status 400 with SiliconFlow's number for a bad parameter.
    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self { code: 20015, ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// No key, or a wrong one.
    pub(super) fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Invalid token")
    }

    /// Adds `Retry-After`.
    pub(super) fn retry_after(self, seconds: u64) -> Self {
        Self { retry_after_s: Some(seconds), ..self }
    }

    /// Adds `Connection: close`.
    pub(super) fn closing_connection(self) -> Self {
        Self { closes_connection: true, ..self }
    }

    /// With a [`TextErrorBody`].
    pub(super) fn with_text(self) -> Self {
        Self { has_text: true, ..self }
    }

    /// For a request whose body is not read, so that its dialect is unknown: with a [`TextErrorBody`] on the paths of
    /// text-embeddings-inference and Weaviate.
    pub(super) fn for_path(self, path: &str) -> Self {
        if matches!(path, "/rerank" | "/meta") { self.with_text() } else { self }
    }

    /// text-embeddings-inference's name for the kind of error.
    fn text_kind(&self) -> &'static str {
        match self.status.as_u16() {
            429 | 503 => "Overloaded",
            500.. => "Backend",
            _ => "Validation",
        }
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 | 403 => "authentication_error",
            404 | 405 => "not_found_error",
            408 | 504 => "timeout_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        }
    }
}

/// The cause, in metrics, of an error that has no other cause than its status.
fn cause_of(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "unauthorized",
        403 => "forbidden_host",
        404 => "not_found",
        405 => "method",
        408 => "body_too_slow",
        413 => "body_too_large",
        415 => "content_encoding",
        503 => "unhealthy",
        500.. => "internal",
        _ => "invalid",
    }
}

impl From<RerankError> for ApiError {
    fn from(error: RerankError) -> Self {
        let (message, cause_name) = (error.to_string(), error.cause());
        let api_error = match error {
            RerankError::UnknownModel { .. } => Self { code: 20012, ..Self::new(StatusCode::BAD_REQUEST, message) },
            RerankError::Invalid { field, .. } => {
                Self { log_reason: Some(format!("{field} is not valid")), ..Self::bad_request(message) }
            }
            RerankError::TooMuchWork { .. } | RerankError::CannotFinish { .. } => {
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, message)
            }
            RerankError::Overloaded { retry_after_s, .. } => Self {
                code: 50505,
                retry_after_s: Some(retry_after_s),
                ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
            },
            RerankError::RateLimited { retry_after_s, .. } => {
                Self { retry_after_s: Some(retry_after_s), ..Self::new(StatusCode::TOO_MANY_REQUESTS, message) }
            }
            RerankError::OutOfMemory | RerankError::Loading | RerankError::ShuttingDown => {
                Self { code: 50505, retry_after_s: Some(1), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message) }
            }
            RerankError::Deadline { .. } => Self::new(StatusCode::GATEWAY_TIMEOUT, message),
            RerankError::NonFiniteScore => Self::new(StatusCode::INTERNAL_SERVER_ERROR, message),
            RerankError::Internal(cause) => {
                Self { cause: Some(cause), ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, message) }
            }
        };
        Self { cause_name, ..api_error }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if let Some(cause) = &self.cause {
            tracing::error!("internal error: {cause:#}");
        }
        let reason = self.log_reason.clone().unwrap_or_else(|| self.message.clone());
        let (code, message, detail) = (self.code, self.message.clone(), self.message.clone());
        let mut response = if self.has_text {
            let (error, error_type) = (self.message.clone(), self.text_kind());
            (self.status, Json(TextErrorBody { error, error_type, code, message, data: (), detail })).into_response()
        } else {
            let error = ErrorDetail { message: self.message.clone(), kind: self.kind(), code };
            (self.status, Json(ErrorBody { code, message, data: (), detail, error })).into_response()
        };
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.closes_connection {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response.extensions_mut().insert(RefusalReason { reason, cause: self.cause_name });
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// The response of a handler that panicked: status 500 with the usual body; the panic's message is logged.
pub(super) fn from_panic(panic: Box<dyn Any + Send>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    let cause = anyhow::anyhow!("a handler panicked: {}", text.unwrap_or("without a message"));
    ApiError::from(RerankError::Internal(cause)).into_response()
}
