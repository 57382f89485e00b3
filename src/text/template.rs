//! How a query and a document are joined to one sequence, derived from the model's tokenizer.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Context, Result, anyhow, ensure};
use tokenizers::{Encoding, Tokenizer};

use crate::batch::Pair;

/// Numbers of rows of a model's embedding tables. Each token id and token type must be less than the number of rows of its table.
#[derive(Debug, Clone, Copy)]
pub struct EmbeddingRows {
    pub vocabulary: usize,
    /// 0 if the model does not distinguish token types.
    pub token_types: usize,
}

/// The special tokens before, between and after a pair's two texts, with the segment id of each token:
/// `[CLS] query [SEP] document [SEP]`, `<s> query </s> </s> document </s>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PairTemplate {
    before: SpecialTokens,
    query_type: u8,
    between: SpecialTokens,
    document_type: u8,
    after: SpecialTokens,
}

/// The ids of some special tokens, each with its segment id.
type SpecialTokens = Vec<(u32, u8)>;

impl PairTemplate {
    /// Derives the template from the tokenizer's encoding of one pair, then verifies it with two others.
    pub(crate) fn of(tokenizer: &Tokenizer, rows: EmbeddingRows) -> Result<Self> {
        let ids = |text: &str| encode(tokenizer, text);
        let (query, document) = (ids("query")?, ids("document")?);
        let whole = encode_pair(tokenizer, "query", "document", rows)?;
        let q = find(&whole, &query, 0).context("the tokenizer encodes a query in a pair differently than alone")?;
        let d = find(&whole, &document, q + query.len())
            .context("the tokenizer encodes a document in a pair differently than alone")?;
        let specials = |from: usize, to: usize| whole[from..to].to_vec();
        let template = Self {
            before: specials(0, q),
            query_type: whole[q].1,
            between: specials(q + query.len(), d),
            document_type: whole[d].1,
            after: specials(d + document.len(), whole.len()),
        };
        ensure!(
            template.special_tokens() > 0,
            "the tokenizer puts no special tokens around a pair; it is not a cross-encoder's"
        );
        for (query, document) in [("two words", ""), ("a", "some longer text, with 3 marks")] {
            let expected = encode_pair(tokenizer, query, document, rows)?;
            let built = template.pair(&ids(query)?, &ids(document)?);
            let same = built.ids().iter().zip(built.type_ids()).map(|(&id, &t)| (id, t)).eq(expected.iter().copied());
            ensure!(same, "the tokenizer's pairs follow no fixed template of special tokens");
        }
        Ok(template)
    }

    /// Number of special tokens in every pair.
    pub(crate) fn special_tokens(&self) -> usize {
        self.before.len() + self.between.len() + self.after.len()
    }

    /// The pair of a query and a document, given as ids without special tokens.
    pub(crate) fn pair(&self, query: &[u32], document: &[u32]) -> Pair {
        let tokens = self.special_tokens() + query.len() + document.len();
        let (mut ids, mut types) = (Vec::with_capacity(tokens), Vec::with_capacity(tokens));
        let mut text = |text: &[u32], segment: u8, specials: &SpecialTokens| {
            ids.extend_from_slice(text);
            types.resize(ids.len(), segment);
            ids.extend(specials.iter().map(|&(id, _)| id));
            types.extend(specials.iter().map(|&(_, segment)| segment));
        };
        text(&[], 0, &self.before);
        text(query, self.query_type, &self.between);
        text(document, self.document_type, &self.after);
        Pair::new(ids, types)
    }

    /// The template as text, as in the model catalogue: `[CLS] query [SEP] document [SEP]`.
    pub(crate) fn format(&self, tokenizer: &Tokenizer) -> String {
        let specials = |tokens: &SpecialTokens| {
            tokens
                .iter()
                .map(|&(id, _)| tokenizer.id_to_token(id).unwrap_or_else(|| id.to_string()))
                .collect::<Vec<_>>()
        };
        let mut words = specials(&self.before);
        words.push("query".to_owned());
        words.extend(specials(&self.between));
        words.push("document".to_owned());
        words.extend(specials(&self.after));
        words.join(" ")
    }
}

/// A text's ids, without special tokens.
pub(crate) fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    Ok(encoding(|| tokenizer.encode_fast(text, false))?.get_ids().to_vec())
}

/// As [`encode`], with the range of the text that each token covers, in Unicode code points.
pub(crate) fn encode_with_spans(tokenizer: &Tokenizer, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
    let encoding = encoding(|| tokenizer.encode_char_offsets(text, false))?;
    let spans = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
    Ok((encoding.get_ids().to_vec(), spans))
}

/// Runs the tokenizer. A damaged tokenizer.json, such as one with a wrong character map, can make it panic.
fn encoding(encode: impl FnOnce() -> tokenizers::Result<Encoding>) -> Result<Encoding> {
    let encoded = catch_unwind(AssertUnwindSafe(encode)).map_err(|_| anyhow!("the tokenizer panicked"))?;
    encoded.map_err(|e| anyhow!("the tokenizer failed: {e}"))
}

/// The tokenizer's encoding of a pair: ids and token types. Both are checked against the embedding tables, because the
/// post-processor may add ids that are not in the vocabulary.
fn encode_pair(tokenizer: &Tokenizer, query: &str, document: &str, rows: EmbeddingRows) -> Result<Vec<(u32, u8)>> {
    let encoding = encoding(|| tokenizer.encode_fast((query, document), true))?;
    let checked = |(&id, &token_type): (&u32, &u32)| {
        ensure!(
            (id as usize) < rows.vocabulary,
            "the pair template has the token id {id}, the model's embedding has {} rows",
            rows.vocabulary
        );
        ensure!(
            rows.token_types == 0 || (token_type as usize) < rows.token_types,
            "the pair template has the token type {token_type}, the model has {} (type_vocab_size)",
            rows.token_types
        );
        Ok((id, u8::try_from(token_type)?))
    };
    encoding.get_ids().iter().zip(encoding.get_type_ids()).map(checked).collect()
}

/// Position of the first `needle` in `haystack` from `start` on. `None` for an empty needle, which would match anywhere.
fn find(haystack: &[(u32, u8)], needle: &[u32], start: usize) -> Option<usize> {
    if needle.is_empty() {
        return None;
    }
    (start..=haystack.len().checked_sub(needle.len())?)
        .find(|&at| haystack[at..at + needle.len()].iter().map(|&(id, _)| id).eq(needle.iter().copied()))
}
