//! What `rerankd serve` with the same flags would use.

use super::hub::CacheState;
use super::machine::Host;
use super::report::Report;
use crate::api::Server;
use crate::backend::gpus::CudaSurvey;
use crate::checkpoint::config::ModelConfig;
use crate::cli::output::bytes;
use crate::config::args::{DtypeArg, ModelArgs};
use crate::config::machine::Machine;
use crate::config::resolve::{Notice, ServeSettings};
use crate::loading::download::{Hub, HubOptions};
use crate::loading::memory::ModelSize;
use crate::loading::source::{ModelLocation, ModelSource};
use crate::loading::{DeviceChoice, gated_notice, model_config};

/// What the checks depend on, besides the settings.
pub(super) struct Surroundings<'a> {
    pub(super) host: &'a Host,
    pub(super) machine: &'a Machine,
    pub(super) survey: Option<&'a CudaSurvey>,
    /// The hub's options and the state of its cache, if the options are valid.
    pub(super) hub: Option<(&'a HubOptions, CacheState)>,
}

pub(super) fn check(report: &mut Report, settings: &ServeSettings, args: &ModelArgs, around: &Surroundings<'_>) {
    report.section("`rerankd serve` with the same flags");
    let device = &settings.models.load.device;
    report.ok(describe_device(device, args, around.machine));
    for notice in &settings.models.notices {
        let (Notice::Info(text) | Notice::Warning(text)) = notice;
        report.note(text.as_str(), "");
    }
    let (mut host_bytes, mut gpu_bytes, mut unknown) = (0, 0, 0);
    for source in &settings.models.sources {
        match check_model(report, source, device, around) {
            Some(size) => {
                let (host, gpu) = size.bytes_on(device);
                host_bytes += host;
                gpu_bytes += gpu;
            }
            None => unknown += 1,
        }
    }
    check_memory(report, device, (host_bytes, gpu_bytes, unknown), around);
    match Server::bind(settings.address) {
        Ok(_) => report.ok(format!("address http://{} is free", settings.address)),
        Err(error) => report.problem(
            format!("{error:#}"),
            "if the server already runs (rerankd health), nothing; otherwise --port 0 selects a free port",
        ),
    }
    if settings.keys.is_open() && !settings.address.ip().is_loopback() {
        report.note(
            "no API key: anyone who can reach the address can use the server",
            "--api-key-file FILE with a line from: openssl rand -hex 32",
        );
    }
}

/// The device and the precision, each with the reason.
fn describe_device(device: &DeviceChoice, args: &ModelArgs, machine: &Machine) -> String {
    let asked = args.device.as_str();
    let on_gpu = !device.gpus().is_empty();
    let why_device = match asked {
        "auto" if on_gpu => "--device auto found a GPU".to_owned(),
        "auto" => "--device auto found no GPU to use".to_owned(),
        _ => format!("--device {asked}"),
    };
    let why_dtype = match args.dtype {
        DtypeArg::Auto if on_gpu => "auto is f16 on a GPU",
        DtypeArg::Auto if matches!(device, DeviceChoice::Candle { .. }) => "candle computes in f32",
        DtypeArg::Auto => &format!("auto: {}", (machine.multiply_rates)()),
        _ => "--dtype",
    };
    format!("device: {} ({why_device}); precision: {} ({why_dtype})", device.place(), device.name())
}

/// Where the model's files are, and whether they fit together. Returns the model's size if it is known.
fn check_model(
    report: &mut Report,
    source: &ModelSource,
    device: &DeviceChoice,
    around: &Surroundings<'_>,
) -> Option<ModelSize> {
    let (options, cache) = around.hub.as_ref()?;
    let offline = Hub::new(HubOptions { offline: true, ..(*options).clone() });
    let name = &source.name;
    let known = source.entry.map(|entry| entry.size());
    if !source.is_cached(&offline) {
        check_download(report, source, options, cache);
        return known;
    }
    match source.files(&offline).and_then(|files| model_config(&files)) {
        Ok(config) => {
            let place = match &source.location {
                ModelLocation::Builtin => "built in".to_owned(),
                ModelLocation::Folder(folder) => format!("in {}", folder.display()),
                ModelLocation::Hub(..) => "in the cache".to_owned(),
            };
            report.ok(format!("model {name}: {place}; {}", describe_model(&config, source)));
            if device.for_model(&config).name() != device.name() {
                report.note(gated_notice(name), "");
            }
            Some(ModelSize::of(&config))
        }
        Err(reason) => {
            report.problem(format!("model {name}: {reason:#}"), "");
            known
        }
    }
}

fn describe_model(config: &ModelConfig, source: &ModelSource) -> String {
    let parameters = config.parameters() as f64 / 1e6;
    let licence = source.entry.map_or(String::new(), |entry| format!(", licence {}", entry.licence));
    format!("{parameters:.1} million parameters{licence}")
}

/// A model that has to be downloaded first.
fn check_download(report: &mut Report, source: &ModelSource, options: &HubOptions, cache: &CacheState) {
    let name = &source.name;
    let megabytes = source.entry.and_then(|entry| entry.download_mb);
    let size = megabytes.map_or(String::new(), |megabytes| format!(" ({})", bytes(megabytes * 1_000_000)));
    if options.offline {
        report.problem(
            format!("model {name} is not in the cache, and HF_HUB_OFFLINE is set"),
            format!("HF_HUB_OFFLINE=0 rerankd download {name}"),
        );
    } else if !cache.writable {
        report.problem(
            format!("model {name} has to be downloaded{size}, but the cache folder cannot be written"),
            "set HF_HOME to a folder that this user can write",
        );
    } else if cache.free.zip(megabytes).is_some_and(|(free, megabytes)| free < megabytes * 1_000_000) {
        report.problem(
            format!("model {name} has to be downloaded{size}: more than the free space of the cache folder"),
            "set HF_HOME to a folder on a larger disk",
        );
    } else {
        report.note(
            format!("model {name} is not in the cache: the first start downloads it{size}"),
            format!("to download it now: rerankd download {name}"),
        );
    }
}

/// Whether the models fit into the memory. `needed` has the bytes that they need on the host and on each GPU, and the number of
/// models of unknown size.
fn check_memory(report: &mut Report, device: &DeviceChoice, needed: (u64, u64, usize), around: &Surroundings<'_>) {
    let (host, gpu, unknown) = needed;
    let more = if unknown > 0 { format!(", and {unknown} models of unknown size") } else { String::new() };
    match around.host.memory.free {
        Some(free) if host > free => report.problem(
            format!("memory: about {}{more}, but only {} are free", bytes(host), bytes(free)),
            "a smaller model (`rerankd models` shows their memory), or --dtype int8",
        ),
        _ => report.ok(format!("memory: about {}{more}", bytes(host))),
    }
    let survey = around.survey.cloned().unwrap_or_default();
    for &ordinal in device.gpus() {
        match survey.gpus.get(ordinal) {
            None => report.problem(
                format!("there is no device cuda:{ordinal}"),
                "--device auto uses the first GPU, or the CPU if there is none",
            ),
            Some(found) if device.name() == "fp8" && found.compute_capability < (8, 9) => report.problem(
                format!("cuda:{ordinal} has no fp8 tensor cores; they need compute capability 8.9"),
                "--dtype f16",
            ),
            Some(found) if gpu > found.memory => report.problem(
                format!("memory of cuda:{ordinal}: about {}, but it has {}", bytes(gpu), bytes(found.memory)),
                "a smaller model (`rerankd models`), or --device cpu",
            ),
            Some(_) => report.ok(format!("memory of cuda:{ordinal}: about {}", bytes(gpu))),
        }
    }
}
