//! Latency with and without the score cache, by the share of pairs that it has.

use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::client::{connect, exchange, post, text};
use super::report::{median, ms, quantile, sorted};
use super::server::ServerArgs;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Documents of a request
    #[arg(long, default_value_t = 20)]
    documents: usize,
    /// Words of a document
    #[arg(long, default_value_t = 100)]
    words: usize,
    /// Requests to each server, for each share
    #[arg(long, default_value_t = 40)]
    requests: usize,
    /// Memory of the cache
    #[arg(long, default_value_t = 100_000_000)]
    score_cache_bytes: usize,
}

/// Asks two servers the same, one of which has a cache, in turn and first the one, then the other. Checks that results are equal.
pub(crate) async fn run(args: Args) -> Result<()> {
    let plain = args.server.start(&[])?;
    let cached = args.server.start(&["--score-cache-bytes", &args.score_cache_bytes.to_string()])?;
    let mut random = fastrand::Rng::with_seed(1);
    println!("| pairs in the cache | median ms without cache | with cache | ratio of a pair of requests: quartiles |");
    println!("|---|---|---|---|");
    for share in [0.0, 0.5, 0.9, 1.0] {
        let (mut without, mut with) = (Vec::new(), Vec::new());
        for i in 0..args.requests {
            let query = text(&mut random, 8);
            let documents: Vec<String> = (0..args.documents).map(|_| text(&mut random, args.words)).collect();
            let known = (args.documents as f64 * share).round() as usize;
            if known > 0 {
                ask(&cached.address, &query, &documents[..known]).await?;
            }
            let mut answers = [Value::Null, Value::Null];
            for side in [i % 2, 1 - i % 2] {
                let start = Instant::now();
                answers[side] = ask([&plain.address, &cached.address][side], &query, &documents).await?;
                [&mut without, &mut with][side].push(ms(start.elapsed()));
            }
            ensure!(answers[0] == answers[1], "the results differ: {answers:?}");
        }
        let ratios = sorted(with.iter().zip(&without).map(|(with, without)| with / without).collect());
        let [low, middle, high] = [0.25, 0.5, 0.75].map(|q| quantile(&ratios, q));
        println!(
            "| {:.0} % | {:.2} | {:.2} | {low:.3}, {middle:.3}, {high:.3} |",
            100.0 * share,
            median(without),
            median(with)
        );
    }
    Ok(())
}

/// The results of a request.
async fn ask(address: &str, query: &str, documents: &[String]) -> Result<Value> {
    let body = json!({"model": "rerankd-mini", "query": query, "documents": documents}).to_string();
    let response = exchange(connect(address).await?, &post("/v1/rerank", &body)).await?;
    ensure!(response.status == 200, "status {}", response.status);
    Ok(serde_json::from_slice::<Value>(&response.body)?["results"].take())
}
