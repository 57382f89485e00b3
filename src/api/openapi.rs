//! The contract, generated from the types that implement it.

use axum::Json;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::{ops, rerank};

#[derive(OpenApi)]
#[openapi(
    info(title = "rerankd", description = "Ranks documents by their relevance to a query."),
    paths(rerank::rerank, ops::models, ops::model, ops::health, ops::ready, ops::metrics),
    modifiers(&Key)
)]
struct Contract;

struct Key;

impl Modify for Key {
    fn modify(&self, contract: &mut utoipa::openapi::OpenApi) {
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        contract.components.get_or_insert_default().add_security_scheme("key", SecurityScheme::Http(bearer));
    }
}

/// The OpenAPI document.
pub(super) async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Contract::openapi())
}
