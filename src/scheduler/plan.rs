//! Which waiting pairs make the next batch. Pure: no clock, no lock, no thread.

use std::collections::VecDeque;
use std::ops::Range;

/// A request in the queue, as far as planning sees it.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Whose it is.
    pub(super) job: u64,
    /// Tokens of each of its pairs.
    pub(super) lengths: Vec<usize>,
    /// The first pair that is in no batch yet.
    pub(super) next: usize,
}

/// Some consecutive pairs of one request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Slice {
    pub(super) job: u64,
    pub(super) pairs: Range<usize>,
}

/// Tokens of one request before the next has its turn (it has at least one pair).
const TURN_TOKENS: usize = 512;

/// Fills one batch up to `max_tokens`: requests in turn, some tokens each, until the budget is met or nothing waits.
///
/// A request with one pair waits for at most one turn of every other, however large they are. The request whose pair no
/// longer fits keeps its turn, so nothing is overtaken for ever; a pair longer than the budget runs alone.
pub(super) fn next_batch(waiting: &mut VecDeque<Waiting>, max_tokens: usize) -> Vec<Slice> {
    let mut batch: Vec<Slice> = Vec::new();
    let mut room = max_tokens;
    while let Some(mut request) = waiting.pop_front() {
        let start = request.next;
        let mut turn = TURN_TOKENS;
        let mut full = false;
        while let Some(&tokens) = request.lengths.get(request.next) {
            let first_of_all = batch.is_empty() && request.next == start;
            full = tokens > room && !first_of_all;
            if full || (tokens > turn && request.next > start) {
                break;
            }
            (room, turn) = (room.saturating_sub(tokens), turn.saturating_sub(tokens));
            request.next += 1;
        }
        add(&mut batch, request.job, start..request.next);
        if full {
            waiting.push_front(request);
            break;
        }
        if request.next < request.lengths.len() {
            waiting.push_back(request);
        }
    }
    batch
}

/// Appends a slice, joined to the last one where it continues it.
fn add(batch: &mut Vec<Slice>, job: u64, pairs: Range<usize>) {
    match batch.last_mut() {
        _ if pairs.is_empty() => {}
        Some(last) if last.job == job && last.pairs.end == pairs.start => last.pairs.end = pairs.end,
        _ => batch.push(Slice { job, pairs }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn queue(requests: &[&[usize]]) -> VecDeque<Waiting> {
        let waiting =
            |(job, lengths): (usize, &&[usize])| Waiting { job: job as u64, lengths: lengths.to_vec(), next: 0 };
        requests.iter().enumerate().map(waiting).collect()
    }

    /// Each expected batch is the list of `(request, pairs)` in it.
    fn check(requests: &[&[usize]], max_tokens: usize, expected: &[&[(u64, Range<usize>)]]) {
        let mut waiting = queue(requests);
        for batch in expected {
            let planned: Vec<_> = next_batch(&mut waiting, max_tokens).into_iter().map(|s| (s.job, s.pairs)).collect();
            assert_eq!(&planned, batch);
        }
        assert!(next_batch(&mut waiting, max_tokens).is_empty());
    }

    #[test]
    fn one_request_fills_batches_in_order() {
        check(&[&[300, 300, 300, 300]], 1000, &[&[(0, 0..3)], &[(0, 3..4)]]);
    }

    #[test]
    fn a_small_request_rides_in_the_first_batch_of_a_large_one() {
        check(&[&[400; 5], &[100]], 1000, &[&[(0, 0..1), (1, 0..1), (0, 1..2)], &[(0, 2..4)], &[(0, 4..5)]]);
    }

    #[test]
    fn a_pair_beyond_the_budget_runs_alone() {
        check(&[&[50, 5000, 50]], 1000, &[&[(0, 0..1)], &[(0, 1..2)], &[(0, 2..3)]]);
    }

    #[test]
    fn the_request_that_did_not_fit_goes_first_next_time() {
        check(&[&[600], &[600], &[10]], 1000, &[&[(0, 0..1)], &[(1, 0..1), (2, 0..1)]]);
    }

    proptest! {
        #[test]
        fn every_pair_is_planned_once_and_in_order(
            requests in prop::collection::vec(prop::collection::vec(1usize..3000, 1..20), 1..10), max_tokens in 1usize..4000,
        ) {
            let slices: Vec<&[usize]> = requests.iter().map(Vec::as_slice).collect();
            let mut waiting = queue(&slices);
            let mut seen = vec![0; requests.len()];
            loop {
                let batch = next_batch(&mut waiting, max_tokens);
                if batch.is_empty() { break; }
                let lengths = batch.iter().flat_map(|s| &requests[s.job as usize][s.pairs.clone()]);
                prop_assert!(lengths.clone().sum::<usize>() <= max_tokens || lengths.count() == 1);
                for slice in batch {
                    prop_assert_eq!(slice.pairs.start, seen[slice.job as usize]);
                    seen[slice.job as usize] = slice.pairs.end;
                }
            }
            prop_assert!(seen.iter().zip(&requests).all(|(&n, pairs)| n == pairs.len()));
        }
    }
}
