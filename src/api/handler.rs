//! The handler of every rerank path: reads the body, parses it in its dialect, ranks, writes the response in that dialect.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};

use super::body::{ReadBody, hold_until_written};
use super::dialect::{Dialect, ParsedRequest};
use super::observe::{RequestId, RequestStats};
use super::state::App;
use crate::background;
use crate::client::Client;
use crate::error::RerankError;
use crate::failpoint::failpoint;
use crate::rerank::{Ranking, rank_all};
use crate::scheduler::Deadline;

/// Bodies of more bytes are parsed on background threads, and their responses are serialized there.
const LARGE_BYTES: usize = 64 * 1024;

/// Ranks documents by their relevance to a query.
pub(super) async fn rerank(State(app): State<Arc<App>>, request: Request) -> Response {
    failpoint!("request-handler");
    let id = request.extensions().get::<RequestId>().map(|id| id.0.clone()).unwrap_or_default();
    let client = request.extensions().get::<Client>().cloned().unwrap_or_default();
    let (parts, body) = request.into_parts();
    let ReadBody { bytes, share } = match app.memory.read(&client, &parts.headers, body, &app.limits).await {
        Ok(body) => body,
        Err(error) => return error.for_path(parts.uri.path()).into_response(),
    };
    let (response, dialect) = answer(&app, client, bytes, id).await;
    let response = match response {
        Ok(response) => hold_until_written(share, response).await,
        Err(error) => Err(error.into()),
    };
    response.unwrap_or_else(|error| dialect.error(error))
}

async fn answer(app: &App, client: Client, body: Vec<u8>, id: String) -> (Result<Response, RerankError>, Dialect) {
    let deadline = Deadline::after(app.limits.request_timeout_s);
    let (is_large, max_documents) = (body.len() > LARGE_BYTES, app.limits.max_documents);
    let parse = move || Dialect::parse_body(&body, max_documents);
    let (dialect, parsed) = match background::run_if(is_large, parse).await {
        Ok(parsed) => parsed,
        Err(error) => return (Err(error), Dialect::Documents),
    };
    let ranked = async {
        let ParsedRequest { mut requests, write } = parsed?;
        for request in &mut requests {
            (request.client, request.deadline) = (client.clone(), Some(deadline));
        }
        let documents = requests.iter().map(|request| request.documents.len()).sum();
        // From here on the request keeps its model, and no other, even if the set of models is replaced.
        let name = requests.first().and_then(|request| request.model.as_deref());
        let model = Arc::clone(app.models()?.choose(name)?);
        let ranked = tokio::time::timeout_at(deadline.at.into(), rank_all(&model, requests)).await;
        let ranking = ranked.unwrap_or(Err(RerankError::Deadline { seconds: deadline.seconds }))?;
        count(&ranking, documents);
        let stats = RequestStats { documents, tokens: ranking.tokens };
        let mut response = background::run_if(is_large, move || {
            let mut response = write(&ranking, id);
            add_headers(&mut response, &ranking);
            response
        })
        .await?;
        response.extensions_mut().insert(stats);
        Ok(response)
    };
    (ranked.await, dialect)
}

/// Adds `server-timing`, in ms, and `x-rerankd-truncated`.
fn add_headers(response: &mut Response, ranking: &Ranking) {
    let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
    let (timings, truncation) = (ranking.timings, ranking.truncation);
    let timing = format!(
        "tokenize;dur={:.1}, queue;dur={:.1}, inference;dur={:.1}",
        ms(timings.tokenize),
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
    metrics::counter!("rerankd_queries_truncated_total").increment(u64::from(ranking.truncation.query));
    metrics::counter!("rerankd_documents_truncated_total").increment(ranking.truncation.documents as u64);
    metrics::counter!("rerankd_chunks_dropped_total").increment(ranking.truncation.chunks as u64);
    metrics::histogram!("rerankd_tokenize_seconds").record(ranking.timings.tokenize.as_secs_f64());
    metrics::histogram!("rerankd_queue_seconds").record(ranking.timings.queue.as_secs_f64());
}
