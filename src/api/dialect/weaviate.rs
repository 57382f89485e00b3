//! Weaviate's `reranker-transformers` module: the response repeats every document with its score, in the request's order.
//!
//! Weaviate always sends `property`, and fails on a response without `scores`.

use axum::Json;
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::fields::{self, Documents};
use super::parsed::ParsedRequest;
use crate::error::RerankError;
use crate::rerank::{Ranked, Ranking, RerankRequest};

/// A request. The first model ranks it, because Weaviate names none.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({"query": "Apple", "documents": ["apple", "banana"], "property": ""}))]
pub(crate) struct WeaviateBody<'a> {
    /// Text that the documents are ranked against; not empty.
    query: String,
    /// Texts, at least one.
    #[serde(borrow)]
    documents: Documents<'a>,
    /// Its value is ignored. Its presence distinguishes this format from others with `documents`.
    #[schema(required)]
    #[allow(dead_code, reason = "the dialect is chosen by it")]
    property: Option<String>,
}

/// A response.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WeaviateAnswer<'a> {
    /// One for each document, in the request's order.
    scores: Vec<DocumentScore<'a>>,
}

/// The score of one document. Weaviate finds the document by its text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DocumentScore<'a> {
    document: &'a str,
    score: f64,
}

pub(super) fn parse(body: &[u8], max_documents: usize) -> Result<ParsedRequest, RerankError> {
    let body: WeaviateBody<'_> = fields::json(body)?;
    let request = RerankRequest::new(
        fields::query("query", body.query)?,
        body.documents.texts("documents", None, max_documents)?,
    );
    let texts = request.documents.clone();
    let write = move |ranking: &Ranking, _id: String| {
        let mut results: Vec<&Ranked> = ranking.results.iter().collect();
        results.sort_by_key(|ranked| ranked.index);
        let score = |ranked: &Ranked| DocumentScore { document: &texts[ranked.index], score: ranked.score };
        Json(WeaviateAnswer { scores: results.into_iter().map(score).collect() }).into_response()
    };
    Ok(ParsedRequest::new(request, write))
}
