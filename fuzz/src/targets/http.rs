//! A whole HTTP request against the router, with a stub model, on an open server and on one with an API key.
//!
//! The input is a request line, header lines, an empty line and the body, each line ending in `\n` or `\r\n`. hyper's own parser
//! is not part of this: a request that the `http` crate cannot represent is ignored.

use std::ops::Range;
use std::sync::LazyLock;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{Method, Request, StatusCode};
use futures_util::stream;
use http_body_util::{BodyExt, Limited};
use rerankd::api::{ApiLimits, App, HostList, Keys, Origins, parse_request, router};
use rerankd::client::RateLimits;
use rerankd::rerank::RerankRequest;
use rerankd::served::Models;
use rerankd::text::{Chunking, Tail};
use serde_json::Value;
use tower::ServiceExt;

use super::chunks;
use crate::support::stub::{self, TestResponse, WORDS};

const KEY: &str = "fuzz-key-1";
const LIMITS: ApiLimits = ApiLimits { max_documents: 20, max_body_bytes: 1 << 16, ..stub::LIMITS };
/// Paths that need no key, besides the static pages.
const OPEN_PATHS: [&str; 4] = ["/health", "/ready", "/openapi.json", "/v1/cluster/auth"];
/// The static pages.
const PAGES: [&str; 8] = [
    "/",
    "/docs",
    "/docs/",
    "/assets/style.css",
    "/assets/common.js",
    "/assets/playground.js",
    "/assets/reference.js",
    "/assets/example.txt",
];
/// The statuses of docs/api.md, except 429, because these servers have no rate limits; and those of the static pages: 304
/// (unchanged) and 308 (the redirect from `/docs/`).
const STATUSES: [u16; 14] = [200, 304, 308, 400, 401, 403, 404, 405, 408, 413, 415, 500, 503, 504];
/// Longest response to a POST, in bytes for each byte of the body, beyond a fixed part.
const RESPONSE_BYTES_PER_BODY_BYTE: usize = 8;
const MAX_RESPONSE_BYTES: usize = 16 << 20;

struct Servers {
    runtime: tokio::runtime::Runtime,
    open: Router,
    closed: Router,
}

static SERVERS: LazyLock<Servers> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let hosts = Some(HostList::new([]));
    let app = |keys, hosts| {
        let app = App::new(keys, LIMITS, hosts, Origins::default());
        app.set_models(Models::new(vec![stub::model("m", 0.0, stub::QUEUE).0]).unwrap());
        router(&app)
    };
    Servers {
        runtime,
        open: app(Keys::default(), hosts),
        closed: app(Keys::new([KEY], RateLimits::default()).expect("a valid key"), None),
    }
});

/// A request in parts, from which it is built once for each server.
struct Parts<'a> {
    method: &'a [u8],
    target: &'a str,
    headers: Vec<(&'a [u8], &'a [u8])>,
    body: &'a [u8],
}

/// Every response has a documented status, a request id and, if it is an error, the documented JSON; a ranking has the scores
/// of a naive implementation.
pub fn run(input: &[u8]) {
    let Some(parts) = Parts::split(input) else { return };
    let Some(request) = parts.request() else { return };
    let (path, method) = (tidy(request.uri().path()), request.method().clone());
    let answer = send(&SERVERS.open, request);
    check(&answer, &path, &method, parts.body);
    if answer.status == StatusCode::OK && method == Method::POST {
        check_ranking(&answer, parts.body);
    }
    let answer = send(&SERVERS.closed, parts.request().unwrap());
    check(&answer, &path, &method, parts.body);
    let is_open = OPEN_PATHS.contains(&&*path) || PAGES.contains(&&*path);
    let has_key = parts.headers.iter().any(|(_, value)| value.windows(KEY.len()).any(|part| part == KEY.as_bytes()));
    assert!(is_open || has_key || answer.status == StatusCode::UNAUTHORIZED, "{method} {path}: {}", answer.status);
}

fn send(server: &Router, request: Request<Body>) -> TestResponse {
    SERVERS.runtime.block_on(async {
        let (parts, body) = server.clone().oneshot(request).await.unwrap().into_parts();
        let bytes = Limited::new(body, MAX_RESPONSE_BYTES).collect().await.expect("a bounded response").to_bytes();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        TestResponse { status: parts.status, headers: parts.headers, text }
    })
}

fn check(answer: &TestResponse, path: &str, method: &Method, body: &[u8]) {
    let status = answer.status.as_u16();
    assert!(STATUSES.contains(&status), "{method} {path}: {status}");
    assert!(answer.headers.contains_key("x-request-id"));
    // Pages are HTML, and the metrics are a text that may be empty.
    if answer.status.is_redirection() || (status == 200 && (PAGES.contains(&path) || path == "/metrics")) {
        return;
    }
    if answer.text.is_empty() {
        assert_eq!(method, Method::HEAD, "{path}: {status} without a body");
        return;
    }
    let json: Value = serde_json::from_str(&answer.text).unwrap_or_else(|error| panic!("{error}: {}", answer.text));
    assert!(status == 200 || is_error(&json), "{status}: {json}");
    if method == Method::POST {
        let limit = RESPONSE_BYTES_PER_BODY_BYTE * body.len() + (16 << 10);
        assert!(answer.text.len() <= limit, "{} bytes for a body of {}", answer.text.len(), body.len());
    }
    if status == 500 {
        let request = parse_request(body, LIMITS.max_documents).unwrap();
        assert!(request.query.contains("nan") || request.query.contains("panic"), "{}", answer.text);
    }
}

/// The error of docs/api.md, or that of text-embeddings-inference.
fn is_error(json: &Value) -> bool {
    let usual = json["message"].is_string() && json["code"].is_u64() && json["error"]["message"] == json["message"];
    usual || (json["error"].is_string() && json["error_type"].is_string())
}

/// Compares order and scores with a naive implementation.
fn check_ranking(answer: &TestResponse, body: &[u8]) {
    let request = parse_request(body, LIMITS.max_documents).unwrap();
    let json = answer.json();
    let list = if json.is_array() {
        &json
    } else {
        ["results", "data", "rankings"].iter().map(|list| &json[*list]).find(|list| list.is_array()).unwrap()
    };
    let logits: Option<Vec<f64>> = request.documents.iter().map(|document| naive_logit(&request, document)).collect();
    let results = list.as_array().unwrap();
    assert_eq!(results.len(), request.documents.len().min(request.top_n.unwrap_or(usize::MAX)));
    let indices: Vec<usize> = results.iter().map(|result| result["index"].as_u64().unwrap() as usize).collect();
    let Some(logits) = logits else { return };
    let mut expected: Vec<usize> = (0..logits.len()).collect();
    expected.sort_by(|&a, &b| logits[b].total_cmp(&logits[a])); // stable: ties keep the request's order
    assert_eq!(indices, expected[..results.len()], "{request:?}");
    for (index, result) in indices.into_iter().zip(results) {
        let score = ["relevance_score", "score", "logit"].iter().find_map(|name| result[*name].as_f64()).unwrap();
        let sigmoid = 1.0 / (1.0 + (-logits[index]).exp());
        // serde_json reads numbers with an error of one unit in the last place.
        let is_close = |expected: f64| (score - expected).abs() <= 1e-12;
        assert!(is_close(sigmoid) || is_close(logits[index]), "document {index} scores {score}: {request:?}");
    }
}

/// The stub's logit: words of the best chunk that are in the query, minus one. `None` for texts with special tokens, and for
/// long ones, which the server tokenizes in slices.
fn naive_logit(request: &RerankRequest, document: &str) -> Option<f64> {
    const WINDOW: usize = 64;
    const SPECIAL_TOKENS: usize = 3;
    if [&*request.query, document].iter().any(|text| text.contains('[') || text.len() > 4096) {
        return None;
    }
    // 0 is the id of every unknown word.
    let id = |word: &str| WORDS.iter().position(|known| *known == word).map_or(0, |at| at + 3);
    let mut query: Vec<usize> = request.query.split_whitespace().map(id).collect();
    query.truncate((WINDOW - SPECIAL_TOKENS) / 2);
    let mut document: Vec<usize> = document.split_whitespace().map(id).collect();
    document.truncate(request.options.max_tokens_per_doc.unwrap_or(usize::MAX));
    let chunking = Chunking {
        room: WINDOW - SPECIAL_TOKENS - query.len(),
        overlap: request.options.overlap_tokens,
        max_chunks: request.options.max_chunks_per_doc,
        tail: Tail::Aligned,
    };
    let (chunks, _) = chunks::reference(document.len(), chunking, usize::MAX);
    let matches = |chunk: Range<usize>| document[chunk].iter().filter(|id| query.contains(id)).count();
    chunks.into_iter().map(matches).max().map(|most| most as f64 - 1.0)
}

impl<'a> Parts<'a> {
    /// `None` if the request line does not have a method and a target.
    fn split(input: &'a [u8]) -> Option<Self> {
        let mut rest = input;
        let mut words = line(&mut rest).splitn(3, |&byte| byte == b' ');
        let (method, target) = (words.next()?, str::from_utf8(words.next()?).ok()?);
        let mut headers = Vec::new();
        while !rest.is_empty() {
            let header = line(&mut rest);
            if header.is_empty() {
                break;
            }
            let colon = header.iter().position(|&byte| byte == b':')?;
            headers.push((&header[..colon], header[colon + 1..].trim_ascii()));
        }
        Some(Self { method, target, headers, body: rest })
    }

    /// `None` if a part is not valid HTTP. The body arrives in frames. The number of headers chooses their
    /// length, so that the fuzzer can change it.
    fn request(&self) -> Option<Request<Body>> {
        let mut builder = Request::builder().method(self.method).uri(self.target);
        for &(name, value) in &self.headers {
            builder = builder.header(name, value);
        }
        let frame = if self.headers.is_empty() { self.body.len().max(1) } else { 37 * self.headers.len() };
        let frames: Vec<_> =
            self.body.chunks(frame).map(|frame| Ok::<_, std::io::Error>(Bytes::copy_from_slice(frame))).collect();
        builder.body(Body::from_stream(stream::iter(frames))).ok()
    }
}

/// The next line, without its end.
fn line<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let end = rest.iter().position(|&byte| byte == b'\n').unwrap_or(rest.len());
    let (line, after) = (&rest[..end], &rest[rest.len().min(end + 1)..]);
    *rest = after;
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// The path as the router sees it: without double and trailing slashes.
fn tidy(path: &str) -> String {
    if path == "/docs/" {
        return path.to_owned();
    }
    format!("/{}", path.split('/').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/"))
}
