//! Keys: who may ask. Checked on the header, before a byte of the body is read.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::{ApiError, App};

/// The keys that open the server, as digests; none at all means open to everyone.
#[derive(Clone, Default)]
pub struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// Takes the keys; empty ones are left out.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        Self(keys.into_iter().map(str::trim).filter(|key| !key.is_empty()).map(digest).collect())
    }

    /// Whether requests need no key.
    pub fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// Compares digests, every one of them, in constant time.
    fn contains(&self, key: &str) -> bool {
        let offered = digest(key);
        let hit = self.0.iter().fold(Choice::from(0), |hit, known| hit | known.ct_eq(&offered));
        hit.into()
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// Lets a request pass when the server is open or the request carries one of its keys.
pub(super) async fn require_key(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let allowed = app.keys.is_open() || offered_key(request.headers()).is_some_and(|key| app.keys.contains(key));
    if allowed { Ok(next.run(request).await) } else { Err(ApiError::unauthorized()) }
}

/// The one key that the headers offer: `Authorization: Bearer KEY`, the key alone in that header, or `x-api-key`.
fn offered_key(headers: &HeaderMap) -> Option<&str> {
    let mut offers = headers.get_all(header::AUTHORIZATION).iter().chain(headers.get_all("x-api-key"));
    let offer = offers.next()?.to_str().ok()?.trim();
    if offers.next().is_some() {
        return None; // which one would count is anybody's guess
    }
    match offer.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => Some(key.trim()),
        Some(_) => None,
        None => Some(offer),
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
    fn keys_are_found_where_clients_put_them() {
        for value in ["Bearer k", "bearer k", "BEARER  k ", "k"] {
            assert_eq!(offered(&[("authorization", value)]).as_deref(), Some("k"), "{value:?}");
        }
        assert_eq!(offered(&[("x-api-key", "k")]).as_deref(), Some("k"));
        for wrong in [&[("authorization", "Basic k")][..], &[("authorization", "k"), ("authorization", "k")], &[]] {
            assert_eq!(offered(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn only_whole_keys_match() {
        let keys = Keys::new(["secret", " ", ""]);
        assert!(!keys.is_open() && keys.contains("secret"));
        for wrong in ["", "secre", "secret2", "Secret"] {
            assert!(!keys.contains(wrong), "{wrong:?}");
        }
    }
}
