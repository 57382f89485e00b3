//! A parsed request, the same type for every dialect.

use axum::response::Response;

use crate::rerank::{Ranking, RerankRequest};

/// A validated request, and the function that writes its response.
pub(in crate::api) struct ParsedRequest {
    pub(in crate::api) request: RerankRequest,
    pub(in crate::api) write: WriteResponse,
}

/// Writes a response from the ranking and the request's id.
pub(in crate::api) type WriteResponse = Box<dyn FnOnce(&Ranking, String) -> Response + Send>;
