//! `/metrics`: every metric of the table appears after matching traffic, and nothing else does.

use std::collections::BTreeMap;
use std::io::Write;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Request;
use rerankd::api::{ApiLimits, App, Keys};
use rerankd::client::RateLimits;
use rerankd::scheduler::SchedulerLimits;
use rerankd::telemetry::metrics::{ALL, MetricKind, MetricRow, render};
use serde_json::{Value, json};

use crate::support::server::Server;
use crate::support::stub::{self, LIMITS, QUEUE, TestResponse};

/// Metrics that a CPU does not have.
const NEED_A_GPU: [&str; 2] = ["rerankd_gpu_memory_used_bytes", "rerankd_gpu_memory_total_bytes"];

/// The samples of a text in Prometheus' format: name with labels, to value.
fn samples(text: &str) -> BTreeMap<&str, f64> {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| line.rsplit_once(' ').map(|(name, value)| (name, value.parse().unwrap())).unwrap()).collect()
}

/// The metric's name and its labels' names: `a{x="1",y="2"}` is `("a", ["x", "y"])`.
fn parts(sample: &str) -> (&str, Vec<&str>) {
    let Some((name, labels)) = sample.split_once('{') else { return (sample, vec![]) };
    let labels = labels.trim_end_matches('}').split("\",").map(|label| label.split_once('=').unwrap().0);
    (name, labels.collect())
}

/// Whether a sample belongs to the metric.
fn is_of(row: &MetricRow, sample: &str) -> bool {
    let (name, labels) = parts(sample);
    let labels = labels.into_iter().filter(|&label| label != "le");
    let suffixes: &[&str] = if row.kind == MetricKind::Histogram { &["_bucket", "_sum", "_count"] } else { &[""] };
    name.strip_prefix(row.name).is_some_and(|suffix| suffixes.contains(&suffix))
        && labels.eq(row.labels.iter().copied())
}

#[test]
fn every_metric_appears_after_matching_traffic_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    std::fs::write(&keys, "first-secret name=search\nsecond-secret\nthird-secret name=monitoring\n").unwrap();
    // Nothing listens there, so the spans are lost; that is counted too.
    let collector = ["--otlp-endpoint", "http://127.0.0.1:9"];
    let server = Server::start(
        &[&["--api-key-file", keys.to_str().unwrap(), "--score-cache-bytes", "100000"][..], &collector].concat(),
    );
    let send = |key: &str, body: &Value| {
        let body = body.to_string();
        server.request(&format!(
            "POST /v1/rerank HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: Bearer {key}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        ))
    };
    let long = "one more word of a long text ".repeat(400);
    let body = json!({"query": long, "documents": ["same", "same", long], "max_chunks_per_doc": 2});
    for key in ["first-secret", "second-secret"] {
        let answer = send(key, &body);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    for (key, body, status) in [
        ("no-secret", json!({}), 401),
        ("first-secret", json!({"query": 1}), 400),
        ("first-secret", json!({"model": "other", "query": "q", "documents": ["d"]}), 400),
    ] {
        let answer = send(key, &body);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    }
    let scrape = || {
        let mut stream = server.connect();
        write!(
            stream,
            "GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-api-key: third-secret\r\n\r\n"
        )
        .unwrap();
        let answer = std::io::read_to_string(stream).unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    };
    // A client may read the end of an answer before the server has counted the end of its connection.
    let deadline = Instant::now() + Duration::from_secs(30);
    let text = loop {
        let text = scrape();
        if samples(&text).get("rerankd_connections") == Some(&1.0) || Instant::now() > deadline {
            break text;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(!text.contains("secret"), "a key is in the metrics");
    let samples = samples(&text);

    let page = include_str!("../../docs/operations.md");
    let is_unknown = |sample: &&&str| {
        let is_documented = |name: &str| name.starts_with("process_") && page.contains(&format!("`{name}`"));
        !ALL.iter().any(|row| is_of(row, sample)) && !is_documented(parts(sample).0)
    };
    let unknown: Vec<&&str> = samples.keys().filter(is_unknown).collect();
    assert!(unknown.is_empty(), "not in the table of metrics: {unknown:?}");
    for row in ALL {
        let is_there = samples.keys().any(|sample| is_of(row, sample));
        assert_eq!(is_there, !NEED_A_GPU.contains(&row.name), "{}\n{text}", row.name);
        let help = format!("# HELP {} {}\n", row.name, row.help);
        assert!(!is_there || text.contains(&help), "{help}{text}");
    }
    for (sample, value) in [
        ("rerankd_requests_total{route=\"/v1/rerank\",status=\"200\"}", 2.0),
        ("rerankd_requests_total{route=\"/v1/rerank\",status=\"401\"}", 1.0),
        ("rerankd_request_errors_total{cause=\"unauthorized\",model=\"\",key=\"\"}", 1.0),
        ("rerankd_request_errors_total{cause=\"invalid\",model=\"\",key=\"search\"}", 1.0),
        ("rerankd_request_errors_total{cause=\"unknown_model\",model=\"\",key=\"search\"}", 1.0),
        ("rerankd_key_requests_total{key=\"search\",status=\"200\"}", 1.0),
        ("rerankd_key_requests_total{key=\"key-2\",status=\"200\"}", 1.0),
        ("rerankd_documents_total{model=\"rerankd-mini\"}", 6.0),
        ("rerankd_duplicate_pairs_total{model=\"rerankd-mini\"}", 2.0),
        ("rerankd_queries_truncated_total{model=\"rerankd-mini\"}", 2.0),
        ("rerankd_documents_truncated_total{model=\"rerankd-mini\"}", 2.0),
        ("rerankd_request_tokens_count{model=\"rerankd-mini\"}", 2.0),
        ("rerankd_workers{model=\"rerankd-mini\"}", 1.0),
        ("rerankd_connections", 1.0),
        ("rerankd_worker_restarts_total{model=\"rerankd-mini\"}", 0.0),
    ] {
        assert_eq!(samples.get(sample), Some(&value), "{sample}\n{text}");
    }
    let tokens =
        |key: &str| samples[format!("rerankd_key_tokens_total{{key=\"{key}\",model=\"rerankd-mini\"}}").as_str()];
    assert_eq!(tokens("search"), tokens("key-2"));
    assert_eq!(
        samples["rerankd_tokens_total{model=\"rerankd-mini\"}"],
        samples["rerankd_batch_tokens_sum{model=\"rerankd-mini\"}"]
    );
    assert!(samples["rerankd_tokens_dropped_total{model=\"rerankd-mini\"}"] > 2.0 * 400.0);
    assert!(samples["process_resident_memory_bytes"] > 1e6 && samples["process_open_fds"] > 3.0);
}

/// An application whose model and keys no other test has, so that the counters of this process are not mixed up.
fn app(model: &str, rates: RateLimits, limits: ApiLimits, queue: SchedulerLimits) -> (Arc<App>, Arc<stub::Watch>) {
    render(); // recording starts with the first call
    let (model, watch) = stub::model(model, 0.0, queue);
    (stub::serving(vec![model], Keys::new(["a-key name=team", "other-key"], rates).unwrap(), limits), watch)
}

async fn rerank(app: &Arc<App>, body: Value) -> TestResponse {
    let request = Request::post("/v1/rerank").header("x-api-key", "a-key").body(Body::from(body.to_string()));
    stub::send(app, request.unwrap()).await
}

fn errors(cause: &str, model: &str) -> f64 {
    let text = render();
    let sample = format!("rerankd_request_errors_total{{cause=\"{cause}\",model=\"{model}\",key=\"team\"}}");
    samples(&text).get(sample.as_str()).copied().unwrap_or(0.0)
}

#[tokio::test]
async fn a_full_queue_is_counted_with_its_cause_model_and_key() {
    let queue = SchedulerLimits { max_queue_tokens: 20, ..QUEUE };
    let (app, watch) = app("full-queue", RateLimits::default(), LIMITS, queue);
    let gate = watch.close_gate();
    let first = tokio::spawn({
        let app = Arc::clone(&app);
        async move { rerank(&app, json!({"query": "apple", "documents": ["apple ".repeat(12)]})).await }
    });
    watch.batch_started().await;
    let refused = rerank(&app, json!({"query": "apple", "documents": ["apple ".repeat(12)]})).await;
    assert_eq!(refused.status, 503);
    assert_eq!(errors("queue_tokens", "full-queue"), 1.0);
    drop(gate);
    assert_eq!(first.await.unwrap().status, 200);
}

#[tokio::test]
async fn rate_limits_and_large_requests_are_counted_by_cause() {
    let rates = RateLimits { requests_per_minute: NonZeroU32::new(4), tokens_per_minute: NonZeroU32::new(20) };
    let (app, _) = app("limited", rates, LIMITS, QUEUE);
    let body = |words: usize| json!({"query": "apple", "documents": ["apple ".repeat(words)]});
    for (words, status, cause) in
        [(10, 200, ""), (10, 429, "token_rate"), (30, 413, "too_much_work"), (30_000, 413, "too_much_work")]
    {
        let counted = errors(cause, "limited");
        assert_eq!(rerank(&app, body(words)).await.status, status, "{words} words");
        assert!(cause.is_empty() || errors(cause, "limited") == counted + 1.0, "{words} words: {cause}");
    }
    let counted = errors("request_rate", "");
    assert_eq!(rerank(&app, body(1)).await.status, 429);
    assert!(errors("request_rate", "") > counted);
}

#[tokio::test]
async fn a_request_that_passes_its_deadline_is_counted_as_a_timeout_and_leaves_the_queue() {
    let limits = ApiLimits { request_timeout_s: 1, ..LIMITS };
    let (app, watch) = app("slow", RateLimits::default(), limits, QUEUE);
    let gate = watch.close_gate();
    let body = json!({"query": "apple", "documents": ["apple"]});
    let send = || {
        let (app, body) = (Arc::clone(&app), body.clone());
        tokio::spawn(async move { rerank(&app, body).await.status.as_u16() })
    };
    let first = send();
    watch.batch_started().await;
    let second = send(); // waits in the queue while the first is computed
    assert_eq!((first.await.unwrap(), second.await.unwrap()), (504, 504));
    assert_eq!(errors("timeout", "slow"), 2.0);
    drop(gate);
    // The next request makes the worker look at the queue, and removes the one that waited there.
    assert_eq!(rerank(&app, body).await.status, 200);
    let cancelled = || {
        let text = render();
        let samples = samples(&text);
        let of = |reason: &str| {
            samples[format!("rerankd_requests_cancelled_total{{model=\"slow\",reason=\"{reason}\"}}").as_str()]
        };
        of("deadline") + of("disconnected")
    };
    assert!(cancelled() >= 1.0);
}
