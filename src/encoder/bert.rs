//! BERT (Devlin et al. 2018), RoBERTa (Liu et al. 2019) and XLM-RoBERTa (Conneau et al. 2019) as cross-encoders.
//!
//! All three are the same post-norm transformer encoder. They differ in the first position, in tensor names and in the
//! classification head.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;

use super::cross_encoder::CrossEncoder;
use super::head::Head;
use crate::backend::{
    Activation, AttentionShape, Backend, BackendError, EmbeddingTables, Epilogue, HostTensor, LayerRole, NormWeights,
};
use crate::batch::Batch;
use crate::checkpoint::config::{Architecture, ModelConfig};
use crate::checkpoint::weights::Weights;

/// A BERT-family cross-encoder on a backend.
pub struct Bert<B: Backend> {
    backend: B,
    embeddings: B::Embeddings,
    layers: Vec<Layer<B>>,
    head: Head<B>,
}

/// The intermediate results of a forward pass, in order. Golden tests compare each, so that a failure names the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The embeddings after their layer norm, `[T, C]`.
    Embeddings,
    /// The output of an encoder layer, `[T, C]`. The last layer computes only the first tokens, `[S, C]`.
    Layer(usize),
    /// The output of the head, `[S, 1]`.
    Logits,
}

/// One encoder layer. The projections Q, K and V are one linear layer with a weight `[3C, C]`.
struct Layer<B: Backend> {
    shape: AttentionShape,
    activation: Activation,
    hidden_size: usize,
    intermediate_size: usize,
    qkv: B::Linear,
    attention_output: B::Linear,
    attention_norm: B::Norm,
    intermediate: B::Linear,
    output: B::Linear,
    output_norm: B::Norm,
}

impl<B: Backend> Bert<B> {
    /// Loads a checkpoint with the tensor names of `transformers`.
    ///
    /// # Errors
    /// A tensor is missing, unexpected, of the wrong shape or damaged, or the device fails.
    pub fn load(config: &ModelConfig, mut weights: Weights, backend: B) -> Result<Self> {
        let prefix = match config.architecture {
            Architecture::Bert => "bert",
            Architecture::Roberta => "roberta",
        };
        let embeddings = backend.embeddings(embedding_tables(config, &mut weights, prefix)?)?;
        let layers = (0..config.layers)
            .map(|i| Layer::load(config, &mut weights, &backend, &format!("{prefix}.encoder.layer.{i}")))
            .collect::<Result<_>>()?;
        let head = Head::load(config, &mut weights, &backend)?;
        // Unused: index buffers of old checkpoints, and RoBERTa's pooler, which its classifier does not read.
        weights.finish(|name| {
            name.ends_with(".position_ids") || name.ends_with(".token_type_ids") || name.starts_with("roberta.pooler.")
        })?;
        Ok(Self { backend, embeddings, layers, head })
    }

    /// Every stage's values in order, row-major. The batch must be small enough that the backend does not split it.
    ///
    /// # Errors
    /// The device fails or has too little memory.
    pub fn stages(&self, batch: &Batch) -> Result<Vec<(Stage, Vec<f32>)>, BackendError> {
        let stages = Mutex::new(Vec::new());
        self.backend.run_observed(batch, &|ctx, part| {
            self.forward(ctx, part, |stage, buffer| {
                let values = self.backend.download(ctx, buffer)?;
                stages.lock().unwrap_or_else(PoisonError::into_inner).push((stage, values));
                Ok(())
            })
        })?;
        Ok(stages.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// The forward pass. Returns the logits `[S]` and calls `observe` with the result of every stage.
    fn forward(
        &self,
        ctx: &B::ExecContext,
        batch: &Batch,
        mut observe: impl FnMut(Stage, &B::Buffer) -> Result<(), BackendError>,
    ) -> Result<Vec<f32>, BackendError> {
        let backend = &self.backend;
        let mut hidden = backend.embed(ctx, &self.embeddings, batch)?;
        observe(Stage::Embeddings, &hidden)?;
        let last = self.layers.len() - 1;
        for (i, layer) in self.layers.iter().enumerate() {
            hidden = if i < last {
                layer.forward(backend, ctx, &hidden, batch)?
            } else {
                layer.forward_cls(backend, ctx, &hidden, batch)?
            };
            observe(Stage::Layer(i), &hidden)?;
        }
        let logits = self.head.logits(backend, ctx, &hidden)?;
        observe(Stage::Logits, &logits)?;
        backend.download(ctx, &logits)
    }
}

impl<B: Backend> CrossEncoder for Bert<B> {
    fn score(&self, batch: &Batch) -> Result<Vec<f32>, BackendError> {
        self.backend.run(batch, &|ctx, part| self.forward(ctx, part, |_, _| Ok(())))
    }

    fn describe(&self) -> String {
        self.backend.describe()
    }

    fn max_concurrent_batches(&self) -> usize {
        self.backend.max_concurrent_batches()
    }
}

impl<B: Backend> Layer<B> {
    fn load(config: &ModelConfig, weights: &mut Weights, backend: &B, prefix: &str) -> Result<Self> {
        let (c, f) = (config.hidden_size, config.intermediate_size);
        let names = |kind: &str| ["query", "key", "value"].map(|part| format!("{prefix}.attention.self.{part}.{kind}"));
        let (weight, bias) =
            (weights.take_stacked(&names("weight"), &[c, c])?, weights.take_stacked(&names("bias"), &[c])?);
        let qkv = backend.linear(weight, bias, LayerRole::Encoder)?;
        let mut linear = |name: &str, outputs: usize, inputs: usize| -> Result<B::Linear> {
            let weight = weights.take(&format!("{prefix}.{name}.weight"), &[outputs, inputs])?;
            Ok(backend.linear(
                weight,
                weights.take(&format!("{prefix}.{name}.bias"), &[outputs])?,
                LayerRole::Encoder,
            )?)
        };
        let (attention_output, intermediate, output) = (
            linear("attention.output.dense", c, c)?,
            linear("intermediate.dense", f, c)?,
            linear("output.dense", c, f)?,
        );
        let mut norm = |name: &str| -> Result<B::Norm> {
            Ok(backend.norm(norm_weights(config, weights, &format!("{prefix}.{name}"))?)?)
        };
        Ok(Self {
            shape: AttentionShape { heads: config.heads, head_size: c / config.heads },
            activation: config.activation,
            hidden_size: c,
            intermediate_size: f,
            qkv,
            attention_output,
            attention_norm: norm("attention.output.LayerNorm")?,
            intermediate,
            output,
            output_norm: norm("output.LayerNorm")?,
        })
    }

    /// The layer for every token: `[T, C]` to `[T, C]`.
    fn forward(
        &self,
        backend: &B,
        ctx: &B::ExecContext,
        hidden: &B::Buffer,
        batch: &Batch,
    ) -> Result<B::Buffer, BackendError> {
        let qkv = backend.apply(ctx, &self.qkv, self.qkv_outputs(0, 3), hidden, Epilogue::Bias)?;
        let context = backend.attention(ctx, self.shape, &qkv, batch)?;
        self.after_attention(backend, ctx, &context, hidden)
    }

    /// The layer for first tokens (CLS) only, which is all that the head reads: `[T, C]` to `[S, C]`. Keys and values
    /// are still those of every token.
    fn forward_cls(
        &self,
        backend: &B,
        ctx: &B::ExecContext,
        hidden: &B::Buffer,
        batch: &Batch,
    ) -> Result<B::Buffer, BackendError> {
        let cls = backend.gather_cls(ctx, hidden, batch)?;
        let q = backend.apply(ctx, &self.qkv, self.qkv_outputs(0, 1), &cls, Epilogue::Bias)?;
        let kv = backend.apply(ctx, &self.qkv, self.qkv_outputs(1, 3), hidden, Epilogue::Bias)?;
        let context = backend.cls_attention(ctx, self.shape, &q, &kv, batch)?;
        self.after_attention(backend, ctx, &context, &cls)
    }

    /// Attention output projection and feed-forward network, each with residual and layer norm.
    fn after_attention(
        &self,
        backend: &B,
        ctx: &B::ExecContext,
        context: &B::Buffer,
        hidden: &B::Buffer,
    ) -> Result<B::Buffer, BackendError> {
        let (c, f) = (self.hidden_size, self.intermediate_size);
        let attended = backend.apply(ctx, &self.attention_output, 0..c, context, Epilogue::Residual(hidden))?;
        let attended = backend.layer_norm(ctx, &self.attention_norm, attended)?;
        let intermediate =
            backend.apply(ctx, &self.intermediate, 0..f, &attended, Epilogue::Activation(self.activation))?;
        let output = backend.apply(ctx, &self.output, 0..c, &intermediate, Epilogue::Residual(&attended))?;
        backend.layer_norm(ctx, &self.output_norm, output)
    }

    /// The outputs of the QKV projection from part `from` to part `to`; the parts are Q, K, V.
    fn qkv_outputs(&self, from: usize, to: usize) -> Range<usize> {
        from * self.hidden_size..to * self.hidden_size
    }
}

fn embedding_tables(config: &ModelConfig, weights: &mut Weights, prefix: &str) -> Result<EmbeddingTables> {
    let c = config.hidden_size;
    let prefix = format!("{prefix}.embeddings");
    let mut table = |kind: &str, rows: usize| weights.take(&format!("{prefix}.{kind}_embeddings.weight"), &[rows, c]);
    let words = table("word", config.vocab_size)?;
    let stored = table("position", config.position_rows)?;
    let types = table("token_type", config.type_vocab_size)?;
    // RoBERTa's positions start at pad_token_id + 1. The rows before are removed, so that positions start at 0
    // everywhere.
    let positions =
        HostTensor { shape: vec![config.max_window(), c], data: stored.data[config.position_offset * c..].to_vec() };
    Ok(EmbeddingTables {
        words,
        positions,
        types,
        norm: norm_weights(config, weights, &format!("{prefix}.LayerNorm"))?,
    })
}

fn norm_weights(config: &ModelConfig, weights: &mut Weights, prefix: &str) -> Result<NormWeights> {
    // Old checkpoints, converted from TensorFlow, use the names gamma and beta.
    let (weight, bias) =
        if weights.contains(&format!("{prefix}.gamma")) { ("gamma", "beta") } else { ("weight", "bias") };
    Ok(NormWeights {
        weight: weights.take(&format!("{prefix}.{weight}"), &[config.hidden_size])?,
        bias: weights.take(&format!("{prefix}.{bias}"), &[config.hidden_size])?,
        eps: config.layer_norm_eps,
    })
}
