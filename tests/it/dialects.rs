//! Requests, responses and errors of each rerank API dialect, with the stub model.

use axum::body::Body;
use axum::http::Request;
use rerankd::api::{App, HostList, Keys, Origins};
use rerankd::served::Models;
use serde_json::{Value, json};

use crate::support::stub::{self, app, check_error, get, post, rerank, send};

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
        assert!(found["error"].as_str().unwrap().contains(contains), "{found}");
        assert_eq!((&found["message"], &found["detail"]), (&found["error"], &found["error"]), "{found}");
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
    assert_eq!(plain.json()["data"], json!([{"index": 0, "relevance_score": sigmoid(-1.0)}]));
    assert_eq!(plain.json()["object"], "rerank", "list is only for requests with Voyage's fields");
    for (field, value) in [("top_k", json!(1)), ("truncation", json!(false))] {
        let one = rerank(&app, json!({"model": "m", "query": "apple", "documents": ["x"], field: value})).await;
        assert_eq!(one.json()["object"], "list", "{field} alone is Voyage's");
    }
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
async fn vllm_score_requests_get_its_response_shape() {
    let (app, _) = app();
    let scores = |found: Value| -> Vec<f64> {
        assert_eq!((&found["object"], &found["model"]), (&json!("list"), &json!("m")), "{found}");
        let data = found["data"].as_array().unwrap().iter().enumerate();
        data.map(|(i, pair)| {
            assert_eq!((&pair["index"], &pair["object"]), (&json!(i), &json!("score")));
            pair["score"].as_f64().unwrap()
        })
        .collect()
    };
    for path in ["/score", "/v1/score", "/v1/rerank"] {
        let request =
            json!({"model": "m", "text_1": "red apple", "text_2": ["x", "red apple"], "truncate_prompt_tokens": 5});
        assert_eq!(scores(post(&app, path, request.to_string()).await.json()), [sigmoid(-1.0), sigmoid(1.0)], "{path}");
    }
    let paired = json!({"text_1": ["apple", "red", "x"], "text_2": ["x", "red", "apple"], "use_activation": false});
    let found = post(&app, "/score", paired.to_string()).await.json();
    assert_eq!(found["usage"]["total_tokens"], 3 * 5, "three pairs of [CLS] text [SEP] text [SEP]");
    assert_eq!(scores(found), [-1.0, 0.0, -1.0]);
    // Each pair is far below the limit of 20,000 tokens; together they have more.
    let long: Vec<&str> = (0..300).map(|i| stub::WORDS[i * i / 50 % 6]).collect(); // no two chunks alike
    let together = json!({"text_1": vec!["red"; 100], "text_2": vec![long.join(" "); 100]});
    let refused = post(&app, "/score", together.to_string()).await;
    check_error(&refused, 413, 413, "request_too_large", "tokens");
    let uneven = post(&app, "/score", r#"{"text_1":["a","b"],"text_2":["a","b","c"]}"#).await;
    check_error(&uneven, 400, 20015, "invalid_request_error", "text_1");
}

#[tokio::test]
async fn weaviate_requests_get_its_response_shape() {
    let (app, _) = app();
    let request = json!({"query": "red apple", "documents": ["x", "red apple"], "property": ""});
    let expected = json!({"scores": [
        {"document": "x", "score": sigmoid(-1.0)}, {"document": "red apple", "score": sigmoid(1.0)},
    ]});
    assert_eq!(post(&app, "/rerank", request.to_string()).await.json(), expected);
    let error = post(&app, "/rerank", r#"{"query":"","documents":["a"],"property":"text"}"#).await;
    assert_eq!(error.status, 400);
    assert!(
        error.json()["error"].as_str().unwrap().contains("query"),
        "its client reads error as a text: {}",
        error.text
    );
    for probe in ["/.well-known/ready", "/.well-known/live", "/meta"] {
        assert!(get(&app, probe).await.status.is_success(), "{probe}: Weaviate asks for it at its start");
    }
}

#[tokio::test]
async fn a_request_without_a_model_goes_to_the_first_one() {
    let models = [stub::model("first", 0.0, stub::QUEUE).0, stub::model("second", 0.0, stub::QUEUE).0];
    let app = stub::serving(models.into(), Default::default(), stub::LIMITS);
    for model in [json!(null), json!(""), json!(" "), json!("first")] {
        let found = rerank(&app, json!({"model": model, "query": "q", "documents": ["a"]})).await.json();
        assert_eq!(found["model"], "first", "{model}");
    }
    let found = post(&app, "/v1/rerank", r#"{"query":"q","documents":["a"]}"#).await.json();
    assert_eq!(found["model"], "first", "Milvus sends no model");
}

#[tokio::test]
async fn an_unknown_model_is_the_first_one_if_any_name_is_accepted() {
    let app = App::new(Keys::default(), stub::LIMITS, None, Origins::default());
    let models = vec![stub::model("first", 0.0, stub::QUEUE).0, stub::model("second", 0.0, stub::QUEUE).0];
    app.set_models(Models::new(models).unwrap().accepting_any_name());
    for (asked, model) in [("gpt-rerank", "first"), ("second", "second"), ("x/second", "second")] {
        let found = rerank(&app, json!({"model": asked, "query": "q", "documents": ["a"]})).await.json();
        assert_eq!(found["model"], model);
    }
}

#[tokio::test]
async fn results_below_min_score_are_left_out() {
    let (app, _) = app();
    let ask = |more: Value| {
        let mut body = json!({"model": "m", "query": "red apple", "documents": ["x", "red apple", "apple"]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    assert_eq!(rerank(&app, ask(json!({"min_score": 0.5}))).await.order(), [1, 2]);
    assert_eq!(rerank(&app, ask(json!({"min_score": 0.5, "top_n": 1}))).await.order(), [1]);
    assert_eq!(rerank(&app, ask(json!({"min_score": 0.5, "raw_scores": true}))).await.order(), [1]);
    let none = rerank(&app, ask(json!({"min_score": 2}))).await;
    assert_eq!((none.order(), &none.json()["data"]), (vec![], &json!([])));
}

#[tokio::test]
async fn return_chunks_tells_where_the_best_chunk_is() {
    let (app, _) = app();
    // The window of 64 tokens leaves 60 for the document; the two words are 100 words apart.
    let document = format!("{}apple {}red apple x", "x ".repeat(20), "x ".repeat(100));
    let ask = |chunks: Value| json!({"model": "m", "query": "red apple", "documents": ["apple", document], "return_chunks": chunks});
    for best in [json!(true), json!("best"), json!("True")] {
        let result = rerank(&app, ask(best)).await.json()["results"][0].clone();
        assert_eq!(result["index"], 1);
        let (start, end) = (result["chunk"]["start"].as_u64().unwrap(), result["chunk"]["end"].as_u64().unwrap());
        assert!(document[start as usize..end as usize].contains("red apple"), "{result}");
        assert_eq!(result["chunk"]["relevance_score"], result["relevance_score"]);
        assert!(result.get("chunks").is_none());
    }
    let results = rerank(&app, ask(json!("all"))).await.json()["results"].clone();
    let chunks = results[0]["chunks"].as_array().unwrap();
    assert!(chunks.len() > 1 && chunks.contains(&results[0]["chunk"]), "{results}");
    assert_eq!((&chunks[0]["start"], &chunks[chunks.len() - 1]["end"]), (&json!(0), &json!(document.len())));
    assert_eq!(results[1]["chunks"], json!([{"start": 0, "end": 5, "relevance_score": 0.5}]));
    for none in [json!(false), json!(null)] {
        let result = rerank(&app, ask(none)).await.json()["results"][0].clone();
        assert!(result.get("chunk").is_none() && result.get("chunks").is_none(), "{result}");
    }
    let empty = json!({"model": "m", "query": "q", "documents": [""], "return_chunks": "all"});
    let expected = json!([{"start": 0, "end": 0, "relevance_score": sigmoid(-1.0)}]);
    assert_eq!(rerank(&app, empty).await.json()["results"][0]["chunks"], expected);
}

#[tokio::test]
async fn an_instruction_that_no_model_takes_is_reported() {
    let (app, _) = app();
    for (field, reported) in [("instruction", true), ("instruct", true), ("unknown", false)] {
        let mut body = json!({"model": "m", "query": "q", "documents": ["a"]});
        body[field] = json!("Rank by date");
        let header = rerank(&app, body).await.headers.get("x-rerankd-ignored").cloned();
        assert_eq!(header.is_some_and(|value| value == "instruction"), reported, "{field}");
    }
}

/// Before the body is read, the dialect is known from the path only.
#[tokio::test]
async fn an_unread_body_on_the_path_of_text_embeddings_inference_gets_its_error_shape() {
    let (closed, _) = stub::app_with(&["key"], stub::LIMITS, stub::QUEUE);
    for (path, is_text) in [("/rerank", true), ("/rerank/", true), ("/v1/rerank", false)] {
        let found = post(&closed, path, r#"{"query":"q","texts":["a"]}"#).await;
        assert_eq!(
            (found.status.as_u16(), found.json()["error"].is_string()),
            (401, is_text),
            "{path}: {}",
            found.text
        );
        assert!(found.json()["message"].is_string(), "{path}");
    }
    assert!(get(&closed, "/meta").await.json()["error"].is_string(), "Weaviate reads it at its start");
}

fn from_page(method: &str, path: &str, origin: &str) -> Request<Body> {
    let request = Request::builder().method(method).uri(path).header("origin", origin).header("host", "localhost");
    let request = request.header("access-control-request-method", "POST");
    let request = request.header("access-control-request-headers", "authorization,content-type");
    request.body(Body::from(r#"{"query":"q","documents":["a"]}"#)).unwrap()
}

#[tokio::test]
async fn only_pages_of_an_allowed_origin_may_use_the_server_from_a_browser() {
    let origins = Origins::new(["https://app.example".to_owned()]).unwrap();
    let app = App::new(Keys::default(), stub::LIMITS, Some(HostList::default()), origins);
    app.set_models(Models::new(vec![stub::model("m", 0.0, stub::QUEUE).0]).unwrap());
    let preflight = send(&app, from_page("OPTIONS", "/v1/rerank", "https://app.example")).await;
    assert_eq!(preflight.status, 200, "{}", preflight.text);
    assert_eq!(preflight.headers["access-control-allow-origin"], "https://app.example");
    assert_eq!(preflight.headers["access-control-allow-headers"], "authorization,content-type");
    let answer = send(&app, from_page("POST", "/v1/rerank", "https://app.example")).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.headers["access-control-allow-origin"]),
        (200, &"https://app.example".parse().unwrap())
    );
    let exposed = answer.headers["access-control-expose-headers"].to_str().unwrap();
    assert!(exposed.contains("server-timing") && exposed.contains("retry-after"), "{exposed}");
    let error = send(&app, from_page("POST", "/nowhere", "https://app.example")).await;
    assert_eq!(error.headers["access-control-allow-origin"], "https://app.example", "a page can read errors too");
    let other = send(&app, from_page("POST", "/v1/rerank", "https://evil.example")).await;
    assert_eq!(other.status, 403);
    assert!(!other.headers.contains_key("access-control-allow-origin"));
    let (plain, _) = stub::app();
    let preflight = send(&plain, from_page("OPTIONS", "/v1/rerank", "https://app.example")).await;
    assert_eq!(preflight.status, 405, "without --allowed-origin there are no preflight answers");
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
async fn openapi_lists_every_dialect() {
    let (app, _) = app();
    let contract = get(&app, "/openapi.json").await.json();
    for path in ["/v1/rerank", "/rerank", "/v1/reranking", "/v1/ranking", "/v1/score"] {
        assert!(contract["paths"][path]["post"]["requestBody"].is_object(), "{path}");
    }
}

#[tokio::test]
async fn openapi_says_what_each_field_of_a_request_means() {
    let (app, _) = app();
    let contract = get(&app, "/openapi.json").await.json();
    let schemas = contract["components"]["schemas"].as_object().unwrap();
    for name in ["RerankBody", "TextsBody", "InputBody", "PassagesBody", "TextPairsBody", "WeaviateBody"] {
        let fields = schemas[name]["properties"].as_object().unwrap();
        assert!(fields.len() >= 3, "{name}");
        for (field, schema) in fields {
            assert!(schema["description"].is_string(), "{name}.{field}: {schema}");
        }
    }
}
