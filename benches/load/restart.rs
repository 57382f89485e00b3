//! Time from a kill to the next ready server (goal G10 of docs/reliability.md), and the time of reading its weights.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};

use super::client::{connect, exchange, requests};
use super::report::{median, ms, quantile, sorted};
use super::server::ServerArgs;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Kills and starts
    #[arg(long, default_value_t = 20)]
    cycles: usize,
    /// File of weights whose reading is timed [default: none]
    #[arg(long)]
    weights: Option<std::path::PathBuf>,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let requests = requests("/v1/rerank", "rerankd-mini", 4, 40);
    let mut times = Vec::new();
    for _ in 0..args.cycles {
        let server = args.server.start(&[])?;
        let response = exchange(connect(&server.address).await?, &requests[0]).await?;
        ensure!(response.status == 200, "status {}", response.status);
        drop(server); // SIGKILL
        let killed = Instant::now();
        let server = args.server.start(&[])?;
        let ready = b"GET /ready HTTP/1.1\r\nhost: localhost\r\n\r\n";
        let response = exchange(connect(&server.address).await?, ready).await?;
        ensure!(response.status == 200, "/ready: status {}", response.status);
        times.push(ms(killed.elapsed()));
    }
    let times = sorted(times);
    println!(
        "from the kill to /ready, {} times: median {:.0} ms, longest {:.0} ms",
        args.cycles,
        quantile(&times, 0.5),
        quantile(&times, 1.0)
    );
    if let Some(path) = &args.weights {
        println!("reading {}: median {:.0} ms of 5", path.display(), median(read_times(path)?));
    }
    Ok(())
}

/// Milliseconds for reading a file, five times.
fn read_times(path: &Path) -> Result<Vec<f64>> {
    let read = |_| {
        let start = Instant::now();
        std::hint::black_box(std::fs::read(path)?);
        Ok(ms(start.elapsed()))
    };
    (0..5).map(read).collect()
}
