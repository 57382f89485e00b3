//! BERT (Devlin et al. 2018), RoBERTa (Liu et al. 2019), XLM-RoBERTa (Conneau et al. 2019) and ELECTRA (Clark et al. 2020) as
//! cross-encoders: post-norm layers with learned positions.

use anyhow::Result;

use super::head::Head;
use super::layer::{FeedForward, Layer, SelfAttention};
use super::parts::Parts;
use super::transformer::Transformer;
use crate::backend::{AttentionShape, Backend, EmbeddingTables, HostTensor, LayerRole};
use crate::checkpoint::config::{Architecture, ModelConfig};
use crate::checkpoint::weights::Weights;

/// Names of tensors, without `.weight` and `.bias`. Those after `layers` are relative to a layer.
struct Names {
    /// Before all other names: `bert.`, `roberta.` or `electra.`; empty if the checkpoint holds the bare encoder.
    prefix: &'static str,
    embedding_norm: &'static str,
    layers: &'static str,
    /// The linear layer for Q, K and V; `None` if each has its own.
    merged_qkv: Option<&'static str>,
    attention_output: &'static str,
    attention_norm: &'static str,
    input: &'static str,
    output: &'static str,
    output_norm: &'static str,
}

/// The names of `transformers`.
const USUAL: Names = Names {
    prefix: "",
    embedding_norm: "embeddings.LayerNorm",
    layers: "encoder.layer",
    merged_qkv: None,
    attention_output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    input: "intermediate.dense",
    output: "output.dense",
    output_norm: "output.LayerNorm",
};

/// The names of jina's XLM-RoBERTa for flash attention.
const MERGED_QKV: Names = Names {
    embedding_norm: "emb_ln",
    layers: "encoder.layers",
    merged_qkv: Some("mixer.Wqkv"),
    attention_output: "mixer.out_proj",
    attention_norm: "norm1",
    input: "mlp.fc1",
    output: "mlp.fc2",
    output_norm: "norm2",
    ..USUAL
};

/// Loads a checkpoint of the BERT family.
///
/// # Errors
/// A tensor is missing, unexpected, of the wrong shape or damaged, or the device fails.
pub(super) fn load<B: Backend>(config: &ModelConfig, mut weights: Weights, backend: B) -> Result<Transformer<B>> {
    let names = names(config, &weights);
    let mut parts = Parts { weights: &mut weights, backend: &backend };
    let embeddings = backend.embeddings(embedding_tables(config, &mut parts, &names)?)?;
    let layers = (0..config.layers).map(|i| layer(config, &mut parts, &names, i)).collect::<Result<_>>()?;
    let head = Head::load(&config.head, &mut parts)?;
    // Unused: index buffers of old checkpoints, and a pooler that the head does not read.
    weights.finish(|name| {
        name.ends_with(".position_ids")
            || name.ends_with(".token_type_ids")
            || name.strip_prefix(names.prefix).is_some_and(|name| name.starts_with("pooler."))
    })?;
    Ok(Transformer { backend, embeddings, layers, final_norm: None, head })
}

fn names(config: &ModelConfig, weights: &Weights) -> Names {
    let prefix = match config.architecture {
        Architecture::Electra => "electra.",
        Architecture::Roberta => "roberta.",
        _ => "bert.",
    };
    let has = |prefix: &str, tensor: &str| weights.contains(&format!("{prefix}{tensor}.weight"));
    let prefix = if has("", "embeddings.word_embeddings") { "" } else { prefix };
    let names = if has(prefix, MERGED_QKV.embedding_norm) { MERGED_QKV } else { USUAL };
    Names { prefix, ..names }
}

fn layer<B: Backend>(config: &ModelConfig, parts: &mut Parts<'_, B>, names: &Names, i: usize) -> Result<Layer<B>> {
    let (c, f, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
    let at = |name: &str| format!("{}{}.{i}.{name}", names.prefix, names.layers);
    let role = LayerRole::Encoder;
    let qkv = match names.merged_qkv {
        Some(name) => parts.linear(&at(name), 3 * c, c, true, role)?,
        None => parts.stacked(&["query", "key", "value"].map(|part| at(&format!("attention.self.{part}"))), c, c)?,
    };
    Ok(Layer {
        norm_order: config.norm_order,
        attention: SelfAttention {
            shape: AttentionShape { heads: config.heads, head_size: config.head_size() },
            window: None,
            rotary: None,
            qkv,
            output: parts.linear(&at(names.attention_output), c, c, true, role)?,
            norm: Some(parts.norm(&at(names.attention_norm), c, true, eps)?),
        },
        feed_forward: FeedForward {
            size: f,
            activation: config.activation,
            gated: false,
            input: parts.linear(&at(names.input), f, c, true, role)?,
            output: parts.linear(&at(names.output), c, f, true, role)?,
            norm: parts.norm(&at(names.output_norm), c, true, eps)?,
        },
    })
}

fn embedding_tables<B: Backend>(
    config: &ModelConfig,
    parts: &mut Parts<'_, B>,
    names: &Names,
) -> Result<EmbeddingTables> {
    let c = config.hidden_size;
    let mut table = |kind: &str, rows: usize| {
        parts.weights.take(&format!("{}embeddings.{kind}_embeddings.weight", names.prefix), &[rows, c])
    };
    let words = table("word", config.vocab_size)?;
    let stored = table("position", config.position_rows)?;
    let types = table("token_type", config.type_vocab_size)?;
    // RoBERTa's positions start at pad_token_id + 1. The rows before are removed, so that positions start at 0
    // everywhere.
    let positions =
        HostTensor { shape: vec![config.max_window, c], data: stored.data[config.position_offset * c..].to_vec() };
    let norm_name = format!("{}{}", names.prefix, names.embedding_norm);
    Ok(EmbeddingTables {
        words,
        positions: Some(positions),
        types: Some(types),
        norm: parts.norm_weights(&norm_name, c, true, config.layer_norm_eps)?,
    })
}
