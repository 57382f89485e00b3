//! Workloads: named lists of pairs, built in or read from a file.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::batch::{Batch, Pair};
use crate::loading::LoadedModel;

/// The pairs of each workload, by the workload's name.
pub(super) type Workloads = BTreeMap<String, Vec<Pair>>;

/// The four workloads that `rerankd bench --help` describes. Token ids start at 5, to avoid special tokens.
pub(super) fn built_in(model: &LoadedModel) -> Workloads {
    let spread = |from: usize, to: usize, n: usize| (0..n).map(move |i| from + (to - from) * (i * 7 % n) / (n - 1));
    [
        ("a", vec![512; 8]),
        ("b", spread(32, 512, 16).collect::<Vec<_>>()),
        ("c", spread(20, 64, 48).collect()),
        ("d", vec![128]),
    ]
    .into_iter()
    .map(|(name, lengths)| (name.to_owned(), lengths.into_iter().map(|tokens| pair(model, tokens)).collect()))
    .collect()
}

/// A pair of `tokens` tokens, or of the model's window if that is shorter.
pub(super) fn pair(model: &LoadedModel, tokens: usize) -> Pair {
    let tokens = tokens.min(model.text.window());
    let ids = (0..tokens).map(|i| (i * 37 % (model.vocabulary - 5) + 5) as u32).collect();
    Pair::new(ids, vec![0; tokens])
}

/// Reads workloads from a JSON file of the form `{"name": [[token ids], ...], ...}`.
///
/// # Errors
/// The file cannot be read or is not of that form; a pair is empty, is longer than the model's window, or contains an id that
/// is not in the model's vocabulary.
pub(super) fn read(path: &Path, model: &LoadedModel) -> Result<Workloads> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("--workloads {}: cannot be read", path.display()))?;
    let token_ids: BTreeMap<String, Vec<Vec<u32>>> = serde_json::from_str(&text)
        .with_context(|| format!("--workloads {}: expected {{\"name\": [[ids], ...]}}", path.display()))?;
    let mut workloads = Workloads::new();
    for (name, pairs) in token_ids {
        for (i, ids) in pairs.iter().enumerate() {
            ensure!(
                (1..=model.text.window()).contains(&ids.len())
                    && ids.iter().all(|&id| (id as usize) < model.vocabulary),
                "--workloads {}: pair {i} of {name} has {} tokens; expected 1 to {}, with ids below {}",
                path.display(),
                ids.len(),
                model.text.window(),
                model.vocabulary
            );
        }
        workloads.insert(name, pairs.into_iter().map(|ids| Pair::new(ids.clone(), vec![0; ids.len()])).collect());
    }
    Ok(workloads)
}

/// Packs a workload into batches. A model that computes one batch at a time gets the whole workload as one batch. A model that
/// computes several at a time gets batches of at most `batch_tokens` tokens; a longer pair is a batch of its own.
pub(super) fn pack(model: &LoadedModel, pairs: &[Pair], batch_tokens: usize) -> Vec<Batch> {
    let limit = if model.encoder.max_concurrent_batches() == 1 { usize::MAX } else { batch_tokens };
    let mut batches: Vec<(usize, Vec<&Pair>)> = Vec::new();
    for pair in pairs {
        match batches.last_mut() {
            Some((tokens, batch)) if *tokens + pair.tokens() <= limit => {
                *tokens += pair.tokens();
                batch.push(pair);
            }
            _ => batches.push((pair.tokens(), vec![pair])),
        }
    }
    batches.into_iter().map(|(_, pairs)| Batch::pack(pairs)).collect()
}
