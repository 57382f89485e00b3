//! The Host and Origin check of a server without keys: a page in the user's browser must not reach it under another name (DNS
//! rebinding) or from another site.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;

use super::error::ApiError;
use super::state::App;

/// Refuses a request whose Host or Origin is not on the server's list, if it has one.
pub(super) async fn require_known_host(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if let Some(hosts) = &app.hosts {
        // An absolute-form target beats the header (RFC 9112, 3.2.2).
        let target = request.uri().authority().map(|authority| authority.as_str());
        let host = target.or_else(|| header(request.headers(), &header::HOST));
        let origin =
            header(request.headers(), &header::ORIGIN).map(|origin| origin.split("://").last().unwrap_or(origin));
        if let Some(unknown) = [host, origin].into_iter().flatten().find(|host| !hosts.allows(host)) {
            let unknown: String = unknown.chars().take(100).collect();
            let message = format!(
                "the host {unknown:?} is not allowed: a server without keys answers on localhost only; set --api-key, or name the \
                 host with --allowed-host"
            );
            return Err(ApiError::new(StatusCode::FORBIDDEN, message));
        }
    }
    Ok(next.run(request).await)
}

fn header<'a>(headers: &'a HeaderMap, name: &axum::http::HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}
