//! Paths, and the middleware around the handlers: API keys, the host check, panics as 500, the log line.

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::Uri;
use axum::middleware;
use axum::routing::{get, post};
use tower::ServiceExt;
use tower_http::catch_panic::CatchPanicLayer;

use super::ops::RERANK_PATHS;
use super::state::App;
use super::{auth, error, handler, host, observe, openapi, ops, pages};

/// All paths.
pub fn router(app: &Arc<App>) -> Router {
    let mut closed = Router::new()
        .route("/v1/models", get(ops::models))
        .route("/v1/models/{*id}", get(ops::model))
        .route("/v1/v1/models", get(ops::models))
        .route("/info", get(ops::info))
        .route("/v1/info", get(ops::info))
        .route("/meta", get(ops::info))
        .route("/metrics", get(ops::metrics))
        .fallback(ops::unknown_path);
    for path in RERANK_PATHS {
        closed = closed.route(path, post(handler::rerank));
    }
    // Every path of this router needs a key, and so do unknown paths. Paths without a key are merged below.
    let closed = closed
        .method_not_allowed_fallback(ops::wrong_method)
        .layer(middleware::from_fn_with_state(Arc::clone(app), auth::require_key));
    let open = Router::new()
        .route("/health", get(ops::health))
        .route("/ready", get(ops::ready))
        .route("/.well-known/ready", get(ops::ready))
        .route("/.well-known/live", get(ops::health))
        .route("/v1/cluster/auth", get(ops::cluster_auth))
        .route("/openapi.json", get(openapi::document))
        .merge(pages::routes())
        .method_not_allowed_fallback(ops::wrong_method);
    with_middleware(app, closed.merge(open))
}

/// The routes of a connection beyond the cap for which no room could be made: health checks and metrics; 503 for everything else.
pub(crate) fn overloaded_router(app: &Arc<App>) -> Router {
    let metrics = get(ops::metrics).layer(middleware::from_fn_with_state(Arc::clone(app), auth::require_key));
    let open = Router::new()
        .route("/health", get(ops::health))
        .route("/ready", get(ops::ready))
        .route("/metrics", metrics)
        .fallback(ops::too_many_connections);
    with_middleware(app, open)
}

/// Adds the middleware of every route: the host check, CORS, panics as 500, the log line, the request id, and the removal of
/// extra slashes.
fn with_middleware(app: &Arc<App>, routes: Router<Arc<App>>) -> Router {
    let mut routes = routes.layer(middleware::from_fn_with_state(Arc::clone(app), host::require_known_host));
    if let Some(cors) = app.origins.layer() {
        routes = routes.layer(cors);
    }
    let routes = routes
        .layer(CatchPanicLayer::custom(error::from_panic))
        .layer(middleware::from_fn(observe::observe))
        .with_state(Arc::clone(app));
    // The path is rewritten outside the router, before routes are matched.
    Router::new().fallback_service(routes.map_request(normalize_path))
}

/// Removes extra slashes, which come from joining base URLs and paths: `//v1/rerank/` becomes `/v1/rerank`. `/docs/` stays and
/// is redirected, because the page's addresses are relative.
fn normalize_path(mut request: Request) -> Request {
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
