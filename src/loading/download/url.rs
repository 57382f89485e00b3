//! URLs of the hub, redirects, and which of them may see the access token.

use ureq::http::Uri;

use super::error::HubError;
use super::names::Revision;

/// The URL of a file. Repository and file are safe names; the revision is percent-encoded.
pub(super) fn file_url(endpoint: &str, at: &Revision, revision: &str, file: &str) -> Result<Uri, HubError> {
    let revision = revision.replace('/', "%2F").replace('+', "%2B");
    let file = file.replace('+', "%2B");
    parse_http(&format!("{}/{}/resolve/{revision}/{file}", endpoint.trim_end_matches('/'), at.repository))
}

/// An absolute `http` or `https` URL.
pub(super) fn parse_http(text: &str) -> Result<Uri, HubError> {
    let uri = text.parse::<Uri>().ok();
    let is_http = |uri: &Uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some();
    uri.filter(is_http)
        .ok_or_else(|| HubError::InvalidResponse(format!("{text:?} is not an http or https URL; check HF_ENDPOINT")))
}

/// The target of a redirect.
///
/// # Errors
/// No `Location` header, a target that is not a URL, or one that leaves https for http.
pub(super) fn redirect_target(from: &Uri, location: Option<&str>) -> Result<Uri, HubError> {
    let location = location
        .map(str::trim)
        .filter(|location| !location.is_empty())
        .ok_or_else(|| HubError::InvalidResponse(format!("{} redirects without a location header", origin(from))))?;
    let scheme = from.scheme_str().unwrap_or_default();
    let authority = from.authority().map(|authority| authority.as_str()).unwrap_or_default();
    let is_scheme = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'));
    let target = if location.split_once("://").is_some_and(|(scheme, _)| is_scheme(scheme)) {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", from.path())
    } else {
        let folder = from.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    let target = parse_http(target.split('#').next().unwrap_or_default())?;
    if scheme == "https" && target.scheme_str() != Some("https") {
        return Err(HubError::InvalidResponse(format!(
            "{} redirects to the unencrypted {}; refused",
            origin(from),
            origin(&target)
        )));
    }
    Ok(target)
}

/// Whether two URLs have the same scheme, host and port (RFC 6454). The token goes to the endpoint's origin only.
pub(super) fn same_origin(a: &Uri, b: &Uri) -> bool {
    let key = |uri: &Uri| {
        let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
        (uri.scheme_str().map(str::to_owned), uri.host().map(str::to_ascii_lowercase), port)
    };
    key(a) == key(b)
}

/// Whether a request to the URL crosses a network without encryption.
pub(super) fn is_unencrypted_remote(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let is_loopback =
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    uri.scheme_str() == Some("http") && !is_loopback
}

/// Scheme and host for messages. The rest of a URL may carry a signature that gives access.
pub(super) fn origin(uri: &Uri) -> String {
    let port = uri.port_u16().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}://{}{port}", uri.scheme_str().unwrap_or_default(), uri.host().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn a_revision_with_slashes_is_one_path_segment() {
        let at = Revision { repository: "org/name".to_owned(), revision: "refs/pr/1".to_owned() };
        let url = file_url("https://hub.example/base/", &at, &at.revision, "config.json").unwrap();
        assert_eq!(url.to_string(), "https://hub.example/base/org/name/resolve/refs%2Fpr%2F1/config.json");
        assert!(file_url("hub.example", &at, "main", "x").is_err());
        assert!(file_url("file:///etc", &at, "main", "x").is_err());
    }

    // Finding J of docs/reliability.md: the token was sent to every host that the hub redirected to.
    #[test]
    fn the_origin_is_scheme_host_and_port() {
        let hub = uri("https://hub.example/x");
        for same in ["https://hub.example/y", "https://HUB.example:443/", "https://user@hub.example/"] {
            assert!(same_origin(&hub, &uri(same)), "{same}");
        }
        for other in [
            "http://hub.example/x",
            "https://hub.example:8443/x",
            "https://cdn.hub.example/x",
            "https://hub.example@evil.example/x",
            "https://hub.example.evil.example/x",
        ] {
            assert!(!same_origin(&hub, &uri(other)), "{other}");
        }
        assert!(!same_origin(&uri("http://127.0.0.1:80/"), &uri("http://127.0.0.2:80/")));
    }

    // Finding L11 of docs/reliability.md: the client panicked.
    #[test]
    fn redirects_resolve_against_the_request() {
        let from = uri("https://hub.example:8443/org/name/resolve/main/f?x=1");
        for (location, target) in [
            ("https://cdn.example/f?sig=1", "https://cdn.example/f?sig=1"),
            ("//cdn.example/f", "https://cdn.example/f"),
            ("/new/f", "https://hub.example:8443/new/f"),
            ("/new/f?from=https://x/", "https://hub.example:8443/new/f?from=https://x/"),
            ("?x=2", "https://hub.example:8443/org/name/resolve/main/f?x=2"),
            ("g#part", "https://hub.example:8443/org/name/resolve/main/g"),
        ] {
            assert_eq!(redirect_target(&from, Some(location)).unwrap(), uri(target));
        }
        for wrong in [None, Some(""), Some("http://cdn.example/f"), Some("file:///etc/passwd"), Some("//")] {
            assert!(redirect_target(&from, wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn http_is_unencrypted_unless_it_stays_on_this_machine() {
        for (url, expected) in [
            ("http://mirror.example/", true),
            ("https://mirror.example/", false),
            ("http://127.0.0.1:8000/", false),
            ("http://[::1]:8000/", false),
            ("http://localhost/", false),
            ("http://127.0.0.1.evil.example/", true),
        ] {
            assert_eq!(is_unencrypted_remote(&uri(url)), expected, "{url}");
        }
    }
}
