//! Long documents, cut into windows that overlap. Pure arithmetic on token counts: no text, no tokenizer.
//!
//! The published family of algorithms behind the vendor's `max_chunks_per_doc` and `overlap_tokens`: every token is in some
//! chunk, neighbours share `overlap` tokens, and a document's score is its best chunk's.

use std::ops::Range;

/// Where the last chunk of a long document lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tail {
    /// It ends with the document and is as long as the others: the same number of chunks, more context.
    #[default]
    Aligned,
    /// It begins a stride after its neighbour and ends short.
    Short,
}

/// How a document is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunking {
    /// Tokens of the document in one chunk.
    pub room: usize,
    /// Tokens that neighbours are asked to share.
    pub overlap: usize,
    /// Chunks kept, from the document's start.
    pub max_chunks: usize,
    /// Where the last chunk lies.
    pub tail: Tail,
}

impl Chunking {
    /// Tokens between the starts of two neighbours. The overlap is held to a quarter of the room, so that no choice of query
    /// length and overlap makes many small steps out of one document.
    pub fn stride(&self) -> usize {
        self.room - self.overlap.min(self.room / 4)
    }

    /// Chunks that cover `tokens` tokens, before `max_chunks` applies. An empty document has one, empty, chunk.
    pub fn count(&self, tokens: usize) -> usize {
        1 + tokens.saturating_sub(self.room).div_ceil(self.stride())
    }

    /// Tokens that the kept chunks can read: what lies after them need not even be tokenised.
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
        check(30, 8, 80, &[0..8, 6..14, 12..20, 18..26, 22..30]); // overlap held to room / 4 = 2
    }

    proptest! {
        #[test]
        fn chunks_keep_their_promises(
            tokens in 0usize..20_000, room in 1usize..2_000, overlap in 0usize..=80, max_chunks in 1usize..40, short in any::<bool>(),
        ) {
            let tail = if short { Tail::Short } else { Tail::Aligned };
            let chunking = Chunking { room, overlap, max_chunks, tail };
            let chunks: Vec<_> = chunking.chunks(tokens).collect();
            prop_assert!(!chunks.is_empty() && chunks.len() <= max_chunks);
            prop_assert!(chunks.iter().all(|c| c.len() <= room && c.end <= tokens));
            prop_assert_eq!(chunks[0].start, 0);
            let promised = overlap.min(room / 4);
            for pair in chunks.windows(2) {
                // Covered without a gap, moving forward, sharing what was promised (more only where the tail is aligned).
                prop_assert!(pair[1].start > pair[0].start && pair[1].end > pair[0].end);
                let shared = pair[0].end - pair[1].start;
                let is_last_of_all = pair[1].end == tokens;
                prop_assert!(shared == promised || (is_last_of_all && !short && shared > promised), "{shared} shared");
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
