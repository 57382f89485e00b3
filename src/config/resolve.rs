//! Resolves flags to settings: checks the values and fills in defaults that depend on this machine.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

#[cfg(feature = "cuda")]
use super::args::{CudaArgs, CudaAttentionArg, CudaGemmArg};
use super::args::{DtypeArg, ModelArgs, ServeArgs, TailArg};
use super::machine::{CudaAvailability, Machine};
use crate::api::{ApiLimits, HostList, Keys, Origins, ServerTimeouts};
use crate::backend::cpu::CpuDtype;
#[cfg(feature = "cuda")]
use crate::backend::cuda::{CudaDtype, CudaOptions, GemmChoice};
use crate::client::RateLimits;
use crate::loading::source::{BUILTIN, ModelSource, NEXT_STEP};
use crate::loading::{DeviceChoice, LoadOptions};
use crate::scheduler::SchedulerLimits;
use crate::text::{Tail, TextLimits};

/// Default token budget of one batch on a CPU.
pub const CPU_BATCH_TOKENS: usize = 2048;
/// Default token budget of one batch on a GPU: 132 tiles of 128 rows, one for each multiprocessor of an H100 or H200. The tiles of
/// a GEMM (128 x 256) then keep all multiprocessors busy to the end if the number of outputs is a multiple of 256.
#[cfg(feature = "cuda")]
pub const CUDA_BATCH_TOKENS: usize = 16_896;

/// Values of `--device` in this build.
const DEVICES: &str = if cfg!(feature = "cuda") { "cpu, cuda, cuda:N, auto or candle" } else { "cpu, auto or candle" };

/// The models to load, and how to load and run them.
#[derive(Debug)]
pub struct ModelSettings {
    /// In the order of the command line.
    pub sources: Vec<ModelSource>,
    pub load: LoadOptions,
    /// Limits of each model's queue.
    pub scheduler: SchedulerLimits,
    /// Messages for the log, to be written before loading starts.
    pub notices: Vec<Notice>,
}

/// A log line about a decision made while resolving.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    Info(String),
    Warning(String),
}

/// The settings of `serve`.
#[derive(Debug)]
pub struct ServeSettings {
    pub models: ModelSettings,
    pub address: SocketAddr,
    pub keys: Keys,
    /// Hosts that requests may name; `None` allows every host.
    pub hosts: Option<HostList>,
    /// Origins of web pages that may use the server.
    pub origins: Origins,
    /// Whether requests for an unknown model go to the first one.
    pub accept_any_model: bool,
    /// Memory for the scores of earlier requests, of each model.
    pub score_cache_bytes: usize,
    pub limits: ApiLimits,
    pub timeouts: ServerTimeouts,
}

/// Limits of a model's queue.
#[derive(Debug, Clone, Copy)]
pub struct QueueSettings {
    pub max_tokens: usize,
    pub max_wait: Duration,
    pub batch_timeout: Duration,
}

impl QueueSettings {
    /// No limits, for commands that fill the queue themselves.
    pub const UNBOUNDED: Self =
        Self { max_tokens: usize::MAX, max_wait: Duration::MAX, batch_timeout: Duration::from_secs(86_400) };
}

impl Notice {
    /// Writes the line to the log.
    pub fn log(&self) {
        match self {
            Self::Info(text) => tracing::info!("{text}"),
            Self::Warning(text) => tracing::warn!("{text}"),
        }
    }
}

impl ModelArgs {
    /// Checks the flags and resolves them for `machine`.
    ///
    /// # Errors
    /// A model is not a folder, a name on the hub or a known name; an alias is empty or its model is not served; this build lacks
    /// the device; the device lacks the precision; or a limit is 0. The message names the flag.
    pub fn resolve(&self, machine: &Machine, queue: QueueSettings) -> Result<ModelSettings> {
        refuse_zero(&[
            ("--window", self.window),
            ("--threads", self.threads),
            ("--max-batch-tokens", self.max_batch_tokens),
            ("--max-document-chars", Some(self.max_document_chars)),
            ("--max-request-tokens", Some(self.max_request_tokens)),
            ("--max-query-tokens", self.max_query_tokens),
        ])?;
        let mut notices = Vec::new();
        let mut names: Vec<&str> = self.models.iter().map(String::as_str).filter(|model| !model.is_empty()).collect();
        if names.is_empty() {
            notices.push(Notice::Info(format!(
                "no --model given: loading {BUILTIN}, the built-in demonstration model; {NEXT_STEP}"
            )));
            names.push(BUILTIN);
        }
        let mut sources = names.into_iter().map(ModelSource::parse).collect::<Result<Vec<_>>>()?;
        for alias in self.aliases.iter().filter(|alias| !alias.is_empty()) {
            add_alias(&mut sources, alias)?;
        }
        let threads = self.threads.unwrap_or(machine.processors);
        let limits = TextLimits {
            max_query_tokens: self.max_query_tokens,
            max_document_chars: self.max_document_chars,
            max_request_tokens: self.max_request_tokens,
            tail: match self.tail {
                TailArg::Aligned => Tail::Aligned,
                TailArg::Short => Tail::Short,
            },
            threads,
            max_tokenizer_wait: queue.max_wait,
        };
        let device = self.device(machine, threads, &mut notices)?;
        let max_batch_tokens = self.max_batch_tokens.unwrap_or(match &device {
            #[cfg(feature = "cuda")]
            DeviceChoice::Cuda(..) => CUDA_BATCH_TOKENS,
            _ => CPU_BATCH_TOKENS,
        });
        Ok(ModelSettings {
            sources,
            load: LoadOptions { device, window: self.window, limits, profile: None },
            scheduler: SchedulerLimits {
                max_batch_tokens,
                max_queue_tokens: queue.max_tokens,
                max_queue_wait: queue.max_wait,
                batch_timeout: queue.batch_timeout,
            },
            notices,
        })
    }

    fn device(&self, machine: &Machine, threads: usize, notices: &mut Vec<Notice>) -> Result<DeviceChoice> {
        let name = self.device.as_str();
        match name {
            "auto" => match (machine.find_cuda)() {
                #[cfg(feature = "cuda")]
                CudaAvailability::Usable if self.dtype == DtypeArg::Int8 => {
                    notices.push(Notice::Info("using the CPU: --dtype int8 is for CPUs".to_owned()));
                    self.cpu(machine, threads, notices)
                }
                #[cfg(feature = "cuda")]
                CudaAvailability::Usable => self.cuda(machine, "cuda"),
                CudaAvailability::Unusable(reason) => {
                    notices
                        .push(Notice::Warning(format!("using the CPU: a GPU was found but cannot be used: {reason}")));
                    self.cpu(machine, threads, notices)
                }
                _ => self.cpu(machine, threads, notices),
            },
            "cpu" => self.cpu(machine, threads, notices),
            #[cfg(feature = "cuda")]
            _ if name.starts_with("cuda") => self.cuda(machine, name),
            "candle" => self.require_f32().map(|()| DeviceChoice::Candle { threads }),
            #[cfg(feature = "candle-cuda")]
            _ if name == "candle-cuda" || name.starts_with("candle-cuda:") => {
                self.require_f32()?;
                let ordinal = name.split_once(':').map_or("0", |(_, ordinal)| ordinal);
                let ordinal = ordinal.parse().with_context(|| format!("--device {name:?}: expected candle-cuda:N"))?;
                Ok(DeviceChoice::CandleCuda { ordinal, threads })
            }
            _ => bail!("--device {name:?} is not supported by this build; expected {DEVICES}"),
        }
    }

    fn cpu(&self, machine: &Machine, threads: usize, notices: &mut Vec<Notice>) -> Result<DeviceChoice> {
        let dtype = match self.dtype {
            DtypeArg::F32 => CpuDtype::F32,
            DtypeArg::Bf16 => CpuDtype::Bf16,
            DtypeArg::Int8 => CpuDtype::Int8,
            DtypeArg::F16 => bail!("--dtype f16 needs a GPU; on a CPU choose bf16, int8 or f32"),
            DtypeArg::Fp8 => bail!("--dtype fp8 needs a GPU; on a CPU choose int8, bf16 or f32"),
            DtypeArg::Auto => {
                let rates = (machine.multiply_rates)();
                let dtype = if rates.bf16_is_fast() { CpuDtype::Bf16 } else { CpuDtype::F32 };
                notices.push(Notice::Info(format!("--dtype auto is {}: {rates}", dtype.name())));
                dtype
            }
        };
        Ok(DeviceChoice::Cpu { dtype, threads, pin_threads: self.pin_threads })
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, machine: &Machine, names: &str) -> Result<DeviceChoice> {
        let ordinal = |name: &str| match name {
            "cuda" => Ok(0),
            _ => name
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .with_context(|| format!("--device {name:?}: expected cuda, cuda:N, or a list such as cuda:0,cuda:1")),
        };
        let ordinals: Vec<usize> = names.split(',').map(|name| ordinal(name.trim())).collect::<Result<_>>()?;
        for (i, ordinal) in ordinals.iter().enumerate() {
            ensure!(!ordinals[..i].contains(ordinal), "--device {names:?} names cuda:{ordinal} twice");
        }
        let dtype = match self.dtype {
            DtypeArg::Auto | DtypeArg::F16 => CudaDtype::F16,
            DtypeArg::Bf16 => CudaDtype::Bf16,
            DtypeArg::F32 => CudaDtype::F32,
            DtypeArg::Fp8 => CudaDtype::Fp8,
            DtypeArg::Int8 => bail!("--dtype int8 needs a CPU; on a GPU choose fp8, f16, bf16 or f32"),
        };
        let CudaArgs { cuda_cache, cuda_gemm, cuda_attention } = &self.cuda;
        let options = CudaOptions {
            dtype,
            max_batch_tokens: self.max_batch_tokens.unwrap_or(CUDA_BATCH_TOKENS),
            batch_invariant: self.batch_invariant,
            gemm: match cuda_gemm {
                CudaGemmArg::Auto => GemmChoice::Fastest,
                CudaGemmArg::Cublaslt => GemmChoice::CublasLt,
                CudaGemmArg::Custom => GemmChoice::Custom,
            },
            mma_attention_only: *cuda_attention == CudaAttentionArg::Mma,
            cache: cuda_cache
                .clone()
                .filter(|folder| !folder.as_os_str().is_empty())
                .or_else(|| machine.user_cache.as_ref().map(|folder| folder.join("rerankd"))),
        };
        Ok(DeviceChoice::Cuda(ordinals, options))
    }

    fn require_f32(&self) -> Result<()> {
        ensure!(
            matches!(self.dtype, DtypeArg::Auto | DtypeArg::F32),
            "--device {} computes in f32 only; leave --dtype out, or choose --device cpu",
            self.device
        );
        Ok(())
    }
}

/// Refuses limits of 0.
fn refuse_zero(limits: &[(&str, Option<usize>)]) -> Result<()> {
    match limits.iter().find(|(_, value)| *value == Some(0)) {
        Some((flag, _)) => bail!("{flag} is 0; expected at least 1"),
        None => Ok(()),
    }
}

/// Adds `argument`, which is `ALIAS[=MODEL]`, to the aliases of a model.
fn add_alias(sources: &mut [ModelSource], argument: &str) -> Result<()> {
    let (alias, model) = argument.split_once('=').map_or((argument, None), |(alias, model)| (alias, Some(model)));
    ensure!(!alias.is_empty() && model != Some(""), "--alias {argument:?}: expected ALIAS[=MODEL]");
    let served: Vec<String> = sources.iter().map(|source| source.name.clone()).collect();
    let is_called = |source: &ModelSource, model: &str| {
        let listed = source.entry.into_iter().flat_map(|entry| entry.names());
        std::iter::once(source.name.as_str()).chain(listed).any(|name| name.eq_ignore_ascii_case(model))
    };
    let mut matching = sources.iter_mut().filter(|source| model.is_none_or(|model| is_called(source, model)));
    let source = matching.next().with_context(|| {
        format!("--alias {argument:?}: no such model is served; the served models are {}", served.join(", "))
    })?;
    source.aliases.push(alias.to_owned());
    Ok(())
}

impl ServeArgs {
    /// Checks the flags and resolves them for `machine`.
    ///
    /// # Errors
    /// As [`ModelArgs::resolve`]. Also: the key file cannot be read or contains no key; `--api-key` is given but empty, and there
    /// is no other key; a key has characters that clients cannot send; there are rate limits but no key; a limit is 0.
    pub fn resolve(&self, machine: &Machine) -> Result<ServeSettings> {
        refuse_zero(&[
            ("--max-body-bytes", Some(self.max_body_bytes)),
            ("--max-inflight-bytes", Some(self.max_inflight_bytes)),
            ("--max-queue-tokens", Some(self.max_queue_tokens)),
        ])?;
        let file = match &self.api_key_file {
            Some(path) => std::fs::read_to_string(path)
                .with_context(|| format!("--api-key-file {}: cannot be read", path.display()))?,
            None => String::new(),
        };
        let rates = RateLimits {
            requests_per_minute: self.key_requests_per_minute,
            tokens_per_minute: self.key_tokens_per_minute,
        };
        let all_keys = self.api_keys.iter().map(|key| key.reveal()).chain(Keys::lines(&file));
        let keys = Keys::new(all_keys, rates).map_err(|error| anyhow!("--api-key and --api-key-file: {error}"))?;
        ensure!(self.api_keys.is_empty() || !keys.is_open(), "--api-key is empty; leave it out to serve without keys");
        for (flag, limit) in [
            ("--key-requests-per-minute", rates.requests_per_minute),
            ("--key-tokens-per-minute", rates.tokens_per_minute),
        ] {
            ensure!(limit.is_none() || !keys.is_open(), "{flag} limits each API key; add --api-key or --api-key-file");
        }
        // A file without a key would silently open the server to everyone.
        ensure!(
            self.api_key_file.is_none() || !keys.is_open(),
            "--api-key-file contains no key; add one per line, or leave the flag out"
        );
        let is_private = keys.is_open() && self.host.is_loopback();
        let hosts = is_private.then(|| HostList::new(self.allowed_hosts.iter().cloned()));
        let origins = Origins::new(self.allowed_origins.iter().cloned()).context("--allowed-origin")?;
        let queue = QueueSettings {
            max_tokens: self.max_queue_tokens,
            max_wait: Duration::from_secs_f64(self.max_queue_wait),
            batch_timeout: Duration::from_secs(self.batch_timeout),
        };
        Ok(ServeSettings {
            models: self.models.resolve(machine, queue)?,
            address: SocketAddr::new(self.host, self.port),
            keys,
            hosts,
            origins,
            accept_any_model: self.accept_any_model,
            score_cache_bytes: self.score_cache_bytes,
            limits: ApiLimits {
                max_connections: self.max_connections as usize,
                max_documents: self.max_documents as usize,
                max_body_bytes: self.max_body_bytes,
                max_inflight_bytes: self.max_inflight_bytes.max(self.max_body_bytes),
                body_timeout: Duration::from_secs(self.body_timeout),
                request_timeout_s: self.request_timeout,
            },
            timeouts: ServerTimeouts {
                header: Duration::from_secs(self.header_timeout),
                idle: Duration::from_secs(self.idle_timeout),
                write: Duration::from_secs(self.write_timeout),
                shutdown_grace: Duration::from_secs_f64(self.shutdown_grace),
                drain: Duration::from_secs(self.drain_timeout),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, Command, FromArgMatches as _};

    use super::*;
    use crate::backend::cpu::roofline::MultiplyRates;

    /// Without bf16 instructions and without a GPU.
    const PLAIN: Machine = Machine {
        processors: 8,
        multiply_rates: || MultiplyRates { bf16: None, int8: 2.0 },
        find_cuda: || CudaAvailability::Absent,
        user_cache: None,
    };

    fn resolve(machine: Machine, flags: &[&str]) -> Result<ServeSettings> {
        let command = ServeArgs::augment_args(Command::new("serve"));
        let matches = command.try_get_matches_from(["serve"].iter().chain(flags))?;
        ServeArgs::from_arg_matches(&matches)?.resolve(&machine)
    }

    /// The resolved device, or the error.
    fn device(machine: Machine, flags: &[&str]) -> String {
        match resolve(machine, flags) {
            Ok(settings) => format!("{:?}", settings.models.load.device),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn auto_dtype_is_bf16_only_on_cpus_where_it_is_fast() {
        assert!(device(PLAIN, &[]).contains("F32, threads: 8"));
        let fast = Machine { multiply_rates: || MultiplyRates { bf16: Some(2.0), int8: 4.0 }, ..PLAIN };
        let slow = Machine { multiply_rates: || MultiplyRates { bf16: Some(0.5), int8: 4.0 }, ..PLAIN };
        assert!(device(fast, &["--threads", "3"]).contains("Bf16, threads: 3"));
        assert!(device(slow.clone(), &[]).contains("F32"));
        assert!(device(slow, &["--dtype", "bf16"]).contains("Bf16"));
    }

    #[test]
    fn auto_device_falls_back_to_the_cpu_with_a_warning() {
        let broken = Machine { find_cuda: || CudaAvailability::Unusable("the driver is too old".to_owned()), ..PLAIN };
        let settings = resolve(broken, &["--device", "auto", "--model", "rerankd-mini"]).unwrap();
        assert!(matches!(settings.models.load.device, DeviceChoice::Cpu { .. }));
        assert_eq!(
            settings.models.notices[0],
            Notice::Warning("using the CPU: a GPU was found but cannot be used: the driver is too old".to_owned())
        );
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn auto_device_is_a_usable_gpu() {
        let gpu = Machine { find_cuda: || CudaAvailability::Usable, ..PLAIN };
        let settings = resolve(gpu, &["--device", "auto"]).unwrap();
        assert!(matches!(settings.models.load.device, DeviceChoice::Cuda(ref ordinals, _) if *ordinals == [0]));
        assert_eq!(settings.models.scheduler.max_batch_tokens, CUDA_BATCH_TOKENS);
        let gpu = Machine { find_cuda: || CudaAvailability::Usable, ..PLAIN };
        let int8 = resolve(gpu, &["--device", "auto", "--dtype", "int8"]).unwrap();
        assert!(matches!(int8.models.load.device, DeviceChoice::Cpu { dtype: CpuDtype::Int8, .. }));
    }

    #[test]
    fn unknown_values_are_refused_with_the_flag() {
        for (flags, named) in [
            (&["--dtype", "f64"][..], "--dtype"),
            (&["--tail", "long"], "--tail"),
            (&["--device", "gpu"], "--device"),
            (&["--dtype", "f16"], "--dtype f16"),
            (&["--device", "candle", "--dtype", "bf16"], "--dtype"),
            (&["--threads", "0"], "--threads"),
            (&["--window", "0"], "--window"),
            (&["--max-queue-tokens", "0"], "--max-queue-tokens"),
            (&["--max-body-bytes", "0"], "--max-body-bytes"),
            (&["--max-inflight-bytes", "0"], "--max-inflight-bytes"),
            (&["--max-documents", "0"], "--max-documents"),
            (&["--api-key", ""], "--api-key"),
            (&["--api-key-file", "/nonexistent"], "--api-key-file"),
            (&["--model", "nothing-here"], "nothing-here"),
            (&["--alias", "=rerankd-mini"], "ALIAS[=MODEL]"),
            (&["--alias", "a=b"], "the served models are rerankd-mini"),
            (&["--key-requests-per-minute", "0"], "--key-requests-per-minute"),
            (&["--key-tokens-per-minute", "10"], "--key-tokens-per-minute limits each API key"),
            (&["--api-key", "two words"], "key 1 has a space"),
        ] {
            assert!(device(PLAIN, flags).contains(named), "{flags:?}: {}", device(PLAIN, flags));
        }
        #[cfg(feature = "cuda")]
        for (flags, named) in [
            (&["--cuda-gemm", "other"][..], "--cuda-gemm"),
            (&["--cuda-attention", "wgmma"], "--cuda-attention"),
            (&["--device", "cuda:x"], "cuda:x"),
            (&["--device", "cuda:0,cuda:0"], "twice"),
            (&["--device", "cuda", "--dtype", "int8"], "--dtype int8"),
        ] {
            assert!(device(PLAIN, flags).contains(named), "{flags:?}: {}", device(PLAIN, flags));
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn the_kernel_cache_is_in_the_users_cache_folder_unless_a_flag_names_another() {
        let machine = Machine { user_cache: Some("/home/a/.cache".into()), ..PLAIN };
        for (flags, folder) in [(&[][..], "/home/a/.cache/rerankd"), (&["--cuda-cache", "/kernels"], "/kernels")] {
            let settings = resolve(machine.clone(), &[&["--device", "cuda"], flags].concat()).unwrap();
            let DeviceChoice::Cuda(_, options) = settings.models.load.device else { panic!("--device cuda") };
            assert_eq!(options.cache.as_deref(), Some(std::path::Path::new(folder)));
        }
    }

    #[test]
    fn an_alias_belongs_to_the_model_it_names_or_to_the_first() {
        let flags = ["--model", "rerankd-mini,second=rerankd-mini", "--alias", "one,two=SECOND,three"];
        let sources = resolve(PLAIN, &flags).unwrap().models.sources;
        assert_eq!(sources[0].aliases, ["one", "three"]);
        assert_eq!(sources[1].aliases, ["two"]);
    }

    #[test]
    fn debug_output_hides_keys() {
        let command = ServeArgs::augment_args(Command::new("serve"));
        let matches = command.try_get_matches_from(["serve", "--api-key", "sk-private"]).unwrap();
        let args = ServeArgs::from_arg_matches(&matches).unwrap();
        let settings = args.resolve(&PLAIN).unwrap();
        assert!(!format!("{args:?} {settings:?}").contains("sk-private"));
    }
}
