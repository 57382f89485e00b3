//! Measures the XLM-RoBERTa of candle-transformers as published, for comparison with rerankd's backends.
//!
//! `RAYON_NUM_THREADS=N stock_candle --model FOLDER --workloads FILE` speaks the protocol of benches/peers/README.md and
//! ignores the other options of `rerankd bench`. Modes: pairs one at a time (`one`), or sorted by length in padded batches of
//! 8 (`batch8`).

#![allow(clippy::print_stdout, reason = "the protocol uses standard output")]

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::xlm_roberta::{Config, XLMRobertaForSequenceClassification};
use serde::Deserialize;
use serde_json::json;

const PADDING: u32 = 1;

#[derive(Deserialize)]
struct Turn {
    workload: String,
    mode: String,
    runs: u32,
}

fn argument(name: &str) -> Result<PathBuf> {
    let mut arguments = std::env::args_os().skip_while(|argument| argument != name).skip(1);
    arguments.next().map(PathBuf::from).with_context(|| format!("{name} is missing"))
}

fn main() -> Result<()> {
    let (folder, workloads) = (argument("--model")?, argument("--workloads")?);
    let mut config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(folder.join("config.json"))?)?;
    // Later versions of transformers omit this field, whose value is always the same.
    config
        .as_object_mut()
        .context("config.json is not a JSON object")?
        .entry("position_embedding_type")
        .or_insert("absolute".into());
    let config: Config = serde_json::from_value(config)?;
    let weights = std::fs::read(folder.join("model.safetensors"))?;
    let weights = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu)?;
    let model = XLMRobertaForSequenceClassification::new(1, &config, weights)?;
    let workloads: BTreeMap<String, Vec<Vec<u32>>> = serde_json::from_str(&std::fs::read_to_string(workloads)?)?;
    let engine = "candle-transformers-f32";
    write_line(&json!({"engine": engine, "ready": true, "version": "0.11.1", "modes": ["one", "batch8"]}))?;
    for line in std::io::stdin().lines() {
        let turn: Turn = serde_json::from_str(&line?)?;
        let pairs = workloads.get(&turn.workload).with_context(|| format!("no workload {}", turn.workload))?;
        let mut order: Vec<usize> = (0..pairs.len()).collect();
        order.sort_by_key(|&i| pairs[i].len());
        let size = if turn.mode == "one" { 1 } else { 8 };
        let batches: Vec<Tensor> = order.chunks(size).map(|part| padded(part, pairs)).collect::<Result<_>>()?;
        let (mut seconds, mut sorted) = (Vec::new(), Vec::new());
        for _ in 0..turn.runs {
            sorted.clear();
            let begun = Instant::now();
            for ids in &batches {
                let mask = ids.ne(PADDING)?.to_dtype(DType::F32)?;
                let logits = model.forward(ids, &mask, &ids.zeros_like()?)?;
                sorted.extend(logits.flatten_all()?.to_vec1::<f32>()?);
            }
            seconds.push(begun.elapsed().as_secs_f64());
        }
        let mut logits = vec![0.0; pairs.len()];
        order.iter().zip(&sorted).for_each(|(&i, &logit)| logits[i] = logit);
        let tokens: usize = pairs.iter().map(Vec::len).sum();
        write_line(
            &json!({"engine": engine, "workload": turn.workload, "seconds": seconds, "tokens": tokens, "logits": logits}),
        )?;
    }
    Ok(())
}

/// The pairs with the indices `part` as one padded tensor `[batch, longest]`.
fn padded(part: &[usize], pairs: &[Vec<u32>]) -> Result<Tensor> {
    let longest = part.iter().map(|&i| pairs[i].len()).max().unwrap_or(0);
    let mut ids = Vec::with_capacity(part.len() * longest);
    for &i in part {
        ids.extend_from_slice(&pairs[i]);
        ids.resize(ids.len().next_multiple_of(longest), PADDING);
    }
    Ok(Tensor::from_vec(ids, (part.len(), longest), &Device::Cpu)?)
}

fn write_line(line: &serde_json::Value) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
