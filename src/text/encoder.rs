//! A model's tokenizer and pair template: turns a request into pairs of token ids.
//!
//! Tokenization runs in units of at most some tens of KiB, so that requests take turns. Large requests are tokenized on threads
//! of low priority. A request is admitted by its bytes before it is tokenized, and each document is tokenized only as far as its
//! chunks reach.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use futures_util::{StreamExt, stream};
use tokenizers::Tokenizer;
use tokio::sync::Semaphore;

use super::chunk::{Chunking, Tail};
use super::slice::{self, SLICE_CHARS};
use super::template::{self, EmbeddingRows, PairTemplate};
use crate::admission::{Admission, AdmissionLimits, Resource};
use crate::background;
use crate::batch::Pair;
use crate::client::ClientId;
use crate::error::RerankError;
use crate::failpoint::failpoint;
use crate::telemetry::metrics;

/// Minimum window in tokens, special tokens included. The rest of the window must hold a query and a document.
const MIN_WINDOW: usize = 16;

/// Requests with at most this many bytes to tokenize are kept apart from larger ones, see [`SizeClass`].
const SMALL_REQUEST_BYTES: usize = 64 * 1024;

/// Assumed maximum bytes per token, for estimating the cost of a document that is tokenized in part.
const MAX_BYTES_PER_TOKEN: usize = 16;

/// Maximum bytes that are admitted to the tokenizer, whatever its speed.
const MAX_TOKENIZER_BYTES: usize = 256 << 20;

/// Default maximum of chunks per document.
pub const DEFAULT_MAX_CHUNKS: usize = 1024;

/// Maximum and default of the tokens that adjacent chunks have in common.
pub const MAX_OVERLAP_TOKENS: usize = 80;

/// Limits on the text of a request.
#[derive(Debug, Clone, Copy)]
pub struct TextLimits {
    /// Maximum tokens of the query; `None` is half of the window without the special tokens.
    pub max_query_tokens: Option<usize>,
    /// Maximum characters of one document; the rest is dropped before tokenization.
    pub max_document_chars: usize,
    /// Maximum tokens of one request, over all its pairs.
    pub max_request_tokens: usize,
    /// Position of a long document's last chunk.
    pub tail: Tail,
    /// Units that are tokenized at the same time: this many of small requests and this many of large ones.
    pub threads: usize,
    /// Maximum time that the texts admitted to the tokenizer take at the measured speed.
    pub max_tokenizer_wait: Duration,
}

/// How the documents of one request are split.
#[derive(Debug, Clone, Copy)]
pub struct DocumentOptions {
    /// Tokens that adjacent chunks have in common.
    pub overlap_tokens: usize,
    /// Maximum chunks of a document that are scored.
    pub max_chunks_per_doc: usize,
    /// Maximum tokens of a document that are read; `None` is no limit.
    pub max_tokens_per_doc: Option<usize>,
    /// Whether chunks get their position in the text, [`Chunk::span`].
    pub spans: bool,
}

impl Default for DocumentOptions {
    fn default() -> Self {
        Self {
            overlap_tokens: MAX_OVERLAP_TOKENS,
            max_chunks_per_doc: DEFAULT_MAX_CHUNKS,
            max_tokens_per_doc: None,
            spans: false,
        }
    }
}

/// A tokenized request: each distinct pair once, and the chunks of each document. A document's score is the maximum over the
/// pairs of its chunks.
#[derive(Debug, Default)]
pub struct EncodedRequest {
    /// Distinct pairs.
    pub pairs: Vec<Pair>,
    /// For each document, in the request's order, its chunks in the text's order; never empty.
    pub documents: Vec<Vec<Chunk>>,
    /// What the pairs do not contain.
    pub truncation: Truncation,
}

/// A part of a document that is scored as one pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Index into [`EncodedRequest::pairs`]. Chunks with the same tokens share a pair.
    pub pair: usize,
    /// The range of the document's text that it covers, in Unicode code points; `0..0` if [`DocumentOptions::spans`] is false.
    pub span: Range<usize>,
}

/// Which parts of a request's text the model did not read.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Truncation {
    /// The query was longer than its share of the window.
    pub query: bool,
    /// Number of documents that were truncated by any limit.
    pub documents: usize,
    /// Chunks beyond `max_chunks_per_doc`, over all documents; an estimate if a document was tokenized only in part.
    pub chunks: usize,
    /// Tokens of documents that are in no chunk because of any limit; an estimate if a document was tokenized only in part.
    pub tokens: usize,
}

/// A model's tokenizer and pair template.
#[derive(Debug, Clone)]
pub struct TextEncoder {
    inner: Arc<Inner>,
    small: SizeClass,
    large: SizeClass,
}

/// Where the requests of one size are tokenized. Small requests neither wait for large ones nor are refused because of them.
#[derive(Debug, Clone)]
struct SizeClass {
    /// Permits for units that are tokenized at the same time.
    slots: Arc<Semaphore>,
    /// Admission to the tokenizer, in bytes.
    admission: Arc<Admission>,
    /// Whether the work runs on threads of low priority.
    in_background: bool,
}

impl SizeClass {
    fn new(limits: &TextLimits, in_background: bool) -> Self {
        let threads = limits.threads.max(1);
        let gauge = metrics::TOKENIZER_BYTES.only_gauge();
        let admission_limits = AdmissionLimits { units: MAX_TOKENIZER_BYTES, wait: limits.max_tokenizer_wait };
        Self {
            slots: Arc::new(Semaphore::new(threads)),
            admission: Arc::new(Admission::new(Resource::Tokenizer, gauge, admission_limits, threads)),
            in_background,
        }
    }

    /// Runs `work` outside the async threads.
    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, RerankError> {
        if self.in_background {
            return background::run(work).await;
        }
        tokio::task::spawn_blocking(work).await.map_err(|error| RerankError::Internal(error.into()))
    }
}

#[derive(Debug)]
struct Inner {
    tokenizer: Tokenizer,
    template: PairTemplate,
    /// Maximum tokens of a pair, special tokens included.
    window: usize,
    limits: TextLimits,
}

impl TextEncoder {
    /// Reads a `tokenizer.json` for a model with the given embedding tables.
    ///
    /// # Errors
    /// Not a tokenizer; ids, special tokens or token types beyond the embedding tables; pairs without a fixed template; a
    /// window that is too small for a pair.
    pub fn new(tokenizer_json: &[u8], rows: EmbeddingRows, window: usize, limits: TextLimits) -> Result<Self> {
        // Some damaged files make the deserializer panic.
        let read = catch_unwind(AssertUnwindSafe(|| Tokenizer::from_bytes(tokenizer_json)));
        let mut tokenizer = read
            .map_err(|_| anyhow!("not a tokenizer.json: reading it panics"))?
            .map_err(|e| anyhow!("not a tokenizer.json: {e}"))?;
        // Published files carry their own padding and truncation (MiniLM's pads every pair to 512).
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| anyhow!("{e}"))?;
        let highest = tokenizer.get_vocab(true).into_values().max().context("the vocabulary is empty")?;
        ensure!(
            (highest as usize) < rows.vocabulary,
            "the tokenizer's highest id is {highest}, the model's embedding has {} rows; these files do not belong together",
            rows.vocabulary
        );
        let template = PairTemplate::of(&tokenizer, rows)?;
        let least = MIN_WINDOW.max(template.special_tokens() + 4);
        ensure!(window >= least, "a window of {window} tokens is too small; the minimum is {least}");
        let (small, large) = (SizeClass::new(&limits, false), SizeClass::new(&limits, true));
        let inner = Arc::new(Inner { tokenizer, template, window, limits });
        Ok(Self { inner, small, large })
    }

    /// The pair template as text: `<s> query </s> </s> document </s>`.
    pub fn pair_format(&self) -> String {
        self.inner.template.format(&self.inner.tokenizer)
    }

    /// Maximum tokens of a pair, special tokens included.
    pub fn window(&self) -> usize {
        self.inner.window
    }

    /// Units of large requests that are tokenized at the same time.
    pub fn threads(&self) -> usize {
        self.inner.limits.threads
    }

    /// Checks the tokens of a request against the limit.
    ///
    /// # Errors
    /// [`RerankError::TooMuchWork`]
    pub fn check_tokens(&self, tokens: usize) -> Result<(), RerankError> {
        self.inner.check_tokens(tokens)
    }

    /// Maximum tokens of a query: its share of the window.
    pub fn max_query_tokens(&self) -> usize {
        let all = self.inner.window - self.inner.template.special_tokens();
        self.inner.limits.max_query_tokens.unwrap_or(all / 2).clamp(1, all - 1)
    }

    /// How a document is split next to a query of `query_tokens` tokens.
    pub fn chunking(&self, query_tokens: usize, options: DocumentOptions) -> Chunking {
        let limits = &self.inner.limits;
        Chunking {
            room: self.inner.window - query_tokens - self.inner.template.special_tokens(),
            overlap: options.overlap_tokens,
            max_chunks: options.max_chunks_per_doc,
            tail: limits.tail,
        }
    }

    /// A text's ids without special tokens, tokenized in one call. For tests and benches; requests use [`Self::encode`].
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn token_ids(&self, text: &str) -> Result<Vec<u32>> {
        template::encode(&self.inner.tokenizer, text)
    }

    /// A short pair, for the check at start and for health checks.
    ///
    /// # Errors
    /// The tokenizer fails, or makes so many tokens of two letters that the pair does not fit the window.
    pub fn probe(&self) -> Result<Pair> {
        let (pair, window) = (self.pair("a", "b")?, self.inner.window);
        ensure!(
            pair.tokens() <= window,
            "the tokenizer makes {} tokens of two letters, the window is {window}",
            pair.tokens()
        );
        Ok(pair)
    }

    /// The pair of a query and a document, however long. For tests and benches.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn pair(&self, query: &str, document: &str) -> Result<Pair> {
        Ok(self.inner.template.pair(&self.token_ids(query)?, &self.token_ids(document)?))
    }

    /// The pairs of a client's query with each document.
    ///
    /// # Errors
    /// [`RerankError::Overloaded`] if too many bytes wait for the tokenizer; [`RerankError::TooMuchWork`] if the request has
    /// too many tokens; [`RerankError::Internal`] if the tokenizer fails.
    pub async fn encode(
        &self,
        client: ClientId,
        query: &str,
        documents: Arc<[String]>,
        options: DocumentOptions,
    ) -> Result<EncodedRequest, RerankError> {
        let reach = self.chunking(0, options).reach().min(options.max_tokens_per_doc.unwrap_or(usize::MAX));
        let cost = |text: &String| text.len().min(reach.saturating_mul(MAX_BYTES_PER_TOKEN));
        let bytes =
            query.len().min(self.max_query_tokens() * MAX_BYTES_PER_TOKEN) + documents.iter().map(cost).sum::<usize>();
        let class = if bytes <= SMALL_REQUEST_BYTES { &self.small } else { &self.large };
        let _permit = class.admission.admit(client, bytes, None)?;

        let (query, query_truncated) = self.query_ids(query, class).await?;
        let chunking = self.chunking(query.len(), options);
        let reach = chunking.reach().min(options.max_tokens_per_doc.unwrap_or(usize::MAX));
        let texts = self.document_ids(documents, reach, options.spans, class).await?;
        let inner = Arc::clone(&self.inner);
        let truncation = Truncation { query: query_truncated, ..Truncation::default() };
        let pairs = move || inner.pairs(&query, &texts, chunking, options.max_tokens_per_doc, truncation);
        class.run(pairs).await?
    }

    /// The query's ids, truncated to its share of the window, and whether there were more.
    async fn query_ids(&self, query: &str, class: &SizeClass) -> Result<(Vec<u32>, bool), RerankError> {
        let limit = self.max_query_tokens();
        let text: Arc<[String]> = [query.to_owned()].into();
        let mut ids = Vec::new();
        for range in slice::slices(query, SLICE_CHARS, usize::MAX).0 {
            if ids.len() > limit {
                break;
            }
            let unit = vec![(0, range)];
            ids.extend(
                self.tokenize(Arc::clone(&text), unit, false, class).await?.into_iter().flat_map(|slice| slice.ids),
            );
        }
        let truncated = ids.len() > limit;
        ids.truncate(limit);
        Ok((ids, truncated))
    }

    /// The first `reach` ids of every document. Once more than `reach` tokens of a document are known, its further slices are
    /// skipped.
    async fn document_ids(
        &self,
        documents: Arc<[String]>,
        reach: usize,
        spans: bool,
        class: &SizeClass,
    ) -> Result<Vec<DocumentIds>, RerankError> {
        let limits = &self.inner.limits;
        let (units, mut texts) = if documents.iter().map(String::len).sum::<usize>() <= SMALL_REQUEST_BYTES {
            units(&documents, limits.max_document_chars)
        } else {
            let (documents, max_chars) = (Arc::clone(&documents), limits.max_document_chars);
            background::run(move || units(&documents, max_chars)).await?
        };
        let tokens_so_far: Vec<AtomicUsize> = texts.iter().map(|_| AtomicUsize::new(0)).collect();
        let bytes_skipped: Vec<AtomicUsize> = texts.iter().map(|_| AtomicUsize::new(0)).collect();
        let needed = |(document, range): &(usize, Range<usize>)| {
            let needed = tokens_so_far[*document].load(Relaxed) <= reach;
            if !needed {
                bytes_skipped[*document].fetch_add(range.len(), Relaxed);
            }
            needed
        };
        // The stream pulls a unit only when an earlier one is done, so slices of documents that already reach far enough are
        // dropped here.
        let jobs = units.into_iter().filter_map(|mut unit| {
            unit.retain(&needed);
            (!unit.is_empty()).then(|| self.tokenize(Arc::clone(&documents), unit, spans, class))
        });
        let mut results = stream::iter(jobs).buffered(limits.threads.max(1));
        let mut total = 0;
        while let Some(unit) = results.next().await {
            for slice in unit? {
                let text = &mut texts[slice.document];
                text.tokens += slice.ids.len();
                tokens_so_far[slice.document].store(text.tokens, Relaxed);
                total += text.append(slice, reach);
            }
            self.check_tokens(total)?;
        }
        drop(results);
        for (text, skipped) in texts.iter_mut().zip(&bytes_skipped) {
            let skipped = skipped.load(Relaxed);
            if skipped > 0 {
                let read = text.bytes.saturating_sub(skipped).max(1);
                text.tokens += (text.tokens as f64 * skipped as f64 / read as f64).ceil() as usize;
            }
        }
        Ok(texts)
    }

    /// Tokenizes one unit. Units of different requests take turns, because the semaphore of slots is fair.
    async fn tokenize(
        &self,
        texts: Arc<[String]>,
        unit: Unit,
        spans: bool,
        class: &SizeClass,
    ) -> Result<Vec<SliceIds>, RerankError> {
        let slot = Arc::clone(&class.slots).acquire_owned().await.map_err(|e| RerankError::Internal(e.into()))?;
        let (inner, admission) = (Arc::clone(&self.inner), Arc::clone(&class.admission));
        let work = move || {
            let _slot = slot;
            failpoint!("tokenizer-unit");
            let bytes: usize = unit.iter().map(|(_, range)| range.len()).sum();
            let start = Instant::now();
            let ids = |(document, range): (usize, Range<usize>)| {
                SliceIds::encode(&inner.tokenizer, document, &texts[document][range], spans)
            };
            let ids = unit.into_iter().map(ids).collect::<Result<Vec<_>>>().map_err(RerankError::Internal);
            if bytes >= SLICE_CHARS / 2 {
                admission.done(bytes, start.elapsed());
            }
            ids
        };
        class.run(work).await?
    }
}

impl Inner {
    fn check_tokens(&self, tokens: usize) -> Result<(), RerankError> {
        let limit = self.limits.max_request_tokens;
        if tokens > limit { Err(RerankError::TooMuchWork { tokens, limit }) } else { Ok(()) }
    }

    fn pairs(
        &self,
        query: &[u32],
        documents: &[DocumentIds],
        chunking: Chunking,
        max_tokens: Option<usize>,
        mut truncation: Truncation,
    ) -> Result<EncodedRequest, RerankError> {
        let read = |text: &DocumentIds| text.tokens.min(max_tokens.unwrap_or(usize::MAX));
        // Counted before the pairs are built, because a small request can result in very many chunks.
        let fixed = query.len() + self.template.special_tokens();
        let tokens =
            documents.iter().flat_map(|text| chunking.chunks(read(text))).map(|chunk| fixed + chunk.len()).sum();
        self.check_tokens(tokens)?;
        let mut encoded = EncodedRequest::default();
        let mut known: HashMap<&[u32], usize> = HashMap::new();
        for text in documents {
            let dropped = chunking.count(read(text)).saturating_sub(chunking.max_chunks);
            truncation.chunks += dropped;
            truncation.documents += usize::from(text.dropped_bytes > 0 || dropped > 0 || read(text) < text.tokens);
            truncation.tokens += text.all_tokens().saturating_sub(read(text).min(chunking.reach()));
            let chunks = chunking.chunks(read(text)).map(|chunk| {
                let span = text.span(chunk.clone());
                let pair = match known.entry(&text.ids[chunk]) {
                    Entry::Occupied(same) => *same.get(),
                    Entry::Vacant(new) => {
                        encoded.pairs.push(self.template.pair(query, new.key()));
                        *new.insert(encoded.pairs.len() - 1)
                    }
                };
                Chunk { pair, span }
            });
            encoded.documents.push(chunks.collect());
        }
        encoded.truncation = truncation;
        Ok(encoded)
    }
}

impl EncodedRequest {
    /// Adds the pairs and documents of another query.
    pub fn append(&mut self, other: Self) {
        let first = self.pairs.len();
        self.pairs.extend(other.pairs);
        let moved = |chunks: Vec<Chunk>| {
            chunks.into_iter().map(|chunk| Chunk { pair: first + chunk.pair, ..chunk }).collect::<Vec<_>>()
        };
        self.documents.extend(other.documents.into_iter().map(moved));
        self.truncation.query |= other.truncation.query;
        self.truncation.documents += other.truncation.documents;
        self.truncation.chunks += other.truncation.chunks;
        self.truncation.tokens += other.truncation.tokens;
    }

    /// Chunks of all documents, less the distinct pairs: chunks that need no computation of their own.
    pub fn duplicates(&self) -> usize {
        self.documents.iter().map(Vec::len).sum::<usize>() - self.pairs.len()
    }

    /// Tokens of all distinct pairs.
    pub fn tokens(&self) -> usize {
        self.pairs.iter().map(Pair::tokens).sum()
    }
}

/// A tokenized document.
#[derive(Debug, Default)]
struct DocumentIds {
    /// Token ids as far as the document's chunks reach.
    ids: Vec<u32>,
    /// Each id's position in the text, in code points; empty if not asked for.
    spans: Vec<Range<usize>>,
    /// Code points of the slices that were appended; 0 if positions are not asked for.
    chars: usize,
    /// Tokens of the document's first `bytes` bytes; extrapolated if only a part of that text was tokenized.
    tokens: usize,
    /// Bytes of its text after truncation to the maximum characters.
    bytes: usize,
    /// Bytes of its text beyond the maximum characters.
    dropped_bytes: usize,
}

impl DocumentIds {
    /// Appends the tokens of the document's next slice, up to `reach` tokens in all. Returns how many were appended.
    fn append(&mut self, slice: SliceIds, reach: usize) -> usize {
        let kept = slice.ids.len().min(reach.saturating_sub(self.ids.len()));
        self.ids.extend_from_slice(&slice.ids[..kept]);
        let before = self.chars;
        self.spans.extend(slice.spans.iter().take(kept).map(|span| before + span.start..before + span.end));
        self.chars += slice.chars;
        kept
    }

    /// The tokens of the whole text; extrapolated where it was not tokenized.
    fn all_tokens(&self) -> usize {
        let per_byte = self.tokens as f64 / self.bytes.max(1) as f64;
        self.tokens + (per_byte * self.dropped_bytes as f64).ceil() as usize
    }

    /// The part of the text that a chunk's tokens come from. Some normalizers change the order of characters, so the first token
    /// need not have the least position.
    fn span(&self, chunk: Range<usize>) -> Range<usize> {
        let spans = self.spans.get(chunk).unwrap_or_default();
        let start = spans.iter().map(|span| span.start).min().unwrap_or(0);
        start..spans.iter().map(|span| span.end).max().unwrap_or(start)
    }
}

/// The tokens of a slice.
#[derive(Debug)]
struct SliceIds {
    document: usize,
    ids: Vec<u32>,
    /// Each id's position in the slice, in code points; empty if not asked for.
    spans: Vec<Range<usize>>,
    /// Code points of the slice; 0 if positions are not asked for.
    chars: usize,
}

impl SliceIds {
    fn encode(tokenizer: &Tokenizer, document: usize, text: &str, spans: bool) -> Result<Self> {
        if !spans {
            return Ok(Self { document, ids: template::encode(tokenizer, text)?, spans: Vec::new(), chars: 0 });
        }
        let (ids, spans) = template::encode_with_spans(tokenizer, text)?;
        Ok(Self { document, ids, spans, chars: text.chars().count() })
    }
}

/// Slices that are tokenized one after another in one job: a part of a long document, or several short documents. A slice is the
/// index of its document and a range of bytes in it.
type Unit = Vec<(usize, Range<usize>)>;

/// Splits documents into units. Also returns one [`DocumentIds`] for each document, without ids yet.
fn units(documents: &[String], max_chars: usize) -> (Vec<Unit>, Vec<DocumentIds>) {
    let mut units = Vec::new();
    let mut open: Unit = Vec::new();
    let mut open_bytes = 0;
    let mut texts = Vec::with_capacity(documents.len());
    for (document, text) in documents.iter().enumerate() {
        let (ranges, _) = slice::slices(text, SLICE_CHARS, max_chars);
        let bytes = ranges.last().map_or(0, |range| range.end);
        texts.push(DocumentIds { bytes, dropped_bytes: text.len() - bytes, ..DocumentIds::default() });
        for range in ranges {
            open_bytes += range.len();
            open.push((document, range));
            if open_bytes >= SLICE_CHARS {
                units.push(std::mem::take(&mut open));
                open_bytes = 0;
            }
        }
    }
    units.extend((!open.is_empty()).then_some(open));
    (units, texts)
}
