//! The HTTP API in process, with the stub model of support/stub.rs.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::http::Request;
use rerankd::api::{ApiLimits, App, Keys};
use rerankd::client::RateLimits;
use rerankd::scheduler::SchedulerLimits;
use rerankd::served::Models;
use serde_json::{Value, json};

use crate::support::stub::{self, LIMITS, QUEUE, app, app_with, check_error, get, post, rerank, send, serving};

fn body(documents: Value) -> Value {
    json!({"model": "m", "query": "red apple", "documents": documents})
}

fn sigmoid(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

#[tokio::test]
async fn the_documented_example_gets_the_documented_response() {
    let (app, _) = app();
    let mut request = body(json!(["banana", "apple", "red apple", ""]));
    request["top_n"] = json!(3);
    request["return_documents"] = json!(true);
    let answer = rerank(&app, request).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let mut found = answer.json();
    assert!(found["id"].as_str().is_some_and(|id| !id.is_empty()) && found["created"].as_u64() > Some(1_700_000_000));
    found["id"] = json!("…");
    found["created"] = json!(1);
    // [CLS] red apple [SEP] document [SEP]: 5 tokens in each of 4 pairs, and 1, 1, 2 and 0 of the documents.
    let tokens = json!({"input_tokens": 24, "output_tokens": 0});
    let expected = json!({
        "id": "…",
        "results": [
            {"index": 2, "relevance_score": sigmoid(1.0), "document": {"text": "red apple"}},
            {"index": 1, "relevance_score": 0.5, "document": {"text": "apple"}},
            {"index": 0, "relevance_score": sigmoid(-1.0), "document": {"text": "banana"}},
        ],
        "data": [
            {"index": 2, "relevance_score": sigmoid(1.0), "document": "red apple"},
            {"index": 1, "relevance_score": 0.5, "document": "apple"},
            {"index": 0, "relevance_score": sigmoid(-1.0), "document": "banana"},
        ],
        "tokens": tokens,
        "meta": {
            "api_version": {"version": "1"},
            "billed_units": {"input_tokens": 24, "output_tokens": 0, "search_units": 1, "classifications": 0},
            "tokens": tokens,
        },
        "model": "m", "object": "rerank", "created": 1,
        "usage": {"prompt_tokens": 24, "completion_tokens": 0, "total_tokens": 24},
    });
    assert_eq!(found, expected);
    assert!(answer.headers["server-timing"].to_str().unwrap().starts_with("tokenize;dur="));
    assert_eq!(answer.headers["x-rerankd-truncated"], "query=0, documents=0, chunks=0");
}

#[tokio::test]
async fn tied_scores_keep_request_order_and_documents_are_not_returned_by_default() {
    let (app, _) = app();
    let answer = rerank(&app, body(json!(["x", "y", "apple", "x"]))).await;
    assert_eq!(answer.order(), [2, 0, 1, 3]);
    assert!(answer.json()["results"][0].get("document").is_none());
}

#[tokio::test]
async fn path_variants_are_accepted_without_a_content_type() {
    let (app, _) = app();
    for path in [
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
        "/v1/v1/rerank",
        "/v1/v2/rerank",
        "//v1/rerank",
        "/v1/rerank/",
        "/v1//rerank//",
    ] {
        assert_eq!(post(&app, path, body(json!(["x", "apple"])).to_string()).await.order(), [1, 0], "{path}");
    }
}

#[tokio::test]
async fn a_long_document_scores_as_its_best_chunk() {
    let (app, watch) = app();
    let padding = "x ".repeat(300);
    let answer = rerank(&app, body(json!([format!("{padding} red apple"), "apple", padding]))).await;
    assert_eq!(answer.order(), [0, 1, 2]);
    assert_eq!(answer.score(0), sigmoid(1.0));
    // A chunk has room for 64 - 2 - 3 = 59 tokens, and the stride is 59 - 59 / 4 = 45. So 302 tokens make
    // 1 + ceil(243 / 45) = 7 chunks, and so do 300. Equal chunks are computed once: the first 6 chunks of the first
    // document and the 7 of the third are all x.
    assert_eq!(watch.pairs.load(Ordering::SeqCst), 3);
    let mut capped = body(json!([format!("{padding} red apple")]));
    capped["max_chunks_per_doc"] = json!(6);
    let answer = rerank(&app, capped).await;
    assert_eq!(answer.score(0), sigmoid(-1.0), "the chunk with the words is the seventh");
    assert_eq!(answer.headers["x-rerankd-truncated"], "query=0, documents=1, chunks=1");
    let mut capped = body(json!([format!("{padding} red apple")]));
    capped["max_chunks_per_doc"] = json!(2);
    assert_eq!(rerank(&app, capped).await.headers["x-rerankd-truncated"], "query=0, documents=1, chunks=5");
}

#[tokio::test]
async fn long_queries_are_truncated_and_documents_on_request() {
    let (app, _) = app();
    let request =
        json!({"model": "m", "query": format!("{} apple", "red ".repeat(100)), "documents": ["apple", "red"]});
    let answer = rerank(&app, request).await;
    assert_eq!(answer.order(), [1, 0], "the word apple is beyond the query's share");
    assert_eq!(answer.headers["x-rerankd-truncated"], "query=1, documents=0, chunks=0");
    let mut request = body(json!(["x x apple"]));
    for field in ["max_chunks_per_doc", "max_tokens_per_doc", "top_n"] {
        request[field] = json!(i64::MAX);
    }
    assert_eq!(rerank(&app, request.clone()).await.score(0), sigmoid(0.0), "a limit may be any i64");
    request["max_tokens_per_doc"] = json!(2);
    assert_eq!(rerank(&app, request).await.score(0), sigmoid(-1.0));
    // 40 x 1000 tokens are over the 20,000 of one request; 40 x 10 are not.
    let mut request = body(json!((0..40).map(|i| format!("{i} ").repeat(1000)).collect::<Vec<_>>()));
    request["max_tokens_per_doc"] = json!(10);
    assert_eq!(rerank(&app, request).await.status, 200, "tokens beyond max_tokens_per_doc are not counted");
}

#[tokio::test]
async fn each_error_status_has_its_body() {
    let limits = ApiLimits { max_documents: 3, max_body_bytes: 100_000, ..LIMITS };
    let (app, _) = app_with(&[], limits, QUEUE);
    let answer = rerank(&app, json!({"model": "other", "query": "q", "documents": ["a"]})).await;
    check_error(&answer, 400, 20012, "invalid_request_error", "Model does not exist. Please check it carefully.");
    let answer = rerank(&app, json!({"model": "m", "query": " ", "documents": ["a"]})).await;
    check_error(&answer, 400, 20015, "invalid_request_error", "query: ");
    let answer = rerank(&app, body(json!(["a", {"text": 1}]))).await;
    check_error(&answer, 400, 20015, "invalid_request_error", "documents[1]");
    let answer = rerank(&app, body(json!(["a", "b", "c", "d"]))).await;
    check_error(&answer, 400, 20015, "invalid_request_error", "has 4 texts, the limit is 3");
    let answer = post(&app, "/v1/rerank", "{").await;
    check_error(&answer, 400, 20015, "invalid_request_error", "");
    let answer = post(&app, "/v1/rerank", vec![b'{', b'"', 0xff, b'"', b'}']).await;
    check_error(&answer, 400, 20015, "invalid_request_error", "");
    let answer = get(&app, "/v1/rerank").await;
    check_error(&answer, 405, 405, "not_found_error", "POST");
    let answer = post(&app, "/health", "").await;
    check_error(&answer, 405, 405, "not_found_error", "GET");
    let answer = get(&app, "/nothing").await;
    check_error(&answer, 404, 404, "not_found_error", "/v1/rerank");
    let answer = rerank(&app, body(json!(["x".repeat(100_001)]))).await;
    check_error(&answer, 413, 413, "request_too_large", "100000 bytes");
    // Each document of 15,000 tokens is split into 334 chunks, in pairs of at most 64 tokens: over the request's 20,000.
    let answer = rerank(&app, body(json!(["x ".repeat(15_000), "y ".repeat(15_000)]))).await;
    check_error(&answer, 413, 413, "request_too_large", "the limit is 20000");
    let request = Request::post("/v1/rerank").header("content-encoding", "gzip").body(Body::from("x")).unwrap();
    check_error(&send(&app, request).await, 415, 415, "invalid_request_error", "uncompressed");
    let answer = rerank(&app, json!({"model": "m", "query": "nan", "documents": ["a"]})).await;
    check_error(&answer, 500, 500, "api_error", "non_finite_score");
}

#[tokio::test]
async fn error_messages_do_not_repeat_long_invalid_values() {
    let (app, _) = app();
    for field in ["top_n", "return_documents", "rank_fields"] {
        let mut request = body(json!([{"a": "b"}]));
        request[field] = if field == "rank_fields" { json!(["y".repeat(500_000)]) } else { json!("y".repeat(500_000)) };
        let answer = rerank(&app, request).await;
        assert!(answer.status == 400 && answer.text.len() < 5_000, "{field}: {} bytes", answer.text.len());
    }
}

#[tokio::test]
async fn health_fails_when_the_model_returns_nan() {
    let (model, _) = stub::model("m", f32::NAN, QUEUE);
    let app = serving(vec![model], Keys::default(), LIMITS);
    check_error(&rerank(&app, body(json!(["a"]))).await, 500, 500, "api_error", "non_finite_score");
    check_error(&get(&app, "/health").await, 503, 503, "overloaded_error", "non_finite_score");
}

#[tokio::test]
async fn a_model_panic_fails_only_its_own_request() {
    let (app, _) = app();
    let answer = rerank(&app, json!({"model": "m", "query": "panic", "documents": ["a"]})).await;
    check_error(&answer, 500, 500, "api_error", "internal error");
    assert_eq!(rerank(&app, body(json!(["x", "apple"]))).await.order(), [1, 0]);
}

#[tokio::test]
async fn an_oversized_content_length_is_rejected_before_the_body_is_read() {
    let (app, _) = app();
    let endless = Body::from_stream(futures_util::stream::pending::<Result<Vec<u8>, std::io::Error>>());
    let request = Request::post("/v1/rerank").header("content-length", "50000000").body(endless).unwrap();
    check_error(&send(&app, request).await, 413, 413, "request_too_large", "");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_arrive_times_out() {
    let (app, _) = app();
    let endless = Body::from_stream(futures_util::stream::pending::<Result<Vec<u8>, std::io::Error>>());
    let answer = post(&app, "/v1/rerank", endless).await;
    check_error(&answer, 408, 408, "timeout_error", "5 s");
}

#[tokio::test]
async fn request_bodies_share_a_memory_budget() {
    let limits = ApiLimits { max_inflight_bytes: 6 << 10, ..LIMITS };
    let (app, watch) = app_with(&[], limits, QUEUE);
    let gate = watch.close_gate();
    let held = tokio::spawn({
        let app = Arc::clone(&app);
        async move { rerank(&app, body(json!(["apple"]))).await }
    });
    watch.batch_started().await;
    // Each body takes 4 KiB at least.
    let answer = rerank(&app, body(json!(["apple"]))).await;
    check_error(&answer, 503, 50505, "overloaded_error", "overloaded");
    drop(gate);
    assert_eq!(held.await.unwrap().order(), [0]);
}

#[tokio::test]
async fn a_full_queue_rejects_new_requests_and_keeps_queued_ones() {
    let queue = SchedulerLimits { max_queue_tokens: 20, ..QUEUE };
    let (app, watch) = app_with(&[], LIMITS, queue);
    let gate = watch.close_gate();
    let first = tokio::spawn({
        let app = Arc::clone(&app);
        async move { rerank(&app, body(json!(["x", "apple"]))).await } // 12 tokens
    });
    watch.batch_started().await;
    let answer = rerank(&app, body(json!(["x", "y"]))).await;
    check_error(&answer, 503, 50505, "overloaded_error", "Model service overloaded. Please try again later.");
    let seconds: u64 = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds));
    drop(gate);
    assert_eq!(first.await.unwrap().order(), [1, 0]);
    assert_eq!(rerank(&app, body(json!(["x", "apple"]))).await.order(), [1, 0]);
}

#[tokio::test]
async fn an_expired_deadline_is_a_504_and_its_queued_pairs_are_dropped() {
    let (app, watch) = app();
    let gate = watch.close_gate();
    let request = |app: &Arc<App>| {
        let app = Arc::clone(app);
        tokio::spawn(async move { rerank(&app, body(json!(["apple"]))).await })
    };
    let first = request(&app);
    watch.batch_started().await;
    // From here on the clock jumps to the next timer whenever all tasks wait: the requests' deadlines.
    tokio::time::pause();
    let second = request(&app);
    for late in [first, second] {
        check_error(&late.await.unwrap(), 504, 504, "timeout_error", "20 s");
    }
    drop(gate);
    // A runtime of its own, because the clock of this one has jumped.
    let last = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(rerank(&app, body(json!(["x", "apple"]))))
    });
    assert_eq!(last.join().unwrap().order(), [1, 0]);
    assert_eq!(watch.pairs.load(Ordering::SeqCst), 3, "the first request's pair and the third's two");
}

#[tokio::test]
async fn queued_pairs_of_a_disconnected_client_are_dropped() {
    let (app, watch) = app();
    let gate = watch.close_gate();
    let texts: Vec<String> = (0..100).map(|i| "x ".repeat(i % 50 + 1)).collect();
    let request = tokio::spawn({
        let app = Arc::clone(&app);
        async move { rerank(&app, body(json!(texts))).await }
    });
    watch.batch_started().await;
    request.abort();
    assert!(request.await.is_err());
    drop(gate);
    assert_eq!(rerank(&app, body(json!(["x", "apple"]))).await.order(), [1, 0]);
    let computed = watch.pairs.load(Ordering::SeqCst);
    assert!(computed < 30, "{computed}: one batch of 256 tokens, then the other request's pairs");
}

#[tokio::test]
async fn pages_need_no_key_load_nothing_from_elsewhere_and_are_revalidated() {
    let (app, _) = app_with(&["secret"], LIMITS, QUEUE);
    let mut paths = vec!["/".to_owned(), "/docs".to_owned()];
    for html in ["/", "/docs"] {
        let text = get(&app, html).await.text;
        let links = text.split('"').collect::<Vec<_>>();
        let assets = links.iter().filter(|link| link.starts_with("assets/")).map(|link| format!("/{link}"));
        paths.extend(assets);
    }
    assert!(paths.len() >= 6, "each page has a style and a script: {paths:?}");
    for path in paths {
        let answer = get(&app, &path).await;
        assert_eq!(answer.status, 200, "{path}");
        assert!(!answer.text.contains("https://"), "{path}");
        let policy = answer.headers["content-security-policy"].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{path}: {policy}");
        assert_eq!(answer.headers["x-content-type-options"], "nosniff", "{path}");
        let again = Request::get(&path).header("if-none-match", &answer.headers["etag"]).body(Body::empty()).unwrap();
        let again = send(&app, again).await;
        assert_eq!((again.status.as_u16(), again.text.as_str()), (304, ""), "{path}");
        let older = Request::get(&path).header("if-none-match", "\"older\"").body(Body::empty()).unwrap();
        assert_eq!(send(&app, older).await.text, answer.text, "{path}");
    }
    let slash = get(&app, "/docs/").await;
    assert_eq!((slash.status.as_u16(), slash.headers["location"].to_str().unwrap()), (308, "../docs"));
    for path in ["/assets/", "/assets/nope", "/docs/nope"] {
        check_error(&get(&app, path).await, 401, 401, "authentication_error", "Invalid token");
    }
}

#[tokio::test]
async fn keys_are_required_everywhere_but_on_health_and_contract_paths() {
    let (app, watch) = app_with(&["secret", "other"], LIMITS, QUEUE);
    let ask = |path: &str, header: Option<(&str, &str)>| {
        let mut request = Request::post(path);
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        request.body(Body::from(body(json!(["apple"])).to_string())).unwrap()
    };
    for path in ["/v1/rerank", "//v1/rerank", "/v1/rerank/", "/v1/models", "/metrics", "/nothing", "/%2fhealth"] {
        for header in [
            None,
            Some(("authorization", "Bearer wrong")),
            Some(("authorization", "Basic secret")),
            Some(("x-api-key", "secre")),
        ] {
            let answer = send(&app, ask(path, header)).await;
            check_error(&answer, 401, 401, "authentication_error", "Invalid token");
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
        }
    }
    assert_eq!(watch.pairs.load(Ordering::SeqCst), 0);
    for header in [
        ("authorization", "Bearer secret"),
        ("authorization", "bearer other"),
        ("authorization", "secret"),
        ("x-api-key", "other"),
    ] {
        assert_eq!(send(&app, ask("/v1/rerank", Some(header))).await.order(), [0], "{header:?}");
    }
    for path in ["/health", "/ready", "/openapi.json"] {
        assert_eq!(get(&app, path).await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn requests_are_routed_to_the_model_they_name() {
    let (one, _) = stub::model("org/one", 0.0, QUEUE);
    let (two, _) = stub::model("org/two", 2.0, QUEUE);
    let app = serving(vec![one, two], Keys::default(), LIMITS);
    let ask = |model: &str| json!({"model": model, "query": "apple", "documents": ["apple"]});
    for (model, name, logit) in [
        ("org/one", "org/one", 0.0),
        ("org/two", "org/two", 2.0),
        ("gateway/org/two", "org/two", 2.0),
        ("ORG/One", "org/one", 0.0),
    ] {
        let answer = rerank(&app, ask(model)).await;
        assert_eq!((answer.score(0), &answer.json()["model"]), (sigmoid(logit), &json!(name)));
    }
    for unknown in ["three", "org", "org/one/", "../org/one x", "o\r\nne"] {
        check_error(&rerank(&app, ask(unknown)).await, 400, 20012, "invalid_request_error", "does not exist");
    }
    let (again, _) = stub::model("org/one", 0.0, QUEUE);
    let (other, _) = stub::model("ORG/ONE", 0.0, QUEUE);
    assert!(Models::new(vec![again, other]).is_err());
}

#[tokio::test]
async fn models_health_and_metrics_are_reported() {
    rerankd::telemetry::metrics::prometheus();
    let (app, _) = app();
    assert_eq!(rerank(&app, body(json!(["apple"]))).await.order(), [0]);
    let list = get(&app, "/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(
        (&list["data"][0]["id"], &list["data"][0]["model_type"], &list["data"][0]["max_input_tokens"]),
        (&json!("m"), &json!("rerank"), &json!(64))
    );
    assert_eq!(get(&app, "/v1/models/m").await.json()["id"], "m");
    check_error(&get(&app, "/v1/models/x/y").await, 404, 404, "not_found_error", "/v1/models");
    assert_eq!(get(&app, "/health").await.json(), json!({"status": "ok"}));
    let metrics = get(&app, "/metrics").await.text;
    for name in [
        "rerankd_requests_total{route=\"/v1/rerank\",status=\"200\"}",
        "rerankd_request_seconds_bucket",
        "rerankd_tokens_total{model=\"m\"}",
        "rerankd_queue_tokens",
    ] {
        assert!(metrics.contains(name), "{name} is missing in\n{metrics}");
    }
}

#[tokio::test]
async fn health_fails_when_the_model_does_not_answer() {
    let (app, watch) = app();
    let gate = watch.close_gate();
    let stuck = tokio::spawn({
        let app = Arc::clone(&app);
        async move { get(&app, "/health").await }
    });
    watch.batch_started().await;
    tokio::time::pause();
    check_error(&stuck.await.unwrap(), 503, 503, "overloaded_error", "m: ");
    drop(gate);
}

#[tokio::test]
async fn openapi_lists_every_status() {
    let (app, _) = app();
    let contract = get(&app, "/openapi.json").await.json();
    assert!(contract["openapi"].as_str().unwrap().starts_with("3."));
    let responses = contract["paths"]["/v1/rerank"]["post"]["responses"].as_object().unwrap();
    for status in ["200", "400", "401", "408", "413", "415", "429", "500", "503", "504"] {
        assert!(responses.contains_key(status), "{status}");
    }
}

#[tokio::test]
async fn a_valid_request_id_is_kept_and_an_invalid_one_replaced() {
    let (app, _) = app();
    let ask = |id: &str| Request::get("/ready").header("x-request-id", id).body(Body::empty()).unwrap();
    assert_eq!(send(&app, ask("trace-1")).await.headers["x-request-id"], "trace-1");
    assert_ne!(send(&app, ask("two words")).await.headers["x-request-id"], "two words");
    assert_ne!(send(&app, ask(&"x".repeat(200))).await.headers["x-request-id"].len(), 200);
}

/// Texts that split into one word of a million bytes, or into half a million words. Short requests that are sent meanwhile are
/// answered.
#[tokio::test(flavor = "multi_thread")]
async fn very_long_texts_are_answered_or_rejected_by_their_token_count() {
    let (app, _) = app();
    for (text, status) in [
        ("!".repeat(1_000_000), 200),
        ("😀".repeat(250_000), 200),
        ("\u{fdfa}".repeat(100_000), 200),
        ("x ".repeat(500_000), 413),
    ] {
        let (long, short) = (body(json!([text])), body(json!(["x", "apple"])));
        let (long, short) = tokio::join!(rerank(&app, long), rerank(&app, short));
        assert_eq!(long.status, status, "{} bytes: {}", text.len(), long.text);
        assert_eq!(short.order(), [1, 0]);
    }
    assert_eq!(get(&app, "/health").await.status, 200);
}

// Findings B and 1: the time was the product of rank_fields and fields, both limited by the size of the body only.
#[tokio::test]
async fn rank_fields_are_bounded_and_only_wanted_fields_are_read() {
    let (app, _) = app();
    let fields: String = (0..60_000).map(|i| format!(r#""f{i}":"","#)).collect();
    let document = format!(r#"{{{fields}"title":"red apple","text":"x"}}"#);
    let names: Vec<String> = (0..65).map(|i| format!("z{i}")).collect();
    let ask = |names: &[String]| {
        let names = json!(names);
        format!(r#"{{"model":"m","query":"red apple","rank_fields":{names},"documents":[{document}]}}"#)
    };
    let answer = post(&app, "/v1/rerank", ask(&names)).await;
    check_error(&answer, 400, 20015, "invalid_request_error", "rank_fields");
    let answer = post(&app, "/v1/rerank", ask(&["title".to_owned()])).await;
    assert_eq!(answer.score(0), sigmoid(1.0), "{}", answer.text);
}

// Finding 17: the sigmoid of large logits is exactly 1, and cannot order them.
#[tokio::test]
async fn results_are_ordered_by_logit_also_where_the_score_saturates() {
    let (model, _) = stub::model("m", 5000.0, QUEUE);
    let app = serving(vec![model], Keys::default(), LIMITS);
    let answer = rerank(&app, body(json!(["x", "red apple", "apple"]))).await;
    assert_eq!(answer.order(), [1, 2, 0]);
    assert_eq!((answer.score(0), answer.score(1)), (1.0, 1.0));
}

#[tokio::test]
async fn an_unknown_model_is_answered_with_the_names_asked_for_and_served() {
    let (app, _) = app();
    let answer = rerank(&app, json!({"model": "other", "query": "q", "documents": ["a"]})).await;
    check_error(&answer, 400, 20012, "invalid_request_error", "Model does not exist. Please check it carefully.");
    assert!(answer.text.contains("other") && answer.text.contains("this server has m"), "{}", answer.text);
}

#[tokio::test]
async fn a_byte_order_mark_before_the_json_is_accepted() {
    let (app, _) = app();
    let answer = post(&app, "/v1/rerank", format!("\u{feff}{}", body(json!(["x", "apple"])))).await;
    assert_eq!(answer.order(), [1, 0]);
}

/// A request for 12 tokens of work, with an API key.
fn twelve_tokens(key: &str) -> Request<Body> {
    let request = Request::post("/v1/rerank").header("authorization", format!("Bearer {key}"));
    request.body(Body::from(body(json!(["x", "apple"])).to_string())).unwrap()
}

#[tokio::test]
async fn one_client_cannot_fill_the_queue_for_others() {
    let queue = SchedulerLimits { max_queue_tokens: 96, ..QUEUE };
    let (app, watch) = app_with(&["greedy", "modest"], LIMITS, queue);
    let gate = watch.close_gate();
    let ask = |key: &'static str| {
        let app = Arc::clone(&app);
        async move { send(&app, twelve_tokens(key)).await }
    };
    let mut greedy = tokio::task::JoinSet::new();
    (0..10).for_each(|_| drop(greedy.spawn(ask("greedy"))));
    for _ in 0..6 {
        let refused = greedy.join_next().await.unwrap().unwrap();
        check_error(&refused, 503, 50505, "overloaded_error", "overloaded");
    }
    let modest = tokio::spawn(ask("modest"));
    while app.models().unwrap().iter().next().unwrap().scheduler.waiting_tokens() < 5 * 12 {
        tokio::task::yield_now().await;
    }
    drop(gate);
    assert_eq!(modest.await.unwrap().order(), [1, 0]);
    for answer in greedy.join_all().await {
        assert_eq!(answer.order(), [1, 0]);
    }
}

#[tokio::test]
async fn a_key_beyond_its_rate_limit_gets_429_and_other_keys_do_not() {
    let limits = |requests, tokens| RateLimits {
        requests_per_minute: NonZeroU32::new(requests),
        tokens_per_minute: NonZeroU32::new(tokens),
    };
    for (limits, message) in [(limits(1, 0), "1 requests per minute"), (limits(0, 20), "20 tokens per minute")] {
        let (model, watch) = stub::model("m", 0.0, QUEUE);
        let app = serving(vec![model], Keys::new(["first", "second"], limits).unwrap(), LIMITS);
        assert_eq!(send(&app, twelve_tokens("first")).await.order(), [1, 0]);
        let answer = send(&app, twelve_tokens("first")).await;
        check_error(&answer, 429, 429, "rate_limit_error", message);
        let seconds: u64 = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=60).contains(&seconds));
        assert_eq!(send(&app, twelve_tokens("second")).await.order(), [1, 0]);
        assert_eq!(watch.pairs.load(Ordering::SeqCst), 4, "the refused request was not computed");
    }
}
