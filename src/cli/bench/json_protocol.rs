//! `rerankd bench --json`: measurements on request, for programs that compare several engines.
//!
//! When the model is loaded, one line is printed: `{"engine", "ready": true, "version"}`, on a CPU also with `"peak"`, the measured
//! peak rate in operations per second. Then each line `{"workload", "runs"}` of standard input is answered by one line
//! `{"engine", "workload", "seconds", "tokens", "logits"}`: the seconds of each run, the tokens of one run, and the logits of the pairs
//! in order. Other fields of a request, such as `"mode"`, are ignored. The program ends when standard input ends.

use anyhow::Context;
use indicatif::ProgressBar;
use serde::Deserialize;
use serde_json::json;

use super::timing::measure;
use super::workloads::{Workloads, pack};
use crate::backend::cpu::roofline;
use crate::batch::Batch;
use crate::cli::failure::Failure;
use crate::cli::output::print;
use crate::loading::{DeviceChoice, LoadedModel};

/// One line of standard input.
#[derive(Deserialize)]
struct MeasureRequest {
    workload: String,
    runs: u32,
}

/// Answers requests until standard input ends.
///
/// # Errors
/// A line is not a request or names an unknown workload; the backend's error for a batch.
pub(super) fn run(
    device: &DeviceChoice,
    model: &LoadedModel,
    workloads: &Workloads,
    batch_tokens: usize,
) -> Result<(), Failure> {
    let engine = format!("rerankd-{}", device.name());
    let mut ready = json!({"engine": engine, "ready": true, "version": env!("CARGO_PKG_VERSION")});
    if let DeviceChoice::Cpu { dtype, threads, .. } = device {
        let peak = roofline::peak(*dtype, *threads).context("cannot measure the peak rate").map_err(Failure::Other)?;
        ready["peak"] = peak.into();
    }
    print(&format!("{ready}\n"))?;
    for line in std::io::stdin().lines() {
        let line = line.context("standard input cannot be read").map_err(Failure::Other)?;
        let request: MeasureRequest = serde_json::from_str(&line)
            .with_context(|| format!("{line:?}: expected {{\"workload\": name, \"runs\": number}}"))
            .map_err(Failure::Other)?;
        let pairs = workloads
            .get(&request.workload)
            .with_context(|| format!("{line:?}: unknown workload {:?}", request.workload))
            .map_err(Failure::Other)?;
        let batches = pack(model, pairs, batch_tokens);
        let (seconds, logits) = measure(model, &batches, request.runs, &ProgressBar::hidden())?;
        let tokens: usize = batches.iter().map(Batch::tokens).sum();
        let response = json!({
            "engine": engine, "workload": request.workload, "seconds": seconds, "tokens": tokens, "logits": logits,
        });
        print(&format!("{response}\n"))?;
    }
    Ok(())
}
