//! Reads a `config.json` into a validated [`ModelConfig`], with one function for each family of encoders.

use anyhow::{Context, Result, bail, ensure};

use super::config::{Architecture, Biases, HeadConfig, HeadModule, LayerAttention, ModelConfig, NormOrder, Pooling};
use super::fields::Fields;
use super::modules::{ModuleEntry, parse_head};
use crate::backend::Activation;

/// The largest base of a rotary embedding. Published encoders have 1e4 to 1e6.
const MAX_ROTARY_BASE: f64 = 1e9;

impl ModelConfig {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// An unknown architecture, activation or kind of positions, more than one label, and dimensions that are missing, out of
    /// range, or do not fit together. The error names the field.
    pub fn parse(json: &str) -> Result<Self> {
        Self::parse_with_modules(json, &[], &[])
    }

    /// Reads the text of a `config.json` whose model is the first of a chain of sentence-transformers modules. `modules` is
    /// the whole chain, `configs` the texts of the other modules' `config.json` files. Without modules, this is the same as
    /// [`ModelConfig::parse`].
    ///
    /// # Errors
    /// Those of [`ModelConfig::parse`] and of [`parse_head`].
    pub fn parse_with_modules(json: &str, modules: &[ModuleEntry], configs: &[String]) -> Result<Self> {
        let fields = Fields::parse(json).context("not a JSON object")?;
        let mut config = match fields.text("model_type")?.context("model_type is missing")? {
            "bert" => bert(&fields, Architecture::Bert)?,
            "roberta" | "xlm-roberta" | "camembert" => bert(&fields, Architecture::Roberta)?,
            "electra" => bert(&fields, Architecture::Electra)?,
            "modernbert" => modern_bert(&fields)?,
            "new" => new_model(&fields)?,
            other => bail!(
                "model_type is {other:?}; supported are bert, roberta, xlm-roberta, camembert, electra, modernbert and new. \
                 Choose a cross-encoder of one of these families (`rerankd models` lists some)"
            ),
        };
        let head = if modules.is_empty() { None } else { parse_head(modules, configs, config.hidden_size)? };
        match head {
            Some(head) => config.head = head,
            None => {
                let labels = fields.labels()?;
                ensure!(
                    labels == 1,
                    "the model has {labels} labels; a reranker has exactly one (num_labels, id2label)"
                );
            }
        }
        config.check()?;
        Ok(config)
    }
}

/// Reads and checks the fields that all families have. Everything else is set as in BERT: post-norm layers with biases, attention to the whole
/// sequence. `activation` and `eps.0` are the names of fields that differ by family, and `eps.1` is a default.
fn base(fields: &Fields, architecture: Architecture, activation: &str, eps: (&str, f64)) -> Result<ModelConfig> {
    let layer_norm_eps = match fields.get(eps.0) {
        Some(value) => {
            value.as_f64().with_context(|| format!("{} is {value}; expected a small positive number", eps.0))?
        }
        None => eps.1,
    };
    let mut config = ModelConfig {
        architecture,
        vocab_size: fields.integer("vocab_size")?,
        hidden_size: fields.integer("hidden_size")?,
        layers: fields.integer("num_hidden_layers")?,
        heads: fields.integer("num_attention_heads")?,
        intermediate_size: fields.integer("intermediate_size")?,
        activation: encoder_activation(fields, activation)?,
        gated: false,
        norm_order: NormOrder::Post,
        layer_norm_eps,
        biases: Biases { attention: true, feed_forward_input: true, feed_forward_output: true, norm: true },
        max_window: fields.integer("max_position_embeddings")?,
        position_rows: 0,
        position_offset: 0,
        type_vocab_size: 0,
        rotary: Vec::new(),
        layer_attention: Vec::new(),
        head: HeadConfig { pooling: Pooling::Cls, modules: Vec::new() },
    };
    config.check()?;
    config.layer_attention = vec![LayerAttention::default(); config.layers];
    Ok(config)
}

fn encoder_activation(fields: &Fields, field: &str) -> Result<Activation> {
    let name = fields.text(field)?.unwrap_or("gelu");
    let supported = "gelu, gelu_new, gelu_pytorch_tanh, relu and silu";
    activation(name)
        .filter(|&a| a != Activation::Tanh)
        .with_context(|| format!("{field} is {name:?}; supported are {supported}"))
}

fn activation(name: &str) -> Option<Activation> {
    Some(match name {
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        "silu" | "swish" => Activation::Silu,
        "tanh" => Activation::Tanh,
        _ => return None,
    })
}

/// BERT, RoBERTa and ELECTRA: learned positions and a head of two linear layers.
fn bert(fields: &Fields, architecture: Architecture) -> Result<ModelConfig> {
    if let Some(kind) = fields.text("position_embedding_type")?.filter(|&kind| kind != "absolute") {
        bail!("position_embedding_type is {kind:?}; only \"absolute\" is supported");
    }
    let config = base(fields, architecture, "hidden_act", ("layer_norm_eps", 1e-12))?;
    let c = config.hidden_size;
    let embedding_size = fields.optional_integer("embedding_size")?.unwrap_or(c);
    ensure!(embedding_size == c, "embedding_size is {embedding_size}; supported is hidden_size, {c}");
    let rows = config.max_window;
    let (position_offset, default_types) = match architecture {
        Architecture::Roberta => (fields.optional_integer("pad_token_id")?.unwrap_or(1).saturating_add(1), 1),
        _ => (0, 2),
    };
    ensure!(
        position_offset < rows,
        "max_position_embeddings {rows} leaves no position after pad_token_id {}",
        position_offset - 1
    );
    let type_vocab_size = fields.optional_integer("type_vocab_size")?.unwrap_or(default_types);
    ensure!(type_vocab_size > 0, "type_vocab_size is 0; expected 1 to 256");
    let (dense, activation, out) = match architecture {
        Architecture::Bert => ("bert.pooler.dense", Activation::Tanh, "classifier"),
        // ELECTRA's head has erf GELU, whatever the encoder has.
        Architecture::Electra => ("classifier.dense", Activation::Gelu, "classifier.out_proj"),
        _ => ("classifier.dense", Activation::Tanh, "classifier.out_proj"),
    };
    let modules = vec![dense_module(dense, c, c, true, Some(activation)), dense_module(out, c, 1, true, None)];
    Ok(ModelConfig {
        position_rows: rows,
        position_offset,
        max_window: rows - position_offset,
        type_vocab_size,
        head: HeadConfig { pooling: Pooling::Cls, modules },
        ..config
    })
}

/// ModernBERT. Configurations before and after version 5 of `transformers` name the same things differently.
fn modern_bert(fields: &Fields) -> Result<ModelConfig> {
    let config = base(fields, Architecture::ModernBert, "hidden_activation", ("norm_eps", 1e-5))?;
    let (c, d) = (config.hidden_size, rotary_head_size(&config)?);
    let local_attention = fields.optional_integer("local_attention")?.unwrap_or(128);
    ensure!(
        (1..=1 << 20).contains(&local_attention),
        "local_attention is {local_attention}; expected 1 to {}",
        1 << 20
    );
    if let Some(scaling) = fields.get("rope_scaling") {
        bail!("rope_scaling is {scaling}; scaled rotary embeddings are not supported for modernbert");
    }
    let global_base = rotary_base(fields, "full_attention", "global_rope_theta", 160_000.0)?;
    // A null field means the base of the global layers; an absent one means the default.
    let default = if fields.is_null("local_rope_theta") { global_base } else { 10_000.0 };
    let local_base = rotary_base(fields, "sliding_attention", "local_rope_theta", default)?;
    let global = LayerAttention { window: None, rotary: Some(0) };
    let local = LayerAttention { window: Some(local_attention / 2), rotary: Some(1) };
    let layer_attention = match fields.texts("layer_types")? {
        Some(types) => {
            ensure!(
                types.len() == config.layers,
                "layer_types has {} entries; num_hidden_layers is {}",
                types.len(),
                config.layers
            );
            let of = |kind: &&str| match *kind {
                "full_attention" => Ok(global),
                "sliding_attention" => Ok(local),
                other => bail!("layer_types has {other:?}; supported are \"full_attention\" and \"sliding_attention\""),
            };
            types.iter().map(of).collect::<Result<_>>()?
        }
        None => {
            let every = fields.optional_integer("global_attn_every_n_layers")?.unwrap_or(3);
            ensure!(every > 0, "global_attn_every_n_layers is 0; expected at least 1");
            (0..config.layers).map(|i| if i % every == 0 { global } else { local }).collect()
        }
    };
    let norm_bias = fields.flag("norm_bias", false)?;
    let feed_forward = fields.flag("mlp_bias", false)?;
    let name = fields.text("classifier_activation")?.unwrap_or("gelu");
    let head_activation = activation(name).with_context(|| {
        format!(
            "classifier_activation is {name:?}; supported are gelu, gelu_new, gelu_pytorch_tanh, relu, silu and tanh"
        )
    })?;
    let pooling = match fields.text("classifier_pooling")?.unwrap_or("cls") {
        "cls" => Pooling::Cls,
        "mean" => Pooling::Mean,
        other => bail!("classifier_pooling is {other:?}; supported are \"cls\" and \"mean\""),
    };
    let head_bias = fields.flag("classifier_bias", false)?;
    let eps = config.layer_norm_eps;
    Ok(ModelConfig {
        gated: true,
        norm_order: NormOrder::Pre,
        biases: Biases {
            attention: fields.flag("attention_bias", false)?,
            feed_forward_input: feed_forward,
            feed_forward_output: feed_forward,
            norm: norm_bias,
        },
        rotary: vec![frequencies(global_base, d), frequencies(local_base, d)],
        layer_attention,
        head: HeadConfig {
            pooling,
            modules: vec![
                dense_module("head.dense", c, c, head_bias, Some(head_activation)),
                HeadModule::Norm { name: "head.norm".to_owned(), size: c, bias: norm_bias, eps },
                dense_module("classifier", c, 1, true, None),
            ],
        },
        ..config
    })
}

/// The base of one kind of ModernBERT's layers: `rope_parameters.KIND.rope_theta`, else the older field, else the default.
fn rotary_base(fields: &Fields, kind: &str, older: &str, default: f64) -> Result<f64> {
    let parameters = match fields.object("rope_parameters")? {
        Some(parameters) => parameters.object(kind).context("rope_parameters")?,
        None => None,
    };
    let mut base = None;
    if let Some(parameters) = &parameters {
        let about = || format!("rope_parameters.{kind}");
        let rope_type = parameters.text("rope_type").with_context(about)?.unwrap_or("default");
        ensure!(rope_type == "default", "rope_parameters.{kind}.rope_type is {rope_type:?}; supported is \"default\"");
        base = parameters.number("rope_theta").with_context(about)?;
    }
    match base {
        Some(base) => check_rotary_base(&format!("rope_parameters.{kind}.rope_theta"), base),
        None => check_rotary_base(older, fields.number(older)?.unwrap_or(default)),
    }
}

fn check_rotary_base(field: &str, base: f64) -> Result<f64> {
    ensure!((1.0..=MAX_ROTARY_BASE).contains(&base), "{field} is {base}; expected 1 to {MAX_ROTARY_BASE}");
    Ok(base)
}

/// The "new" model of gte-multilingual.
fn new_model(fields: &Fields) -> Result<ModelConfig> {
    for (field, supported) in [("position_embedding_type", "rope"), ("layer_norm_type", "layer_norm")] {
        let value = fields.text(field)?.unwrap_or(supported);
        ensure!(value == supported, "{field} is {value:?}; supported is {supported:?}");
    }
    for (field, supported) in [("logn_attention_scale", false), ("pack_qkv", true)] {
        ensure!(fields.flag(field, supported)? == supported, "{field} is {}; supported is {supported}", !supported);
    }
    let config = base(fields, Architecture::NewModel, "hidden_act", ("layer_norm_eps", 1e-12))?;
    let (c, d) = (config.hidden_size, rotary_head_size(&config)?);
    let base = check_rotary_base("rope_theta", fields.number("rope_theta")?.unwrap_or(10_000.0))?;
    let rotary = match fields.object("rope_scaling")? {
        None => frequencies(base, d),
        Some(scaling) => scaled_frequencies(base, d, &scaling)?,
    };
    let modules = vec![
        dense_module("new.pooler.dense", c, c, true, Some(Activation::Tanh)),
        dense_module("classifier", c, 1, true, None),
    ];
    Ok(ModelConfig {
        gated: true,
        biases: Biases { feed_forward_input: false, ..config.biases },
        type_vocab_size: fields.optional_integer("type_vocab_size")?.unwrap_or(1),
        rotary: vec![rotary],
        layer_attention: vec![LayerAttention { window: None, rotary: Some(0) }; config.layers],
        head: HeadConfig { pooling: Pooling::Cls, modules },
        ..config
    })
}

/// The size of a head, which must be even for rotary positions.
fn rotary_head_size(config: &ModelConfig) -> Result<usize> {
    let d = config.head_size();
    ensure!(
        d.is_multiple_of(2),
        "hidden_size {} with num_attention_heads {} gives heads of {d}, an odd number; rotary positions need pairs",
        config.hidden_size,
        config.heads
    );
    Ok(d)
}

/// `base^(-2i / D)` for each pair i (Su et al. 2021).
fn frequencies(base: f64, d: usize) -> Vec<f32> {
    (0..d / 2).map(|i| base.powf(-2.0 * i as f64 / d as f64) as f32).collect()
}

/// Frequencies for a context that is `factor` times as long as the trained one, by "NTK" scaling, fixed or mixed
/// (<https://kexue.fm/archives/9706>, equations 6 and 10 to 13).
fn scaled_frequencies(base: f64, d: usize, scaling: &Fields) -> Result<Vec<f32>> {
    let kind = scaling.text("type").context("rope_scaling")?.context("rope_scaling.type is missing")?;
    ensure!(kind == "ntk", "rope_scaling.type is {kind:?}; supported is \"ntk\"");
    let factor = scaling.number("factor").context("rope_scaling")?.context("rope_scaling.factor is missing")?;
    ensure!((1.0..=1e4).contains(&factor), "rope_scaling.factor is {factor}; expected 1 to 1e4");
    let mixed_b = scaling.number("mixed_b").context("rope_scaling")?;
    // The model's own code does not scale the frequencies if the factor is 1.
    if factor == 1.0 {
        return Ok(frequencies(base, d));
    }
    let half = d as f64 / 2.0;
    let scaled = |i: usize| {
        let plain = |base: f64| base.powf(-(i as f64) / half);
        match mixed_b {
            None => plain(base * factor) / factor.powf(1.0 / half),
            Some(b) => plain(base) / (factor.ln() / half.powf(b) * (i as f64 + 1.0).powf(b)).exp(),
        }
    };
    Ok((0..d / 2).map(|i| scaled(i) as f32).collect())
}

fn dense_module(name: &str, inputs: usize, outputs: usize, bias: bool, activation: Option<Activation>) -> HeadModule {
    HeadModule::Dense { name: name.to_owned(), inputs, outputs, bias, activation }
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
        assert_eq!((config.architecture, config.position_offset, config.max_window), (Architecture::Roberta, 2, 8192));
    }

    #[test]
    fn the_parameter_count_of_bge_reranker_v2_m3_is_right() {
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

    const MODERN: &str = r#"{"model_type":"modernbert","vocab_size":50368,"hidden_size":768,"num_hidden_layers":4,
        "num_attention_heads":12,"intermediate_size":1152,"max_position_embeddings":8192,"norm_eps":1e-5,
        "global_attn_every_n_layers":3,"local_attention":128,"global_rope_theta":160000.0,"local_rope_theta":10000.0,
        "classifier_pooling":"mean","num_labels":1}"#;
    const NEW: &str = r#"{"model_type":"new","vocab_size":250048,"hidden_size":768,"num_hidden_layers":12,
        "num_attention_heads":12,"intermediate_size":3072,"max_position_embeddings":8192,"type_vocab_size":1,
        "position_embedding_type":"rope","rope_theta":20000,"rope_scaling":{"factor":8.0,"type":"ntk"},"num_labels":1}"#;

    fn with(json: &str, from: &str, to: &str) -> Result<ModelConfig> {
        assert!(json.contains(from), "{from}");
        ModelConfig::parse(&json.replace(from, to))
    }

    #[test]
    fn both_forms_of_a_modernbert_configuration_are_the_same_model() {
        let older = ModelConfig::parse(MODERN).unwrap();
        assert_eq!((older.max_window, older.type_vocab_size, older.position_rows), (8192, 0, 0));
        assert_eq!(older.head.pooling, Pooling::Mean);
        let windows: Vec<_> = older.layer_attention.iter().map(|layer| layer.window).collect();
        assert_eq!(windows, [None, Some(64), Some(64), None]);
        let newer = MODERN.replace(r#""global_attn_every_n_layers":3,"#, "").replace(
            r#""global_rope_theta":160000.0,"local_rope_theta":10000.0"#,
            r#""layer_types":["full_attention","sliding_attention","sliding_attention","full_attention"],
                "rope_parameters":{"full_attention":{"rope_type":"default","rope_theta":160000.0},
                "sliding_attention":{"rope_type":"default","rope_theta":10000.0}}"#,
        );
        assert_eq!(ModelConfig::parse(&newer).unwrap(), older);
    }

    #[test]
    fn a_null_base_of_local_layers_is_that_of_global_layers() {
        let null = with(MODERN, r#""local_rope_theta":10000.0"#, r#""local_rope_theta":null"#).unwrap();
        assert_eq!(null.rotary[0], null.rotary[1]);
        let absent = with(MODERN, r#","local_rope_theta":10000.0"#, "").unwrap();
        assert_eq!(absent, ModelConfig::parse(MODERN).unwrap());
    }

    #[test]
    fn the_window_is_half_of_local_attention_rounded_down() {
        for (local, window) in [(1, 0), (2, 1), (128, 64), (8192, 4096)] {
            let config = with(MODERN, r#""local_attention":128"#, &format!(r#""local_attention":{local}"#)).unwrap();
            assert_eq!(config.layer_attention[1].window, Some(window));
        }
    }

    #[test]
    fn unknown_values_of_newer_families_are_rejected_by_name() {
        let rope = r#""rope_parameters":{"full_attention":{"rope_type":"yarn","rope_theta":1e4}}"#;
        for (json, from, to, named) in [
            (MODERN, r#""mean""#, r#""max""#, "classifier_pooling is \"max\""),
            (MODERN, r#""local_attention":128"#, r#""local_attention":0"#, "local_attention is 0"),
            (MODERN, r#""norm_eps":1e-5"#, r#""norm_eps":1e-5,"hidden_activation":"mish""#, "hidden_activation"),
            (
                MODERN,
                r#""norm_eps":1e-5"#,
                r#""norm_eps":1e-5,"classifier_activation":"mish""#,
                "classifier_activation",
            ),
            (MODERN, r#""norm_eps":1e-5"#, r#""norm_eps":1e-5,"layer_types":["full_attention"]"#, "layer_types has 1"),
            (
                MODERN,
                r#""norm_eps":1e-5"#,
                r#""norm_eps":1e-5,"layer_types":["full_attention","x","x","x"]"#,
                "layer_types has \"x\"",
            ),
            (MODERN, r#""global_attn_every_n_layers":3"#, r#""global_attn_every_n_layers":0"#, "global_attn_every"),
            (MODERN, r#""global_rope_theta":160000.0"#, r#""global_rope_theta":-1"#, "global_rope_theta is -1"),
            (MODERN, r#""norm_eps":1e-5"#, &format!(r#""norm_eps":1e-5,{rope}"#), "rope_type is \"yarn\""),
            (MODERN, r#""norm_eps":1e-5"#, r#""norm_eps":1e-5,"rope_scaling":{"type":"x"}"#, "rope_scaling"),
            (MODERN, r#""norm_eps":1e-5"#, r#""norm_eps":1e-5,"norm_bias":"yes""#, "norm_bias"),
            (MODERN, r#""num_attention_heads":12"#, r#""num_attention_heads":256"#, "an odd number"),
            (MODERN, r#""num_labels":1"#, r#""num_labels":3"#, "3 labels"),
            (NEW, r#""rope","#, r#""absolute","#, "position_embedding_type"),
            (NEW, r#""ntk""#, r#""linear""#, "rope_scaling.type is \"linear\""),
            (NEW, r#""factor":8.0,"#, "", "rope_scaling.factor is missing"),
            (NEW, r#""num_labels":1"#, r#""num_labels":1,"pack_qkv":false"#, "pack_qkv"),
            (NEW, r#""num_labels":1"#, r#""num_labels":1,"layer_norm_type":"rms_norm""#, "layer_norm_type"),
            (NEW, r#""num_labels":1"#, r#""num_labels":1,"logn_attention_scale":true"#, "logn_attention_scale"),
        ] {
            let error = format!("{:#}", with(json, from, to).unwrap_err());
            assert!(error.contains(named), "{to}: {error}");
        }
    }

    #[test]
    fn parameter_counts_of_newer_families_are_right() {
        // gte-reranker-modernbert-base has 149,605,633 parameters.
        let layers = with(MODERN, r#""num_hidden_layers":4"#, r#""num_hidden_layers":22"#).unwrap();
        assert_eq!(layers.parameters(), 149_605_633);
    }

    #[test]
    fn ntk_scaling_lowers_each_frequency() {
        let plain = with(NEW, r#""rope_scaling":{"factor":8.0,"type":"ntk"}"#, r#""rope_scaling":null"#).unwrap();
        let scaled = ModelConfig::parse(NEW).unwrap();
        let mixed = with(NEW, r#""type":"ntk""#, r#""type":"ntk","mixed_b":0.625"#).unwrap();
        for ((plain, scaled), mixed) in plain.rotary[0].iter().zip(&scaled.rotary[0]).zip(&mixed.rotary[0]) {
            assert!(scaled < plain && mixed < plain);
        }
        let (last, by) = (plain.rotary[0].len() - 1, 8.0);
        assert!((plain.rotary[0][last] / scaled.rotary[0][last] - by).abs() < 1e-3);
        assert!((plain.rotary[0][last] / mixed.rotary[0][last] - by).abs() < 1e-3);
    }
}
