//! API keys, checked before any of the body is read.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;

use super::error::ApiError;
use super::observe::RequestContext;
use super::state::App;

/// Refuses a request without a valid key, unless the server runs without keys. Adds the [`Client`](crate::client::Client) to the
/// request's extensions.
pub(super) async fn require_key(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if let Some(client) = app.keys().client(offered_key(request.headers())).cloned() {
        if let (Some(context), Some(name)) = (request.extensions().get::<Arc<RequestContext>>(), &client.key_name) {
            context.key.set(Arc::clone(name)).ok();
        }
        request.extensions_mut().insert(client);
        return Ok(next.run(request).await);
    }
    Err(ApiError::unauthorized().for_path(request.uri().path()))
}

/// The key in the headers: `Authorization: Bearer KEY`, `Authorization: KEY` or `x-api-key: KEY`. The same key may occur
/// several times. Different keys are refused (`None`), because it is unclear which one counts.
fn offered_key(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get_all(header::AUTHORIZATION).iter().map(bearer_key);
    let plain = headers.get_all("x-api-key").iter().map(|value| value.to_str().ok().map(str::trim));
    let mut keys = bearer.chain(plain);
    let first = keys.next()??;
    keys.all(|key| key == Some(first)).then_some(first)
}

fn bearer_key(value: &HeaderValue) -> Option<&str> {
    let credentials = value.to_str().ok()?.trim();
    match credentials.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => Some(key.trim()),
        Some(_) => None,
        None => Some(credentials),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(headers: &[(&'static str, &str)]) -> Option<String> {
        let pairs = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            let name: axum::http::HeaderName = name;
            map.append(name, value);
        }
        offered_key(&map).map(str::to_owned)
    }

    #[test]
    fn a_key_is_read_from_authorization_or_x_api_key() {
        for value in ["Bearer k", "bearer k", "BEARER  k ", "k"] {
            assert_eq!(offered(&[("authorization", value)]).as_deref(), Some("k"), "{value:?}");
        }
        assert_eq!(offered(&[("x-api-key", "k")]).as_deref(), Some("k"));
        let twice = [("authorization", "Bearer k"), ("x-api-key", "k")];
        assert_eq!(offered(&twice).as_deref(), Some("k"), "Continue.dev sends the key in both headers");
        for wrong in [
            &[("authorization", "Basic k")][..],
            &[("authorization", "Bearer k"), ("x-api-key", "other")],
            &[("authorization", "Basic k"), ("x-api-key", "k")],
            &[],
        ] {
            assert_eq!(offered(wrong), None, "{wrong:?}");
        }
    }
}
