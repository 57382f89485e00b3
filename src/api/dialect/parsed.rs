//! A parsed body, the same type for every dialect.

use axum::response::Response;

use crate::rerank::{Ranking, RerankRequest};

/// The validated requests of a body, and the function that writes its response.
pub(in crate::api) struct ParsedRequest {
    /// One for each query: only [`Dialect::TextPairs`](super::Dialect::TextPairs) may have several.
    pub(in crate::api) requests: Vec<RerankRequest>,
    pub(in crate::api) write: WriteResponse,
}

impl ParsedRequest {
    pub(super) fn new(
        request: RerankRequest,
        write: impl FnOnce(&Ranking, String) -> Response + Send + 'static,
    ) -> Self {
        Self { requests: vec![request], write: Box::new(write) }
    }
}

/// Writes a response from the ranking and the request's id.
pub(in crate::api) type WriteResponse = Box<dyn FnOnce(&Ranking, String) -> Response + Send>;
