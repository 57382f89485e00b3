//! Settings of the model hub, from the environment variables that `huggingface_hub` defines.

use std::env;
use std::path::PathBuf;

use crate::loading::download::HubOptions;
use crate::secret::Secret;

/// Reads `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH` and `HF_HUB_OFFLINE`.
/// Without `HF_TOKEN`, the token is read from the file `HF_TOKEN_PATH`, by default `$HF_HOME/token`.
pub fn hub_options_from_env() -> HubOptions {
    hub_options(|name| env::var(name).ok().filter(|value| !value.is_empty()))
}

fn hub_options(variable: impl Fn(&str) -> Option<String>) -> HubOptions {
    let home = variable("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
        let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
        let user = || PathBuf::from(variable("HOME").unwrap_or_else(|| "/".to_owned())).join(".cache");
        cache.unwrap_or_else(user).join("huggingface")
    });
    let is_true = |value: String| !matches!(value.to_lowercase().as_str(), "0" | "false" | "no" | "off");
    let token_file = variable("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
    let saved_token =
        || Some(std::fs::read_to_string(token_file).ok()?.trim().to_owned()).filter(|text| !text.is_empty());
    HubOptions {
        cache: variable("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
        endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| HubOptions::DEFAULT_ENDPOINT.to_owned()),
        token: variable("HF_TOKEN").or_else(saved_token).map(Secret::new),
        offline: variable("HF_HUB_OFFLINE").is_some_and(is_true),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn options_from(variables: &[(&str, &str)]) -> HubOptions {
        hub_options(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn the_most_specific_cache_variable_wins() {
        let variables = [("HOME", "/home/a"), ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")];
        for (set, expected) in
            [(1, "/home/a/.cache/huggingface/hub"), (2, "/x/huggingface/hub"), (3, "/h/hub"), (4, "/c")]
        {
            assert_eq!(options_from(&variables[..set]).cache, Path::new(expected));
        }
    }

    #[test]
    fn offline_accepts_the_usual_boolean_words() {
        for (value, offline) in [("1", true), ("true", true), ("0", false), ("False", false), ("off", false)] {
            assert_eq!(options_from(&[("HF_HUB_OFFLINE", value)]).offline, offline, "{value}");
        }
        assert!(!options_from(&[]).offline);
    }

    #[test]
    fn the_token_is_hidden_from_debug_output() {
        let options = options_from(&[("HF_TOKEN", "hf_secret")]);
        assert_eq!(options.token.as_ref().map(Secret::reveal), Some("hf_secret"));
        assert!(!format!("{options:?}").contains("hf_secret"));
    }
}
