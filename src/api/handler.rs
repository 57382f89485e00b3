//! The handler of every rerank path: body -> dialect -> ranking -> dialect.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};

use super::App;
use super::dialect::{Dialect, ParsedRequest};
use super::observe::{RequestId, RequestStats};
use crate::error::RerankError;
use crate::rerank::{Ranking, rerank as rank};
use crate::scheduler::Deadline;

/// Ranks documents by their relevance to a query, in the caller's dialect.
pub(super) async fn rerank(State(app): State<Arc<App>>, request: Request) -> Response {
    let id = request.extensions().get::<RequestId>().map(|id| id.0.clone()).unwrap_or_default();
    let body = match app.bodies.read(request, &app.limits).await {
        Ok(body) => body,
        Err(error) => return error.into_response(),
    };
    let dialect = Dialect::of(&body.bytes);
    match answer(&app, dialect, &body.bytes, id).await {
        Ok(response) => response,
        Err(error) => dialect.refuse(error.into()),
    }
}

async fn answer(app: &App, dialect: Dialect, body: &[u8], id: String) -> Result<Response, RerankError> {
    let deadline = Deadline::after(app.limits.request_timeout_s);
    let ParsedRequest { mut request, write } = dialect.parse(body, app.limits.max_documents)?;
    request.deadline = Some(deadline);
    let documents = request.documents.len();
    let ranked = tokio::time::timeout_at(deadline.at.into(), rank(&app.models, request)).await;
    let ranking = ranked.unwrap_or(Err(RerankError::Deadline { seconds: deadline.seconds }))?;
    count(&ranking, documents);
    let mut response = write(&ranking, id);
    response.extensions_mut().insert(RequestStats { documents, tokens: ranking.tokens });
    add_headers(&mut response, &ranking);
    Ok(response)
}

/// Where the time went, and what was left out.
fn add_headers(response: &mut Response, ranking: &Ranking) {
    let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
    let (timings, truncation) = (ranking.timings, ranking.truncation);
    let timing = format!(
        "tokenise;dur={:.1}, queue;dur={:.1}, inference;dur={:.1}",
        ms(timings.tokenise),
        ms(timings.queue),
        ms(timings.inference)
    );
    let truncated = format!(
        "query={}, documents={}, chunks={}",
        u8::from(truncation.query),
        truncation.documents,
        truncation.chunks
    );
    for (name, value) in [("server-timing", timing), ("x-rerankd-truncated", truncated)] {
        response.headers_mut().insert(name, HeaderValue::from_str(&value).expect("digits and letters"));
    }
}

fn count(ranking: &Ranking, documents: usize) {
    metrics::counter!("rerankd_documents_total").increment(documents as u64);
    metrics::counter!("rerankd_queries_cut_total").increment(u64::from(ranking.truncation.query));
    metrics::counter!("rerankd_documents_cut_total").increment(ranking.truncation.documents as u64);
    metrics::counter!("rerankd_chunks_dropped_total").increment(ranking.truncation.chunks as u64);
}
