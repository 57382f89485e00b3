//! For every request a log line, metrics, and its id in a response header. The text of a request is not logged.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;
use uuid::Uuid;

use crate::telemetry::metrics;
use crate::telemetry::traces::{KeyValue, RequestTrace};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The route of requests for paths that do not exist.
const UNKNOWN: &str = "unknown";
/// Maximum characters of a client's request id.
const MAX_ID_CHARS: usize = 128;
/// Maximum characters of a refusal's reason in the log.
const MAX_REASON_CHARS: usize = 200;

/// What the middleware and the handlers know about a request; in the request's extensions.
#[derive(Debug, Default)]
pub(super) struct RequestContext {
    /// The client's `x-request-id`, or a new one.
    pub(super) id: String,
    /// The name of the API key, once it has been checked.
    pub(super) key: OnceLock<Arc<str>>,
    /// The served model's name, once the request has been parsed.
    pub(super) model: OnceLock<String>,
    pub(super) trace: RequestTrace,
}

/// What a handler adds to the log line of a response, in the response's extensions.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RequestStats {
    pub(super) documents: usize,
    pub(super) tokens: usize,
}

/// Why a request got an error response, for the log line and metrics; in the response's extensions.
#[derive(Debug, Clone)]
pub(super) struct RefusalReason {
    pub(super) reason: String,
    /// Its name in metrics.
    pub(super) cause: &'static str,
}

/// A request while it is handled. If it is dropped before [`InFlight::answered`], the connection has ended.
struct InFlight {
    method: Method,
    route: String,
    start: Instant,
    span: tracing::Span,
    context: Arc<RequestContext>,
    answered: bool,
}

impl InFlight {
    fn answered(&mut self, response: &Response) {
        self.answered = true;
        let status = response.status().as_u16();
        let RequestStats { documents, tokens } = response.extensions().get().copied().unwrap_or_default();
        let (method, route, ms) = (&self.method, self.route.as_str(), self.ms());
        let _entered = self.span.enter();
        self.end_trace(&status.to_string(), (status >= 500).then(|| status.to_string()), documents, tokens);
        if is_probe(route) {
            tracing::debug!(%method, route, status, "probe");
        } else if let Some(RefusalReason { reason, .. }) = response.extensions().get() {
            let reason: String = reason.chars().take(MAX_REASON_CHARS).collect();
            let outcome = if status < 500 || status == 503 { "refused" } else { "failed" };
            tracing::info!(%method, route, status, reason, ms, "{outcome}");
        } else {
            tracing::info!(%method, route, status, documents, tokens, ms, "answered");
        }
        if let Some(RefusalReason { cause, .. }) = response.extensions().get() {
            let (model, key) = (self.context.model.get().cloned(), self.context.key.get());
            let key = key.map_or_else(String::new, |key| key.to_string());
            metrics::REQUEST_ERRORS.counter([(*cause).to_owned(), model.unwrap_or_default(), key]).increment(1);
        }
        self.count(&status.to_string());
    }

    fn end_trace(&self, status: &str, error: Option<String>, documents: usize, tokens: usize) {
        let RequestContext { id, key, model, trace } = &*self.context;
        trace.end(error, || {
            let mut attributes = vec![
                KeyValue::new("http.request.method", self.method.to_string()),
                KeyValue::new("http.route", self.route.clone()),
                KeyValue::new("rerankd.request_id", id.clone()),
            ];
            attributes.extend(status.parse().ok().map(|code: i64| KeyValue::new("http.response.status_code", code)));
            attributes.extend(model.get().map(|name| KeyValue::new("rerankd.model", name.clone())));
            attributes.extend(key.get().map(|name| KeyValue::new("rerankd.key", Arc::clone(name))));
            if documents > 0 {
                attributes.push(KeyValue::new("rerankd.documents", documents as i64));
                attributes.push(KeyValue::new("rerankd.tokens", tokens as i64));
            }
            attributes
        });
    }

    fn ms(&self) -> f64 {
        (self.start.elapsed().as_secs_f64() * 1e4).round() / 10.0
    }

    fn count(&self, status: &str) {
        metrics::REQUESTS.counter([self.route.clone(), status.to_owned()]).increment(1);
        metrics::REQUEST_SECONDS.histogram([self.route.clone()]).record(self.start.elapsed().as_secs_f64());
        if let Some(key) = self.context.key.get() {
            metrics::KEY_REQUESTS.counter([key.to_string(), status.to_owned()]).increment(1);
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.answered {
            let _entered = self.span.enter();
            tracing::info!(method = %self.method, route = self.route, ms = self.ms(), "cancelled by the client");
            self.end_trace("cancelled", Some("cancelled".to_owned()), 0, 0);
            self.count("cancelled");
        }
    }
}

/// Whether requests to the route are frequent and say nothing: they are not traced, and logged at debug level only.
fn is_probe(route: &str) -> bool {
    matches!(route, "/health" | "/ready" | "/metrics")
}

pub(super) async fn observe(mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let route =
        request.extensions().get::<MatchedPath>().map_or_else(|| UNKNOWN.to_owned(), |path| path.as_str().to_owned());
    let span = tracing::info_span!("request", id = %id, trace_id = tracing::field::Empty);
    let name = || if route == UNKNOWN { request.method().to_string() } else { format!("{} {route}", request.method()) };
    let trace = if is_probe(&route) { RequestTrace::default() } else { RequestTrace::start(name, request.headers()) };
    if let Some(id) = trace.id() {
        span.record("trace_id", id);
    }
    let context = Arc::new(RequestContext { id: id.clone(), trace, ..RequestContext::default() });
    request.extensions_mut().insert(Arc::clone(&context));
    let method = request.method().clone();
    let mut in_flight = InFlight { method, route, start: Instant::now(), span, context, answered: false };
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
