//! The catalogue of models known by name: the files `models/*.toml`, embedded in the binary by `build.rs`.

use std::sync::LazyLock;

use serde::Deserialize;

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
    /// When to choose the model, in one line.
    pub choose_when: String,
    /// `model_type` in the model's config.json.
    pub architecture: String,
    /// Number of parameters, for display: `568M`.
    pub parameters: String,
    /// Size of the download, for display: `2.3 GB`.
    pub download: String,
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
#[derive(Debug, Clone, Deserialize)]
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

/// A model's name without the organization: `bge-reranker-v2-m3` for `BAAI/bge-reranker-v2-m3`.
pub fn short_name(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

impl Entry {
    /// The name and its aliases.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.name.as_str()).chain(self.aliases.iter().map(String::as_str))
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
