//! The catalogue of models known by name: the files `models/*.toml`, embedded in the binary by `build.rs`.

use std::sync::LazyLock;

use serde::Deserialize;

use super::memory::ModelSize;
use crate::score::ScoreMap;

/// File name and text of each entry.
static FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/catalogue_files.rs"));

static CATALOGUE: LazyLock<Vec<Entry>> = LazyLock::new(|| {
    FILES
        .iter()
        .map(|(file, text)| {
            toml::from_str(text).unwrap_or_else(|e| panic!("models/{file} is not a valid catalogue entry: {e}"))
        })
        .collect()
});

/// A model in the catalogue.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The name in requests and responses.
    pub name: String,
    /// Other names that requests may use.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// The languages that the model was trained for.
    pub languages: String,
    /// When to choose the model among those of its languages, in one line.
    pub choose_when: String,
    /// `model_type` in the model's config.json.
    pub architecture: String,
    /// Number of parameters.
    pub parameters: u64,
    /// `vocab_size` in the model's config.json.
    pub vocabulary: u64,
    /// `hidden_size` in the model's config.json.
    pub hidden_size: u64,
    /// Size of the download in megabytes; `None` when the files are embedded in the binary.
    pub download_mb: Option<u64>,
    /// Licence of the weights.
    pub licence: String,
    /// Where the files are; `None` when they are embedded in the binary.
    pub hub: Option<HubFiles>,
    /// Limits of a pair's length.
    pub window: Window,
    /// How the query and the document are joined.
    pub pair: PairFormat,
    /// From logits to scores. The default is the sigmoid.
    #[serde(default)]
    pub score: ScoreMap,
}

/// A model's files on the hub.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubFiles {
    /// `organization/name`
    pub repository: String,
    /// A commit, 40 hexadecimal digits; or `main` while no commit is pinned.
    pub revision: String,
    /// File name of the checkpoint; a repository may have several.
    pub weights: String,
    /// Whether the head is a chain of sentence-transformers modules (modules.json).
    #[serde(default)]
    pub modules: bool,
}

/// The maximum length of a pair in tokens, including special tokens.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Used without `--window`.
    pub default: usize,
    /// The limit of the model's position embeddings.
    pub max: usize,
}

/// The pair template that the model was trained with. The loaded tokenizer must have the same.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairFormat {
    /// The special tokens and the words `query` and `document`, separated by spaces.
    pub format: String,
}

/// All entries, in the order of their file names.
pub fn entries() -> &'static [Entry] {
    &CATALOGUE
}

/// The entry with this name, alias or short name (`bge-reranker-v2-m3`); case is ignored.
pub fn find(name: &str) -> Option<&'static Entry> {
    entries().iter().find(|entry| {
        entry.names().any(|own| own.eq_ignore_ascii_case(name)) || short_name(&entry.name).eq_ignore_ascii_case(name)
    })
}

/// The entry whose name or short name is most similar to `name`, if they differ by little more than a typing error.
pub fn similar(name: &str) -> Option<&'static Entry> {
    const MIN_SIMILARITY: f64 = 0.85;
    let name = name.to_lowercase();
    let similarity = |own: &str| strsim::jaro_winkler(&own.to_lowercase(), &name);
    let of =
        |entry: &Entry| entry.names().map(|own| similarity(own).max(similarity(short_name(own)))).fold(0.0, f64::max);
    let best = entries().iter().map(|entry| (of(entry), entry)).max_by(|a, b| a.0.total_cmp(&b.0));
    best.filter(|&(similarity, _)| similarity >= MIN_SIMILARITY).map(|(_, entry)| entry)
}

/// A model's name without the organization: `bge-reranker-v2-m3` for `BAAI/bge-reranker-v2-m3`.
pub fn short_name(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

impl Entry {
    /// The name and its aliases.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.name.as_str()).chain(self.aliases.iter().map(String::as_str))
    }

    /// The dimensions that memory depends on.
    pub fn size(&self) -> ModelSize {
        ModelSize {
            parameters: self.parameters,
            vocabulary: self.vocabulary,
            hidden_size: self.hidden_size,
            gated: matches!(self.architecture.as_str(), "modernbert" | "new"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_entry_is_valid_and_names_are_unique() {
        let mut names = HashSet::new();
        for entry in entries() {
            assert!(entry.window.default <= entry.window.max, "{}", entry.name);
            assert!(entry.score.is_valid(), "{}", entry.name);
            assert!(entry.vocabulary * entry.hidden_size < entry.parameters, "{}", entry.name);
            assert_eq!(entry.hub.is_some(), entry.download_mb.is_some(), "{}", entry.name);
            assert!(
                entry.hub.as_ref().is_none_or(|hub| {
                    hub.revision == "main"
                        || hub.revision.len() == 40 && hub.revision.bytes().all(|b| b.is_ascii_hexdigit())
                }),
                "{}",
                entry.name
            );
            assert!(
                entry.pair.format.contains(" query ") && entry.pair.format.contains(" document "),
                "{}",
                entry.name
            );
            for name in entry.names() {
                assert!(names.insert(name.to_lowercase()), "{name} is used twice");
            }
        }
        for expected in ["BAAI/bge-reranker-v2-m3", "netease-youdao/bce-reranker-base_v1"] {
            assert!(find(expected).is_some(), "{expected}");
        }
    }

    #[test]
    fn an_entry_is_found_by_name_alias_and_short_name() {
        for name in
            ["BAAI/bge-reranker-v2-m3", "Pro/BAAI/bge-reranker-v2-m3", "bge-reranker-v2-m3", "baai/BGE-reranker-v2-M3"]
        {
            assert_eq!(find(name).unwrap().name, "BAAI/bge-reranker-v2-m3");
        }
        assert!(find("bge").is_none());
    }
}
