//! Requests to the hub: timeouts, redirects, the access token, and errors by status.

use std::io::Read;

use ureq::http::{HeaderMap, Method, Request, Response, StatusCode, Uri, header};
use ureq::{Agent, Body};

use super::error::HubError;
use super::names::{Commit, Revision};
use super::options::{HubOptions, NetworkPolicy};
use super::response::{ContentHeaders, FileHeaders, FileMetadata};
use super::retry::parse_retry_after;
use super::url;
use crate::secret::Secret;
use crate::tls;

const MAX_REDIRECTS: usize = 10;

/// A connection pool to one hub.
#[derive(Debug, Clone)]
pub(super) struct HttpClient {
    agent: Agent,
    endpoint: String,
    token: Option<Secret>,
}

/// A response with the content of a file, or a part of it.
pub(super) struct ResponseContent {
    pub(super) headers: ContentHeaders,
    pub(super) body: Box<dyn Read>,
}

/// The part of a file to request.
#[derive(Debug, Clone, Copy)]
pub(super) struct ContentRange<'a> {
    /// First byte. 0 requests the whole file.
    pub(super) offset: u64,
    /// Strong entity tag of the bytes before `offset`, if it is known.
    pub(super) if_range: Option<&'a str>,
}

impl HttpClient {
    /// Contacts nothing yet. A proxy comes from `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`.
    ///
    /// # Errors
    /// The endpoint is not an http or https URL.
    pub(super) fn new(options: &HubOptions, policy: &NetworkPolicy) -> Result<Self, HubError> {
        let endpoint = url::parse_http(&options.endpoint)?;
        if options.token.is_some() && url::is_unencrypted_remote(&endpoint) {
            tracing::warn!(
                "the access token is sent to {} without encryption; set HF_ENDPOINT to an https URL",
                url::origin(&endpoint)
            );
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(policy.connect_timeout))
            .timeout_connect(Some(policy.connect_timeout))
            .timeout_send_request(Some(policy.read_timeout))
            .timeout_recv_response(Some(policy.read_timeout))
            .timeout_per_read(Some(policy.read_timeout))
            .user_agent(concat!("rerankd/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .tls_config(tls::client_config())
            .build()
            .new_agent();
        Ok(Self { agent, endpoint: options.endpoint.clone(), token: options.token.clone() })
    }

    /// What the hub says about a file of `at.repository` at `revision`: `at.revision`, or the commit that it was resolved to.
    /// `None` if the repository does not have the file.
    ///
    /// # Errors
    /// No connection, no access, an unusable response, or no such repository or revision. A 404 that does not say which of these is
    /// missing counts as a missing file.
    pub(super) fn metadata(&self, at: &Revision, revision: &str, file: &str) -> Result<Option<FileMetadata>, HubError> {
        let mut uri = url::file_url(&self.endpoint, at, revision, file)?;
        let mut found = FileHeaders::default();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(Method::HEAD, &uri, None)?;
            let status = response.status();
            let headers = response.headers();
            if status == StatusCode::NOT_FOUND {
                return match text(headers, "x-error-code").as_deref() {
                    Some("RevisionNotFound" | "RepoNotFound") => {
                        Err(HubError::NotFound(format!("{} has no {at}", url::origin(&uri))))
                    }
                    _ => Ok(None),
                };
            }
            self.check_status(&uri, &response, at)?;
            found.commit = found.commit.or_else(|| text(headers, "x-repo-commit"));
            found.etag = found.etag.or_else(|| text(headers, "x-linked-etag"));
            found.size = found.size.or_else(|| number(headers, "x-linked-size"));
            // Storage services often allow GET only, so a redirect is not followed once the entity tag is known.
            if status.is_redirection() && found.etag.is_none() {
                uri = url::redirect_target(&uri, text(headers, "location").as_deref())?;
                continue;
            }
            if !status.is_redirection() {
                found.etag = found.etag.or_else(|| text(headers, "etag"));
                found.size = found.size.or_else(|| number(headers, "content-length"));
            }
            return found.check(Commit::parse(revision).as_ref()).map(Some);
        }
        Err(too_many_redirects(&uri))
    }

    /// The content of a file at a commit.
    ///
    /// # Errors
    /// No connection, no access, or a status that is neither 200, 206 nor 416.
    pub(super) fn content(
        &self,
        at: &Revision,
        commit: &Commit,
        file: &str,
        range: ContentRange<'_>,
    ) -> Result<ResponseContent, HubError> {
        let mut uri = url::file_url(&self.endpoint, at, commit.as_str(), file)?;
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(Method::GET, &uri, Some(range))?;
            let headers = response.headers();
            if response.status().is_redirection() {
                uri = url::redirect_target(&uri, text(headers, "location").as_deref())?;
                continue;
            }
            if response.status() != StatusCode::RANGE_NOT_SATISFIABLE {
                self.check_status(&uri, &response, at)?;
            }
            let headers = ContentHeaders {
                status: response.status().as_u16(),
                content_length: number(headers, "content-length"),
                content_range: text(headers, "content-range"),
                etag: text(headers, "etag"),
            };
            return Ok(ResponseContent { headers, body: Box::new(response.into_body().into_reader()) });
        }
        Err(too_many_redirects(&uri))
    }

    /// One request without redirects. The token is added for the endpoint's own origin only.
    fn send(&self, method: Method, uri: &Uri, range: Option<ContentRange<'_>>) -> Result<Response<Body>, HubError> {
        let mut request = Request::builder().method(method).uri(uri);
        if let Some(token) = &self.token
            && self.is_own_origin(uri)
        {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.reveal()));
        }
        if let Some(range) = range.filter(|range| range.offset > 0) {
            request = request.header(header::RANGE, format!("bytes={}-", range.offset));
            if let Some(etag) = range.if_range {
                request = request.header(header::IF_RANGE, etag);
            }
        }
        let request = request.body(()).map_err(|_| {
            HubError::InvalidResponse("the access token has characters that are not allowed in a header".to_owned())
        })?;
        self.agent.run(request).map_err(|error| request_error(uri, &error))
    }

    fn is_own_origin(&self, uri: &Uri) -> bool {
        url::parse_http(&self.endpoint).is_ok_and(|endpoint| url::same_origin(uri, &endpoint))
    }

    /// Ok for a success or a redirect, otherwise the status as an error.
    fn check_status(&self, uri: &Uri, response: &Response<Body>, at: &Revision) -> Result<(), HubError> {
        let status = response.status();
        let message = format!("{} answered {status} for {at}", url::origin(uri));
        match status.as_u16() {
            200 | 206 | 301 | 302 | 303 | 307 | 308 => Ok(()),
            // A signed URL of a storage service may have expired: the next attempt gets a new one from the hub.
            401 | 403 if !self.is_own_origin(uri) => Err(HubError::unavailable(message)),
            401 | 403 => Err(HubError::AccessDenied(format!(
                "{message}. Check the name. If the repository is private or gated, accept its terms on its page and set HF_TOKEN to a token with read access"
            ))),
            404 => Err(HubError::NotFound(message)),
            408 | 425 | 429 | 500..=599 => Err(HubError::Unavailable {
                reason: message,
                retry_after: text(response.headers(), "retry-after").as_deref().and_then(parse_retry_after),
            }),
            _ => Err(HubError::InvalidResponse(message)),
        }
    }
}

fn request_error(uri: &Uri, error: &ureq::Error) -> HubError {
    let message = format!("{}: {error}{}", url::origin(uri), tls::hint(error));
    match error {
        ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => {
            HubError::InvalidResponse(message)
        }
        _ => HubError::unavailable(message),
    }
}

fn too_many_redirects(uri: &Uri) -> HubError {
    HubError::InvalidResponse(format!("more than {MAX_REDIRECTS} redirects, the last one from {}", url::origin(uri)))
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    text(headers, name)?.trim().parse().ok()
}
