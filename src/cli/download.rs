//! `rerankd download`: downloads models into the cache, so that `serve` can start offline.

use anyhow::Context;

use super::failure::Failure;
use super::output::print;
use crate::config::hub::hub_options_from_env;
use crate::loading::download::Hub;
use crate::loading::source::{ModelSource, WeightsFile};

#[derive(Debug, clap::Args)]
pub(super) struct DownloadArgs {
    /// Models to download: names from `rerankd models`, or organization/name[@revision] on the Hugging Face hub
    ///
    /// Prints the path of each model's weights. Set HF_HUB_OFFLINE=1 afterwards to load from the cache only.
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<String>,
}

pub(super) fn run(args: &DownloadArgs) -> Result<(), Failure> {
    let hub = Hub::new(hub_options_from_env().map_err(Failure::Config)?);
    for model in &args.models {
        let source = ModelSource::parse(model).map_err(Failure::Config)?;
        let files = source
            .files(&hub)
            .with_context(|| format!("cannot download {}", source.name))
            .map_err(Failure::of_loading)?;
        if let WeightsFile::Path(path) = files.weights {
            print(&format!("{}: {}\n", source.name, path.display()))?;
        }
    }
    Ok(())
}
