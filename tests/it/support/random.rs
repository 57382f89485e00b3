//! Checkpoints of BERT, RoBERTa and ModernBERT with random weights, of any size, with the tensor names of published checkpoints.
//! For tests and benches that do not depend on the values.

#![allow(unreachable_pub, dead_code, reason = "benches include this file and use a part of it")]

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use rerankd::checkpoint::config::{Architecture, HeadModule, ModelConfig};
use serde_json::json;

/// Name and shape of every tensor of a cross-encoder.
fn tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    match config.architecture {
        Architecture::Bert => bert_tensors(config, "bert"),
        Architecture::Roberta => bert_tensors(config, "roberta"),
        Architecture::ModernBert => modernbert_tensors(config),
        other => panic!("no random weights of {other:?}"),
    }
}

fn bert_tensors(config: &ModelConfig, prefix: &str) -> Vec<(String, Vec<usize>)> {
    let (c, f) = (config.hidden_size, config.intermediate_size);
    let mut all = vec![
        (format!("{prefix}.embeddings.word_embeddings.weight"), vec![config.vocab_size, c]),
        (format!("{prefix}.embeddings.position_embeddings.weight"), vec![config.position_rows, c]),
        (format!("{prefix}.embeddings.token_type_embeddings.weight"), vec![config.type_vocab_size, c]),
    ];
    let mut layer = |name: &str, shape: &[usize]| {
        all.push((format!("{name}.weight"), shape.to_vec()));
        all.push((format!("{name}.bias"), shape[..1].to_vec()));
    };
    layer(&format!("{prefix}.embeddings.LayerNorm"), &[c]);
    for i in 0..config.layers {
        let at = |name: &str| format!("{prefix}.encoder.layer.{i}.{name}");
        for part in ["query", "key", "value"] {
            layer(&at(&format!("attention.self.{part}")), &[c, c]);
        }
        layer(&at("attention.output.dense"), &[c, c]);
        layer(&at("attention.output.LayerNorm"), &[c]);
        layer(&at("intermediate.dense"), &[f, c]);
        layer(&at("output.dense"), &[c, f]);
        layer(&at("output.LayerNorm"), &[c]);
    }
    all.extend(head_tensors(config));
    all
}

/// ModernBERT without biases, except in the head.
fn modernbert_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (c, f) = (config.hidden_size, config.intermediate_size);
    let mut all = Vec::new();
    let mut tensor = |name: &str, shape: &[usize]| all.push((format!("model.{name}.weight"), shape.to_vec()));
    tensor("embeddings.tok_embeddings", &[config.vocab_size, c]);
    tensor("embeddings.norm", &[c]);
    for i in 0..config.layers {
        if i > 0 {
            tensor(&format!("layers.{i}.attn_norm"), &[c]);
        }
        tensor(&format!("layers.{i}.attn.Wqkv"), &[3 * c, c]);
        tensor(&format!("layers.{i}.attn.Wo"), &[c, c]);
        tensor(&format!("layers.{i}.mlp_norm"), &[c]);
        tensor(&format!("layers.{i}.mlp.Wi"), &[2 * f, c]);
        tensor(&format!("layers.{i}.mlp.Wo"), &[c, f]);
    }
    tensor("final_norm", &[c]);
    all.extend(head_tensors(config));
    all
}

fn head_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let mut all = Vec::new();
    for module in &config.head.modules {
        let (shape, bias) = match *module {
            HeadModule::Dense { inputs, outputs, bias, .. } => (vec![outputs, inputs], bias),
            HeadModule::Norm { size, bias, .. } => (vec![size], bias),
        };
        all.extend(bias.then(|| (format!("{}.bias", module.name()), shape[..1].to_vec())));
        all.push((format!("{}.weight", module.name()), shape));
    }
    all
}

/// Writes a bf16 `model.safetensors`: values uniform in ±0.05, layer norm weights in 1 ± 0.05.
pub fn write_checkpoint(config: &ModelConfig, path: &Path) -> std::io::Result<()> {
    let tensors = tensors(config);
    let mut header = json!({});
    let mut offset = 0;
    for (name, shape) in &tensors {
        let end = offset + 2 * shape.iter().product::<usize>();
        header[name] = json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]});
        offset = end;
    }
    let header = header.to_string();
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for (name, shape) in &tensors {
        let center = if shape.len() == 1 && name.ends_with("weight") { 1.0 } else { 0.0 };
        for _ in 0..shape.iter().product::<usize>() {
            // xorshift64 (Marsaglia 2003)
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let value = center + ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.1;
            file.write_all(&half::bf16::from_f32(value).to_le_bytes())?;
        }
    }
    file.flush()
}
