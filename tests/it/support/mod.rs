//! Shared by the test modules: fixtures, real data, and models loaded from them.

pub(crate) mod random;
pub(crate) mod server;
pub(crate) mod skip;
pub(crate) mod stub;
pub(crate) mod tls;

use std::path::{Path, PathBuf};

use anyhow::Result;
use rerankd::backend::cpu::CpuDtype;
use rerankd::loading::download::{Hub, HubOptions};
use rerankd::loading::source::ModelSource;
use rerankd::loading::{DeviceChoice, LoadOptions, LoadedModel, Loader};
use rerankd::text::{Tail, TextLimits};
use serde::Deserialize;

pub(crate) use skip::skip;

/// The path of a file or folder in `tests/fixtures`.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The folder of real models and texts, if this machine has it. It is not part of the repository.
pub(crate) fn test_data() -> Option<PathBuf> {
    let folder = match std::env::var_os("RERANKD_TEST_DATA") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"),
    };
    folder.is_dir().then_some(folder)
}

/// A file or folder of the real data. Without it, reports that `test` is skipped.
pub(crate) fn real(test: &str, name: &str) -> Option<PathBuf> {
    let path = test_data().map(|folder| folder.join(name)).filter(|path| path.exists());
    if path.is_none() {
        skip(test, &format!("{name} is neither in ../shared/data nor in the folder that RERANKD_TEST_DATA names"));
    }
    path
}

/// Limits that no test reaches.
pub(crate) fn limits() -> TextLimits {
    TextLimits {
        max_query_tokens: None,
        max_document_chars: 1 << 20,
        max_request_tokens: 1 << 22,
        tail: Tail::Short,
        threads: 2,
        max_tokenizer_wait: std::time::Duration::MAX,
    }
}

/// Loads a model folder on the candle backend, as at server start.
pub(crate) fn load(folder: &Path) -> Result<LoadedModel> {
    load_on(DeviceChoice::Candle { threads: 2 }, folder)
}

/// The CPU backend, without pinned threads.
pub(crate) fn cpu(dtype: CpuDtype, threads: usize) -> DeviceChoice {
    DeviceChoice::Cpu { dtype, threads, pin_threads: false }
}

/// As [`load`], on another device.
pub(crate) fn load_on(device: DeviceChoice, folder: &Path) -> Result<LoadedModel> {
    let source = ModelSource::parse(&folder.display().to_string())?;
    let options = LoadOptions { device, window: None, limits: limits(), profile: None };
    Loader::new(&offline_hub(), &options)?.load(&source)
}

/// A hub that is never contacted, with an empty cache.
pub(crate) fn offline_hub() -> Hub {
    Hub::new(HubOptions { cache: PathBuf::new(), endpoint: String::new(), token: None, offline: true })
}

/// A paragraph of XQuAD and its questions.
#[derive(Deserialize)]
pub(crate) struct Paragraph {
    pub(crate) context: String,
    pub(crate) qas: Vec<Question>,
}

/// A question of XQuAD.
#[derive(Deserialize)]
pub(crate) struct Question {
    pub(crate) question: String,
}

/// All paragraphs of an XQuAD file, in its order.
///
/// # Panics
/// If there are none.
pub(crate) fn paragraphs(file: &Path) -> Vec<Paragraph> {
    #[derive(Deserialize)]
    struct File {
        data: Vec<Article>,
    }
    #[derive(Deserialize)]
    struct Article {
        paragraphs: Vec<Paragraph>,
    }
    let file: File = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let paragraphs: Vec<Paragraph> = file.data.into_iter().flat_map(|article| article.paragraphs).collect();
    assert!(!paragraphs.is_empty());
    paragraphs
}

/// splitmix64, seeded: the same sequence on every machine.
pub(crate) struct SplitMix64(pub(crate) u64);

impl SplitMix64 {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}
