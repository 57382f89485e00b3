//! Every request leaves a line in the log, a count in the metrics, and its id in the answer. Never its text.

use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;
use uuid::Uuid;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A request's id, from its client or ours.
#[derive(Debug, Clone)]
pub(super) struct RequestId(pub(super) String);

/// What a handler has to say for the log line.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RequestStats {
    pub(super) documents: usize,
    pub(super) tokens: usize,
}

pub(super) async fn observe(mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = request_id(request.headers());
    let route =
        request.extensions().get::<MatchedPath>().map_or_else(|| "unknown".to_owned(), |path| path.as_str().to_owned());
    let method = request.method().clone();
    let span = tracing::info_span!("request", id = %id);
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).instrument(span.clone()).await;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let (status, took) = (response.status().as_u16(), start.elapsed());
    let RequestStats { documents, tokens } = response.extensions().get().copied().unwrap_or_default();
    let _entered = span.entered();
    if matches!(route.as_str(), "/health" | "/ready" | "/metrics") {
        tracing::debug!(%method, route, status, "probe");
    } else {
        let ms = took.as_secs_f64() * 1e3;
        tracing::info!(%method, route, status, documents, tokens, ms = (ms * 10.0).round() / 10.0, "answered");
    }
    metrics::counter!("rerankd_requests_total", "route" => route.clone(), "status" => status.to_string()).increment(1);
    metrics::histogram!("rerankd_request_seconds", "route" => route).record(took.as_secs_f64());
    response
}

/// The client's own id where it is short and plain, else a new one that sorts by time.
fn request_id(headers: &HeaderMap) -> String {
    let plain = |id: &&str| (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok()).filter(plain);
    given.map_or_else(|| Uuid::now_v7().to_string(), str::to_owned)
}
