//! The files of a model folder, loaded as at server start, on the CPU backend.
//!
//! The input is config.json, tokenizer.json and model.safetensors, separated by [`SEPARATOR`]. With a fourth part, the third is
//! the JSON of the safetensors header and the fourth is the data, so that a mutation does not have to correct the header's
//! length.

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use rerankd::backend::cpu::CpuDtype;
use rerankd::batch::Batch;
use rerankd::client::ClientId;
use rerankd::loading::download::{Hub, HubOptions};
use rerankd::loading::source::{ModelLocation, ModelSource};
use rerankd::loading::{DeviceChoice, LoadOptions, LoadedModel, Loader};
use rerankd::text::{DocumentOptions, Tail, TextLimits};

const SEPARATOR: &[u8] = b"\n=====\n";

/// Loaders by precision. One input is loaded at a time.
struct Loaders {
    loaders: Vec<Loader<'static>>,
    runtime: tokio::runtime::Runtime,
}

static LOADERS: LazyLock<Mutex<Loaders>> = LazyLock::new(|| {
    let hub = HubOptions { cache: PathBuf::new(), endpoint: String::new(), token: None, offline: true };
    let hub: &Hub = Box::leak(Box::new(Hub::new(hub)));
    let limits = TextLimits {
        max_query_tokens: None,
        max_document_chars: 10_000,
        max_request_tokens: 10_000,
        tail: Tail::Aligned,
        threads: 1,
        max_tokenizer_wait: std::time::Duration::MAX,
    };
    let loader = |dtype| {
        let device = DeviceChoice::Cpu { dtype, threads: 1, pin_threads: false };
        Loader::new(hub, Box::leak(Box::new(LoadOptions { device, window: None, limits, profile: None }))).unwrap()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let loaders = [CpuDtype::F32, CpuDtype::Bf16, CpuDtype::Int8].into_iter().map(loader).collect();
    Mutex::new(Loaders { loaders, runtime })
});

/// A model folder either loads and scores, or gives an error that names a file or says that the test pair has no finite score.
pub fn run(input: &[u8]) {
    let Some([config, tokenizer, weights]) = files(input) else { return };
    // In memory if possible.
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let folder = tempfile::tempdir_in(parent).unwrap();
    let Loaders { loaders, runtime } = &*LOADERS.lock().unwrap_or_else(PoisonError::into_inner);
    for (name, content) in [("config.json", config), ("tokenizer.json", tokenizer), ("model.safetensors", weights)] {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    let source = ModelSource {
        name: "fuzz".to_owned(),
        entry: None,
        location: ModelLocation::Folder(folder.path().to_owned()),
        aliases: Vec::new(),
    };
    match loaders[input.len() % loaders.len()].load(&source) {
        Ok(model) => runtime.block_on(score(&model)),
        Err(error) => {
            let message = format!("{error:#}");
            let names = ["config.json", "tokenizer.json", "model.safetensors", "a test pair scores"];
            assert!(names.iter().any(|name| message.contains(name)), "the error names no file: {message}");
        }
    }
}

fn files(input: &[u8]) -> Option<[Vec<u8>; 3]> {
    let (config, rest) = split(input)?;
    let (tokenizer, weights) = split(rest)?;
    let weights = match split(weights) {
        Some((header, data)) => [&(header.len() as u64).to_le_bytes(), header, data].concat(),
        None => weights.to_vec(),
    };
    Some([config.to_vec(), tokenizer.to_vec(), weights])
}

fn split(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = input.windows(SEPARATOR.len()).position(|window| window == SEPARATOR)?;
    Some((&input[..at], &input[at + SEPARATOR.len()..]))
}

/// If a loaded model tokenizes the request, then every pair fits the window, every id has an embedding, and it scores.
async fn score(model: &LoadedModel) {
    let documents: Arc<[String]> =
        ["", "apple", "red apple, green fruit. ".repeat(8).as_str()].map(str::to_owned).into();
    let Ok(encoded) = model.text.encode(ClientId::Only, "an apple", documents, DocumentOptions::default()).await else {
        return;
    };
    assert_eq!(encoded.documents.len(), 3);
    for pair in &encoded.pairs {
        assert!(pair.tokens() <= model.text.window());
        assert!(pair.ids().iter().all(|&id| (id as usize) < model.vocabulary));
    }
    let logits = model.encoder.score(&Batch::pack(&encoded.pairs)).unwrap();
    assert_eq!(logits.len(), encoded.pairs.len());
}
