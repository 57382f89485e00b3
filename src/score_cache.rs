//! Logits of pairs that were scored before, in bounded memory.
//!
//! A logit depends on the model and on the pair's token ids and segment ids only. So a model's cache finds it by 128 bits of the
//! SHA-256 digest of these ids, of the client, and of a random secret. Among a billion pairs, two have the same 128 bits with a
//! probability of 1e-21, and a client cannot search for such pairs without the secret. A client finds only pairs of its own
//! requests: the response times would otherwise tell it what others ask.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use ::metrics::{Counter, Gauge};
use bytemuck::cast_slice;
use quick_cache::sync::Cache;
use sha2::{Digest, Sha256};

use crate::batch::Pair;
use crate::client::ClientId;
use crate::telemetry::metrics;

/// Memory of an entry in bytes: key, logit, links, its part of the hash table, and half a key that remembers what was evicted. Measured
/// with 20,000 to 1,700,000 entries: 71 to 89.
const ENTRY_BYTES: usize = 89;

type PairKey = [u8; 16];

/// The logits of one model's pairs. Frequently used pairs stay longest (CLOCK-Pro).
pub struct ScoreCache {
    logits: Cache<PairKey, f32>,
    secret: [u8; 32],
    hits: Counter,
    misses: Counter,
    entries: Gauge,
    bytes: Gauge,
    /// Entries that the gauges contain.
    reported: AtomicUsize,
}

/// What the cache knows of the pairs of a request.
#[derive(Debug)]
pub struct CacheLookup {
    /// One for each pair; 0 where the cache has none.
    logits: Vec<f32>,
    /// The position and the key of each pair that the cache does not have.
    missing: Vec<(usize, PairKey)>,
}

impl ScoreCache {
    /// An empty cache of at most `bytes` bytes; `None` if that is 0. `model` is the model's name in metrics.
    pub fn new(model: &str, bytes: usize) -> Option<Self> {
        let label = || [model.to_owned()];
        (bytes > 0).then(|| Self {
            logits: Cache::new((bytes / ENTRY_BYTES).max(1)),
            secret: secret(),
            hits: metrics::SCORE_CACHE_HITS.counter(label()),
            misses: metrics::SCORE_CACHE_MISSES.counter(label()),
            entries: metrics::SCORE_CACHE_ENTRIES.gauge(label()),
            bytes: metrics::SCORE_CACHE_BYTES.gauge(label()),
            reported: AtomicUsize::new(0),
        })
    }

    /// Looks up the pairs of a client's request. Returns what is known, and the pairs that have to be scored.
    pub fn look_up(&self, client: ClientId, pairs: Vec<Pair>) -> (CacheLookup, Vec<Pair>) {
        let client = match client {
            ClientId::Only => 0,
            ClientId::Key(number) => u64::from(number) + 1,
        };
        let prefix = Sha256::new_with_prefix(self.secret).chain_update(client.to_le_bytes());
        let mut lookup = CacheLookup { logits: Vec::with_capacity(pairs.len()), missing: Vec::new() };
        let mut to_score = Vec::new();
        for (i, pair) in pairs.into_iter().enumerate() {
            // As many segment ids as token ids, so that no two pairs have the same bytes.
            let bytes = prefix.clone().chain_update(cast_slice(pair.ids())).chain_update(pair.type_ids());
            let key = *bytes.finalize().first_chunk().expect("a digest has 32 bytes");
            let known = self.logits.get(&key);
            lookup.logits.push(known.unwrap_or(0.0));
            if known.is_none() {
                lookup.missing.push((i, key));
                to_score.push(pair);
            }
        }
        self.hits.increment((lookup.logits.len() - to_score.len()) as u64);
        self.misses.increment(to_score.len() as u64);
        (lookup, to_score)
    }

    /// Adds the logits of the pairs that had to be scored, and returns those of all pairs of the request.
    pub fn complete(&self, lookup: CacheLookup, scored: &[f32]) -> Vec<f32> {
        let CacheLookup { mut logits, missing } = lookup;
        for ((i, key), &logit) in missing.into_iter().zip(scored) {
            logits[i] = logit;
            self.logits.insert(key, logit);
        }
        self.report(self.logits.len());
        logits
    }

    /// Changes the gauges by the difference to the last report, because models of one name share them during a reload.
    fn report(&self, entries: usize) {
        let more = entries as f64 - self.reported.swap(entries, Relaxed) as f64;
        self.entries.increment(more);
        self.bytes.increment(more * ENTRY_BYTES as f64);
    }
}

impl Drop for ScoreCache {
    fn drop(&mut self) {
        self.report(0);
    }
}

impl std::fmt::Debug for ScoreCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ScoreCache of {} logits", self.logits.len())
    }
}

/// Random bytes: hashes with keys from the operating system.
fn secret() -> [u8; 32] {
    let random = RandomState::new();
    std::array::from_fn(|i| random.hash_one(i) as u8)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pair(ids: &[u32], types: &[u8]) -> Pair {
        Pair::new(ids.to_vec(), types.to_vec())
    }

    #[test]
    fn only_the_same_pair_of_the_same_client_is_found() {
        let cache = ScoreCache::new("m", 1 << 16).unwrap();
        let first = || pair(&[1, 2, 3], &[0, 0, 1]);
        let (lookup, missing) = cache.look_up(ClientId::Key(0), vec![first()]);
        assert_eq!(missing, [first()]);
        assert_eq!(cache.complete(lookup, &[0.5]), [0.5]);
        for (client, other) in [
            (ClientId::Only, first()),
            (ClientId::Key(1), first()),
            (ClientId::Key(0), pair(&[1, 2, 3], &[0, 1, 1])),
            (ClientId::Key(0), pair(&[1, 2], &[0, 0])),
            (ClientId::Key(0), pair(&[2, 1, 3], &[0, 0, 1])),
            (ClientId::Key(0), pair(&[1, 2, 3, 0], &[0, 0, 1, 0])),
        ] {
            assert_eq!(cache.look_up(client, vec![other.clone()]).1, [other]);
        }
        let (lookup, missing) = cache.look_up(ClientId::Key(0), vec![pair(&[9], &[0]), first(), pair(&[8], &[0])]);
        assert_eq!(missing.len(), 2);
        assert_eq!(cache.complete(lookup, &[0.9, 0.8]), [0.9, 0.5, 0.8]);
    }

    #[test]
    fn caches_have_different_secrets() {
        assert_ne!(secret(), secret());
    }

    proptest! {
        /// A logit is a function of its pair here, as it is of a model on the CPU.
        #[test]
        fn logits_are_those_without_a_cache(
            requests in proptest::collection::vec(proptest::collection::vec(0u32..40, 0..20), 1..30),
            bytes in prop_oneof![Just(1), Just(10 * ENTRY_BYTES), Just(1 << 20)],
        ) {
            let cache = ScoreCache::new("m", bytes).unwrap();
            let logit = |pair: &Pair| pair.ids()[0] as f32 * 0.37 - 3.0;
            for request in requests {
                let pairs: Vec<Pair> = request.iter().map(|&id| pair(&[id], &[0])).collect();
                let expected: Vec<f32> = pairs.iter().map(logit).collect();
                let (lookup, missing) = cache.look_up(ClientId::Only, pairs);
                let scored: Vec<f32> = missing.iter().map(logit).collect();
                prop_assert_eq!(cache.complete(lookup, &scored), expected);
                prop_assert!(cache.logits.len() <= (bytes / ENTRY_BYTES).max(1) + cache.logits.num_shards());
            }
        }
    }
}
