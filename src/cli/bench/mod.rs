//! `rerankd bench`: measures how fast models score pairs on this machine, without HTTP and without tokenization.

mod json_protocol;
mod profile_table;
mod timing;
mod workloads;

use std::path::PathBuf;
use std::sync::Arc;

use super::failure::Failure;
use super::output::{print, table};
use crate::backend::profile::Profile;
use crate::batch::Batch;
use crate::config::args::ModelArgs;
use crate::config::hub::hub_options_from_env;
use crate::config::machine::Machine;
use crate::config::resolve::{Notice, QueueSettings};
use crate::loading::download::Hub;
use crate::loading::{LoadedModel, Loader};
use crate::telemetry;
use workloads::Workloads;

#[derive(Debug, clap::Args)]
pub(super) struct BenchArgs {
    /// JSON file with workloads: {"name": [[token ids of a pair], ...], ...} [default: four built-in workloads]
    ///
    /// The built-in workloads: a is 8 pairs of 512 tokens; b is 16 pairs of 32 to 512; c is 48 pairs of 20 to 64; d is one pair
    /// of 128. Built-in pairs longer than the model's window are truncated to it.
    #[arg(long, value_name = "FILE")]
    workloads: Option<PathBuf>,
    /// Measured runs of each workload, after one warm-up run
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,
    /// Read benchmark requests as JSON from standard input, one per line [default: false]
    ///
    /// For programs that compare several engines. The request {"workload":"a","runs":3} is answered by one JSON line with the
    /// seconds of each run, the number of tokens and the logits.
    #[arg(long)]
    json: bool,
    /// Show the time of each operation of the forward pass [default: false]
    ///
    /// "roofline ms" is the operation's minimum time by the roofline model, from the device's measured arithmetic throughput
    /// and, on a GPU, its measured memory bandwidth. "% reached" is the minimum time divided by the measured time.
    #[arg(long, conflicts_with = "json")]
    profile: bool,
    #[command(flatten)]
    pub(super) models: ModelArgs,
}

pub(super) fn run(args: &BenchArgs) -> Result<(), Failure> {
    let mut settings = args.models.resolve(&Machine::detect(), QueueSettings::UNBOUNDED).map_err(Failure::Config)?;
    let profile = args.profile.then(Arc::<Profile>::default);
    settings.load.profile = profile.clone();
    settings.notices.iter().for_each(Notice::log);
    let batch_tokens = settings.scheduler.max_batch_tokens;
    let hub = Hub::new(hub_options_from_env().map_err(Failure::Config)?);
    let loader = Loader::new(&hub, &settings.load).map_err(Failure::Config)?;
    for source in &settings.sources {
        let model = loader.load(source).map_err(Failure::of_loading)?;
        tracing::info!(model = model.name, "{}", model.description);
        let workloads = match &args.workloads {
            Some(path) => workloads::read(path, &model).map_err(Failure::Config)?,
            None => workloads::built_in(&model),
        };
        if let Some(profile) = &profile {
            profile_table::run(profile, &model, &workloads, args.runs, batch_tokens)?;
        } else if args.json {
            json_protocol::run(&settings.load.device, &model, &workloads, batch_tokens)?;
        } else {
            print_medians(&model, &workloads, args.runs, batch_tokens)?;
        }
    }
    Ok(())
}

/// Prints a table with the median time of each workload.
fn print_medians(model: &LoadedModel, workloads: &Workloads, runs: u32, batch_tokens: usize) -> Result<(), Failure> {
    let mut rows = vec![["workload", "pairs", "tokens", "median ms", "tokens/s"].map(str::to_owned).to_vec()];
    let bar = telemetry::progress_count(u64::from(runs + 1) * workloads.len() as u64, "measuring");
    for (name, pairs) in workloads {
        let batches = workloads::pack(model, pairs, batch_tokens);
        let tokens: usize = batches.iter().map(Batch::tokens).sum();
        timing::measure(model, &batches, 1, &bar)?;
        let (mut seconds, _) = timing::measure(model, &batches, runs, &bar)?;
        seconds.sort_by(f64::total_cmp);
        let median = seconds[seconds.len() / 2];
        rows.push(vec![
            name.clone(),
            pairs.len().to_string(),
            tokens.to_string(),
            format!("{:.1}", median * 1e3),
            format!("{:.0}", tokens as f64 / median),
        ]);
    }
    bar.finish_and_clear();
    print(&table(&rows))
}
