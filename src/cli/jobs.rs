//! The flags of `rerankd rank` that rank many queries: input from a file, results to a file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use super::failure::Failure;
use super::start::start_models;
use crate::config::args::ModelArgs;
use crate::config::machine::Machine;
use crate::config::resolve::QueueSettings;
use crate::jobs::{
    JobError, JobOutput, JobProgress, JobRanker, JobSource, JsonlSource, LineReader, OnError, OpenedOutput, OutputBusy,
    RemoteOptions, ResultFormat, RunOptions, Servers, Shard, TrecSource, fingerprint, is_regular_file, run,
};
use crate::secret::Secret;

/// Default queries in flight in this process: if they are short, enough to fill a batch on a GPU.
const LOCAL_WINDOW: usize = 256;
/// Default queries in flight at each server.
const WINDOW_PER_SERVER: usize = 8;
/// Maximum queries in flight at servers. Each query in flight has a thread.
const MAX_REMOTE_WINDOW: usize = 512;

/// Ranks many queries: input from a file, results to a file.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Many queries")]
pub(super) struct JobArgs {
    /// JSON Lines file of queries: {"id", "query", "documents": [text, or {"id", "text"}]}; - is standard input
    #[arg(long, value_name = "FILE", requires = "output", conflicts_with = "json")]
    input: Option<PathBuf>,

    /// TREC run of queries and documents to rank again, sorted by query
    #[arg(long, value_name = "FILE", requires_all = ["output", "queries", "collection"], conflicts_with_all = ["json", "input"])]
    run: Option<PathBuf>,

    /// Texts of the queries in --run: id<TAB>text, or JSON Lines with _id and text
    #[arg(long, value_name = "FILE", requires = "run")]
    queries: Option<PathBuf>,

    /// Texts of the documents in --run: id<TAB>text, or JSON Lines with _id, title and text
    ///
    /// An index of 16 bytes per document is kept in memory.
    #[arg(long, value_name = "FILE", requires = "run")]
    collection: Option<PathBuf>,

    /// File for the results, in the order of the input; - is standard output
    ///
    /// While the command runs, results are in FILE.partial, and FILE.state.json says how far it is. If it was killed, the same
    /// command goes on where it stopped. A finished file is not written again.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["query", "files"])]
    pub(super) output: Option<PathBuf>,

    /// Format of the results [default: that of the input]
    #[arg(long, value_enum, requires = "output")]
    output_format: Option<ResultFormat>,

    /// Rank part I of N of the input, counted from 0; the outputs of all parts, joined in order, are the output without this flag
    #[arg(long, value_name = "I/N", default_value = "0/1", requires = "output")]
    shard: Shard,

    /// What to do about a query that cannot be ranked
    #[arg(long, value_enum, default_value = "stop", requires = "output")]
    on_error: OnError,

    /// Base URL of a server that ranks instead of this process; repeat it for several [default: none]
    ///
    /// A server that is busy or cannot be reached is tried again later, and others take its queries. --model is then a model that
    /// the servers serve; by default their first.
    #[arg(long = "server", id = "server", value_name = "URL", requires = "output")]
    servers: Vec<String>,

    /// API key for the servers [default: none]
    #[arg(long, value_name = "KEY", env = "RERANKD_API_KEY", hide_env_values = true)]
    api_key: Option<Secret>,

    /// Queries that are ranked at the same time [default: 256, or 8 for each server]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000), requires = "output")]
    concurrency: Option<u32>,

    /// Maximum seconds for which no server takes a query; then the command ends with exit code 69
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(0..=604_800), requires = "server")]
    patience: u64,

    /// Seconds between two saves of the state; 0 saves after each query
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(0..=3600), requires = "output")]
    save_every: u64,
}

impl JobArgs {
    /// Ranks the input to `output`.
    pub(super) fn run(
        &self,
        output: &Path,
        models: &ModelArgs,
        top_n: Option<usize>,
        overlap_tokens: usize,
    ) -> Result<(), Failure> {
        let input = self.input.as_ref().or(self.run.as_ref());
        let input = input.ok_or_else(|| Failure::Config(anyhow!("--output needs --input or --run")))?;
        let format =
            self.output_format.unwrap_or(if self.run.is_some() { ResultFormat::Trec } else { ResultFormat::Jsonl });
        if models.models.len() > 1 {
            return Err(Failure::Config(anyhow!("`rerankd rank` takes one --model")));
        }
        let lines = LineReader::open(input, self.shard).map_err(Failure::Other)?;
        let job = self.description(input, format, models, top_n, overlap_tokens).map_err(Failure::Config)?;
        let opened = JobOutput::open(output, job, Duration::from_secs(self.save_every)).map_err(|error| {
            if error.is::<OutputBusy>() { Failure::Temporary(error) } else { Failure::Other(error) }
        })?;
        let (results, position, counts) = match opened {
            OpenedOutput::Open(results, position, counts) => (results, position, counts),
            OpenedOutput::Complete(counts) => {
                tracing::info!(
                    "{} is complete already: {} queries, {} failed; nothing to do",
                    output.display(),
                    counts.queries,
                    counts.failed
                );
                return Ok(());
            }
        };
        let (numbers, start, end) = (lines.numbers(), lines.position().offset, lines.end());
        let source: Box<dyn JobSource> = match (&self.run, &self.queries, &self.collection) {
            (Some(_), Some(queries), Some(collection)) => {
                Box::new(TrecSource::open(lines, self.shard, position, queries, collection).map_err(Failure::Other)?)
            }
            _ => Box::new(JsonlSource::open(lines, position).map_err(Failure::Other)?),
        };
        if let Some(position) = position {
            tracing::info!("continuing after {} queries, line {}", counts.queries, numbers.in_file(position.lines));
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the async runtime")
            .map_err(Failure::Other)?;
        let window = self.concurrency.map(|n| n as usize);
        let ranked = runtime.block_on(async {
            let (ranker, window) = if self.servers.is_empty() {
                let settings = models.resolve(&Machine::detect(), QueueSettings::UNBOUNDED).map_err(Failure::Config)?;
                let models = start_models(&settings, |name, about| tracing::info!(model = name, "{about}"))
                    .map_err(Failure::of_loading)?;
                (JobRanker::Local { models, overlap_tokens, top_n, format }, window.unwrap_or(LOCAL_WINDOW))
            } else {
                let servers = Servers::connect(RemoteOptions {
                    urls: self.servers.clone(),
                    key: self.api_key.clone(),
                    model: models.models.first().cloned(),
                    top_n,
                    overlap_tokens,
                    raw_scores: format == ResultFormat::Trec,
                    patience: Duration::from_secs(self.patience),
                })
                .await
                .map_err(failure)?;
                tracing::info!(model = servers.model(), "ranking with {} servers", self.servers.len());
                let window = window.unwrap_or(WINDOW_PER_SERVER * self.servers.len()).min(MAX_REMOTE_WINDOW);
                (JobRanker::Remote(servers), window)
            };
            let options = RunOptions { window, on_error: self.on_error, format };
            let resumed = position.map_or(start, |position| position.offset);
            let progress = JobProgress::start(start, end, resumed, counts);
            run(source, numbers, &ranker, results, progress, counts, options).await.map_err(failure)
        });
        // Requests that are still in flight to servers do not delay the end.
        runtime.shutdown_background();
        ranked.map(|_| ())
    }

    /// What the results depend on. A later run continues an output only if this is the same.
    fn description(
        &self,
        input: &Path,
        format: ResultFormat,
        models: &ModelArgs,
        top_n: Option<usize>,
        overlap_tokens: usize,
    ) -> Result<Value> {
        // The content of a pipe cannot be compared, so two pipes never count as equal.
        let content = |path: &Path| {
            if is_regular_file(path) { fingerprint(path) } else { Ok(format!("a pipe, {}", uuid::Uuid::now_v7())) }
        };
        let texts = |path: &Option<PathBuf>| path.as_deref().map(content).transpose();
        Ok(json!({
            "input": content(input)?,
            "queries": texts(&self.queries)?,
            "collection": texts(&self.collection)?,
            "shard": self.shard.to_string(),
            "format": format!("{format:?}"),
            "top_n": top_n,
            "overlap_tokens": overlap_tokens,
            "model": models.models,
            "by": if self.servers.is_empty() { "this process" } else { "servers" },
            "window": models.window,
            "max_query_tokens": models.max_query_tokens,
            "max_document_chars": models.max_document_chars,
            "tail": format!("{:?}", models.tail),
            "device": models.device,
            "dtype": format!("{:?}", models.dtype),
        }))
    }
}

fn failure(error: JobError) -> Failure {
    match error {
        JobError::Query(problem) => Failure::Other(anyhow!(problem)),
        JobError::Unavailable(error) => Failure::Temporary(error),
        JobError::Fatal(error) => Failure::Other(error),
    }
}
