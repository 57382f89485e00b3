//! Memory under 1,000 connections of mixed abuse (goal G4 of docs/reliability.md).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

use super::attack::large_request;
use super::client::{ATTACKERS_KEY, Client, KEY, connect, post_with_key, requests, text};
use super::report::{latencies_ms, quantile};
use super::server::ServerArgs;

const MODEL: &str = "rerankd-mini";
/// Default of --max-inflight-bytes.
const BUDGET_MIB: f64 = 256.0;
/// Time after the attack in which memory should be given back.
const RECOVERY: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Number of abusive connections
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// Duration of the abuse in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let server = args.server.start(&["--api-key", KEY, "--api-key", ATTACKERS_KEY])?;
    let client = Client::new(&server.address);
    let small = requests("/v1/rerank", MODEL, 1, 20);
    client.capacity(&small, 8, Duration::from_secs(3)).await?; // warm-up
    let base = server.watch.rss_mib();
    server.watch.reset_peak();
    let mut tasks = JoinSet::new();
    for i in 0..args.connections {
        tasks.spawn(abuse(server.address.clone(), i));
    }
    let outcomes = client.offer(&small, 20.0, Duration::from_secs(args.seconds), 64).await;
    let (peak, threads) = (server.watch.peak_mib(), server.watch.threads());
    drop(tasks);
    tokio::time::sleep(RECOVERY).await;
    let after = server.watch.rss_mib();
    let mut answers = BTreeMap::<String, usize>::new();
    outcomes.iter().for_each(|outcome| *answers.entry(format!("{:?}", outcome.answer)).or_default() += 1);
    let p99 = quantile(&latencies_ms(&outcomes, 200), 0.99);
    println!("{} connections of mixed abuse for {} s", args.connections, args.seconds);
    println!(
        "| base MiB | peak MiB | allowed: base + 1.25 x {BUDGET_MIB} | 10 s later | allowed: base + 10 % | threads |"
    );
    println!("|---|---|---|---|---|---|");
    println!(
        "| {base:.0} | {peak:.0} | {:.0} | {after:.0} | {:.0} | {threads} |",
        base + 1.25 * BUDGET_MIB,
        1.1 * base,
    );
    println!("answers to a well-behaved client: {answers:?}, p99 {p99:.0} ms");
    Ok(())
}

/// Opens one connection after another, each with the same kind of abuse: the last digit of `number` chooses it.
async fn abuse(address: String, number: usize) {
    let head = |headers: &str| {
        format!(
            "POST /v1/rerank HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {ATTACKERS_KEY}\r\n{headers}\r\n\r\n"
        )
        .into_bytes()
    };
    let many_empty = || {
        post_with_key(
            ATTACKERS_KEY,
            "/v1/rerank",
            &format!(r#"{{"model":"{MODEL}","query":"q","documents":[{}""]}}"#, r#""","#.repeat(700_000)),
        )
    };
    let echo = json!({"model": MODEL, "query": "q", "documents": ["a".repeat(1 << 20)], "return_documents": true, "max_chunks_per_doc": 1});
    let (first, trickle): (Vec<u8>, &[u8]) = match number % 10 {
        // A header of 30 kB that does not end.
        0 | 1 => {
            (format!("POST /v1/rerank HTTP/1.1\r\nhost: localhost\r\nx-long: {}", "a".repeat(30_000)).into_bytes(), b"")
        }
        // Bodies that arrive at 1 KiB/s, five times the minimum rate. One kind starts with 1 MiB at once.
        2 | 3 => (head("content-length: 8000000"), &[b' '; 512]),
        4 => ([head("content-length: 8000000"), vec![b' '; 1 << 20]].concat(), &[b' '; 512]),
        // A body in 1-byte chunks.
        5 => ([head("transfer-encoding: chunked"), b"1\r\n \r\n".repeat(100_000)].concat(), b"1\r\n \r\n"),
        // Answers of 1 MiB that are not read.
        6 => (post_with_key(ATTACKERS_KEY, "/v1/rerank", &echo.to_string()).repeat(4), b""),
        // 700,000 empty documents.
        7 => (many_empty(), b""),
        // Valid requests of 8 MB, on ten connections.
        8 if number < 100 => (large_request(), b""),
        // More small requests than the model can compute, pipelined, answers not read.
        _ => {
            let documents: Vec<String> = (0..20).map(|_| text(&mut fastrand::Rng::new(), 50)).collect();
            let body = json!({"model": MODEL, "query": "q", "documents": documents}).to_string();
            (post_with_key(ATTACKERS_KEY, "/v1/rerank", &body).repeat(20), b"")
        }
    };
    loop {
        let Ok(mut stream) = connect(&address).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let start = Instant::now();
        let mut open = stream.write_all(&first).await.is_ok();
        while open && start.elapsed() < Duration::from_secs(40) {
            tokio::time::sleep(Duration::from_millis(500)).await;
            open = match trickle {
                b"" => stream.take_error().is_ok_and(|error| error.is_none()) && !is_closed(&stream),
                bytes => stream.write_all(bytes).await.is_ok(),
            };
        }
    }
}

/// Whether the server has closed the connection. What it has sent stays unread.
fn is_closed(stream: &tokio::net::TcpStream) -> bool {
    let mut byte = [std::mem::MaybeUninit::uninit()];
    matches!(socket2::SockRef::from(stream).peek(&mut byte), Ok(0))
}
