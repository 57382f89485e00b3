//! `rerankd bench`: measures how fast models score pairs on this machine, without HTTP and without tokenization.

mod json_protocol;
mod medians;
mod profile_table;
mod sweep;
mod timing;
mod workloads;

use std::path::PathBuf;
use std::sync::Arc;

use super::failure::Failure;
use super::output::PictureFile;
use crate::backend::profile::Profile;
use crate::config::args::ModelArgs;
use crate::config::hub::hub_options_from_env;
use crate::config::machine::Machine;
use crate::config::resolve::{Notice, QueueSettings};
use crate::loading::Loader;
use crate::loading::download::Hub;
use medians::{medians, print_medians};

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
    /// File for a picture (SVG) of throughput against latency [default: none]
    ///
    /// Measures requests of 1, 2, 4 and more pairs, in place of the built-in workloads.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "profile", "workloads"])]
    svg: Option<PathBuf>,
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
    let picture = args.svg.as_deref().map(PictureFile::create).transpose()?;
    let mut curves = Vec::new();
    for source in &settings.sources {
        let model = loader.load(source).map_err(Failure::of_loading)?;
        tracing::info!(model = model.name, "{}", model.description);
        if picture.is_some() {
            curves.extend(sweep::run(&model, args.runs, batch_tokens)?);
            continue;
        }
        let workloads = match &args.workloads {
            Some(path) => workloads::read(path, &model).map_err(Failure::Config)?,
            None => workloads::built_in(&model),
        };
        if let Some(profile) = &profile {
            profile_table::run(profile, &model, &workloads, args.runs, batch_tokens)?;
        } else if args.json {
            json_protocol::run(&settings.load.device, &model, &workloads, batch_tokens)?;
        } else {
            let workloads: Vec<_> = workloads.iter().map(|(name, pairs)| (name.as_str(), pairs.as_slice())).collect();
            print_medians(&medians(&model, &workloads, args.runs, batch_tokens)?)?;
        }
    }
    match picture {
        Some(picture) => picture.write(&[sweep::chart(&settings.load.device, curves)]),
        None => Ok(()),
    }
}
