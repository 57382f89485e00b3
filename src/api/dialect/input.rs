//! The `input` shape of Mixedbread: OpenAI-like `data`, scores under `score`.

use axum::Json;
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ParsedRequest;
use super::documents::Usage;
use super::fields::{self, Documents, RankFields, flag, in_range, whole};
use crate::error::RerankError;
use crate::rerank::{Ranking, RerankRequest};
use crate::text::DocumentOptions;

/// A request.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "rerankd-mini", "query": "Apple", "input": ["apple", "banana"], "top_k": 1}))]
pub(crate) struct InputBody<'a> {
    /// A served model's name; the first one without it.
    #[serde(default)]
    model: Option<String>,
    /// What the input is ranked for; not empty.
    query: String,
    /// Texts, or objects; at least one.
    #[schema(schema_with = fields::documents_schema)]
    #[serde(borrow)]
    input: Documents<'a>,
    /// For objects: the fields that make up their text, in this order; `text` without it.
    #[serde(default)]
    #[schema(value_type = Option<Vec<String>>, max_items = 64)]
    rank_fields: Option<RankFields>,
    /// Results wanted; all without it.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    top_k: Option<i64>,
    /// Whether results carry their texts.
    #[serde(default, deserialize_with = "flag")]
    #[schema(schema_with = fields::flag_schema)]
    return_input: Option<bool>,
}

/// The answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct InputAnswer {
    /// Best first.
    data: Vec<InputResult>,
    model: String,
    /// Always `list`.
    object: &'static str,
    usage: Usage,
    /// As many as there are.
    top_k: usize,
    return_input: bool,
}

/// One document.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct InputResult {
    /// Its place in the request.
    index: usize,
    /// In [0, 1].
    score: f64,
    /// Its text, where the request asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    input: Option<String>,
    /// Always null: Mixedbread's older SDK and its newer one agree on no word.
    #[schema(value_type = Option<String>)]
    object: (),
}

pub(super) fn parse(body: &[u8], max_documents: usize) -> Result<ParsedRequest, RerankError> {
    let body: InputBody<'_> = fields::json(body)?;
    let request = RerankRequest {
        model: body.model,
        query: fields::query(body.query)?,
        documents: body.input.texts("input", body.rank_fields.as_ref(), max_documents)?,
        top_n: in_range("top_k", body.top_k, 1, i64::MAX)?,
        options: DocumentOptions::default(),
        deadline: None,
    };
    let return_input = body.return_input.unwrap_or(false);
    let texts = return_input.then(|| request.documents.clone());
    let write = move |ranking: &Ranking, _id: String| {
        let result = |ranked: &crate::rerank::Ranked| InputResult {
            index: ranked.index,
            score: ranked.score,
            input: texts.as_ref().map(|texts| texts[ranked.index].clone()),
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
    Ok(ParsedRequest { request, write: Box::new(write) })
}
