//! `rerankd serve`: load, listen, drain.

use std::future::Future;
use std::net::SocketAddr;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::Failure;
use crate::api::{self, App, Server};
use crate::settings::{ServeArgs, ServeSettings};
use crate::telemetry;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) serve: ServeArgs,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let settings = args.serve.settle().map_err(Failure::Config)?;
    telemetry::prometheus();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
        .map_err(Failure::Other)?;
    runtime.block_on(async {
        // The signals are ours from here on: one that comes while a model loads ends the process at once.
        let stop = stop_signal().map_err(Failure::Other)?;
        let server = Server::bind(settings.address).map_err(Failure::Config)?;
        let address = server.address();
        let models = tokio::task::block_in_place(|| {
            settings.models.start(|name, about| tracing::info!(model = name, "{about}"))
        })
        .map_err(Failure::Config)?;
        let listener = server.listen().map_err(Failure::Config)?;
        announce(&settings, address, &models.iter().next().map(|model| model.name.clone()).unwrap_or_default());
        let app = App::new(models, settings.keys.clone(), settings.limits);
        api::serve(listener, app, settings.max_connections, settings.times, stop).await;
        Ok(())
    })
}

/// What an operator wants to see once, and what a newcomer wants to try.
fn announce(settings: &ServeSettings, address: SocketAddr, model: &str) {
    let (limits, models) = (&settings.limits, &settings.models);
    tracing::info!(
        threads = models.threads,
        max_batch_tokens = models.scheduler.max_batch_tokens,
        max_queue_tokens = models.scheduler.max_queue_tokens,
        max_documents = limits.max_documents,
        max_body_bytes = limits.max_body_bytes,
        request_timeout_s = limits.request_deadline_s,
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

/// Resolves at the first SIGTERM or SIGINT; the second ends the process.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (send, receive) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        };
        next().await;
        // Nobody listens yet while models load: then the first signal is enough.
        if send.send(()).is_ok() {
            next().await;
        }
        std::process::exit(130);
    });
    Ok(async move {
        receive.await.ok();
    })
}
