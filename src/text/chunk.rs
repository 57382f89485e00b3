//! Splits long documents into overlapping chunks. Pure arithmetic on token counts: no text, no tokenizer.
//!
//! The parameters are those of SiliconFlow's API, `max_chunks_per_doc` and `overlap_tokens`. Every token up to the limit of chunks
//! is in a chunk. Adjacent chunks have `overlap` tokens in common; an aligned last chunk may share more. A document's score is the
//! maximum over its chunks.

use std::ops::Range;

/// Position of a long document's last chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tail {
    /// It ends at the document's end and is as long as the others: more context than `Short`, with the same number of chunks.
    #[default]
    Aligned,
    /// It begins one stride after the chunk before it and may be shorter than the others.
    Short,
}

/// How a document is split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunking {
    /// Maximum document tokens in one chunk.
    pub room: usize,
    /// Requested number of tokens that adjacent chunks have in common.
    pub overlap: usize,
    /// Maximum chunks, counted from the document's start.
    pub max_chunks: usize,
    /// Position of the last chunk.
    pub tail: Tail,
}

impl Chunking {
    /// Tokens between the starts of adjacent chunks. The overlap is limited to a quarter of `room`: a long query (small `room`)
    /// with a large overlap would otherwise split a document into very many chunks.
    pub fn stride(&self) -> usize {
        self.room - self.overlap.min(self.room / 4)
    }

    /// Number of chunks that cover `tokens` tokens, without the limit `max_chunks`. An empty document has one empty chunk.
    pub fn count(&self, tokens: usize) -> usize {
        1 + tokens.saturating_sub(self.room).div_ceil(self.stride())
    }

    /// Maximum tokens that `max_chunks` chunks cover. Text after them does not have to be tokenized.
    pub fn reach(&self) -> usize {
        self.room.saturating_add((self.max_chunks - 1).saturating_mul(self.stride()))
    }

    /// The chunks of a document of `tokens` tokens, in order.
    pub fn chunks(self, tokens: usize) -> impl Iterator<Item = Range<usize>> {
        let (room, stride) = (self.room, self.stride());
        (0..self.count(tokens).min(self.max_chunks)).map(move |i| {
            let start = match self.tail {
                Tail::Aligned => (i * stride).min(tokens.saturating_sub(room)),
                Tail::Short => i * stride,
            };
            start..tokens.min(start + room)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(tokens: usize, room: usize, overlap: usize, expected: &[Range<usize>]) {
        let chunking = Chunking { room, overlap, max_chunks: 1024, tail: Tail::Aligned };
        assert_eq!(
            chunking.chunks(tokens).collect::<Vec<_>>(),
            expected,
            "{tokens} tokens, room {room}, overlap {overlap}"
        );
    }

    #[test]
    fn examples() {
        check(0, 10, 2, &[0..0]);
        check(10, 10, 2, &[0..10]);
        check(11, 10, 2, &[0..10, 1..11]);
        check(18, 10, 2, &[0..10, 8..18]);
        check(19, 10, 2, &[0..10, 8..18, 9..19]);
        check(20, 10, 0, &[0..10, 10..20]);
        check(30, 8, 80, &[0..8, 6..14, 12..20, 18..26, 22..30]); // overlap limited to room / 4 = 2
    }

    proptest! {
        #[test]
        fn chunks_cover_the_text_with_the_given_overlap(
            tokens in 0usize..20_000, room in 1usize..2_000, overlap in 0usize..=80, max_chunks in 1usize..40, short in any::<bool>(),
        ) {
            let tail = if short { Tail::Short } else { Tail::Aligned };
            let chunking = Chunking { room, overlap, max_chunks, tail };
            let chunks: Vec<_> = chunking.chunks(tokens).collect();
            prop_assert!(!chunks.is_empty() && chunks.len() <= max_chunks);
            prop_assert!(chunks.iter().all(|c| c.len() <= room && c.end <= tokens));
            prop_assert_eq!(chunks[0].start, 0);
            let expected = overlap.min(room / 4);
            for pair in chunks.windows(2) {
                // No gaps; starts and ends increase; the overlap is exact, except that an aligned last chunk may overlap more.
                prop_assert!(pair[1].start > pair[0].start && pair[1].end > pair[0].end);
                let shared = pair[0].end - pair[1].start;
                let is_last_of_all = pair[1].end == tokens;
                prop_assert!(shared == expected || (is_last_of_all && !short && shared > expected), "{shared} shared");
            }
            let end = chunks[chunks.len() - 1].end;
            if chunking.count(tokens) <= max_chunks {
                prop_assert_eq!(end, tokens);
            } else {
                prop_assert!(end < tokens && chunks.len() == max_chunks);
            }
            prop_assert_eq!(end, tokens.min(chunking.reach()));
        }
    }
}
