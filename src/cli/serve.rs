//! `rerankd serve`: load, listen, drain.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::Failure;
use crate::api::{self, App, Server};
use crate::config::args::ServeArgs;
use crate::config::machine::Machine;
use crate::config::resolve::ServeSettings;
use crate::telemetry;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) serve: ServeArgs,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let settings = args.serve.resolve(&Machine::detect()).map_err(Failure::Config)?;
    telemetry::prometheus();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
        .map_err(Failure::Other)?;
    let outcome = runtime.block_on(serve(&settings));
    runtime.shutdown_background();
    outcome
}

async fn serve(settings: &ServeSettings) -> Result<(), Failure> {
    // The signals are ours from here on: one that comes while a model loads ends the process at once.
    let listening = Arc::new(AtomicBool::new(false));
    let stop = stop_signal(Arc::clone(&listening)).map_err(Failure::Other)?;
    tokio::spawn(keep_metrics_small());
    let server = Server::bind(settings.address).map_err(Failure::Config)?;
    let address = server.address();
    let load = || super::start(&settings.models, |name, about| tracing::info!(model = name, "{about}"));
    let models = tokio::task::block_in_place(load).map_err(Failure::Config)?;
    let listener = server.listen().map_err(Failure::Config)?;
    announce(settings, address, &models.iter().next().map(|model| model.name.clone()).unwrap_or_default());
    let app = App::new(models, settings.keys.clone(), settings.limits);
    // A batch that outlives the drain ends with the process: nobody joins its worker.
    std::mem::forget(Arc::clone(&app));
    listening.store(true, Ordering::Release);
    api::serve(listener, app, settings.max_connections, settings.timeouts, stop).await;
    Ok(())
}

/// What an operator wants to see once, and what a newcomer wants to try.
fn announce(settings: &ServeSettings, address: SocketAddr, model: &str) {
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
        tracing::warn!("no --api-key is set and {address} is not loopback: everyone who reaches this port may use it");
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

/// Folds recorded values into their buckets, which otherwise happens only when somebody reads /metrics.
async fn keep_metrics_small() {
    let mut interval = tokio::time::interval(Duration::from_secs(5));
    loop {
        interval.tick().await;
        telemetry::prometheus().run_upkeep();
    }
}

/// Resolves at the first SIGTERM or SIGINT once the server is `listening`; before that, and at the second, the process ends.
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
