//! The loop of a run: queries in, a window of them in flight, results out in order.

use std::pin::pin;
use std::sync::Arc;

use anyhow::{Context, Result};
use futures_util::{StreamExt, stream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::job::{JobError, JobRecord, JobSource, ResultFormat};
use super::lines::LineNumbers;
use super::output::{JobCounts, JobOutput};
use super::progress::JobProgress;
use super::rank::JobRanker;

/// Queries that are read ahead of the window.
const READ_AHEAD: usize = 2;

/// Maximum KiB of text in flight. A larger query is ranked alone.
const MAX_KIB_IN_FLIGHT: u32 = 64 << 10;

/// What to do about a query that cannot be ranked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum OnError {
    /// End the run. What was ranked before is kept, and the run can be continued
    Stop,
    /// Write an error in place of the ranking, and go on
    Skip,
}

/// Settings of the loop.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RunOptions {
    /// Queries that are ranked at the same time.
    pub(crate) window: usize,
    pub(crate) on_error: OnError,
    pub(crate) format: ResultFormat,
}

/// A query on its way through the window.
struct AdmittedJob {
    record: JobRecord,
    _memory: OwnedSemaphorePermit,
}

/// Ranks every query of `source`, and returns the counts with those of `counts` included.
///
/// # Errors
/// The input cannot be read, the output cannot be written, no query can be ranked any more, or a query cannot be ranked and
/// the run is to stop then. What was ranked before is saved.
pub(crate) async fn run(
    source: Box<dyn JobSource>,
    numbers: Arc<LineNumbers>,
    ranker: &JobRanker,
    mut output: JobOutput,
    mut progress: JobProgress,
    mut counts: JobCounts,
    options: RunOptions,
) -> Result<JobCounts, JobError> {
    let queries = read_on_a_thread(source).map_err(JobError::Fatal)?;
    let memory = Arc::new(Semaphore::new(MAX_KIB_IN_FLIGHT as usize));
    let admit = |record: Result<JobRecord>| {
        let memory = Arc::clone(&memory);
        async move {
            let record = record?;
            let kib = u32::try_from(record.bytes / 1024).unwrap_or(u32::MAX).clamp(1, MAX_KIB_IN_FLIGHT);
            let permit = memory.acquire_many_owned(kib).await.context("the window is closed")?;
            Ok(AdmittedJob { record, _memory: permit })
        }
    };
    let rank = async |query: Result<AdmittedJob>| {
        let query = query.map_err(JobError::Fatal)?;
        let ranking = match &query.record.job {
            Ok(job) => ranker.rank(job).await,
            Err(problem) => Err(JobError::Query(problem.clone())),
        };
        Ok::<_, JobError>((query, ranking))
    };
    let mut ranked = pin!(queries.then(admit).map(rank).buffered(options.window));
    let mut done = 0;
    let mut text = Vec::new();
    let ended = loop {
        let (query, ranking) = match ranked.next().await {
            None => break Ok(()),
            Some(Err(error)) => break Err(error),
            Some(Ok(ranked)) => ranked,
        };
        let record = &query.record;
        text.clear();
        let written = match (&record.job, ranking) {
            (Ok(job), Ok(ranking)) => options.format.write(job, &ranking, &mut text).map(|()| job.texts.len()),
            (_, Err(JobError::Query(problem))) => Err(problem),
            (_, Err(error)) => break Err(error),
            (Err(problem), Ok(_)) => Err(problem.clone()),
        };
        match written {
            Ok(pairs) => {
                counts.queries += 1;
                counts.pairs += pairs as u64;
            }
            Err(problem) if options.on_error == OnError::Stop => {
                let place = numbers.describe(record.line);
                break Err(JobError::Fatal(anyhow::anyhow!("{place}: {problem} (--on-error skip goes on)")));
            }
            Err(problem) => {
                counts.failed += 1;
                tracing::warn!("{}: {problem}", numbers.describe(record.line));
                let error = format!("line {}: {problem}", numbers.in_file(record.line));
                options.format.write_error(record.id.as_deref(), &error, &mut text);
            }
        }
        output.write(&text, record.end, counts).map_err(JobError::Fatal)?;
        done = record.end.offset;
        progress.update(done, counts);
    };
    match ended {
        Ok(()) => output.finish().map_err(JobError::Fatal)?,
        Err(error) => {
            output.save().map_err(JobError::Fatal)?;
            return Err(error);
        }
    }
    progress.finish(done, counts);
    Ok(counts)
}

/// Reads and parses queries on a thread of its own. The stream ends after the last query, or with an error.
fn read_on_a_thread(mut source: Box<dyn JobSource>) -> Result<impl futures_util::Stream<Item = Result<JobRecord>>> {
    let (send, receive) = mpsc::channel(READ_AHEAD);
    let read = move || {
        while let Some(record) = source.next().transpose() {
            let failed = record.is_err();
            if send.blocking_send(record).is_err() || failed {
                return;
            }
        }
    };
    std::thread::Builder::new().name("reader".to_owned()).spawn(read).context("cannot start a thread")?;
    Ok(stream::unfold(receive, async |mut receive| receive.recv().await.map(|record| (record, receive))))
}
