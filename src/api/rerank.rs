//! The handler: body -> dialect -> ranking -> dialect.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};

use super::dialect::documents::{self, RerankBody};
use super::observe::{Facts, RequestId};
use super::{ApiError, App};
use crate::error::RerankError;
use crate::rerank::{Ranking, rerank as rank};
use crate::scheduler::Deadline;

/// Ranks documents by their relevance to a query.
#[utoipa::path(
    post,
    path = "/v1/rerank",
    request_body = RerankBody,
    responses(
        (status = 200, description = "The documents, best first", body = documents::RerankAnswer),
        (status = 400, description = "A field is wrong (code 20015), or the model unknown (20012)", body = super::error::ErrorBody),
        (status = 401, description = "No key, or a wrong one", body = super::error::ErrorBody),
        (status = 408, description = "The body did not arrive in time", body = super::error::ErrorBody),
        (status = 413, description = "The body, or the work it asks for, is over the limit", body = super::error::ErrorBody),
        (status = 415, description = "A compressed body", body = super::error::ErrorBody),
        (status = 500, description = "A fault of the server's", body = super::error::ErrorBody),
        (status = 503, description = "Too much is waiting (code 50505); see Retry-After", body = super::error::ErrorBody),
        (status = 504, description = "The deadline passed first", body = super::error::ErrorBody),
    ),
    security(("key" = []))
)]
pub(super) async fn rerank(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let id = request.extensions().get::<RequestId>().cloned();
    let body = app.bodies.read(request, &app.limits).await?;
    let deadline = Deadline::after(app.limits.request_deadline_s);
    let parsed = documents::parse(&body.bytes, app.limits.max_documents)?;
    let return_documents = parsed.return_documents;
    let mut request = parsed.request;
    request.deadline = Some(deadline);
    let texts = Arc::clone(&request.documents);
    let ranked = tokio::time::timeout_at(deadline.at.into(), rank(&app.models, request)).await;
    let ranking = ranked.unwrap_or(Err(RerankError::Deadline { seconds: deadline.seconds }))?;
    count(&ranking, texts.len());
    let answer = documents::answer(&ranking, id.map(|id| id.0), return_documents.then_some(&texts));
    let mut response = Json(answer).into_response();
    response.extensions_mut().insert(Facts { documents: texts.len(), tokens: ranking.tokens });
    add_headers(&mut response, &ranking);
    Ok(response)
}

/// Where the time went, and what was left out.
fn add_headers(response: &mut Response, ranking: &Ranking) {
    let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
    let (timings, cut) = (ranking.timings, ranking.cut);
    let timing = format!(
        "tokenise;dur={:.1}, queue;dur={:.1}, inference;dur={:.1}",
        ms(timings.tokenise),
        ms(timings.queue),
        ms(timings.inference)
    );
    let truncated = format!("query={}, documents={}, chunks={}", u8::from(cut.query), cut.documents, cut.chunks);
    for (name, value) in [("server-timing", timing), ("x-rerankd-truncated", truncated)] {
        response.headers_mut().insert(name, HeaderValue::from_str(&value).expect("digits and letters"));
    }
}

fn count(ranking: &Ranking, documents: usize) {
    metrics::counter!("rerankd_documents_total").increment(documents as u64);
    metrics::counter!("rerankd_queries_cut_total").increment(u64::from(ranking.cut.query));
    metrics::counter!("rerankd_documents_cut_total").increment(ranking.cut.documents as u64);
    metrics::counter!("rerankd_chunks_dropped_total").increment(ranking.cut.chunks as u64);
}
