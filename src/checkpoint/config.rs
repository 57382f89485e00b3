//! The dimensions and conventions that a graph is built from. `parse.rs` reads them from a `config.json`.

use anyhow::{Result, ensure};

use crate::backend::Activation;

/// The largest accepted head size. Published encoders have 32 to 128. The CUDA backend accepts only 32 and 64.
const MAX_HEAD_SIZE: usize = 512;

/// Maximum values in one tensor: 16 GiB of f32.
const MAX_TENSOR_VALUES: u64 = 1 << 32;

/// Maximum parameters of a model: 64 GiB of f32. The largest published encoder, XLM-RoBERTa XXL, has 10.7e9.
const MAX_PARAMETERS: u64 = 1 << 34;

/// The largest `layer_norm_eps`. Published encoders have 1e-12 to 1e-5; a large value makes every norm return its bias.
const MAX_LAYER_NORM_EPS: f64 = 0.1;

/// The encoder families. All have one graph ([`crate::encoder`]); the family determines the names of the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// BERT: learned positions, two token types.
    Bert,
    /// RoBERTa, XLM-RoBERTa, CamemBERT: positions start after the padding id.
    Roberta,
    /// ELECTRA: BERT with another head.
    Electra,
    /// ModernBERT: pre-norm, rotary positions, local and global attention, gated feed-forward layers.
    ModernBert,
    /// The "new" model of gte-multilingual: BERT with rotary positions and gated feed-forward layers.
    NewModel,
}

/// Whether a sublayer's layer norm is before it (pre-norm) or after it and its residual (post-norm).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormOrder {
    Pre,
    Post,
}

/// Which parts of an encoder layer have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Biases {
    /// The linear layers of attention.
    pub attention: bool,
    /// The first linear layer of the feed-forward network.
    pub feed_forward_input: bool,
    /// Its second linear layer.
    pub feed_forward_output: bool,
    /// Layer norms.
    pub norm: bool,
}

/// How a layer's attention uses positions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerAttention {
    /// The largest distance that a token attends to; `None` is the whole sequence.
    pub window: Option<usize>,
    /// An index into [`ModelConfig::rotary`].
    pub rotary: Option<usize>,
}

/// How a sequence's rows become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The first token's row.
    Cls,
    /// The mean of all rows.
    Mean,
}

/// The classification head: a pooling, and a chain of modules that ends in one output.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadConfig {
    pub pooling: Pooling,
    pub modules: Vec<HeadModule>,
}

/// A module of a classification head. Its tensors are `name.weight` and `name.bias`.
#[derive(Debug, Clone, PartialEq)]
pub enum HeadModule {
    Dense { name: String, inputs: usize, outputs: usize, bias: bool, activation: Option<Activation> },
    Norm { name: String, size: usize, bias: bool, eps: f64 },
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
    /// Whether the first feed-forward layer has 2F outputs, a gate and a value.
    pub gated: bool,
    pub norm_order: NormOrder,
    /// Added to a layer norm's variance.
    pub layer_norm_eps: f64,
    pub biases: Biases,
    /// The longest sequence, in tokens.
    pub max_window: usize,
    /// Rows of the position embedding, as stored; 0 if there is none.
    pub position_rows: usize,
    /// The position embedding's row of the first token: 0 for BERT, `pad_token_id + 1` for the RoBERTa family.
    pub position_offset: usize,
    /// Rows of the token type embedding; 0 if there is none.
    pub type_vocab_size: usize,
    /// The frequencies of each rotary embedding, `[D / 2]`. Layers refer to them by index.
    pub rotary: Vec<Vec<f32>>,
    /// `[layers]`
    pub layer_attention: Vec<LayerAttention>,
    pub head: HeadConfig,
}

impl HeadModule {
    /// The prefix of the module's tensors.
    pub fn name(&self) -> &str {
        match self {
            Self::Dense { name, .. } | Self::Norm { name, .. } => name,
        }
    }

    fn parameters(&self) -> u64 {
        let (weight, outputs, bias) = match *self {
            Self::Dense { inputs, outputs, bias, .. } => (inputs * outputs, outputs, bias),
            Self::Norm { size, bias, .. } => (size, size, bias),
        };
        (weight + if bias { outputs } else { 0 }) as u64
    }
}

impl ModelConfig {
    /// D
    pub fn head_size(&self) -> usize {
        self.hidden_size / self.heads
    }

    /// The number of values in all tensors. Fits u64: `check` bounds each factor first.
    ///
    /// Pre-norm and post-norm models have equally many norms: the former have one after the last layer, but none before the first
    /// attention; the embeddings of both have one.
    pub fn parameters(&self) -> u64 {
        let [c, f, layers] = [self.hidden_size, self.intermediate_size, self.layers].map(|n| n as u64);
        let inputs = if self.gated { 2 * f } else { f };
        let embedding_rows = (self.vocab_size + self.position_rows + self.type_vocab_size) as u64;
        let attention = 4 * c * c + if self.biases.attention { 4 * c } else { 0 };
        let feed_forward = inputs * c
            + f * c
            + if self.biases.feed_forward_input { inputs } else { 0 }
            + if self.biases.feed_forward_output { c } else { 0 };
        let norm = if self.biases.norm { 2 * c } else { c };
        let head = self.head.modules.iter().map(HeadModule::parameters).sum::<u64>();
        embedding_rows * c + norm + layers * (attention + feed_forward + 2 * norm) + head
    }

    /// # Errors
    /// A dimension is out of range, or dimensions do not fit together. The error names the field.
    pub(super) fn check(&self) -> Result<()> {
        // At most 1 << 16 inputs of a linear layer keep int8 sums within i32: 65,536 * 255 * 127 < 2^31.
        for (field, value, limit) in [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", self.hidden_size, 1 << 16),
            ("num_hidden_layers", self.layers, 1 << 10),
            ("num_attention_heads", self.heads, 1 << 10),
            ("intermediate_size", self.intermediate_size, 1 << 16),
            ("max_position_embeddings", self.max_window + self.position_offset, 1 << 20),
            // 0 is allowed: the model has no token types.
            ("type_vocab_size", self.type_vocab_size.max(1), 1 << 8),
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
            self.layer_norm_eps > 0.0 && self.layer_norm_eps <= MAX_LAYER_NORM_EPS,
            "layer_norm_eps is {}; expected a positive number up to {MAX_LAYER_NORM_EPS}",
            self.layer_norm_eps
        );
        Ok(())
    }
}
