//! The `input` dialect of Mixedbread: results under `data`, scores under `score`.

use axum::Json;
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::documents::Usage;
use super::fields::{self, Documents, RankFields, flag, in_range, whole};
use super::parsed::ParsedRequest;
use crate::error::RerankError;
use crate::rerank::{Ranking, RerankRequest};

/// A request.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "rerankd-mini", "query": "Apple", "input": ["apple", "banana"], "top_k": 1}))]
pub(crate) struct InputBody<'a> {
    /// A served model's name or alias. Default: the first model.
    #[serde(default)]
    model: Option<String>,
    /// Text that the input is ranked against; not empty.
    query: String,
    /// Texts, or objects; at least one.
    #[serde(borrow)]
    input: Documents<'a>,
    /// For objects: the fields that are joined to their text, in this order. Default: `text`.
    #[serde(default)]
    #[schema(value_type = Option<Vec<String>>, max_items = 64)]
    rank_fields: Option<RankFields>,
    /// Number of results, best first. Default: all.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    top_k: Option<i64>,
    /// Whether results contain their texts. Default: false.
    #[serde(default, deserialize_with = "flag")]
    #[schema(value_type = fields::Flag)]
    return_input: Option<bool>,
}

/// A response.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct InputAnswer<'a> {
    /// Best first.
    data: Vec<InputResult<'a>>,
    model: String,
    /// Always `list`.
    object: &'static str,
    usage: Usage,
    /// The number of results.
    top_k: usize,
    return_input: bool,
}

/// One document.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct InputResult<'a> {
    /// Its position in the request, from 0.
    index: usize,
    /// In [0, 1].
    score: f64,
    /// Its text, if the request has `return_input`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    input: Option<&'a str>,
    /// Always null: Mixedbread's older and newer SDK expect different values.
    #[schema(value_type = Option<String>)]
    object: (),
}

pub(super) fn parse(body: &[u8], max_documents: usize) -> Result<ParsedRequest, RerankError> {
    let body: InputBody<'_> = fields::json(body)?;
    let request = RerankRequest {
        model: body.model,
        top_n: in_range("top_k", body.top_k, 1, i64::MAX)?,
        ..RerankRequest::new(
            fields::query("query", body.query)?,
            body.input.texts("input", body.rank_fields.as_ref(), max_documents)?,
        )
    };
    let return_input = body.return_input.unwrap_or(false);
    let texts = return_input.then(|| request.documents.clone());
    let write = move |ranking: &Ranking, _id: String| {
        let result = |ranked: &crate::rerank::Ranked| InputResult {
            index: ranked.index,
            score: ranked.score,
            input: texts.as_ref().map(|texts| texts[ranked.index].as_str()),
            object: (),
        };
        let answer = InputAnswer {
            data: ranking.results.iter().map(result).collect(),
            model: ranking.model.clone(),
            object: "list",
            usage: Usage::of(ranking),
            top_k: ranking.results.len(),
            return_input,
        };
        Json(answer).into_response()
    };
    Ok(ParsedRequest::new(request, write))
}
