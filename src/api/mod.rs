//! HTTP and nothing else: paths, keys, limits, dialects, errors, operations.

mod auth;
mod body;
mod connection;
mod dialect;
mod error;
mod handler;
mod host;
mod observe;
mod openapi;
mod ops;
mod server;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

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
pub use host::HostList;
pub use server::{Server, ServerTimeouts, serve};

use crate::error::RerankError;
use crate::served::Models;
use body::MemoryBudget;

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

/// The state that every handler sees.
#[derive(Debug)]
pub struct App {
    /// Empty while models are loading.
    models: OnceLock<Models>,
    keys: Keys,
    limits: ApiLimits,
    /// Hosts that requests may name; `None` allows every host.
    hosts: Option<HostList>,
    memory: MemoryBudget,
    draining: AtomicBool,
}

impl App {
    /// The state of a server whose models are still to be loaded: see [`App::set_models`].
    pub fn new(keys: Keys, limits: ApiLimits, hosts: Option<HostList>) -> Arc<Self> {
        let memory = MemoryBudget::new(limits.max_inflight_bytes);
        Arc::new(Self { models: OnceLock::new(), keys, limits, hosts, memory, draining: AtomicBool::new(false) })
    }

    /// Serves these models from now on. A second call changes nothing.
    pub fn set_models(&self, models: Models) {
        self.models.set(models).ok();
    }

    /// The served models.
    ///
    /// # Errors
    /// [`RerankError::Loading`]
    pub fn models(&self) -> Result<&Models, RerankError> {
        self.models.get().ok_or(RerankError::Loading)
    }

    /// Answers every request that waits for scores with an error, now and later.
    fn refuse_all(&self) {
        self.models.get().into_iter().flat_map(Models::iter).for_each(|model| model.scheduler.refuse_all());
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
    finish(app, closed.merge(open).merge(openapi::page()))
}

/// The routes of a connection beyond the cap: health checks and metrics; 503 for everything else.
pub(crate) fn overloaded_router(app: &Arc<App>) -> Router {
    let metrics = get(ops::metrics).layer(middleware::from_fn_with_state(Arc::clone(app), auth::require_key));
    let open = Router::new()
        .route("/health", get(ops::health))
        .route("/ready", get(ops::ready))
        .route("/metrics", metrics)
        .fallback(ops::too_many_connections);
    finish(app, open)
}

/// Adds what every route has: the host check, panics as errors, the log line and the request id.
fn finish(app: &Arc<App>, routes: Router<Arc<App>>) -> Router {
    let routes = routes
        .layer(middleware::from_fn_with_state(Arc::clone(app), host::require_known_host))
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
