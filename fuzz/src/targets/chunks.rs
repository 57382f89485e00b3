//! The chunk planner against a naive reference.

use std::ops::Range;

use rerankd::text::{Chunking, Tail};

/// The first chunks of a document are compared with the reference one by one, up to this many. Of the others, only the count is
/// checked.
const MAX_LISTED: usize = 200;

/// The input is five numbers: tokens (6 bytes), room (3), overlap (2), chunk limit (8), tail (1).
pub fn run(input: &[u8]) {
    let mut rest = input;
    let tokens = number(&mut rest, 6);
    let room = number(&mut rest, 3).max(1);
    let overlap = number(&mut rest, 2);
    let max_chunks = number(&mut rest, 8).max(1);
    let tail = if number(&mut rest, 1).is_multiple_of(2) { Tail::Aligned } else { Tail::Short };
    check(tokens, Chunking { room, overlap, max_chunks, tail });
}

/// Compares a plan with the reference, and checks what callers rely on.
pub fn check(tokens: usize, chunking: Chunking) {
    let Chunking { room, max_chunks, .. } = chunking;
    let (expected, complete) = reference(tokens, chunking, max_chunks.min(MAX_LISTED));
    let found: Vec<Range<usize>> = chunking.chunks(tokens).take(expected.len() + usize::from(complete)).collect();
    assert_eq!(found, expected, "{tokens} tokens, {chunking:?}");

    let stride = chunking.stride();
    assert!(stride >= 1 && stride * 4 >= room * 3, "the overlap is at most a quarter of the room");
    assert!(found[0].start == 0 && found.iter().all(|chunk| chunk.len() <= room && chunk.end <= tokens));
    for pair in found.windows(2) {
        assert!(pair[0].start < pair[1].start && pair[1].start <= pair[0].end && pair[0].end < pair[1].end, "{pair:?}");
    }
    // The count without a limit: 1 + ceil((tokens - room) / stride).
    let beyond = (tokens as u128).saturating_sub(room as u128);
    let count = 1 + beyond.div_ceil(stride as u128);
    assert_eq!(chunking.count(tokens) as u128, count);
    let reach = room as u128 + (max_chunks as u128 - 1) * stride as u128;
    assert_eq!(chunking.reach() as u128, reach.min(usize::MAX as u128));
    if found.len() as u128 == count.min(max_chunks as u128) {
        assert_eq!(found[found.len() - 1].end, tokens.min(chunking.reach()), "tokens are covered up to the limit");
    }
}

/// The first `limit` chunks, computed one after another, and whether these are all.
pub fn reference(tokens: usize, chunking: Chunking, limit: usize) -> (Vec<Range<usize>>, bool) {
    let overlap = chunking.overlap.min(chunking.room / 4);
    let mut chunks = Vec::new();
    let mut start = 0;
    loop {
        let mut chunk = start..tokens.min(start + chunking.room);
        let is_last = chunk.end == tokens;
        if is_last && chunking.tail == Tail::Aligned {
            chunk.start = tokens.saturating_sub(chunking.room);
        }
        chunks.push(chunk);
        if is_last || chunks.len() == chunking.max_chunks {
            return (chunks, true);
        }
        if chunks.len() == limit {
            return (chunks, false);
        }
        start += chunking.room - overlap;
    }
}

/// The next little-endian number of at most `bytes` bytes; missing bytes are 0.
fn number(rest: &mut &[u8], bytes: usize) -> usize {
    let (taken, after) = rest.split_at(bytes.min(rest.len()));
    *rest = after;
    taken.iter().rev().fold(0, |number, &byte| number << 8 | usize::from(byte))
}
