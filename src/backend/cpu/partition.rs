//! Splits a batch into partitions and assigns them to threads. Pure functions.

/// Maximum tokens of a partition with several sequences: enough for GEMMs to run at full speed, few enough for activations to stay
/// in a core's cache.
const PARTITION_TOKENS: usize = 512;

/// Maximum tokens assigned to one thread, as a multiple of the mean over all threads.
const MAX_IMBALANCE: f64 = 1.08;

/// Indices of sequences in the batch.
pub(super) type Partition = Vec<usize>;

/// A batch, split into partitions.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Partitioning {
    /// Computed first, one after the other, with every operation split over all threads.
    pub(super) shared: Vec<Partition>,
    /// The partitions assigned to each thread. A single thread computes each; threads synchronize only at the end.
    pub(super) per_thread: Vec<Vec<Partition>>,
}

/// Splits a batch of sequences of the given lengths, in tokens.
///
/// Sequences are assigned longest first, each to the thread with the fewest tokens (longest-processing-time
/// scheduling). While a thread has more than [`MAX_IMBALANCE`] times the mean, one of its sequences becomes shared.
pub(super) fn partition_batch(lengths: &[usize], threads: usize) -> Partitioning {
    let mut partitioning = Partitioning::default();
    let mut remaining: Vec<usize> = (0..lengths.len()).collect();
    remaining.sort_by_key(|&sequence| (std::cmp::Reverse(lengths[sequence]), sequence));
    if threads == 1 {
        partitioning.per_thread = vec![group_by_tokens(&remaining, lengths, PARTITION_TOKENS)];
        return partitioning;
    }
    let mut shared = Vec::new();
    let assigned = loop {
        let assigned = assign(&remaining, lengths, threads);
        let tokens = |sequences: &Vec<usize>| sequences.iter().map(|&s| lengths[s]).sum::<usize>();
        let most = assigned.iter().max_by_key(|sequences| tokens(sequences)).expect("threads is at least 1");
        let mean = remaining.iter().map(|&s| lengths[s]).sum::<usize>() as f64 / threads as f64;
        if remaining.is_empty() || tokens(most) as f64 <= mean * MAX_IMBALANCE {
            break assigned;
        }
        // The shortest sequence that removes the imbalance, or else the longest: tokens of shared sequences cost a barrier after
        // every operation.
        let excess = tokens(most) as f64 - mean;
        let shortest = most.iter().rev().find(|&&s| lengths[s] as f64 >= excess);
        let chosen = *shortest.unwrap_or(&most[0]);
        remaining.retain(|&sequence| sequence != chosen);
        shared.push(chosen);
    };
    partitioning.shared = group_by_tokens(&shared, lengths, PARTITION_TOKENS * threads);
    partitioning.per_thread =
        assigned.iter().map(|sequences| group_by_tokens(sequences, lengths, PARTITION_TOKENS)).collect();
    partitioning
}

/// Assigns each sequence, in the given order, to the thread with the fewest tokens. Returns the sequences of each
/// thread.
fn assign(sequences: &[usize], lengths: &[usize], threads: usize) -> Vec<Vec<usize>> {
    let mut assigned = vec![(0, Vec::new()); threads];
    for &sequence in sequences {
        let (tokens, own) = assigned.iter_mut().min_by_key(|(tokens, _)| *tokens).expect("threads is at least 1");
        *tokens += lengths[sequence];
        own.push(sequence);
    }
    assigned.into_iter().map(|(_, own)| own).collect()
}

/// Groups consecutive sequences up to `tokens` tokens; a longer sequence gets its own group. Indices in a group ascend.
fn group_by_tokens(sequences: &[usize], lengths: &[usize], tokens: usize) -> Vec<Partition> {
    let mut partitions: Vec<Partition> = Vec::new();
    let mut room = 0;
    for &sequence in sequences {
        match partitions.last_mut() {
            Some(last) if lengths[sequence] <= room => last.push(sequence),
            _ => {
                partitions.push(vec![sequence]);
                room = tokens;
            }
        }
        room = room.saturating_sub(lengths[sequence]);
    }
    partitions.iter_mut().for_each(|partition| partition.sort_unstable());
    partitions
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_single_sequence_is_shared_by_all_threads() {
        assert_eq!(
            partition_batch(&[128], 2),
            Partitioning { shared: vec![vec![0]], per_thread: vec![vec![], vec![]] }
        );
    }

    #[test]
    fn sequences_that_divide_evenly_are_not_shared() {
        let partitioning = partition_batch(&[512; 4], 2);
        assert_eq!(
            partitioning,
            Partitioning { shared: vec![], per_thread: vec![vec![vec![0], vec![2]], vec![vec![1], vec![3]]] }
        );
    }

    #[test]
    fn of_three_equal_sequences_on_two_threads_one_is_shared() {
        assert_eq!(partition_batch(&[512; 3], 2).shared.concat().len(), 1);
    }

    #[test]
    fn short_sequences_are_grouped_into_one_partition() {
        assert_eq!(partition_batch(&[30, 31, 32, 33], 1).per_thread, [[[0, 1, 2, 3]]]);
    }

    proptest! {
        #[test]
        fn every_sequence_is_in_one_partition_and_threads_are_balanced(
            lengths in prop::collection::vec(1usize..2000, 1..60), threads in 1usize..9,
        ) {
            let partitioning = partition_batch(&lengths, threads);
            let mut all: Vec<usize> = partitioning.shared.concat();
            all.extend(partitioning.per_thread.iter().flatten().flatten());
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            let tokens = |partitions: &Vec<Partition>| partitions.iter().flatten().map(|&s| lengths[s]).sum::<usize>() as f64;
            let loads: Vec<f64> = partitioning.per_thread.iter().map(tokens).collect();
            let mean = loads.iter().sum::<f64>() / threads as f64;
            prop_assert!(loads.iter().all(|&load| load <= mean * MAX_IMBALANCE + 1e-9));
            for partition in partitioning.per_thread.iter().flatten() {
                prop_assert!(partition.len() == 1 || partition.iter().map(|&s| lengths[s]).sum::<usize>() <= PARTITION_TOKENS);
            }
        }
    }
}
