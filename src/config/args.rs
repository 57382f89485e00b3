//! The flags, as typed.
//!
//! Every flag of `serve` is also an environment variable (`RERANKD_` and the flag's name) and a key of the config file.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::secret::Secret;
use crate::telemetry::{self, LogFormat};

/// The values of a command's flags as they were typed, by the flag's name without `--`; those of its environment variable, the
/// config file or the default, if it was not. Without secrets.
pub type FlagValues = BTreeMap<String, Vec<OsString>>;

/// The models to load, the device, and the limits on text. Shared by every command that computes scores.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Models")]
pub struct ModelArgs {
    /// Model to load; repeat for several [default: rerankd-mini, which is built in]
    ///
    /// A name from `rerankd models`, organization/name on the Hugging Face hub (optionally @revision), or a folder with
    /// config.json, tokenizer.json and the weights. NAME=MODEL serves the model under the name NAME.
    #[arg(long = "model", id = "model", value_name = "[NAME=]MODEL", env = "RERANKD_MODEL", value_delimiter = ',')]
    pub models: Vec<String>,

    /// Another name for a model, which requests may use; repeat it for several [default: none]
    ///
    /// The model is loaded once. Without =MODEL it is the first one. Models from the list of known models already have the aliases
    /// that `rerankd models --json` shows.
    #[arg(long = "alias", id = "alias", value_name = "ALIAS[=MODEL]", env = "RERANKD_ALIAS", value_delimiter = ',')]
    pub aliases: Vec<String>,

    /// Maximum tokens of one query and one chunk together [default: listed by `rerankd models`]
    ///
    /// Longer documents are split into overlapping chunks, and the best chunk gives the document's score. A larger window gives
    /// the model more context per chunk; the cost of attention grows with the square of the window. Special tokens count.
    #[arg(long, value_name = "TOKENS", env = "RERANKD_WINDOW")]
    pub window: Option<usize>,

    /// Maximum tokens of a query; longer queries are truncated [default: half the window]
    #[arg(long, value_name = "TOKENS", env = "RERANKD_MAX_QUERY_TOKENS")]
    pub max_query_tokens: Option<usize>,

    /// Position of a long document's last chunk
    ///
    /// `aligned`: the last chunk ends where the document ends and is as long as the others. `short`: the last chunk starts one
    /// stride after the previous one and may be shorter.
    #[arg(long, value_enum, default_value = "aligned", env = "RERANKD_TAIL")]
    pub tail: TailArg,

    /// Device to compute on: cpu, cuda, cuda:N, auto or candle
    ///
    /// `cpu`: the fastest kernels for this processor. `cuda`: the first NVIDIA GPU; `cuda:1` selects the second;
    /// `cuda:0,cuda:1` uses both, each with a copy of the model. `auto`: the first GPU if it can be used, else the CPU. `candle`:
    /// the reference implementation on the CPU, f32 only, slow.
    #[arg(long, default_value = "cpu", env = "RERANKD_DEVICE")]
    pub device: String,

    /// Precision of the encoder's matrix multiplications
    ///
    /// On a CPU: `f32`; `bf16` (half the memory, about twice as fast where the CPU has fast bf16 instructions); `int8` (a quarter
    /// of the memory, less accurate scores). On a GPU: `f16`, `bf16`, `f32`; `fp8` (E4M3, needs compute capability 8.9 or higher,
    /// less accurate than int8). `auto` is f16 on a GPU, bf16 on a CPU that multiplies it at least as fast as f32 (measured at
    /// start), and f32 on other CPUs.
    #[arg(long, value_enum, default_value = "auto", env = "RERANKD_DTYPE")]
    pub dtype: DtypeArg,

    /// Number of compute threads, and of tokenizer threads [default: the processors this process may use]
    ///
    /// The default respects the CPU affinity mask and the cgroup quota. On a GPU only the tokenizer threads are used.
    #[arg(long, value_name = "N", env = "RERANKD_THREADS")]
    pub threads: Option<usize>,

    /// Pin each compute thread to one processor (CPU only) [default: false]
    ///
    /// Latency varies less when the server has the machine to itself. Do not pin threads when other programs share the
    /// processors.
    #[arg(long, env = "RERANKD_PIN_THREADS")]
    pub pin_threads: bool,

    /// Token budget of one batch [default: 2048 on a CPU, 16896 on a GPU]
    ///
    /// Larger batches use the device slightly better; small requests then wait longer for the batch that runs before theirs.
    #[arg(long, value_name = "TOKENS", env = "RERANKD_MAX_BATCH_TOKENS")]
    pub max_batch_tokens: Option<usize>,

    /// Make scores on a GPU bitwise independent of the batch [default: false]
    ///
    /// Without it, scores on a GPU vary slightly with the composition of the batch; with it, the GPU is slower. Scores on the CPU
    /// are always bitwise independent of the batch.
    #[arg(long, env = "RERANKD_BATCH_INVARIANT")]
    pub batch_invariant: bool,

    /// Maximum characters of one document; longer documents are truncated before tokenization
    #[arg(long, value_name = "CHARS", default_value_t = 262_144, env = "RERANKD_MAX_DOCUMENT_CHARS")]
    pub max_document_chars: usize,

    /// Maximum tokens of one request over all its chunks; larger requests are answered with 413
    #[arg(long, value_name = "TOKENS", default_value_t = 1_048_576, env = "RERANKD_MAX_REQUEST_TOKENS")]
    pub max_request_tokens: usize,

    #[cfg(feature = "cuda")]
    #[command(flatten)]
    pub cuda: CudaArgs,
}

/// CUDA settings, for troubleshooting and measurements.
#[cfg(feature = "cuda")]
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "CUDA")]
pub struct CudaArgs {
    /// Folder for compiled kernels and autotuning results [default: rerankd in the user's cache folder]
    ///
    /// The user's cache folder is XDG_CACHE_HOME, or ~/.cache without it.
    #[arg(long, value_name = "FOLDER", env = "RERANKD_CUDA_CACHE")]
    pub cuda_cache: Option<PathBuf>,

    /// Matrix multiplication kernels
    ///
    /// `auto`: the faster kernel for each shape, measured at start. `cublaslt`: cuBLASLt only. `custom`: the custom kernel for
    /// every shape that it supports.
    #[arg(long, value_enum, default_value = "auto", env = "RERANKD_CUDA_GEMM")]
    pub cuda_gemm: CudaGemmArg,

    /// Attention kernel
    ///
    /// `auto`: the faster kernel, measured at start. `mma`: always the kernel that uses mma.sync instructions.
    #[arg(long, value_enum, default_value = "auto", env = "RERANKD_CUDA_ATTENTION")]
    pub cuda_attention: CudaAttentionArg,
}

/// Flags of `serve`: the models, the address, the API keys, and the limits on clients.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub models: ModelArgs,

    /// IP address to listen on; 0.0.0.0 listens on every interface
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), env = "RERANKD_HOST", help_heading = "Server")]
    pub host: IpAddr,

    /// TCP port to listen on; 0 selects a free port
    #[arg(long, default_value_t = 8080, env = "RERANKD_PORT", help_heading = "Server")]
    pub port: u16,

    /// API key that requests must carry; repeat it for several keys [default: none, open to everyone]
    ///
    /// Keys may also be separated by commas. With several keys, each is a client of its own: waiting requests of different clients
    /// are served in turn, and no client can fill the queue alone. Clients send a key in the header `Authorization: Bearer KEY`
    /// or `x-api-key: KEY`. Other users of the machine can read a command line: prefer --api-key-file or the environment variable.
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
    pub api_keys: Vec<Secret>,

    /// File with one API key per line; lines that start with # are comments [default: none]
    #[arg(long, value_name = "FILE", env = "RERANKD_API_KEY_FILE", help_heading = "Server")]
    pub api_key_file: Option<PathBuf>,

    /// Maximum requests per minute of each API key; more are answered with 429 and Retry-After [default: no limit]
    #[arg(long, value_name = "N", env = "RERANKD_KEY_REQUESTS_PER_MINUTE", help_heading = "Limits")]
    pub key_requests_per_minute: Option<NonZeroU32>,

    /// Maximum tokens per minute of each API key, over all chunks; more are answered with 429 and Retry-After [default: no limit]
    #[arg(long, value_name = "TOKENS", env = "RERANKD_KEY_TOKENS_PER_MINUTE", help_heading = "Limits")]
    pub key_tokens_per_minute: Option<NonZeroU32>,

    /// Host name that requests may use besides localhost; repeat it for several [default: none]
    ///
    /// Applies to a server without API keys on a loopback address. Such a server refuses other names in the Host and Origin
    /// headers, so that web pages in the user's browser cannot use it.
    #[arg(
        long = "allowed-host",
        id = "allowed-host",
        value_name = "HOST",
        env = "RERANKD_ALLOWED_HOST",
        value_delimiter = ',',
        help_heading = "Server"
    )]
    pub allowed_hosts: Vec<String>,

    /// Origin of a web page that may use the server from a browser; repeat it for several, * for every page [default: none]
    ///
    /// Adds CORS headers to responses and answers preflight requests. Example: `https://app.example`
    #[arg(
        long = "allowed-origin",
        id = "allowed-origin",
        value_name = "ORIGIN",
        env = "RERANKD_ALLOWED_ORIGIN",
        value_delimiter = ',',
        help_heading = "Server"
    )]
    pub allowed_origins: Vec<String>,

    /// URL of an OpenTelemetry collector that takes traces over HTTP [default: none]
    ///
    /// Example: `http://localhost:4318`. The variable OTEL_EXPORTER_OTLP_ENDPOINT has the same effect. OTEL_SERVICE_NAME,
    /// OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER_ARG (share of traces to record) and OTEL_EXPORTER_OTLP_HEADERS are read too.
    #[arg(long, value_name = "URL", env = "RERANKD_OTLP_ENDPOINT", help_heading = "Server")]
    pub otlp_endpoint: Option<String>,

    /// Rank requests for an unknown model with the first one instead of refusing them [default: false]
    #[arg(long, env = "RERANKD_ACCEPT_ANY_MODEL", help_heading = "Server")]
    pub accept_any_model: bool,

    /// Maximum documents of one request; requests with more documents are refused
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000), env = "RERANKD_MAX_DOCUMENTS", help_heading = "Limits")]
    pub max_documents: u32,

    /// Maximum bytes of one request body; larger bodies are answered with 413
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = 8 << 20,
        env = "RERANKD_MAX_BODY_BYTES",
        help_heading = "Limits"
    )]
    pub max_body_bytes: usize,

    /// Maximum bytes of memory for request bodies and responses; above the limit, requests are answered with 503
    ///
    /// A request counts with four times the size of its body. A limit below --max-body-bytes is raised to it.
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = 256 << 20,
        env = "RERANKD_MAX_INFLIGHT_BYTES",
        help_heading = "Limits"
    )]
    pub max_inflight_bytes: usize,

    /// Maximum tokens waiting in each model's queue; above the limit, requests are answered with 503 and Retry-After
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 2_097_152,
        env = "RERANKD_MAX_QUEUE_TOKENS",
        help_heading = "Limits"
    )]
    pub max_queue_tokens: usize,

    /// Maximum estimated wait in a model's queue; above the limit, requests are answered with 503 and Retry-After
    ///
    /// The server estimates the wait from its measured speed. The limit keeps the latency of admitted requests low under overload.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = parse_seconds, env = "RERANKD_MAX_QUEUE_WAIT", help_heading = "Limits")]
    pub max_queue_wait: f64,

    /// Memory for the scores of earlier requests, of each model; the same query and chunk are then not computed again
    ///
    /// An entry takes 89 bytes and holds one score. Each API key uses only its own entries. 0 keeps no scores.
    #[arg(long, value_name = "BYTES", default_value_t = 0, env = "RERANKD_SCORE_CACHE_BYTES", help_heading = "Limits")]
    pub score_cache_bytes: usize,

    /// Time limit for one batch; afterwards the device counts as hung and the process ends with exit code 70
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400), env = "RERANKD_BATCH_TIMEOUT", help_heading = "Limits")]
    pub batch_timeout: u64,

    /// Maximum open connections
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000), env = "RERANKD_MAX_CONNECTIONS", help_heading = "Limits")]
    pub max_connections: u32,

    /// Time limit from a request's complete body to its response; afterwards it is answered with 504
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400),
        env = "RERANKD_REQUEST_TIMEOUT",
        help_heading = "Limits"
    )]
    pub request_timeout: u64,

    /// Time limit for a request's headers to arrive
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400), env = "RERANKD_HEADER_TIMEOUT", help_heading = "Limits")]
    pub header_timeout: u64,

    /// Time limit for an idle connection between requests
    ///
    /// Choose it longer than the idle timeout of proxies and of clients' connection pools, so that they close connections first: a
    /// request sent while the server closes its connection fails.
    #[arg(long, value_name = "SECONDS", default_value_t = 75, value_parser = clap::value_parser!(u64).range(1..=86_400), env = "RERANKD_IDLE_TIMEOUT", help_heading = "Limits")]
    pub idle_timeout: u64,

    /// Time for which a client may read a response more slowly than 1 KiB/s; afterwards the connection is closed
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400), env = "RERANKD_WRITE_TIMEOUT", help_heading = "Limits")]
    pub write_timeout: u64,

    /// Time limit for a request's body to arrive; afterwards it is answered with 408
    ///
    /// A body must also arrive at 1,024 bytes in 5 seconds or faster.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400), env = "RERANKD_BODY_TIMEOUT", help_heading = "Limits")]
    pub body_timeout: u64,

    /// Time after SIGTERM during which connections are still accepted, while /ready already fails
    ///
    /// Behind a load balancer, choose it longer than its health checks need to notice.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.2, value_parser = parse_seconds, env = "RERANKD_SHUTDOWN_GRACE", help_heading = "Limits")]
    pub shutdown_grace: f64,

    /// Time limit for running requests to finish after SIGTERM or SIGINT
    ///
    /// After the limit, running requests are answered with 503 and the connections are closed. A second signal ends the process at
    /// once.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400), env = "RERANKD_DRAIN_TIMEOUT", help_heading = "Limits")]
    pub drain_timeout: u64,
}

/// Seconds, with decimals.
pub(crate) fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.01..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected 0.01 to 86400".to_owned()),
    }
}

/// Settings of every command.
#[derive(Debug, Clone, Args)]
pub struct CommonArgs {
    /// TOML file that sets flags: `port = 8080`, `model = ["a", "b"]` [default: none]
    ///
    /// A flag on the command line takes precedence over its environment variable, and the variable over the file.
    #[arg(long, value_name = "FILE", env = "RERANKD_CONFIG", global = true, help_heading = "General")]
    pub config: Option<PathBuf>,

    /// Format of the log on standard error
    #[arg(
        long,
        value_enum,
        default_value = "text",
        env = "RERANKD_LOG_FORMAT",
        global = true,
        help_heading = "General"
    )]
    pub log_format: LogFormat,

    /// Log level (off, error, warn, info, debug, trace) or a filter per module: `rerankd=debug,hyper=info`
    #[arg(
        long,
        value_name = "FILTER",
        default_value = "info",
        value_parser = telemetry::parse_log_filter,
        env = "RERANKD_LOG",
        global = true,
        help_heading = "General"
    )]
    pub log: String,
}

/// Values of `--tail`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TailArg {
    Aligned,
    Short,
}

/// Values of `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    Auto,
    F32,
    F16,
    Bf16,
    Int8,
    Fp8,
}

/// Values of `--cuda-gemm`.
#[cfg(feature = "cuda")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CudaGemmArg {
    Auto,
    Cublaslt,
    Custom,
}

/// Values of `--cuda-attention`.
#[cfg(feature = "cuda")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CudaAttentionArg {
    Auto,
    Mma,
}
