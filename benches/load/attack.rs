//! Latency of a well-behaved client beside an attacker. The goal is that its p99 less than doubles.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

use super::client::{ATTACKERS_KEY, Answer, Client, KEY, Outcome, connect, post_with_key, requests, text};
use super::report::{append_json, latencies_ms, median, quantile};
use super::server::ServerArgs;

/// Connections of [`Attack::HeldSockets`].
const HELD_SOCKETS: usize = 64;
/// Connections of [`Attack::LongDocuments`].
const TOKENIZER_CONNECTIONS: usize = 4;
const MODEL: &str = "rerankd-mini";
/// Maximum connections of the well-behaved client.
const CONNECTIONS: usize = 64;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Share of the capacity that the well-behaved client uses
    #[arg(long, default_value_t = 0.3)]
    load: f64,
    /// Words in the one document of each of its requests
    #[arg(long, default_value_t = 20)]
    words: usize,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Times that each attack is measured: once without it, once under it
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Serve without keys: the server cannot tell the attacker from the other client
    #[arg(long)]
    without_keys: bool,
    /// Only attacks whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Appends a line of JSON for every pair
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy)]
enum Attack {
    /// Slow bodies, unfinished headers, answers that are not read.
    HeldSockets,
    /// Requests of 8 MiB with 1,000 documents, one after another.
    LargeRequests,
    /// The longest documents that the tokenizer takes, one token for each character.
    LongDocuments,
}

impl Attack {
    const ALL: [(&'static str, Self); 3] = [
        ("64 held sockets", Self::HeldSockets),
        ("8 MiB requests, one after another", Self::LargeRequests),
        ("longest documents, 4 at a time", Self::LongDocuments),
    ];

    /// Starts the attack. It runs until the returned tasks are dropped.
    fn start(self, address: &str) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        match self {
            Self::HeldSockets => {
                for i in 0..HELD_SOCKETS {
                    tasks.spawn(hold_socket(address.to_owned(), i));
                }
            }
            Self::LargeRequests => {
                tasks.spawn(repeat(address.to_owned(), large_request()));
            }
            Self::LongDocuments => {
                for _ in 0..TOKENIZER_CONNECTIONS {
                    tasks.spawn(repeat(address.to_owned(), long_documents()));
                }
            }
        }
        tasks
    }
}

pub(crate) fn large_request() -> Vec<u8> {
    let random = &mut fastrand::Rng::with_seed(1);
    let documents: Vec<String> = (0..1000).map(|_| text(random, 1200)).collect();
    post_with_key(
        ATTACKERS_KEY,
        "/v1/rerank",
        &json!({"model": MODEL, "query": "q", "documents": documents}).to_string(),
    )
}

fn long_documents() -> Vec<u8> {
    let documents = vec!["!".repeat(262_144); 31];
    post_with_key(
        ATTACKERS_KEY,
        "/v1/rerank",
        &json!({"model": MODEL, "query": "q", "documents": documents}).to_string(),
    )
}

async fn repeat(address: String, request: Vec<u8>) {
    let client = Client::new(&address);
    loop {
        client.ask(&request, Instant::now()).await;
    }
}

/// Holds a connection open, and opens another when the server closes it. `index % 3` chooses how: a body that arrives slowly, an
/// unfinished header, or a response that is not read.
async fn hold_socket(address: String, index: usize) {
    let answered = json!({"model": MODEL, "query": "q", "documents": ["a".repeat(1 << 20)], "return_documents": true, "max_chunks_per_doc": 1});
    let unread = post_with_key(ATTACKERS_KEY, "/v1/rerank", &answered.to_string());
    loop {
        let Ok(mut stream) = connect(&address).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let first: &[u8] = match index % 3 {
            0 => b"POST /v1/rerank HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer attacker\r\ncontent-length: 8000000\r\n\r\n",
            1 => b"POST /v1/rerank HTTP/1.1\r\nhost:",
            _ => &unread,
        };
        let mut open = stream.write_all(first).await.is_ok();
        while open {
            tokio::time::sleep(Duration::from_secs(1)).await;
            // Only the slow body gets more bytes. The other two check whether the server has closed the connection.
            open = match index % 3 {
                0 => stream.write_all(&[b' '; 512]).await.is_ok(),
                1 => {
                    stream.writable().await.is_ok()
                        && stream.try_read(&mut [0; 1]).is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock)
                }
                _ => stream.take_error().is_ok_and(|error| error.is_none()),
            };
        }
    }
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let small = requests("/v1/rerank", MODEL, 1, args.words);
    println!(
        "a client at {:.0} % of the capacity{}, one document of {} words a request; medians of {} pairs of {} s",
        100.0 * args.load,
        if args.without_keys { ", no keys" } else { ", attacker with another key" },
        args.words,
        args.runs,
        args.seconds
    );
    println!(
        "| attack | requests/s | p50 alone ms | p50 attacked ms | p99 alone ms | p99 attacked ms | ratio of p99 | not 200 |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (name, attack) in Attack::ALL.into_iter().filter(|(name, _)| name.contains(&args.only)) {
        let keys: &[&str] = if args.without_keys { &[] } else { &["--api-key", KEY, "--api-key", ATTACKERS_KEY] };
        let server = args.server.start(keys)?;
        let client = Client::new(&server.address);
        client.capacity(&small, 16, Duration::from_secs(1)).await?;
        let rate = args.load * client.capacity(&small, 16, Duration::from_secs(3)).await?;
        let time = Duration::from_secs(args.seconds);
        let (mut alone, mut attacked, mut failed) = (Vec::new(), Vec::new(), 0);
        for run in 0..args.runs {
            let before = quantiles(&client.offer(&small, rate, time, CONNECTIONS).await);
            let attackers = attack.start(&server.address);
            tokio::time::sleep(Duration::from_secs(1)).await;
            let outcomes = client.offer(&small, rate, time, CONNECTIONS).await;
            drop(attackers);
            let during = quantiles(&outcomes);
            failed += outcomes.iter().filter(|outcome| outcome.answer != Answer::Status(200)).count();
            let line = json!({"command": "attack", "attack": name, "run": run, "rate_per_s": rate, "p50_alone_ms": before.0,
                "p99_alone_ms": before.1, "p50_attacked_ms": during.0, "p99_attacked_ms": during.1});
            append_json(args.json.as_deref(), &line)?;
            alone.push(before);
            attacked.push(during);
            tokio::time::sleep(Duration::from_secs(3)).await; // the attacker's admitted work ends
        }
        let of = |runs: &[(f64, f64)], figure: fn(&(f64, f64)) -> f64| median(runs.iter().map(figure));
        let ratio = median(alone.iter().zip(&attacked).map(|(alone, attacked)| attacked.1 / alone.1));
        println!(
            "| {name} | {rate:.0} | {:.1} | {:.1} | {:.1} | {:.1} | {ratio:.2} | {failed} |",
            of(&alone, |q| q.0),
            of(&attacked, |q| q.0),
            of(&alone, |q| q.1),
            of(&attacked, |q| q.1),
        );
    }
    Ok(())
}

/// Median and 99th percentile of the answered requests' latencies, in milliseconds.
fn quantiles(outcomes: &[Outcome]) -> (f64, f64) {
    let latencies = latencies_ms(outcomes, 200);
    (quantile(&latencies, 0.5), quantile(&latencies, 0.99))
}
