//! Settings of the model hub, from the environment variables that Hugging Face's own tools read.

use std::env::{self, VarError};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use crate::loading::download::HubOptions;
use crate::secret::Secret;

/// Reads `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH` and `HF_HUB_OFFLINE`. An empty
/// variable counts as unset. Without `HF_TOKEN` the token is read from the file `HF_TOKEN_PATH` (default: `$HF_HOME/token`), if
/// there is one.
///
/// # Errors
/// `HF_HUB_OFFLINE` is not a boolean, `HF_ENDPOINT` is not an HTTP URL, or a variable is not UTF-8. The message names the
/// variable.
pub fn hub_options_from_env() -> Result<HubOptions> {
    hub_options(|name| match env::var(name) {
        Ok(value) => Ok(Some(value).filter(|value| !value.is_empty())),
        Err(VarError::NotPresent) => Ok(None),
        Err(error @ VarError::NotUnicode(_)) => Err(error).context(name.to_owned()),
    })
}

/// As [`hub_options_from_env`], with `variable` in place of the process's environment.
fn hub_options(variable: impl Fn(&str) -> Result<Option<String>>) -> Result<HubOptions> {
    let folder = |name: &str| -> Result<Option<PathBuf>> { Ok(variable(name)?.map(PathBuf::from)) };
    let home = match (folder("HF_HOME")?, folder("XDG_CACHE_HOME")?) {
        (Some(home), _) => home,
        (None, Some(cache)) => cache.join("huggingface"),
        (None, None) => folder("HOME")?.unwrap_or_else(|| PathBuf::from("/")).join(".cache/huggingface"),
    };
    let endpoint = variable("HF_ENDPOINT")?.unwrap_or_else(|| HubOptions::DEFAULT_ENDPOINT.to_owned());
    ensure!(
        endpoint.starts_with("https://") || endpoint.starts_with("http://"),
        "HF_ENDPOINT is {endpoint:?}; expected a URL that starts with https:// or http://"
    );
    let token = match variable("HF_TOKEN")? {
        Some(token) => Some(token),
        None => {
            let file = folder("HF_TOKEN_PATH")?.unwrap_or_else(|| home.join("token"));
            std::fs::read_to_string(file).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
        }
    };
    Ok(HubOptions {
        cache: folder("HF_HUB_CACHE")?.unwrap_or_else(|| home.join("hub")),
        endpoint,
        token: token.map(Secret::new),
        offline: match variable("HF_HUB_OFFLINE")? {
            Some(value) => parse_bool("HF_HUB_OFFLINE", &value)?,
            None => false,
        },
    })
}

fn parse_bool(name: &str, value: &str) -> Result<bool> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => bail!("{name} is {value:?}; expected 1, true, yes or on, or 0, false, no or off"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn from(variables: &[(&str, &str)]) -> Result<HubOptions> {
        hub_options(|name| Ok(variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())))
    }

    #[test]
    fn the_most_specific_cache_variable_wins() {
        let variables = [("HOME", "/home/a"), ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")];
        for (set, expected) in
            [(1, "/home/a/.cache/huggingface/hub"), (2, "/x/huggingface/hub"), (3, "/h/hub"), (4, "/c")]
        {
            assert_eq!(from(&variables[..set]).unwrap().cache, Path::new(expected));
        }
    }

    #[test]
    fn offline_is_a_boolean_in_the_usual_spellings() {
        for (value, offline) in
            [("1", true), ("True", true), ("ON", true), ("0", false), ("False", false), ("off", false)]
        {
            assert_eq!(from(&[("HF_HUB_OFFLINE", value)]).unwrap().offline, offline, "{value}");
        }
        assert!(!from(&[]).unwrap().offline);
    }

    #[test]
    fn an_unknown_value_is_refused_with_the_variable_and_the_value() {
        for (name, value) in [("HF_HUB_OFFLINE", "maybe"), ("HF_HUB_OFFLINE", "2"), ("HF_ENDPOINT", "mirror.example")] {
            let message = from(&[(name, value)]).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(value), "{message}");
        }
    }

    #[test]
    fn the_token_is_hidden_from_debug_output() {
        let options = from(&[("HF_TOKEN", "hf_secret")]).unwrap();
        assert_eq!(options.token.as_ref().map(Secret::reveal), Some("hf_secret"));
        assert!(!format!("{options:?}").contains("hf_secret"));
    }

    #[test]
    fn the_saved_token_is_used_without_the_variable() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_saved\n").unwrap();
        let options = from(&[("HF_HOME", home.path().to_str().unwrap())]).unwrap();
        assert_eq!(options.token.as_ref().map(Secret::reveal), Some("hf_saved"));
    }
}
