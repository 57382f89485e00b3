//! The "new" model of gte-multilingual (Zhang et al. 2024, "mGTE") as a cross-encoder: post-norm layers with rotary positions and
//! gated feed-forward networks.

use std::sync::Arc;

use anyhow::Result;

use super::head::Head;
use super::layer::{FeedForward, Layer, SelfAttention};
use super::parts::Parts;
use super::transformer::Transformer;
use crate::backend::{AttentionShape, Backend, EmbeddingTables, LayerRole};
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::weights::Weights;

/// Loads a checkpoint with the published tensor names. If it holds the bare encoder, they lack the prefix `new.`.
///
/// # Errors
/// A tensor is missing, unexpected, of the wrong shape or damaged, or the device fails.
pub(super) fn load<B: Backend>(config: &ModelConfig, mut weights: Weights, backend: B) -> Result<Transformer<B>> {
    let prefix = if weights.contains("embeddings.word_embeddings.weight") { "" } else { "new." };
    let c = config.hidden_size;
    let mut parts = Parts { weights: &mut weights, backend: &backend };
    let mut table = |kind: &str, rows: usize| {
        parts.weights.take(&format!("{prefix}embeddings.{kind}_embeddings.weight"), &[rows, c])
    };
    let words = table("word", config.vocab_size)?;
    let types = (config.type_vocab_size > 0).then(|| table("token_type", config.type_vocab_size)).transpose()?;
    let norm = parts.norm_weights(&format!("{prefix}embeddings.LayerNorm"), c, true, config.layer_norm_eps)?;
    let embeddings = backend.embeddings(EmbeddingTables { words, positions: None, types, norm })?;
    let rotary = parts.rotary(config)?;
    let layers = (0..config.layers).map(|i| layer(config, &mut parts, &rotary, prefix, i)).collect::<Result<_>>()?;
    let head = Head::load(&config.head, &mut parts)?;
    // Unused: a pooler that the head does not read, and the stored rotary frequencies.
    weights.finish(|name| name.starts_with("pooler.") || name.ends_with(".inv_freq"))?;
    Ok(Transformer { backend, embeddings, layers, final_norm: None, head })
}

fn layer<B: Backend>(
    config: &ModelConfig,
    parts: &mut Parts<'_, B>,
    rotary: &[Arc<B::Rotary>],
    prefix: &str,
    i: usize,
) -> Result<Layer<B>> {
    let (c, f, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
    let at = |name: &str| format!("{prefix}encoder.layer.{i}.{name}");
    let attention = config.layer_attention[i];
    // The checkpoint stores the value before the gate; backends expect the gate first.
    let mut input = parts.weights.take(&at("mlp.up_gate_proj.weight"), &[2 * f, c])?;
    input.data.rotate_left(f * c);
    Ok(Layer {
        norm_order: config.norm_order,
        attention: SelfAttention {
            shape: AttentionShape { heads: config.heads, head_size: config.head_size() },
            window: attention.window,
            rotary: attention.rotary.map(|index| Arc::clone(&rotary[index])),
            qkv: parts.linear(&at("attention.qkv_proj"), 3 * c, c, true, LayerRole::Encoder)?,
            output: parts.linear(&at("attention.o_proj"), c, c, true, LayerRole::Encoder)?,
            norm: Some(parts.norm(&at("attn_ln"), c, true, eps)?),
        },
        feed_forward: FeedForward {
            size: f,
            activation: config.activation,
            gated: config.gated,
            input: parts.linear_without_bias(input, LayerRole::Gated)?,
            output: parts.linear(&at("mlp.down_proj"), c, f, true, LayerRole::Encoder)?,
            norm: parts.norm(&at("mlp_ln"), c, true, eps)?,
        },
    })
}
