//! Traces in OpenTelemetry's protocol (OTLP over HTTP, protobuf): a span for each request, with a child for each stage.
//!
//! Requests never wait for the collector: finished spans go to a bounded queue, which a thread of the SDK sends. Spans that find the
//! queue full, or that the collector does not take, are counted and dropped. Without a collector nothing here runs.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use opentelemetry::Context;
pub use opentelemetry::KeyValue;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{Span as _, SpanBuilder, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, Span, SpanData, SpanExporter,
    SpanProcessor,
};

use ureq::http::HeaderMap;

use super::metrics::TRACE_SPANS;
use crate::tls;

/// Finished spans that wait for the collector. One has some 500 bytes.
const MAX_WAITING_SPANS: usize = 4096;
/// Spans in one message to the collector.
const SPANS_PER_MESSAGE: usize = 512;
/// Time between two messages to the collector.
const EXPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum time of one message to the collector.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time that the end of the process waits for the last spans.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum characters of the headers `traceparent` and `tracestate` (W3C Trace Context, section 3.3.1.5).
const MAX_HEADER_CHARS: usize = 512;
/// Maximum bytes that are read of the collector's answer.
const MAX_ANSWER_BYTES: u64 = 64 * 1024;

/// Where spans go, and which.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceOptions {
    /// URL that takes the spans, with its path.
    pub endpoint: String,
    /// The resource attribute `service.name`.
    pub service_name: String,
    /// Further resource attributes.
    pub attributes: Vec<(String, String)>,
    /// Share of the traces that are recorded, of those that begin here. The caller decides about others, in `traceparent`.
    pub ratio: f64,
}

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Sends the remaining spans when it is dropped, for at most 2 s.
#[must_use]
pub struct TraceGuard(SdkTracerProvider);

impl Drop for TraceGuard {
    fn drop(&mut self) {
        if let Err(error) = self.0.shutdown_with_timeout(FLUSH_TIMEOUT) {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

/// Starts to record traces. A second call has no effect.
///
/// # Errors
/// The endpoint is not a URL.
pub fn start(options: &TraceOptions) -> Result<TraceGuard> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_http_client(OtlpClient::new())
        .with_endpoint(&options.endpoint)
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .with_context(|| format!("--otlp-endpoint {:?} cannot be used", options.endpoint))?;
    let waiting = Arc::new(AtomicUsize::new(0));
    let exporter =
        CountedExporter { inner: exporter, waiting: Arc::clone(&waiting), is_failing: AtomicBool::new(false) };
    let batches = BatchConfigBuilder::default()
        .with_max_queue_size(MAX_WAITING_SPANS)
        .with_max_export_batch_size(SPANS_PER_MESSAGE)
        .with_scheduled_delay(EXPORT_INTERVAL)
        .build();
    let inner = BatchSpanProcessor::new(exporter, batches);
    let attributes = options.attributes.iter().map(|(name, value)| KeyValue::new(name.clone(), value.clone()));
    let resource = Resource::builder_empty()
        .with_attributes(attributes)
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_service_name(options.service_name.clone())
        .build();
    let provider = SdkTracerProvider::builder()
        .with_span_processor(BoundedProcessor { inner, waiting })
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(options.ratio))))
        .with_resource(resource)
        .build();
    TRACER.set(provider.tracer("rerankd")).ok();
    for outcome in ["exported", "failed", "dropped"] {
        TRACE_SPANS.counter([outcome]).increment(0);
    }
    Ok(TraceGuard(provider))
}

/// The trace of a request. Does nothing unless [`start`] was called.
#[derive(Debug, Default)]
pub struct RequestTrace(Option<Traced>);

#[derive(Debug)]
struct Traced {
    tracer: &'static SdkTracer,
    /// Contains the request's span.
    context: Context,
    /// The same moment on both clocks.
    start: (Instant, SystemTime),
}

impl RequestTrace {
    /// Starts the span of a request, as a child of the span in `traceparent` if there is one.
    pub fn start(name: impl FnOnce() -> String, headers: &HeaderMap) -> Self {
        Self(TRACER.get().map(|tracer| {
            let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &CallersHeaders(headers));
            let start = (Instant::now(), SystemTime::now());
            let span = SpanBuilder::from_name(name()).with_kind(SpanKind::Server).with_start_time(start.1);
            let context = parent.with_span(tracer.build_with_context(span, &parent));
            Traced { tracer, context, start }
        }))
    }

    /// The trace's id in hexadecimal.
    pub fn id(&self) -> Option<String> {
        self.0.as_ref().map(|traced| traced.context.span().span_context().trace_id().to_string())
    }

    /// Records a finished stage of the request.
    pub fn stage(
        &self,
        name: &'static str,
        from: Instant,
        to: Instant,
        attributes: impl IntoIterator<Item = KeyValue>,
    ) {
        let Some(Traced { tracer, context, start }) = &self.0 else { return };
        let time = |at: Instant| start.1 + at.saturating_duration_since(start.0);
        let span = SpanBuilder::from_name(name).with_start_time(time(from)).with_attributes(attributes);
        tracer.build_with_context(span, context).end_with_timestamp(time(to));
    }

    /// Ends the request's span; `error` is why the server failed.
    pub fn end(&self, error: Option<String>, attributes: impl FnOnce() -> Vec<KeyValue>) {
        let Some(traced) = &self.0 else { return };
        let span = traced.context.span();
        span.set_attributes(attributes());
        if let Some(error) = error {
            span.set_attribute(KeyValue::new("error.type", error.clone()));
            span.set_status(Status::error(error));
        }
        span.end();
    }
}

/// The headers that name the caller's span. Long ones are ignored, because each span keeps a copy.
struct CallersHeaders<'a>(&'a HeaderMap);

impl Extractor for CallersHeaders<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.to_str().ok().filter(|value| value.len() <= MAX_HEADER_CHARS)
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

/// Drops spans that find [`MAX_WAITING_SPANS`] others waiting, and counts them. The queue of `inner` is as long, so it never
/// drops any itself.
#[derive(Debug)]
struct BoundedProcessor {
    inner: BatchSpanProcessor,
    waiting: Arc<AtomicUsize>,
}

impl SpanProcessor for BoundedProcessor {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.inner.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if !span.span_context.is_sampled() {
            return;
        }
        let more = |waiting| (waiting < MAX_WAITING_SPANS).then_some(waiting + 1);
        if self.waiting.fetch_update(Relaxed, Relaxed, more).is_ok() {
            self.inner.on_end(span);
        } else {
            TRACE_SPANS.counter(["dropped"]).increment(1);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// Counts the spans that were sent, and logs when the collector stops and starts to take them.
#[derive(Debug)]
struct CountedExporter {
    inner: opentelemetry_otlp::SpanExporter,
    waiting: Arc<AtomicUsize>,
    is_failing: AtomicBool,
}

impl SpanExporter for CountedExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        self.waiting.fetch_sub(spans, Relaxed);
        let result = self.inner.export(batch).await;
        let outcome = if result.is_ok() { "exported" } else { "failed" };
        TRACE_SPANS.counter([outcome]).increment(spans as u64);
        match (&result, self.is_failing.swap(result.is_err(), Relaxed)) {
            (Err(error), false) => {
                tracing::warn!(%error, "the collector of --otlp-endpoint takes no spans; they are dropped")
            }
            (Ok(()), true) => tracing::info!("the collector of --otlp-endpoint takes spans again"),
            _ => {}
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// The HTTP client of downloads, which blocks: only the thread that sends spans calls it.
#[derive(Debug)]
struct OtlpClient(ureq::Agent);

impl OtlpClient {
    fn new() -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(EXPORT_TIMEOUT))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .tls_config(tls::client_config());
        Self(config.build().new_agent())
    }
}

#[async_trait::async_trait]
impl HttpClient for OtlpClient {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, body) = request.into_parts();
        let answer = self.0.run(Request::from_parts(parts, body.to_vec()))?;
        let (parts, mut body) = answer.into_parts();
        let bytes = body.with_config().limit(MAX_ANSWER_BYTES).read_to_vec()?;
        Ok(Response::from_parts(parts, bytes.into()))
    }
}
