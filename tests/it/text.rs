//! Token ids against the tokenizer library: of pairs, and of long documents that are tokenized in slices.
//!
//! The tokenizers are those of bge-reranker-v2-m3 (Unigram) and ms-marco-MiniLM-L-12-v2 (WordPiece), without which their tests
//! are skipped (tests/README.md), and those of the fixtures.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rerankd::batch::Pair;
use rerankd::checkpoint::config::ModelConfig;
use rerankd::client::ClientId;
use rerankd::error::RerankError;
use rerankd::text::{DocumentOptions, EmbeddingRows, TextEncoder, TextLimits};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::support::{SplitMix64, fixture, limits, paragraphs, real, stub};

const BGE: &str = "bge-reranker-v2-m3";
const MINILM: &str = "ms-marco-MiniLM-L-12-v2";

/// Edge cases: empty, white space, combining marks, emoji, control characters, special tokens in the text.
const EDGE_CASES: [&str; 22] = [
    "",
    " ",
    "a",
    "中",
    "?",
    "  leading and trailing  ",
    "many     spaces\t\ttabs\n\nand\r\nlines",
    "\n",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag, 👍🏽 skin",
    "e\u{301}te\u{301} cafe\u{301} n\u{303}",
    "\u{301}starts with a combining mark",
    "שלום עולם, مرحبا بالعالم",
    "ﬁligree ① ½ Ⅷ ＡＢＣ ㎏",
    "zero\u{200b}width\u{200d}joiners\u{feff}",
    "no\u{a0}break\u{3000}ideographic\u{2003}em",
    "control\u{0}\u{7}\u{1b}[31m",
    "private \u{e000} \u{10ffff} \u{fffd}",
    "the end</s>",
    "<s> </s></s> <pad> <mask> <unk>",
    "[CLS] [SEP] [PAD] [MASK] [UNK]",
    "▁already ▁meta ##piece",
    "https://example.org/?q=a%20b&x=[1,2]#top 3.14159e-10",
];

#[test]
fn bge_pair_ids_match_the_tokenizer() {
    check_real_pairs("bge_pair_ids_match_the_tokenizer", BGE);
}

#[test]
fn minilm_pair_ids_match_the_tokenizer() {
    check_real_pairs("minilm_pair_ids_match_the_tokenizer", MINILM);
}

// Finding F: tokenizing was outside admission.
#[tokio::test]
async fn a_request_is_refused_before_it_is_tokenized_when_too_much_text_waits() {
    let limits = TextLimits { max_tokenizer_wait: Duration::from_nanos(1), ..limits() };
    let rows = EmbeddingRows { vocabulary: 100, token_types: 2 };
    let encoder = TextEncoder::new(stub::tokenizer_json().as_bytes(), rows, 64, limits).unwrap();
    let options = DocumentOptions::default();
    let large: Arc<[String]> = ["apple ".repeat(100_000)].into();
    // Measures the speed, from which the limit of 1 ns follows: with anything waiting, nothing more is admitted.
    encoder.encode(ClientId::Only, "apple", Arc::clone(&large), options).await.unwrap();
    let mut first = std::pin::pin!(encoder.encode(ClientId::Only, "apple", Arc::clone(&large), options));
    tokio::select! {
        biased;
        _ = &mut first => panic!("600,000 characters are tokenized on another thread"),
        () = std::future::ready(()) => {}
    }
    let second = encoder.encode(ClientId::Only, "apple", Arc::clone(&large), options).await;
    assert!(matches!(second, Err(RerankError::Overloaded { .. })), "{second:?}");
    first.await.unwrap();
    assert!(encoder.encode(ClientId::Only, "apple", large, options).await.is_ok());
}

/// Checks each paragraph of XQuAD in two languages with one of its questions and with an edge case, and all pairs of edge cases.
fn check_real_pairs(test: &str, model: &str) {
    let Some(texts) = real(test, model).map(|folder| Texts::read(&folder)) else { return };
    for language in ["en", "zh"] {
        let Some(xquad) = real(test, &format!("xquad/xquad.{language}.json")) else { return };
        for (i, paragraph) in paragraphs(&xquad).iter().enumerate() {
            texts.check_pair(&paragraph.qas[0].question, &paragraph.context);
            texts.check_pair(EDGE_CASES[i % EDGE_CASES.len()], &paragraph.context);
        }
    }
    texts.check_edge_case_pairs();
    for long in ["word ".repeat(20_000), "x".repeat(100_000), "漢".repeat(100_000), "!".repeat(100_000)] {
        texts.check_pair("long?", &long);
    }
}

#[test]
fn fixture_pair_ids_match_the_tokenizer() {
    for family in ["xlmr", "bert", "roberta"] {
        Texts::read(&fixture(family)).check_edge_case_pairs();
    }
}

/// Long words without a boundary, the slow case of BPE and Unigram, on all three tokenizer types.
#[test]
fn long_words_get_the_ids_of_the_tokenizer() {
    for family in ["xlmr", "bert", "roberta"] {
        let texts = Texts::read(&fixture(family));
        for long in ["x".repeat(20_000), "!".repeat(20_000), "漢".repeat(20_000), "ab".repeat(10_000)] {
            texts.check_pair("long?", &long);
        }
    }
}

/// A tokenizer.json may ask for padding and truncation to the window, as MiniLM's does.
#[test]
fn padding_and_truncation_in_tokenizer_json_are_ignored() {
    let file = fixture("bert").join("tokenizer.json");
    let written: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    assert!(
        written["padding"].is_object() && written["truncation"].is_object(),
        "the fixture has no padding and truncation"
    );
    let texts = Texts::read(&fixture("bert"));
    assert_eq!(texts.encoder.pair("apple", "tree").unwrap().tokens(), 5);
    assert_eq!(texts.encoder.pair("apple", &"tree ".repeat(200)).unwrap().tokens(), 204);
}

/// Parts of generated documents: emoji of several code points, combining and full-width characters, characters that normalizers
/// drop or replace by several, words without spaces.
const PARTS: [&str; 24] = [
    "apple",
    "tree",
    "Ünïcode",
    "cafe\u{301}",
    "n\u{303}",
    "👩‍👩‍👧‍👦",
    "👍🏽",
    "🇫🇷",
    "中文",
    "漢字かな",
    "ﬁ",
    "①",
    "㎏",
    "ＡＢＣ",
    "Ⅷ",
    "zero\u{200b}width",
    "\u{feff}",
    "\u{0}",
    "no\u{a0}break",
    "שלום",
    "…",
    "!?",
    "▁",
    "</s>",
];
/// A word that no part contains.
const NEEDLE: &str = "kitchen";

/// A chunk's span is the text of its tokens: a word is in the span of every chunk that has all its tokens, spans are in the
/// text's order, and together they cover every letter and digit.
async fn check_spans(texts: &Texts, document: &str, overlap_tokens: usize) {
    let options = DocumentOptions { overlap_tokens, spans: true, ..DocumentOptions::default() };
    let encoded = texts.encoder.encode(ClientId::Only, "query", [document.to_owned()].into(), options).await.unwrap();
    let plain = DocumentOptions { spans: false, ..options };
    let without = texts.encoder.encode(ClientId::Only, "query", [document.to_owned()].into(), plain).await.unwrap();
    assert_eq!(encoded.pairs, without.pairs, "spans change no token");
    let chars: Vec<char> = document.chars().collect();
    let at = document.find(NEEDLE).map(|byte| document[..byte].chars().count());
    let mut covered = vec![false; chars.len()];
    let mut found = 0;
    for (i, chunk) in encoded.documents[0].iter().enumerate() {
        let span = chunk.span.clone();
        assert!(span.start <= span.end && span.end <= chars.len(), "{span:?} of {} characters", chars.len());
        covered[span.clone()].fill(true);
        if i > 0 {
            let before = &encoded.documents[0][i - 1].span;
            assert!(before.start <= span.start && before.end <= span.end, "{before:?} before {span:?}");
        }
        if texts.tokenizer.decode(encoded.pairs[chunk.pair].ids(), true).unwrap().contains(NEEDLE) {
            let at = at.unwrap();
            assert!(span.start <= at && at + NEEDLE.len() <= span.end, "{NEEDLE} is at {at}, the chunk at {span:?}");
            found += 1;
        }
    }
    assert!(found > 0, "no chunk has the tokens of {NEEDLE}");
    let lost = chars.iter().zip(&covered).find(|(c, covered)| c.is_alphanumeric() && !**covered);
    assert!(lost.is_none(), "no chunk covers {lost:?}");
}

#[tokio::test]
async fn chunk_spans_point_at_the_text_of_their_tokens() {
    let mut random = SplitMix64(7);
    for family in ["xlmr", "bert", "roberta"] {
        let texts = Texts::read(&fixture(family));
        for _ in 0..200 {
            let mut words: Vec<&str> = (0..1 + random.below(120)).map(|_| PARTS[random.below(PARTS.len())]).collect();
            words.insert(random.below(words.len() + 1), NEEDLE);
            let space = [" ", "  ", "\n", "\t "][random.below(4)];
            check_spans(&texts, &words.join(space), 12 + random.below(8)).await;
        }
    }
}

/// A long document is tokenized in slices; spans count from the document's start.
#[tokio::test]
async fn chunk_spans_of_a_long_document_count_from_its_start() {
    let texts = Texts::read(&fixture("bert"));
    let document = format!("{} {NEEDLE} {}", "👍🏽 tree ".repeat(6_000), "中文 ".repeat(3_000));
    check_spans(&texts, &document, 12).await;
}

#[tokio::test]
async fn bge_slices_join_to_the_ids_of_the_whole() {
    check_slices("bge_slices_join_to_the_ids_of_the_whole", BGE).await;
}

#[tokio::test]
async fn minilm_slices_join_to_the_ids_of_the_whole() {
    check_slices("minilm_slices_join_to_the_ids_of_the_whole", MINILM).await;
}

/// Checks long documents of real paragraphs: joined with three separators, then without any white space.
async fn check_slices(test: &str, model: &str) {
    let Some(texts) = real(test, model).map(|folder| Texts::read(&folder)) else { return };
    for language in ["en", "zh"] {
        let Some(xquad) = real(test, &format!("xquad/xquad.{language}.json")) else { return };
        let paragraphs: Vec<String> = paragraphs(&xquad).into_iter().map(|paragraph| paragraph.context).collect();
        for joint in ["", " ", "\n"] {
            let document: String = paragraphs.join(joint).chars().take(LONG).collect();
            let (sliced, whole) = texts.sliced_and_whole(&document).await;
            let what = format!("{model}, {language}, joined with {joint:?}");
            assert!(sliced == whole, "{}", texts.first_difference(&what, &sliced, &whole));
        }
        if language == "zh" {
            let document: String = paragraphs.concat().chars().filter(|c| !c.is_whitespace()).take(LONG).collect();
            texts.check_without_spaces(&document).await;
        }
    }
}

/// Characters of a long document: four slices.
const LONG: usize = 60_000;

/// A model's tokenizer in this crate's encoder and in the tokenizer library.
struct Texts {
    encoder: TextEncoder,
    tokenizer: Tokenizer,
}

impl Texts {
    fn read(folder: &Path) -> Self {
        let json = fs::read(folder.join("tokenizer.json")).unwrap();
        let config = ModelConfig::parse(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
        let mut tokenizer = Tokenizer::from_bytes(&json).unwrap();
        tokenizer.with_padding(None).with_truncation(None).unwrap();
        let rows = EmbeddingRows { vocabulary: config.vocab_size, token_types: config.type_vocab_size };
        let encoder = TextEncoder::new(&json, rows, config.max_window, limits()).unwrap();
        Self { encoder, tokenizer }
    }

    fn check_edge_case_pairs(&self) {
        for query in EDGE_CASES {
            for document in EDGE_CASES {
                self.check_pair(query, document);
            }
        }
    }

    fn check_pair(&self, query: &str, document: &str) {
        let ours = self.encoder.pair(query, document).unwrap();
        let theirs = self.tokenizer.encode((query, document), true).unwrap();
        let theirs = Pair::new(
            theirs.get_ids().to_vec(),
            theirs.get_type_ids().iter().map(|&t| u8::try_from(t).unwrap()).collect(),
        );
        let start = |text: &str| text.chars().take(60).collect::<String>();
        assert!(
            ours == theirs,
            "{:?} with {:?}: {}; type ids equal: {}",
            start(query),
            start(document),
            self.first_difference("ids", ours.ids(), theirs.ids()),
            ours.type_ids() == theirs.type_ids()
        );
    }

    /// Slices end after punctuation, where WordPiece splits anyway. Unigram's Metaspace puts `▁` before every slice, so each
    /// boundary between slices may add one `▁`. No other id may differ.
    async fn check_without_spaces(&self, document: &str) {
        let (sliced, whole) = self.sliced_and_whole(document).await;
        let mark = self.tokenizer.token_to_id("▁");
        let mut expected = whole.iter().peekable();
        let mut marks = 0;
        for &id in &sliced {
            if expected.next_if(|&&next| next == id).is_none() {
                assert!(Some(id) == mark, "{}", self.first_difference("without spaces", &sliced, &whole));
                marks += 1;
            }
        }
        assert!(expected.next().is_none() && marks <= 3, "{marks} marks more, {} ids less", expected.count());
    }

    async fn sliced_and_whole(&self, document: &str) -> (Vec<u32>, Vec<u32>) {
        (self.sliced(document).await, self.encoder.token_ids(document).unwrap())
    }

    /// A document's ids as the encoder computes them: tokenized in slices and chunked without overlap, then joined.
    async fn sliced(&self, document: &str) -> Vec<u32> {
        let options =
            DocumentOptions { overlap_tokens: 0, max_chunks_per_doc: usize::MAX >> 1, ..DocumentOptions::default() };
        let encoded =
            self.encoder.encode(ClientId::Only, "query", [document.to_owned()].into(), options).await.unwrap();
        assert_eq!((encoded.truncation.documents, encoded.truncation.chunks), (0, 0));
        // In both template families one special token follows the document.
        let before = self.encoder.pair("query", "").unwrap().tokens() - 1;
        let chunks = encoded.documents[0].iter().map(|chunk| encoded.pairs[chunk.pair].ids());
        chunks.flat_map(|ids| &ids[before..ids.len() - 1]).copied().collect()
    }

    /// Describes the first difference between two id sequences, with the tokens around it.
    fn first_difference(&self, what: &str, ours: &[u32], theirs: &[u32]) -> String {
        let at = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
        let around = |ids: &[u32]| -> Vec<String> {
            let shown = &ids[at.saturating_sub(4)..ids.len().min(at + 4)];
            shown.iter().map(|&id| self.tokenizer.id_to_token(id).unwrap_or_else(|| id.to_string())).collect()
        };
        let (n, m) = (ours.len(), theirs.len());
        format!(
            "{what}: {n} ids, expected {m}; first difference at {at}: {:?}, expected {:?}",
            around(ours),
            around(theirs)
        )
    }
}
