//! Models that are replaced at SIGHUP, again and again: memory and threads of the server, and the latency of a model that stays.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use super::client::{connect, exchange, post, text};
use super::report::{median, ms, quantile, sorted};
use super::server::ServerArgs;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Model that is served under changing names: a name or a folder
    #[arg(long, default_value = "rerankd-mini")]
    replaced: String,
    /// Reloads
    #[arg(long, default_value_t = 50)]
    reloads: usize,
    /// Ask the model that stays all the time, and report the latency
    #[arg(long)]
    load: bool,
}

/// Time for a removed model to be freed, after the reload that removes it.
const FREED_AFTER: Duration = Duration::from_millis(500);

pub(crate) async fn run(args: Args) -> Result<()> {
    let config = std::env::temp_dir().join(format!("rerankd-reload-{}.toml", std::process::id()));
    write(&config, &args.replaced, 0)?;
    let server = args.server.start(&["--config", &config.display().to_string()])?;
    let body = |model: &str| {
        let mut random = fastrand::Rng::with_seed(1);
        let documents: Vec<String> = (0..10).map(|_| text(&mut random, 100)).collect();
        post("/v1/rerank", &json!({"model": model, "query": "river bridge", "documents": documents}).to_string())
    };
    let stop = Arc::new(AtomicBool::new(false));
    let latencies = |request: Vec<u8>| {
        let (stop, address) = (Arc::clone(&stop), server.address.clone());
        tokio::spawn(async move {
            let mut latencies = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let start = Instant::now();
                let response = exchange(connect(&address).await?, &request).await?;
                ensure!(response.status == 200, "status {}", response.status);
                latencies.push(ms(start.elapsed()));
            }
            Ok(sorted(latencies))
        })
    };
    let mut idle = Vec::new();
    if args.load {
        let running = latencies(body("stays"));
        tokio::time::sleep(Duration::from_secs(10)).await;
        stop.store(true, Ordering::Relaxed);
        idle = running.await??;
        stop.store(false, Ordering::Relaxed);
    }
    let running = args.load.then(|| latencies(body("stays")));
    let mut times = Vec::new();
    println!("| reload | RSS MiB | highest | threads |");
    println!("|---|---|---|---|");
    for reload in 0..=args.reloads {
        let name = format!("model-{reload}");
        if reload > 0 {
            write(&config, &args.replaced, reload)?;
            let start = Instant::now();
            server.signal("-HUP")?;
            let list = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n";
            loop {
                let response = exchange(connect(&server.address).await?, list).await?;
                if String::from_utf8_lossy(&response.body).contains(&format!("\"{name}\"")) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            times.push(ms(start.elapsed()));
        }
        let response = exchange(connect(&server.address).await?, &body(&name)).await?;
        ensure!(response.status == 200, "status {}", response.status);
        tokio::time::sleep(FREED_AFTER).await;
        if matches!(reload, 0..=3) || reload % 10 == 0 {
            let watch = server.watch;
            println!("| {reload} | {:.0} | {:.0} | {} |", watch.rss_mib(), watch.peak_mib(), watch.threads());
        }
    }
    println!("from SIGHUP to the new models: median {:.0} ms of {}", median(times), args.reloads);
    if let Some(running) = running {
        stop.store(true, Ordering::Relaxed);
        for (when, latencies) in [("before the reloads", idle), ("during them", running.await??)] {
            let [middle, high, longest] = [0.5, 0.99, 1.0].map(|q| quantile(&latencies, q));
            let n = latencies.len();
            println!(
                "the model that stays, {when}: median {middle:.1} ms, p99 {high:.1}, longest {longest:.1}; {n} requests"
            );
        }
    }
    std::fs::remove_file(&config)?;
    Ok(())
}

/// Writes the config file to another name and renames it, so that the server reads the old or the new one.
fn write(config: &Path, model: &str, reload: usize) -> Result<()> {
    let unfinished = config.with_extension("new");
    std::fs::write(
        &unfinished,
        format!("model = {:?}\n", ["stays=rerankd-mini".to_owned(), format!("model-{reload}={model}")]),
    )?;
    Ok(std::fs::rename(unfinished, config)?)
}
