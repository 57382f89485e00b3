//! Latency of small requests beside one of 1,000 documents (goal G7 of docs/reliability.md).

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::client::{Answer, Client, connect, exchange, requests};
use super::report::{latencies_ms, median, ms, quantile};
use super::server::ServerArgs;

const CONNECTIONS: usize = 64;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Share of the capacity that the small requests use
    #[arg(long, default_value_t = 0.05)]
    load: f64,
    /// Words of each of the large request's 1,000 documents
    #[arg(long, default_value_t = 100)]
    words: usize,
    /// Rounds; each measures the large request alone, the small ones alone, and both together
    #[arg(long, default_value_t = 5)]
    runs: usize,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let server = args.server.start(&[])?;
    let client = Client::new(&server.address);
    let small = requests("/v1/rerank", "rerankd-mini", 1, 20);
    let large = requests("/v1/rerank", "rerankd-mini", 1000, args.words);
    client.capacity(&small, 16, Duration::from_secs(1)).await?;
    let rate = args.load * client.capacity(&small, 16, Duration::from_secs(3)).await?;
    let (mut alone, mut beside, mut large_alone, mut large_beside) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut batches = Vec::new();
    let mut failed = 0;
    for run in 0..args.runs {
        let before = batch_seconds(&server.address).await?;
        let start = Instant::now();
        failed += usize::from(client.ask(&large[run % large.len()], start).await.answer != Answer::Status(200));
        let took = start.elapsed();
        large_alone.push(ms(took));
        let after = batch_seconds(&server.address).await?;
        batches.push(1e3 * (after.0 - before.0) / (after.1 - before.1));
        let outcomes = client.offer(&small, rate, took, CONNECTIONS).await;
        failed += outcomes.iter().filter(|outcome| outcome.answer != Answer::Status(200)).count();
        alone.push(quantile(&latencies_ms(&outcomes, 200), 0.99));
        let asked = tokio::spawn({
            let (client, large) = (client.clone(), std::sync::Arc::clone(&large));
            async move { client.ask(&large[run % large.len()], Instant::now()).await }
        });
        let outcomes = client.offer(&small, rate, took, CONNECTIONS).await;
        failed += outcomes.iter().filter(|outcome| outcome.answer != Answer::Status(200)).count();
        beside.push(quantile(&latencies_ms(&outcomes, 200), 0.99));
        let outcome = asked.await?;
        failed += usize::from(outcome.answer != Answer::Status(200));
        large_beside.push(ms(outcome.latency));
    }
    let [alone, beside, large_alone, large_beside, batch] =
        [alone, beside, large_alone, large_beside, batches].map(median);
    println!(
        "small requests at {rate:.0}/s ({:.0} % of the capacity); medians of {} rounds",
        100.0 * args.load,
        args.runs
    );
    println!(
        "| small p99 alone | beside the large one | allowed: alone + 2 batches | one batch | large alone | beside small ones | not 200 |"
    );
    println!("|---|---|---|---|---|---|---|");
    println!(
        "| {alone:.1} ms | {beside:.1} ms | {:.1} ms | {batch:.1} ms | {:.2} s | {:.2} s ({:+.0} %) | {failed} |",
        alone + 2.0 * batch,
        large_alone / 1e3,
        large_beside / 1e3,
        100.0 * (large_beside / large_alone - 1.0),
    );
    Ok(())
}

/// Total seconds and number of the batches so far, from /metrics.
async fn batch_seconds(address: &str) -> Result<(f64, f64)> {
    let response = exchange(connect(address).await?, b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n").await?;
    let text = String::from_utf8_lossy(&response.body).into_owned();
    let number = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.rsplit(' ').next()?.parse::<f64>().ok()
    };
    number("rerankd_batch_seconds_sum").zip(number("rerankd_batch_seconds_count")).context("no batches in /metrics")
}
