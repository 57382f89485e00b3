//! Quantiles, and figures as lines of JSON.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::client::{Answer, Outcome};

/// Latencies of one status in milliseconds, sorted.
pub(crate) fn latencies_ms(outcomes: &[Outcome], status: u16) -> Vec<f64> {
    let with_status = outcomes.iter().filter(|outcome| outcome.answer == Answer::Status(status));
    sorted(with_status.map(|outcome| ms(outcome.latency)).collect())
}

pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

pub(crate) fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

/// The `q` quantile of sorted values; NaN if there are none.
pub(crate) fn quantile(sorted: &[f64], q: f64) -> f64 {
    match sorted.len() {
        0 => f64::NAN,
        n => sorted[((n - 1) as f64 * q).round() as usize],
    }
}

pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    quantile(&sorted(values.into_iter().collect()), 0.5)
}

/// Appends a line to `file`, if there is one.
pub(crate) fn append_json(file: Option<&Path>, line: &Value) -> std::io::Result<()> {
    let Some(path) = file else { return Ok(()) };
    writeln!(std::fs::OpenOptions::new().create(true).append(true).open(path)?, "{line}")
}
