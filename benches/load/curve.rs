//! Offered load against goodput, latency and refusals (goals G1, G2 and G3 of docs/reliability.md).
//!
//! A closed loop measures the capacity, then an open loop offers multiples of it. Goodput is the rate of answers with status 200
//! that arrive within the deadline, over the time until the last answer.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;

use super::client::{Answer, Client, Outcome, requests};
use super::report::{append_json, latencies_ms, median, quantile};
use super::server::{ServerArgs, Watch};

/// Pause between two loads.
const PAUSE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Name of the server and the workload in the results
    #[arg(long, default_value = "rerankd")]
    name: String,
    /// Documents of one request
    #[arg(long, default_value_t = 20)]
    documents: usize,
    /// Words of one document
    #[arg(long, default_value_t = 100)]
    words: usize,
    /// Multiples of the capacity to offer
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.9, 1.2, 2.0, 5.0, 10.0, 20.0])]
    factors: Vec<f64>,
    /// Seconds of each load
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Runs of all loads; the table has medians
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// An answer counts as goodput if it arrives within this time of its scheduled start, in seconds
    #[arg(long, default_value_t = 10.0)]
    deadline: f64,
    /// Clients of the closed loop that measures the capacity
    #[arg(long, default_value_t = 8)]
    clients: usize,
    /// Maximum connections of the open loop
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// Path that is requested
    #[arg(long, default_value = "/v1/rerank")]
    path: String,
    /// Value of the request's field `model`
    #[arg(long = "model-name", default_value = "rerankd-mini")]
    model_name: String,
    /// Appends a line of JSON for every load of every run
    #[arg(long)]
    json: Option<PathBuf>,
}

/// The figures of one load: rates in requests per second, times in milliseconds, CPU time in seconds, the rest counts.
#[derive(Debug, Clone)]
struct Row {
    factor: f64,
    offered: f64,
    goodput: f64,
    capacity: f64,
    p50: f64,
    p99: f64,
    refused: f64,
    with_retry_after: f64,
    refused_p99: f64,
    other_status: f64,
    broken: f64,
    unsent: f64,
    rss_mib: f64,
    generator_cpu: f64,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let requests = requests(&args.path, &args.model_name, args.documents, args.words);
    let mut rows: Vec<Row> = Vec::new();
    for run in 0..args.runs {
        let server = args.server.start(&[])?;
        let client = Client::new(&server.address);
        client.capacity(&requests, args.clients, Duration::from_secs(1)).await?; // warm-up
        let capacity = client.capacity(&requests, args.clients, Duration::from_secs(args.seconds)).await?;
        eprintln!("run {run}: capacity {capacity:.1} requests/s");
        for &factor in &args.factors {
            let (start, cpu) = (Instant::now(), Watch::this_process().cpu_seconds());
            let time = Duration::from_secs(args.seconds);
            let outcomes = client.offer(&requests, capacity * factor, time, args.connections).await;
            let cpu = Watch::this_process().cpu_seconds() - cpu;
            let row = row(&args, factor, capacity, &outcomes, start.elapsed(), server.watch, cpu);
            append_json(args.json.as_deref(), &line(&args, run, &row))?;
            rows.push(row);
            tokio::time::sleep(PAUSE).await;
        }
    }
    print(&args, &rows);
    Ok(())
}

/// `took` is the time from the first request to the last answer.
fn row(
    args: &Args,
    factor: f64,
    capacity: f64,
    outcomes: &[Outcome],
    took: Duration,
    watch: Watch,
    generator_cpu: f64,
) -> Row {
    let (good, refused) = (latencies_ms(outcomes, 200), latencies_ms(outcomes, 503));
    let in_time = good.iter().filter(|&&ms| ms <= args.deadline * 1e3).count();
    let count = |wanted: fn(&Outcome) -> bool| outcomes.iter().filter(|outcome| wanted(outcome)).count() as f64;
    Row {
        factor,
        offered: outcomes.len() as f64 / args.seconds as f64,
        goodput: in_time as f64 / took.as_secs_f64(),
        capacity,
        p50: quantile(&good, 0.5),
        p99: quantile(&good, 0.99),
        refused: refused.len() as f64,
        with_retry_after: count(|o| o.answer == Answer::Status(503) && o.has_retry_after),
        refused_p99: quantile(&refused, 0.99),
        other_status: count(|o| matches!(o.answer, Answer::Status(status) if status != 200 && status != 503)),
        broken: count(|o| !matches!(o.answer, Answer::Status(_) | Answer::Unsent)),
        unsent: count(|o| o.answer == Answer::Unsent),
        rss_mib: watch.rss_mib(),
        generator_cpu,
    }
}

fn line(args: &Args, run: usize, row: &Row) -> serde_json::Value {
    json!({
        "command": "curve", "name": args.name, "documents": args.documents, "words": args.words, "run": run,
        "seconds": args.seconds, "factor": row.factor, "capacity_per_s": row.capacity, "offered_per_s": row.offered,
        "goodput_per_s": row.goodput, "p50_ms": row.p50, "p99_ms": row.p99, "refused": row.refused,
        "refused_with_retry_after": row.with_retry_after, "refused_p99_ms": row.refused_p99,
        "other_status": row.other_status, "broken_connections": row.broken, "unsent": row.unsent,
        "rss_mib": row.rss_mib, "generator_cpu_s": row.generator_cpu,
    })
}

/// Medians over the runs.
fn print(args: &Args, rows: &[Row]) {
    let capacity = median(rows.iter().map(|row| row.capacity));
    println!(
        "{}: {} documents of {} words; capacity {capacity:.1} requests/s; medians of {} runs of {} s",
        args.name, args.documents, args.words, args.runs, args.seconds
    );
    println!(
        "| offered | goodput / capacity | worst run | 200: p50 ms | 200: p99 ms | 503 | with Retry-After | 503: p99 ms | other \
         status | broken | unsent | RSS MiB |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for &factor in &args.factors {
        let of = |figure: fn(&Row) -> f64| median(rows.iter().filter(|row| row.factor == factor).map(figure));
        let share = |row: &Row| 100.0 * row.goodput / row.capacity;
        let worst = rows.iter().filter(|row| row.factor == factor).map(share).fold(f64::INFINITY, f64::min);
        println!(
            "| {factor} x | {:.0} % | {worst:.0} % | {:.1} | {:.1} | {:.0} | {:.0} | {:.1} | {:.0} | {:.0} | {:.0} | {:.0} |",
            of(|row| 100.0 * row.goodput / row.capacity),
            of(|row| row.p50),
            of(|row| row.p99),
            of(|row| row.refused),
            of(|row| row.with_retry_after),
            of(|row| row.refused_p99),
            of(|row| row.other_status),
            of(|row| row.broken),
            of(|row| row.unsent),
            of(|row| row.rss_mib),
        );
    }
}
