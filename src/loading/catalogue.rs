//! The catalogue: `models/*.toml`, embedded in the binary. Adding a model is adding a file.

use std::sync::LazyLock;

use serde::Deserialize;

/// File name and text of each entry.
static FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/catalogue_files.rs"));

static CATALOGUE: LazyLock<Vec<Entry>> = LazyLock::new(|| {
    FILES
        .iter()
        .map(|(file, text)| {
            toml::from_str(text).unwrap_or_else(|e| panic!("models/{file} is part of the binary and tested: {e}"))
        })
        .collect()
});

/// A model that we know by name.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The name that requests use.
    pub name: String,
    /// Other names that requests use.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// One line: when to choose it.
    pub choose_when: String,
    /// `model_type` of its config.json.
    pub architecture: String,
    /// For people.
    pub parameters: String,
    /// Size of the download, for people.
    pub download: String,
    /// Licence of the weights.
    pub licence: String,
    /// Where its files are; without it they are part of the binary.
    pub hub: Option<Hub>,
    /// Tokens of a pair.
    pub window: Window,
    /// How a pair is laid out.
    pub pair: PairFormat,
}

/// A model's files on the hub.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hub {
    /// `organisation/name`
    pub repository: String,
    /// The commit that we know.
    pub revision: String,
    /// The checkpoint to take of those that the repository holds.
    pub weights: String,
}

/// Tokens of the longest pair, special tokens included.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Unless a setting says otherwise.
    pub default: usize,
    /// What the positions allow.
    pub max: usize,
}

/// The tokenizer's pair template, held against the one that is loaded.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairFormat {
    /// Special tokens around the words `query` and `document`, separated by spaces.
    pub format: String,
}

/// Every entry, in the order of their file names.
pub fn entries() -> &'static [Entry] {
    &CATALOGUE
}

/// The entry with this name, alias, or last part of a name (`bge-reranker-v2-m3`).
pub fn find(name: &str) -> Option<&'static Entry> {
    entries().iter().find(|entry| {
        entry.names().any(|own| own.eq_ignore_ascii_case(name)) || short_name(&entry.name).eq_ignore_ascii_case(name)
    })
}

/// The part of a model's name after the organisation.
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
    fn every_entry_parses_and_is_coherent() {
        let mut names = HashSet::new();
        for entry in entries() {
            assert!(entry.window.default <= entry.window.max, "{}", entry.name);
            assert!(
                entry.hub.as_ref().is_none_or(|hub| {
                    hub.revision.len() == 40 && hub.revision.bytes().all(|b| b.is_ascii_hexdigit())
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
                assert!(names.insert(name.to_lowercase()), "{name} is there twice");
            }
        }
        for expected in ["BAAI/bge-reranker-v2-m3", "netease-youdao/bce-reranker-base_v1"] {
            assert!(find(expected).is_some(), "{expected}");
        }
    }

    #[test]
    fn found_by_name_alias_and_short_name() {
        for name in
            ["BAAI/bge-reranker-v2-m3", "Pro/BAAI/bge-reranker-v2-m3", "bge-reranker-v2-m3", "baai/BGE-reranker-v2-M3"]
        {
            assert_eq!(find(name).unwrap().name, "BAAI/bge-reranker-v2-m3");
        }
        assert!(find("bge").is_none());
    }
}
