//! Progress of a run: queries and pairs done, pairs per second, time left.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::output::JobCounts;
use crate::telemetry;

/// Time between two log lines when there is no terminal.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// A progress bar on a terminal, and a line in the log every minute otherwise.
pub(crate) struct JobProgress {
    bar: ProgressBar,
    started: Instant,
    logged: Instant,
    /// Offset of the input's beginning, and of its end if it is a file.
    start: u64,
    end: Option<u64>,
    /// Offset at which this run began.
    resumed: u64,
    counts_before: JobCounts,
}

impl JobProgress {
    /// The input is from offset `start` to `end`. An earlier run stopped at offset `resumed`, with these counts.
    pub(crate) fn start(start: u64, end: Option<u64>, resumed: u64, counts: JobCounts) -> Self {
        let bar = telemetry::progress_share(end.map(|end| end.saturating_sub(start)));
        let now = Instant::now();
        Self { bar, started: now, logged: now, start, end, resumed, counts_before: counts }
    }

    /// To be called after each query, with the offset after it.
    pub(crate) fn update(&mut self, done: u64, counts: JobCounts) {
        self.bar.set_position(done.saturating_sub(self.start));
        if !self.bar.is_hidden() {
            self.bar.set_message(self.describe(done, counts));
        } else if self.logged.elapsed() >= LOG_EVERY {
            self.logged = Instant::now();
            tracing::info!("{}", self.describe(done, counts));
        }
    }

    /// Removes the bar and logs the totals.
    pub(crate) fn finish(self, done: u64, counts: JobCounts) {
        self.bar.finish_and_clear();
        tracing::info!("{}", self.describe(done, counts));
    }

    fn describe(&self, done: u64, counts: JobCounts) -> String {
        let elapsed = self.started.elapsed().as_secs_f64();
        let left = self.end.map(|end| (end.saturating_sub(done), done.saturating_sub(self.resumed)));
        describe(counts, counts.pairs - self.counts_before.pairs, elapsed, left)
    }
}

/// `left` has the bytes of input that are still to do, and those that were done in `elapsed` seconds.
fn describe(counts: JobCounts, new_pairs: u64, elapsed: f64, left: Option<(u64, u64)>) -> String {
    let JobCounts { queries, pairs, failed } = counts;
    let mut text = format!("{queries} queries, {pairs} pairs, {:.0} pairs/s", new_pairs as f64 / elapsed.max(1e-3));
    if failed > 0 {
        text.push_str(&format!(", {failed} failed"));
    }
    match left {
        Some((to_do, done)) if to_do > 0 && done > 0 => {
            let seconds = (elapsed * to_do as f64 / done as f64).ceil() as u64;
            let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
            text.push_str(&format!(", {hours}:{minutes:02}:{seconds:02} left"));
        }
        _ => {}
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_time_left_are_those_of_this_run() {
        let counts = JobCounts { queries: 10, pairs: 1000, failed: 2 };
        assert_eq!(
            describe(counts, 500, 2.0, Some((3600, 1))),
            "10 queries, 1000 pairs, 250 pairs/s, 2 failed, 2:00:00 left"
        );
        assert_eq!(describe(JobCounts::default(), 0, 0.0, None), "0 queries, 0 pairs, 0 pairs/s");
        assert!(!describe(counts, 500, 2.0, Some((0, 9))).contains("left"));
    }
}
