//! `rerankd serve`: listens, loads the models, serves requests, reads its settings again at SIGHUP, and drains after SIGTERM or
//! SIGINT.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::failure::Failure;
use super::reload::{self, ReadSettings, Reloads};
use crate::api::{self, App, Server};
use crate::config::args::{FlagValues, ServeArgs};
use crate::config::machine::{Machine, gpu_memory};
use crate::config::otlp::trace_options_from_env;
use crate::config::resolve::ServeSettings;
use crate::telemetry::{self, metrics, traces};

/// Open files besides regular connections: logs, model files, reserved connections.
pub(super) const OTHER_FILES: u64 = 256;

/// Time between two updates of metrics that no request updates.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

pub(super) fn run(args: &ServeArgs, values: FlagValues, read_again: ReadSettings) -> Result<(), Failure> {
    let mut settings = args.resolve(&Machine::detect()).map_err(Failure::Config)?;
    let traces = trace_options_from_env(args.otlp_endpoint.as_deref()).map_err(Failure::Config)?;
    telemetry::metrics::prometheus();
    // Sends the last spans when it is dropped, after the last request.
    let _traces = traces.map(|options| traces::start(&options)).transpose().map_err(Failure::Config)?;
    settings.limits.max_connections = fit_connections(settings.limits.max_connections);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")
        .map_err(Failure::Other)?;
    let outcome = runtime.block_on(serve(Arc::new(settings), values, read_again));
    runtime.shutdown_background();
    outcome
}

/// Raises the soft limit on open files so that `connections` connections fit. Returns the cap on connections: `connections`, or as
/// many as fit into the hard limit, with a warning. Without file descriptors left, not even a health check could connect.
fn fit_connections(connections: usize) -> usize {
    let wanted = connections as u64 + OTHER_FILES;
    match rlimit::increase_nofile_limit(wanted) {
        Ok(limit) if limit < wanted => {
            let fit = (limit.saturating_sub(OTHER_FILES) as usize).max(1);
            tracing::warn!(
                "only {limit} files may be open (ulimit -n): --max-connections is {fit} instead of {connections}; raise the limit"
            );
            fit
        }
        Ok(_) => connections,
        Err(error) => {
            tracing::warn!(%error, "cannot raise the limit on open files");
            connections
        }
    }
}

async fn serve(settings: Arc<ServeSettings>, values: FlagValues, read_again: ReadSettings) -> Result<(), Failure> {
    let (reloads, receive_reloads) = Reloads::channel();
    let stop = handle_signals(reloads).map_err(Failure::Other)?;
    tokio::spawn(run_upkeep());
    let server = Server::bind(settings.address).map_err(Failure::Config)?;
    let address = server.address();
    let listener = server.listen().map_err(Failure::Config)?;
    tracing::info!(
        "accepting connections on http://{address}; requests are answered with 503 until the models are loaded"
    );
    let app = App::new(settings.keys.clone(), settings.limits, settings.hosts.clone(), settings.origins.clone());
    // Leaked, so that the exit does not wait for a worker whose batch outlasts the drain.
    std::mem::forget(Arc::clone(&app));
    let mut serving = std::pin::pin!(api::serve(listener, Arc::clone(&app), settings.timeouts, stop));
    let loading = reload::start(Arc::clone(&settings), (values, read_again), app, receive_reloads)
        .context("cannot start the loading thread")
        .map_err(Failure::Other)?;
    tokio::select! {
        () = &mut serving => return Ok(()), // stopped while loading
        loaded = loading => {
            let first = loaded.context("loading panicked").map_err(Failure::Other)?.map_err(Failure::of_loading)?;
            watch_gpu_memory(settings.models.load.device.gpus());
            log_startup(&settings, address, &first);
        }
    }
    serving.await;
    Ok(())
}

/// Logs the limits, the address and an example request for `model`.
fn log_startup(settings: &ServeSettings, address: SocketAddr, model: &str) {
    let (limits, models) = (&settings.limits, &settings.models);
    tracing::info!(
        threads = models.load.limits.threads,
        max_batch_tokens = models.scheduler.max_batch_tokens,
        max_queue_tokens = models.scheduler.max_queue_tokens,
        max_documents = limits.max_documents,
        max_body_bytes = limits.max_body_bytes,
        request_timeout_s = limits.request_timeout_s,
        "limits"
    );
    if settings.keys.is_open() && !address.ip().is_loopback() {
        tracing::warn!(
            "no --api-key is set and {address} is not a loopback address: anyone who can reach this port can use the server; set --api-key or --api-key-file"
        );
    }
    reload::warn_of_short_keys(&settings.keys);
    let key = if settings.keys.is_open() { "" } else { " -H 'Authorization: Bearer YOUR_KEY'" };
    let shown =
        if address.ip().is_unspecified() { SocketAddr::from(([127, 0, 0, 1], address.port())) } else { address };
    tracing::info!("listening on http://{address}");
    let body = format!(
        r#"{{"model":"{model}","query":"Apple","documents":["apple","banana","fruit","vegetable"],"top_n":4}}"#
    );
    tracing::info!("try it: curl http://{shown}/v1/rerank{key} -d '{body}'");
}

/// Starts a thread that reports the memory of the GPUs every 5 s. A thread, because a driver may not answer.
fn watch_gpu_memory(gpus: &[usize]) {
    let gpus = gpus.to_vec();
    if gpus.is_empty() {
        return;
    }
    let report = move || {
        loop {
            for &gpu in &gpus {
                if let Some(memory) = gpu_memory(gpu) {
                    metrics::GPU_MEMORY_USED.gauge([gpu.to_string()]).set(memory.used as f64);
                    metrics::GPU_MEMORY_TOTAL.gauge([gpu.to_string()]).set(memory.total as f64);
                }
            }
            std::thread::sleep(UPKEEP_INTERVAL);
        }
    };
    if let Err(error) = std::thread::Builder::new().name("gpu-memory".to_owned()).spawn(report) {
        tracing::warn!(%error, "the metrics of the GPUs' memory are missing");
    }
}

/// Runs [`telemetry::upkeep`] every 5 s.
async fn run_upkeep() {
    let mut interval = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        interval.tick().await;
        telemetry::upkeep();
    }
}

/// Returns a future that resolves at the first SIGTERM or SIGINT. The second ends the process with exit code 130. SIGHUP asks for a
/// reload, unless it comes because the terminal that the server runs in was closed: then it counts as SIGTERM.
///
/// # Errors
/// A signal handler cannot be installed.
fn handle_signals(reloads: Reloads) -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let (send, receive) = tokio::sync::oneshot::channel();
    let had_terminal = has_terminal();
    tokio::spawn(async move {
        let mut next = async || {
            loop {
                tokio::select! {
                    _ = terminate.recv() => return,
                    _ = interrupt.recv() => return,
                    _ = hangup.recv() => {}
                }
                if had_terminal && !has_terminal() {
                    return;
                }
                reloads.request();
            }
        };
        next().await;
        send.send(()).ok();
        next().await;
        std::process::exit(130);
    });
    Ok(async move {
        receive.await.ok();
    })
}

/// Whether this process has a controlling terminal.
fn has_terminal() -> bool {
    std::fs::File::open("/dev/tty").is_ok()
}
