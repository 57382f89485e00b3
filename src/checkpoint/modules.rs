//! Models in the format of sentence-transformers: `modules.json` lists the modules of a chain. The first is the encoder, the
//! second its pooling, and the rest are the classification head, each in a folder of its own.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::config::{HeadConfig, HeadModule, Pooling};
use super::fields::Fields;
use crate::backend::Activation;
use crate::score::ScoreMap;

/// The longest accepted chain.
const MAX_MODULES: usize = 32;

/// The epsilon of sentence-transformers' LayerNorm module. It is PyTorch's default; the module's `config.json` does not state it.
const LAYER_NORM_EPS: f64 = 1e-5;

/// An entry of `modules.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct ModuleEntry {
    /// The folder, relative to the model's; empty is the model's own.
    pub path: String,
    /// The Python class. The package differs between versions of sentence-transformers; the class name does not.
    #[serde(rename = "type")]
    class: String,
}

impl ModuleEntry {
    /// The class name without its package.
    fn class(&self) -> &str {
        self.class.rsplit('.').next().unwrap_or(&self.class)
    }

    /// Whether the module has a weight file.
    pub fn has_weights(&self) -> bool {
        matches!(self.class(), "Dense" | "LayerNorm")
    }
}

/// Reads the text of a `modules.json`.
///
/// # Errors
/// The chain does not start with a Transformer in the model's own folder, has an unknown module, or names a folder that is not
/// directly in the model's folder.
pub fn parse_modules(json: &str) -> Result<Vec<ModuleEntry>> {
    let modules: Vec<ModuleEntry> = serde_json::from_str(json).context("not a list of modules")?;
    ensure!(modules.len() <= MAX_MODULES, "{} modules; expected at most {MAX_MODULES}", modules.len());
    for (i, module) in modules.iter().enumerate() {
        let ModuleEntry { path, class } = module;
        match (i, module.class()) {
            (0, "Transformer") | (1, "Pooling") => {}
            (2.., "Dense" | "LayerNorm") => {}
            _ => bail!(
                "module {i} has the type {class:?}; supported is a chain of Transformer, Pooling, then Dense and LayerNorm"
            ),
        }
        let is_folder = path.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'));
        ensure!(
            is_folder && !path.starts_with('.') && path.is_empty() == (i == 0),
            "module {i} has the path {path:?}; expected \"\" for the first module, for the \
             others the name of a folder in the model's folder"
        );
    }
    ensure!(!modules.is_empty(), "there are no modules");
    Ok(modules)
}

/// Builds the head from the modules after the Transformer. `None` if there are none; the model then has the head of its family.
/// `modules` includes the Transformer; `configs` has the text of config.json of each module after it, in order.
///
/// # Errors
/// An unknown pooling or activation, sizes that do not fit together, or a chain that does not end in one output.
pub fn parse_head(modules: &[ModuleEntry], configs: &[String], hidden_size: usize) -> Result<Option<HeadConfig>> {
    let mut size = hidden_size;
    let mut head: Option<HeadConfig> = None;
    for (module, config) in modules[1..].iter().zip(configs) {
        let file = format!("{}/config.json", module.path);
        let fields = Fields::parse(config).with_context(|| file.clone())?;
        match &mut head {
            None => head = Some(HeadConfig { pooling: pooling(&fields, size).context(file)?, modules: Vec::new() }),
            Some(head) => {
                let (module, outputs) = head_module(module, &fields, size).context(file)?;
                head.modules.push(module);
                size = outputs;
            }
        }
    }
    let Some(head) = head else { return Ok(None) };
    ensure!(
        size == 1 && matches!(head.modules.last(), Some(HeadModule::Dense { .. })),
        "the last module has {size} outputs; a reranker ends in a Dense with one"
    );
    Ok(Some(head))
}

/// The score map that a checkpoint asks for with `activation_fn`. `settings` is the text of `config_sentence_transformers.json`,
/// if there is one; else `activation_fn` is in `config.json`.
///
/// The identity, too, gives the default map, a sigmoid: clients expect scores in [0, 1]. Those that want logits ask for them.
///
/// # Errors
/// `activation_fn` is neither a sigmoid nor the identity, or a text is not valid JSON.
pub fn parse_score_map(config_json: &str, settings: Option<&str>) -> Result<ScoreMap> {
    let config = Fields::parse(config_json)?;
    let nested = config.object("sentence_transformers")?;
    let settings = settings.map(Fields::parse).transpose()?;
    let in_settings = settings.as_ref().map(|fields| fields.text("activation_fn")).transpose()?.flatten();
    let in_config = nested.as_ref().map(|fields| fields.text("activation_fn")).transpose()?.flatten();
    let older = config.text("sbert_ce_default_activation_function")?;
    match in_settings.or(in_config).or(older) {
        None | Some("torch.nn.modules.activation.Sigmoid" | "torch.nn.modules.linear.Identity") => {
            Ok(ScoreMap::default())
        }
        Some(other) => bail!("activation_fn is {other:?}; supported are torch's Sigmoid and Identity"),
    }
}

/// Reads the pooling from either form of a Pooling module's configuration.
fn pooling(fields: &Fields, hidden_size: usize) -> Result<Pooling> {
    for field in ["embedding_dimension", "word_embedding_dimension"] {
        let size = fields.optional_integer(field)?.unwrap_or(hidden_size);
        ensure!(size == hidden_size, "{field} is {size}; the encoder has {hidden_size}");
    }
    if let Some(mode) = fields.get("pooling_mode") {
        return match mode.as_str() {
            Some("cls") => Ok(Pooling::Cls),
            Some("mean") => Ok(Pooling::Mean),
            _ => bail!("pooling_mode is {mode}; supported are \"cls\" and \"mean\""),
        };
    }
    const MODES: [(&str, Option<Pooling>); 6] = [
        ("pooling_mode_cls_token", Some(Pooling::Cls)),
        ("pooling_mode_mean_tokens", Some(Pooling::Mean)),
        ("pooling_mode_max_tokens", None),
        ("pooling_mode_mean_sqrt_len_tokens", None),
        ("pooling_mode_weightedmean_tokens", None),
        ("pooling_mode_lasttoken", None),
    ];
    let mut chosen = None;
    for (field, pooling) in MODES {
        if fields.flag(field, false)? {
            ensure!(pooling.is_some(), "{field} is not supported; supported are cls and mean");
            ensure!(chosen.is_none(), "{field} is set besides another mode; supported is one mode");
            chosen = pooling;
        }
    }
    Ok(chosen.unwrap_or(Pooling::Mean))
}

/// A Dense or a LayerNorm on rows of `inputs` values, and its number of outputs.
fn head_module(module: &ModuleEntry, fields: &Fields, inputs: usize) -> Result<(HeadModule, usize)> {
    if module.class() == "LayerNorm" {
        let size = fields.integer("dimension")?;
        ensure!(size == inputs, "dimension is {size}; the module before has {inputs} outputs");
        let name = format!("{}/norm", module.path);
        return Ok((HeadModule::Norm { name, size, bias: true, eps: LAYER_NORM_EPS }, size));
    }
    let (from, outputs) = (fields.integer("in_features")?, fields.integer("out_features")?);
    ensure!(from == inputs, "in_features is {from}; the module before has {inputs} outputs");
    ensure!((1..=1 << 16).contains(&outputs), "out_features is {outputs}; expected 1 to {}", 1 << 16);
    ensure!(!fields.flag("use_residual", false)?, "use_residual is not supported");
    let input = fields.text("module_input_name")?.unwrap_or("sentence_embedding");
    ensure!(input == "sentence_embedding", "module_input_name is {input:?}; supported is \"sentence_embedding\"");
    let activation = match fields.text("activation_function")?.unwrap_or("torch.nn.modules.activation.Tanh") {
        "torch.nn.modules.linear.Identity" => None,
        "torch.nn.modules.activation.GELU" => Some(Activation::Gelu),
        "torch.nn.modules.activation.ReLU" => Some(Activation::Relu),
        "torch.nn.modules.activation.SiLU" => Some(Activation::Silu),
        "torch.nn.modules.activation.Tanh" => Some(Activation::Tanh),
        other => bail!("activation_function is {other:?}; supported are torch's Identity, GELU, ReLU, SiLU and Tanh"),
    };
    let bias = fields.flag("bias", true)?;
    Ok((HeadModule::Dense { name: format!("{}/linear", module.path), inputs, outputs, bias, activation }, outputs))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAIN: &str = r#"[
        {"idx":0,"name":"0","path":"","type":"sentence_transformers.base.modules.transformer.Transformer"},
        {"idx":1,"name":"1","path":"1_Pooling","type":"sentence_transformers.models.Pooling"},
        {"idx":2,"name":"2","path":"2_Dense","type":"sentence_transformers.models.Dense"},
        {"idx":3,"name":"3","path":"3_LayerNorm","type":"sentence_transformers.models.LayerNorm"},
        {"idx":4,"name":"4","path":"4_Dense","type":"sentence_transformers.models.Dense"}]"#;
    const CONFIGS: [&str; 4] = [
        r#"{"embedding_dimension":32,"pooling_mode":"cls"}"#,
        r#"{"in_features":32,"out_features":16,"bias":false,"activation_function":"torch.nn.modules.activation.GELU"}"#,
        r#"{"dimension":16}"#,
        r#"{"in_features":16,"out_features":1,"activation_function":"torch.nn.modules.linear.Identity"}"#,
    ];

    fn head(edit: impl Fn(&str) -> String) -> Result<HeadConfig> {
        let configs: Vec<String> = CONFIGS.iter().map(|config| edit(config)).collect();
        Ok(parse_head(&parse_modules(CHAIN)?, &configs, 32)?.expect("the chain has a head"))
    }

    #[test]
    fn a_chain_of_modules_becomes_a_head() {
        let head = head(str::to_owned).unwrap();
        assert_eq!(head.pooling, Pooling::Cls);
        let names: Vec<&str> = head.modules.iter().map(HeadModule::name).collect();
        assert_eq!(names, ["2_Dense/linear", "3_LayerNorm/norm", "4_Dense/linear"]);
        assert_eq!(
            head.modules[0],
            HeadModule::Dense {
                name: names[0].to_owned(),
                inputs: 32,
                outputs: 16,
                bias: false,
                activation: Some(Activation::Gelu)
            }
        );
    }

    #[test]
    fn a_chain_of_only_a_transformer_has_no_head() {
        let modules = parse_modules(r#"[{"path":"","type":"sentence_transformers.models.Transformer"}]"#).unwrap();
        assert_eq!(parse_head(&modules, &[], 32).unwrap(), None);
    }

    #[test]
    fn unknown_modules_and_foreign_folders_are_rejected_by_name() {
        for (from, to, named) in [
            (
                "models.LayerNorm",
                "models.Normalize",
                "module 3 has the type \"sentence_transformers.models.Normalize\"",
            ),
            ("models.Pooling", "models.Dense", "module 1"),
            (r#""path":"2_Dense""#, r#""path":"../2_Dense""#, "../2_Dense"),
            (r#""path":"2_Dense""#, r#""path":"""#, "module 2 has the path"),
            (r#""path":"","#, r#""path":"0_Transformer","#, "module 0 has the path"),
        ] {
            assert!(CHAIN.contains(from));
            let error = parse_modules(&CHAIN.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(named), "{to}: {error}");
        }
        assert!(parse_modules("[]").is_err());
    }

    #[test]
    fn module_configurations_that_do_not_fit_are_rejected_with_their_file() {
        for (from, to, named) in [
            (r#""pooling_mode":"cls""#, r#""pooling_mode":"max""#, "1_Pooling/config.json: pooling_mode is \"max\""),
            (r#""embedding_dimension":32"#, r#""embedding_dimension":64"#, "embedding_dimension is 64"),
            (r#""in_features":32"#, r#""in_features":33"#, "2_Dense/config.json: in_features is 33"),
            ("activation.GELU", "activation.Mish", "activation_function is \"torch.nn.modules.activation.Mish\""),
            (r#""dimension":16"#, r#""dimension":15"#, "3_LayerNorm/config.json: dimension is 15"),
            (r#""out_features":1,"#, r#""out_features":2,"#, "2 outputs"),
            (r#""bias":false"#, r#""bias":false,"use_residual":true"#, "use_residual"),
        ] {
            assert!(CONFIGS.iter().any(|config| config.contains(from)), "{from}");
            let error = format!("{:#}", head(|config| config.replace(from, to)).unwrap_err());
            assert!(error.contains(named), "{to}: {error}");
        }
    }

    #[test]
    fn an_unknown_activation_fn_is_rejected_by_name() {
        let read = |name: &str| parse_score_map("{}", Some(&format!(r#"{{"activation_fn":"{name}"}}"#)));
        assert_eq!(read("torch.nn.modules.linear.Identity").unwrap(), ScoreMap::default());
        assert!(read("torch.nn.modules.activation.Softplus").unwrap_err().to_string().contains("Softplus"));
        let in_config = r#"{"sentence_transformers":{"activation_fn":"my.Own"}}"#;
        assert!(parse_score_map(in_config, None).unwrap_err().to_string().contains("my.Own"));
        assert!(parse_score_map(r#"{"sbert_ce_default_activation_function":"my.Own"}"#, None).is_err());
        assert_eq!(parse_score_map("{}", None).unwrap(), ScoreMap::default());
    }

    #[test]
    fn both_forms_of_a_pooling_configuration_are_read() {
        let read = |json: &str| pooling(&Fields::parse(json).unwrap(), 8);
        assert_eq!(read(r#"{"word_embedding_dimension":8,"pooling_mode_cls_token":true}"#).unwrap(), Pooling::Cls);
        assert_eq!(read(r#"{"pooling_mode_cls_token":false,"pooling_mode_mean_tokens":true}"#).unwrap(), Pooling::Mean);
        assert!(read(r#"{"pooling_mode_cls_token":true,"pooling_mode_mean_tokens":true}"#).is_err());
        assert!(read(r#"{"pooling_mode_lasttoken":true}"#).is_err());
    }
}
