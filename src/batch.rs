//! A (query, chunk) pair as token ids, and a packed batch of pairs.
//!
//! Shapes in this crate: T tokens in a batch, S sequences, C hidden size, H heads, D head size (C = H * D), F feed-forward
//! size. Batches are packed, not padded: T ids, and S + 1 offsets that divide them into sequences.

use std::ops::Range;

/// A query and a chunk of a document as one token sequence, special tokens included.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pair {
    ids: Box<[u32]>,
    type_ids: Box<[u8]>,
}

impl Pair {
    /// Creates a pair from its token ids, `[len]`, and their segment (token type) ids, `[len]`.
    ///
    /// # Panics
    /// If the lengths differ or are 0.
    pub fn new(ids: Vec<u32>, type_ids: Vec<u8>) -> Self {
        assert!(!ids.is_empty() && ids.len() == type_ids.len(), "a pair has tokens, and a type id for each");
        Self { ids: ids.into(), type_ids: type_ids.into() }
    }

    /// The token ids, `[len]`.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The segment ids, `[len]`: 0 for the query's part and 1 for the document's in BERT, all 0 in the RoBERTa family.
    pub fn type_ids(&self) -> &[u8] {
        &self.type_ids
    }

    /// The number of tokens, special tokens included.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }
}

/// Pairs packed end to end: the input of one forward pass.
#[derive(Debug, Clone)]
pub struct Batch {
    ids: Vec<u32>,
    type_ids: Vec<u32>,
    positions: Vec<u32>,
    offsets: Vec<usize>,
}

impl Default for Batch {
    /// No sequences.
    fn default() -> Self {
        Self { ids: Vec::new(), type_ids: Vec::new(), positions: Vec::new(), offsets: vec![0] }
    }
}

impl Batch {
    /// Packs `pairs` in the given order.
    pub fn pack<'a>(pairs: impl IntoIterator<Item = &'a Pair>) -> Self {
        let mut batch = Self::default();
        for pair in pairs {
            batch.ids.extend_from_slice(pair.ids());
            batch.type_ids.extend(pair.type_ids().iter().map(|&t| u32::from(t)));
            batch.positions.extend(0..pair.tokens() as u32);
            batch.offsets.push(batch.ids.len());
        }
        batch
    }

    /// Packs the sequences with the given indices, in that order.
    pub fn select(&self, sequences: &[usize]) -> Self {
        let mut batch = Self::default();
        for &sequence in sequences {
            let rows = self.offsets[sequence]..self.offsets[sequence + 1];
            batch.ids.extend_from_slice(&self.ids[rows.clone()]);
            batch.type_ids.extend_from_slice(&self.type_ids[rows.clone()]);
            batch.positions.extend_from_slice(&self.positions[rows]);
            batch.offsets.push(batch.ids.len());
        }
        batch
    }

    /// Token ids, `[T]`.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Segment ids, `[T]`.
    pub fn type_ids(&self) -> &[u32] {
        &self.type_ids
    }

    /// Each token's position in its sequence, from 0, `[T]`.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// The first row of each sequence, and the end of the last, `[S + 1]`.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// T: tokens in the batch.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// S: sequences in the batch.
    pub fn sequences(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The rows of each sequence, in order.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        self.offsets.windows(2).map(|w| w[0]..w[1])
    }

    /// The row of each sequence's first token (CLS), `[S]`.
    pub fn cls_rows(&self) -> Vec<u32> {
        self.offsets[..self.sequences()].iter().map(|&row| row as u32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_keeps_ids_and_restarts_positions_in_each_sequence() {
        let pairs = [Pair::new(vec![5, 6, 7], vec![0, 0, 1]), Pair::new(vec![8], vec![0])];
        let batch = Batch::pack(&pairs);
        assert_eq!(batch.ids(), [5, 6, 7, 8]);
        assert_eq!(batch.type_ids(), [0, 0, 1, 0]);
        assert_eq!(batch.positions(), [0, 1, 2, 0]);
        assert_eq!(batch.offsets(), [0, 3, 4]);
        assert_eq!(batch.cls_rows(), [0, 3]);
        assert_eq!(batch.ranges().collect::<Vec<_>>(), [0..3, 3..4]);
        let reversed = batch.select(&[1, 0]);
        assert_eq!(
            (reversed.ids(), reversed.positions(), reversed.offsets()),
            (&[8, 5, 6, 7][..], &[0, 0, 1, 2][..], &[0, 1, 4][..])
        );
    }
}
