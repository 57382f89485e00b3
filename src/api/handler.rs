//! The handler of every rerank path: reads the body, parses it in its dialect, ranks, writes the response in that dialect.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};

use super::body::{ReadBody, hold_until_written};
use super::dialect::{Dialect, ParsedRequest};
use super::observe::{RequestContext, RequestStats};
use super::state::App;
use crate::background;
use crate::client::Client;
use crate::error::RerankError;
use crate::failpoint::failpoint;
use crate::rerank::{Ranking, Timings, rank_all};
use crate::scheduler::Deadline;
use crate::telemetry::metrics;
use crate::telemetry::traces::{KeyValue, RequestTrace};

/// Bodies of more bytes are parsed on background threads, and their responses are serialized there.
const LARGE_BYTES: usize = 64 * 1024;

/// Ranks documents by their relevance to a query.
pub(super) async fn rerank(State(app): State<Arc<App>>, request: Request) -> Response {
    failpoint!("request-handler");
    let context = request.extensions().get::<Arc<RequestContext>>().cloned().unwrap_or_default();
    let client = request.extensions().get::<Client>().cloned().unwrap_or_default();
    let (parts, body) = request.into_parts();
    let begun = Instant::now();
    let ReadBody { bytes, share } = match app.memory.read(&client, &parts.headers, body, &app.limits).await {
        Ok(body) => body,
        Err(error) => return error.for_path(parts.uri.path()).into_response(),
    };
    let size = KeyValue::new("http.request.body.size", bytes.len() as i64);
    context.trace.stage("read body", begun, Instant::now(), [size]);
    let (response, dialect) = answer(&app, client, bytes, &context).await;
    let response = match response {
        Ok(response) => hold_until_written(share, response).await,
        Err(error) => Err(error.into()),
    };
    response.unwrap_or_else(|error| dialect.error(error))
}

async fn answer(
    app: &App,
    client: Client,
    body: Vec<u8>,
    context: &RequestContext,
) -> (Result<Response, RerankError>, Dialect) {
    let deadline = Deadline::after(app.limits.request_timeout_s);
    let (is_large, max_documents) = (body.len() > LARGE_BYTES, app.limits.max_documents);
    let parse = move || Dialect::parse_body(&body, max_documents);
    let begun = Instant::now();
    let (dialect, parsed) = match background::run_if(is_large, parse).await {
        Ok(parsed) => parsed,
        Err(error) => return (Err(error), Dialect::Documents),
    };
    context.trace.stage("parse", begun, Instant::now(), []);
    let ranked = async {
        let ParsedRequest { mut requests, write } = parsed?;
        for request in &mut requests {
            (request.client, request.deadline) = (client.clone(), Some(deadline));
        }
        let documents = requests.iter().map(|request| request.documents.len()).sum();
        // From here on the request keeps its model, and no other, even if the set of models is replaced.
        let name = requests.first().and_then(|request| request.model.as_deref());
        let model = Arc::clone(app.models()?.choose(name)?);
        context.model.set(model.name.clone()).ok();
        let begun = Instant::now();
        let ranked = tokio::time::timeout_at(deadline.at.into(), rank_all(&model, requests)).await;
        let ranked = ranked.unwrap_or(Err(RerankError::Deadline { seconds: deadline.seconds }));
        trace_stages(&context.trace, begun, &ranked);
        let ranking = ranked?;
        count(&ranking, documents, client.key_name.as_deref());
        let id = context.id.clone();
        let stats = RequestStats { documents, tokens: ranking.tokens };
        let begun = Instant::now();
        let mut response = background::run_if(is_large, move || {
            let mut response = write(&ranking, id);
            add_headers(&mut response, &ranking);
            response
        })
        .await?;
        context.trace.stage("serialize", begun, Instant::now(), []);
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

/// Records the stages of a ranking that began at `begun`, or how long it took to fail.
fn trace_stages(trace: &RequestTrace, begun: Instant, ranked: &Result<Ranking, RerankError>) {
    let ranking = match ranked {
        Ok(ranking) => ranking,
        Err(error) => return trace.stage("rank", begun, Instant::now(), [KeyValue::new("error.type", error.cause())]),
    };
    let Timings { tokenize, queue, inference } = ranking.timings;
    let number = |name: &'static str, value: usize| KeyValue::new(name, value as i64);
    let queued = begun + tokenize;
    let started = queued + queue;
    trace.stage("tokenize", begun, queued, [number("rerankd.tokens_dropped", ranking.truncation.tokens)]);
    trace.stage("queue", queued, started, []);
    let work = [number("rerankd.tokens", ranking.tokens), number("rerankd.batches", ranking.batches)];
    trace.stage("compute", started, started + inference, work);
}

fn count(ranking: &Ranking, documents: usize, key: Option<&str>) {
    let model = || [ranking.model.clone()];
    let truncation = ranking.truncation;
    for (metric, count) in [
        (metrics::DOCUMENTS, documents),
        (metrics::DUPLICATE_PAIRS, ranking.duplicates),
        (metrics::QUERIES_TRUNCATED, usize::from(truncation.query)),
        (metrics::DOCUMENTS_TRUNCATED, truncation.documents),
        (metrics::CHUNKS_DROPPED, truncation.chunks),
        (metrics::TOKENS_DROPPED, truncation.tokens),
    ] {
        metric.counter(model()).increment(count as u64);
    }
    metrics::REQUEST_TOKENS.histogram(model()).record(ranking.tokens as f64);
    for (metric, time) in [
        (metrics::TOKENIZE_SECONDS, ranking.timings.tokenize),
        (metrics::QUEUE_SECONDS, ranking.timings.queue),
        (metrics::COMPUTE_SECONDS, ranking.timings.inference),
    ] {
        metric.histogram(model()).record(time.as_secs_f64());
    }
    if let Some(key) = key {
        metrics::KEY_TOKENS.counter([key, &ranking.model].map(str::to_owned)).increment(ranking.tokens as u64);
    }
}
