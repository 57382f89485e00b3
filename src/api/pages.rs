//! Static pages in the binary: the playground at `/`, the reference at `/docs`, and their files at `/assets/`.

use std::fmt::Write as _;
use std::future::ready;
use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use sha2::{Digest, Sha256};

use super::state::App;

/// Path, content type and content.
const PAGES: [(&str, &str, &str); 7] = [
    ("/", HTML, include_str!("../../assets/playground.html")),
    ("/docs", HTML, include_str!("../../assets/reference.html")),
    ("/assets/style.css", "text/css; charset=utf-8", include_str!("../../assets/style.css")),
    ("/assets/common.js", JAVASCRIPT, include_str!("../../assets/common.js")),
    ("/assets/playground.js", JAVASCRIPT, include_str!("../../assets/playground.js")),
    ("/assets/reference.js", JAVASCRIPT, include_str!("../../assets/reference.js")),
    ("/assets/example.txt", "text/plain; charset=utf-8", include_str!("../../assets/example.txt")),
];

const HTML: &str = "text/html; charset=utf-8";
const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

/// Only scripts and styles of this server, and requests to it; no frames, and no forms that are sent anywhere.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
     img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The routes of all pages. They need no key, because they contain no data of this server.
pub(super) fn routes() -> Router<Arc<App>> {
    // Addresses in the pages are relative, because a proxy may add a path prefix. Below `/docs/` they would be wrong.
    let router = Router::new().route("/docs/", get(|| async { Redirect::permanent("../docs") }));
    PAGES.into_iter().fold(router, |router, (path, content_type, content)| {
        let etag = etag(content);
        router.route(path, get(move |headers: HeaderMap| ready(page(content_type, content, &etag, &headers))))
    })
}

/// The page, or 304 if the client has it.
fn page(content_type: &'static str, content: &'static str, etag: &HeaderValue, request: &HeaderMap) -> Response {
    // Proxies that compress make the tag a weak one.
    let known = request.get(header::IF_NONE_MATCH).map_or(&b""[..], HeaderValue::as_bytes);
    let is_known = known.strip_prefix(b"W/").unwrap_or(known) == etag.as_bytes();
    let headers = [
        (header::ETAG, etag.clone()),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(CONTENT_SECURITY_POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    ];
    if is_known {
        return (StatusCode::NOT_MODIFIED, headers).into_response();
    }
    (headers, [(header::CONTENT_TYPE, content_type)], content).into_response()
}

/// The first half of the content's SHA-256, in quotes.
fn etag(content: &str) -> HeaderValue {
    let digest = Sha256::digest(content);
    let mut etag = String::from("\"");
    for byte in &digest[..16] {
        write!(etag, "{byte:02x}").expect("writing to a string succeeds");
    }
    etag.push('"');
    HeaderValue::from_str(&etag).expect("hexadecimal digits")
}
