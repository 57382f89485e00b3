//! Mixed requests, broken ones and clients that leave, for a long time (goal G6 of docs/reliability.md). Reports memory,
//! descriptors and threads, which should stay constant.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

use super::client::{Answer, Client, connect, requests};
use super::report::{append_json, ms, quantile, sorted};
use super::server::ServerArgs;

const MODEL: &str = "rerankd-mini";
const SAMPLE_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Minutes of the whole run; the first quarter is warm-up
    #[arg(long, default_value_t = 20.0)]
    minutes: f64,
    /// Factor of all pauses of the clients: more than 1 for a machine that has other work
    #[arg(long, default_value_t = 1.0)]
    pauses: f64,
    /// File to which one line of JSON is appended for every sample
    #[arg(long)]
    json: Option<PathBuf>,
}

struct Sample {
    minutes: f64,
    rss_mib: f64,
    descriptors: usize,
    threads: usize,
}

/// Every request of the well-behaved clients: when its answer came, in seconds from the start, the answer, and the latency in ms.
type Log = Arc<Mutex<Vec<(f64, Answer, f64)>>>;

pub(crate) async fn run(args: Args) -> Result<()> {
    let server = args.server.start(&[])?;
    let idle = (server.watch.descriptors(), server.watch.threads());
    let start = Instant::now();
    let log: Log = Arc::default();
    let mut tasks = JoinSet::new();
    let pause = |ms| Duration::from_millis(ms).mul_f64(args.pauses);
    for (documents, words, pause_ms) in [(1, 20, 20), (4, 60, 100), (20, 100, 400), (100, 50, 2000), (3, 2000, 3000)] {
        let client = Client::new(&server.address);
        tasks.spawn(well_behaved(
            client,
            requests("/v1/rerank", MODEL, documents, words),
            pause(pause_ms),
            start,
            Arc::clone(&log),
        ));
    }
    for _ in 0..2 {
        tasks.spawn(leaver(server.address.clone(), pause(100)));
        tasks.spawn(broken(server.address.clone(), pause(50)));
    }
    let mut samples = Vec::new();
    while start.elapsed().as_secs_f64() < 60.0 * args.minutes {
        tokio::time::sleep(SAMPLE_EVERY).await;
        let sample = Sample {
            minutes: start.elapsed().as_secs_f64() / 60.0,
            rss_mib: server.watch.rss_mib(),
            descriptors: server.watch.descriptors(),
            threads: server.watch.threads(),
        };
        let line = json!({"command": "soak", "minutes": sample.minutes, "rss_mib": sample.rss_mib, "descriptors": sample.descriptors, "threads": sample.threads});
        append_json(args.json.as_deref(), &line)?;
        samples.push(sample);
    }
    drop(tasks);
    tokio::time::sleep(Duration::from_secs(12)).await;
    let end = (server.watch.descriptors(), server.watch.threads());
    let warm: Vec<&Sample> = samples.iter().filter(|sample| sample.minutes >= args.minutes / 4.0).collect();
    let (first, last) = warm.split_at(warm.len() / 2);
    let most =
        |samples: &[&Sample], of: fn(&Sample) -> usize| samples.iter().map(|sample| of(sample)).max().unwrap_or(0);
    let log = std::mem::take(&mut *log.lock().expect("no client panicked"));
    let mut answers = BTreeMap::<String, usize>::new();
    log.iter().for_each(|(_, answer, _)| *answers.entry(format!("{answer:?}")).or_default() += 1);
    println!("{:.0} minutes; answers to well-behaved clients: {answers:?}", args.minutes);
    println!(
        "memory: {:.1} MiB in the last sample, slope {:+.2} MiB/h after the first quarter",
        warm.last().map_or(f64::NAN, |s| s.rss_mib),
        60.0 * slope(&warm)
    );
    println!(
        "descriptors: {} idle, at most {} and {} in the two halves of the time after warm-up, {} when the clients had left",
        idle.0,
        most(first, |s| s.descriptors),
        most(last, |s| s.descriptors),
        end.0
    );
    println!(
        "threads: {} idle, at most {} and {}, {} when the clients had left",
        idle.1,
        most(first, |s| s.threads),
        most(last, |s| s.threads),
        end.1
    );
    let p99 = |from: f64, to: f64| {
        let latencies = log.iter().filter(|(at, _, _)| (from..to).contains(&(at / 60.0 / args.minutes)));
        quantile(&sorted(latencies.map(|(_, _, ms)| *ms).collect()), 0.99)
    };
    println!(
        "p99 of all well-behaved requests: {:.0} ms in the second quarter, {:.0} ms in the last",
        p99(0.25, 0.5),
        p99(0.75, 1.0)
    );
    Ok(())
}

/// Least-squares slope of the resident memory, in MiB per minute.
fn slope(samples: &[&Sample]) -> f64 {
    let n = samples.len() as f64;
    let mean = |of: fn(&Sample) -> f64| samples.iter().map(|sample| of(sample)).sum::<f64>() / n;
    let (x, y) = (mean(|s| s.minutes), mean(|s| s.rss_mib));
    let covariance: f64 = samples.iter().map(|s| (s.minutes - x) * (s.rss_mib - y)).sum();
    covariance / samples.iter().map(|s| (s.minutes - x).powi(2)).sum::<f64>()
}

async fn well_behaved(client: Client, requests: Arc<Vec<Vec<u8>>>, pause: Duration, start: Instant, log: Log) {
    for i in 0.. {
        let outcome = client.ask(&requests[i % requests.len()], Instant::now()).await;
        let entry = (start.elapsed().as_secs_f64(), outcome.answer, ms(outcome.latency));
        log.lock().expect("no client panicked").push(entry);
        tokio::time::sleep(pause.mul_f64(2.0 * fastrand::f64())).await;
    }
}

/// Leaves at a random moment: within the request, in the queue, while its answer is computed or sent.
async fn leaver(address: String, pause: Duration) {
    let requests = requests("/v1/rerank", MODEL, 20, 100);
    loop {
        let request = &requests[fastrand::usize(..requests.len())];
        let sent = if fastrand::bool() { request.len() } else { fastrand::usize(1..request.len()) };
        if let Ok(mut stream) = connect(&address).await {
            stream.write_all(&request[..sent]).await.ok();
            tokio::time::sleep(Duration::from_millis(fastrand::u64(0..150))).await;
        }
        tokio::time::sleep(pause).await;
    }
}

/// Sends requests with random bytes changed, unfinished headers and noise, and reads whatever comes for a short time.
async fn broken(address: String, pause: Duration) {
    let requests = requests("/v1/rerank", MODEL, 3, 30);
    loop {
        let mut wire = requests[fastrand::usize(..requests.len())].clone();
        match fastrand::usize(..4) {
            0 => wire.truncate(fastrand::usize(1..60)),
            1 => wire.iter_mut().for_each(|byte| *byte = fastrand::u8(..)),
            _ => {
                let body = wire.windows(4).position(|bytes| bytes == b"\r\n\r\n").map_or(0, |at| at + 4);
                for _ in 0..fastrand::usize(1..5) {
                    let at = fastrand::usize(body..wire.len());
                    wire[at] = fastrand::u8(..);
                }
            }
        }
        if let Ok(mut stream) = connect(&address).await {
            stream.write_all(&wire).await.ok();
            let _ = tokio::time::timeout(Duration::from_millis(50), super::client::read_response(stream)).await;
        }
        tokio::time::sleep(pause).await;
    }
}
