//! The `passages` dialect of NVIDIA NIM: logits instead of scores, best first.

use axum::Json;
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::documents::Usage;
use super::fields::{self, Document, Documents, in_range, whole};
use super::parsed::ParsedRequest;
use crate::error::RerankError;
use crate::rerank::{Ranking, RerankRequest};

/// A request. `truncate` is ignored: a long passage is split into chunks, and its score is its best chunk's score.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "rerankd-mini", "query": {"text": "Apple"}, "passages": [{"text": "apple"}, {"text": "banana"}]}))]
pub(crate) struct PassagesBody<'a> {
    /// A served model's name or alias. Default: the first model.
    #[serde(default)]
    model: Option<String>,
    /// Text that the passages are ranked against; not empty.
    #[serde(borrow)]
    query: Document<'a>,
    /// Texts, or objects with a `text`; at least one.
    #[serde(borrow)]
    passages: Documents<'a>,
    /// Number of results, best first. Default: all.
    #[serde(default, deserialize_with = "whole", alias = "top_n")]
    #[schema(minimum = 1)]
    top_k: Option<i64>,
}

/// A response.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PassagesAnswer {
    /// Best first.
    rankings: Vec<PassageRank>,
    usage: Usage,
}

/// One passage.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PassageRank {
    /// Its position in the request, from 0.
    index: usize,
    /// The model's output for its best chunk, before the score map.
    logit: f32,
}

pub(super) fn parse(body: &[u8], max_documents: usize) -> Result<ParsedRequest, RerankError> {
    let body: PassagesBody<'_> = fields::json(body)?;
    let request = RerankRequest {
        model: body.model,
        top_n: in_range("top_k", body.top_k, 1, i64::MAX)?,
        ..RerankRequest::new(
            fields::query("query", body.query.text("query", None)?)?,
            body.passages.texts("passages", None, max_documents)?,
        )
    };
    let write = |ranking: &Ranking, _id: String| {
        let rank = |ranked: &crate::rerank::Ranked| PassageRank { index: ranked.index, logit: ranked.logit };
        let answer = PassagesAnswer { rankings: ranking.results.iter().map(rank).collect(), usage: Usage::of(ranking) };
        Json(answer).into_response()
    };
    Ok(ParsedRequest::new(request, write))
}
