//! ModernBERT (Warner et al. 2024) as a cross-encoder: pre-norm layers with rotary positions and gated feed-forward networks;
//! most layers attend to a window only.

use std::sync::Arc;

use anyhow::Result;

use super::head::Head;
use super::layer::{FeedForward, Layer, SelfAttention};
use super::parts::Parts;
use super::transformer::Transformer;
use crate::backend::{AttentionShape, Backend, EmbeddingTables, LayerRole};
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::weights::Weights;

/// Loads a checkpoint with the tensor names of `transformers`. If it holds the bare encoder, they lack the prefix `model.`.
///
/// # Errors
/// A tensor is missing, unexpected, of the wrong shape or damaged, or the device fails.
pub(super) fn load<B: Backend>(config: &ModelConfig, mut weights: Weights, backend: B) -> Result<Transformer<B>> {
    let prefix = if weights.contains("embeddings.tok_embeddings.weight") { "" } else { "model." };
    let (c, bias, eps) = (config.hidden_size, config.biases.norm, config.layer_norm_eps);
    let mut parts = Parts { weights: &mut weights, backend: &backend };
    let embeddings = backend.embeddings(EmbeddingTables {
        words: parts.weights.take(&format!("{prefix}embeddings.tok_embeddings.weight"), &[config.vocab_size, c])?,
        positions: None,
        types: None,
        norm: parts.norm_weights(&format!("{prefix}embeddings.norm"), c, bias, eps)?,
    })?;
    let rotary = parts.rotary(config)?;
    let layers = (0..config.layers).map(|i| layer(config, &mut parts, &rotary, prefix, i)).collect::<Result<_>>()?;
    let final_norm = Some(parts.norm(&format!("{prefix}final_norm"), c, bias, eps)?);
    let head = Head::load(&config.head, &mut parts)?;
    weights.finish(|_| false)?;
    Ok(Transformer { backend, embeddings, layers, final_norm, head })
}

fn layer<B: Backend>(
    config: &ModelConfig,
    parts: &mut Parts<'_, B>,
    rotary: &[Arc<B::Rotary>],
    prefix: &str,
    i: usize,
) -> Result<Layer<B>> {
    let (c, f, biases, eps) = (config.hidden_size, config.intermediate_size, config.biases, config.layer_norm_eps);
    let at = |name: &str| format!("{prefix}layers.{i}.{name}");
    let attention = config.layer_attention[i];
    Ok(Layer {
        norm_order: config.norm_order,
        attention: SelfAttention {
            shape: AttentionShape { heads: config.heads, head_size: config.head_size() },
            window: attention.window,
            rotary: attention.rotary.map(|index| Arc::clone(&rotary[index])),
            qkv: parts.linear(&at("attn.Wqkv"), 3 * c, c, biases.attention, LayerRole::Encoder)?,
            output: parts.linear(&at("attn.Wo"), c, c, biases.attention, LayerRole::Encoder)?,
            // Layer 0 has none: the embeddings are normalized already.
            norm: (i > 0).then(|| parts.norm(&at("attn_norm"), c, biases.norm, eps)).transpose()?,
        },
        feed_forward: FeedForward {
            size: f,
            activation: config.activation,
            gated: config.gated,
            input: parts.linear(&at("mlp.Wi"), 2 * f, c, biases.feed_forward_input, LayerRole::Gated)?,
            output: parts.linear(&at("mlp.Wo"), c, f, biases.feed_forward_output, LayerRole::Encoder)?,
            norm: parts.norm(&at("mlp_norm"), c, biases.norm, eps)?,
        },
    })
}
