//! `config.json` -> [`ModelConfig`]: the numbers that a graph is built from, checked here once.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::backend::Activation;

/// The widest head that the backends have room for; published encoders have 32 to 128.
const MAX_HEAD_SIZE: usize = 512;

/// The encoder families that we have a graph for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// BERT: two token types, pooler + classifier.
    Bert,
    /// RoBERTa, XLM-RoBERTa, CamemBERT: positions start after the padding id, classifier.dense + classifier.out_proj.
    Roberta,
}

/// A cross-encoder's dimensions and conventions.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which graph.
    pub architecture: Architecture,
    /// Rows of the word embedding.
    pub vocab_size: usize,
    /// C
    pub hidden_size: usize,
    /// Encoder layers.
    pub layers: usize,
    /// H
    pub heads: usize,
    /// F
    pub intermediate_size: usize,
    /// Between the two feed-forward layers.
    pub activation: Activation,
    /// Added to a layer norm's variance.
    pub layer_norm_eps: f64,
    /// Rows of the position embedding, as stored.
    pub position_rows: usize,
    /// Rows of it before the first token's: 0 for BERT, `pad_token_id + 1` for the RoBERTa family.
    pub position_offset: usize,
    /// Rows of the token type embedding.
    pub type_vocab_size: usize,
}

/// As published; every field that is absent has its `transformers` default or is an error below.
#[derive(Deserialize)]
struct RawConfig {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    #[serde(default = "gelu")]
    hidden_act: String,
    #[serde(default = "default_eps")]
    layer_norm_eps: f64,
    max_position_embeddings: usize,
    #[serde(default)]
    type_vocab_size: Option<usize>,
    pad_token_id: Option<usize>,
    position_embedding_type: Option<String>,
    num_labels: Option<usize>,
    id2label: Option<BTreeMap<String, String>>,
}

fn gelu() -> String {
    "gelu".to_owned()
}

fn default_eps() -> f64 {
    1e-12
}

impl ModelConfig {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// An unknown architecture or activation, more than one label, relative positions, dimensions that do not divide.
    pub fn parse(json: &str) -> Result<Self> {
        let raw: RawConfig = serde_json::from_str(json).context("not the configuration of an encoder")?;
        let architecture = match raw.model_type.as_str() {
            "bert" => Architecture::Bert,
            "roberta" | "xlm-roberta" | "camembert" => Architecture::Roberta,
            other => bail!(
                "model_type is {other:?}; the known ones are bert, roberta, xlm-roberta and camembert. \
                 Choose a cross-encoder of one of these families (`rerankd models` lists some)"
            ),
        };
        let labels = raw.id2label.as_ref().map(BTreeMap::len).or(raw.num_labels).unwrap_or(1);
        ensure!(labels == 1, "the model has {labels} labels; a reranker has exactly one (num_labels, id2label)");
        if let Some(kind) = raw.position_embedding_type.filter(|kind| kind != "absolute") {
            bail!("position_embedding_type is {kind:?}; only \"absolute\" is known");
        }
        let activation = match raw.hidden_act.as_str() {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            other => bail!("hidden_act is {other:?}; the known ones are gelu, gelu_new, gelu_pytorch_tanh and relu"),
        };
        let position_offset = match architecture {
            Architecture::Bert => 0,
            Architecture::Roberta => raw.pad_token_id.unwrap_or(1).saturating_add(1),
        };
        let config = Self {
            architecture,
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            layers: raw.num_hidden_layers,
            heads: raw.num_attention_heads,
            intermediate_size: raw.intermediate_size,
            activation,
            layer_norm_eps: raw.layer_norm_eps,
            position_rows: raw.max_position_embeddings,
            position_offset,
            type_vocab_size: raw.type_vocab_size.unwrap_or(if architecture == Architecture::Bert { 2 } else { 1 }),
        };
        config.check()?;
        Ok(config)
    }

    /// Tokens of the longest pair that the position embedding can place.
    pub fn max_window(&self) -> usize {
        self.position_rows - self.position_offset
    }

    fn check(&self) -> Result<()> {
        for (field, value, limit) in [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", self.hidden_size, 1 << 16),
            ("num_hidden_layers", self.layers, 1 << 10),
            ("num_attention_heads", self.heads, 1 << 10),
            ("intermediate_size", self.intermediate_size, 1 << 18),
            ("max_position_embeddings", self.position_rows, 1 << 20),
            ("type_vocab_size", self.type_vocab_size, 1 << 8),
        ] {
            ensure!((1..=limit).contains(&value), "{field} is {value}; expected 1 to {limit}");
        }
        ensure!(
            self.hidden_size.is_multiple_of(self.heads),
            "hidden_size {} is not a multiple of num_attention_heads {}",
            self.hidden_size,
            self.heads
        );
        ensure!(
            self.hidden_size / self.heads <= MAX_HEAD_SIZE,
            "num_attention_heads {} makes heads of {}; expected at most {MAX_HEAD_SIZE}",
            self.heads,
            self.hidden_size / self.heads
        );
        ensure!(
            self.position_offset < self.position_rows,
            "max_position_embeddings {} leaves no position after pad_token_id {}",
            self.position_rows,
            self.position_offset - 1
        );
        ensure!(
            self.layer_norm_eps.is_finite() && self.layer_norm_eps > 0.0,
            "layer_norm_eps is {}; expected a small positive number",
            self.layer_norm_eps
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BGE: &str = r#"{"model_type":"xlm-roberta","vocab_size":250002,"hidden_size":1024,"num_hidden_layers":24,
        "num_attention_heads":16,"intermediate_size":4096,"hidden_act":"gelu","layer_norm_eps":1e-5,
        "max_position_embeddings":8194,"type_vocab_size":1,"pad_token_id":1,"id2label":{"0":"LABEL_0"}}"#;

    #[test]
    fn xlm_roberta_positions_start_after_the_padding_id() {
        let config = ModelConfig::parse(BGE).unwrap();
        assert_eq!(
            (config.architecture, config.position_offset, config.max_window()),
            (Architecture::Roberta, 2, 8192)
        );
    }

    /// Each lie is an error that names its field; none is a panic.
    #[test]
    fn lies_are_named() {
        for (from, to, named) in [
            ("xlm-roberta", "llama", "model_type"),
            (r#"{"0":"LABEL_0"}"#, r#"{"0":"A","1":"B"}"#, "2 labels"),
            (r#""num_attention_heads":16"#, r#""num_attention_heads":0"#, "num_attention_heads"),
            (r#""num_attention_heads":16"#, r#""num_attention_heads":15"#, "not a multiple"),
            (r#""num_attention_heads":16"#, r#""num_attention_heads":1"#, "heads of 1024"),
            (r#""pad_token_id":1"#, r#""pad_token_id":8193"#, "max_position_embeddings"),
            (r#""pad_token_id":1"#, r#""pad_token_id":18446744073709551615"#, "max_position_embeddings"),
            (r#""hidden_size":1024"#, r#""hidden_size":18446744073709551615"#, "hidden_size"),
            (r#""hidden_size":1024"#, r#""hidden_size":-1"#, "encoder"),
            (r#""hidden_act":"gelu""#, r#""hidden_act":"mish""#, "hidden_act"),
            (r#""layer_norm_eps":1e-5"#, r#""layer_norm_eps":0"#, "layer_norm_eps"),
            (
                r#""pad_token_id":1"#,
                r#""pad_token_id":1,"position_embedding_type":"relative_key""#,
                "position_embedding_type",
            ),
        ] {
            assert!(BGE.contains(from));
            let error = format!("{:#}", ModelConfig::parse(&BGE.replace(from, to)).unwrap_err());
            assert!(error.contains(named), "{to}: {error}");
        }
    }
}
