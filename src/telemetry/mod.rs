//! Log, metrics, traces and progress bars. A leaf module: it depends on nothing else in the crate.

pub mod metrics;
pub mod traces;

use std::sync::OnceLock;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tracing::level_filters::LevelFilter;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// Plain lines, colored on a terminal unless NO_COLOR is set
    #[default]
    Text,
    /// One JSON object per line
    Json,
}

/// Checks a log filter: a level, or directives such as `rerankd=debug,hyper=info`.
///
/// # Errors
/// The filter is empty, a word in it is neither a level nor a directive, or `tracing_subscriber` rejects a directive.
pub fn parse_log_filter(text: &str) -> Result<String, String> {
    EnvFilter::try_new(text).map_err(|error| error.to_string())?;
    // EnvFilter would treat a word that is not a level as a module's name, and log nothing.
    let is_level = |word: &str| !word.is_empty() && word.parse::<LevelFilter>().is_ok();
    match text.split(',').find(|part| !part.contains(['=', '[', ':']) && !is_level(part.trim())) {
        Some(part) => {
            Err(format!("{part:?} is not a level; expected off, error, warn, info, debug or trace, or module=level"))
        }
        None => Ok(text.to_owned()),
    }
}

/// Writes the remaining log lines when it is dropped.
#[must_use]
pub struct LogGuard(Option<WorkerGuard>);

/// Maximum log lines that wait for standard error. Further lines are dropped, so that a stalled reader does not stall the server.
const MAX_WAITING_LINES: usize = 16_384;

static DROPPED_LINES: OnceLock<ErrorCounter> = OnceLock::new();

/// Whether to write colors to `stream`: it is a terminal that supports them and `CLICOLOR` is not 0, or `CLICOLOR_FORCE` is set.
/// Never if `NO_COLOR` is set.
pub fn shows_colors(stream: &impl anstream::stream::RawStream) -> bool {
    anstream::AutoStream::choice(stream) != anstream::ColorChoice::Never
}

/// Starts logging to standard error, on a separate thread. A second call has no effect.
///
/// # Panics
/// If `filter` is not a valid filter. One that [`parse_log_filter`] accepts is valid.
pub fn init_logs(format: LogFormat, filter: &str) -> LogGuard {
    let filter = EnvFilter::try_new(filter).expect("checked by parse_log_filter");
    let builder = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(MAX_WAITING_LINES);
    let (writer, guard) = builder.thread_name("log").finish(std::io::stderr());
    DROPPED_LINES.set(writer.error_counter()).ok();
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .log_internal_errors(false)
        .with_target(false)
        .with_ansi(shows_colors(&std::io::stderr()));
    let started = match format {
        LogFormat::Text => logs.try_init().is_ok(),
        LogFormat::Json => logs.json().flatten_event(true).try_init().is_ok(),
    };
    LogGuard(started.then_some(guard))
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        drop(self.0.take());
    }
}

/// Moves recorded values into the histogram buckets and counts dropped log lines. To be called every few seconds: otherwise
/// values accumulate in memory until /metrics is read.
pub fn upkeep() {
    if let Some(dropped) = DROPPED_LINES.get() {
        metrics::LOG_LINES_DROPPED.only_counter().absolute(dropped.dropped_lines() as u64);
    }
    metrics::prometheus().run_upkeep();
}

/// A progress bar that counts bytes, on standard error. It is hidden when standard error is not a terminal.
pub fn progress_bytes(total: u64, label: &str) -> ProgressBar {
    progress(total, label, "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
}

/// A progress bar that counts items, on standard error. It is hidden when standard error is not a terminal.
pub fn progress_count(total: u64, label: &str) -> ProgressBar {
    progress(total, label, "{msg} {wide_bar} {pos}/{len} {per_sec} {eta}")
}

/// A progress bar with a percentage of `total` and a message, on standard error. Without a total it is a spinner with a message.
/// It is hidden when standard error is not a terminal.
pub fn progress_share(total: Option<u64>) -> ProgressBar {
    let template = if total.is_some() { "{wide_bar} {percent}% {msg}" } else { "{spinner} {msg}" };
    progress(total.unwrap_or(0), "", template)
}

fn progress(total: u64, label: &str, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    let bar = ProgressBar::new(total).with_style(style).with_message(label.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// A spinner for work of unknown length, on standard error. It is hidden when standard error is not a terminal.
pub fn progress_spinner(label: &str) -> ProgressBar {
    progress(0, label, "{spinner} {msg} {elapsed}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_filters_are_levels_or_directives() {
        for filter in ["info", "OFF", "rerankd=debug,hyper=info", "warn,rerankd::api=trace", "[request]=debug"] {
            assert_eq!(parse_log_filter(filter).as_deref(), Ok(filter));
        }
        for filter in ["nonsense", "", "info,", "rerankd=loud", "rerankd"] {
            assert!(parse_log_filter(filter).is_err(), "{filter:?}");
        }
    }
}
