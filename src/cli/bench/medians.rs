//! The median time of workloads.

use super::timing::measure;
use super::workloads::pack;
use crate::batch::{Batch, Pair};
use crate::cli::failure::Failure;
use crate::cli::output::{print, table};
use crate::loading::LoadedModel;
use crate::telemetry;

/// The measurement of one workload.
pub(super) struct Median {
    pub(super) workload: String,
    pub(super) pairs: usize,
    pub(super) tokens: usize,
    /// Median time of a run.
    pub(super) seconds: f64,
}

impl Median {
    pub(super) fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

/// Measures each workload, which has a name, `runs` times after a warm-up run.
pub(super) fn medians(
    model: &LoadedModel,
    workloads: &[(&str, &[Pair])],
    runs: u32,
    batch_tokens: usize,
) -> Result<Vec<Median>, Failure> {
    let bar = telemetry::progress_count(u64::from(runs + 1) * workloads.len() as u64, "measuring");
    let mut medians = Vec::new();
    for &(name, pairs) in workloads {
        let batches = pack(model, pairs, batch_tokens);
        measure(model, &batches, 1, &bar)?;
        let (mut seconds, _) = measure(model, &batches, runs, &bar)?;
        seconds.sort_by(f64::total_cmp);
        medians.push(Median {
            workload: name.to_owned(),
            pairs: pairs.len(),
            tokens: batches.iter().map(Batch::tokens).sum(),
            seconds: seconds[seconds.len() / 2],
        });
    }
    bar.finish_and_clear();
    Ok(medians)
}

/// Prints a table.
pub(super) fn print_medians(medians: &[Median]) -> Result<(), Failure> {
    let mut rows = vec![["workload", "pairs", "tokens", "median ms", "tokens/s"].map(str::to_owned).to_vec()];
    rows.extend(medians.iter().map(|median| {
        vec![
            median.workload.clone(),
            median.pairs.to_string(),
            median.tokens.to_string(),
            format!("{:.1}", median.seconds * 1e3),
            format!("{:.0}", median.tokens_per_second()),
        ]
    }));
    print(&table(&rows))
}
