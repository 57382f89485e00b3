//! The OpenAPI document, generated from the types of requests and responses.

use std::sync::LazyLock;

use axum::body::Bytes;
use axum::http::header;
use axum::response::IntoResponse;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi, ToSchema};

use super::dialect::{documents, input, passages, text_pairs, texts, weaviate};
use super::error::{ErrorBody, TextErrorBody};
use super::ops;

#[derive(OpenApi)]
#[openapi(
    info(title = "rerankd", description = "Ranks documents by their relevance to a query."),
    paths(
        v1_rerank, rerank, v1_reranking, v1_ranking, v1_score,
        ops::models, ops::model, ops::info, ops::cluster_auth, ops::health, ops::ready, ops::metrics
    ),
    modifiers(&SecuritySchemes)
)]
struct Contract;

struct SecuritySchemes;

impl Modify for SecuritySchemes {
    fn modify(&self, contract: &mut utoipa::openapi::OpenApi) {
        let components = contract.components.get_or_insert_default();
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        components.add_security_scheme("key", SecurityScheme::Http(bearer));
        let header = ApiKey::Header(ApiKeyValue::new("x-api-key"));
        components.add_security_scheme("x-api-key", SecurityScheme::ApiKey(header));
    }
}

pub(super) fn contract() -> utoipa::openapi::OpenApi {
    Contract::openapi()
}

/// `/openapi.json`.
pub(super) async fn document() -> impl IntoResponse {
    static JSON: LazyLock<Bytes> =
        LazyLock::new(|| serde_json::to_vec(&contract()).expect("the document is plain JSON").into());
    ([(header::CONTENT_TYPE, "application/json")], JSON.clone())
}

/// Body of `/v1/rerank` and `/rerank`. The name of the list determines the dialect; `documents` with `property` and without
/// `model` is Weaviate's.
#[derive(ToSchema)]
#[schema(as = AnyRerankBody)]
#[serde(untagged)]
#[allow(dead_code, reason = "a schema for the OpenAPI document, never constructed")]
enum AnyBody<'a> {
    Documents(documents::RerankBody<'a>),
    Texts(texts::TextsBody<'a>),
    Weaviate(weaviate::WeaviateBody<'a>),
}

/// Response of a rerank path, in the body's dialect.
#[derive(ToSchema)]
#[schema(as = AnyRerankAnswer)]
#[serde(untagged)]
#[allow(dead_code, reason = "a schema for the OpenAPI document, never constructed")]
enum AnyAnswer<'a> {
    Documents(documents::RerankAnswer<'a>),
    Texts(Vec<texts::TextsRank<'a>>),
    Weaviate(weaviate::WeaviateAnswer<'a>),
}

/// Error of a rerank path, in the body's dialect.
#[derive(ToSchema)]
#[schema(as = AnyRerankError)]
#[serde(untagged)]
#[allow(dead_code, reason = "a schema for the OpenAPI document, never constructed")]
enum AnyError {
    Documents(ErrorBody),
    Texts(TextErrorBody),
}

/// Describes one rerank path: its body, its response and its errors. `handler::rerank` handles all of them.
macro_rules! rerank_path {
    ($name:ident, $path:literal, $summary:literal, $body:ty, $answer:ty, $error:ty) => {
        #[doc = $summary]
        #[utoipa::path(
            post, path = $path, request_body = $body,
            responses(
                (status = 200, description = "The scores: best first, or in the request's order for `text_2` and Weaviate", body = $answer),
                (status = 400, description = "A field is wrong (code 20015), or the model unknown (20012)", body = $error),
                (status = 401, description = "No key, or a wrong one", body = $error),
                (status = 408, description = "The body did not arrive in time", body = $error),
                (status = 413, description = "The body, or the work it asks for, is over the limit", body = $error),
                (status = 415, description = "A compressed body", body = $error),
                (status = 429, description = "A rate limit of the key is used up; see Retry-After", body = $error),
                (status = 500, description = "A fault of the server", body = $error),
                (status = 503, description = "Overloaded, loading or shutting down (code 50505); see Retry-After", body = $error),
                (status = 504, description = "The deadline passed first", body = $error),
            ),
            security(("key" = []), ("x-api-key" = []))
        )]
        #[allow(dead_code, reason = "carries the attributes of the OpenAPI document, never called")]
        fn $name() {}
    };
}

rerank_path!(
    v1_rerank,
    "/v1/rerank",
    "Ranks documents as SiliconFlow, Cohere, Jina, Voyage and most others do.",
    AnyBody<'_>,
    AnyAnswer<'_>,
    AnyError
);
rerank_path!(
    rerank,
    "/rerank",
    "Ranks `texts` as text-embeddings-inference does, and `documents` as /v1/rerank or Weaviate's reranker-transformers does.",
    AnyBody<'_>,
    AnyAnswer<'_>,
    AnyError
);
rerank_path!(
    v1_reranking,
    "/v1/reranking",
    "Ranks an input list as Mixedbread does.",
    input::InputBody<'_>,
    input::InputAnswer<'_>,
    ErrorBody
);
rerank_path!(
    v1_ranking,
    "/v1/ranking",
    "Ranks passages as NVIDIA NIM does.",
    passages::PassagesBody<'_>,
    passages::PassagesAnswer,
    ErrorBody
);
rerank_path!(
    v1_score,
    "/v1/score",
    "Scores pairs of texts as vLLM does.",
    text_pairs::TextPairsBody<'_>,
    text_pairs::TextPairsAnswer,
    ErrorBody
);
