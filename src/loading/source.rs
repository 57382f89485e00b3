//! From the argument of `--model` to the files to load: the built-in model, a folder, or a repository on the hub.

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::catalogue::{self, Entry, HubFiles};
use super::download::{Hub, Revision};
use crate::checkpoint::file::read_text;
use crate::checkpoint::modules::{ModuleEntry, parse_modules};
use crate::checkpoint::weights::shard_names;

/// File names of checkpoints, in order of preference.
const WEIGHT_FILES: [&str; 3] = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"];

/// A model's configuration, the list of its modules in the format of sentence-transformers, and that format's settings.
const CONFIG_FILE: &str = "config.json";
const MODULES_FILE: &str = "modules.json";
const SENTENCE_TRANSFORMERS_FILE: &str = "config_sentence_transformers.json";

/// Maximum bytes of config.json and of tokenizer.json. The largest published tokenizers have some 20 MB.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// A model to load: its name, and where its files are.
#[derive(Debug, Clone)]
pub struct ModelSource {
    /// The name in requests and responses.
    pub name: String,
    /// The model's catalogue entry, if it has one.
    pub entry: Option<&'static Entry>,
    /// Where the files are.
    pub location: ModelLocation,
    /// Names that requests may use besides `name` and the catalogue's.
    pub aliases: Vec<String>,
}

/// The model that is embedded in the binary. It is served without `--model`.
pub const BUILTIN: &str = "rerankd-mini";

/// What to use in place of the embedded model, for messages about it.
pub const NEXT_STEP: &str = "for real use take --model cross-encoder/ettin-reranker-32m-v1 (English, on a CPU) or \
    --model BAAI/bge-reranker-v2-m3 (100 languages, on a GPU); `rerankd models` lists all";

/// Where a model's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelLocation {
    /// Embedded in the binary.
    Builtin,
    /// A folder with config.json, tokenizer.json and a checkpoint.
    Folder(PathBuf),
    /// A repository on the hub, and its files if the catalogue has them.
    Hub(Revision, Option<&'static HubFiles>),
}

/// A model's files on this machine.
#[derive(Debug)]
pub struct ModelFiles {
    /// Content of config.json, and its path for messages.
    pub config: (String, String),
    /// Content of tokenizer.json, and its path for messages.
    pub tokenizer: (Cow<'static, [u8]>, String),
    pub weights: WeightsFile,
    /// The modules of a model in the format of sentence-transformers; empty in other models.
    pub modules: Vec<ModuleFiles>,
    /// Content of config_sentence_transformers.json and its path, if the model has one.
    pub sentence_transformers: Option<(String, String)>,
}

/// A module of a model in the format of sentence-transformers. The first module's files are the model's own.
#[derive(Debug)]
pub struct ModuleFiles {
    pub entry: ModuleEntry,
    /// Content of config.json; empty for the first module.
    pub config: String,
    /// The checkpoint, if the module has one of its own.
    pub weights: Option<PathBuf>,
}

/// A checkpoint.
#[derive(Debug)]
pub enum WeightsFile {
    /// A file on disk. The file name tells the format.
    Path(PathBuf),
    /// A safetensors file embedded in the binary: its name for messages, and its content.
    Bytes(&'static str, &'static [u8]),
}

impl ModelSource {
    /// Parses `[NAME=]MODEL[@REVISION]`, where MODEL is a folder, a name in the catalogue, or `organization/name` on the hub. A
    /// folder takes precedence. The default revision is the catalogue's commit, or else the branch `main`.
    ///
    /// # Errors
    /// MODEL is none of these; the message then names a known model of a similar name. Or NAME or MODEL is empty.
    pub fn parse(argument: &str) -> Result<Self> {
        let (given_name, model) = match argument.split_once('=').filter(|_| !Path::new(argument).is_dir()) {
            Some((name, model)) => (Some(name), model),
            None => (None, argument),
        };
        ensure!(!model.is_empty() && given_name != Some(""), "--model {argument:?}: expected [NAME=]MODEL");
        let source = Self::locate(model)?;
        Ok(Self { name: given_name.map_or(source.name, str::to_owned), ..source })
    }

    fn locate(model: &str) -> Result<Self> {
        let folder = Path::new(model);
        if folder.is_dir() {
            let folder = folder.canonicalize().with_context(|| format!("cannot resolve {model}"))?;
            let base = folder.file_name().map_or_else(|| model.into(), |name| name.to_string_lossy().into_owned());
            let entry = catalogue::find(&base);
            let name = entry.map_or(base, |entry| entry.name.clone());
            return Ok(Self { name, entry, location: ModelLocation::Folder(folder), aliases: Vec::new() });
        }
        let (repository, revision) = match model.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision.to_owned())),
            None => (model, None),
        };
        if let Some(entry) = catalogue::find(repository) {
            let location = match &entry.hub {
                None => ModelLocation::Builtin,
                Some(hub) => {
                    let revision = revision.unwrap_or_else(|| hub.revision.clone());
                    ModelLocation::Hub(Revision { repository: hub.repository.clone(), revision }, Some(hub))
                }
            };
            return Ok(Self { name: entry.name.clone(), entry: Some(entry), location, aliases: Vec::new() });
        }
        if is_hub_name(repository) {
            let at =
                Revision { repository: repository.to_owned(), revision: revision.unwrap_or_else(|| "main".to_owned()) };
            return Ok(Self {
                name: repository.to_owned(),
                entry: None,
                location: ModelLocation::Hub(at, None),
                aliases: Vec::new(),
            });
        }
        let hint = catalogue::similar(model).map_or(String::new(), |entry| format!("Did you mean {}? ", entry.name));
        bail!(
            "--model {model:?} is not a folder, not organization/name on the hub, and not a known model. {hint}\
             `rerankd models` lists the known models"
        )
    }

    /// All names besides `name` that requests may use: the catalogue's, the name without the organization, and `aliases`. With
    /// NAME=MODEL the catalogue's do not apply, so that two revisions of one model can be served side by side.
    pub fn all_aliases(&self) -> Vec<String> {
        let entry = self.entry.filter(|entry| entry.name == self.name);
        let mut aliases: Vec<String> = entry.iter().flat_map(|entry| entry.names()).map(str::to_owned).collect();
        aliases.push(catalogue::short_name(&self.name).to_owned());
        aliases.extend(self.aliases.iter().cloned());
        let mut known = HashSet::from([self.name.to_ascii_lowercase()]);
        aliases.retain(|alias| known.insert(alias.to_ascii_lowercase()));
        aliases
    }

    /// Whether both are the same model under the same name. Their aliases may differ.
    pub fn is_same_model(&self, other: &Self) -> bool {
        self.name == other.name && self.location == other.location
    }

    /// Whether the files are on this machine: configuration, tokenizer, and a checkpoint or its index. The shards of an index
    /// are not looked for.
    pub fn is_cached(&self, hub: &Hub) -> bool {
        match &self.location {
            ModelLocation::Builtin | ModelLocation::Folder(_) => true,
            ModelLocation::Hub(at, weights) => {
                let weights = weights.map_or(WEIGHT_FILES.to_vec(), |known| vec![known.weights.as_str()]);
                ["config.json", "tokenizer.json"].iter().all(|file| hub.cached(at, file).is_some())
                    && weights.iter().any(|file| hub.cached(at, file).is_some())
            }
        }
    }

    /// Finds the files; those that are not in the cache are downloaded.
    ///
    /// # Errors
    /// A file is missing or cannot be downloaded. The message names the file.
    pub fn files(&self, hub: &Hub) -> Result<ModelFiles> {
        match &self.location {
            ModelLocation::Builtin => Ok(builtin_files()),
            ModelLocation::Folder(folder) => folder_files(folder),
            ModelLocation::Hub(at, known) => hub_files(hub, at, *known),
        }
    }
}

fn builtin_files() -> ModelFiles {
    let embedded = |file: &str| format!("models/mini/{file} (embedded in the binary)");
    ModelFiles {
        config: (include_str!("../../models/mini/config.json").to_owned(), embedded("config.json")),
        tokenizer: (include_bytes!("../../models/mini/tokenizer.json").as_slice().into(), embedded("tokenizer.json")),
        weights: WeightsFile::Bytes(
            "models/mini/model.safetensors (embedded in the binary)",
            include_bytes!("../../models/mini/model.safetensors"),
        ),
        modules: Vec::new(),
        sentence_transformers: None,
    }
}

fn folder_files(folder: &Path) -> Result<ModelFiles> {
    let fetch_optional = |file: &str| Ok(Some(folder.join(file)).filter(|path| path.exists()));
    let none =
        || format!("{}: no checkpoint in this folder; expected one of {}", folder.display(), WEIGHT_FILES.join(", "));
    let weights = first_checkpoint(&fetch_optional)?.with_context(none)?;
    let is_chain = folder.join(MODULES_FILE).exists();
    read_files(&|file| Ok(folder.join(file)), &fetch_optional, is_chain, &|| Ok(weights.clone()))
}

fn hub_files(hub: &Hub, at: &Revision, known: Option<&HubFiles>) -> Result<ModelFiles> {
    let fetch = |file: &str| -> Result<PathBuf> {
        hub.fetch(at, file).with_context(|| {
            let why = if hub.is_offline() {
                "not in the cache, and HF_HUB_OFFLINE disables downloads; unset it, or run `rerankd download` where there is a network"
            } else {
                "cannot be downloaded"
            };
            format!("{file} of {at}: {why} (cache folder: {})", hub.cache_folder().display())
        })
    };
    // Optional files come before config.json, so once that is cached, the hub need not be asked for them again.
    let is_known = hub.cached(at, CONFIG_FILE).is_some();
    let fetch_optional = |file: &str| match (known, is_known) {
        // The catalogue says what the model has.
        (Some(_), _) => Ok(None),
        (None, true) => Ok(hub.cached(at, file)),
        (None, false) => hub.fetch_optional(at, file),
    };
    let is_chain = match known {
        Some(known) => known.modules,
        None => fetch_optional(MODULES_FILE)?.is_some(),
    };
    let weights = || {
        let weights = match known {
            Some(known) => fetch(&known.weights)?,
            None => first_checkpoint(&|file| hub.fetch_optional(at, file))?.with_context(|| {
                format!("{at}: no checkpoint in the repository; expected one of {}", WEIGHT_FILES.join(", "))
            })?,
        };
        if weights.to_string_lossy().ends_with(".index.json") {
            for shard in shard_names(&weights)? {
                fetch(&shard)?;
            }
        }
        Ok(weights)
    };
    read_files(&fetch, &fetch_optional, is_chain, &weights)
}

/// The first of [`WEIGHT_FILES`] that exists.
fn first_checkpoint(fetch_optional: &dyn Fn(&str) -> Result<Option<PathBuf>>) -> Result<Option<PathBuf>> {
    for file in WEIGHT_FILES {
        let found = fetch_optional(file)?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// Reads the files of a model. `fetch` returns the path of a file, and `fetch_optional` also that there is none. The weights,
/// which are large, come last.
fn read_files(
    fetch: &dyn Fn(&str) -> Result<PathBuf>,
    fetch_optional: &dyn Fn(&str) -> Result<Option<PathBuf>>,
    is_chain: bool,
    weights: &dyn Fn() -> Result<PathBuf>,
) -> Result<ModelFiles> {
    let text = |path: &Path, limit| Ok::<_, anyhow::Error>((read_text(path, limit)?, path.display().to_string()));
    let modules = if is_chain { module_files(fetch)? } else { Vec::new() };
    let sentence_transformers =
        fetch_optional(SENTENCE_TRANSFORMERS_FILE)?.map(|path| text(&path, MAX_CONFIG_BYTES)).transpose()?;
    let (config, tokenizer) = (fetch(CONFIG_FILE)?, fetch("tokenizer.json")?);
    let weights = weights()?;
    let (tokenizer_json, tokenizer_path) = text(&tokenizer, MAX_TOKENIZER_BYTES)?;
    Ok(ModelFiles {
        config: text(&config, MAX_CONFIG_BYTES)?,
        tokenizer: (tokenizer_json.into_bytes().into(), tokenizer_path),
        weights: WeightsFile::Path(weights),
        modules,
        sentence_transformers,
    })
}

/// The modules of modules.json, with their files.
fn module_files(fetch: &dyn Fn(&str) -> Result<PathBuf>) -> Result<Vec<ModuleFiles>> {
    let path = fetch(MODULES_FILE)?;
    let entries = parse_modules(&read_text(&path, MAX_CONFIG_BYTES)?).with_context(|| path.display().to_string())?;
    let files = |entry: ModuleEntry| {
        if entry.path.is_empty() {
            return Ok(ModuleFiles { entry, config: String::new(), weights: None });
        }
        let config = read_text(&fetch(&format!("{}/{CONFIG_FILE}", entry.path))?, MAX_CONFIG_BYTES)?;
        let weights = match entry.has_weights() {
            true => Some(fetch(&format!("{}/{}", entry.path, WEIGHT_FILES[0]))?),
            false => None,
        };
        Ok(ModuleFiles { entry, config, weights })
    };
    entries.into_iter().map(files).collect()
}

/// Whether `name` is `organization/name` in the characters that the hub allows. Only such names become part of a URL or a path.
fn is_hub_name(name: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    name.split_once('/').is_some_and(|(organization, rest)| part(organization) && part(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn served_names_and_revisions_are_parsed() {
        let source = ModelSource::parse("small=BAAI/bge-reranker-base").unwrap();
        assert_eq!(source.name, "small");
        assert!(
            matches!(source.location, ModelLocation::Hub(at, Some(known)) if at.revision.len() == 40 && known.weights == "model.safetensors")
        );
        let source = ModelSource::parse("someone/their-reranker@v2").unwrap();
        assert!(
            matches!(source.location, ModelLocation::Hub(at, None) if at.revision == "v2" && at.repository == "someone/their-reranker")
        );
    }

    #[test]
    fn other_arguments_are_refused_with_a_similar_name() {
        for wrong in ["nothing-here", "a/b/c", "../etc/passwd", "https://host/x", "a/..", "=x", "x="] {
            assert!(ModelSource::parse(wrong).is_err(), "{wrong}");
        }
        let message = |argument: &str| ModelSource::parse(argument).unwrap_err().to_string();
        assert!(message("bge-reranker-v2m3").contains("Did you mean BAAI/bge-reranker-v2-m3?"));
        assert!(!message("nothing-here").contains("Did you mean") && message("x").contains("`rerankd models`"));
    }
}
