//! BM25 (Robertson et al., Okapi at TREC-3, 1994): the scoring of the crate `bm25`, with a tokenizer for languages with and
//! without spaces between words.

use ::bm25::{Embedder, EmbedderBuilder, Scorer, Tokenizer};

/// Splits text into lower-case words of letters and digits. Runs of Chinese, Japanese and Korean characters become overlapping
/// bigrams, as in Lucene's `CJKAnalyzer`.
#[derive(Debug, Default, Clone, Copy)]
struct WordTokenizer;

impl Tokenizer for WordTokenizer {
    fn tokenize(&self, text: &str) -> Vec<String> {
        let mut tokens = Vec::new();
        for word in text.to_lowercase().split(|c: char| !c.is_alphanumeric()) {
            let characters: Vec<char> = word.chars().collect();
            for run in characters.chunk_by(|&a, &b| is_cjk(a) == is_cjk(b)) {
                if is_cjk(run[0]) && run.len() > 1 {
                    tokens.extend(run.windows(2).map(|pair| pair.iter().collect::<String>()));
                } else {
                    tokens.push(run.iter().collect());
                }
            }
        }
        tokens
    }
}

fn is_cjk(c: char) -> bool {
    matches!(c, '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{ac00}'..='\u{d7af}' | '\u{20000}'..='\u{2ffff}')
}

/// A BM25 index over a collection of texts.
pub struct Bm25 {
    embedder: Embedder<u32, WordTokenizer>,
    scorer: Scorer<usize, u32>,
}

impl Bm25 {
    /// Indexes `texts`. The other methods refer to a text by its index in `texts`.
    pub fn new(texts: &[&str]) -> Self {
        let embedder: Embedder<u32, WordTokenizer> =
            EmbedderBuilder::with_tokenizer_and_fit_to_corpus(WordTokenizer, texts).build();
        let mut scorer = Scorer::new();
        for (i, text) in texts.iter().enumerate() {
            scorer.upsert(&i, embedder.embed(text));
        }
        Self { embedder, scorer }
    }

    /// The BM25 scores of `texts` for the query, in the order of `texts`. A text without a word of the query scores 0.
    pub fn scores(&self, query: &str, texts: &[usize]) -> Vec<f32> {
        let query = self.embedder.embed(query);
        texts.iter().map(|text| self.scorer.score(text, &query).unwrap_or(0.0)).collect()
    }

    /// The `n` texts with the highest scores, best first; equal scores in the collection's order. Texts without a word of the
    /// query are left out.
    pub fn best(&self, query: &str, n: usize) -> Vec<usize> {
        let mut matches = self.scorer.matches(&self.embedder.embed(query));
        matches.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.id.cmp(&b.id)));
        matches.into_iter().take(n).map(|found| found.id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_split_into_words_and_cjk_bigrams() {
        assert_eq!(
            WordTokenizer.tokenize("The 2nd Apple-tree, 苹果树 A型"),
            ["the", "2nd", "apple", "tree", "苹果", "果树", "a", "型"].map(String::from)
        );
    }

    #[test]
    fn a_text_with_the_rare_word_ranks_first() {
        let index = Bm25::new(&["the cat sat", "the dog sat on the mat", "the cat and the dog"]);
        assert_eq!(index.best("where is the mat", 2)[0], 1);
        let scores = index.scores("cat", &[0, 1, 2]);
        assert!(scores[0] > scores[2] && scores[1] == 0.0);
    }
}
