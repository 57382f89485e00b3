//! The cache of scores: what it answers, for whom, and that scores are the same with and without it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::http::Request;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rerankd::api::{App, Keys};
use rerankd::backend::cpu::CpuDtype;
use rerankd::client::RateLimits;
use rerankd::loading::source::ModelSource;
use rerankd::loading::{LoadOptions, Loader};
use rerankd::scheduler::SchedulerLimits;
use rerankd::served::Model;
use serde_json::{Value, json};

use crate::support::stub::{self, LIMITS, QUEUE, TestResponse, Watch, rerank, send, serving};
use crate::support::{cpu, limits, offline_hub};

/// An application with one stub model, which keeps 1 MiB of scores.
fn app(keys: &[&str], rates: RateLimits) -> (Arc<App>, Arc<Watch>) {
    let (model, watch) = stub::model("m", 0.0, QUEUE);
    let keys = Keys::new(keys.iter().copied(), rates).unwrap();
    (serving(vec![model.with_score_cache(1 << 20)], keys, LIMITS), watch)
}

fn ask(query: &str, documents: &[&str]) -> Value {
    json!({"model": "m", "query": query, "documents": documents})
}

async fn ask_with_key(app: &Arc<App>, key: &str, body: Value) -> TestResponse {
    send(app, Request::post("/v1/rerank").header("x-api-key", key).body(Body::from(body.to_string())).unwrap()).await
}

#[tokio::test]
async fn a_pair_is_scored_once_and_the_response_stays_the_same() {
    let (app, watch) = app(&[], RateLimits::default());
    let without = |response: TestResponse| {
        let mut json = response.json();
        json.as_object_mut().unwrap().remove("id");
        json
    };
    let first = without(rerank(&app, ask("apple", &["apple", "banana"])).await);
    assert_eq!(watch.pairs.load(Ordering::SeqCst), 2);
    assert_eq!(without(rerank(&app, ask("apple", &["apple", "banana"])).await), first);
    assert_eq!(watch.pairs.load(Ordering::SeqCst), 2, "the second request is answered from the cache");
    let mixed = rerank(&app, ask("apple", &["fruit", "banana", "apple red"])).await;
    assert_eq!(mixed.order(), [2, 0, 1]);
    assert_eq!(watch.pairs.load(Ordering::SeqCst), 4, "only the new documents are scored");
    rerank(&app, ask("banana", &["apple"])).await.order();
    assert_eq!(watch.pairs.load(Ordering::SeqCst), 5, "another query is another pair");
}

#[tokio::test]
async fn a_request_whose_scores_are_known_does_not_wait_in_the_queue() {
    let (app, watch) = app(&[], RateLimits::default());
    let known = rerank(&app, ask("apple", &["apple"])).await.score(0);
    let gate = watch.close_gate();
    let slow = tokio::spawn({
        let app = Arc::clone(&app);
        async move { rerank(&app, ask("apple", &["banana"])).await }
    });
    while watch.batches.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(rerank(&app, ask("apple", &["apple"])).await.score(0), known);
    drop(gate);
    slow.await.unwrap().order();
}

#[tokio::test]
async fn a_client_finds_its_own_scores_only_and_they_cost_it_no_tokens() {
    let tokens_per_minute = std::num::NonZeroU32::new(10);
    let (app, watch) = app(&["one", "two"], RateLimits { tokens_per_minute, requests_per_minute: None });
    for (key, pairs) in [("one", 1), ("one", 1), ("two", 2), ("one", 2), ("two", 2), ("one", 2)] {
        let answer = ask_with_key(&app, key, ask("apple", &["apple red"])).await; // 6 tokens
        assert_eq!(answer.order(), [0]);
        assert_eq!(watch.pairs.load(Ordering::SeqCst), pairs, "{key}");
    }
    let limited = ask_with_key(&app, "one", ask("apple", &["apple green"])).await;
    assert_eq!(limited.status, 429, "{}", limited.text);
}

#[tokio::test]
async fn scores_that_are_not_numbers_and_requests_that_fail_are_not_kept() {
    let (app, watch) = app(&[], RateLimits::default());
    for pairs in [1, 2] {
        assert_eq!(rerank(&app, ask("nan", &["apple"])).await.status, 500);
        assert_eq!(watch.pairs.load(Ordering::SeqCst), pairs);
    }
    for batches in [3, 4] {
        assert_eq!(rerank(&app, ask("panic", &["apple"])).await.status, 500);
        assert_eq!(watch.batches.load(Ordering::SeqCst), batches);
    }
}

/// The built-in model, with a cache of `bytes`.
fn mini(bytes: usize) -> Arc<App> {
    let options = LoadOptions { device: cpu(CpuDtype::F32, 2), window: Some(32), limits: limits(), profile: None };
    let hub = offline_hub();
    let loaded = Loader::new(&hub, &options).unwrap().load(&ModelSource::parse("rerankd-mini").unwrap()).unwrap();
    let queue = SchedulerLimits { max_batch_tokens: 128, ..QUEUE };
    serving(vec![Model::start(loaded, queue).unwrap().with_score_cache(bytes)], Keys::default(), LIMITS)
}

/// Random requests, several at a time: long documents, documents that occur several times, and queries that come back.
#[test]
fn scores_have_the_same_bits_with_and_without_a_cache() {
    let apps = [0, 1, 1000, 1 << 20].map(mini);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let words = ["apple", "banana", "fruit", "vegetable", "red", "green", "a", "car"];
    let text =
        |max| proptest::collection::vec(proptest::sample::select(words.to_vec()), 1..max).prop_map(|w| w.join(" "));
    let request = (proptest::sample::select(vec!["apple", "red car"]), proptest::collection::vec(text(60), 1..6));
    let mut runner = TestRunner::new(Config { cases: 12, failure_persistence: None, ..Config::default() });
    let ran = runner.run(&proptest::collection::vec(request, 1..4), |requests| {
        let answers = |app: &Arc<App>| {
            let calls = requests.iter().map(|(query, documents)| {
                let body = json!({"query": query, "documents": documents, "raw_scores": true, "return_chunks": true});
                rerank(app, body)
            });
            let answers = runtime.block_on(futures_util::future::join_all(calls));
            answers.into_iter().map(|answer| answer.json()["results"].clone()).collect::<Vec<_>>()
        };
        let expected = answers(&apps[0]);
        prop_assert!(expected.iter().all(|results| results.as_array().is_some_and(|results| !results.is_empty())));
        for app in &apps[1..] {
            prop_assert_eq!(&answers(app), &expected);
        }
        Ok(())
    });
    ran.unwrap();
}
