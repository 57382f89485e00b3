//! A table of contents: parse, run, exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match rerankd::cli::parse() {
        Ok(cli) => cli,
        Err(failure) => return failure.report(),
    };
    match rerankd::cli::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
