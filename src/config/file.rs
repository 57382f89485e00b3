//! The config file: TOML whose keys are the names of flags.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Command, Id};

/// The path of the config file: `--config` in `arguments`, else `RERANKD_CONFIG`. It is found before clap
/// parses, because the file sets clap's defaults.
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

/// Makes each value of a TOML file the default of the flag with the same name, in every command that has the flag. A key may be
/// written with `-` or `_`. Clap checks the values later, like those of the command line.
///
/// # Errors
/// The file cannot be read or is not TOML, a key is not the name of a flag, or a value is a table or a date. The message names
/// the file and the key.
pub fn with_config_file(mut command: Command, path: &Path) -> Result<Command> {
    let text = std::fs::read_to_string(path).with_context(|| format!("--config {}: cannot be read", path.display()))?;
    let table: toml::Table = text.parse().with_context(|| format!("--config {}: not valid TOML", path.display()))?;
    for (key, value) in table {
        let values = to_strings(&value).with_context(|| {
            format!("--config {}: {key}: expected a string, a number, a boolean, or a list of them", path.display())
        })?;
        let flag = key.replace('_', "-");
        let find_id = |command: &Command| {
            command.get_arguments().find(|arg| arg.get_long() == Some(&flag)).map(|arg| arg.get_id().clone())
        };
        let subcommands: Vec<(String, Id)> = command
            .get_subcommands()
            .filter_map(|subcommand| Some((subcommand.get_name().to_owned(), find_id(subcommand)?)))
            .collect();
        // A config file cannot name another config file.
        let global = find_id(&command).filter(|_| flag != "config");
        ensure!(
            global.is_some() || !subcommands.is_empty(),
            "--config {}: {key:?} is not the name of a flag",
            path.display()
        );
        for (subcommand, id) in subcommands {
            let values = values.clone();
            command = command.mut_subcommand(subcommand, |sub| sub.mut_arg(id, |arg| arg.default_values(values)));
        }
        if let Some(id) = global {
            command = command.mut_arg(id, |arg| arg.default_values(values));
        }
    }
    Ok(command)
}

fn to_strings(value: &toml::Value) -> Option<Vec<String>> {
    match value {
        toml::Value::String(text) => Some(vec![text.clone()]),
        toml::Value::Integer(number) => Some(vec![number.to_string()]),
        toml::Value::Float(number) => Some(vec![number.to_string()]),
        toml::Value::Boolean(flag) => Some(vec![flag.to_string()]),
        toml::Value::Array(list) => Some(list.iter().map(to_strings).collect::<Option<Vec<_>>>()?.concat()),
        toml::Value::Table(_) | toml::Value::Datetime(_) => None,
    }
}
