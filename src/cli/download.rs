//! `rerankd download`: downloads models into the cache, so that they can be served offline.

use anyhow::Context;

use super::{Failure, print};
use crate::config::hub::hub_options_from_env;
use crate::loading::download::Hub;
use crate::loading::source::{ModelSource, WeightsFile};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Models to download: names from `rerankd models`, or organisation/name[@revision] on the hub
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<String>,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let hub = Hub::new(hub_options_from_env());
    for model in &args.models {
        let source = ModelSource::parse(model).map_err(Failure::Config)?;
        let files =
            source.files(&hub).with_context(|| format!("cannot download {}", source.name)).map_err(Failure::Other)?;
        if let WeightsFile::Path(path) = files.weights {
            print(&format!("{}: {}\n", source.name, path.display()))?;
        }
    }
    Ok(())
}
