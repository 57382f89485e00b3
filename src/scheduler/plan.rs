//! Selects the waiting pairs of the next batch. Pure: no clock, no lock, no thread.
//!
//! The policy is a two-level feedback queue. A request is in the first level until [`FIRST_SERVICE_TOKENS`] of its tokens have
//! been planned, then in the second. A quarter of every batch is reserved for the second level, so that large requests advance
//! too. Room that one level does not use is available to the other.
//!
//! In each level, the next request is one of the client whose requests have received the fewest tokens (start-time fair queueing:
//! Goyal, Vin and Cheng, 1996). The requests of one client are first come, first served: requests of similar size finish one after
//! another instead of all finishing late together.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use crate::client::ClientId;

/// A request in the queue: the part that planning needs.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Id of the request's job.
    pub(super) job: u64,
    /// Whose request it is.
    pub(super) client: ClientId,
    /// Tokens of each of its pairs.
    pub(super) lengths: Vec<usize>,
    /// The first pair that is in no batch yet.
    pub(super) next: usize,
    /// Tokens of the pairs before `next`.
    pub(super) planned: usize,
}

/// The requests that have pairs in no batch yet.
#[derive(Debug, Default)]
pub(super) struct WaitingList {
    /// In order of arrival.
    requests: VecDeque<Waiting>,
    /// Tokens that have been planned for each client that has requests here. The count of a client that comes anew starts at the
    /// smallest count of the others, so that the client is neither preferred nor put last.
    served: BTreeMap<ClientId, usize>,
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
    pub(super) fn new(job: u64, client: ClientId, lengths: Vec<usize>) -> Self {
        Self { job, client, lengths, next: 0, planned: 0 }
    }

    fn is_in_first_level(&self) -> bool {
        self.planned < FIRST_SERVICE_TOKENS
    }

    fn is_done(&self) -> bool {
        self.next == self.lengths.len()
    }
}

impl WaitingList {
    pub(super) fn push(&mut self, request: Waiting) {
        let least = self.served.values().min().copied().unwrap_or(0);
        self.served.entry(request.client).or_insert(least);
        self.requests.push_back(request);
    }

    pub(super) fn remove(&mut self, job: u64) {
        self.retain(|request| request.job != job);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Whether some of a request's first-level tokens are not planned yet.
    pub(super) fn is_in_first_level(&self, job: u64) -> bool {
        self.requests.iter().any(|request| request.job == job && request.is_in_first_level())
    }

    /// Removes the next batch, of at most `max_tokens` tokens. A pair longer than the budget is a batch of its own.
    pub(super) fn next_batch(&mut self, max_tokens: usize) -> Vec<Slice> {
        let has_second_level = self.requests.iter().any(|request| !request.is_in_first_level());
        let reserved = if has_second_level { max_tokens / SECOND_LEVEL_SHARE } else { 0 };
        let mut batch = BatchPlan { slices: Vec::new(), room: max_tokens };
        batch.fill(self, true, reserved);
        if batch.slices.is_empty() {
            batch.fill(self, true, 0); // else a pair larger than the unreserved part would wait for ever
        }
        batch.fill(self, false, 0);
        batch.fill(self, true, 0);
        self.retain(|request| !request.is_done());
        batch.slices
    }

    /// Keeps the requests for which `keep` is true, and the counts of their clients.
    fn retain(&mut self, keep: impl Fn(&Waiting) -> bool) {
        let before = self.requests.len();
        self.requests.retain(keep);
        if self.requests.len() < before {
            self.served.retain(|&client, _| self.requests.iter().any(|request| request.client == client));
        }
    }
}

/// A batch while it is filled.
struct BatchPlan {
    slices: Vec<Slice>,
    /// Tokens that still fit.
    room: usize,
}

impl BatchPlan {
    /// Adds pairs of one level's requests. Stops at the first pair that would leave less than `reserved` tokens of room.
    fn fill(&mut self, list: &mut WaitingList, first_level: bool, reserved: usize) {
        let WaitingList { requests, served } = list;
        // Positions in `requests`, in order of arrival.
        let mut by_client: BTreeMap<ClientId, VecDeque<usize>> = BTreeMap::new();
        for (position, request) in requests.iter().enumerate() {
            if request.is_in_first_level() == first_level && !request.is_done() {
                by_client.entry(request.client).or_default().push_back(position);
            }
        }
        let next = |by_client: &mut BTreeMap<ClientId, VecDeque<usize>>, served: &BTreeMap<ClientId, usize>| {
            let waiting = by_client.iter_mut().filter(|(_, positions)| !positions.is_empty());
            let (_, positions) = waiting.min_by_key(|(client, positions)| (served[*client], positions[0]))?;
            positions.pop_front()
        };
        while let Some(position) = next(&mut by_client, served) {
            let request = &mut requests[position];
            let (start, planned) = (request.next, request.planned);
            let all_fit = self.plan(request, first_level, reserved);
            *served.entry(request.client).or_default() += request.planned - planned;
            self.push(request.job, start..request.next);
            if !all_fit {
                return;
            }
        }
    }

    /// Plans a request's pairs as far as they are in the level. False if one does not fit.
    fn plan(&mut self, request: &mut Waiting, first_level: bool, reserved: usize) -> bool {
        let start = request.next;
        while !request.is_done() && request.is_in_first_level() == first_level {
            let tokens = request.lengths[request.next];
            let is_first_pair = self.slices.is_empty() && request.next == start;
            // If no room is reserved, an empty batch accepts any pair, so that a pair longer than the budget is planned.
            let fits = tokens + reserved <= self.room || (is_first_pair && reserved == 0);
            if !fits {
                return false;
            }
            self.room = self.room.saturating_sub(tokens);
            request.next += 1;
            request.planned += tokens;
        }
        true
    }

    /// Appends a slice, or extends the last slice if these pairs follow it.
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

    fn queue(requests: &[&[usize]]) -> WaitingList {
        let mut list = WaitingList::default();
        for (job, lengths) in requests.iter().enumerate() {
            list.push(Waiting::new(job as u64, ClientId::Only, lengths.to_vec()));
        }
        list
    }

    /// A request of the client with key `client`.
    fn of(client: u32, job: u64, lengths: &[usize]) -> Waiting {
        Waiting::new(job, ClientId::Key(client), lengths.to_vec())
    }

    /// Each expected batch is the list of `(request, pairs)` in it.
    fn check(requests: &[&[usize]], max_tokens: usize, expected: &[&[(u64, Range<usize>)]]) {
        let mut waiting = queue(requests);
        for batch in expected {
            let planned: Vec<_> = waiting.next_batch(max_tokens).into_iter().map(|s| (s.job, s.pairs)).collect();
            assert_eq!(&planned, batch);
        }
        assert!(waiting.next_batch(max_tokens).is_empty());
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
            assert_eq!(waiting.next_batch(1000), [Slice { job: 0, pairs: batch..batch + 1 }]);
        }
        waiting.push(Waiting::new(1, ClientId::Only, vec![300; 4]));
        assert_eq!(waiting.next_batch(1300), [Slice { job: 1, pairs: 0..4 }]);
        assert_eq!(waiting.next_batch(1300), [Slice { job: 0, pairs: 5..6 }]);
    }

    #[test]
    fn the_first_level_ends_at_its_number_of_tokens() {
        const QUARTER: usize = FIRST_SERVICE_TOKENS / 4;
        let mut waiting = queue(&[&[QUARTER; 5], &[QUARTER]]);
        for _ in 0..4 {
            assert!(waiting.is_in_first_level(0));
            waiting.next_batch(QUARTER);
        }
        assert!(!waiting.is_in_first_level(0));
        assert!(waiting.is_in_first_level(1), "it has not had its turn");
        assert!(!waiting.is_in_first_level(2), "there is no such request");
    }

    #[test]
    fn a_quarter_of_a_batch_is_kept_for_large_requests() {
        let mut waiting = queue(&[&[100; 100]]);
        while waiting.requests[0].is_in_first_level() {
            waiting.next_batch(1000);
        }
        for job in 1..20 {
            waiting.push(Waiting::new(job, ClientId::Only, vec![100; 10]));
        }
        let batch = waiting.next_batch(1000);
        let large: usize = batch.iter().filter(|slice| slice.job == 0).map(|slice| slice.pairs.len()).sum();
        assert_eq!(large, 3, "250 tokens are reserved, and pairs have 100: {batch:?}");
    }

    #[test]
    fn a_pair_larger_than_the_unreserved_part_is_not_held_up_by_large_requests() {
        let mut waiting = queue(&[&[100; 200]]);
        while waiting.requests[0].is_in_first_level() {
            waiting.next_batch(1000);
        }
        for tokens in [900, 5000] {
            waiting.push(Waiting::new(1, ClientId::Only, vec![tokens]));
            assert_eq!(waiting.next_batch(1000)[0], Slice { job: 1, pairs: 0..1 }, "{tokens}");
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

    #[test]
    fn clients_take_turns_and_each_is_served_in_order() {
        let mut waiting = WaitingList::default();
        for job in 0..4 {
            waiting.push(of(1, job, &[500]));
        }
        waiting.push(of(2, 10, &[500]));
        waiting.push(of(2, 11, &[500]));
        let mut order = Vec::new();
        while !waiting.is_empty() {
            order.extend(waiting.next_batch(500).into_iter().map(|slice| slice.job));
        }
        assert_eq!(order, [0, 10, 1, 11, 2, 3]);
    }

    #[test]
    fn a_client_that_comes_back_has_neither_credit_nor_debt() {
        let mut waiting = WaitingList::default();
        for job in 0..6 {
            waiting.push(of(1, job, &[1000]));
        }
        (0..3).for_each(|_| drop(waiting.next_batch(1000)));
        for job in 10..13 {
            waiting.push(of(2, job, &[1000]));
        }
        let order: Vec<u64> = (0..6).map(|_| waiting.next_batch(1000)[0].job).collect();
        assert_eq!(order, [3, 10, 4, 11, 5, 12]);
        assert!(waiting.is_empty() && waiting.served.is_empty());
    }

    #[test]
    fn clients_are_charged_by_tokens_not_by_requests() {
        let mut waiting = WaitingList::default();
        for job in 0..2 {
            waiting.push(of(1, job, &[900]));
        }
        for job in 10..20 {
            waiting.push(of(2, job, &[100]));
        }
        let order: Vec<u64> = (0..3).flat_map(|_| waiting.next_batch(900)).map(|slice| slice.job).collect();
        assert_eq!(order, [0, 10, 11, 12, 13, 14, 15, 16, 17, 18, 1], "900 tokens of each in turn");
    }

    /// A waiting pair of the reference. Its level follows from the tokens of the pairs before it in its request.
    #[derive(Debug, Clone)]
    struct WaitingPair {
        job: u64,
        client: ClientId,
        index: usize,
        tokens: usize,
        is_first_level: bool,
    }

    /// The policy, pair by pair.
    #[derive(Default)]
    struct Reference {
        /// In order of arrival, then of pairs.
        waiting: Vec<WaitingPair>,
        served: BTreeMap<ClientId, usize>,
    }

    impl Reference {
        fn arrive(&mut self, job: u64, client: ClientId, lengths: &[usize]) {
            let least = self.served.values().min().copied().unwrap_or(0);
            self.served.entry(client).or_insert(least);
            let mut before = 0;
            for (index, &tokens) in lengths.iter().enumerate() {
                let is_first_level = before < FIRST_SERVICE_TOKENS;
                self.waiting.push(WaitingPair { job, client, index, tokens, is_first_level });
                before += tokens;
            }
        }

        fn leave(&mut self, job: u64) {
            self.waiting.retain(|pair| pair.job != job);
            self.forget_absent_clients();
        }

        fn forget_absent_clients(&mut self) {
            self.served.retain(|client, _| self.waiting.iter().any(|pair| pair.client == *client));
        }

        /// Whether pair `i` is the first waiting pair of its request, and of this level.
        fn is_eligible(&self, i: usize, is_first_level: bool) -> bool {
            let pair = &self.waiting[i];
            pair.is_first_level == is_first_level && self.waiting[..i].iter().all(|before| before.job != pair.job)
        }

        /// The next batch, in the order of planning.
        fn batch(&mut self, max_tokens: usize) -> Vec<WaitingPair> {
            let has_second = (0..self.waiting.len()).any(|i| self.is_eligible(i, false));
            let reserved = if has_second { max_tokens / 4 } else { 0 };
            let (mut batch, mut room) = (Vec::<WaitingPair>::new(), max_tokens);
            for (phase, (is_first_level, reserved)) in
                [(true, reserved), (true, 0), (false, 0), (true, 0)].into_iter().enumerate()
            {
                if phase == 1 && !batch.is_empty() {
                    continue;
                }
                let mut current = None; // the request whose turn it is
                loop {
                    let eligible = (0..self.waiting.len()).filter(|&i| self.is_eligible(i, is_first_level));
                    let next = eligible.min_by_key(|&i| {
                        let pair = &self.waiting[i];
                        (current != Some(pair.job), self.served[&pair.client], i)
                    });
                    let Some(i) = next else { break };
                    let tokens = self.waiting[i].tokens;
                    if tokens + reserved > room && !(batch.is_empty() && reserved == 0) {
                        break;
                    }
                    room = room.saturating_sub(tokens);
                    let pair = self.waiting.remove(i);
                    *self.served.get_mut(&pair.client).unwrap() += tokens;
                    current = Some(pair.job);
                    batch.push(pair);
                }
            }
            self.forget_absent_clients();
            batch
        }
    }

    /// What happens to a queue.
    #[derive(Debug, Clone)]
    enum Step {
        Arrive(ClientId, Vec<usize>),
        Leave(usize),
        Batch,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let lengths = prop_oneof![1usize..600, 1usize..3000];
        let step = prop_oneof![
            2 => (0u32..3, prop::collection::vec(lengths, 1..16))
                .prop_map(|(key, lengths)| Step::Arrive(ClientId::Key(key), lengths)),
            1 => (0usize..8).prop_map(Step::Leave),
            3 => Just(Step::Batch),
        ];
        prop::collection::vec(step, 1..16)
    }

    proptest! {
        #[test]
        fn batches_are_those_of_the_reference(steps in steps(), max_tokens in 1usize..4000) {
            let (mut waiting, mut reference) = (WaitingList::default(), Reference::default());
            let drain = std::iter::repeat_with(|| Step::Batch); // after the given steps, of which there are at most 15
            for (job, step) in steps.into_iter().chain(drain).enumerate() {
                match step {
                    Step::Arrive(client, lengths) => {
                        reference.arrive(job as u64, client, &lengths);
                        waiting.push(Waiting::new(job as u64, client, lengths));
                    }
                    Step::Leave(i) => {
                        if let Some(job) = waiting.requests.get(i).map(|request| request.job) {
                            waiting.remove(job);
                            reference.leave(job);
                        }
                    }
                    Step::Batch => {
                        let is_last = reference.waiting.is_empty();
                        let batch = waiting.next_batch(max_tokens);
                        let pairs = |slice: &Slice| slice.pairs.clone().map(|index| (slice.job, index)).collect::<Vec<_>>();
                        let found: Vec<_> = batch.iter().flat_map(pairs).collect();
                        let expected = reference.batch(max_tokens);
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
                let batch = waiting.next_batch(max_tokens);
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
            waiting.push(Waiting::new(small, ClientId::Only, vec![100]));
            let mut before = 0;
            loop {
                let batch = waiting.next_batch(2000);
                if batch.iter().any(|slice| slice.job == small) { break; }
                before += batch.iter().map(|slice| 500 * slice.pairs.len()).sum::<usize>();
            }
            prop_assert!(before <= (FIRST_SERVICE_TOKENS + 500) * requests.len() * 4 / 3 + 2000, "{before}");
        }
    }
}
