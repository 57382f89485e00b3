//! Ranking one request: text to pairs, pairs to logits, logits to a ranking.

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};

use crate::client::Client;
use crate::error::RerankError;
use crate::scheduler::{Deadline, Scores};
use crate::score::ScoreMap;
use crate::served::{Model, Models};
use crate::text::{Chunk, DocumentOptions, EncodedRequest, Truncation};

/// A validated request.
#[derive(Debug, Clone)]
pub struct RerankRequest {
    /// Who sends it.
    pub client: Client,
    /// A served model's name or alias; `None` is the first model.
    pub model: Option<String>,
    /// Not empty.
    pub query: String,
    /// At least one.
    pub documents: Arc<[String]>,
    /// Number of results; `None` is all.
    pub top_n: Option<usize>,
    /// How documents are split into chunks.
    pub options: DocumentOptions,
    /// When the request is answered with an error if it has no result yet; `None` is never.
    pub deadline: Option<Deadline>,
}

impl RerankRequest {
    /// A request to the first model, with the default options and without a deadline.
    pub fn new(query: String, documents: Arc<[String]>) -> Self {
        Self {
            client: Client::default(),
            model: None,
            query,
            documents,
            top_n: None,
            options: DocumentOptions::default(),
            deadline: None,
        }
    }
}

/// The ranked documents.
#[derive(Debug)]
pub struct Ranking {
    /// The served model's name.
    pub model: String,
    /// Best first, ties in the request's order; at most `top_n`.
    pub results: Vec<Ranked>,
    /// Tokens of all distinct pairs of query and chunk, whether they were scored now or before.
    pub tokens: usize,
    /// Chunks that needed no computation, because the request has another pair with the same tokens.
    pub duplicates: usize,
    /// Batches that contained pairs of the request.
    pub batches: usize,
    /// Which parts of the texts the model did not read.
    pub truncation: Truncation,
    /// Time by stage.
    pub timings: Timings,
}

/// One document of a ranking.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranked {
    /// Position in the request.
    pub index: usize,
    /// The model's score map of `logit`, in [0, 1].
    pub score: f64,
    /// The model's output for its best chunk.
    pub logit: f32,
    /// Its chunks in the text's order; empty if [`DocumentOptions::spans`] is false.
    pub chunks: Vec<RankedChunk>,
}

impl Ranked {
    /// The first of the chunks with the highest logit.
    pub fn best_chunk(&self) -> Option<&RankedChunk> {
        self.chunks.iter().find(|chunk| chunk.logit == self.logit)
    }
}

/// One chunk of a ranked document.
#[derive(Debug, Clone, PartialEq)]
pub struct RankedChunk {
    /// See [`Chunk::span`].
    pub span: Range<usize>,
    /// The model's score map of `logit`, in [0, 1].
    pub score: f64,
    /// The model's output.
    pub logit: f32,
}

/// A request's time by stage.
#[derive(Debug, Default, Clone, Copy)]
pub struct Timings {
    /// Waiting for the tokenizer, tokenizing, chunking, and merging identical pairs.
    pub tokenize: Duration,
    /// Waiting in the queue until the first batch.
    pub queue: Duration,
    /// From the start of the first batch to the end of the last.
    pub inference: Duration,
}

/// Scores every document against the query, best first.
///
/// # Errors
/// See [`RerankError`].
pub async fn rerank(models: &Models, request: RerankRequest) -> Result<Ranking, RerankError> {
    let model = models.choose(request.model.as_deref())?;
    rank_all(model, vec![request]).await
}

/// Ranks the documents of several queries as one request: tokenized, admitted and scored together, and limited together. Client,
/// `top_n`, options and deadline are those of the first query. In the result, a document's index counts the documents of the
/// queries before its own.
///
/// # Errors
/// See [`RerankError`].
pub async fn rank_all(model: &Model, queries: Vec<RerankRequest>) -> Result<Ranking, RerankError> {
    let first = queries.first().ok_or_else(|| RerankError::invalid("query", "is missing"))?;
    let (client, options, top_n, deadline) = (&first.client, first.options, first.top_n, first.deadline);
    model.scheduler.has_room(client.id)?;
    let start = Instant::now();
    let encode = |query: &RerankRequest| {
        let (text, documents) = (query.query.clone(), Arc::clone(&query.documents));
        async move { model.text.encode(client.id, &text, documents, options).await }
    };
    let mut encoding = pin!(stream::iter(queries.iter().map(encode)).buffered(model.text.threads().max(1)));
    let mut encoded = EncodedRequest::default();
    let mut tokens = 0;
    while let Some(query) = encoding.next().await {
        let query = query?;
        tokens += query.tokens();
        model.text.check_tokens(tokens)?;
        encoded.append(query);
    }
    let tokenize = start.elapsed();
    let duplicates = encoded.duplicates();
    let EncodedRequest { pairs, documents, truncation } = encoded;
    let scores = model.score(client, pairs, deadline).await?;
    let mut results = best_first(&scores, model.score_map, &documents, top_n);
    if options.spans {
        for ranked in &mut results {
            ranked.chunks = ranked_chunks(&scores, model.score_map, &documents[ranked.index]);
        }
    }
    let timings = Timings { tokenize, queue: scores.queued, inference: scores.computed };
    let (model, batches) = (model.name.clone(), scores.batches);
    Ok(Ranking { model, results, tokens, duplicates, batches, truncation, timings })
}

/// Each document's best chunk, sorted by logit descending, then index, truncated to `top_n`. The sigmoid saturates at 1 for
/// logits above 36, so it cannot order them.
fn best_first(scores: &Scores, map: ScoreMap, documents: &[Vec<Chunk>], top_n: Option<usize>) -> Vec<Ranked> {
    let ranked = |(index, chunks): (usize, &Vec<Chunk>)| {
        let logit = chunks.iter().map(|chunk| scores.logits[chunk.pair]).fold(f32::NEG_INFINITY, f32::max);
        Ranked { index, score: map.score(logit), logit, chunks: Vec::new() }
    };
    let mut results: Vec<Ranked> = documents.iter().enumerate().map(ranked).collect();
    results.sort_by(|a, b| b.logit.total_cmp(&a.logit).then(a.index.cmp(&b.index)));
    results.truncate(top_n.unwrap_or(usize::MAX));
    results
}

fn ranked_chunks(scores: &Scores, map: ScoreMap, chunks: &[Chunk]) -> Vec<RankedChunk> {
    let ranked = |chunk: &Chunk| {
        let logit = scores.logits[chunk.pair];
        RankedChunk { span: chunk.span.clone(), score: map.score(logit), logit }
    };
    chunks.iter().map(ranked).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_chunk_wins_and_ties_keep_the_order() {
        let scores =
            Scores { logits: vec![0.5, 2.0, -1.0, 2.0], queued: Duration::ZERO, computed: Duration::ZERO, batches: 1 };
        let chunks = |pairs: &[usize]| pairs.iter().map(|&pair| Chunk { pair, span: 0..0 }).collect();
        let documents = [chunks(&[2]), chunks(&[0, 1]), chunks(&[3]), chunks(&[2, 0])];
        let order = |top_n| {
            best_first(&scores, ScoreMap::default(), &documents, top_n).iter().map(|r| r.index).collect::<Vec<_>>()
        };
        assert_eq!(order(None), [1, 2, 3, 0]);
        assert_eq!(order(Some(2)), [1, 2]);
        assert_eq!(order(Some(99)), [1, 2, 3, 0]);
    }
}
