//! From a model's name to a model that scores: finds the files, checks them, loads the weights onto the device, and scores one
//! pair. Called at start, and by `serve` when its list of models changes.

pub mod catalogue;
mod device;
pub mod download;
pub mod memory;
pub mod source;

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::backend::candle::CandleBackend;
use crate::backend::cpu::{self, CpuBackend};
use crate::backend::profile::{Profile, Profiled};
#[cfg(feature = "cuda")]
use crate::backend::{AttentionShape, cuda::CudaBackend};
use crate::backend::{Backend, Timed};
use crate::batch::{Batch, Pair};
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::modules::{ModuleEntry, parse_score_map};
use crate::checkpoint::weights::Weights;
#[cfg(feature = "cuda")]
use crate::encoder::Replicas;
use crate::encoder::{self, CrossEncoder};
use crate::score::ScoreMap;
use crate::telemetry;
use crate::text::{EmbeddingRows, TextEncoder, TextLimits};
pub use device::{DeviceChoice, gated_notice};
use download::Hub;
use memory::ModelSize;
use source::{ModelFiles, ModelSource, WeightsFile};

/// Default window, in tokens, of a model that is not in the catalogue; less if its position embeddings end before.
const DEFAULT_WINDOW: usize = 1024;

/// How to load models.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    pub device: DeviceChoice,
    /// Window of every model, in tokens; `None` is each model's default.
    pub window: Option<usize>,
    pub limits: TextLimits,
    /// Where to add the time of every operation, for benchmarks. Timing slows the model down.
    pub profile: Option<Arc<Profile>>,
}

/// Loads models with the same options. The models share the loader's compute threads.
#[derive(Debug)]
pub struct Loader<'a> {
    hub: &'a Hub,
    options: &'a LoadOptions,
    pool: Option<Arc<cpu::ThreadPool>>,
}

/// A model that is ready to score.
pub struct LoadedModel {
    /// The name in requests and responses.
    pub name: String,
    /// Other names that requests may use.
    pub aliases: Vec<String>,
    /// From logits to scores.
    pub score_map: ScoreMap,
    /// From text to pairs of token ids.
    pub text: TextEncoder,
    /// From batches of pairs to logits.
    pub encoder: Arc<dyn CrossEncoder>,
    /// Precision of the GEMMs, or the implementation's name.
    pub dtype: &'static str,
    /// Rows of the word embedding; token ids are smaller.
    pub vocabulary: usize,
    /// Implementation, precision and device, dimensions, and seconds to load, for the log.
    pub description: String,
}

impl std::fmt::Debug for LoadedModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadedModel")
            .field("name", &self.name)
            .field("description", &self.description)
            .finish_non_exhaustive()
    }
}

impl<'a> Loader<'a> {
    /// Starts the compute threads that the device needs.
    ///
    /// # Errors
    /// The operating system cannot start the threads.
    pub fn new(hub: &'a Hub, options: &'a LoadOptions) -> Result<Self> {
        let pool = match options.device {
            DeviceChoice::Cpu { threads, pin_threads, .. } => {
                let pool = cpu::ThreadPool::new(threads, pin_threads);
                Some(Arc::new(pool.with_context(|| format!("cannot start {threads} compute threads (--threads)"))?))
            }
            _ => None,
        };
        Ok(Self { hub, options, pool })
    }

    /// Estimates the memory of a model in bytes: of the host, and of each GPU. Downloads the model's files if they are not in the
    /// cache.
    ///
    /// # Errors
    /// A file is missing, or config.json is damaged or describes a model that is not supported.
    pub fn memory(&self, source: &ModelSource) -> Result<(u64, u64)> {
        let config = source.files(self.hub).and_then(|files| model_config(&files));
        let size = config.map(|config| (ModelSize::of(&config), self.options.device.for_model(&config)));
        let (size, device) = size.with_context(|| format!("cannot load {}", source.name))?;
        Ok(size.bytes_on(&device))
    }

    /// Loads a model, and scores one pair to check it.
    ///
    /// # Errors
    /// Files are missing or damaged, do not belong together, or do not fit the device. The message names the file, the tensor and
    /// what was expected.
    pub fn load(&self, source: &ModelSource) -> Result<LoadedModel> {
        self.load_files(source).with_context(|| format!("cannot load {}", source.name))
    }

    fn load_files(&self, source: &ModelSource) -> Result<LoadedModel> {
        let start = Instant::now();
        let files = source.files(self.hub)?;
        let config = model_config(&files)?;
        let score_map = score_map(source, &files)?;
        let window = window(source, &config, self.options.window)?;
        let (tokenizer_json, tokenizer_file) = &files.tokenizer;
        let rows = EmbeddingRows { vocabulary: config.vocab_size, token_types: config.type_vocab_size };
        let text = TextEncoder::new(tokenizer_json, rows, window, self.options.limits)
            .with_context(|| tokenizer_file.clone())?;
        check_pair_format(source, &text).with_context(|| tokenizer_file.clone())?;
        warn_of_licence(source);
        let device = self.options.device.for_model(&config);
        if device.name() != self.options.device.name() {
            tracing::warn!("{}", gated_notice(&source.name));
        }
        let encoder = self.encoder(&device, &config, &files, &source.name)?;
        check_score(encoder.as_ref(), &text.probe().with_context(|| tokenizer_file.clone())?)?;
        let description = format!(
            "{}; {} layers of hidden size {}; window {window} tokens; loaded in {:.1} s",
            encoder.describe(),
            config.layers,
            config.hidden_size,
            start.elapsed().as_secs_f64()
        );
        Ok(LoadedModel {
            name: source.name.clone(),
            aliases: source.all_aliases(),
            score_map,
            text,
            dtype: device.name(),
            encoder,
            vocabulary: config.vocab_size,
            description,
        })
    }

    fn encoder(
        &self,
        device: &DeviceChoice,
        config: &ModelConfig,
        files: &ModelFiles,
        name: &str,
    ) -> Result<Arc<dyn CrossEncoder>> {
        match (device, &self.pool) {
            (DeviceChoice::Cpu { dtype, .. }, Some(pool)) => {
                self.encoder_on(config, files, name, CpuBackend::new(*dtype, Arc::clone(pool)))
            }
            (DeviceChoice::Cpu { .. }, None) => bail!("the CPU backend has no thread pool"),
            (DeviceChoice::Candle { threads }, _) => {
                self.encoder_on(config, files, name, CandleBackend::cpu(*threads)?)
            }
            #[cfg(feature = "cuda")]
            (DeviceChoice::Cuda(ordinals, options), _) => {
                let shape = AttentionShape { heads: config.heads, head_size: config.head_size() };
                let replica = |&ordinal: &usize| {
                    self.encoder_on(config, files, name, CudaBackend::open(ordinal, shape, options.clone())?)
                };
                Ok(Replicas::of(ordinals.iter().map(replica).collect::<Result<_>>()?))
            }
            #[cfg(feature = "candle-cuda")]
            (DeviceChoice::CandleCuda { ordinal, threads }, _) => {
                self.encoder_on(config, files, name, CandleBackend::cuda(*ordinal, *threads)?)
            }
        }
    }

    /// Loads the weights onto `backend`, with a progress bar.
    fn encoder_on<B: Backend + Timed>(
        &self,
        config: &ModelConfig,
        files: &ModelFiles,
        name: &str,
        backend: B,
    ) -> Result<Arc<dyn CrossEncoder>> {
        let mut weights = match &files.weights {
            WeightsFile::Path(path) => Weights::open(path)?,
            WeightsFile::Bytes(name, bytes) => Weights::from_bytes(name, bytes)?,
        };
        for module in &files.modules {
            if let Some(path) = &module.weights {
                weights.add(&format!("{}/", module.entry.path), path)?;
            }
        }
        let bar = telemetry::progress_bytes(weights.bytes(), &format!("loading {name}"));
        let observed = bar.clone();
        weights.on_progress(move |bytes| observed.inc(bytes));
        let encoder = match &self.options.profile {
            Some(profile) => shared(encoder::load(config, weights, Profiled::new(backend, Arc::clone(profile)))),
            None => shared(encoder::load(config, weights, backend)),
        };
        bar.finish_and_clear();
        encoder
    }
}

/// The configuration of a model, without loading its weights.
///
/// # Errors
/// A configuration file is damaged or describes a model that is not supported. The message names the file and the field.
pub fn model_config(files: &ModelFiles) -> Result<ModelConfig> {
    let (config_json, config_file) = &files.config;
    let entries: Vec<ModuleEntry> = files.modules.iter().map(|module| module.entry.clone()).collect();
    let configs: Vec<String> = files.modules.iter().skip(1).map(|module| module.config.clone()).collect();
    ModelConfig::parse_with_modules(config_json, &entries, &configs).with_context(|| config_file.clone())
}

fn shared(encoder: Result<impl CrossEncoder + 'static>) -> Result<Arc<dyn CrossEncoder>> {
    Ok(Arc::new(encoder?))
}

/// The catalogue's score map, else the checkpoint's.
fn score_map(source: &ModelSource, files: &ModelFiles) -> Result<ScoreMap> {
    if let Some(entry) = source.entry {
        return Ok(entry.score);
    }
    let (settings, file) = match &files.sentence_transformers {
        Some((settings, file)) => (Some(settings.as_str()), file),
        None => (None, &files.config.1),
    };
    parse_score_map(&files.config.0, settings).with_context(|| file.clone())
}

/// The window in tokens: `requested`, or else the model's default as far as its position embeddings reach.
///
/// # Errors
/// `requested` is larger than the model's maximum.
fn window(source: &ModelSource, config: &ModelConfig, requested: Option<usize>) -> Result<usize> {
    let positions = config.max_window;
    let max = source.entry.map_or(positions, |entry| entry.window.max.min(positions));
    let default = source.entry.map_or(DEFAULT_WINDOW, |entry| entry.window.default);
    if let Some(window) = requested {
        ensure!(window <= max, "--window {window} is too large; the maximum of {} is {max} tokens", source.name);
    }
    Ok(requested.unwrap_or(default.min(max)))
}

/// Checks the tokenizer's pair template against the catalogue. With another template the scores are plausible but wrong.
fn check_pair_format(source: &ModelSource, text: &TextEncoder) -> Result<()> {
    let Some(entry) = source.entry else { return Ok(()) };
    let found = text.pair_format();
    if found != entry.pair.format {
        bail!("the tokenizer's pair template is {found:?}; {} was trained with {:?}", source.name, entry.pair.format);
    }
    Ok(())
}

/// Logs a licence that excludes commercial use.
fn warn_of_licence(source: &ModelSource) {
    let Some(entry) = source.entry.filter(|entry| entry.licence.contains("-NC")) else { return };
    tracing::warn!("the licence of {}, {}, excludes commercial use", source.name, entry.licence);
}

/// Scores one pair, to find damaged weights and device failures at start.
fn check_score(encoder: &dyn CrossEncoder, pair: &Pair) -> Result<()> {
    let logits = encoder.score(&Batch::pack([pair]))?;
    ensure!(
        logits.len() == 1 && logits[0].is_finite(),
        "a test pair scores {logits:?} instead of one finite number; the weights are damaged or do not belong to this config.json"
    );
    Ok(())
}
