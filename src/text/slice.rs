//! Splits long texts into slices before they are tokenized, so that no text occupies a thread for long.
//!
//! Tokenization costs at worst 1 to 4 microseconds and some 600 bytes of memory per character, and a tokenizer truncates
//! only after tokenizing the whole text. If possible, a slice ends before a run of white space, and the next slice begins with
//! that run. The pre-tokenizers of the supported models (BERT's, Metaspace, byte-level) never join tokens across such a position,
//! so the ids are those of the whole text. In a text without white space (Chinese, a million "!") a slice ends after punctuation,
//! and otherwise anywhere; the word at that position may then get other ids than in the whole text.

use std::ops::Range;

/// Maximum characters of a slice: about 4,000 tokens of English, which take 10 ms.
pub(crate) const SLICE_CHARS: usize = 16 * 1024;

/// Byte ranges that cover the first `max_chars` characters of `text` in order, each of at most `slice_chars` characters.
/// The flag says whether the text has more characters. An empty text has one empty slice.
pub(crate) fn slices(text: &str, slice_chars: usize, max_chars: usize) -> (Vec<Range<usize>>, bool) {
    let kept = text.char_indices().nth(max_chars).map_or(text.len(), |(end, _)| end);
    let mut slices = Vec::new();
    let mut start = 0;
    while start < kept || slices.is_empty() {
        let rest = &text[start..kept];
        let end =
            start + rest.char_indices().nth(slice_chars).map_or(rest.len(), |(limit, _)| split_position(rest, limit));
        slices.push(start..end);
        start = end;
    }
    (slices, kept < text.len())
}

/// The best position in the second half of `text[..limit]` to end a slice, or `limit`.
fn split_position(text: &str, limit: usize) -> usize {
    let from = text.floor_char_boundary(limit / 2).max(1);
    let from = text.ceil_char_boundary(from);
    let window = &text[from..limit];
    let spaces = window
        .char_indices()
        .rev()
        .find(|&(at, c)| c.is_whitespace() && !text[..from + at].ends_with(char::is_whitespace));
    if let Some((at, _)) = spaces {
        return from + at;
    }
    let after = window
        .char_indices()
        .rev()
        .find(|&(_, c)| matches!(c, '\n' | '。' | '！' | '？' | '；' | '，' | '、' | '!' | '?'));
    after.map_or(limit, |(at, c)| from + at + c.len_utf8())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_slice_ends_before_white_space() {
        let (ranges, cut) = slices("aaa bbb ccc ddd", 8, 1000);
        assert_eq!(ranges, [0..7, 7..15]);
        assert!(!cut);
        assert_eq!(slices("aaaaa \t\tb", 7, 1000).0, [0..5, 5..9], "a run of white space is not split");
    }

    #[test]
    fn without_white_space_a_slice_ends_after_punctuation_or_anywhere() {
        assert_eq!(slices("一二三。四五六", 5, 1000).0, [0..12, 12..21]);
        assert_eq!(slices("aaaaaaaaaa", 4, 1000).0, [0..4, 4..8, 8..10]);
        assert_eq!(slices("", 4, 1000).0, [0..0]);
    }

    #[test]
    fn text_beyond_max_chars_sets_the_flag() {
        assert_eq!(slices("abcdef", 4, 5), (vec![0..4, 4..5], true));
        assert_eq!(slices("abcdef", 4, 6), (vec![0..4, 4..6], false));
    }

    proptest! {
        #[test]
        fn slices_cover_the_text_in_order(text in "(\\PC| |\n){0,200}", slice_chars in 2usize..40, max_chars in 1usize..250) {
            let (ranges, cut) = slices(&text, slice_chars, max_chars);
            let joined: String = ranges.iter().map(|r| &text[r.clone()]).collect();
            let expected: String = text.chars().take(max_chars).collect();
            prop_assert_eq!(&joined, &expected);
            prop_assert_eq!(cut, text.chars().count() > max_chars);
            prop_assert!(ranges.iter().all(|r| text[r.clone()].chars().count() <= slice_chars));
        }
    }
}
