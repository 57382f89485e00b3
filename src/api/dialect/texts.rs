//! The `texts` dialect of text-embeddings-inference: the response is an array, best first.

use axum::Json;
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::fields::{self, Documents, flag, in_range, whole};
use super::parsed::ParsedRequest;
use crate::error::RerankError;
use crate::rerank::{Ranking, RerankRequest};

/// A request. `truncate` and `truncation_direction` are ignored: a long text is split into chunks, and its score is its best
/// chunk's score.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({"query": "Apple", "texts": ["apple", "banana", "fruit", "vegetable"]}))]
pub(crate) struct TextsBody<'a> {
    /// Query that the texts are ranked against; not empty.
    query: String,
    /// Texts, or objects with a `text`; at least one.
    #[serde(borrow)]
    texts: Documents<'a>,
    /// A served model's name or alias. Default: the first model.
    #[serde(default)]
    model: Option<String>,
    /// Number of results, best first; LiteLLM sends it. Default: all.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    top_n: Option<i64>,
    /// Whether scores are the model's logits instead of numbers in [0, 1]. Default: false.
    #[serde(default, deserialize_with = "flag")]
    #[schema(value_type = fields::Flag)]
    raw_scores: Option<bool>,
    /// Whether results contain their texts. Default: false.
    #[serde(default, deserialize_with = "flag")]
    #[schema(value_type = fields::Flag)]
    return_text: Option<bool>,
}

/// The score of one text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TextsRank<'a> {
    /// Its position in the request, from 0.
    index: usize,
    score: f64,
    /// The text, if the request has `return_text`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    text: Option<&'a str>,
}

pub(super) fn parse(body: &[u8], max_documents: usize) -> Result<ParsedRequest, RerankError> {
    let body: TextsBody<'_> = fields::json(body)?;
    let request = RerankRequest {
        model: body.model,
        top_n: in_range("top_n", body.top_n, 1, i64::MAX)?,
        ..RerankRequest::new(fields::query("query", body.query)?, body.texts.texts("texts", None, max_documents)?)
    };
    let texts = body.return_text.unwrap_or(false).then(|| request.documents.clone());
    let raw = body.raw_scores.unwrap_or(false);
    let write = move |ranking: &Ranking, _id: String| {
        let rank = |ranked: &crate::rerank::Ranked| TextsRank {
            index: ranked.index,
            score: if raw { f64::from(ranked.logit) } else { ranked.score },
            text: texts.as_ref().map(|texts| texts[ranked.index].as_str()),
        };
        Json(ranking.results.iter().map(rank).collect::<Vec<_>>()).into_response()
    };
    Ok(ParsedRequest::new(request, write))
}
