//! Load, attacks and faults against a real server process: the measurements of docs/reliability.md.
//!
//! ```sh
//! cargo build --release --bin rerankd --example load
//! target/release/examples/load curve --stub --json curve.jsonl   # goodput and latency against offered load
//! target/release/examples/load attack                            # what other clients notice of an attacker
//! target/release/examples/load plot curve.jsonl > curve.svg
//! ```
//!
//! Each command but `stub` and `plot` starts its own server, unless `--address` names one, and prints a table. `curve`, `attack`,
//! `cost` and `soak` also append their figures to `--json FILE`, as lines of JSON.

#![allow(clippy::print_stdout, reason = "the tables are the result")]

mod abuse;
mod attack;
mod cache;
mod client;
mod cost;
mod curve;
mod fairness;
mod isolation;
mod keys;
mod plot;
mod reload;
mod report;
mod restart;
mod server;
mod sigterm;
mod soak;
mod stub;

use clap::Parser;

#[derive(Parser)]
#[command(about = "Offers a rerank server more than it can do, attacks it, and reports what clients notice")]
enum Command {
    /// Offered load against goodput, latency and refusals
    Curve(curve::Args),
    /// Latency of a well-behaved client beside an attacker
    Attack(attack::Args),
    /// Memory under 1,000 connections of mixed abuse
    Abuse(abuse::Args),
    /// Processor time and memory for each byte of hostile requests
    Cost(cost::Args),
    /// Small requests beside a large one
    Fairness(fairness::Args),
    /// SIGTERM under load, again and again
    Sigterm(sigterm::Args),
    /// Mixed requests for a long time: slope of memory, descriptors, threads
    Soak(soak::Args),
    /// Response time for a wrong key that differs from the right one in its first or in its last character
    Keys(keys::Args),
    /// Many different requests at the same time: each answer must be that of its request alone
    Isolation(isolation::Args),
    /// Time from SIGKILL to the next ready server
    Restart(restart::Args),
    /// Models that are replaced at SIGHUP: memory, threads, and the latency of a model that stays
    Reload(reload::Args),
    /// Latency with and without the score cache
    Cache(cache::Args),
    /// Draws the results of `curve` as an SVG
    Plot(plot::Args),
    /// Serves a model of known speed: 5 ms for each chunk, one after another
    Stub(stub::Args),
}

fn main() -> anyhow::Result<()> {
    let command = Command::parse();
    rlimit::increase_nofile_limit(20_000)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match command {
            Command::Curve(args) => curve::run(args).await,
            Command::Attack(args) => attack::run(args).await,
            Command::Abuse(args) => abuse::run(args).await,
            Command::Cost(args) => cost::run(args).await,
            Command::Fairness(args) => fairness::run(args).await,
            Command::Sigterm(args) => sigterm::run(args).await,
            Command::Soak(args) => soak::run(args).await,
            Command::Keys(args) => keys::run(args).await,
            Command::Isolation(args) => isolation::run(args).await,
            Command::Restart(args) => restart::run(args).await,
            Command::Reload(args) => reload::run(args).await,
            Command::Cache(args) => cache::run(args).await,
            Command::Plot(args) => plot::run(&args),
            Command::Stub(args) => stub::run(args).await,
        }
    })
}
