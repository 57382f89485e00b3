//! Requests, responses and errors of each rerank API dialect, with the stub model.

use serde_json::{Value, json};

use crate::support::stub::{self, app, check_error, get, post, rerank};

fn sigmoid(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

#[tokio::test]
async fn text_embeddings_inference_requests_get_its_response_shape() {
    let (app, _) = app();
    let ask = |more: Value| {
        let mut body = json!({"query": "red apple", "texts": ["x", "red apple", "apple"]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body.to_string()
    };
    let more = json!({"raw_scores": false, "return_text": false, "truncate": true, "truncation_direction": "Right"});
    for path in ["/rerank", "/v1/rerank"] {
        let answer = post(&app, path, ask(more.clone())).await;
        let expected = json!([{"index": 1, "score": sigmoid(1.0)}, {"index": 2, "score": 0.5}, {"index": 0, "score": sigmoid(-1.0)}]);
        assert_eq!((answer.status.as_u16(), answer.json()), (200, expected));
    }
    let answer = post(&app, "/rerank", ask(json!({"raw_scores": true, "return_text": true, "truncate": null}))).await;
    let expected = json!([{"index": 1, "score": 1.0, "text": "red apple"}, {"index": 2, "score": 0.0, "text": "apple"}, {"index": 0, "score": -1.0, "text": "x"}]);
    assert_eq!(answer.json(), expected);
    let answer = post(&app, "/rerank", ask(json!({"top_n": 1}))).await;
    assert_eq!(answer.json(), json!([{"index": 1, "score": sigmoid(1.0)}]), "LiteLLM sends top_n");
    for (body, status, kind, contains) in [
        (json!({"query": "", "texts": ["a"]}), 400, "Validation", "query"),
        (json!({"query": "q", "texts": []}), 400, "Validation", "texts"),
        (json!({"query": "q", "texts": ["a", 7]}), 400, "Validation", "texts[1]"),
        (json!({"query": "q", "texts": ["a"], "model": "other"}), 400, "Validation", "Model does not exist"),
        (json!({"query": "nan", "texts": ["a"]}), 500, "Backend", "non_finite_score"),
    ] {
        let answer = post(&app, "/rerank", body.to_string()).await;
        let found = answer.json();
        assert_eq!((answer.status.as_u16(), &found["error_type"]), (status, &json!(kind)), "{found}");
        assert!(
            found["error"].as_str().unwrap().contains(contains) && found.as_object().unwrap().len() == 2,
            "{found}"
        );
    }
    let info = get(&app, "/info").await.json();
    assert_eq!(
        (&info["model_id"], &info["max_input_length"], &info["max_client_batch_size"]),
        (&json!("m"), &json!(64), &json!(100))
    );
    assert!(info["model_type"]["reranker"]["id2label"].is_object());
}

#[tokio::test]
async fn voyage_requests_get_its_response_shape() {
    let (app, _) = app();
    let request = json!({"model": "m", "query": "red apple", "documents": ["x", "red apple", "apple"], "top_k": 2, "return_documents": true, "truncation": true});
    let answer = rerank(&app, request).await;
    assert_eq!(answer.order(), [1, 2]);
    let expected = json!([
        {"index": 1, "relevance_score": sigmoid(1.0), "document": "red apple"},
        {"index": 2, "relevance_score": 0.5, "document": "apple"},
    ]);
    assert_eq!(answer.json()["data"], expected);
    assert_eq!((&answer.json()["usage"]["total_tokens"], &answer.json()["object"]), (&json!(19), &json!("list")));
    let plain =
        rerank(&app, json!({"model": "m", "query": "apple", "documents": ["x"], "top_k": null, "truncation": null}))
            .await;
    assert!(plain.json().get("data").is_none(), "data is only for requests with Voyage's fields");
    assert_eq!(plain.json()["object"], "rerank");
    check_error(
        &rerank(&app, json!({"model": "m", "query": "q", "documents": ["x"], "top_k": 0})).await,
        400,
        20015,
        "invalid_request_error",
        "top_k",
    );
}

#[tokio::test]
async fn mixedbread_requests_get_its_response_shape() {
    let (app, _) = app();
    let request = json!({"model": "m", "query": "red apple", "input": ["x", "red apple", {"title": "apple"}], "rank_fields": ["title"], "top_k": 2, "return_input": true});
    for path in ["/v1/reranking", "/reranking", "/v1/rerank"] {
        let mut found = post(&app, path, request.to_string()).await.json();
        found["usage"] = json!(null);
        let expected = json!({
            "data": [
                {"index": 1, "score": sigmoid(1.0), "input": "red apple", "object": null},
                {"index": 2, "score": 0.5, "input": "apple", "object": null},
            ],
            "model": "m", "object": "list", "usage": null, "top_k": 2, "return_input": true,
        });
        assert_eq!(found, expected);
    }
    let error = post(&app, "/v1/reranking", r#"{"model":"m","query":"q","input":[{"a":"b"}]}"#).await;
    check_error(&error, 400, 20015, "invalid_request_error", "input[0]");
}

#[tokio::test]
async fn nvidia_requests_get_its_response_shape() {
    let (app, _) = app();
    let request = json!({"model": "m", "query": {"text": "red apple"}, "passages": [{"text": "x"}, {"text": "red apple"}], "truncate": "END"});
    for path in ["/v1/ranking", "/ranking", "/v1/retrieval/nvidia/some-model/reranking"] {
        let found = post(&app, path, request.to_string()).await.json();
        assert_eq!(found["rankings"], json!([{"index": 1, "logit": 1.0}, {"index": 0, "logit": -1.0}]));
    }
    let mut best = request.clone();
    best["top_k"] = json!(1);
    assert_eq!(post(&app, "/v1/ranking", best.to_string()).await.json()["rankings"].as_array().unwrap().len(), 1);
    let error = post(&app, "/v1/ranking", r#"{"model":"m","query":{},"passages":[{"text":"a"}]}"#).await;
    check_error(&error, 400, 20015, "invalid_request_error", "query");
}

/// For example, the common shape on the paths of llama.cpp's server.
#[tokio::test]
async fn every_path_accepts_every_dialect() {
    let (app, _) = app();
    let request = json!({"model": "m", "query": "apple", "documents": ["x", "apple"]}).to_string();
    for path in ["/v1/reranking", "/reranking", "/v1/ranking", "/v1/v1/reranking"] {
        assert_eq!(post(&app, path, request.clone()).await.order(), [1, 0], "{path}");
    }
}

#[tokio::test]
async fn object_documents_are_read_by_text_or_rank_fields() {
    let (app, _) = app();
    let documents = json!([{"text": "x", "title": "red apple"}, {"text": "apple", "tags": ["red"], "n": 1.5, "deep": {"text": "red"}}, "red x"]);
    let ask = |rank_fields: Value| json!({"model": "m", "query": "red apple", "documents": documents, "rank_fields": rank_fields, "return_documents": true});
    assert_eq!(rerank(&app, ask(json!(null))).await.order(), [1, 2, 0]);
    let answer = rerank(&app, ask(json!(["title", "text"]))).await;
    assert_eq!(answer.order(), [0, 1, 2]);
    assert_eq!(answer.json()["results"][0]["document"]["text"], "red apple\nx");
    check_error(
        &rerank(&app, ask(json!(["title"]))).await,
        400,
        20015,
        "invalid_request_error",
        "documents[1]: has none of the rank_fields title",
    );
}

#[tokio::test]
async fn the_cluster_auth_path_says_whether_keys_are_required() {
    let (open, _) = app();
    assert_eq!(get(&open, "/v1/cluster/auth").await.json(), json!({"auth": false}));
    let (closed, _) = stub::app_with(&["key"], stub::LIMITS, stub::QUEUE);
    assert_eq!(get(&closed, "/v1/cluster/auth").await.json(), json!({"auth": true}));
}

#[tokio::test]
async fn openapi_lists_every_dialect_and_its_page_needs_no_network() {
    let (app, _) = app();
    let contract = get(&app, "/openapi.json").await.json();
    for path in ["/v1/rerank", "/rerank", "/v1/reranking", "/v1/ranking"] {
        assert!(contract["paths"][path]["post"]["requestBody"].is_object(), "{path}");
    }
    let page = get(&app, "/docs/").await;
    assert_eq!(page.status, 200, "{}", page.text);
    assert!(!page.text.contains("https://"), "nothing is fetched from elsewhere: {}", page.text);
}
