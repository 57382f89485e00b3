//! How a batch is cut for the threads. Pure: no thread, no clock.

/// Tokens of a piece: enough for the products to run at their best, few enough for its rows to stay in a core's caches.
const PIECE_TOKENS: usize = 512;

/// How much more than its share a thread may have before the others help.
const SLACK: f64 = 1.08;

/// Sequences, by their place in the batch.
pub(super) type Piece = Vec<usize>;

/// A batch, cut.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Pieces that all threads compute together, one after the other, each operation split among them.
    pub(super) together: Vec<Piece>,
    /// Pieces for each thread by itself, which meets the others only at the end.
    pub(super) apart: Vec<Vec<Piece>>,
}

/// Deals the sequences out, longest first, each to the thread with least to do, and has those that would keep one thread at
/// work while the others wait computed together.
pub(super) fn cut(lengths: &[usize], threads: usize) -> Plan {
    let mut plan = Plan::default();
    let mut left: Vec<usize> = (0..lengths.len()).collect();
    left.sort_by_key(|&sequence| (std::cmp::Reverse(lengths[sequence]), sequence));
    if threads == 1 {
        plan.apart = vec![partition(&left, lengths, PIECE_TOKENS)];
        return plan;
    }
    let mut together = Vec::new();
    let dealt = loop {
        let dealt = deal(&left, lengths, threads);
        let tokens = |sequences: &Vec<usize>| sequences.iter().map(|&s| lengths[s]).sum::<usize>();
        let most = dealt.iter().max_by_key(|sequences| tokens(sequences)).expect("there is a thread");
        let share = left.iter().map(|&s| lengths[s]).sum::<usize>() as f64 / threads as f64;
        if left.is_empty() || tokens(most) as f64 <= share * SLACK {
            break dealt;
        }
        // The smallest sequence that evens the fullest thread out is worth the least waiting in step.
        let excess = tokens(most) as f64 - share;
        let enough = most.iter().rev().find(|&&s| lengths[s] as f64 >= excess);
        let chosen = *enough.unwrap_or(&most[0]);
        left.retain(|&sequence| sequence != chosen);
        together.push(chosen);
    };
    plan.together = partition(&together, lengths, PIECE_TOKENS * threads);
    plan.apart = dealt.iter().map(|sequences| partition(sequences, lengths, PIECE_TOKENS)).collect();
    plan
}

/// Each sequence, in the given order, to the thread with the fewest tokens.
fn deal(sequences: &[usize], lengths: &[usize], threads: usize) -> Vec<Vec<usize>> {
    let mut dealt = vec![(0, Vec::new()); threads];
    for &sequence in sequences {
        let (tokens, own) = dealt.iter_mut().min_by_key(|(tokens, _)| *tokens).expect("there is a thread");
        *tokens += lengths[sequence];
        own.push(sequence);
    }
    dealt.into_iter().map(|(_, own)| own).collect()
}

/// Neighbours up to `tokens` tokens; a longer sequence by itself. Within a piece, sequences are in the batch's order.
fn partition(sequences: &[usize], lengths: &[usize], tokens: usize) -> Vec<Piece> {
    let mut partition: Vec<Piece> = Vec::new();
    let mut room = 0;
    for &sequence in sequences {
        match partition.last_mut() {
            Some(last) if lengths[sequence] <= room => last.push(sequence),
            _ => {
                partition.push(vec![sequence]);
                room = tokens;
            }
        }
        room = room.saturating_sub(lengths[sequence]);
    }
    partition.iter_mut().for_each(|piece| piece.sort_unstable());
    partition
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_lone_pair_is_everyones() {
        assert_eq!(cut(&[128], 2), Plan { together: vec![vec![0]], apart: vec![vec![], vec![]] });
    }

    #[test]
    fn what_divides_evenly_needs_no_meeting() {
        let plan = cut(&[512; 4], 2);
        assert_eq!(plan, Plan { together: vec![], apart: vec![vec![vec![0], vec![2]], vec![vec![1], vec![3]]] });
    }

    #[test]
    fn an_odd_one_out_is_everyones() {
        assert_eq!(cut(&[512; 3], 2).together.concat().len(), 1);
    }

    #[test]
    fn short_ones_share_a_piece() {
        assert_eq!(cut(&[30, 31, 32, 33], 1).apart, [[[0, 1, 2, 3]]]);
    }

    proptest! {
        #[test]
        fn every_sequence_is_in_one_piece_and_no_thread_has_much_more(
            lengths in prop::collection::vec(1usize..2000, 1..60), threads in 1usize..9,
        ) {
            let plan = cut(&lengths, threads);
            let mut all: Vec<usize> = plan.together.concat();
            all.extend(plan.apart.iter().flatten().flatten());
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            let tokens = |partition: &Vec<Piece>| partition.iter().flatten().map(|&s| lengths[s]).sum::<usize>() as f64;
            let loads: Vec<f64> = plan.apart.iter().map(tokens).collect();
            let share = loads.iter().sum::<f64>() / threads as f64;
            prop_assert!(loads.iter().all(|&load| load <= share * SLACK + 1e-9));
            for piece in plan.apart.iter().flatten() {
                prop_assert!(piece.len() == 1 || piece.iter().map(|&s| lengths[s]).sum::<usize>() <= PIECE_TOKENS);
            }
        }
    }
}
