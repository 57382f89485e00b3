//! The `documents` dialect: SiliconFlow's `/v1/rerank`, extended so that clients of Cohere, Jina, vLLM, Infinity, Xinference,
//! Together and Voyage work too.

use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::http::HeaderValue;
use axum::response::IntoResponse;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::fields::{self, ChunkDetail, Documents, RankFields, chunk_detail, flag, in_range, whole};
use super::parsed::ParsedRequest;
use crate::error::RerankError;
use crate::rerank::{Ranked, RankedChunk, Ranking, RerankRequest};
use crate::text::{DocumentOptions, MAX_OVERLAP_TOKENS};

/// A request. Unknown fields are ignored; every optional field may be null.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({
    "model": "rerankd-mini", "query": "Apple", "documents": ["apple", "banana", "fruit", "vegetable"], "top_n": 4
}))]
pub(crate) struct RerankBody<'a> {
    /// A served model's name or alias. Default, also for an empty text: the first model.
    #[serde(default)]
    model: Option<String>,
    /// Text that the documents are ranked against; not empty. Truncated if it is longer than its share of the window.
    query: String,
    /// Texts, or objects with a `text`; at least one. A long document is split into chunks and has its best chunk's score.
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
    /// Voyage's field; ignored, because long documents are always split into chunks.
    #[serde(default)]
    #[schema(value_type = serde_json::Value)]
    truncation: Option<IgnoredAny>,
    /// Whether results contain the document's text. Default: false.
    #[serde(default, deserialize_with = "flag")]
    #[schema(value_type = fields::Flag)]
    return_documents: Option<bool>,
    /// Infinity's field: whether scores are the model's logits instead of numbers in [0, 1]. Default: false.
    #[serde(default, deserialize_with = "flag")]
    #[schema(value_type = fields::Flag)]
    raw_scores: Option<bool>,
    /// Documents with a lower score are left out. Default: none.
    #[serde(default)]
    min_score: Option<f64>,
    /// Whether each result has the position of its best chunk (`true` or `best`), or of all its chunks (`all`). Default: false.
    #[serde(default, deserialize_with = "chunk_detail")]
    #[schema(value_type = fields::ChunkDetail)]
    return_chunks: Option<ChunkDetail>,
    /// A task description for models that take one. Models that take none ignore it, and the response has the header
    /// `x-rerankd-ignored: instruction`.
    #[serde(default, alias = "instruct")]
    instruction: Option<String>,
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
    let chunks = body.return_chunks.unwrap_or(ChunkDetail::None);
    let options = DocumentOptions {
        overlap_tokens: in_range("overlap_tokens", body.overlap_tokens, 0, MAX_OVERLAP_TOKENS as i64)?
            .unwrap_or(defaults.overlap_tokens),
        max_chunks_per_doc: in_range("max_chunks_per_doc", body.max_chunks_per_doc, 1, i64::MAX)?
            .unwrap_or(defaults.max_chunks_per_doc),
        max_tokens_per_doc: in_range("max_tokens_per_doc", body.max_tokens_per_doc, 1, i64::MAX)?,
        spans: chunks != ChunkDetail::None,
    };
    let top_n = in_range("top_n", body.top_n, 1, i64::MAX)?;
    let top_k = in_range("top_k", body.top_k, 1, i64::MAX)?;
    let request = RerankRequest {
        model: body.model,
        top_n: top_n.or(top_k),
        options,
        ..RerankRequest::new(
            fields::query("query", body.query)?,
            body.documents.texts("documents", body.rank_fields.as_ref(), max_documents)?,
        )
    };
    let texts = body.return_documents.unwrap_or(false).then(|| request.documents.clone());
    let shape = Shape {
        for_voyage: body.top_k.is_some() || body.truncation.is_some(),
        raw: body.raw_scores.unwrap_or(false),
        min_score: body.min_score.unwrap_or(f64::NEG_INFINITY),
        chunks,
    };
    let has_instruction = body.instruction.is_some_and(|text| !text.trim().is_empty());
    let write = move |ranking: &Ranking, id: String| {
        let text = |index: usize| texts.as_ref().map(|texts| texts[index].as_str());
        let mut response = Json(answer(ranking, id, text, shape)).into_response();
        if has_instruction {
            response.headers_mut().insert("x-rerankd-ignored", HeaderValue::from_static("instruction"));
        }
        response
    };
    Ok(ParsedRequest::new(request, write))
}

/// A response.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct RerankAnswer<'a> {
    /// The request's id.
    id: String,
    /// Best first.
    results: Vec<AnswerResult<'a>>,
    /// The results again, under Voyage's names.
    data: Vec<VoyageResult<'a>>,
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
pub(crate) struct AnswerResult<'a> {
    /// Its position in the request, from 0.
    index: usize,
    /// In [0, 1]: the model's score map, a sigmoid, of its best chunk's logit; with `raw_scores` the logit itself.
    relevance_score: f64,
    /// Its text, if the request has `return_documents`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    document: Option<AnswerDocument<'a>>,
    /// The chunk with the highest score, if the request has `return_chunks`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    chunk: Option<AnswerChunk>,
    /// All scored chunks in the text's order, if `return_chunks` is `all`. Adjacent chunks overlap.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    chunks: Option<Vec<AnswerChunk>>,
}

/// A part of a document that the model scored. Positions count Unicode code points of the document's text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AnswerChunk {
    /// Its first character.
    start: usize,
    /// The character after its last.
    end: usize,
    /// In [0, 1], or with `raw_scores` a logit.
    relevance_score: f64,
}

/// A document's text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AnswerDocument<'a> {
    text: &'a str,
}

/// The score of one document, under Voyage's names.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct VoyageResult<'a> {
    index: usize,
    relevance_score: f64,
    /// Its text, if the request has `return_documents`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    document: Option<&'a str>,
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

/// Seconds since 1970-01-01 UTC.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The options of a request that determine its response.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// Whether `object` is `list`, as Voyage's clients require.
    for_voyage: bool,
    /// Whether scores are logits.
    raw: bool,
    /// Results with a lower score are left out.
    min_score: f64,
    chunks: ChunkDetail,
}

impl Shape {
    fn score(self, score: f64, logit: f32) -> f64 {
        if self.raw { f64::from(logit) } else { score }
    }

    fn chunk(self, chunk: &RankedChunk) -> AnswerChunk {
        let Range { start, end } = chunk.span;
        AnswerChunk { start, end, relevance_score: self.score(chunk.score, chunk.logit) }
    }
}

fn answer<'a>(
    ranking: &Ranking,
    id: String,
    text: impl Fn(usize) -> Option<&'a str>,
    shape: Shape,
) -> RerankAnswer<'a> {
    let tokens = AnswerTokens { input_tokens: ranking.tokens, output_tokens: 0 };
    let score = |ranked: &Ranked| shape.score(ranked.score, ranked.logit);
    let kept = || ranking.results.iter().filter(|ranked| score(ranked) >= shape.min_score);
    let results = kept().map(|ranked| AnswerResult {
        index: ranked.index,
        relevance_score: score(ranked),
        document: text(ranked.index).map(|text| AnswerDocument { text }),
        chunk: ranked.best_chunk().map(|chunk| shape.chunk(chunk)),
        chunks: (shape.chunks == ChunkDetail::All)
            .then(|| ranked.chunks.iter().map(|chunk| shape.chunk(chunk)).collect()),
    });
    let data = kept().map(|ranked| VoyageResult {
        index: ranked.index,
        relevance_score: score(ranked),
        document: text(ranked.index),
    });
    RerankAnswer {
        id,
        results: results.collect(),
        data: data.collect(),
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
        object: if shape.for_voyage { "list" } else { "rerank" },
        created: unix_seconds(),
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
            r#"{"query":"q","documents":["a"]}"#,
            r#"{"model":null,"query":"q","documents":["a"],"min_score":null,"return_chunks":null,"instruction":null}"#,
            r#"{"model":"","query":"q","documents":["a"],"min_score":1,"return_chunks":"All","instruct":"rank"}"#,
            r#"{"model":"m","query":"q","documents":["a",{"text":"b","id":7},{"meta":{"x":[1]},"text":"c"}]}"#,
            r#"{"model":"m","query":"q","documents":["a"],"top_n":null,"return_documents":"true","overlap_tokens":80.0}"#,
            r#"{"model":"m","query":"q","documents":[""],"kwargs":"{}","priority":[[1]],"max_chunk_per_doc":4}"#,
            "\n {\"model\":\"m\",\"query\":\"\\ud83d\\ude00 \\u0000\",\"documents\":[\"\\u0000\"]} \n",
        ] {
            assert!(parse(body.as_bytes(), 3).is_ok(), "{body}");
        }
        let body = with(r#""top_n":99,"return_documents":"True","overlap_tokens":0"#);
        let Ok(parsed) = parse(body.as_bytes(), 3) else { panic!("{body}") };
        let request = &parsed.requests[0];
        assert_eq!((request.top_n, request.options.overlap_tokens), (Some(99), 0));
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
            (r#"{"model":7,"query":"q","documents":["a"]}"#, "model"),
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
            (&with(r#""min_score":"0.5""#), "min_score"),
            (&with(r#""min_score":1e400"#), "min_score"),
            (&with(r#""return_chunks":"some""#), "return_chunks"),
            (&with(r#""return_chunks":2"#), "return_chunks"),
            (&with(r#""instruction":["a"]"#), "instruction"),
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
