//! The check of the Host and Origin headers on a loopback server without keys. It refuses the requests of web pages in the user's
//! browser, whether they reach the server under another host name (DNS rebinding) or come from another site.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;

use super::error::ApiError;
use super::state::App;

/// Refuses a request with a Host or Origin that is not allowed. Without a list, every host is allowed.
pub(super) async fn require_known_host(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if let Some(hosts) = &app.hosts {
        // The host in an absolute-form target replaces the Host header (RFC 9112, section 3.2.2).
        let target = request.uri().authority().map(|authority| authority.as_str());
        let host = target.or_else(|| request.headers().get(header::HOST).map(text));
        let origin = request.headers().get(header::ORIGIN).filter(|origin| !app.origins.allows(origin));
        let origin = origin.map(|origin| text(origin).split("://").last().unwrap_or_default());
        if let Some(unknown) = [host, origin].into_iter().flatten().find(|host| !hosts.allows(host)) {
            let unknown: String = unknown.chars().take(100).collect();
            let message = format!(
                "the host {unknown:?} is not allowed: a server without keys on a loopback address answers to localhost only; set \
                 --api-key, or name the host with --allowed-host, or the origin of a web page with --allowed-origin"
            );
            return Err(ApiError::new(StatusCode::FORBIDDEN, message).for_path(request.uri().path()));
        }
    }
    Ok(next.run(request).await)
}

/// A header's text. A value that is not visible ASCII is no host name and counts as the empty text, which is not allowed.
fn text(value: &HeaderValue) -> &str {
    value.to_str().unwrap_or_default()
}
