//! `rerankd doctor`: looks at the machine, says what `serve` would use and why, and what to fix. Loads no model.

mod choice;
mod gpu;
mod hub;
mod machine;
mod report;

use anyhow::anyhow;

use self::choice::Surroundings;
use self::machine::Host;
use self::report::Report;
use super::failure::Failure;
use super::output::print;
use crate::config::args::ServeArgs;
use crate::config::hub::hub_options_from_env;
use crate::config::machine::{Machine, survey_cuda};
use crate::telemetry;

#[derive(Debug, clap::Args)]
pub(super) struct DoctorArgs {
    /// Print the findings as JSON [default: false]
    #[arg(long)]
    json: bool,
    /// Ask the model hub whether it can be reached and has the models [default: false]
    #[arg(long)]
    online: bool,
    #[command(flatten)]
    pub(super) serve: ServeArgs,
}

/// Prints the findings.
///
/// # Errors
/// There is a problem, that is, `serve` with the same flags would not start or not use what it was told to use.
pub(super) fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let report = examine(args);
    let problems = report.problems();
    if args.json {
        print(&format!("{:#}\n", report.json()))?;
    } else {
        let title =
            format!("rerankd {}, {} {}", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH);
        let end =
            if problems == 0 { "No problems found. `rerankd bench` measures the speed of a model here.\n" } else { "" };
        print(&format!("{title}\n\n{}\n{end}", report.text(telemetry::shows_colors(&std::io::stdout()))))?;
    }
    match problems {
        0 => Ok(()),
        1 => Err(Failure::Config(anyhow!("1 problem found"))),
        _ => Err(Failure::Config(anyhow!("{problems} problems found"))),
    }
}

fn examine(args: &DoctorArgs) -> Report {
    let (host, machine) = (Host::detect(), Machine::detect());
    let settings = args.serve.resolve(&machine);
    let survey = survey_cuda();
    let mut report = Report::default();
    let device = settings.as_ref().ok().map(|settings| &settings.models.load.device);
    host.check_processor(&mut report, &machine, device);
    gpu::check(&mut report, survey.as_ref(), &args.serve.models.device);
    host.check_memory(&mut report);
    machine::check_open_files(&mut report, args.serve.max_connections as usize);
    let options = hub_options_from_env();
    let hub = match &options {
        Ok(options) => {
            let cache = hub::check(&mut report, options);
            if args.online {
                let sources = settings.as_ref().map_or(&[][..], |settings| &settings.models.sources);
                hub::check_online(&mut report, options, sources);
            }
            Some((options, cache))
        }
        Err(reason) => {
            report.section("Model hub");
            report.problem(format!("{reason:#}"), "");
            None
        }
    };
    match &settings {
        Ok(settings) => {
            let around = Surroundings { host: &host, machine: &machine, survey: survey.as_ref(), hub };
            choice::check(&mut report, settings, &args.serve.models, &around);
        }
        Err(reason) => {
            report.section("`rerankd serve` with the same flags");
            report.problem(format!("{reason:#}"), "");
        }
    }
    report
}
