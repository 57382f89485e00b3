//! Why the process ends without success, and its exit code.

use std::io::Write;
use std::process::ExitCode;

use crate::loading::download::HubError;

/// A failure of a command. The exit codes follow `sysexits.h`, so that a process manager knows whether a restart may help:
///
/// | code | meaning | restart? |
/// |---|---|---|
/// | 0 | success, `--help`, or a server that drained after SIGTERM or SIGINT | |
/// | 1 | any other failure | |
/// | 2 | the command line, an environment variable or a value in the config file is not valid | no |
/// | 69 | the model hub cannot be reached or is busy; or no server takes a query, or another process writes the output (`rank`) | yes, later |
/// | 70 | the device is lost or hangs, or a worker panics too often; the scheduler ends the process | yes |
/// | 78 | the settings do not fit this machine, or a model's files are missing or damaged | no |
/// | 130 | a second SIGTERM or SIGINT during the drain | |
#[derive(Debug)]
pub enum Failure {
    /// The command line is not valid, or asks for help: clap's message and exit code (2, or 0 for `--help`).
    Usage(clap::Error),
    /// Settings or a model's files are wrong: 78. A restart does not help.
    Config(anyhow::Error),
    /// The hub or a server cannot be reached or is busy: 69. A later start may succeed.
    Temporary(anyhow::Error),
    /// Any other failure: 1.
    Other(anyhow::Error),
}

/// `EX_UNAVAILABLE` of `sysexits.h`.
const EX_UNAVAILABLE: u8 = 69;
/// `EX_CONFIG` of `sysexits.h`.
const EX_CONFIG: u8 = 78;

impl Failure {
    /// The failure of loading or downloading a model.
    pub(super) fn of_loading(error: anyhow::Error) -> Self {
        if error.downcast_ref::<HubError>().is_some_and(HubError::is_temporary) {
            Self::Temporary(error)
        } else {
            Self::Config(error)
        }
    }

    /// The reason in one line.
    pub(super) fn reason(&self) -> String {
        match self {
            Self::Usage(error) => {
                let text = error.to_string();
                let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
                lines.collect::<Vec<_>>().join(" ").trim_start_matches("error: ").to_owned()
            }
            Self::Config(error) | Self::Temporary(error) | Self::Other(error) => format!("{error:#}"),
        }
    }

    /// Writes the reason to standard error and returns the exit code.
    pub fn report(self) -> ExitCode {
        let (error, code) = match self {
            Self::Usage(error) => {
                error.print().ok();
                return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
            }
            Self::Config(error) => (error, ExitCode::from(EX_CONFIG)),
            Self::Temporary(error) => (error, ExitCode::from(EX_UNAVAILABLE)),
            Self::Other(error) => (error, ExitCode::FAILURE),
        };
        writeln!(std::io::stderr(), "rerankd: {error:#}").ok();
        code
    }
}
