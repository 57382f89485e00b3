//! Paths for operators and SDKs: health, readiness, the list of models, limits and metrics.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use super::error::ApiError;
use super::state::App;
use crate::error::{Bottleneck, RerankError};
use crate::served::Model;
use crate::telemetry;

/// Paths that rank; each accepts every dialect. Two version prefixes occur when an SDK adds its own to a base URL that has one.
pub(super) const RERANK_PATHS: [&str; 17] = [
    "/v1/rerank",
    "/v2/rerank",
    "/rerank",
    "/v1/v1/rerank",
    "/v1/v2/rerank",
    "/v2/v1/rerank",
    "/v2/v2/rerank",
    "/v1/reranking",
    "/reranking",
    "/v1/v1/reranking",
    "/v1/ranking",
    "/ranking",
    "/v1/v1/ranking",
    "/v1/score",
    "/score",
    "/v1/v1/score",
    "/v1/retrieval/{*model}",
];

/// A model that finished a batch within this time is alive; its health check runs no inference.
const RECENT: Duration = Duration::from_secs(30);

/// Seconds that a health check waits for its own inference.
const PATIENCE_S: u64 = 10;

/// A served model, in OpenAI's shape.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ModelCard {
    id: String,
    /// Always `model`.
    object: &'static str,
    /// Always 0: model files have no date.
    created: u64,
    owned_by: String,
    /// Always `rerank`.
    model_type: &'static str,
    /// Other names that requests may use.
    aliases: Vec<String>,
    /// Maximum tokens of a query and a chunk together, special tokens included.
    max_input_tokens: usize,
}

/// The served models.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ModelList {
    /// Always `list`.
    object: &'static str,
    data: Vec<ModelCard>,
}

impl From<&Model> for ModelCard {
    fn from(model: &Model) -> Self {
        let owner = model.name.split_once('/').map_or("rerankd", |(owner, _)| owner);
        Self {
            id: model.name.clone(),
            object: "model",
            created: 0,
            owned_by: owner.to_owned(),
            model_type: "rerank",
            aliases: model.aliases.clone(),
            max_input_tokens: model.text.window(),
        }
    }
}

/// The served models.
#[utoipa::path(get, path = "/v1/models", responses((status = 200, body = ModelList), (status = 401, body = super::error::ErrorBody)), security(("key" = [])))]
pub(super) async fn models(State(app): State<Arc<App>>) -> Result<Json<ModelList>, ApiError> {
    Ok(Json(ModelList { object: "list", data: app.models()?.iter().map(|model| ModelCard::from(&**model)).collect() }))
}

/// One served model; its id may contain slashes.
#[utoipa::path(get, path = "/v1/models/{id}", params(("id" = String, Path, description = "name or alias")),
    responses((status = 200, body = ModelCard), (status = 401, body = super::error::ErrorBody), (status = 404, body = super::error::ErrorBody)), security(("key" = [])))]
pub(super) async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<ModelCard>, ApiError> {
    let unknown = |_| ApiError::new(StatusCode::NOT_FOUND, "Model does not exist. GET /v1/models lists those that do.");
    app.models()?.find(&id).map(|model| Json(ModelCard::from(&**model))).map_err(unknown)
}

/// Liveness: every model has finished a batch in the last 30 s, has been running one for less than two minutes, or passes an
/// inference now.
#[utoipa::path(get, path = "/health", responses((status = 200, description = "Every model computes scores"), (status = 503, description = "A model does not, or the models are still loading", body = super::error::ErrorBody)))]
pub(super) async fn health(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    for model in app.models()?.iter() {
        if let Err(error) = model.check(RECENT, PATIENCE_S).await {
            let message = format!("{}: the inference of the health check failed: {error}", model.name);
            return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).retry_after(1));
        }
    }
    Ok(Json(json!({"status": "ok"})).into_response())
}

/// Readiness: models are loaded, and the server is not shutting down.
#[utoipa::path(get, path = "/ready", responses((status = 200, description = "Ready for requests"), (status = 503, description = "Loading or shutting down", body = super::error::ErrorBody)))]
pub(super) async fn ready(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    if app.draining.load(Relaxed) {
        return Err(RerankError::ShuttingDown.into());
    }
    for model in app.models()?.iter() {
        if !model.scheduler.is_accepting() {
            return Err(RerankError::ShuttingDown.into());
        }
    }
    Ok(Json(json!({"status": "ready"})).into_response())
}

/// The first model and the limits, as text-embeddings-inference describes them. `/meta`, which Weaviate reads at its start, has the
/// same answer.
#[utoipa::path(get, path = "/info", responses((status = 200, description = "The first model and the limits", content_type = "application/json"), (status = 401, body = super::error::ErrorBody)), security(("key" = [])))]
pub(super) async fn info(State(app): State<Arc<App>>) -> Result<Json<serde_json::Value>, ApiError> {
    let models = app.models()?;
    let model = models.iter().next();
    let labels = json!({"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}});
    Ok(Json(json!({
        "model_id": model.map(|model| &model.name),
        "model_sha": null,
        "model_dtype": model.map(|model| model.dtype),
        "model_type": {"reranker": labels},
        "max_concurrent_requests": app.limits.max_connections,
        "max_input_length": model.map(|model| model.text.window()),
        "max_batch_tokens": model.map(|model| model.scheduler.max_batch_tokens()),
        "max_batch_requests": null,
        "max_client_batch_size": app.limits.max_documents,
        "auto_truncate": true,
        "tokenization_workers": model.map(|model| model.text.threads()),
        "version": env!("CARGO_PKG_VERSION"),
        "sha": null,
        "docker_label": null,
    })))
}

/// Whether requests need a key: Xinference's client sends its key only if `auth` is true.
#[utoipa::path(get, path = "/v1/cluster/auth", responses((status = 200, description = "auth: whether requests need a key", content_type = "application/json")))]
pub(super) async fn cluster_auth(State(app): State<Arc<App>>) -> Json<serde_json::Value> {
    Json(json!({"auth": !app.keys().is_open()}))
}

/// Metrics in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", responses((status = 200, description = "Prometheus text format", content_type = "text/plain"), (status = 401, body = super::error::ErrorBody)), security(("key" = [])))]
pub(super) async fn metrics() -> Response {
    let text = telemetry::metrics::render();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

/// 404 with a list of the main paths.
pub(super) async fn unknown_path(request: Request) -> ApiError {
    let path: String = request.uri().path().chars().take(100).collect();
    let exist =
        format!("POST {}; GET /v1/models, /info, /health, /ready, /metrics, /openapi.json", RERANK_PATHS.join(", "));
    ApiError::new(StatusCode::NOT_FOUND, format!("{path:?} does not exist; these do: {exist}"))
}

/// The response on a connection beyond the cap. The connection is closed, to make room.
pub(super) async fn too_many_connections(request: Request) -> ApiError {
    let overloaded = ApiError::from(RerankError::Overloaded { retry_after_s: 1, bottleneck: Bottleneck::Connections });
    overloaded.for_path(request.uri().path()).closing_connection()
}

/// 405 with the method that the path accepts.
pub(super) async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{} is not for this path; rerank paths take POST, all others GET", request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}
