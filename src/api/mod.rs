//! HTTP and nothing else: paths, keys, limits, dialects, errors, operations.

mod auth;
mod body;
mod dialect;
mod error;
mod handler;
mod observe;
mod openapi;
mod ops;
mod server;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use axum::Router;
use axum::extract::Request;
use axum::http::Uri;
use axum::middleware;
use axum::routing::{get, post};
use tower::ServiceExt;
use tower_http::catch_panic::CatchPanicLayer;

pub use auth::Keys;
pub use body::ApiLimits;
pub use error::ApiError;
pub use server::{Server, ServerTimeouts, serve};

use crate::served::Models;
use body::BodyBudget;

/// Paths that rank. Each takes every dialect; SDKs that are given a base with a version in it double that.
const RERANK_PATHS: [&str; 14] = [
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
    "/v1/retrieval/{*model}",
];

/// What every handler sees.
#[derive(Debug)]
pub struct App {
    models: Models,
    keys: Keys,
    limits: ApiLimits,
    bodies: BodyBudget,
    draining: AtomicBool,
}

impl App {
    /// The state of a server of `models`.
    pub fn new(models: Models, keys: Keys, limits: ApiLimits) -> Arc<Self> {
        let bodies = BodyBudget::new(limits.max_inflight_bytes);
        Arc::new(Self { models, keys, limits, bodies, draining: AtomicBool::new(false) })
    }

    /// The served models.
    pub fn models(&self) -> &Models {
        &self.models
    }
}

/// The service: every path, its keys, its error shape.
pub fn router(app: &Arc<App>) -> Router {
    let mut closed = Router::new()
        .route("/v1/models", get(ops::models))
        .route("/v1/models/{*id}", get(ops::model))
        .route("/v1/v1/models", get(ops::models))
        .route("/info", get(ops::info))
        .route("/v1/info", get(ops::info))
        .route("/metrics", get(ops::metrics))
        .fallback(ops::unknown_path);
    for path in RERANK_PATHS {
        closed = closed.route(path, post(handler::rerank));
    }
    // Denied by default: whatever is not merged below asks for a key, unknown paths and wrong methods included.
    let closed = closed
        .method_not_allowed_fallback(ops::wrong_method)
        .layer(middleware::from_fn_with_state(Arc::clone(app), auth::require_key));
    let open = Router::new()
        .route("/health", get(ops::health))
        .route("/ready", get(ops::ready))
        .route("/v1/cluster/auth", get(ops::cluster_auth))
        .route("/", get(openapi::front))
        .route("/openapi.json", get(openapi::document))
        .method_not_allowed_fallback(ops::wrong_method);
    let routes = closed
        .merge(open)
        .merge(openapi::page())
        .layer(CatchPanicLayer::custom(error::from_panic))
        .layer(middleware::from_fn(observe::observe))
        .with_state(Arc::clone(app));
    // Outside the router, which would have matched the path already.
    Router::new().fallback_service(routes.map_request(tidy_path))
}

/// `//v1/rerank/` is `/v1/rerank`: people join base URLs and paths in every way. `/docs/` is a folder of files and stays one.
fn tidy_path(mut request: Request) -> Request {
    let path = request.uri().path();
    if path.contains("//") || (path.len() > 1 && path.ends_with('/') && path != "/docs/") {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
        if let Ok(uri) = format!("/{}{query}", parts.join("/")).parse::<Uri>() {
            *request.uri_mut() = uri;
        }
    }
    request
}
