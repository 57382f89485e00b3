//! The Host and Origin check of a server without keys: a page in the user's browser must not reach it under another name (DNS
//! rebinding) or from another site.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;

use super::{ApiError, App};

/// Hosts that requests may name beside this machine's own loopback names.
#[derive(Debug, Clone, Default)]
pub struct HostList(Vec<String>);

impl HostList {
    pub fn new(hosts: impl IntoIterator<Item = String>) -> Self {
        Self(hosts.into_iter().map(|host| host.to_ascii_lowercase()).collect())
    }

    /// Whether `host`, with or without a port, is localhost, a loopback address or on the list.
    fn allows(&self, host: &str) -> bool {
        let name = without_port(host).to_ascii_lowercase();
        let is_loopback = name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        name == "localhost" || is_loopback || self.0.iter().any(|allowed| *allowed == name)
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_names_and_listed_hosts_are_allowed() {
        let hosts = HostList::new(["Rerank.example".to_owned()]);
        for allowed in
            ["localhost", "LOCALHOST:8080", "127.0.0.1:80", "127.1.2.3", "[::1]:8080", "::1", "rerank.example:443"]
        {
            assert!(hosts.allows(allowed), "{allowed}");
        }
        for refused in ["evil.example", "localhost.evil.example", "10.0.0.1", "null", "", "[::2]:80", "127.0.0.1.evil"]
        {
            assert!(!hosts.allows(refused), "{refused}");
        }
    }
}
