//! From a model's name to a model that scores. Called once, at start; no I/O of the program is below it.

pub mod catalogue;
pub mod config;
pub mod download;
pub mod source;
pub mod weights;

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::backend::candle::CandleBackend;
use crate::backend::cpu::{self, CpuBackend};
use crate::backend::profile::{Profile, Profiled};
#[cfg(feature = "cuda")]
use crate::backend::{
    AttentionShape,
    cuda::{CudaBackend, CudaOptions},
};
use crate::backend::{Backend, Dtype};
use crate::batch::Batch;
#[cfg(feature = "cuda")]
use crate::encoder::Replicas;
use crate::encoder::{self, CrossEncoder};
use crate::telemetry;
use crate::text::{TextEncoder, TextLimits};
use config::ModelConfig;
use download::Hub;
use source::{ModelSource, WeightsFile};
use weights::Weights;

/// The window of a model that the catalogue does not know, where its positions allow more.
const DEFAULT_WINDOW: usize = 1024;

/// Where a model computes, and in what precision.
#[derive(Debug, Clone)]
pub enum DeviceChoice {
    /// The processor, on these threads.
    Cpu(Dtype, Arc<cpu::Pool>),
    /// candle on the processor, in f32: portable, and the definition of right.
    Candle,
    /// NVIDIA cards by their numbers, each with the whole model.
    #[cfg(feature = "cuda")]
    Cuda(Vec<usize>, CudaOptions),
    /// candle's own CUDA kernels, on this device.
    #[cfg(feature = "candle-cuda")]
    CandleCuda(usize),
}

impl DeviceChoice {
    /// A word for tables.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Cpu(Dtype::F32, _) => "f32",
            Self::Cpu(Dtype::Bf16, _) => "bf16",
            Self::Cpu(Dtype::Int8, _) => "int8",
            Self::Candle => "candle",
            #[cfg(feature = "cuda")]
            Self::Cuda(_, options) => options.element.name(),
            #[cfg(feature = "candle-cuda")]
            Self::CandleCuda(_) => "candle-cuda",
        }
    }
}

/// What loading is told beside the model itself.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Where it computes.
    pub device: DeviceChoice,
    /// Overrides the model's default window.
    pub window: Option<usize>,
    /// The other limits of its texts; its `window` is decided here.
    pub limits: TextLimits,
    /// Has each operation timed, and what is found added here. For benches: it makes a model slower.
    pub profile: Option<Arc<Profile>>,
}

/// A model that is ready to score.
pub struct LoadedModel {
    /// The name that requests use.
    pub name: String,
    /// Other names.
    pub aliases: Vec<String>,
    /// Text to pairs.
    pub text: TextEncoder,
    /// Pairs to logits.
    pub encoder: Arc<dyn CrossEncoder>,
    /// Rows of the word embedding: every token id is below it.
    pub vocabulary: usize,
    /// Implementation, precision and device; dimensions; seconds to load.
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

/// Loads a model and has it score one pair.
///
/// # Errors
/// Anything about its files that does not fit together, naming the file, the tensor and what was expected.
pub fn load(source: &ModelSource, hub: &Hub, options: &LoadOptions) -> Result<LoadedModel> {
    let start = Instant::now();
    let files = source.files(hub)?;
    let (config_json, config_file) = &files.config;
    let config = ModelConfig::parse(config_json).with_context(|| config_file.clone())?;
    let window = window(source, &config, options.window)?;
    let (tokenizer_json, tokenizer_file) = &files.tokenizer;
    let text = TextEncoder::new(tokenizer_json, config.vocab_size, TextLimits { window, ..options.limits })
        .with_context(|| tokenizer_file.clone())?;
    check_pair_format(source, &text).with_context(|| tokenizer_file.clone())?;
    let encoder = load_encoder(&config, &files.weights, options, &source.name)?;
    check_score(encoder.as_ref(), &text)?;
    let description = format!(
        "{}; {} layers x {}; window {window}; loaded in {:.1} s",
        encoder.describe(),
        config.layers,
        config.hidden_size,
        start.elapsed().as_secs_f64()
    );
    // A name of the operator's own stands alone: the same model may be served twice, at two revisions.
    let entry = source.entry.filter(|entry| entry.name == source.name);
    let mut aliases: Vec<String> = entry.iter().flat_map(|entry| entry.names()).map(str::to_owned).collect();
    aliases.push(catalogue::short_name(&source.name).to_owned());
    aliases.retain(|alias| !alias.eq_ignore_ascii_case(&source.name));
    aliases.dedup();
    Ok(LoadedModel { name: source.name.clone(), aliases, text, encoder, vocabulary: config.vocab_size, description })
}

fn load_encoder(
    config: &ModelConfig,
    file: &WeightsFile,
    options: &LoadOptions,
    name: &str,
) -> Result<Arc<dyn CrossEncoder>> {
    /// Loads the weights, with a progress bar, onto one device.
    fn onto<B: Backend>(
        config: &ModelConfig,
        file: &WeightsFile,
        profile: Option<&Arc<Profile>>,
        name: &str,
        backend: B,
    ) -> Result<Arc<dyn CrossEncoder>> {
        let mut weights = match file {
            WeightsFile::Path(path) => Weights::open(path)?,
            WeightsFile::Bytes(name, bytes) => Weights::from_bytes(name, bytes)?,
        };
        let bar = telemetry::progress_bytes(weights.bytes(), &format!("loading {name}"));
        let observed = bar.clone();
        weights.on_progress(move |bytes| observed.inc(bytes));
        let encoder = match profile {
            Some(profile) => encoder::load(config, weights, Profiled::new(backend, Arc::clone(profile))),
            None => encoder::load(config, weights, backend),
        };
        bar.finish_and_clear();
        encoder
    }
    let profile = options.profile.as_ref();
    match &options.device {
        DeviceChoice::Cpu(dtype, pool) => onto(config, file, profile, name, CpuBackend::new(*dtype, Arc::clone(pool))),
        DeviceChoice::Candle => onto(config, file, profile, name, CandleBackend::cpu()),
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(ordinals, options) => {
            let shape = AttentionShape { heads: config.heads, head_size: config.hidden_size / config.heads };
            let replica =
                |&ordinal: &usize| onto(config, file, profile, name, CudaBackend::open(ordinal, shape, *options)?);
            Ok(Replicas::of(ordinals.iter().map(replica).collect::<Result<_>>()?))
        }
        #[cfg(feature = "candle-cuda")]
        DeviceChoice::CandleCuda(ordinal) => onto(config, file, profile, name, CandleBackend::cuda(*ordinal)?),
    }
}

/// The window that was asked for, or the model's default, never beyond its positions.
fn window(source: &ModelSource, config: &ModelConfig, asked: Option<usize>) -> Result<usize> {
    let positions = config.max_window();
    let max = source.entry.map_or(positions, |entry| entry.window.max.min(positions));
    let default = source.entry.map_or(DEFAULT_WINDOW, |entry| entry.window.default);
    if let Some(window) = asked {
        ensure!(window <= max, "a window of {window} tokens was asked for; {} reads at most {max}", source.name);
    }
    Ok(asked.unwrap_or(default.min(max)))
}

/// A tokenizer that lays pairs out otherwise than the model was trained on gives plausible, wrong scores.
fn check_pair_format(source: &ModelSource, text: &TextEncoder) -> Result<()> {
    let Some(entry) = source.entry else { return Ok(()) };
    let found = text.pair_format();
    if found != entry.pair.format {
        bail!("pairs come out as {found:?}; {} was trained on {:?}", source.name, entry.pair.format);
    }
    Ok(())
}

/// One real inference before the port opens.
fn check_score(encoder: &dyn CrossEncoder, text: &TextEncoder) -> Result<()> {
    let logits = encoder.score(&Batch::pack([&text.pair("Apple", "apple")?]))?;
    ensure!(
        logits.len() == 1 && logits[0].is_finite(),
        "the model's first score is {logits:?}; its weights cannot be right"
    );
    Ok(())
}
