//! For every request a log line, metrics, and its id in a response header. The text of a request is not logged.

use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;
use uuid::Uuid;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Maximum characters of a client's request id.
const MAX_ID_CHARS: usize = 128;
/// Maximum characters of a refusal's reason in the log.
const MAX_REASON_CHARS: usize = 200;

/// A request's id: the client's `x-request-id`, or a new one.
#[derive(Debug, Clone)]
pub(super) struct RequestId(pub(super) String);

/// What a handler adds to the log line of a response, in the response's extensions.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RequestStats {
    pub(super) documents: usize,
    pub(super) tokens: usize,
}

/// Why a request got an error response, for the log line; in the response's extensions.
#[derive(Debug, Clone)]
pub(super) struct RefusalReason(pub(super) String);

/// A request while it is handled. If it is dropped before [`InFlight::answered`], the connection has ended.
struct InFlight {
    method: Method,
    route: String,
    start: Instant,
    span: tracing::Span,
    answered: bool,
}

impl InFlight {
    fn answered(&mut self, response: &Response) {
        self.answered = true;
        let status = response.status().as_u16();
        let RequestStats { documents, tokens } = response.extensions().get().copied().unwrap_or_default();
        let (method, route, ms) = (&self.method, self.route.as_str(), self.ms());
        let _entered = self.span.enter();
        if matches!(route, "/health" | "/ready" | "/metrics") {
            tracing::debug!(%method, route, status, "probe");
        } else if let Some(RefusalReason(reason)) = response.extensions().get() {
            let reason: String = reason.chars().take(MAX_REASON_CHARS).collect();
            let outcome = if status < 500 || status == 503 { "refused" } else { "failed" };
            tracing::info!(%method, route, status, reason, ms, "{outcome}");
        } else {
            tracing::info!(%method, route, status, documents, tokens, ms, "answered");
        }
        self.count(&status.to_string());
    }

    fn ms(&self) -> f64 {
        (self.start.elapsed().as_secs_f64() * 1e4).round() / 10.0
    }

    fn count(&self, status: &str) {
        let labels = [("route", self.route.clone()), ("status", status.to_owned())];
        metrics::counter!("rerankd_requests_total", &labels).increment(1);
        metrics::histogram!("rerankd_request_seconds", "route" => self.route.clone())
            .record(self.start.elapsed().as_secs_f64());
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.answered {
            let _entered = self.span.enter();
            tracing::info!(method = %self.method, route = self.route, ms = self.ms(), "cancelled by the client");
            self.count("cancelled");
        }
    }
}

pub(super) async fn observe(mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let route =
        request.extensions().get::<MatchedPath>().map_or_else(|| "unknown".to_owned(), |path| path.as_str().to_owned());
    let span = tracing::info_span!("request", id = %id);
    let mut in_flight =
        InFlight { method: request.method().clone(), route, start: Instant::now(), span, answered: false };
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).instrument(in_flight.span.clone()).await;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    in_flight.answered(&response);
    response
}

/// The client's id if it is short and every character is safe in a log line, else a new UUID (version 7: sorts by time).
fn request_id(headers: &HeaderMap) -> String {
    let is_plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.' | b':' | b'/' | b'+');
    let plain = |id: &&str| (1..=MAX_ID_CHARS).contains(&id.len()) && id.bytes().all(is_plain);
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok()).filter(plain);
    given.map_or_else(|| Uuid::now_v7().to_string(), str::to_owned)
}
