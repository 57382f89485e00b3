//! Whether the response time for a wrong key reveals how much of the key is right (goal G21 of docs/reliability.md): a
//! Mann-Whitney test of two wrong keys.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::client::{connect, exchange};
use super::report::median;
use super::server::ServerArgs;

const KEY: &str = "0123456789abcdef0123456789abcdef";

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// Number of requests, each with one of the two keys at random
    #[arg(long, default_value_t = 100_000)]
    requests: usize,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let server = args.server.start(&["--api-key", KEY])?;
    let wrong = [format!("x{}", &KEY[1..]), format!("{}x", &KEY[..KEY.len() - 1])];
    let requests =
        wrong.map(|key| format!("GET /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n\r\n"));
    let mut times: [Vec<Duration>; 2] = Default::default();
    let mut connection = None;
    for _ in 0..args.requests {
        // In random order, so that neither key always follows the other.
        let which = fastrand::usize(..2);
        let stream = match connection.take() {
            Some(stream) => stream,
            None => connect(&server.address).await?,
        };
        let start = Instant::now();
        let response = exchange(stream, requests[which].as_bytes()).await?;
        times[which].push(start.elapsed());
        ensure!(response.status == 401, "status {}", response.status);
        connection = response.connection;
    }
    let z = mann_whitney(&times[0], &times[1]);
    let [first, last] = times.map(|times| 1e6 * median(times.iter().map(Duration::as_secs_f64)));
    println!(
        "{} requests: wrong first character {first:.1} us, wrong last character {last:.1} us (medians)",
        args.requests
    );
    println!("Mann-Whitney z = {z:.2}; a difference at p = 0.01 would be |z| > 2.58");
    Ok(())
}

/// The z score of the Mann-Whitney U test, in the normal approximation. Ties are rare, as times are in nanoseconds; they are not
/// corrected for.
fn mann_whitney(a: &[Duration], b: &[Duration]) -> f64 {
    let mut all: Vec<(Duration, bool)> = a.iter().map(|&t| (t, true)).chain(b.iter().map(|&t| (t, false))).collect();
    fastrand::shuffle(&mut all); // ties are then in random order
    all.sort_by_key(|&(time, _)| time);
    let ranks: f64 = all.iter().enumerate().filter(|(_, (_, is_a))| *is_a).map(|(i, _)| (i + 1) as f64).sum();
    let (n, m) = (a.len() as f64, b.len() as f64);
    let u = ranks - n * (n + 1.0) / 2.0;
    (u - n * m / 2.0) / (n * m * (n + m + 1.0) / 12.0).sqrt()
}
