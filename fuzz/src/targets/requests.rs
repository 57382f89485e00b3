//! The body of a request -> a validated request, in every dialect.

use rerankd::api::parse_request;
use rerankd::error::RerankError;
use rerankd::rerank::RerankRequest;
use rerankd::text::MAX_OVERLAP_TOKENS;
use serde_json::{Value, json};

const MAX_DOCUMENTS: usize = 100;

/// Longest error message. It quotes at most 300 characters of the request for each of a path, a value and a list of names.
const MAX_MESSAGE_CHARS: usize = 2000;

/// A body is either a valid request or an error that names a field.
pub fn run(body: &[u8]) {
    match parse_request(body, MAX_DOCUMENTS) {
        Ok(request) => {
            check_promises(&request, body.len());
            check_against_value(&request, body);
            check_round_trip(&request);
        }
        Err(RerankError::Invalid { field, problem }) => {
            assert!(!field.is_empty() && !problem.is_empty());
            assert!(field.chars().count() + problem.chars().count() <= MAX_MESSAGE_CHARS, "{field}: {problem}");
        }
        Err(error) => panic!("parsing fails with an error of a later stage: {error}"),
    }
}

/// What later stages rely on. Texts are never longer than their JSON, so memory is bounded by the body.
fn check_promises(request: &RerankRequest, body_bytes: usize) {
    assert!(!request.query.trim().is_empty());
    assert!((1..=MAX_DOCUMENTS).contains(&request.documents.len()));
    assert!(request.query.len() + request.documents.iter().map(String::len).sum::<usize>() <= body_bytes);
    let options = request.options;
    assert!(options.overlap_tokens <= MAX_OVERLAP_TOKENS && options.max_chunks_per_doc >= 1);
    assert!(request.top_n != Some(0) && options.max_tokens_per_doc != Some(0));
}

/// Compares query, documents and `top_n` with those of a `serde_json::Value`, the plainest way to read them.
fn check_against_value(request: &RerankRequest, body: &[u8]) {
    let json = body.strip_prefix("\u{feff}".as_bytes()).unwrap_or(body);
    // `Value` has a limit on nesting. A request does not have it in fields that are ignored.
    let Ok(value) = serde_json::from_slice::<Value>(json) else { return };
    let list = ["documents", "texts", "input", "passages"].into_iter().find(|list| !value[*list].is_null()).unwrap();
    let query =
        if list == "passages" && value["query"].is_object() { &value["query"]["text"] } else { &value["query"] };
    assert_eq!(query.as_str(), Some(request.query.as_str()));
    let documents = match &value[list] {
        Value::Array(documents) => documents.clone(),
        one => vec![one.clone()],
    };
    assert_eq!(documents.len(), request.documents.len());
    for (document, text) in documents.iter().zip(request.documents.iter()) {
        match document {
            Value::String(expected) => assert_eq!(expected, text),
            // If a field is repeated, the request has the first text, and a `Value` the last.
            other => assert!(other.is_object(), "{other} is a document"),
        }
    }
    assert!(list == "input" || list == "passages" || value["top_n"].is_null() || request.top_n.is_some());
}

/// The validated request, written as a plain body and parsed again, is the same.
fn check_round_trip(request: &RerankRequest) {
    let body = json!({
        "model": request.model.as_deref().unwrap_or("m"), "query": request.query, "documents": &request.documents[..],
        "top_n": request.top_n, "overlap_tokens": request.options.overlap_tokens,
        "max_chunks_per_doc": request.options.max_chunks_per_doc, "max_tokens_per_doc": request.options.max_tokens_per_doc,
    });
    let again = parse_request(body.to_string().as_bytes(), MAX_DOCUMENTS).unwrap();
    assert_eq!((&again.query, &again.documents, again.top_n), (&request.query, &request.documents, request.top_n));
    assert_eq!(format!("{:?}", again.options), format!("{:?}", request.options));
}
