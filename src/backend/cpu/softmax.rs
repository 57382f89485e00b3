//! The softmax of one query's scores, over blocks of keys: Milakov and Gimelshein's online softmax ("Online normalizer calculation
//! for softmax", 2018).

use std::ops::Range;

use super::attention_format::AttentionFormat;
use super::simd::{Accuracy, Isa, MAX_LANES, exp2};

/// The softmax of a query over the blocks of keys so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RowSoftmax {
    /// The maximum of the scores; -infinity while no key has been visible.
    max: f32,
    /// The sum of the weights relative to `max`.
    pub(super) sum: f32,
}

/// A block of a sequence's keys, for all of the queries that attend to them.
pub(super) struct KeyBlock {
    /// Positions of the keys.
    pub(super) keys: Range<usize>,
    /// Whether the queries have seen no other block.
    pub(super) is_first: bool,
    /// The largest distance between a query and a key that it sees.
    pub(super) window: Option<usize>,
    /// Of a weight's exponent: `weight = 2^((score - max) factor)`.
    pub(super) factor: f32,
    /// Columns of the context.
    pub(super) columns: usize,
}

impl KeyBlock {
    /// Converts the scores of the query at `position` to weights, adds their sum to the query's, and rescales its sum and its
    /// context, `[columns]`, to the new maximum. The first block leaves the context alone.
    ///
    /// # Safety
    /// `scores` has a score for each key. It, and `weights` for writes, are valid up to the end of the last vector; `context` for
    /// whole vectors up to `columns`.
    #[inline(always)]
    pub(super) unsafe fn add<I: Isa, E: AttentionFormat>(
        &self,
        isa: I,
        position: usize,
        row: &mut RowSoftmax,
        scores: *mut f32,
        weights: *mut E::Value,
        context: *mut f32,
    ) {
        let (Range { start, end }, n) = (self.keys.clone(), self.keys.len());
        let old_max = if self.is_first { f32::NEG_INFINITY } else { row.max };
        // SAFETY: guaranteed by the caller.
        unsafe {
            let (max, sum) = match self.window {
                None => softmax_block::<I, E>(isa, scores, n, self.factor, old_max, weights),
                Some(window) => {
                    let visible = position.saturating_sub(window)..position + window + 1;
                    let visible = visible.start.clamp(start, end) - start..visible.end.clamp(start, end) - start;
                    softmax_window::<I, E>(isa, scores, n, visible, self.factor, old_max, weights)
                }
            };
            row.max = max;
            if self.is_first {
                row.sum = sum;
                return;
            }
            if max == old_max {
                // Nothing to rescale. While no key has been visible, both are -infinity.
                row.sum += sum;
                return;
            }
            let rescale = exp2(isa, isa.splat((old_max - max) * self.factor), Accuracy::F32);
            row.sum = row.sum * isa.reduce_max(rescale) + sum;
            for at in (0..self.columns).step_by(I::LANES) {
                isa.store(context.add(at), isa.mul(isa.load(context.add(at)), rescale));
            }
        }
    }
}

/// Unnormalized softmax of one query's scores for a block of keys: `weight = 2^((score - max) factor)`, where `max`
/// includes `old_max`, the maximum of earlier blocks. Returns `max` and the sum of the block's weights.
///
/// # Safety
/// `scores` has n values. It is valid for reads, and `to` for writes, up to the end of the last vector.
#[inline(always)]
unsafe fn softmax_block<I: Isa, E: AttentionFormat>(
    isa: I,
    scores: *const f32,
    n: usize,
    factor: f32,
    old_max: f32,
    to: *mut E::Value,
) -> (f32, f32) {
    let whole = n / I::LANES * I::LANES;
    // SAFETY: guaranteed by the caller.
    unsafe {
        // Four independent maxima, because a single one would be limited by instruction latency.
        let mut parts = [isa.splat(old_max); 4];
        let unrolled = whole / (4 * I::LANES) * (4 * I::LANES);
        for at in (0..unrolled).step_by(4 * I::LANES) {
            for (i, part) in parts.iter_mut().enumerate() {
                *part = isa.max(*part, isa.load(scores.add(at + i * I::LANES)));
            }
        }
        for at in (unrolled..whole).step_by(I::LANES) {
            parts[0] = isa.max(parts[0], isa.load(scores.add(at)));
        }
        let mut max = isa.max(isa.max(parts[0], parts[1]), isa.max(parts[2], parts[3]));
        let last = if whole < n {
            isa.first_lanes(isa.load(scores.add(whole)), n - whole, f32::NEG_INFINITY)
        } else {
            isa.splat(f32::NEG_INFINITY)
        };
        max = isa.max(max, last);
        let max = isa.reduce_max(max);
        let (scale, shift) = (isa.splat(factor), isa.splat(-max * factor));
        let mut sum = isa.splat(0.0);
        for at in (0..whole).step_by(I::LANES) {
            let weight = exp2_with_accuracy::<I, E>(isa, isa.fma(isa.load(scores.add(at)), scale, shift));
            sum = isa.add(sum, weight);
            E::store(isa, to.add(at), I::LANES, weight);
        }
        if whole < n {
            let weight = exp2_with_accuracy::<I, E>(isa, isa.fma(last, scale, shift));
            let weight = isa.first_lanes(weight, n - whole, 0.0);
            sum = isa.add(sum, weight);
            // Stores a whole vector: its zeros pad the last k-group.
            E::store(isa, to.add(whole), I::LANES, weight);
        }
        (max, isa.reduce_sum(sum))
    }
}

/// [`softmax_block`] where only the keys in `visible` have weights; those of the other keys are zero. Without any visible key
/// it returns `old_max` and 0.
///
/// # Safety
/// As for [`softmax_block`]; `scores` must also be valid for writes.
#[inline(always)]
unsafe fn softmax_window<I: Isa, E: AttentionFormat>(
    isa: I,
    scores: *mut f32,
    n: usize,
    visible: Range<usize>,
    factor: f32,
    old_max: f32,
    to: *mut E::Value,
) -> (f32, f32) {
    // From the first vector with a visible key to the last.
    let (start, end) = match visible.is_empty() {
        true => (0, 0),
        false => (visible.start / I::LANES * I::LANES, visible.end.next_multiple_of(I::LANES)),
    };
    // SAFETY: guaranteed by the caller: both are valid up to the end of the last vector.
    unsafe {
        for at in (0..start).step_by(I::LANES).chain((end..n).step_by(I::LANES)) {
            E::store(isa, to.add(at), I::LANES, isa.splat(0.0));
        }
        let mut max = isa.splat(old_max);
        for at in (start..end).step_by(I::LANES) {
            if at < visible.start || at + I::LANES > visible.end {
                for hidden in (at..visible.start).chain(visible.end.max(at)..at + I::LANES) {
                    *scores.add(hidden) = f32::NEG_INFINITY;
                }
            }
            max = isa.max(max, isa.load(scores.add(at)));
        }
        if end == start {
            return (old_max, 0.0);
        }
        let max = isa.reduce_max(max);
        let (scale, shift) = (isa.splat(factor), isa.splat(-max * factor));
        let mut sum = isa.splat(0.0);
        for at in (start..end).step_by(I::LANES) {
            let mut weight = exp2_with_accuracy::<I, E>(isa, isa.fma(isa.load(scores.add(at)), scale, shift));
            if at < visible.start || at + I::LANES > visible.end {
                weight = isa.first_lanes(weight, visible.end.saturating_sub(at).min(I::LANES), 0.0);
                weight = without_first_lanes(isa, weight, visible.start.saturating_sub(at));
            }
            sum = isa.add(sum, weight);
            E::store(isa, to.add(at), I::LANES, weight);
        }
        (max, isa.reduce_sum(sum))
    }
}

/// x with zeros in its first n lanes.
#[inline(always)]
fn without_first_lanes<I: Isa>(isa: I, x: I::Floats, n: usize) -> I::Floats {
    let mut lanes = [0f32; MAX_LANES];
    // SAFETY: the array has room for the widest vector.
    unsafe {
        isa.store(lanes.as_mut_ptr(), x);
        lanes[..n].fill(0.0);
        isa.load(lanes.as_ptr())
    }
}

/// `2^x`, as accurate as the storage format requires.
#[inline(always)]
fn exp2_with_accuracy<I: Isa, E: AttentionFormat>(isa: I, x: I::Floats) -> I::Floats {
    match E::ACCURACY {
        Accuracy::F32 => exp2(isa, x, Accuracy::F32),
        Accuracy::Bf16 => isa.exp2_for_bf16(x),
    }
}
