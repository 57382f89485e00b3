//! `rerankd bench`: how fast a model scores pairs here, without a server and without text.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use serde::Deserialize;
use serde_json::json;

use super::{Failure, print, table};
use crate::backend::cpu::roofline;
use crate::backend::profile::{Operation, Profile};
use crate::backend::{BackendError, Roofline};
use crate::batch::{Batch, Pair};
use crate::config::args::ModelArgs;
use crate::config::hub::hub_options_from_env;
use crate::config::machine::Machine;
use crate::config::resolve::Notice;
use crate::loading::download::Hub;
use crate::loading::{DeviceChoice, LoadedModel, Loader};
use crate::telemetry;

/// Pairs by the workload's name.
type Workloads = BTreeMap<String, Vec<Pair>>;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// JSON file of workloads: {"name": [[token ids of a pair], ...], ...} [default: four of our own]
    ///
    /// Ours are a: 8 pairs of 512 tokens, b: 16 pairs of 32 to 512, c: 48 pairs of 20 to 64, d: one pair of 128.
    #[arg(long, value_name = "FILE")]
    workloads: Option<PathBuf>,
    /// Runs of each workload, after one that is not counted
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,
    /// Measure what is asked for, line by line, on standard input
    ///
    /// {"workload":"a","runs":3} is answered by a line with the seconds of each run, the tokens and the logits. For programs
    /// that measure several servers in turn.
    #[arg(long)]
    json: bool,
    /// Show where the time goes, operation by operation, a batch at a time
    ///
    /// "roofline ms" is the least possible time of an operation at the device's peak rates, which are measured first: compute,
    /// and on a GPU also memory bandwidth.
    #[arg(long, conflicts_with = "json")]
    profile: bool,
    #[command(flatten)]
    pub(super) models: ModelArgs,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let mut settings = args.models.resolve(&Machine::detect(), usize::MAX).map_err(Failure::Config)?;
    let profile = args.profile.then(Arc::<Profile>::default);
    settings.load.profile = profile.clone();
    settings.notices.iter().for_each(Notice::log);
    let batch_tokens = settings.scheduler.max_batch_tokens;
    let hub = Hub::new(hub_options_from_env());
    let loader = Loader::new(&hub, &settings.load).map_err(Failure::Config)?;
    for source in &settings.sources {
        let model = loader.load(source).map_err(Failure::Config)?;
        tracing::info!(model = model.name, "{}", model.description);
        let workloads = match &args.workloads {
            Some(path) => read(path, &model).map_err(Failure::Config)?,
            None => own(&model),
        };
        if let Some(profile) = &profile {
            explain(profile, &model, &workloads, args.runs, batch_tokens)?;
        } else if args.json {
            answer(&settings.load.device, &model, &workloads, batch_tokens)?;
        } else {
            report(&model, &workloads, args.runs, batch_tokens)?;
        }
    }
    Ok(())
}

/// A workload as the model takes it: whole where one batch has the whole device, else in batches that share it.
fn batches(model: &LoadedModel, pairs: &[Pair], batch_tokens: usize) -> Vec<Batch> {
    let limit = if model.encoder.max_concurrent_batches() == 1 { usize::MAX } else { batch_tokens };
    let mut batches: Vec<(usize, Vec<&Pair>)> = Vec::new();
    for pair in pairs {
        match batches.last_mut() {
            Some((tokens, batch)) if *tokens + pair.tokens() <= limit => {
                *tokens += pair.tokens();
                batch.push(pair);
            }
            _ => batches.push((pair.tokens(), vec![pair])),
        }
    }
    batches.into_iter().map(|(_, pairs)| Batch::pack(pairs)).collect()
}

/// Scores the batches, as many at a time as the model has lanes. The logits are in the order of the pairs.
fn score(model: &LoadedModel, batches: &[Batch]) -> Result<Vec<f32>, BackendError> {
    let next = AtomicUsize::new(0);
    let scored: Vec<OnceLock<Result<Vec<f32>, BackendError>>> = batches.iter().map(|_| OnceLock::new()).collect();
    let take_turns = || {
        loop {
            let i = next.fetch_add(1, Relaxed);
            let Some(batch) = batches.get(i) else { break };
            scored[i].set(model.encoder.score(batch)).ok(); // each is set once
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..model.encoder.max_concurrent_batches().min(batches.len()) {
            scope.spawn(take_turns);
        }
        take_turns();
    });
    let mut logits = Vec::new();
    for batch in scored.into_iter().filter_map(OnceLock::into_inner) {
        logits.extend(batch?);
    }
    Ok(logits)
}

/// Seconds of each run of a workload, and the logits.
fn time(model: &LoadedModel, batches: &[Batch], runs: u32, bar: &ProgressBar) -> Result<(Vec<f64>, Vec<f32>), Failure> {
    let (mut seconds, mut logits) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let begun = Instant::now();
        logits = score(model, batches).map_err(|error| Failure::Other(error.into()))?;
        seconds.push(begun.elapsed().as_secs_f64());
        bar.inc(1);
    }
    Ok((seconds, logits))
}

/// A table of medians.
fn report(model: &LoadedModel, workloads: &Workloads, runs: u32, batch_tokens: usize) -> Result<(), Failure> {
    let mut rows = vec![["workload", "pairs", "tokens", "median ms", "tokens/s"].map(str::to_owned).to_vec()];
    let bar = telemetry::progress_count(u64::from(runs + 1) * workloads.len() as u64, "measuring");
    for (name, pairs) in workloads {
        let batches = batches(model, pairs, batch_tokens);
        let tokens: usize = batches.iter().map(Batch::tokens).sum();
        time(model, &batches, 1, &bar)?;
        let (mut seconds, _) = time(model, &batches, runs, &bar)?;
        seconds.sort_by(f64::total_cmp);
        let median = seconds[seconds.len() / 2];
        rows.push(vec![
            name.clone(),
            pairs.len().to_string(),
            tokens.to_string(),
            format!("{:.1}", median * 1e3),
            format!("{:.0}", tokens as f64 / median),
        ]);
    }
    bar.finish_and_clear();
    print(&table(&rows))
}

/// A table for each workload: its operations, and what is left of a run's time.
fn explain(
    profile: &Profile,
    model: &LoadedModel,
    workloads: &Workloads,
    runs: u32,
    batch_tokens: usize,
) -> Result<(), Failure> {
    let bar = telemetry::progress_count(u64::from(runs + 1) * workloads.len() as u64, "measuring");
    let mut text = String::new();
    if let Some(Roofline { gemms, attention, memory }) = profile.roofline() {
        let tera = |operations: f64| format!("{:.2} Top/s", operations / 1e12);
        text += &format!("Measured peak of this device: {} in GEMMs, {} in attention", tera(gemms), tera(attention));
        text += &memory.map_or(String::new(), |memory| format!(", {:.0} GB/s", memory.bytes / 1e9));
        text += ".\n";
    }
    for (name, pairs) in workloads {
        let batches = batches(model, pairs, batch_tokens);
        time(model, &batches, 1, &bar)?;
        profile.take();
        let (seconds, _) = time(model, &batches, runs, &bar)?;
        let runs = f64::from(runs);
        let run = seconds.iter().sum::<f64>() / runs;
        let tokens: usize = batches.iter().map(Batch::tokens).sum();
        text += &format!(
            "\n{name}: {} pairs, {tokens} tokens; a run {:.2} ms, {:.0} tokens/s\n",
            pairs.len(),
            1e3 * run,
            tokens as f64 / run
        );
        text += &table(&operations(&profile.take(), runs, run));
    }
    bar.finish_and_clear();
    print(&text)
}

/// Rows of a table of what `runs` runs, each of `run` seconds, did.
fn operations(operations: &[Operation], runs: f64, run: f64) -> Vec<Vec<String>> {
    let row = |name: &str, calls: String, seconds: f64, least: f64| {
        let known = least > 0.0;
        vec![
            name.to_owned(),
            calls,
            format!("{:.3}", 1e3 * seconds),
            format!("{:.1}", 100.0 * seconds / run),
            if known { format!("{:.3}", 1e3 * least) } else { "-".to_owned() },
            if known { format!("{:.0}", 100.0 * least / seconds) } else { "-".to_owned() },
        ]
    };
    let mut rows =
        vec![["operation", "calls", "ms", "% of run", "roofline ms", "% of roofline"].map(str::to_owned).to_vec()];
    rows.extend(operations.iter().map(|operation| {
        let calls = format!("{:.0}", operation.calls as f64 / runs);
        row(&operation.name, calls, operation.seconds / runs, operation.roofline_seconds / runs)
    }));
    let sum = |of: fn(&Operation) -> f64| operations.iter().map(of).sum::<f64>() / runs;
    let (seconds, least) = (sum(|operation| operation.seconds), sum(|operation| operation.roofline_seconds));
    rows.push(row("between operations, and idle threads", String::new(), (run - seconds).max(0.0), 0.0));
    rows.push(row("all", String::new(), run, least));
    rows
}

/// What a line of standard input asks for.
#[derive(Deserialize)]
struct Turn {
    workload: String,
    runs: u32,
}

/// A line for each line, until the input ends.
fn answer(
    device: &DeviceChoice,
    model: &LoadedModel,
    workloads: &Workloads,
    batch_tokens: usize,
) -> Result<(), Failure> {
    let engine = format!("rerankd-{}", device.name());
    let mut ready = json!({"engine": engine, "ready": true, "version": env!("CARGO_PKG_VERSION")});
    if let DeviceChoice::Cpu { dtype, threads, .. } = device {
        ready["peak"] = roofline::peak(*dtype, *threads).into();
    }
    print(&format!("{ready}\n"))?;
    for line in std::io::stdin().lines() {
        let line = line.context("standard input").map_err(Failure::Other)?;
        let turn: Turn = serde_json::from_str(&line)
            .with_context(|| format!("{line:?}: expected {{\"workload\", \"runs\"}}"))
            .map_err(Failure::Other)?;
        let pairs = workloads
            .get(&turn.workload)
            .with_context(|| format!("{line:?}: there is no such workload"))
            .map_err(Failure::Other)?;
        let batches = batches(model, pairs, batch_tokens);
        let (seconds, logits) = time(model, &batches, turn.runs, &ProgressBar::hidden())?;
        let tokens: usize = batches.iter().map(Batch::tokens).sum();
        let line = json!({"engine": engine, "workload": turn.workload, "seconds": seconds, "tokens": tokens, "logits": logits});
        print(&format!("{line}\n"))?;
    }
    Ok(())
}

/// Lengths that a reader can check, ids that stay clear of the special tokens.
fn own(model: &LoadedModel) -> Workloads {
    let pair = |tokens: usize| {
        let ids = (0..tokens.min(model.text.window())).map(|i| (i * 37 % (model.vocabulary - 5) + 5) as u32).collect();
        Pair::new(ids, vec![0; tokens.min(model.text.window())])
    };
    let spread = |from: usize, to: usize, n: usize| (0..n).map(move |i| from + (to - from) * (i * 7 % n) / (n - 1));
    [
        ("a", vec![512; 8]),
        ("b", spread(32, 512, 16).collect::<Vec<_>>()),
        ("c", spread(20, 64, 48).collect()),
        ("d", vec![128]),
    ]
    .into_iter()
    .map(|(name, lengths)| (name.to_owned(), lengths.into_iter().map(pair).collect()))
    .collect()
}

fn read(path: &PathBuf, model: &LoadedModel) -> Result<Workloads> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("--workloads {}: cannot be read", path.display()))?;
    let workloads: BTreeMap<String, Vec<Vec<u32>>> = serde_json::from_str(&text)
        .with_context(|| format!("--workloads {}: expected {{\"name\": [[ids], ...]}}", path.display()))?;
    let mut read = BTreeMap::new();
    for (name, pairs) in workloads {
        for (i, ids) in pairs.iter().enumerate() {
            ensure!(
                (1..=model.text.window()).contains(&ids.len())
                    && ids.iter().all(|&id| (id as usize) < model.vocabulary),
                "--workloads {}: pair {i} of {name} has {} tokens; expected 1 to {}, with ids below {}",
                path.display(),
                ids.len(),
                model.text.window(),
                model.vocabulary
            );
        }
        read.insert(name, pairs.into_iter().map(|ids| Pair::new(ids.clone(), vec![0; ids.len()])).collect());
    }
    Ok(read)
}
