//! The command line: one file per command. [`Failure`] lists the exit codes.

mod bench;
mod completions;
mod doctor;
mod documents;
mod download;
mod eval;
mod failure;
mod health;
mod jobs;
mod man;
mod models;
mod output;
pub mod plot;
mod rank;
mod reload;
mod serve;
mod start;

use std::ffi::OsString;

use anyhow::anyhow;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::args::{CommonArgs, FlagValues, ServeArgs};
use crate::config::file::{config_path, with_config_file};
use crate::telemetry;
pub use failure::Failure;

/// Self-hosted reranking: orders documents by their relevance to a query, with a cross-encoder model on this machine
///
/// `rerankd serve` answers POST /v1/rerank in the format of the hosted rerank APIs: to switch a client, change its base URL.
#[derive(Debug, Parser)]
#[command(
    name = "rerankd",
    version,
    after_help = "\
Every flag of `serve` can also be set by an environment variable (--max-documents: RERANKD_MAX_DOCUMENTS) or in the --config \
file (max_documents = 100). Downloads follow HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.

Examples:
  rerankd doctor
  rerankd serve --model BAAI/bge-reranker-v2-m3 --device auto
  rerankd rank --query 'how to reset a password' help/*.txt
  rerankd rank --input queries.jsonl --output ranked.jsonl"
)]
pub struct Cli {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: CliCommand,
    /// The flags of `command`.
    #[arg(skip)]
    values: FlagValues,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Serve models over HTTP
    ///
    /// SIGTERM or SIGINT ends the server after the requests that are running. SIGHUP reads the --config file and the --api-key-file
    /// again: models, aliases and keys change without a restart; the log names other settings that have changed.
    Serve(ServeArgs),
    /// Rank files, or the lines of standard input, against one query; or many queries from a file to a file
    Rank(rank::RankArgs),
    /// Measure how well models rank a data set, compared with BM25
    Eval(eval::EvalArgs),
    /// Measure how fast models score pairs on this machine
    Bench(bench::BenchArgs),
    /// List the models that are known by name
    Models(models::ListModelsArgs),
    /// Download models into the cache, to load them without a network later
    Download(download::DownloadArgs),
    /// Check this machine: what `serve` would use and why, and what to fix
    Doctor(doctor::DoctorArgs),
    /// Ask the server on this machine whether it is healthy, for health checks of containers
    Health(health::HealthArgs),
    /// Print the completions of a shell
    Completions(completions::CompletionsArgs),
    /// Print the manual page, or write the pages of all commands into a folder
    Man(man::ManArgs),
}

/// Reads the command line, the environment and the config file.
///
/// # Errors
/// A value or a name in one of them is not valid, or the config file cannot be read. Also `--help` and `--version`.
pub fn parse() -> Result<Cli, Failure> {
    parse_from(std::env::args_os().collect())
}

fn parse_from(arguments: Vec<OsString>) -> Result<Cli, Failure> {
    let mut command = Cli::command();
    if let Some(path) = config_path(&arguments) {
        command = with_config_file(command, &path).map_err(Failure::Config)?;
    }
    let matches = command.try_get_matches_from_mut(arguments).map_err(Failure::Usage)?;
    let values = flag_values(&command, &matches);
    Cli::from_arg_matches(&matches).map(|cli| Cli { values, ..cli }).map_err(Failure::Usage)
}

/// All but secrets.
fn flag_values(command: &clap::Command, matches: &ArgMatches) -> FlagValues {
    let Some((name, matches)) = matches.subcommand() else { return FlagValues::new() };
    let arguments = command.find_subcommand(name).into_iter().flat_map(|command| command.get_arguments());
    let value = |argument: &clap::Arg| {
        let values = matches.try_get_raw(argument.get_id().as_str()).ok().flatten().into_iter().flatten();
        Some((argument.get_long()?.to_owned(), values.map(OsString::from).collect()))
    };
    arguments.filter(|argument| !argument.is_hide_env_values_set()).filter_map(value).collect()
}

/// The settings of `serve`, read again from the command line, the environment and the config file of this process.
fn read_serve_again() -> Result<(ServeArgs, FlagValues), Failure> {
    let cli = parse()?;
    match cli.command {
        CliCommand::Serve(args) => Ok((args, cli.values)),
        _ => Err(Failure::Other(anyhow!("the command is not `serve`"))),
    }
}

/// Starts logging and runs the command to its end.
///
/// # Errors
/// The command's failure, with its exit code.
pub fn run(cli: Cli) -> Result<(), Failure> {
    let _logs = telemetry::init_logs(cli.common.log_format, &cli.common.log);
    match cli.command {
        CliCommand::Serve(args) => serve::run(&args, cli.values, read_serve_again),
        CliCommand::Rank(args) => rank::run(&args),
        CliCommand::Eval(args) => eval::run(&args),
        CliCommand::Bench(args) => bench::run(&args),
        CliCommand::Models(args) => models::run(&args),
        CliCommand::Download(args) => download::run(&args),
        CliCommand::Doctor(args) => doctor::run(&args),
        CliCommand::Health(args) => health::run(&args),
        CliCommand::Completions(args) => completions::run(&args, Cli::command()),
        CliCommand::Man(args) => man::run(&args, Cli::command()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_accepts_the_definition_of_the_command_line() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_of_serve_has_an_environment_variable_of_the_same_name() {
        let command = Cli::command();
        for sub in ["serve", "doctor", "rank", "eval", "bench", "health"] {
            for arg in command.find_subcommand(sub).unwrap().get_arguments().filter(|arg| arg.get_env().is_some()) {
                let long = arg.get_long().expect("an argument with a variable is a flag");
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

    /// Parses `arguments` with a config file of the content `file`.
    fn parsed(file: &str, arguments: &[&str]) -> Result<Cli, Failure> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rerankd.toml");
        std::fs::write(&path, file).unwrap();
        let config = format!("--config={}", path.display());
        parse_from(["rerankd"].iter().chain(arguments).map(Into::into).chain([config.into()]).collect())
    }

    #[test]
    fn the_config_file_sets_defaults_and_flags_take_precedence() {
        let file = "port = 9000\nmodel = [\"a\", \"b\"]\nmax_documents = 7\nlog-format = \"json\"\n";
        let cli = parsed(file, &["serve", "--port", "9001"]).unwrap();
        assert_eq!(cli.common.log_format, telemetry::LogFormat::Json);
        let CliCommand::Serve(args) = cli.command else { panic!("serve") };
        assert_eq!((args.port, args.max_documents), (9001, 7));
        assert_eq!(args.models.models, ["a", "b"]);
    }

    #[test]
    fn values_of_flags_come_from_every_source_and_contain_no_secret() {
        let cli = parsed("port = 9000\nlog-format = \"json\"\n", &["serve", "--api-key", "sk-private", "--tail=short"])
            .unwrap();
        let value = |flag: &str| cli.values[flag].iter().map(|value| value.to_str().unwrap()).collect::<Vec<_>>();
        assert_eq!([value("port"), value("tail"), value("log-format")], [["9000"], ["short"], ["json"]]);
        assert_eq!((value("max-documents"), value("model")), (vec!["1000"], vec![]));
        assert!(!format!("{cli:?}").contains("sk-private"));
    }

    #[test]
    fn unknown_keys_and_tables_in_the_config_file_are_refused() {
        assert!(matches!(parsed("prot = 1", &["serve"]), Err(Failure::Config(e)) if e.to_string().contains("prot")));
        assert!(matches!(parsed("port = [{a = 1}]", &["serve"]), Err(Failure::Config(_))));
        assert!(matches!(parsed("config = \"other.toml\"", &["serve"]), Err(Failure::Config(_))));
    }

    #[test]
    fn unknown_values_in_the_config_file_are_refused_with_the_flag() {
        for (line, named) in [
            ("port = \"x\"", "--port"),
            ("pin_threads = \"maybe\"", "--pin-threads"),
            ("dtype = \"f64\"", "--dtype"),
            ("log-format = \"xml\"", "--log-format"),
            ("log = \"nonsense\"", "--log"),
        ] {
            let Err(Failure::Usage(error)) = parsed(line, &["serve"]) else { panic!("{line}: accepted") };
            assert!(error.to_string().contains(named), "{line}: {error}");
        }
    }
}
