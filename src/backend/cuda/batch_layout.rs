//! The upload block of a batch: all integers that the kernels read, as u32 in one block, so that one copy suffices.

use std::ops::Range;

use crate::batch::Batch;

/// Query rows per attention tile: `QUERY_ROWS` of the kernels.
pub(super) const TILE_ROWS: usize = 128;

/// The rounded sizes of a batch. They determine the offsets in its upload block, in u32s, and the launches: batches of equal layouts
/// have the same launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Layout {
    /// Rows of buffers with one row per token: T, rounded up.
    pub(super) token_rows: usize,
    /// Rows of buffers with one row per sequence: S, rounded up.
    pub(super) sequence_rows: usize,
    /// Attention tiles, rounded up: blocks past the actual count exit at once.
    pub(super) tiles: usize,
}

impl Layout {
    pub(super) fn of(batch: &Batch) -> Self {
        let tiles: usize = batch.ranges().map(|rows| rows.len().div_ceil(TILE_ROWS)).sum();
        Self { token_rows: rounded(batch.tokens()), sequence_rows: rounded(batch.sequences()), tiles: rounded(tiles) }
    }

    /// The largest layout of a batch of `tokens` tokens, for any sequence lengths.
    pub(super) fn largest(tokens: usize) -> Self {
        Self { token_rows: rounded(tokens), sequence_rows: rounded(tokens), tiles: rounded(tokens) }
    }

    /// Offset of {T, S, tiles}.
    pub(super) const fn counts(self) -> usize {
        0
    }
    pub(super) const fn ids(self) -> usize {
        4
    }
    pub(super) const fn types(self) -> usize {
        self.ids() + self.token_rows
    }
    pub(super) const fn positions(self) -> usize {
        self.types() + self.token_rows
    }
    pub(super) const fn offsets(self) -> usize {
        self.positions() + self.token_rows
    }
    /// Offset of pairs {sequence, first query row}, aligned to a pair.
    pub(super) const fn tile_list(self) -> usize {
        (self.offsets() + self.sequence_rows + 1).next_multiple_of(2)
    }
    /// Length of the whole block.
    pub(super) const fn len(self) -> usize {
        self.tile_list() + 2 * self.tiles
    }

    /// Writes the batch to `upload`, `[len]`.
    pub(super) fn write(self, batch: &Batch, upload: &mut [u32]) {
        let tiles = tiles(batch);
        let counts = [batch.tokens(), batch.sequences(), tiles.len()].map(|n| n as u32);
        let mut put = |at: usize, values: &mut dyn Iterator<Item = u32>| {
            upload[at..].iter_mut().zip(values).for_each(|(to, value)| *to = value);
        };
        put(self.counts(), &mut counts.into_iter());
        put(self.ids(), &mut batch.ids().iter().copied());
        put(self.types(), &mut batch.type_ids().iter().copied());
        put(self.positions(), &mut batch.positions().iter().copied());
        put(self.offsets(), &mut batch.offsets().iter().map(|&row| row as u32));
        put(self.tile_list(), &mut tiles.into_iter().flatten());
    }
}

/// Rounds a row count up, so that few GEMM shapes and graphs serve all batches: to a multiple of 64, because a GEMM tile computes 64
/// rows anyway, and above 1,024 to a multiple of 128.
pub(super) fn rounded(rows: usize) -> usize {
    rows.max(1).next_multiple_of(if rows <= 1024 { 64 } else { 128 })
}

/// {sequence, first query row} of each tile. Tiles of long sequences take longest and come first.
fn tiles(batch: &Batch) -> Vec<[u32; 2]> {
    let mut order: Vec<(usize, Range<usize>)> = batch.ranges().enumerate().collect();
    order.sort_by_key(|(_, rows)| std::cmp::Reverse(rows.len()));
    let of = |(sequence, rows): (usize, Range<usize>)| {
        (0..rows.len()).step_by(TILE_ROWS).map(move |row| [sequence as u32, row as u32])
    };
    order.into_iter().flat_map(of).collect()
}

/// Splits the sequences, in order, into ranges of at most `capacity` tokens. A longer sequence gets its own range.
pub(super) fn split(batch: &Batch, capacity: usize) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    let mut tokens = 0;
    for (sequence, rows) in batch.ranges().enumerate() {
        match parts.last_mut() {
            Some(part) if tokens + rows.len() <= capacity => {
                part.end += 1;
                tokens += rows.len();
            }
            _ => {
                parts.push(sequence..sequence + 1);
                tokens = rows.len();
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Pair;

    fn batch(lengths: &[usize]) -> Batch {
        let pairs: Vec<Pair> = lengths.iter().map(|&n| Pair::new((0..n as u32).collect(), vec![1; n])).collect();
        Batch::pack(&pairs)
    }

    #[test]
    fn every_field_of_a_batch_is_written_at_its_offset() {
        let batch = batch(&[3, 300, 128]);
        let layout = Layout::of(&batch);
        assert_eq!((layout.token_rows, layout.sequence_rows, layout.tiles), (448, 64, 64));
        let mut upload = vec![u32::MAX; layout.len()];
        layout.write(&batch, &mut upload);
        assert_eq!(upload[..3], [431, 3, 5]);
        assert_eq!(upload[layout.ids()..][..5], [0, 1, 2, 0, 1]);
        assert_eq!(upload[layout.types()..][..2], [1, 1]);
        assert_eq!(upload[layout.positions()..][430], 127);
        assert_eq!(upload[layout.offsets()..][..4], [0, 3, 303, 431]);
        assert_eq!(upload[layout.tile_list()..][..10], [1, 0, 1, 128, 1, 256, 2, 0, 0, 0]);
    }

    #[test]
    fn no_batch_exceeds_the_largest_layout() {
        for lengths in [&[1; 100][..], &[100], &[33, 33, 34], &[2; 50]] {
            assert!(Layout::of(&batch(lengths)).len() <= Layout::largest(100).len(), "{lengths:?}");
        }
    }

    #[test]
    fn a_batch_is_split_between_sequences() {
        assert_eq!(split(&batch(&[40, 40, 40, 200, 10]), 100), [0..2, 2..3, 3..4, 4..5]);
        assert_eq!(split(&batch(&[40, 40]), 1000), [0..2]);
    }
}
