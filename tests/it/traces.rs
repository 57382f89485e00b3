//! Traces of the binary, as a collector gets them.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind, status::StatusCode};
use prost::Message;
use serde_json::json;

use crate::support::server::Server;

/// Maximum time to wait for spans, which come once a second.
const PATIENCE: Duration = Duration::from_secs(60);

/// A message to the collector: the path, the service's attributes, and the spans.
struct Export {
    path: String,
    resource: BTreeMap<String, String>,
    spans: Vec<Span>,
}

/// Starts a collector. Returns its URL and what it gets.
fn collector() -> (String, Receiver<Export>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (send, receive) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let send = send.clone();
            std::thread::spawn(move || take_exports(stream.unwrap(), &send));
        }
    });
    (url, receive)
}

/// Reads requests from a connection until it ends, and answers each with 200.
fn take_exports(stream: TcpStream, exports: &Sender<Export>) {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut length, mut path) = (0, String::new());
        for i in 0.. {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            if i == 0 {
                path = line.split(' ').nth(1).unwrap().to_owned();
            }
            let line = line.trim().to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length: ") {
                length = value.parse().unwrap();
            }
            assert!(!line.starts_with("content-type") || line == "content-type: application/x-protobuf", "{line}");
            if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let message = ExportTraceServiceRequest::decode(body.as_slice()).unwrap();
        for spans in message.resource_spans {
            let resource = texts(&spans.resource.unwrap().attributes);
            let spans = spans.scope_spans.into_iter().flat_map(|scope| scope.spans).collect();
            exports.send(Export { path: path.clone(), resource, spans }).ok();
        }
        reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
    }
}

/// The attributes as texts.
fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |attribute: &KeyValue| match attribute.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        Value::IntValue(number) => Some(number.to_string()),
        _ => None,
    };
    attributes.iter().filter_map(|attribute| Some((attribute.key.clone(), text(attribute)?))).collect()
}

/// The next messages as one, until there are the spans of `requests` requests.
fn receive(exports: &Receiver<Export>, requests: usize) -> Export {
    let next = || exports.recv_timeout(PATIENCE).expect("the collector got too few spans");
    let mut all = next();
    while all.spans.iter().filter(|span| span.kind() == SpanKind::Server).count() < requests {
        all.spans.extend(next().spans);
    }
    all
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_request_is_a_span_with_a_child_for_each_stage_in_the_callers_trace() {
    let (url, exports) = collector();
    let arguments = ["--otlp-endpoint", &url, "--api-key", "secret-of-the-key name=search", "--log-format", "json"];
    let mut server =
        Server::start_in(&arguments, &[("OTEL_SERVICE_NAME", "ranking"), ("OTEL_RESOURCE_ATTRIBUTES", "zone=a")]);
    let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let body = json!({"query": "Apple", "documents": ["apple", "banana"]}).to_string();
    let answer = server.request(&format!(
        "POST /v1/rerank HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-api-key: secret-of-the-key\r\nx-request-id: mine\r\n\
         traceparent: 00-{trace}-{parent}-01\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    ));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let export = receive(&exports, 1);
    assert_eq!((export.path.as_str(), export.resource["service.name"].as_str()), ("/v1/traces", "ranking"));
    assert_eq!((export.resource["zone"].as_str(), export.resource.contains_key("service.version")), ("a", true));
    let spans = export.spans;
    assert!(spans.iter().all(|span| hex(&span.trace_id) == trace), "{spans:?}");
    let (roots, stages): (Vec<&Span>, Vec<&Span>) = spans.iter().partition(|span| span.kind() == SpanKind::Server);
    let [root] = roots[..] else { panic!("{spans:?}") };
    assert_eq!((root.name.as_str(), hex(&root.parent_span_id).as_str()), ("POST /v1/rerank", parent));
    let attributes = texts(&root.attributes);
    for (name, value) in [
        ("http.request.method", "POST"),
        ("http.route", "/v1/rerank"),
        ("http.response.status_code", "200"),
        ("rerankd.request_id", "mine"),
        ("rerankd.model", "rerankd-mini"),
        ("rerankd.key", "search"),
        ("rerankd.documents", "2"),
    ] {
        assert_eq!(attributes.get(name).map(String::as_str), Some(value), "{name}");
    }
    let names: Vec<&str> = stages.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, ["read body", "parse", "tokenize", "queue", "compute", "serialize"]);
    let mut before = root.start_time_unix_nano;
    for span in &stages {
        assert_eq!(span.parent_span_id, root.span_id, "{}", span.name);
        assert!(
            before <= span.start_time_unix_nano && span.start_time_unix_nano <= span.end_time_unix_nano,
            "{spans:?}"
        );
        before = span.start_time_unix_nano;
    }
    let compute = texts(&stages[4].attributes);
    assert_eq!((compute["rerankd.batches"].as_str(), &compute["rerankd.tokens"]), ("1", &attributes["rerankd.tokens"]));
    assert!(!format!("{spans:?}").contains("secret-of-the-key"));
    server.signal("-TERM");
    assert_eq!(server.exit_code(), Some(0));
    let log = server.rest_of_log();
    let line = log.lines().find(|line| line.contains("\"answered\"")).unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains(trace), "{line}");
}

#[test]
fn failed_requests_have_the_cause_and_probes_have_no_span() {
    let (url, exports) = collector();
    let server = Server::start(&["--otlp-endpoint", &url, "--max-request-tokens", "20"]);
    let get =
        |path: &str| server.request(&format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"));
    assert!(get("/ready").starts_with("HTTP/1.1 200"));
    let body = json!({"query": "Apple", "documents": ["apple ".repeat(50)]}).to_string();
    assert!(server.rerank(&body).starts_with("HTTP/1.1 413"));
    assert!(get("/nothing").starts_with("HTTP/1.1 404"));
    let spans = receive(&exports, 2).spans;
    let names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, ["read body", "parse", "rank", "POST /v1/rerank", "GET"]);
    assert_eq!(texts(&spans[2].attributes)["error.type"], "too_much_work");
    assert_eq!(texts(&spans[3].attributes)["http.response.status_code"], "413");
    let is_failed = |span: &Span| span.status.as_ref().is_some_and(|status| status.code() == StatusCode::Error);
    assert!(!spans.iter().any(is_failed), "a client's error is not an error of the server");
    assert_ne!(spans[3].trace_id, spans[4].trace_id);
}

#[test]
fn only_the_share_of_traces_that_the_sampler_chooses_is_sent() {
    let (url, exports) = collector();
    let server = Server::start_in(&[], &[("OTEL_EXPORTER_OTLP_ENDPOINT", &url), ("OTEL_TRACES_SAMPLER_ARG", "0")]);
    let body = json!({"query": "Apple", "documents": ["apple"]}).to_string();
    let send = |traceparent: &str| {
        server.request(&format!(
            "POST /v1/rerank HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{traceparent}content-length: {}\r\n\r\n{body}",
            body.len()
        ))
    };
    for _ in 0..3 {
        assert!(send("").starts_with("HTTP/1.1 200"));
    }
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    // The caller records its trace, so this request is recorded too: it is the first one that the collector hears of.
    assert!(send(&format!("traceparent: 00-{trace}-00f067aa0ba902b7-01\r\n")).starts_with("HTTP/1.1 200"));
    assert!(receive(&exports, 1).spans.iter().all(|span| hex(&span.trace_id) == trace));
}

#[test]
fn a_collector_that_does_not_answer_delays_neither_requests_nor_the_stop_and_lost_spans_are_counted() {
    // It accepts connections, in the kernel's queue, and never answers.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", listener.local_addr().unwrap());
    let mut server = Server::start(&["--otlp-endpoint", &silent]);
    // Each request has a span of its own and more for its stages; some 4096 may wait.
    let mut stream = server.connect();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let request = "GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n";
    for _ in 0..60 {
        stream.write_all(request.repeat(100).as_bytes()).unwrap();
        let mut answers = 0;
        while answers < 100 {
            let mut line = String::new();
            assert!(reader.read_line(&mut line).unwrap() > 0, "the server closed the connection");
            answers += usize::from(line.contains("200 OK"));
        }
    }
    let metrics = server.request("GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    let dropped = metrics.lines().find_map(|line| line.strip_prefix("rerankd_trace_spans_total{outcome=\"dropped\"} "));
    assert!(dropped.unwrap().parse::<f64>().unwrap() > 0.0, "{metrics}");
    drop((stream, reader));
    server.signal("-TERM");
    assert_eq!(server.exit_code(), Some(0));
    drop(listener);
}

#[test]
fn without_a_collector_there_are_no_traces() {
    let mut server = Server::start(&["--log-format", "json"]);
    assert_eq!(server.scores(r#"{"query":"Apple","documents":["apple"]}"#).len(), 1);
    let metrics = server.request("GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    assert!(metrics.contains("rerankd_requests_total") && !metrics.contains("rerankd_trace_spans_total"));
    server.signal("-TERM");
    assert_eq!(server.exit_code(), Some(0));
    let log = server.rest_of_log();
    assert!(log.contains("answered") && !log.contains("trace_id"), "{log}");
}
