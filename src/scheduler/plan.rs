//! Selects the waiting pairs of the next batch. Pure: no clock, no lock, no thread.
//!
//! The policy is a two-level feedback queue. A request is in the first level until [`FIRST_SERVICE_TOKENS`] of its tokens have
//! been planned, then in the second. Each level is first come, first served: requests of similar size finish one after another
//! instead of all finishing late together. A quarter of every batch is reserved for the second level, so that large requests
//! advance too. Room that one level does not use is available to the other.

use std::collections::VecDeque;
use std::ops::Range;

/// A request in the queue: the part that planning needs.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Id of the request's job.
    pub(super) job: u64,
    /// Tokens of each of its pairs.
    pub(super) lengths: Vec<usize>,
    /// The first pair that is in no batch yet.
    pub(super) next: usize,
    /// Tokens of the pairs before `next`.
    pub(super) planned: usize,
}

/// Some consecutive pairs of one request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Slice {
    pub(super) job: u64,
    pub(super) pairs: Range<usize>,
}

/// Tokens of a request that are planned in the first level: about 30 short documents.
pub(super) const FIRST_SERVICE_TOKENS: usize = 4096;
/// The second level's guaranteed share of a batch is 1 / `SECOND_LEVEL_SHARE`.
const SECOND_LEVEL_SHARE: usize = 4;

impl Waiting {
    pub(super) fn new(job: u64, lengths: Vec<usize>) -> Self {
        Self { job, lengths, next: 0, planned: 0 }
    }

    pub(super) fn is_in_first_level(&self) -> bool {
        self.planned < FIRST_SERVICE_TOKENS
    }

    fn is_done(&self) -> bool {
        self.next == self.lengths.len()
    }
}

/// Removes the next batch, of at most `max_tokens` tokens, from `waiting`, which is in order of arrival. A pair longer than the
/// budget is a batch of its own.
pub(super) fn next_batch(waiting: &mut VecDeque<Waiting>, max_tokens: usize) -> Vec<Slice> {
    let has_second_level = waiting.iter().any(|request| !request.is_in_first_level());
    let reserved = if has_second_level { max_tokens / SECOND_LEVEL_SHARE } else { 0 };
    let mut batch = BatchPlan { slices: Vec::new(), room: max_tokens };
    batch.fill(waiting, true, reserved);
    if batch.slices.is_empty() {
        batch.fill(waiting, true, 0); // a first pair that is larger than the unreserved part must not wait for ever
    }
    batch.fill(waiting, false, 0);
    batch.fill(waiting, true, 0);
    waiting.retain(|request| !request.is_done());
    batch.slices
}

/// A batch while it is filled.
struct BatchPlan {
    slices: Vec<Slice>,
    /// Tokens that still fit.
    room: usize,
}

impl BatchPlan {
    /// Adds pairs of one level's requests in order of arrival. Stops at the first pair that would leave less than `reserved`
    /// tokens of room.
    fn fill(&mut self, waiting: &mut VecDeque<Waiting>, first_level: bool, reserved: usize) {
        for request in waiting.iter_mut() {
            let start = request.next;
            while !request.is_done() && request.is_in_first_level() == first_level {
                let tokens = request.lengths[request.next];
                let is_first_pair = self.slices.is_empty() && request.next == start;
                // If no room is reserved, an empty batch accepts any pair, so that a pair longer than the budget is planned.
                let fits = tokens + reserved <= self.room || (is_first_pair && reserved == 0);
                if !fits {
                    self.push(request.job, start..request.next);
                    return;
                }
                self.room = self.room.saturating_sub(tokens);
                request.next += 1;
                request.planned += tokens;
            }
            self.push(request.job, start..request.next);
        }
    }

    /// Appends a slice, joined to the last one if it continues it.
    fn push(&mut self, job: u64, pairs: Range<usize>) {
        match self.slices.last_mut() {
            _ if pairs.is_empty() => {}
            Some(last) if last.job == job && last.pairs.end == pairs.start => last.pairs.end = pairs.end,
            _ => self.slices.push(Slice { job, pairs }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn queue(requests: &[&[usize]]) -> VecDeque<Waiting> {
        requests.iter().enumerate().map(|(job, lengths)| Waiting::new(job as u64, lengths.to_vec())).collect()
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
    fn equal_requests_are_served_in_order_of_arrival() {
        check(
            &[&[400; 3], &[400; 3], &[400; 3]],
            1000,
            &[&[(0, 0..2)], &[(0, 2..3), (1, 0..1)], &[(1, 1..3)], &[(2, 0..2)], &[(2, 2..3)]],
        );
    }

    #[test]
    fn a_small_request_overtakes_what_is_left_of_a_large_one() {
        // After 5 batches the large request is in the second level, and the small one takes precedence.
        let mut waiting = queue(&[&[1000; 8]]);
        for batch in 0..5 {
            assert_eq!(next_batch(&mut waiting, 1000), [Slice { job: 0, pairs: batch..batch + 1 }]);
        }
        waiting.push_back(Waiting::new(1, vec![300; 4]));
        assert_eq!(next_batch(&mut waiting, 1300), [Slice { job: 1, pairs: 0..4 }]);
        assert_eq!(next_batch(&mut waiting, 1300), [Slice { job: 0, pairs: 5..6 }]);
    }

    #[test]
    fn a_quarter_of_a_batch_is_kept_for_large_requests() {
        let mut waiting = queue(&[&[100; 100]]);
        while waiting[0].is_in_first_level() {
            next_batch(&mut waiting, 1000);
        }
        for job in 1..20 {
            waiting.push_back(Waiting::new(job, vec![100; 10]));
        }
        let batch = next_batch(&mut waiting, 1000);
        let large: usize = batch.iter().filter(|slice| slice.job == 0).map(|slice| slice.pairs.len()).sum();
        assert_eq!(large, 3, "{batch:?}");
    }

    #[test]
    fn a_pair_larger_than_the_unreserved_part_is_not_held_up_by_large_requests() {
        let mut waiting = queue(&[&[100; 200]]);
        while waiting[0].is_in_first_level() {
            next_batch(&mut waiting, 1000);
        }
        for tokens in [900, 5000] {
            waiting.push_back(Waiting::new(1, vec![tokens]));
            assert_eq!(next_batch(&mut waiting, 1000)[0], Slice { job: 1, pairs: 0..1 }, "{tokens}");
        }
    }

    #[test]
    fn a_pair_beyond_the_budget_runs_alone() {
        check(&[&[50, 5000, 50]], 1000, &[&[(0, 0..1)], &[(0, 1..2)], &[(0, 2..3)]]);
    }

    #[test]
    fn a_request_that_did_not_fit_comes_first_in_the_next_batch() {
        check(&[&[600], &[600], &[10]], 1000, &[&[(0, 0..1)], &[(1, 0..1), (2, 0..1)]]);
    }

    /// A waiting pair of the reference. Its level follows from the tokens of its request before it.
    #[derive(Debug, Clone)]
    struct WaitingPair {
        job: u64,
        index: usize,
        tokens: usize,
        is_first_level: bool,
    }

    /// The policy, pair by pair: `waiting` is in order of arrival, then of pairs. Returns the batch in the order of planning.
    fn reference_batch(waiting: &mut Vec<WaitingPair>, max_tokens: usize) -> Vec<WaitingPair> {
        let is_next = |waiting: &[WaitingPair], i: usize| waiting[..i].iter().all(|pair| pair.job != waiting[i].job);
        let has_second = (0..waiting.len()).any(|i| is_next(waiting, i) && !waiting[i].is_first_level);
        let reserved = if has_second { max_tokens / 4 } else { 0 };
        let (mut batch, mut room) = (Vec::new(), max_tokens);
        for (phase, (is_first_level, reserved)) in
            [(true, reserved), (true, 0), (false, 0), (true, 0)].into_iter().enumerate()
        {
            if phase == 1 && !batch.is_empty() {
                continue;
            }
            let eligible =
                |waiting: &[WaitingPair], i: usize| is_next(waiting, i) && waiting[i].is_first_level == is_first_level;
            while let Some(i) = (0..waiting.len()).find(|&i| eligible(waiting, i)) {
                let tokens = waiting[i].tokens;
                if tokens + reserved > room && !(batch.is_empty() && reserved == 0) {
                    break;
                }
                room = room.saturating_sub(tokens);
                batch.push(waiting.remove(i));
            }
        }
        batch
    }

    /// What happens to a queue.
    #[derive(Debug, Clone)]
    enum Step {
        Arrive(Vec<usize>),
        Leave(usize),
        Batch,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let lengths = prop_oneof![1usize..600, 1usize..3000];
        let step = prop_oneof![
            2 => prop::collection::vec(lengths, 1..16).prop_map(Step::Arrive),
            1 => (0usize..8).prop_map(Step::Leave),
            3 => Just(Step::Batch),
        ];
        prop::collection::vec(step, 1..16)
    }

    proptest! {
        #[test]
        fn batches_are_those_of_the_reference(steps in steps(), max_tokens in 1usize..4000) {
            let (mut waiting, mut reference) = (VecDeque::new(), Vec::new());
            let drain = std::iter::repeat_with(|| Step::Batch);
            for (job, step) in steps.into_iter().chain(drain).enumerate() {
                match step {
                    Step::Arrive(lengths) => {
                        let mut before = 0;
                        for (index, &tokens) in lengths.iter().enumerate() {
                            let is_first_level = before < FIRST_SERVICE_TOKENS;
                            reference.push(WaitingPair { job: job as u64, index, tokens, is_first_level });
                            before += tokens;
                        }
                        waiting.push_back(Waiting::new(job as u64, lengths));
                    }
                    Step::Leave(i) => {
                        if let Some(request) = waiting.remove(i) {
                            reference.retain(|pair| pair.job != request.job);
                        }
                    }
                    Step::Batch => {
                        let is_last = reference.is_empty();
                        let batch = next_batch(&mut waiting, max_tokens);
                        let pairs = |slice: &Slice| slice.pairs.clone().map(|index| (slice.job, index)).collect::<Vec<_>>();
                        let found: Vec<_> = batch.iter().flat_map(pairs).collect();
                        let expected = reference_batch(&mut reference, max_tokens);
                        let tokens: usize = expected.iter().map(|pair| pair.tokens).sum();
                        prop_assert!(tokens <= max_tokens || expected.len() == 1);
                        prop_assert_eq!(found, expected.iter().map(|pair| (pair.job, pair.index)).collect::<Vec<_>>());
                        prop_assert!(is_last == batch.is_empty(), "a queue that is not empty gives a batch");
                        if is_last && job >= 16 { break; }
                    }
                }
            }
            prop_assert!(waiting.is_empty());
        }

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

        /// A request waits at most for the first-level tokens of the requests before it and for the second level's share.
        #[test]
        fn a_request_waits_for_a_bounded_number_of_tokens(large in prop::collection::vec(50_000usize..200_000, 1..6)) {
            let requests: Vec<Vec<usize>> = large.iter().map(|&tokens| vec![500; tokens / 500]).collect();
            let slices: Vec<&[usize]> = requests.iter().map(Vec::as_slice).collect();
            let mut waiting = queue(&slices);
            let small = requests.len() as u64;
            waiting.push_back(Waiting::new(small, vec![100]));
            let mut before = 0;
            loop {
                let batch = next_batch(&mut waiting, 2000);
                if batch.iter().any(|slice| slice.job == small) { break; }
                before += batch.iter().map(|slice| 500 * slice.pairs.len()).sum::<usize>();
            }
            prop_assert!(before <= (FIRST_SERVICE_TOKENS + 500) * requests.len() * 4 / 3 + 2000, "{before}");
        }
    }
}
