//! The `text_1` and `text_2` dialect of vLLM's score API: the scores of pairs of texts, in the request's order.

use axum::Json;
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::documents::{Usage, unix_seconds};
use super::fields::{self, Documents, flag};
use super::parsed::ParsedRequest;
use crate::error::RerankError;
use crate::rerank::{Ranked, Ranking, RerankRequest};

/// A request. A single text in `text_1` is scored with every text in `text_2`; several are paired with those in `text_2`.
/// `truncate_prompt_tokens` is ignored: a long text in `text_2` is split into chunks and has its best chunk's score.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "rerankd-mini", "text_1": "Apple", "text_2": ["apple", "banana"]}))]
pub(crate) struct TextPairsBody<'a> {
    /// A served model's name or alias. Default: the first model.
    #[serde(default)]
    model: Option<String>,
    /// The query, also as a list of one; or a list with one query for each text in `text_2`.
    #[serde(borrow)]
    text_1: Documents<'a>,
    /// Texts, at least one.
    #[serde(borrow)]
    text_2: Documents<'a>,
    /// Whether scores are in [0, 1] instead of the model's logits. Default: true.
    #[serde(default, deserialize_with = "flag", alias = "activation")]
    #[schema(value_type = fields::Flag)]
    use_activation: Option<bool>,
}

/// A response.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TextPairsAnswer {
    /// The request's id.
    id: String,
    /// Always `list`.
    object: &'static str,
    /// Seconds since 1970-01-01 UTC.
    created: u64,
    /// The served model's name.
    model: String,
    /// One score for each pair, in the request's order.
    data: Vec<PairScore>,
    usage: Usage,
}

/// The score of one pair.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PairScore {
    /// Its position in the request, from 0.
    index: usize,
    /// Always `score`.
    object: &'static str,
    score: f64,
}

pub(super) fn parse(body: &[u8], max_documents: usize) -> Result<ParsedRequest, RerankError> {
    let body: TextPairsBody<'_> = fields::json(body)?;
    let queries = body.text_1.texts("text_1", None, max_documents)?;
    let documents = body.text_2.texts("text_2", None, max_documents)?;
    let query = |(i, text): (usize, &String)| fields::query(&format!("text_1[{i}]"), text.clone());
    let mut queries = queries.iter().enumerate().map(query).collect::<Result<Vec<_>, _>>()?;
    let request =
        |query, documents| RerankRequest { model: body.model.clone(), ..RerankRequest::new(query, documents) };
    let requests = if queries.len() == 1 {
        vec![request(queries.remove(0), documents)]
    } else if queries.len() == documents.len() {
        queries.into_iter().zip(documents.iter()).map(|(query, text)| request(query, [text.clone()].into())).collect()
    } else {
        let problem = format!(
            "has {} texts and text_2 has {}; give one text in text_1, or as many as in text_2",
            queries.len(),
            documents.len()
        );
        return Err(RerankError::invalid("text_1", problem));
    };
    let raw = !body.use_activation.unwrap_or(true);
    let write = move |ranking: &Ranking, id: String| {
        let score = |ranked: &Ranked| PairScore {
            index: ranked.index,
            object: "score",
            score: if raw { f64::from(ranked.logit) } else { ranked.score },
        };
        let mut data: Vec<PairScore> = ranking.results.iter().map(score).collect();
        data.sort_by_key(|pair| pair.index);
        let (model, usage) = (ranking.model.clone(), Usage::of(ranking));
        Json(TextPairsAnswer { id, object: "list", created: unix_seconds(), model, data, usage }).into_response()
    };
    Ok(ParsedRequest { requests, write: Box::new(write) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests(body: &str) -> Result<Vec<(String, usize)>, String> {
        let parsed = parse(body.as_bytes(), 3).map_err(|error| error.to_string())?;
        Ok(parsed.requests.into_iter().map(|request| (request.query, request.documents.len())).collect())
    }

    #[test]
    fn one_query_takes_all_texts_and_several_are_paired() {
        let query = |query: &str, documents| (query.to_owned(), documents);
        assert_eq!(requests(r#"{"text_1":"q","text_2":"a"}"#), Ok(vec![query("q", 1)]));
        assert_eq!(requests(r#"{"text_1":["q"],"text_2":["a","b"]}"#), Ok(vec![query("q", 2)]));
        assert_eq!(requests(r#"{"text_1":["q","r"],"text_2":["a","b"]}"#), Ok(vec![query("q", 1), query("r", 1)]));
    }

    #[test]
    fn an_error_names_the_list() {
        for (body, named) in [
            (r#"{"text_1":["q","r"],"text_2":["a","b","c"]}"#, "text_1: has 2 texts and text_2 has 3"),
            (r#"{"text_1":["q",""],"text_2":["a","b"]}"#, "text_1[1]"),
            (r#"{"text_1":"q","text_2":[]}"#, "text_2"),
            (r#"{"text_1":"q","text_2":["a","b","c","d"]}"#, "text_2"),
            (r#"{"text_1":"q"}"#, "text_2"),
        ] {
            let message = requests(body).unwrap_err();
            assert!(message.contains(named), "{body}: {message}");
        }
    }
}
