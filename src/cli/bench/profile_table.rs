//! `rerankd bench --profile`: the time of each operation, compared with the device's roofline.

use super::timing::measure;
use super::workloads::{Workloads, pack};
use crate::backend::Roofline;
use crate::backend::profile::{Operation, Profile};
use crate::batch::Batch;
use crate::cli::failure::Failure;
use crate::cli::output::{print, table};
use crate::loading::LoadedModel;
use crate::telemetry;

/// Measures every workload and prints a table of operations for each.
///
/// # Errors
/// The backend's error for a batch; standard output cannot be written.
pub(super) fn run(
    profile: &Profile,
    model: &LoadedModel,
    workloads: &Workloads,
    runs: u32,
    batch_tokens: usize,
) -> Result<(), Failure> {
    let bar = telemetry::progress_count(u64::from(runs + 1) * workloads.len() as u64, "measuring");
    let mut text = String::new();
    if let Some(Roofline { gemms, attention, memory }) = profile.roofline() {
        let tera = |operations: f64| format!("{:.2} Top/s", operations / 1e12);
        text += &format!("Measured device maximum: {} in GEMMs, {} in attention", tera(gemms), tera(attention));
        text += &memory
            .map_or(String::new(), |memory| format!(", {:.0} GB/s of memory bandwidth", memory.bytes_per_second / 1e9));
        text += ".\n";
    }
    for (name, pairs) in workloads {
        let batches = pack(model, pairs, batch_tokens);
        measure(model, &batches, 1, &bar)?;
        profile.take(); // the operations of the warm-up run
        let (seconds, _) = measure(model, &batches, runs, &bar)?;
        let runs = f64::from(runs);
        let mean = seconds.iter().sum::<f64>() / runs;
        let tokens: usize = batches.iter().map(Batch::tokens).sum();
        text += &format!(
            "\n{name}: {} pairs, {tokens} tokens; mean run {:.2} ms, {:.0} tokens/s\n",
            pairs.len(),
            1e3 * mean,
            tokens as f64 / mean
        );
        text += &table(&operation_rows(&profile.take(), runs, mean));
    }
    bar.finish_and_clear();
    print(&text)
}

/// Rows of the table, per run: calls, time, share of the run, minimum time by the roofline.
///
/// `operations` are the sums over `runs` runs, and `run` is the mean time of a run in seconds.
fn operation_rows(operations: &[Operation], runs: f64, run: f64) -> Vec<Vec<String>> {
    let row = |name: &str, calls: String, seconds: f64, roofline: f64| {
        let known = roofline > 0.0;
        vec![
            name.to_owned(),
            calls,
            format!("{:.3}", 1e3 * seconds),
            format!("{:.1}", 100.0 * seconds / run),
            if known { format!("{:.3}", 1e3 * roofline) } else { "-".to_owned() },
            if known { format!("{:.0}", 100.0 * roofline / seconds) } else { "-".to_owned() },
        ]
    };
    let mut rows =
        vec![["operation", "calls", "ms", "% of run", "roofline ms", "% of roofline"].map(str::to_owned).to_vec()];
    rows.extend(operations.iter().map(|operation| {
        let calls = format!("{:.0}", operation.calls as f64 / runs);
        row(&operation.name, calls, operation.seconds / runs, operation.roofline_seconds / runs)
    }));
    let sum = |of: fn(&Operation) -> f64| operations.iter().map(of).sum::<f64>() / runs;
    let (seconds, roofline) = (sum(|operation| operation.seconds), sum(|operation| operation.roofline_seconds));
    rows.push(row("between operations, and idle threads", String::new(), (run - seconds).max(0.0), 0.0));
    rows.push(row("all", String::new(), run, roofline));
    rows
}
