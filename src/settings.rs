//! Flags, environment and config file -> what they mean on this machine.
//!
//! Two stages: the `*Args` structs hold what was typed; [`ModelSettings`] and [`ServeSettings`] what it comes to, checked once.
//! A flag beats its environment variable, which beats its line in the config file, which beats the default.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Command, ValueEnum};

use crate::api::{ApiLimits, Keys, ServerTimes};
use crate::backend::Dtype;
use crate::backend::cpu::{CpuBackend, Pool};
#[cfg(feature = "cuda")]
use crate::backend::cuda::{self, CudaOptions, Element};
use crate::loading::download::Hub;
use crate::loading::source::{BUILTIN, ModelSource};
use crate::loading::{self, DeviceChoice, LoadOptions};
use crate::models::{Model, Models};
use crate::scheduler::SchedulerLimits;
use crate::telemetry::LogFormat;
use crate::text::{Tail, TextLimits};

/// Tokens of one batch on a processor, where nothing else is asked for.
pub const MAX_BATCH_TOKENS: usize = 2048;
/// The same on a card: a whole number of waves of 128 x 256 tiles on 132 multiprocessors, at every shape of both large models.
#[cfg(feature = "cuda")]
pub const CUDA_BATCH_TOKENS: usize = 16_896;

/// What `--device` may be.
const DEVICES: &str = if cfg!(feature = "cuda") { "cpu, cuda, cuda:N, auto or candle" } else { "cpu or candle" };

/// Which models, where they compute and how they read: shared by every command that scores.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Models")]
pub struct ModelArgs {
    /// Model to load; repeat for several [default: the built-in one]
    ///
    /// A name from `rerankd models`, organisation/name on the hub (with @revision if need be), or a folder with
    /// config.json, tokenizer.json and the weights. NAME=MODEL serves it under a name of your own.
    #[arg(long = "model", id = "model", value_name = "[NAME=]MODEL", env = "RERANKD_MODEL", value_delimiter = ',')]
    pub models: Vec<String>,

    /// Tokens of a query and a chunk together [default: the model's own]
    ///
    /// Longer documents are cut into overlapping chunks of this size, and the best chunk counts. A larger window reads more
    /// context at a time, and costs more than proportionally.
    #[arg(long, value_name = "TOKENS", env = "RERANKD_WINDOW")]
    pub window: Option<usize>,

    /// Tokens of a query that are read [default: half the window]
    #[arg(long, value_name = "TOKENS", env = "RERANKD_MAX_QUERY_TOKENS")]
    pub max_query_tokens: Option<usize>,

    /// Where a long document's last chunk lies
    ///
    /// `aligned`: it ends with the document and is as long as the others. `short`: it begins a stride after its neighbour.
    #[arg(long, value_enum, default_value = "aligned", env = "RERANKD_TAIL")]
    pub tail: TailArg,

    /// Device to compute on
    ///
    /// `cpu`: our own kernels for the instructions that this processor has. `cuda`: an NVIDIA card, `cuda:1` that one,
    /// `cuda:0,cuda:1` both, each with the whole model. `auto`: a card where there is one. `candle`: the portable reference, in
    /// f32, slow.
    #[arg(long, default_value = "cpu", env = "RERANKD_DEVICE")]
    pub device: String,

    /// Numbers that encoder layers multiply
    ///
    /// `f32` is exact. `bf16` halves the memory and is about twice as fast where the processor multiplies bf16 (AVX-512 BF16;
    /// NEON's was not measured). `int8` halves it again. `f16` is for cards, and so is `fp8` (E4M3), which halves its memory and
    /// is less exact than int8. `auto` is f16 on a card, bf16 where the processor has it, and f32 elsewhere.
    #[arg(long, value_enum, default_value = "auto", env = "RERANKD_DTYPE")]
    pub dtype: DtypeArg,

    /// Threads that compute, and as many that tokenise [default: the processors this process may use]
    #[arg(long, value_name = "N", env = "RERANKD_THREADS")]
    pub threads: Option<usize>,

    /// Keep each computing thread on a processor of its own
    ///
    /// Steadier where this server has the machine to itself; harmful where it shares processors.
    #[arg(long, env = "RERANKD_PIN_THREADS")]
    pub pin_threads: bool,

    /// Tokens of one batch
    ///
    /// Larger batches use a processor a little better and make small requests wait longer for the batch before theirs.
    /// [default: 2048 on a processor, 16896 on a card]
    #[arg(long, value_name = "TOKENS", env = "RERANKD_MAX_BATCH_TOKENS")]
    pub max_batch_tokens: Option<usize>,

    /// The same bits for a pair whatever its company, on a card too (where it is slower)
    #[arg(long, env = "RERANKD_BATCH_INVARIANT")]
    pub batch_invariant: bool,

    /// Characters of one document; the rest is cut before it is tokenised
    #[arg(long, value_name = "CHARS", default_value_t = 262_144, env = "RERANKD_MAX_DOCUMENT_CHARS")]
    pub max_document_chars: usize,

    /// Tokens of one request, over all its chunks; beyond it the answer is 413
    #[arg(long, value_name = "TOKENS", default_value_t = 1_048_576, env = "RERANKD_MAX_REQUEST_TOKENS")]
    pub max_request_tokens: usize,
}

/// What `serve` adds: the address, keys, and the limits of its clients.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented by its type")]
    pub models: ModelArgs,

    /// Address to listen on; 0.0.0.0 for every network of this machine
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), env = "RERANKD_HOST", help_heading = "Server")]
    pub host: IpAddr,

    /// Port to listen on; 0 lets the system choose
    #[arg(long, default_value_t = 8080, env = "RERANKD_PORT", help_heading = "Server")]
    pub port: u16,

    /// Key that requests must carry; repeat, or separate by commas, for several [default: none, open to everyone]
    #[arg(
        long = "api-key",
        id = "api-key",
        value_name = "KEY",
        env = "RERANKD_API_KEY",
        hide_env_values = true,
        hide_default_value = true,
        value_delimiter = ',',
        help_heading = "Server"
    )]
    pub api_keys: Vec<String>,

    /// File with one key a line; lines that begin with # are comments
    #[arg(long, value_name = "FILE", env = "RERANKD_API_KEY_FILE", help_heading = "Server")]
    pub api_key_file: Option<PathBuf>,

    /// Documents of one request
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000), env = "RERANKD_MAX_DOCUMENTS", help_heading = "Limits")]
    pub max_documents: u32,

    /// Bytes of one request body; beyond it the answer is 413
    #[arg(long, value_name = "BYTES", default_value_t = 8 << 20, env = "RERANKD_MAX_BODY_BYTES", help_heading = "Limits")]
    pub max_body_bytes: usize,

    /// Bytes of all request bodies being read or answered; beyond it the answer is 503
    #[arg(long, value_name = "BYTES", default_value_t = 256 << 20, env = "RERANKD_MAX_INFLIGHT_BYTES", help_heading = "Limits")]
    pub max_inflight_bytes: usize,

    /// Tokens that may wait, per model; beyond it the answer is 503 with Retry-After
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 2_097_152,
        env = "RERANKD_MAX_QUEUE_TOKENS",
        help_heading = "Limits"
    )]
    pub max_queue_tokens: usize,

    /// Open connections
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000), env = "RERANKD_MAX_CONNECTIONS", help_heading = "Limits")]
    pub max_connections: u32,

    /// From a request's body to its answer; beyond it the answer is 504
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400),
        env = "RERANKD_REQUEST_TIMEOUT",
        help_heading = "Limits"
    )]
    pub request_timeout: u64,

    /// For a request's header to arrive; also how long an idle connection is kept
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400), env = "RERANKD_HEADER_TIMEOUT", help_heading = "Limits")]
    pub header_timeout: u64,

    /// For a request's body to arrive
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400), env = "RERANKD_BODY_TIMEOUT", help_heading = "Limits")]
    pub body_timeout: u64,

    /// For running requests to finish after SIGTERM; a second signal ends at once
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400), env = "RERANKD_DRAIN_TIMEOUT", help_heading = "Limits")]
    pub drain_timeout: u64,
}

/// Settings of every command.
#[derive(Debug, Clone, Args)]
pub struct CommonArgs {
    /// TOML file with a line for any flag: `port = 8080`, `model = ["a", "b"]`
    #[arg(long, value_name = "FILE", env = "RERANKD_CONFIG", global = true, help_heading = "General")]
    pub config: Option<PathBuf>,

    /// Log lines for people or for machines
    #[arg(
        long,
        value_enum,
        default_value = "text",
        env = "RERANKD_LOG_FORMAT",
        global = true,
        help_heading = "General"
    )]
    pub log_format: LogFormat,

    /// What to log: error, warn, info, debug, or a filter like `rerankd=debug,hyper=info`
    #[arg(
        long,
        value_name = "FILTER",
        default_value = "info",
        env = "RERANKD_LOG",
        global = true,
        help_heading = "General"
    )]
    pub log: String,
}

/// [`Tail`] at the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the flag's help says it")]
pub enum TailArg {
    Aligned,
    Short,
}

/// [`Dtype`] at the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the flag's help says it")]
pub enum DtypeArg {
    Auto,
    F32,
    F16,
    Bf16,
    Int8,
    Fp8,
}

/// Models to load, and how.
#[derive(Debug)]
pub struct ModelSettings {
    /// In the order of the command line.
    pub sources: Vec<ModelSource>,
    /// The hub and its cache.
    pub hub: Hub,
    /// Window, device and text limits.
    pub load: LoadOptions,
    /// Of each model's queue.
    pub scheduler: SchedulerLimits,
    /// That compute, and as many that tokenise.
    pub threads: usize,
}

/// Everything that `serve` needs.
#[derive(Debug)]
pub struct ServeSettings {
    /// To load.
    pub models: ModelSettings,
    /// To listen on.
    pub address: SocketAddr,
    /// That open it.
    pub keys: Keys,
    /// Of requests.
    pub limits: ApiLimits,
    /// Open at a time.
    pub max_connections: usize,
    /// Of connections and the drain.
    pub times: ServerTimes,
}

impl ModelArgs {
    /// Threads that compute: what was asked for, or the processors that this process may use (cgroup quotas count).
    pub fn threads(&self) -> usize {
        self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into))
    }

    fn device(&self, threads: usize) -> Result<DeviceChoice> {
        let name = self.device.as_str();
        match name {
            #[cfg(feature = "cuda")]
            "auto" if cuda::is_there() => self.cuda("cuda"),
            #[cfg(feature = "cuda")]
            _ if name.starts_with("cuda") => self.cuda(name),
            "cpu" | "auto" => {
                let dtype = match self.dtype {
                    DtypeArg::F32 => Dtype::F32,
                    DtypeArg::Bf16 => Dtype::Bf16,
                    DtypeArg::Int8 => Dtype::Int8,
                    DtypeArg::F16 => bail!("--dtype f16 is for cards; on a processor choose bf16, int8 or f32"),
                    DtypeArg::Fp8 => bail!("--dtype fp8 is for cards; on a processor choose int8, bf16 or f32"),
                    DtypeArg::Auto if CpuBackend::has_bf16() => Dtype::Bf16,
                    DtypeArg::Auto => Dtype::F32,
                };
                let pool = Pool::new(threads, self.pin_threads)
                    .with_context(|| format!("--threads {threads}: cannot start them"))?;
                Ok(DeviceChoice::Cpu(dtype, Arc::new(pool)))
            }
            "candle" => self.only_f32().map(|()| DeviceChoice::Candle),
            #[cfg(feature = "candle-cuda")]
            _ if name == "candle-cuda" || name.starts_with("candle-cuda:") => {
                self.only_f32()?;
                let ordinal = name.split_once(':').map_or("0", |(_, ordinal)| ordinal);
                Ok(DeviceChoice::CandleCuda(
                    ordinal.parse().with_context(|| format!("--device {name:?}: no device number"))?,
                ))
            }
            _ => bail!("--device {name:?} is not known to this build; expected {DEVICES}"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, names: &str) -> Result<DeviceChoice> {
        let ordinal = |name: &str| match name {
            "cuda" => Ok(0),
            _ => name
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .with_context(|| format!("--device {name:?}: expected cuda, cuda:1, or a list as cuda:0,cuda:1")),
        };
        let ordinals: Vec<usize> = names.split(',').map(|name| ordinal(name.trim())).collect::<Result<_>>()?;
        for (i, ordinal) in ordinals.iter().enumerate() {
            ensure!(!ordinals[..i].contains(ordinal), "--device {names:?} names cuda:{ordinal} twice");
        }
        let element = match self.dtype {
            DtypeArg::Auto | DtypeArg::F16 => Element::F16,
            DtypeArg::Bf16 => Element::Bf16,
            DtypeArg::F32 => Element::F32,
            DtypeArg::Fp8 => Element::Fp8,
            DtypeArg::Int8 => bail!("--dtype int8 is for processors; on a card choose fp8, f16, bf16 or f32"),
        };
        let max_batch_tokens = self.max_batch_tokens.unwrap_or(CUDA_BATCH_TOKENS);
        Ok(DeviceChoice::Cuda(ordinals, CudaOptions { element, max_batch_tokens, invariant: self.batch_invariant }))
    }

    fn only_f32(&self) -> Result<()> {
        ensure!(
            matches!(self.dtype, DtypeArg::Auto | DtypeArg::F32),
            "--dtype: --device {} computes in f32 alone; leave --dtype out, or choose --device cpu",
            self.device
        );
        Ok(())
    }

    /// What was typed -> what it means here.
    ///
    /// # Errors
    /// A model that is neither a folder nor a name, a device that is not there, a limit of 0.
    pub fn settle(&self, max_queue_tokens: usize) -> Result<ModelSettings> {
        for (flag, value) in [
            ("--threads", self.threads),
            ("--max-batch-tokens", self.max_batch_tokens),
            ("--max-document-chars", Some(self.max_document_chars)),
            ("--max-request-tokens", Some(self.max_request_tokens)),
            ("--max-query-tokens", self.max_query_tokens),
        ] {
            ensure!(value != Some(0), "{flag} is 0; expected at least 1");
        }
        let threads = self.threads();
        let mut asked: Vec<&str> = self.models.iter().map(String::as_str).filter(|model| !model.is_empty()).collect();
        if asked.is_empty() {
            tracing::info!(
                "no --model is given: loading {BUILTIN}, which is built in and good for trying; `rerankd models` lists better ones"
            );
            asked.push(BUILTIN);
        }
        let sources = asked.into_iter().map(ModelSource::parse).collect::<Result<_>>()?;
        let tail = match self.tail {
            TailArg::Aligned => Tail::Aligned,
            TailArg::Short => Tail::Short,
        };
        let limits = TextLimits {
            window: 0, // decided per model
            max_query_tokens: self.max_query_tokens,
            max_document_chars: self.max_document_chars,
            max_request_tokens: self.max_request_tokens,
            tail,
            threads,
        };
        let device = self.device(threads)?;
        let default_batch = match &device {
            #[cfg(feature = "cuda")]
            DeviceChoice::Cuda(..) => CUDA_BATCH_TOKENS,
            _ => MAX_BATCH_TOKENS,
        };
        let max_batch_tokens = self.max_batch_tokens.unwrap_or(default_batch);
        Ok(ModelSettings {
            sources,
            hub: Hub::from_env(),
            load: LoadOptions { device, window: self.window, limits, profile: None },
            scheduler: SchedulerLimits { max_batch_tokens, max_queue_tokens },
            threads,
        })
    }
}

impl ServeArgs {
    /// What was typed -> what it means here.
    ///
    /// # Errors
    /// As [`ModelArgs::settle`]; a key file that cannot be read.
    pub fn settle(&self) -> Result<ServeSettings> {
        ensure!(self.max_documents > 0, "--max-documents is 0; expected at least 1");
        ensure!(self.max_connections > 0, "--max-connections is 0; expected at least 1");
        let file = match &self.api_key_file {
            Some(path) => std::fs::read_to_string(path)
                .with_context(|| format!("--api-key-file {}: cannot be read", path.display()))?,
            None => String::new(),
        };
        let from_file = file.lines().map(str::trim).filter(|line| !line.starts_with('#'));
        let keys = Keys::new(self.api_keys.iter().map(String::as_str).chain(from_file));
        ensure!(self.api_keys.is_empty() || !keys.is_open(), "--api-key is empty; leave it out to serve everyone");
        // A file without a key would silently open the server to everyone.
        ensure!(self.api_key_file.is_none() || !keys.is_open(), "--api-key-file: there is no key in it");
        Ok(ServeSettings {
            models: self.models.settle(self.max_queue_tokens)?,
            address: SocketAddr::new(self.host, self.port),
            keys,
            limits: ApiLimits {
                max_documents: self.max_documents as usize,
                max_body_bytes: self.max_body_bytes,
                max_inflight_bytes: self.max_inflight_bytes.max(self.max_body_bytes),
                body_deadline: Duration::from_secs(self.body_timeout),
                request_deadline_s: self.request_timeout,
            },
            max_connections: self.max_connections as usize,
            times: ServerTimes {
                header: Duration::from_secs(self.header_timeout),
                drain: Duration::from_secs(self.drain_timeout),
            },
        })
    }
}

impl ModelSettings {
    /// Loads every model and starts its worker. Each one's name and description go to `report`.
    ///
    /// # Errors
    /// Anything about the models' files; two models of one name.
    pub fn start(&self, mut report: impl FnMut(&str, &str)) -> Result<Models> {
        let mut models = Vec::with_capacity(self.sources.len());
        for source in &self.sources {
            let loaded =
                loading::load(source, &self.hub, &self.load).with_context(|| format!("cannot load {}", source.name))?;
            report(&loaded.name, &loaded.description);
            models.push(Model::start(loaded, self.scheduler)?);
        }
        Models::new(models)
    }
}

/// Makes each line of a TOML file the default of the flag with its name, in every command that has it.
///
/// # Errors
/// A file that cannot be read, a line that is no flag, a value that is no text, number, boolean or list of them.
pub fn with_config_file(mut command: Command, path: &Path) -> Result<Command> {
    let text = std::fs::read_to_string(path).with_context(|| format!("--config {}: cannot be read", path.display()))?;
    let table: toml::Table = text.parse().with_context(|| format!("--config {}", path.display()))?;
    for (key, value) in table {
        let values = texts(&value).with_context(|| {
            format!("--config {}: {key}: expected a text, a number, true, false, or a list of them", path.display())
        })?;
        let flag = key.replace('_', "-");
        let named = |command: &Command| {
            command.get_arguments().find(|arg| arg.get_long() == Some(&flag)).map(|arg| arg.get_id().clone())
        };
        let mut known = false;
        let holders: Vec<String> =
            command.get_subcommands().filter(|sub| named(sub).is_some()).map(|sub| sub.get_name().to_owned()).collect();
        for holder in holders {
            known = true;
            let values = values.clone();
            let id = command.find_subcommand(&holder).and_then(named).context("found just before")?;
            command = command.mut_subcommand(holder, |sub| sub.mut_arg(id, |arg| arg.default_values(values)));
        }
        if let Some(id) = named(&command).filter(|_| key != "config") {
            known = true;
            command = command.mut_arg(id, |arg| arg.default_values(values));
        }
        ensure!(known, "--config {}: {key:?} is not the name of a flag", path.display());
    }
    Ok(command)
}

fn texts(value: &toml::Value) -> Option<Vec<String>> {
    match value {
        toml::Value::String(text) => Some(vec![text.clone()]),
        toml::Value::Integer(number) => Some(vec![number.to_string()]),
        toml::Value::Float(number) => Some(vec![number.to_string()]),
        toml::Value::Boolean(flag) => Some(vec![flag.to_string()]),
        toml::Value::Array(list) => Some(list.iter().map(texts).collect::<Option<Vec<_>>>()?.concat()),
        _ => None,
    }
}
