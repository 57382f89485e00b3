//! Whether answers reach the clients that asked (goal G19 of docs/reliability.md): many clients send different requests at the
//! same time, and the results in each answer must equal those that the same request gets when it is sent alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::client::{connect, exchange, post_with_key, text};
use super::server::ServerArgs;

const KEYS: [&str; 4] = ["key-of-client-0", "key-of-client-1", "key-of-client-2", "key-of-client-3"];

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Number of requests
    #[arg(long, default_value_t = 100_000)]
    requests: usize,
    /// Number of distinct requests, from which each client chooses at random
    #[arg(long, default_value_t = 500)]
    different: usize,
    /// Connections, each waiting for its answer before its next request
    #[arg(long, default_value_t = 32)]
    clients: usize,
}

/// A request on the wire, and the results that it gets alone.
struct Known {
    request: Vec<u8>,
    results: Value,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let keys: Vec<&str> = KEYS.iter().flat_map(|key| ["--api-key", key]).collect();
    let server = args.server.start(&keys)?;
    let mut all = Vec::with_capacity(args.different);
    for i in 0..args.different {
        let random = &mut fastrand::Rng::with_seed(i as u64);
        let documents: Vec<String> =
            (0..1 + i % 4).map(|j| format!("document {i} {j} {}", text(random, 2 + i % 30))).collect();
        let body = json!({"model": "rerankd-mini", "query": text(random, 3), "documents": documents, "return_documents": true});
        let request = post_with_key(KEYS[i % KEYS.len()], "/v1/rerank", &body.to_string());
        let results = results(&server.address, &request).await?;
        for result in results.as_array().into_iter().flatten() {
            let index = result["index"].as_u64().context("no index")? as usize;
            ensure!(
                result["document"]["text"] == documents[index].as_str(),
                "request {i}: the text of another document"
            );
        }
        all.push(Known { request, results });
    }
    let (all, next, start) = (Arc::new(all), Arc::new(AtomicUsize::new(0)), Instant::now());
    let clients: Vec<_> = (0..args.clients)
        .map(|seed| {
            let (all, next, address) = (Arc::clone(&all), Arc::clone(&next), server.address.clone());
            tokio::spawn(compare(all, next, args.requests, address, seed as u64))
        })
        .collect();
    for client in clients {
        client.await??;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{} answers to {} different requests of {} keys on {} connections in {seconds:.0} s: the results of each equal those of its request sent alone",
        args.requests,
        args.different,
        KEYS.len(),
        args.clients
    );
    Ok(())
}

/// Sends requests in random order until `count` are sent by all clients together.
async fn compare(all: Arc<Vec<Known>>, next: Arc<AtomicUsize>, count: usize, address: String, seed: u64) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut connection = None;
    while next.fetch_add(1, Relaxed) < count {
        let known = &all[random.usize(..all.len())];
        let stream = match connection.take() {
            Some(stream) => stream,
            None => connect(&address).await?,
        };
        let response = exchange(stream, &known.request).await?;
        ensure!(response.status == 200, "status {}", response.status);
        let answer: Value = serde_json::from_slice(&response.body)?;
        ensure!(answer["results"] == known.results, "another answer: {answer}, not {}", known.results);
        connection = response.connection;
    }
    Ok(())
}

async fn results(address: &str, request: &[u8]) -> Result<Value> {
    let response = exchange(connect(address).await?, request).await?;
    ensure!(response.status == 200, "status {}", response.status);
    Ok(serde_json::from_slice::<Value>(&response.body)?["results"].take())
}
