//! `rerankd models`: lists the catalogue, and which of its models are on this machine.

use serde_json::json;

use super::failure::Failure;
use super::output::{print, table};
use crate::config::hub::hub_options_from_env;
use crate::loading::catalogue;
use crate::loading::download::Hub;
use crate::loading::source::ModelSource;

#[derive(Debug, clap::Args)]
pub(super) struct ListModelsArgs {
    /// Print a JSON array instead of a table [default: false]
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &ListModelsArgs) -> Result<(), Failure> {
    let hub = Hub::new(hub_options_from_env().map_err(Failure::Config)?);
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
    let notes = format!(
        "\nWINDOW is the maximum number of tokens of a query and a chunk together; \"1024 of 8192\" can be raised to 8192 by --window.\n\
         Other BERT, RoBERTa, XLM-RoBERTa, ELECTRA and ModernBERT cross-encoders load from a folder or the Hugging Face hub:\n\
         --model ./folder, --model organization/name. They need config.json, tokenizer.json and the weights.\n\
         Cache folder: {}\n",
        hub.cache_folder().display()
    );
    print(&(table(&rows) + &notes))
}
