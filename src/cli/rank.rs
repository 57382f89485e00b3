//! `rerankd rank`: ranks files, or the lines of standard input, against one query, without a server; or with `--input` many queries
//! from a file to a file.

use std::path::PathBuf;

use anyhow::{Context, anyhow};
use serde_json::json;

use super::documents::{NamedDocuments, read_documents};
use super::failure::Failure;
use super::jobs::JobArgs;
use super::output::{print, table};
use super::start::start_models;
use crate::config::args::ModelArgs;
use crate::config::machine::Machine;
use crate::config::resolve::QueueSettings;
use crate::rerank::{Ranking, RerankRequest, rerank};
use crate::telemetry;
use crate::text::DocumentOptions;

/// Maximum characters of a document in the table.
const EXCERPT_CHARS: usize = 72;

#[derive(Debug, clap::Args)]
pub(super) struct RankArgs {
    /// Text that the documents are ranked against
    #[arg(short, long, required_unless_present_any = ["input", "run"])]
    query: Option<String>,
    /// Files to rank, one document each [default: each line of standard input is a document]
    ///
    /// A folder stands for all files in it and below; hidden files, and files that are not UTF-8 text, are left out. A pattern in
    /// quotes, such as 'docs/**/*.md', stands for the files that match. `-` stands for the lines of standard input.
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Number of results to print, best first [default: all]
    #[arg(short = 'n', long, value_name = "N")]
    top_n: Option<usize>,
    /// Tokens that adjacent chunks of a long document have in common; at most 80
    #[arg(long, value_name = "TOKENS", default_value_t = 80, value_parser = clap::value_parser!(u8).range(..=80))]
    overlap_tokens: u8,
    /// Print one JSON object per result instead of a table [default: false]
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    jobs: JobArgs,
    #[command(flatten)]
    pub(super) models: ModelArgs,
}

pub(super) fn run(args: &RankArgs) -> Result<(), Failure> {
    let overlap_tokens = usize::from(args.overlap_tokens);
    if let Some(output) = &args.jobs.output {
        return args.jobs.run(output, &args.models, args.top_n, overlap_tokens);
    }
    let settings = args.models.resolve(&Machine::detect(), QueueSettings::UNBOUNDED).map_err(Failure::Config)?;
    if settings.sources.len() > 1 {
        return Err(Failure::Config(anyhow!(
            "`rerankd rank` takes one --model; `rerankd eval` compares several models"
        )));
    }
    let query = args.query.clone().unwrap_or_default();
    if query.trim().is_empty() {
        let reason = anyhow!("--query is empty; give the text that the documents are ranked against");
        return Err(Failure::Other(reason));
    }
    let documents = read_documents(&args.files, args.models.max_document_chars).map_err(Failure::Other)?;
    let models =
        start_models(&settings, |name, about| tracing::debug!(model = name, "{about}")).map_err(Failure::of_loading)?;
    let request = RerankRequest {
        top_n: args.top_n,
        options: DocumentOptions { overlap_tokens, max_chunks_per_doc: usize::MAX, ..DocumentOptions::default() },
        ..RerankRequest::new(query, documents.texts.clone().into())
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")
        .map_err(Failure::Other)?;
    let bar = telemetry::progress_spinner(&format!("ranking {} documents", documents.texts.len()));
    let ranking = runtime.block_on(rerank(&models, request));
    bar.finish_and_clear();
    let ranking = ranking.map_err(|error| Failure::Other(error.into()))?;
    print(&if args.json { json_lines(&ranking, &documents) } else { ranked_table(&ranking, &documents) })
}

fn json_lines(ranking: &Ranking, documents: &NamedDocuments) -> String {
    let line = |ranked: &crate::rerank::Ranked| {
        let object = json!({
            "index": ranked.index, "relevance_score": ranked.score, "logit": ranked.logit,
            "name": documents.names[ranked.index], "text": documents.texts[ranked.index],
        });
        format!("{object}\n")
    };
    ranking.results.iter().map(line).collect()
}

fn ranked_table(ranking: &Ranking, documents: &NamedDocuments) -> String {
    let head = ["rank", "score", "document", ""].map(str::to_owned).to_vec();
    let row = |(rank, ranked): (usize, &crate::rerank::Ranked)| {
        let words: Vec<&str> = documents.texts[ranked.index].split_whitespace().collect();
        let text: String = words.join(" ").chars().take(EXCERPT_CHARS).collect();
        vec![(rank + 1).to_string(), format!("{:.6}", ranked.score), documents.names[ranked.index].clone(), text]
    };
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(ranking.results.iter().enumerate().map(row)).collect();
    table(&rows)
}
