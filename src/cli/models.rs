//! `rerankd models`: what is known by name, and what of it is on this machine.

use serde_json::json;

use super::{Failure, print, table};
use crate::config::hub::hub_options_from_env;
use crate::loading::catalogue;
use crate::loading::download::Hub;
use crate::loading::source::ModelSource;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let hub = Hub::new(hub_options_from_env());
    let mut rows =
        vec![["NAME", "WINDOW", "DOWNLOAD", "CACHED", "LICENCE", "CHOOSE IT WHEN"].map(str::to_owned).to_vec()];
    let mut objects = Vec::new();
    for entry in catalogue::entries() {
        let cached = ModelSource::parse(&entry.name).is_ok_and(|source| source.is_cached(&hub));
        let window = if entry.window.default == entry.window.max {
            entry.window.max.to_string()
        } else {
            format!("{} of {}", entry.window.default, entry.window.max)
        };
        rows.push(vec![
            entry.name.clone(),
            window,
            entry.download.clone(),
            if cached { "yes" } else { "-" }.to_owned(),
            entry.licence.clone(),
            entry.choose_when.clone(),
        ]);
        objects.push(json!({
            "name": entry.name, "aliases": entry.aliases, "cached": cached, "architecture": entry.architecture,
            "parameters": entry.parameters, "download": entry.download, "licence": entry.licence,
            "window": entry.window.default, "max_window": entry.window.max,
            "repository": entry.hub.as_ref().map(|hub| &hub.repository),
            "revision": entry.hub.as_ref().map(|hub| &hub.revision),
            "choose_when": entry.choose_when,
        }));
    }
    if args.json {
        return print(&format!("{:#}\n", json!(objects)));
    }
    let more = format!(
        "\nAny folder or hub repository with config.json, tokenizer.json and weights of a BERT, RoBERTa or XLM-RoBERTa cross-encoder\n\
         loads too: --model ./folder, --model organisation/name. Cache: {}\n",
        hub.cache_folder().display()
    );
    print(&(table(&rows) + &more))
}
