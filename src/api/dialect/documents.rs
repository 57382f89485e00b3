//! The `documents` shape: the vendor's own `/v1/rerank`, and the superset of it that most clients speak.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::fields::{Documents, flag, whole};
use crate::error::RerankError;
use crate::rerank::{Ranking, RerankRequest};
use crate::text::DocumentOptions;

/// Chunks of a document that are scored unless the request says otherwise.
pub(crate) const DEFAULT_MAX_CHUNKS: usize = 1024;

/// The most, and the default, that neighbouring chunks can be asked to share.
pub(crate) const MAX_OVERLAP_TOKENS: i64 = 80;

/// A request. Unknown fields are ignored; every optional field may be null.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({
    "model": "BAAI/bge-reranker-v2-m3", "query": "Apple", "documents": ["apple", "banana", "fruit", "vegetable"], "top_n": 4
}))]
pub(crate) struct RerankBody {
    /// A served model's name or alias.
    model: String,
    /// What the documents are ranked for; not empty. Longer than its share of the window, it is cut.
    query: String,
    /// Texts, or objects with a `text`; at least one. A long one is cut into chunks, and its best chunk counts.
    #[schema(value_type = Vec<String>, min_items = 1)]
    documents: Documents,
    /// Results wanted, best first; all without it.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    top_n: Option<i64>,
    /// Whether results carry their document's text.
    #[serde(default, deserialize_with = "flag")]
    return_documents: Option<bool>,
    /// Chunks of a document that are scored; 1024 without it.
    #[serde(default, deserialize_with = "whole", alias = "max_chunk_per_doc")]
    #[schema(minimum = 1)]
    max_chunks_per_doc: Option<i64>,
    /// Tokens that neighbouring chunks share; 80 without it, and at most a quarter of a chunk.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 80)]
    overlap_tokens: Option<i64>,
    /// Tokens of a document that are read, before it is cut into chunks.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    max_tokens_per_doc: Option<i64>,
}

/// A checked request, and what only its answer needs.
#[derive(Debug)]
pub(crate) struct Parsed {
    pub(crate) request: RerankRequest,
    pub(crate) return_documents: bool,
}

/// Reads and checks a body.
///
/// # Errors
/// [`RerankError::Invalid`], naming the field.
pub(crate) fn parse(body: &[u8], max_documents: usize) -> Result<Parsed, RerankError> {
    // serde would read an array as the fields in their order.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(RerankError::invalid("body", "expected a JSON object with model, query and documents"));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let raw: RerankBody = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        RerankError::invalid(if path == "." { "body".to_owned() } else { path }, error.inner().to_string())
    })?;
    json.end().map_err(|error| RerankError::invalid("body", error.to_string()))?;
    check(raw, max_documents)
}

fn check(raw: RerankBody, max_documents: usize) -> Result<Parsed, RerankError> {
    if raw.query.trim().is_empty() {
        return Err(RerankError::invalid("query", "is empty; give the text to rank for"));
    }
    let documents = raw.documents.0;
    if documents.is_empty() {
        return Err(RerankError::invalid("documents", "is empty; give at least one text"));
    }
    if documents.len() > max_documents {
        let problem = format!("has {} texts, the limit is {max_documents}; send several requests", documents.len());
        return Err(RerankError::invalid("documents", problem));
    }
    let options = DocumentOptions {
        overlap_tokens: in_range("overlap_tokens", raw.overlap_tokens, 0, MAX_OVERLAP_TOKENS)?
            .unwrap_or(MAX_OVERLAP_TOKENS as usize),
        max_chunks_per_doc: in_range("max_chunks_per_doc", raw.max_chunks_per_doc, 1, i64::MAX)?
            .unwrap_or(DEFAULT_MAX_CHUNKS),
        max_tokens_per_doc: in_range("max_tokens_per_doc", raw.max_tokens_per_doc, 1, i64::MAX)?,
    };
    let request = RerankRequest {
        model: raw.model,
        query: raw.query,
        documents: documents.into(),
        top_n: in_range("top_n", raw.top_n, 1, i64::MAX)?,
        options,
        deadline: None,
    };
    Ok(Parsed { request, return_documents: raw.return_documents.unwrap_or(false) })
}

fn in_range(field: &str, value: Option<i64>, min: i64, max: i64) -> Result<Option<usize>, RerankError> {
    let Some(value) = value else { return Ok(None) };
    if (min..=max).contains(&value) {
        return Ok(usize::try_from(value).ok());
    }
    let allowed = if max == i64::MAX { format!("at least {min}") } else { format!("{min} to {max}") };
    Err(RerankError::invalid(field, format!("is {value}; expected {allowed}")))
}

/// The answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct RerankAnswer {
    /// The request's id.
    id: String,
    /// Best first.
    results: Vec<AnswerResult>,
    tokens: AnswerTokens,
    meta: Meta,
    /// The served model's name.
    model: String,
    /// Always `rerank`.
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    usage: Usage,
}

/// One document.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AnswerResult {
    /// Its place in the request.
    index: usize,
    /// In [0, 1]: the sigmoid of its best chunk's logit.
    relevance_score: f64,
    /// Its text, where the request asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    document: Option<AnswerDocument>,
}

/// A document's text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AnswerDocument {
    text: String,
}

/// Tokens that the model read, over all chunks.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(crate) struct AnswerTokens {
    input_tokens: usize,
    /// Always 0.
    output_tokens: usize,
}

/// The tokens again, where Cohere's clients look for them.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Meta {
    api_version: ApiVersion,
    billed_units: BilledUnits,
    tokens: AnswerTokens,
}

/// Version of the shape.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ApiVersion {
    version: &'static str,
}

/// Nobody is billed.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BilledUnits {
    input_tokens: usize,
    output_tokens: usize,
    search_units: usize,
    classifications: usize,
}

/// The tokens again, in OpenAI's words.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

/// Writes the answer; with `texts`, each result carries its document.
pub(crate) fn answer(ranking: &Ranking, id: Option<String>, texts: Option<&Arc<[String]>>) -> RerankAnswer {
    let input = ranking.tokens;
    let tokens = AnswerTokens { input_tokens: input, output_tokens: 0 };
    let result = |ranked: &crate::rerank::Ranked| AnswerResult {
        index: ranked.index,
        relevance_score: ranked.score,
        document: texts.map(|texts| AnswerDocument { text: texts[ranked.index].clone() }),
    };
    RerankAnswer {
        id: id.unwrap_or_else(|| Uuid::now_v7().to_string()),
        results: ranking.results.iter().map(result).collect(),
        tokens,
        meta: Meta {
            api_version: ApiVersion { version: "1" },
            billed_units: BilledUnits { input_tokens: input, output_tokens: 0, search_units: 1, classifications: 0 },
            tokens,
        },
        model: ranking.model.clone(),
        object: "rerank",
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        usage: Usage { prompt_tokens: input, completion_tokens: 0, total_tokens: input },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(body: &str) -> String {
        parse(body.as_bytes(), 3).unwrap_err().to_string()
    }

    fn with(field: &str) -> String {
        format!(r#"{{"model":"m","query":"q","documents":["a","b"],{field}}}"#)
    }

    #[test]
    fn what_real_clients_send_is_understood() {
        for body in [
            r#"{"model":"m","query":"q","documents":"one text"}"#,
            r#"{"model":"m","query":"q","documents":["a",{"text":"b","id":7},{"meta":{"x":[1]},"text":"c"}]}"#,
            r#"{"model":"m","query":"q","documents":["a"],"top_n":null,"return_documents":"true","overlap_tokens":80.0}"#,
            r#"{"model":"m","query":"q","documents":[""],"kwargs":"{}","priority":[[1]],"max_chunk_per_doc":4}"#,
            "\n {\"model\":\"m\",\"query\":\"\\ud83d\\ude00 \\u0000\",\"documents\":[\"\\u0000\"]} \n",
        ] {
            parse(body.as_bytes(), 3).unwrap_or_else(|e| panic!("{body}: {e}"));
        }
        let parsed = parse(with(r#""top_n":99,"return_documents":"True","overlap_tokens":0"#).as_bytes(), 3).unwrap();
        assert_eq!(
            (parsed.request.top_n, parsed.return_documents, parsed.request.options.overlap_tokens),
            (Some(99), true, 0)
        );
    }

    /// F1 to F12 and F17 to F19 of the fault list: each names what is wrong.
    #[test]
    fn what_is_wrong_is_named() {
        let nested = format!(r#"{{"model":"m","query":"q","documents":{}"#, "[".repeat(100_000));
        for (body, named) in [
            ("", "body"),
            (r#"["m","q",["a"],null]"#, "body"),
            ("\u{feff}{}", "body"),
            (r#"{"model":"m","query":"q","documents":["a"]} {}"#, "body"),
            (r#"{"model":"m","query":"q"}"#, "documents"),
            (r#"{"query":"q","documents":["a"]}"#, "model"),
            (r#"{"model":"m","model":"m","query":"q","documents":["a"]}"#, "model"),
            (r#"{"model":"m","query":7,"documents":["a"]}"#, "query"),
            (r#"{"model":"m","query":" \t\n","documents":["a"]}"#, "query"),
            (r#"{"model":"m","query":"q","documents":[]}"#, "documents"),
            (r#"{"model":"m","query":"q","documents":null}"#, "documents"),
            (r#"{"model":"m","query":"q","documents":["a",7]}"#, "documents[1]"),
            (r#"{"model":"m","query":"q","documents":["a","b",null]}"#, "documents[2]"),
            (r#"{"model":"m","query":"q","documents":["a",{"title":"b"}]}"#, "documents[1]"),
            (r#"{"model":"m","query":"q","documents":["\ud800"]}"#, "documents[0]"),
            (r#"{"model":"m","query":"q","documents":["a","b","c","d"]}"#, "documents"),
            (&nested, "documents"),
            (&with(r#""top_n":0"#), "top_n"),
            (&with(r#""top_n":-1"#), "top_n"),
            (&with(r#""top_n":"3""#), "top_n"),
            (&with(r#""top_n":1.5"#), "top_n"),
            (&with(r#""top_n":1e400"#), "top_n"),
            (&with(r#""top_n":18446744073709551616"#), "top_n"),
            (&with(r#""overlap_tokens":81"#), "overlap_tokens"),
            (&with(r#""overlap_tokens":-1"#), "overlap_tokens"),
            (&with(r#""max_chunks_per_doc":0"#), "max_chunks_per_doc"),
            (&with(r#""return_documents":"maybe""#), "return_documents"),
            (&with(r#""return_documents":1"#), "return_documents"),
        ] {
            let message = error(body);
            assert!(message.contains(named), "{}: {message}", body.chars().take(80).collect::<String>());
        }
    }

    #[test]
    fn millions_of_documents_are_refused_while_parsing() {
        let body = format!(r#"{{"model":"m","query":"q","documents":[{}""]}}"#, r#""","#.repeat(3_000_000));
        assert!(error(&body).contains("more than"), "the vector must not grow first");
    }
}
