//! The origins of web pages that may use the server from a browser (CORS).

use anyhow::{Result, ensure};
use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

/// Time for which a browser remembers the answer to a preflight request.
const MAX_AGE: std::time::Duration = std::time::Duration::from_secs(3600);

/// Allowed origins, as browsers send them: `https://app.example`, `http://localhost:3000`. Empty: no page of another origin.
#[derive(Debug, Clone, Default)]
pub struct Origins {
    listed: Vec<HeaderValue>,
    /// `*` is in the list.
    any: bool,
}

impl Origins {
    /// # Errors
    /// A text that is neither `*` nor a scheme and a host.
    pub fn new(origins: impl IntoIterator<Item = String>) -> Result<Self> {
        let mut all = Self::default();
        for origin in origins {
            if origin == "*" {
                all.any = true;
                continue;
            }
            let uri = origin.parse::<Uri>().ok().filter(|uri| uri.scheme().is_some() && uri.authority().is_some());
            let is_origin = uri.is_some_and(|uri| matches!(uri.path(), "" | "/") && uri.query().is_none());
            ensure!(
                is_origin && !origin.ends_with('/'),
                "{origin:?} is not an origin; write scheme and host as a browser does: https://app.example"
            );
            all.listed.push(HeaderValue::from_str(&origin.to_ascii_lowercase())?);
        }
        Ok(all)
    }

    /// Whether this origin or `*` is in the list.
    pub(super) fn allows(&self, origin: &HeaderValue) -> bool {
        self.any || self.listed.contains(origin)
    }

    /// Answers preflight requests and adds CORS headers to responses; `None` if no origin is allowed.
    pub(super) fn layer(&self) -> Option<CorsLayer> {
        let origin = match (self.any, self.listed.is_empty()) {
            (true, _) => AllowOrigin::any(),
            (false, true) => return None,
            (false, false) => AllowOrigin::list(self.listed.clone()),
        };
        let exposed = ["x-request-id", "server-timing", "x-rerankd-truncated", "x-rerankd-ignored"];
        let exposed = exposed.map(HeaderName::from_static).into_iter().chain([header::RETRY_AFTER]);
        let layer = CorsLayer::new().allow_origin(origin).allow_methods([Method::GET, Method::POST]);
        let layer = layer.allow_headers(AllowHeaders::mirror_request());
        Some(layer.expose_headers(exposed.collect::<Vec<_>>()).max_age(MAX_AGE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_has_a_scheme_and_a_host_and_no_path() {
        let new = |origin: &str| Origins::new([origin.to_owned()]);
        for origin in ["https://app.example", "HTTP://localhost:3000", "*", "chrome-extension://abcdef"] {
            assert!(new(origin).is_ok(), "{origin}");
        }
        for wrong in ["app.example", "https://app.example/", "https://app.example/page", "https://", "", "null"] {
            assert!(new(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_listed_origins_are_allowed() {
        let allows =
            |list: &str, origin| Origins::new([list.to_owned()]).unwrap().allows(&HeaderValue::from_static(origin));
        assert!(allows("https://App.example", "https://app.example"));
        assert!(!allows("https://app.example", "http://app.example"));
        assert!(!allows("https://app.example", "https://app.example:8443"));
        assert!(!allows("https://app.example", "https://app.example.evil"));
        assert!(allows("*", "null"));
        assert!(Origins::default().layer().is_none());
    }
}
