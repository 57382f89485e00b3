//! `rerankd models`: lists the catalogue, and which of its models are on this machine.

use serde_json::json;

use super::failure::Failure;
use super::output::{bytes, print, table};
use crate::backend::cpu::CpuDtype;
use crate::config::hub::hub_options_from_env;
use crate::loading::catalogue::{self, Entry};
use crate::loading::download::Hub;
use crate::loading::source::ModelSource;

#[derive(Debug, clap::Args)]
pub(super) struct ListModelsArgs {
    /// Print a JSON array instead of a table [default: false]
    #[arg(long)]
    json: bool,
}

/// Estimated memory of a server on a CPU in each precision; `None` where the model is computed in another one.
fn memory(entry: &Entry) -> [(CpuDtype, Option<u64>); 3] {
    let size = entry.size();
    [CpuDtype::F32, CpuDtype::Bf16, CpuDtype::Int8]
        .map(|dtype| (dtype, (dtype != CpuDtype::Int8 || !size.gated).then(|| size.cpu_bytes(dtype))))
}

pub(super) fn run(args: &ListModelsArgs) -> Result<(), Failure> {
    let hub = Hub::new(hub_options_from_env().map_err(Failure::Config)?);
    let is_cached = |entry: &Entry| ModelSource::parse(&entry.name).is_ok_and(|source| source.is_cached(&hub));
    let models: Vec<(&Entry, bool)> = catalogue::entries().iter().map(|entry| (entry, is_cached(entry))).collect();
    if args.json {
        let objects: Vec<_> = models.iter().map(|&(entry, cached)| object(entry, cached)).collect();
        return print(&format!("{:#}\n", json!(objects)));
    }
    let mut rows = vec![["NAME", "PARAMS", "DOWNLOAD", "F32", "BF16", "INT8", "CACHED"].map(str::to_owned).to_vec()];
    rows.extend(models.iter().map(|&(entry, cached)| row(entry, cached)));
    let table = table(&rows);
    let mut lines = table.lines();
    let mut text = format!("{}\n", lines.next().unwrap_or_default());
    for (line, (entry, _)) in lines.zip(&models) {
        let window = match entry.window {
            window if window.default == window.max => window.max.to_string(),
            window => format!("{} to {}", window.default, window.max),
        };
        text +=
            &format!("{line}\n    {}; {}; {window} tokens; {}\n", entry.languages, entry.licence, entry.choose_when);
    }
    text += &format!(
        "\nF32, BF16, INT8: estimated memory of a server on a CPU with this --dtype.\n\
         1024 to 8192 tokens: the default --window and the largest, for a query and a chunk together.\n\
         Other BERT, RoBERTa, XLM-RoBERTa, ELECTRA and ModernBERT cross-encoders load from a folder or the\n\
         Hugging Face hub: --model ./folder, --model organization/name. They need config.json,\n\
         tokenizer.json and the weights.\n\
         Cache folder: {}\n",
        hub.cache_folder().display()
    );
    print(&text)
}

fn row(entry: &Entry, cached: bool) -> Vec<String> {
    let memory = memory(entry).map(|(_, size)| size.map_or("-".to_owned(), bytes));
    let download = entry.download_mb.map_or("-".to_owned(), |megabytes| bytes(megabytes * 1_000_000));
    let cached = if cached { "yes" } else { "-" };
    let start = [entry.name.clone(), count(entry.parameters), download];
    start.into_iter().chain(memory).chain([cached.to_owned()]).collect()
}

fn object(entry: &Entry, cached: bool) -> serde_json::Value {
    let memory: serde_json::Map<String, serde_json::Value> =
        memory(entry).iter().map(|&(dtype, size)| (dtype.name().to_owned(), size.into())).collect();
    json!({
        "name": entry.name, "aliases": entry.aliases, "cached": cached, "architecture": entry.architecture,
        "languages": entry.languages, "parameters": entry.parameters, "download_mb": entry.download_mb,
        "memory_bytes": memory, "licence": entry.licence,
        "window": entry.window.default, "max_window": entry.window.max,
        "repository": entry.hub.as_ref().map(|hub| &hub.repository),
        "revision": entry.hub.as_ref().map(|hub| &hub.revision),
        "choose_when": entry.choose_when,
    })
}

/// A number of parameters: `7.5M`, `568M`, `1.0B`.
fn count(parameters: u64) -> String {
    match parameters as f64 / 1e6 {
        millions if millions >= 999.5 => format!("{:.1}B", millions / 1e3),
        millions if millions >= 99.5 => format!("{millions:.0}M"),
        millions => format!("{millions:.1}M"),
    }
}
