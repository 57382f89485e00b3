//! The `documents` dialect: SiliconFlow's `/v1/rerank`, extended so that clients of Cohere, Jina, vLLM, Infinity, Xinference,
//! Together and Voyage work too. The response has Voyage's `data` if the request has a field that only Voyage defines.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::response::IntoResponse;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::fields::{self, Documents, RankFields, flag, in_range, whole};
use super::parsed::ParsedRequest;
use crate::client::Client;
use crate::error::RerankError;
use crate::rerank::{Ranked, Ranking, RerankRequest};
use crate::text::{DocumentOptions, MAX_OVERLAP_TOKENS};

/// A request. Unknown fields are ignored; every optional field may be null.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({
    "model": "rerankd-mini", "query": "Apple", "documents": ["apple", "banana", "fruit", "vegetable"], "top_n": 4
}))]
pub(crate) struct RerankBody<'a> {
    /// A served model's name or alias.
    model: String,
    /// Text that the documents are ranked against; not empty. Truncated if it is longer than its share of the window.
    query: String,
    /// Texts, or objects with a `text`; at least one. A long document is split into chunks and has its best chunk's score.
    #[schema(schema_with = fields::documents_schema)]
    #[serde(borrow)]
    documents: Documents<'a>,
    /// For documents that are objects: the fields that are joined to their text, in this order. Default: `text`.
    #[serde(default)]
    #[schema(value_type = Option<Vec<String>>, max_items = 64)]
    rank_fields: Option<RankFields>,
    /// Number of results, best first. Default: all.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    top_n: Option<i64>,
    /// Voyage's name for `top_n`; `top_n` takes precedence.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    top_k: Option<i64>,
    /// Voyage's; ignored: long documents are always split into chunks.
    #[serde(default)]
    #[schema(value_type = serde_json::Value)]
    truncation: Option<IgnoredAny>,
    /// Whether results contain the document's text. Default: false.
    #[serde(default, deserialize_with = "flag")]
    #[schema(schema_with = fields::flag_schema)]
    return_documents: Option<bool>,
    /// Infinity's: whether scores are the model's logits instead of numbers in [0, 1]. Default: false.
    #[serde(default, deserialize_with = "flag")]
    #[schema(schema_with = fields::flag_schema)]
    raw_scores: Option<bool>,
    /// Maximum chunks of a document that are scored. Default: 1024.
    #[serde(default, deserialize_with = "whole", alias = "max_chunk_per_doc")]
    #[schema(minimum = 1)]
    max_chunks_per_doc: Option<i64>,
    /// Tokens that adjacent chunks have in common, limited to a quarter of a chunk. Default: 80.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 80)]
    overlap_tokens: Option<i64>,
    /// Maximum tokens of a document that are read; the rest is dropped before it is split into chunks. Default: no limit.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    max_tokens_per_doc: Option<i64>,
}

/// Parses and validates a body.
pub(super) fn parse(body: &[u8], max_documents: usize) -> Result<ParsedRequest, RerankError> {
    let body: RerankBody<'_> = fields::json(body)?;
    let defaults = DocumentOptions::default();
    let options = DocumentOptions {
        overlap_tokens: in_range("overlap_tokens", body.overlap_tokens, 0, MAX_OVERLAP_TOKENS as i64)?
            .unwrap_or(defaults.overlap_tokens),
        max_chunks_per_doc: in_range("max_chunks_per_doc", body.max_chunks_per_doc, 1, i64::MAX)?
            .unwrap_or(defaults.max_chunks_per_doc),
        max_tokens_per_doc: in_range("max_tokens_per_doc", body.max_tokens_per_doc, 1, i64::MAX)?,
    };
    let top_n = in_range("top_n", body.top_n, 1, i64::MAX)?;
    let top_k = in_range("top_k", body.top_k, 1, i64::MAX)?;
    let request = RerankRequest {
        client: Client::default(),
        model: Some(body.model),
        query: fields::query(body.query)?,
        documents: body.documents.texts("documents", body.rank_fields.as_ref(), max_documents)?,
        top_n: top_n.or(top_k),
        options,
        deadline: None,
    };
    let texts = body.return_documents.unwrap_or(false).then(|| request.documents.clone());
    let shape =
        Shape { for_voyage: body.top_k.is_some() || body.truncation.is_some(), raw: body.raw_scores.unwrap_or(false) };
    let write = move |ranking: &Ranking, id: String| {
        let text = |index: usize| texts.as_ref().map(|texts| texts[index].clone());
        Json(answer(ranking, id, text, shape)).into_response()
    };
    Ok(ParsedRequest { request, write: Box::new(write) })
}

/// A response.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct RerankAnswer {
    /// The request's id.
    id: String,
    /// Best first.
    results: Vec<AnswerResult>,
    /// The results again, under Voyage's names; only if the request has `top_k` or `truncation`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    data: Option<Vec<VoyageResult>>,
    tokens: AnswerTokens,
    meta: Meta,
    /// The served model's name.
    model: String,
    /// `list` if the request has `top_k` or `truncation`, else `rerank`. Voyage's clients refuse `rerank`; other clients refuse
    /// `list`.
    object: &'static str,
    /// Seconds since 1970-01-01 UTC.
    created: u64,
    usage: Usage,
}

/// The score of one document.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AnswerResult {
    /// Its position in the request, from 0.
    index: usize,
    /// In [0, 1]: the model's score map, a sigmoid, of its best chunk's logit; with `raw_scores` the logit itself.
    relevance_score: f64,
    /// Its text, if the request has `return_documents`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    document: Option<AnswerDocument>,
}

/// A document's text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AnswerDocument {
    text: String,
}

/// The score of one document, under Voyage's names.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct VoyageResult {
    index: usize,
    relevance_score: f64,
    /// Its text, if the request has `return_documents`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    document: Option<String>,
}

/// Tokens that the model read, over all distinct pairs of query and chunk.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(crate) struct AnswerTokens {
    input_tokens: usize,
    /// Always 0.
    output_tokens: usize,
}

/// The tokens again, where Cohere's clients expect them.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Meta {
    api_version: ApiVersion,
    billed_units: BilledUnits,
    tokens: AnswerTokens,
}

/// Version of Cohere's API.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ApiVersion {
    version: &'static str,
}

/// Cohere's units of billing, for its clients; this server bills nothing.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BilledUnits {
    input_tokens: usize,
    output_tokens: usize,
    search_units: usize,
    classifications: usize,
}

/// The tokens again, under OpenAI's names.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

impl Usage {
    pub(super) fn of(ranking: &Ranking) -> Self {
        Self { prompt_tokens: ranking.tokens, completion_tokens: 0, total_tokens: ranking.tokens }
    }
}

/// What the request says about the response.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// Whether the response has Voyage's `data`.
    for_voyage: bool,
    /// Whether scores are logits.
    raw: bool,
}

fn answer(ranking: &Ranking, id: String, text: impl Fn(usize) -> Option<String>, shape: Shape) -> RerankAnswer {
    let Shape { for_voyage, raw } = shape;
    let tokens = AnswerTokens { input_tokens: ranking.tokens, output_tokens: 0 };
    let score = |ranked: &Ranked| if raw { f64::from(ranked.logit) } else { ranked.score };
    let results = ranking.results.iter().map(|ranked| AnswerResult {
        index: ranked.index,
        relevance_score: score(ranked),
        document: text(ranked.index).map(|text| AnswerDocument { text }),
    });
    let data = ranking.results.iter().map(|ranked| VoyageResult {
        index: ranked.index,
        relevance_score: score(ranked),
        document: text(ranked.index),
    });
    RerankAnswer {
        id,
        results: results.collect(),
        data: for_voyage.then(|| data.collect()),
        tokens,
        meta: Meta {
            api_version: ApiVersion { version: "1" },
            billed_units: BilledUnits {
                input_tokens: ranking.tokens,
                output_tokens: 0,
                search_units: 1,
                classifications: 0,
            },
            tokens,
        },
        model: ranking.model.clone(),
        object: if for_voyage { "list" } else { "rerank" },
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        usage: Usage::of(ranking),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(body: &str) -> String {
        parse(body.as_bytes(), 3).err().expect(body).to_string()
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
            assert!(parse(body.as_bytes(), 3).is_ok(), "{body}");
        }
        let body = with(r#""top_n":99,"return_documents":"True","overlap_tokens":0"#);
        let Ok(parsed) = parse(body.as_bytes(), 3) else { panic!("{body}") };
        assert_eq!((parsed.request.top_n, parsed.request.options.overlap_tokens), (Some(99), 0));
    }

    /// Faults F1 to F12 and F17 to F19 in docs/reliability.md: each error names the field that is wrong.
    #[test]
    fn an_error_names_the_wrong_field() {
        let nested = format!(r#"{{"model":"m","query":"q","documents":{}"#, "[".repeat(100_000));
        for (body, named) in [
            ("", "body"),
            (r#"["m","q",["a"],null]"#, "body"),
            (r#"{"model":"m","query":"q","documents":["a"]} {}"#, "body"),
            (r#"{"":x}"#, "body"),
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
            (&with(r#""raw_scores":1"#), "raw_scores"),
        ] {
            let message = error(body);
            assert!(message.contains(named), "{}: {message}", body.chars().take(80).collect::<String>());
        }
    }

    #[test]
    fn millions_of_documents_are_refused_while_parsing() {
        let body = format!(r#"{{"model":"m","query":"q","documents":[{}""]}}"#, r#""","#.repeat(3_000_000));
        assert!(error(&body).contains("more than"), "the list must be refused before its vector grows");
    }
}
