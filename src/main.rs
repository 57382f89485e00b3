//! The binary `rerankd`: parses the command line, runs the command, returns the exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    rerankd::failpoint::setup();
    match rerankd::cli::parse().and_then(rerankd::cli::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
