//! The table of all metrics, and their rendering in Prometheus' text format.
//!
//! A metric is declared once, in the table below: the HELP lines, the check of docs/operations.md and the integration tests come from
//! it. Label values are the names of models, routes, keys, statuses and causes, so their number is bounded by the configuration.

use std::sync::OnceLock;

use metrics::{Counter, Gauge, Histogram, Label, SharedString};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_process::Collector;

/// A metric with N labels.
#[derive(Debug, Clone, Copy)]
pub struct Metric<const N: usize> {
    name: &'static str,
    labels: [&'static str; N],
}

/// A row of the table of metrics.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MetricRow {
    pub name: &'static str,
    pub kind: MetricKind,
    /// Names of the labels.
    pub labels: &'static [&'static str],
    /// The text of the HELP line.
    pub help: &'static str,
    /// Upper bounds of the buckets of a histogram.
    buckets: &'static [f64],
}

/// A type of metric in Prometheus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    Counter,
    Gauge,
    Histogram,
}

const SECONDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];
const TOKEN_COUNTS: &[f64] = &[32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const PAIR_COUNTS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];
const NONE: &[f64] = &[];

macro_rules! table {
    ($($constant:ident = $kind:ident($name:literal, [$($label:literal),*], $buckets:ident): $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $constant: Metric<{ <[&str]>::len(&[$($label),*]) }> = Metric { name: $name, labels: [$($label),*] };
        )*

        /// All metrics, in the order of docs/operations.md.
        pub const ALL: &[MetricRow] = &[$(MetricRow {
            name: $name,
            kind: MetricKind::$kind,
            labels: &[$($label),*],
            help: $help,
            buckets: $buckets,
        }),*];
    };
}

table! {
    REQUESTS = Counter("rerankd_requests_total", ["route", "status"], NONE):
        "HTTP requests; status is a number, or cancelled if the client left";
    REQUEST_SECONDS = Histogram("rerankd_request_seconds", ["route"], SECONDS):
        "Time from a request's headers to its response";
    REQUEST_ERRORS = Counter("rerankd_request_errors_total", ["cause", "model", "key"], NONE):
        "Requests answered with an error, by cause; model is empty if the error came before the model was known";
    KEY_REQUESTS = Counter("rerankd_key_requests_total", ["key", "status"], NONE):
        "Requests that carried a valid API key, by its name";
    KEY_TOKENS = Counter("rerankd_key_tokens_total", ["key", "model"], NONE):
        "Tokens of the requests of an API key, over all distinct pairs";

    DOCUMENTS = Counter("rerankd_documents_total", ["model"], NONE):
        "Documents ranked";
    REQUEST_TOKENS = Histogram("rerankd_request_tokens", ["model"], TOKEN_COUNTS):
        "Tokens of a request over all its distinct pairs";
    DUPLICATE_PAIRS = Counter("rerankd_duplicate_pairs_total", ["model"], NONE):
        "Pairs not computed because the request has another pair with the same tokens";
    SCORE_CACHE_HITS = Counter("rerankd_score_cache_hits_total", ["model"], NONE):
        "Pairs whose score was in the cache; absent without --score-cache-bytes";
    SCORE_CACHE_MISSES = Counter("rerankd_score_cache_misses_total", ["model"], NONE):
        "Pairs whose score was not in the cache; absent without --score-cache-bytes";
    SCORE_CACHE_ENTRIES = Gauge("rerankd_score_cache_entries", ["model"], NONE):
        "Scores in the cache; absent without --score-cache-bytes";
    SCORE_CACHE_BYTES = Gauge("rerankd_score_cache_bytes", ["model"], NONE):
        "Memory of the score cache; absent without --score-cache-bytes";
    QUERIES_TRUNCATED = Counter("rerankd_queries_truncated_total", ["model"], NONE):
        "Queries truncated to the maximum query length";
    DOCUMENTS_TRUNCATED = Counter("rerankd_documents_truncated_total", ["model"], NONE):
        "Documents of which a part was not scored";
    CHUNKS_DROPPED = Counter("rerankd_chunks_dropped_total", ["model"], NONE):
        "Chunks not scored because of max_chunks_per_doc";
    TOKENS_DROPPED = Counter("rerankd_tokens_dropped_total", ["model"], NONE):
        "Tokens of documents that were not scored because of any limit; estimated for text that was not tokenized";

    TOKENIZE_SECONDS = Histogram("rerankd_tokenize_seconds", ["model"], SECONDS):
        "Time of a request for tokenization, with the wait for a tokenizer thread";
    QUEUE_SECONDS = Histogram("rerankd_queue_seconds", ["model"], SECONDS):
        "Time from a request's admission to its first batch";
    COMPUTE_SECONDS = Histogram("rerankd_compute_seconds", ["model"], SECONDS):
        "Time from the start of a request's first batch to the end of its last";

    QUEUE_TOKENS = Gauge("rerankd_queue_tokens", ["model"], NONE):
        "Tokens admitted and not yet computed";
    QUEUE_MAX_TOKENS = Gauge("rerankd_queue_max_tokens", ["model"], NONE):
        "Limit of rerankd_queue_tokens (--max-queue-tokens)";
    QUEUE_FIRST_SERVICE_TOKENS = Gauge("rerankd_queue_first_service_tokens", ["model"], NONE):
        "Tokens in the first level of the queue, for which a new request waits";
    REQUESTS_CANCELLED = Counter("rerankd_requests_cancelled_total", ["model", "reason"], NONE):
        "Requests removed from the queue; reason is disconnected or deadline";
    TOKENIZER_BYTES = Gauge("rerankd_tokenizer_bytes", [], NONE):
        "Text admitted and not yet tokenized";

    TOKENS = Counter("rerankd_tokens_total", ["model"], NONE):
        "Tokens computed";
    BATCH_TOKENS = Histogram("rerankd_batch_tokens", ["model"], TOKEN_COUNTS):
        "Tokens of a batch; batches have no padding";
    BATCH_MAX_TOKENS = Gauge("rerankd_batch_max_tokens", ["model"], NONE):
        "Token budget of a batch (--max-batch-tokens)";
    BATCH_PAIRS = Histogram("rerankd_batch_pairs", ["model"], PAIR_COUNTS):
        "Pairs of a batch";
    BATCH_SECONDS = Histogram("rerankd_batch_seconds", ["model"], SECONDS):
        "Compute time of a batch";
    WORKERS = Gauge("rerankd_workers", ["model"], NONE):
        "Batches that the device computes at the same time";
    BATCHES_FAILED = Counter("rerankd_batches_failed_total", ["model"], NONE):
        "Batches that the backend could not compute";
    WORKER_RESTARTS = Counter("rerankd_worker_restarts_total", ["model"], NONE):
        "Workers restarted after a panic";

    INFLIGHT_BYTES = Gauge("rerankd_inflight_bytes", [], NONE):
        "Memory charged to request bodies and responses";
    INFLIGHT_MAX_BYTES = Gauge("rerankd_inflight_max_bytes", [], NONE):
        "Limit of rerankd_inflight_bytes (--max-inflight-bytes)";
    CONNECTIONS = Gauge("rerankd_connections", [], NONE):
        "Open connections";
    CONNECTIONS_MAX = Gauge("rerankd_connections_max", [], NONE):
        "Limit of rerankd_connections (--max-connections); 64 more get health checks, metrics and 503";
    CONNECTIONS_REFUSED = Counter("rerankd_connections_refused_total", [], NONE):
        "Connections closed on arrival because all connections and the 64 beyond them were used up";
    GPU_MEMORY_USED = Gauge("rerankd_gpu_memory_used_bytes", ["gpu"], NONE):
        "Memory of a GPU in use by all processes, as the driver reports it; absent on a CPU";
    GPU_MEMORY_TOTAL = Gauge("rerankd_gpu_memory_total_bytes", ["gpu"], NONE):
        "Memory of a GPU; absent on a CPU";
    TRACE_SPANS = Counter("rerankd_trace_spans_total", ["outcome"], NONE):
        "Spans of traces; outcome is exported, failed (the collector did not take them) or dropped (too many waited); absent without a collector";
    LOG_LINES_DROPPED = Counter("rerankd_log_lines_dropped_total", [], NONE):
        "Log lines dropped because standard error was too slow";
    BUILD_INFO = Gauge("rerankd_build_info", ["version", "features"], NONE):
        "Always 1; version and cargo features of the binary";
}

impl<const N: usize> Metric<N> {
    /// The counter with these label values, in the order of the table.
    pub fn counter(&self, values: [impl Into<SharedString>; N]) -> Counter {
        metrics::counter!(self.name, self.labels(values))
    }

    /// The gauge with these label values, in the order of the table.
    pub fn gauge(&self, values: [impl Into<SharedString>; N]) -> Gauge {
        metrics::gauge!(self.name, self.labels(values))
    }

    /// The histogram with these label values, in the order of the table.
    pub fn histogram(&self, values: [impl Into<SharedString>; N]) -> Histogram {
        metrics::histogram!(self.name, self.labels(values))
    }

    fn labels(&self, values: [impl Into<SharedString>; N]) -> Vec<Label> {
        self.labels.into_iter().zip(values).map(|(name, value)| Label::new(name, value)).collect()
    }
}

impl Metric<0> {
    /// The counter without labels.
    pub fn only_counter(&self) -> Counter {
        self.counter([] as [&str; 0])
    }

    /// The gauge without labels.
    pub fn only_gauge(&self) -> Gauge {
        self.gauge([] as [&str; 0])
    }
}

impl MetricRow {
    /// The row of the metric in the table of docs/operations.md.
    pub fn markdown(&self) -> String {
        let kind = match self.kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
        };
        format!("| `{}` | {kind} | {} | {} |", self.name, self.labels.join(", "), self.help)
    }
}

static PROMETHEUS: OnceLock<PrometheusHandle> = OnceLock::new();

/// The process's metrics. Recording starts with the first call.
pub fn prometheus() -> &'static PrometheusHandle {
    PROMETHEUS.get_or_init(|| {
        let with_buckets = |builder: PrometheusBuilder, row: &MetricRow| match row.kind {
            MetricKind::Histogram => builder
                .set_buckets_for_metric(Matcher::Full(row.name.to_owned()), row.buckets)
                .expect("the buckets are not empty"),
            _ => builder,
        };
        let recorder = ALL.iter().fold(PrometheusBuilder::new(), with_buckets).build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("another metrics recorder is already installed: /metrics stays empty");
        }
        describe();
        handle
    })
}

/// The metrics in Prometheus' text format, with the process's memory, files and CPU time as of now.
pub fn render() -> String {
    let handle = prometheus();
    Collector::default().collect();
    handle.render()
}

/// Sets the HELP lines. Metrics without labels exist from the start, with the value 0: a counter that appears with its first event
/// hides that event from `rate()`.
fn describe() {
    for row in ALL {
        let (name, no_labels) = (row.name, row.labels.is_empty());
        match row.kind {
            MetricKind::Counter => {
                metrics::describe_counter!(name, row.help);
                no_labels.then(|| metrics::counter!(name).increment(0));
            }
            MetricKind::Gauge => {
                metrics::describe_gauge!(name, row.help);
                no_labels.then(|| metrics::gauge!(name).increment(0.0));
            }
            MetricKind::Histogram => metrics::describe_histogram!(name, row.help),
        }
    }
    Collector::default().describe();
    let features = [
        ("cuda", cfg!(feature = "cuda")),
        ("candle-cuda", cfg!(feature = "candle-cuda")),
        ("jemalloc", cfg!(feature = "jemalloc")),
        ("failpoints", cfg!(feature = "failpoints")),
    ];
    let features: Vec<&str> = features.into_iter().filter_map(|(name, is_on)| is_on.then_some(name)).collect();
    BUILD_INFO.gauge([env!("CARGO_PKG_VERSION").to_owned(), features.join(",")]).set(1.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_conventions_of_prometheus() {
        for (i, row) in ALL.iter().enumerate() {
            assert!(row.name.starts_with("rerankd_") && !row.help.ends_with('.'), "{}", row.name);
            assert_eq!(row.kind == MetricKind::Counter, row.name.ends_with("_total"), "{}", row.name);
            assert_eq!(row.kind == MetricKind::Histogram, !row.buckets.is_empty(), "{}", row.name);
            assert!(row.buckets.is_sorted(), "{}", row.name);
            assert!(ALL[..i].iter().all(|other| other.name != row.name), "{} is there twice", row.name);
        }
    }

    #[test]
    fn the_documentation_has_the_row_of_every_metric_and_no_other() {
        let page = include_str!("../../docs/operations.md");
        let documented: Vec<&str> = page.lines().filter(|line| line.starts_with("| `rerankd_")).collect();
        let rows: Vec<String> = ALL.iter().map(MetricRow::markdown).collect();
        assert_eq!(documented, rows, "the rows of the table should be:\n{}", rows.join("\n"));
    }
}
