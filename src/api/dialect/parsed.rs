//! What every dialect makes of a body.

use axum::response::Response;

use crate::rerank::{Ranking, RerankRequest};

/// A checked request, and how its answer is written.
pub(in crate::api) struct ParsedRequest {
    pub(in crate::api) request: RerankRequest,
    pub(in crate::api) write: Write,
}

/// Writes an answer from the ranking and the request's id.
pub(in crate::api) type Write = Box<dyn FnOnce(&Ranking, String) -> Response + Send>;
