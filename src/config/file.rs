//! The config file: a TOML line for any flag.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Command;

/// The config file that the command line or the environment names. It is found before the flags are parsed, because it gives
/// their defaults.
pub fn config_path(arguments: &[OsString]) -> Option<PathBuf> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let argument = argument.to_string_lossy();
        if argument == "--config" {
            return arguments.next().map(PathBuf::from);
        }
        if let Some(path) = argument.strip_prefix("--config=") {
            return Some(PathBuf::from(path));
        }
    }
    std::env::var_os("RERANKD_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// Makes each line of a TOML file the default of the flag with its name, in every command that has it.
///
/// # Errors
/// A file that cannot be read, a line that is no flag, a value that is no text, number, boolean or list of them.
pub fn with_config_file(mut command: Command, path: &Path) -> Result<Command> {
    let text = std::fs::read_to_string(path).with_context(|| format!("--config {}: cannot be read", path.display()))?;
    let table: toml::Table = text.parse().with_context(|| format!("--config {}", path.display()))?;
    for (key, value) in table {
        let values = texts(&value).with_context(|| {
            format!("--config {}: {key}: expected a text, a number, true, false, or a list of them", path.display())
        })?;
        let flag = key.replace('_', "-");
        let named = |command: &Command| {
            command.get_arguments().find(|arg| arg.get_long() == Some(&flag)).map(|arg| arg.get_id().clone())
        };
        let mut known = false;
        let holders: Vec<String> =
            command.get_subcommands().filter(|sub| named(sub).is_some()).map(|sub| sub.get_name().to_owned()).collect();
        for holder in holders {
            known = true;
            let values = values.clone();
            let id = command.find_subcommand(&holder).and_then(named).context("found just before")?;
            command = command.mut_subcommand(holder, |sub| sub.mut_arg(id, |arg| arg.default_values(values)));
        }
        if let Some(id) = named(&command).filter(|_| key != "config") {
            known = true;
            command = command.mut_arg(id, |arg| arg.default_values(values));
        }
        ensure!(known, "--config {}: {key:?} is not the name of a flag", path.display());
    }
    Ok(command)
}

fn texts(value: &toml::Value) -> Option<Vec<String>> {
    match value {
        toml::Value::String(text) => Some(vec![text.clone()]),
        toml::Value::Integer(number) => Some(vec![number.to_string()]),
        toml::Value::Float(number) => Some(vec![number.to_string()]),
        toml::Value::Boolean(flag) => Some(vec![flag.to_string()]),
        toml::Value::Array(list) => Some(list.iter().map(texts).collect::<Option<Vec<_>>>()?.concat()),
        _ => None,
    }
}
