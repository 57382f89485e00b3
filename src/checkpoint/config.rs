//! `config.json` -> [`ModelConfig`]: the dimensions that a graph is built from, validated once, here.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use crate::backend::Activation;

/// The largest head size that the backends support. Published encoders have 32 to 128.
const MAX_HEAD_SIZE: usize = 512;

/// Maximum values in one tensor: 16 GiB of f32.
const MAX_TENSOR_VALUES: u64 = 1 << 32;

/// Maximum parameters of a model: 64 GiB of f32. The largest published encoder, XLM-RoBERTa XXL, has 10.7e9.
const MAX_PARAMETERS: u64 = 1 << 34;

/// The largest `layer_norm_eps`. Published encoders have 1e-12 to 1e-5; a large value makes every norm return its bias.
const MAX_LAYER_NORM_EPS: f64 = 0.1;

/// The encoder families that have a graph in [`crate::encoder`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// BERT: two token types; the head is pooler + classifier.
    Bert,
    /// RoBERTa, XLM-RoBERTa, CamemBERT: positions start after the padding id; the head is classifier.dense +
    /// classifier.out_proj.
    Roberta,
}

/// A cross-encoder's dimensions and conventions.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
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
    /// Applied between the two feed-forward layers.
    pub activation: Activation,
    /// Added to a layer norm's variance.
    pub layer_norm_eps: f64,
    /// Rows of the position embedding, as stored.
    pub position_rows: usize,
    /// The position embedding's row of the first token: 0 for BERT, `pad_token_id + 1` for the RoBERTa family.
    pub position_offset: usize,
    /// Rows of the token type embedding.
    pub type_vocab_size: usize,
}

/// The fields of a `config.json`. A field that is absent or null has its `transformers` default or is an error; each
/// error names its field.
struct Fields(Map<String, Value>);

impl Fields {
    fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn optional_integer(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let integer = value.as_u64().and_then(|integer| usize::try_from(integer).ok());
        Ok(Some(integer.with_context(|| format!("{field} is {value}; expected a non-negative integer"))?))
    }

    fn integer(&self, field: &str) -> Result<usize> {
        self.optional_integer(field)?.with_context(|| format!("{field} is missing"))
    }

    fn text(&self, field: &str) -> Result<Option<&str>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        Ok(Some(value.as_str().with_context(|| format!("{field} is {value}; expected a string"))?))
    }

    /// Entries of `id2label`, else `num_labels`, else 1.
    fn labels(&self) -> Result<usize> {
        match self.get("id2label") {
            Some(Value::Object(labels)) => Ok(labels.len()),
            Some(value) => bail!("id2label is {value}; expected an object"),
            None => Ok(self.optional_integer("num_labels")?.unwrap_or(1)),
        }
    }
}

impl ModelConfig {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// An unknown architecture or activation, more than one label, relative positions, and dimensions that are missing,
    /// out of range, or do not divide. The error names the field.
    pub fn parse(json: &str) -> Result<Self> {
        let fields: Map<String, Value> = serde_json::from_str(json).context("not a JSON object")?;
        let fields = Fields(fields);
        let architecture = match fields.text("model_type")?.context("model_type is missing")? {
            "bert" => Architecture::Bert,
            "roberta" | "xlm-roberta" | "camembert" => Architecture::Roberta,
            other => bail!(
                "model_type is {other:?}; supported are bert, roberta, xlm-roberta and camembert. \
                 Choose a cross-encoder of one of these families (`rerankd models` lists some)"
            ),
        };
        let labels = fields.labels()?;
        ensure!(labels == 1, "the model has {labels} labels; a reranker has exactly one (num_labels, id2label)");
        if let Some(kind) = fields.text("position_embedding_type")?.filter(|&kind| kind != "absolute") {
            bail!("position_embedding_type is {kind:?}; only \"absolute\" is supported");
        }
        let activation = match fields.text("hidden_act")?.unwrap_or("gelu") {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            other => bail!("hidden_act is {other:?}; supported are gelu, gelu_new, gelu_pytorch_tanh and relu"),
        };
        let layer_norm_eps = match fields.get("layer_norm_eps") {
            Some(value) => value
                .as_f64()
                .with_context(|| format!("layer_norm_eps is {value}; expected a small positive number"))?,
            None => 1e-12,
        };
        let (position_offset, default_types) = match architecture {
            Architecture::Bert => (0, 2),
            Architecture::Roberta => (fields.optional_integer("pad_token_id")?.unwrap_or(1).saturating_add(1), 1),
        };
        let config = Self {
            architecture,
            vocab_size: fields.integer("vocab_size")?,
            hidden_size: fields.integer("hidden_size")?,
            layers: fields.integer("num_hidden_layers")?,
            heads: fields.integer("num_attention_heads")?,
            intermediate_size: fields.integer("intermediate_size")?,
            activation,
            layer_norm_eps,
            position_rows: fields.integer("max_position_embeddings")?,
            position_offset,
            type_vocab_size: fields.optional_integer("type_vocab_size")?.unwrap_or(default_types),
        };
        config.check()?;
        Ok(config)
    }

    /// The longest sequence, in tokens, that the position embedding has rows for.
    pub fn max_window(&self) -> usize {
        self.position_rows - self.position_offset
    }

    /// Values in all of the model's tensors. Fits u64: `check` bounds each factor first.
    fn parameters(&self) -> u64 {
        let [c, f, layers] = [self.hidden_size, self.intermediate_size, self.layers].map(|n| n as u64);
        let embedding_rows = (self.vocab_size + self.position_rows + self.type_vocab_size) as u64;
        let attention = 4 * (c * c + c);
        let feed_forward = 2 * f * c + f + c;
        let norms = 4 * c;
        let head = c * c + c + c + 1;
        (embedding_rows + 2) * c + layers * (attention + feed_forward + norms) + head
    }

    fn check(&self) -> Result<()> {
        // 1 << 16 inputs also keep an int8 sum within i32: 65,536 * 255 * 127 < 2^31.
        for (field, value, limit) in [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", self.hidden_size, 1 << 16),
            ("num_hidden_layers", self.layers, 1 << 10),
            ("num_attention_heads", self.heads, 1 << 10),
            ("intermediate_size", self.intermediate_size, 1 << 16),
            ("max_position_embeddings", self.position_rows, 1 << 20),
            ("type_vocab_size", self.type_vocab_size, 1 << 8),
        ] {
            ensure!((1..=limit).contains(&value), "{field} is {value}; expected 1 to {limit}");
        }
        for (field, rows) in [("vocab_size", self.vocab_size), ("max_position_embeddings", self.position_rows)] {
            let values = rows as u64 * self.hidden_size as u64;
            ensure!(
                values <= MAX_TENSOR_VALUES,
                "{field} {rows} times hidden_size {} is {values} values; expected at most {MAX_TENSOR_VALUES}",
                self.hidden_size
            );
        }
        let parameters = self.parameters();
        ensure!(
            parameters <= MAX_PARAMETERS,
            "hidden_size {}, intermediate_size {}, num_hidden_layers {} and vocab_size {} make a model of {parameters} \
             parameters; expected at most {MAX_PARAMETERS}",
            self.hidden_size,
            self.intermediate_size,
            self.layers,
            self.vocab_size
        );
        ensure!(
            self.hidden_size.is_multiple_of(self.heads),
            "hidden_size {} is not a multiple of num_attention_heads {}",
            self.hidden_size,
            self.heads
        );
        ensure!(
            self.hidden_size / self.heads <= MAX_HEAD_SIZE,
            "hidden_size {} with num_attention_heads {} gives heads of {}; expected at most {MAX_HEAD_SIZE}",
            self.hidden_size,
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
            self.layer_norm_eps > 0.0 && self.layer_norm_eps <= MAX_LAYER_NORM_EPS,
            "layer_norm_eps is {}; expected a positive number up to {MAX_LAYER_NORM_EPS}",
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

    /// Parses [`BGE`] with `from` replaced by `to`, and returns the error.
    fn error_with(from: &str, to: &str) -> String {
        assert!(BGE.contains(from));
        format!("{:#}", ModelConfig::parse(&BGE.replace(from, to)).unwrap_err())
    }

    #[test]
    fn xlm_roberta_positions_start_after_the_padding_id() {
        let config = ModelConfig::parse(BGE).unwrap();
        assert_eq!(
            (config.architecture, config.position_offset, config.max_window()),
            (Architecture::Roberta, 2, 8192)
        );
    }

    #[test]
    fn the_parameter_count_of_bge_reranker_v2_m3_is_right() {
        // bge-reranker-v2-m3 has 567,755,777 parameters.
        assert_eq!(ModelConfig::parse(BGE).unwrap().parameters(), 567_755_777);
    }

    #[test]
    fn absent_and_null_fields_have_their_transformers_defaults() {
        let parse = |json: &str| ModelConfig::parse(json).unwrap();
        let null = BGE
            .replace(r#""hidden_act":"gelu""#, r#""hidden_act":null"#)
            .replace(r#""layer_norm_eps":1e-5"#, r#""layer_norm_eps":null"#)
            .replace(r#""pad_token_id":1"#, r#""pad_token_id":null"#)
            .replace(r#"{"0":"LABEL_0"}"#, "null");
        let absent = r#"{"model_type":"xlm-roberta","vocab_size":250002,"hidden_size":1024,"num_hidden_layers":24,
            "num_attention_heads":16,"intermediate_size":4096,"max_position_embeddings":8194}"#;
        assert_eq!(parse(&null), parse(absent));
        assert_eq!(parse(absent).layer_norm_eps, 1e-12);
    }

    #[test]
    fn invalid_fields_are_rejected_by_name() {
        for (from, to, named) in [
            ("xlm-roberta", "llama", "model_type"),
            (r#""model_type":"xlm-roberta","#, "", "model_type is missing"),
            (r#""hidden_size":1024,"#, "", "hidden_size is missing"),
            (r#"{"0":"LABEL_0"}"#, r#"{"0":"A","1":"B"}"#, "2 labels"),
            (r#"{"0":"LABEL_0"}"#, "[]", "id2label"),
            (r#""num_attention_heads":16"#, r#""num_attention_heads":0"#, "num_attention_heads"),
            (r#""num_attention_heads":16"#, r#""num_attention_heads":15"#, "not a multiple"),
            (r#""num_attention_heads":16"#, r#""num_attention_heads":1"#, "heads of 1024"),
            (r#""pad_token_id":1"#, r#""pad_token_id":8193"#, "max_position_embeddings"),
            (r#""pad_token_id":1"#, r#""pad_token_id":18446744073709551615"#, "max_position_embeddings"),
            (r#""hidden_size":1024"#, r#""hidden_size":18446744073709551615"#, "hidden_size"),
            (r#""hidden_size":1024"#, r#""hidden_size":18446744073709551616"#, "hidden_size"),
            (r#""hidden_size":1024"#, r#""hidden_size":"1024""#, "hidden_size"),
            (r#""hidden_size":1024"#, r#""hidden_size":-1"#, "hidden_size"),
            (r#""hidden_act":"gelu""#, r#""hidden_act":"mish""#, "hidden_act"),
            (
                r#""pad_token_id":1"#,
                r#""pad_token_id":1,"position_embedding_type":"relative_key""#,
                "position_embedding_type",
            ),
        ] {
            let error = error_with(from, to);
            assert!(error.contains(named), "{to}: {error}");
        }
    }

    #[test]
    fn layer_norm_eps_must_be_positive_and_small() {
        for eps in ["0", "-1e-5", "1e30", "\"tiny\""] {
            let error = error_with(r#""layer_norm_eps":1e-5"#, &format!(r#""layer_norm_eps":{eps}"#));
            assert!(error.contains("layer_norm_eps"), "{eps}: {error}");
        }
    }

    #[test]
    fn dimensions_whose_product_is_too_large_are_rejected() {
        for (from, to, named) in [
            (r#""vocab_size":250002"#, r#""vocab_size":16777216"#, "vocab_size 16777216 times hidden_size 1024"),
            (r#""hidden_size":1024"#, r#""hidden_size":65536"#, "vocab_size 250002 times hidden_size 65536"),
            (
                r#""vocab_size":250002,"hidden_size":1024"#,
                r#""vocab_size":100,"hidden_size":65536"#,
                "num_hidden_layers 24 and vocab_size 100 make a model of",
            ),
        ] {
            let error = error_with(from, to);
            assert!(error.contains(named), "{to}: {error}");
        }
    }

    #[test]
    fn feed_forward_layers_whose_int8_sums_would_overflow_are_rejected() {
        let error = error_with(r#""intermediate_size":4096"#, r#""intermediate_size":65537"#);
        assert!(error.contains("intermediate_size"), "{error}");
    }
}
