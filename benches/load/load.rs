//! Load generator: how much of the offered load a rerank server answers in time, and how fast it refuses the rest.
//!
//! ```sh
//! cargo run --release -- serve &
//! cargo run --release --example load -- --documents 20 --words 100
//! ```
//!
//! First a closed loop measures the capacity: a few clients that each wait for their answer. Then an open loop offers multiples of
//! it: requests start at fixed times, whether or not earlier ones are answered, and latencies count from the scheduled time, so a
//! server that falls behind cannot hide it. Goodput is the rate of answers with status 200 within the deadline.

#![allow(clippy::print_stdout, reason = "the table is the result")]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Parser;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[derive(Parser)]
#[command(about = "Offers a rerank server multiples of its capacity and measures goodput and latency")]
struct Args {
    /// Address of the server
    #[arg(long, default_value = "127.0.0.1:8080")]
    address: String,
    /// Documents per request
    #[arg(long, default_value_t = 20)]
    documents: usize,
    /// Words per document
    #[arg(long, default_value_t = 100)]
    words: usize,
    /// Multiples of the measured capacity to offer
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.9, 1.2, 2.0, 5.0, 10.0])]
    factors: Vec<f64>,
    /// Duration of each load, in seconds
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// An answer counts as goodput if it arrives within this time of its scheduled start, in seconds
    #[arg(long, default_value_t = 10.0)]
    deadline: f64,
    /// Clients of the closed loop that measures the capacity
    #[arg(long, default_value_t = 4)]
    clients: usize,
    /// Process id of the server, for its resident memory
    #[arg(long)]
    pid: Option<u32>,
    /// Path that is requested
    #[arg(long, default_value = "/v1/rerank")]
    path: String,
    /// Value of the request's field `model`
    #[arg(long, default_value = "rerankd-mini")]
    model: String,
}

/// The result of one request.
#[derive(Clone, Copy)]
struct Outcome {
    /// 0 if the connection failed.
    status: u16,
    has_retry_after: bool,
    latency: Duration,
}

/// Idle connections.
type Pool = Arc<Mutex<VecDeque<TcpStream>>>;

#[tokio::main]
async fn main() {
    let args = Args::parse();
    let requests: Arc<Vec<Vec<u8>>> = Arc::new((0..64).map(|i| request(&args, i)).collect());
    let pool = Pool::default();
    let capacity = capacity(&args, &requests, &pool).await;
    println!("capacity: {capacity:.1} requests/s of {} documents of {} words", args.documents, args.words);
    println!(
        "factor  offered/s  goodput/s  % of capacity  200 p50  200 p99  503/s  with Retry-After  503 p99  failed  RSS MiB"
    );
    for &factor in &args.factors {
        let start = Instant::now();
        let outcomes = offer(&args, &requests, &pool, capacity * factor).await;
        report(&args, factor, capacity, &outcomes, start.elapsed());
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

/// The bytes of one HTTP request. Requests differ, so that the server merges no pairs between them.
fn request(args: &Args, seed: usize) -> Vec<u8> {
    const WORDS: [&str; 16] = [
        "river", "engine", "harbor", "window", "letter", "market", "forest", "signal", "bridge", "garden", "copper",
        "winter", "silver", "planet", "record", "school",
    ];
    let mut random = fastrand::Rng::with_seed(seed as u64);
    let mut text = |words: usize| (0..words).map(|_| WORDS[random.usize(..16)]).collect::<Vec<_>>().join(" ");
    let documents: Vec<String> = (0..args.documents).map(|_| text(args.words)).collect();
    let body = serde_json::json!({"model": args.model, "query": text(4), "documents": documents}).to_string();
    let (path, host, length) = (&args.path, &args.address, body.len());
    format!("POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {length}\r\n\r\n{body}").into_bytes()
}

/// Requests per second of clients that wait for their answers.
async fn capacity(args: &Args, requests: &Arc<Vec<Vec<u8>>>, pool: &Pool) -> f64 {
    let until = Instant::now() + Duration::from_secs(args.seconds);
    let start = Instant::now();
    let clients: Vec<_> = (0..args.clients)
        .map(|client| {
            let (address, requests, pool) = (args.address.clone(), Arc::clone(requests), Arc::clone(pool));
            tokio::spawn(async move {
                let mut answered = 0;
                while Instant::now() < until {
                    let request = &requests[(client + answered) % requests.len()];
                    let outcome = ask(&address, request, &pool, Instant::now()).await;
                    assert_eq!(
                        outcome.status, 200,
                        "the server must answer with 200 while the capacity is measured (0: the connection failed)"
                    );
                    answered += 1;
                }
                answered
            })
        })
        .collect();
    let mut answered = 0;
    for client in clients {
        answered += client.await.expect("a client that does not panic");
    }
    answered as f64 / start.elapsed().as_secs_f64()
}

/// Starts `rate` requests per second and waits for all answers.
async fn offer(args: &Args, requests: &Arc<Vec<Vec<u8>>>, pool: &Pool, rate: f64) -> Vec<Outcome> {
    let count = (rate * args.seconds as f64).ceil() as usize;
    let start = Instant::now();
    let mut tasks = Vec::with_capacity(count);
    for i in 0..count {
        let scheduled = start + Duration::from_secs_f64(i as f64 / rate);
        tokio::time::sleep_until(scheduled.into()).await;
        let (address, requests, pool) = (args.address.clone(), Arc::clone(requests), Arc::clone(pool));
        tasks.push(tokio::spawn(async move { ask(&address, &requests[i % requests.len()], &pool, scheduled).await }));
    }
    let mut outcomes = Vec::with_capacity(count);
    for task in tasks {
        outcomes.push(task.await.expect("a request that does not panic"));
    }
    outcomes
}

/// Sends one request, on an idle connection if there is one.
async fn ask(address: &str, request: &[u8], pool: &Pool, scheduled: Instant) -> Outcome {
    let idle = pool.lock().unwrap_or_else(PoisonError::into_inner).pop_back();
    let (status, has_retry_after) = match exchange(address, request, idle).await {
        Ok((status, has_retry_after, connection)) => {
            pool.lock().unwrap_or_else(PoisonError::into_inner).extend(connection);
            (status, has_retry_after)
        }
        Err(_) => (0, false),
    };
    Outcome { status, has_retry_after, latency: scheduled.elapsed() }
}

/// The status, whether there is a Retry-After, and the connection if it stays open.
async fn exchange(
    address: &str,
    request: &[u8],
    idle: Option<TcpStream>,
) -> std::io::Result<(u16, bool, Option<TcpStream>)> {
    let mut stream = match idle {
        Some(stream) => stream,
        None => TcpStream::connect(address).await?,
    };
    stream.set_nodelay(true)?;
    stream.write_all(request).await?;
    let mut answer = Vec::new();
    let head_length = loop {
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(end) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let head = String::from_utf8_lossy(&answer[..head_length]).to_ascii_lowercase();
    let header = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let length: usize = header("content-length").and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    while answer.len() < head_length + length {
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    let status = head.split(' ').nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    let stays_open = header("connection") != Some("close");
    Ok((status, header("retry-after").is_some(), stays_open.then_some(stream)))
}

/// `took` is the time from the first request to the last answer: goodput is counted over all of it.
fn report(args: &Args, factor: f64, capacity: f64, outcomes: &[Outcome], took: Duration) {
    let seconds = args.seconds as f64;
    let latencies = |status: u16| {
        let mut sorted: Vec<f64> =
            outcomes.iter().filter(|o| o.status == status).map(|o| o.latency.as_secs_f64()).collect();
        sorted.sort_by(f64::total_cmp);
        sorted
    };
    let quantile = |sorted: &[f64], q: f64| match sorted.len() {
        0 => "-".to_owned(),
        n => format!("{:.0} ms", 1e3 * sorted[((n - 1) as f64 * q).round() as usize]),
    };
    let (good, shed) = (latencies(200), latencies(503));
    let in_time = good.iter().filter(|&&latency| latency <= args.deadline).count();
    let goodput = in_time as f64 / took.as_secs_f64();
    let retry = outcomes.iter().filter(|o| o.status == 503 && o.has_retry_after).count();
    let failed = outcomes.len() - good.len() - shed.len();
    println!(
        "{factor:<6}  {:<9.1}  {goodput:<9.1}  {:<13.0}  {:<7}  {:<7}  {:<5.1}  {:<16}  {:<7}  {failed:<6}  {}",
        outcomes.len() as f64 / seconds,
        100.0 * goodput / capacity,
        quantile(&good, 0.5),
        quantile(&good, 0.99),
        shed.len() as f64 / seconds,
        format!("{retry} of {}", shed.len()),
        quantile(&shed, 0.99),
        args.pid.and_then(resident_mib).map_or_else(|| "-".to_owned(), |mib| mib.to_string()),
    );
}

/// Resident memory of a process (Linux).
fn resident_mib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? / 1024)
}
