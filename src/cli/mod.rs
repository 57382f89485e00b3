//! The command line: one file per command, and the exit codes in one place.

mod bench;
mod download;
mod eval;
mod models;
mod rank;
mod serve;

use std::io::Write;
use std::process::ExitCode;

use anyhow::anyhow;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::args::CommonArgs;
use crate::config::file::{config_path, with_config_file};
use crate::config::hub::hub_options_from_env;
use crate::config::resolve::{ModelSettings, Notice};
use crate::loading::download::Hub;
use crate::served::Models;
use crate::telemetry;

/// A self-hosted reranking server: the best documents for a query, by a cross-encoder on your own machine
///
/// Answers POST /v1/rerank as the hosted APIs do; a client needs only another base URL.
#[derive(Debug, Parser)]
#[command(
    name = "rerankd",
    version,
    after_help = "Every flag is also an environment variable (RERANKD_PORT) and a line in the --config file (port = 8080)."
)]
pub struct Cli {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve models over HTTP
    Serve(serve::Args),
    /// Rank files, or lines of standard input, against one query
    Rank(rank::Args),
    /// Measure how well models rank, beside BM25
    Eval(eval::Args),
    /// Measure how fast models score pairs on this machine
    Bench(bench::Args),
    /// List the models known by name
    Models(models::Args),
    /// Download models into the cache, to serve them offline later
    Download(download::Args),
}

/// Why the process ends without success.
#[derive(Debug)]
pub enum Failure {
    /// The command line: clap's own message and code (0 for --help, 2 for a mistake).
    Usage(clap::Error),
    /// Settings or a model's files are wrong: 78, EX_CONFIG. Trying again changes nothing.
    Config(anyhow::Error),
    /// Anything else: 1.
    Other(anyhow::Error),
}

/// Reads the command line, the environment and the config file.
///
/// # Errors
/// A mistake in one of them.
pub fn parse() -> Result<Cli, Failure> {
    parse_from(std::env::args_os().collect())
}

fn parse_from(arguments: Vec<std::ffi::OsString>) -> Result<Cli, Failure> {
    let mut command = Cli::command();
    if let Some(path) = config_path(&arguments) {
        command = with_config_file(command, &path).map_err(Failure::Config)?;
    }
    let matches = command.try_get_matches_from(arguments).map_err(Failure::Usage)?;
    Cli::from_arg_matches(&matches).map_err(Failure::Usage)
}

/// Runs the command.
///
/// # Errors
/// Whatever ends it early.
pub fn run(cli: Cli) -> Result<(), Failure> {
    let _logs = telemetry::init_logs(cli.common.log_format, &cli.common.log);
    match cli.command {
        Command::Serve(args) => serve::run(&args),
        Command::Rank(args) => rank::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Models(args) => models::run(&args),
        Command::Download(args) => download::run(&args),
    }
}

impl Failure {
    /// Says why on standard error, and gives the exit code.
    pub fn report(self) -> ExitCode {
        match self {
            Self::Usage(error) => {
                error.print().ok();
                ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
            }
            Self::Config(error) => {
                writeln!(std::io::stderr(), "rerankd: {error:#}").ok();
                ExitCode::from(78)
            }
            Self::Other(error) => {
                writeln!(std::io::stderr(), "rerankd: {error:#}").ok();
                ExitCode::FAILURE
            }
        }
    }
}

/// Logs the notices, then loads the models and starts their workers.
fn start(settings: &ModelSettings, report: impl FnMut(&str, &str)) -> anyhow::Result<Models> {
    settings.notices.iter().for_each(Notice::log);
    let hub = Hub::new(hub_options_from_env());
    Models::load(&settings.sources, &hub, &settings.load, settings.scheduler, report)
}

/// Writes to standard output. A reader that went away (`| head`) ends the command quietly.
fn print(text: &str) -> Result<(), Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::Other(anyhow!(error))),
        _ => Ok(()),
    }
}

/// Lines of columns, each as wide as its widest cell but the last.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_coherent() {
        Cli::command().debug_assert();
    }

    /// Each flag of `serve` is an environment variable of its name, so that the README may say so.
    #[test]
    fn every_flag_has_its_environment_variable() {
        let command = Cli::command();
        for sub in ["serve", "rank", "eval", "bench"] {
            for arg in command.find_subcommand(sub).unwrap().get_arguments().filter(|arg| arg.get_env().is_some()) {
                let long = arg.get_long().expect("flags with a variable have a name");
                assert_eq!(arg.get_env().unwrap(), &*format!("RERANKD_{}", long.to_uppercase().replace('-', "_")));
            }
        }
        let unnamed = |arg: &&clap::Arg| arg.get_env().is_none() && !matches!(arg.get_id().as_str(), "help");
        let missing: Vec<_> = command
            .find_subcommand("serve")
            .unwrap()
            .get_arguments()
            .filter(unnamed)
            .map(|arg| arg.get_id().to_string())
            .collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    fn parsed(file: &str, arguments: &[&str]) -> Result<Cli, Failure> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rerankd.toml");
        std::fs::write(&path, file).unwrap();
        let config = format!("--config={}", path.display());
        parse_from(["rerankd"].iter().chain(arguments).map(Into::into).chain([config.into()]).collect())
    }

    #[test]
    fn the_config_file_gives_defaults_and_flags_win() {
        let file = "port = 9000\nmodel = [\"a\", \"b\"]\nmax_documents = 7\nlog-format = \"json\"\n";
        let cli = parsed(file, &["serve", "--port", "9001"]).unwrap();
        assert_eq!(cli.common.log_format, telemetry::LogFormat::Json);
        let Command::Serve(args) = cli.command else { panic!("serve") };
        assert_eq!((args.serve.port, args.serve.max_documents), (9001, 7));
        assert_eq!(args.serve.models.models, ["a", "b"]);
    }

    #[test]
    fn a_line_that_is_no_flag_is_refused() {
        assert!(matches!(parsed("prot = 1", &["serve"]), Err(Failure::Config(e)) if e.to_string().contains("prot")));
        assert!(matches!(parsed("port = [{a = 1}]", &["serve"]), Err(Failure::Config(_))));
        assert!(matches!(parsed("port = \"x\"", &["serve"]), Err(Failure::Usage(_))));
    }
}
