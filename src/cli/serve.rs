//! `rerankd serve`: loads the models, listens, and drains when a signal stops the server.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::failure::Failure;
use super::start::start_models;
use crate::api::{self, App, Server};
use crate::config::args::ServeArgs;
use crate::config::machine::Machine;
use crate::config::resolve::ServeSettings;
use crate::telemetry;

pub(super) fn run(args: &ServeArgs) -> Result<(), Failure> {
    let settings = args.resolve(&Machine::detect()).map_err(Failure::Config)?;
    telemetry::prometheus();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")
        .map_err(Failure::Other)?;
    let outcome = runtime.block_on(serve(&settings));
    runtime.shutdown_background();
    outcome
}

async fn serve(settings: &ServeSettings) -> Result<(), Failure> {
    // Handlers are installed first, so that a signal while a model loads ends the process at once.
    let listening = Arc::new(AtomicBool::new(false));
    let stop = stop_signal(Arc::clone(&listening)).map_err(Failure::Other)?;
    tokio::spawn(run_metrics_upkeep());
    let server = Server::bind(settings.address).map_err(Failure::Config)?;
    let address = server.address();
    let load = || start_models(&settings.models, |name, about| tracing::info!(model = name, "{about}"));
    let models = tokio::task::block_in_place(load).map_err(Failure::Config)?;
    let listener = server.listen().map_err(Failure::Config)?;
    log_startup(settings, address, &models.iter().next().map(|model| model.name.clone()).unwrap_or_default());
    let app = App::new(models, settings.keys.clone(), settings.limits);
    // Leaked, so that the exit does not wait for a worker whose batch outlasts the drain.
    std::mem::forget(Arc::clone(&app));
    listening.store(true, Ordering::Release);
    api::serve(listener, app, settings.max_connections, settings.timeouts, stop).await;
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
    let key = if settings.keys.is_open() { "" } else { " -H 'Authorization: Bearer YOUR_KEY'" };
    let shown =
        if address.ip().is_unspecified() { SocketAddr::from(([127, 0, 0, 1], address.port())) } else { address };
    tracing::info!("listening on http://{address}");
    let body = format!(
        r#"{{"model":"{model}","query":"Apple","documents":["apple","banana","fruit","vegetable"],"top_n":4}}"#
    );
    tracing::info!("try it: curl http://{shown}/v1/rerank{key} -d '{body}'");
}

/// Moves recorded values into the histogram buckets every 5 s. Otherwise that happens only when /metrics is read, and until then
/// the values accumulate in memory.
async fn run_metrics_upkeep() {
    let mut interval = tokio::time::interval(Duration::from_secs(5));
    loop {
        interval.tick().await;
        telemetry::prometheus().run_upkeep();
    }
}

/// Returns a future that resolves at the first SIGTERM or SIGINT after `listening` is set. A signal before that, and a second
/// signal, end the process with exit code 130.
///
/// # Errors
/// A signal handler cannot be installed.
fn stop_signal(listening: Arc<AtomicBool>) -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (send, receive) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        };
        next().await;
        if listening.load(Ordering::Acquire) && send.send(()).is_ok() {
            next().await;
        }
        std::process::exit(130);
    });
    Ok(async move {
        receive.await.ok();
    })
}
