//! A stub model behind the real HTTP application, with scores that are easy to compute by hand.
//!
//! Its tokenizer knows [`WORDS`] and splits at whitespace. Its logit is the number of tokens of the chunk that are also in the
//! query, minus one, plus the model's bias. A query with the word "nan" scores NaN; one with the word "panic" panics.

#![allow(unreachable_pub, dead_code, reason = "benches and the fuzz crate include this file and use a part of it")]

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use http_body_util::BodyExt;
use rerankd::api::{ApiLimits, App, Keys, Origins, router};
use rerankd::backend::BackendError;
use rerankd::batch::Batch;
use rerankd::client::RateLimits;
use rerankd::encoder::CrossEncoder;
use rerankd::loading::LoadedModel;
use rerankd::scheduler::SchedulerLimits;
use rerankd::score::ScoreMap;
use rerankd::served::{Model, Models};
use rerankd::text::{EmbeddingRows, Tail, TextEncoder, TextLimits};
use serde_json::{Value, json};
use tower::ServiceExt;

pub const WORDS: [&str; 10] = ["apple", "banana", "fruit", "vegetable", "red", "green", "nan", "panic", "x", "y"];

pub const LIMITS: ApiLimits = ApiLimits {
    max_connections: 64,
    max_documents: 100,
    max_body_bytes: 1 << 20,
    max_inflight_bytes: 4 << 20,
    body_timeout: Duration::from_secs(5),
    request_timeout_s: 20,
};

pub const QUEUE: SchedulerLimits = SchedulerLimits {
    max_batch_tokens: 256,
    max_queue_tokens: 50_000,
    max_queue_wait: Duration::from_secs(3600),
    batch_timeout: Duration::from_secs(3600),
};

/// Counters of the stub's batches and pairs, and a gate: while it is closed, batches wait in `score`.
#[derive(Default)]
pub struct Watch {
    /// Pairs that were scored.
    pub pairs: AtomicUsize,
    /// Batches that were begun.
    pub batches: AtomicUsize,
    gate: Mutex<Option<Receiver<()>>>,
}

impl Watch {
    /// Waits until the stub has begun its first batch.
    pub async fn batch_started(&self) {
        while self.batches.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    }

    /// Closes the gate: each further batch waits for one message from the returned sender. Dropping the sender opens the gate.
    pub fn close_gate(&self) -> Sender<()> {
        let (open, gate) = channel();
        *self.gate.lock().unwrap() = Some(gate);
        open
    }
}

struct Stub {
    watch: Arc<Watch>,
    bias: f32,
}

impl CrossEncoder for Stub {
    fn score(&self, batch: &Batch) -> Result<Vec<f32>, BackendError> {
        self.watch.batches.fetch_add(1, Ordering::SeqCst);
        if let Some(gate) = &*self.watch.gate.lock().unwrap() {
            gate.recv().ok();
        }
        self.watch.pairs.fetch_add(batch.sequences(), Ordering::SeqCst);
        Ok(batch.ranges().map(|rows| self.logit(&batch.ids()[rows])).collect())
    }

    fn describe(&self) -> String {
        "stub".to_owned()
    }
}

impl Stub {
    fn logit(&self, ids: &[u32]) -> f32 {
        let id = |word: &str| 3 + WORDS.iter().position(|w| *w == word).unwrap() as u32;
        let mut parts = ids[1..ids.len() - 1].splitn(2, |&id| id == 2);
        let (query, document) = (parts.next().unwrap(), parts.next().unwrap());
        assert!(!query.contains(&id("panic")), "the stub was asked to panic");
        if query.contains(&id("nan")) {
            return f32::NAN;
        }
        document.iter().filter(|id| query.contains(id)).count() as f32 - 1.0 + self.bias
    }
}

/// `[CLS] query [SEP] document [SEP]` over [`WORDS`], as a tokenizer.json.
pub fn tokenizer_json() -> String {
    let mut vocabulary = json!({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2});
    for (i, word) in WORDS.iter().enumerate() {
        vocabulary[word] = json!(i + 3);
    }
    let special = |id: u32, token: &str| json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let cls = json!({"SpecialToken": {"id": "[CLS]", "type_id": 0}});
    let (sep, sep1) = (
        json!({"SpecialToken": {"id": "[SEP]", "type_id": 0}}),
        json!({"SpecialToken": {"id": "[SEP]", "type_id": 1}}),
    );
    let (a, b) = (json!({"Sequence": {"id": "A", "type_id": 0}}), json!({"Sequence": {"id": "B", "type_id": 1}}));
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "[UNK]"), special(1, "[CLS]"), special(2, "[SEP]")],
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing", "single": [cls, a, sep], "pair": [cls, a, sep, b, sep1],
            "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]}, "[SEP]": {"id": "[SEP]", "ids": [2], "tokens": ["[SEP]"]}},
        },
        "decoder": null, "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    })
    .to_string()
}

/// A stub model with this name. `bias` is added to its logits.
pub fn model(name: &str, bias: f32, queue: SchedulerLimits) -> (Model, Arc<Watch>) {
    let limits = TextLimits {
        max_query_tokens: None,
        max_document_chars: 100_000,
        max_request_tokens: 20_000,
        tail: Tail::Aligned,
        threads: 2,
        max_tokenizer_wait: std::time::Duration::MAX,
    };
    let rows = EmbeddingRows { vocabulary: 3 + WORDS.len(), token_types: 2 };
    let text = TextEncoder::new(tokenizer_json().as_bytes(), rows, 64, limits).unwrap();
    let watch = Arc::new(Watch::default());
    let encoder = Arc::new(Stub { watch: Arc::clone(&watch), bias });
    let (vocabulary, description) = (3 + WORDS.len(), String::new());
    let loaded = LoadedModel {
        name: name.to_owned(),
        aliases: vec![],
        score_map: ScoreMap::default(),
        text,
        encoder,
        dtype: "f32",
        vocabulary,
        description,
    };
    (Model::start(loaded, queue).unwrap(), watch)
}

/// An application with these models.
pub fn serving(models: Vec<Model>, keys: Keys, limits: ApiLimits) -> Arc<App> {
    let app = App::new(keys, limits, None, Origins::default());
    app.set_models(Models::new(models).unwrap());
    app
}

/// An application without keys, with one stub model called `m`.
pub fn app() -> (Arc<App>, Arc<Watch>) {
    app_with(&[], LIMITS, QUEUE)
}

/// An application with one stub model called `m`, with these keys and limits.
pub fn app_with(keys: &[&str], limits: ApiLimits, queue: SchedulerLimits) -> (Arc<App>, Arc<Watch>) {
    let (model, watch) = model("m", 0.0, queue);
    (serving(vec![model], Keys::new(keys.iter().copied(), RateLimits::default()).unwrap(), limits), watch)
}

/// An HTTP response with its body read.
pub struct TestResponse {
    pub status: StatusCode,
    pub headers: axum::http::HeaderMap,
    pub text: String,
}

impl TestResponse {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// Indices of the documents, best first. Panics unless the status is 200.
    pub fn order(&self) -> Vec<u64> {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text);
        self.json()["results"].as_array().unwrap().iter().map(|r| r["index"].as_u64().unwrap()).collect()
    }

    pub fn score(&self, index: u64) -> f64 {
        let json = self.json();
        let result = json["results"].as_array().unwrap().iter().find(|r| r["index"] == index).unwrap();
        result["relevance_score"].as_f64().unwrap()
    }
}

/// Sends a request to the router, without a socket.
pub async fn send(app: &Arc<App>, request: Request<Body>) -> TestResponse {
    let response = router(app).oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    TestResponse { status: parts.status, headers: parts.headers, text: String::from_utf8(bytes.to_vec()).unwrap() }
}

pub async fn get(app: &Arc<App>, path: &str) -> TestResponse {
    send(app, Request::get(path).body(Body::empty()).unwrap()).await
}

pub async fn post(app: &Arc<App>, path: &str, body: impl Into<Body>) -> TestResponse {
    send(app, Request::post(path).body(body.into()).unwrap()).await
}

pub async fn rerank(app: &Arc<App>, body: Value) -> TestResponse {
    post(app, "/v1/rerank", body.to_string()).await
}

/// Checks an error response: its status, its body in the fields that every client library reads, and its request id.
pub fn check_error(response: &TestResponse, status: u16, code: u16, kind: &str, contains: &str) {
    assert_eq!(response.status.as_u16(), status, "{}", response.text);
    assert!(response.headers.contains_key("x-request-id"));
    let body = response.json();
    let message = body["message"].as_str().unwrap();
    assert!(message.contains(contains), "{message}");
    assert_eq!(body["code"], code, "{body}");
    assert!(body["data"].is_null() && body.get("results").is_none());
    assert_eq!(body["detail"], message);
    assert_eq!(body["error"], json!({"message": message, "type": kind, "code": code}));
}
