//! `rerankd eval`: how well a model ranks topics with known relevant documents, beside BM25.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use futures_util::{StreamExt, stream};
use serde_json::json;

use super::{Failure, print, start, table};
use crate::config::args::ModelArgs;
use crate::config::machine::Machine;
use crate::config::resolve::QueueSettings;
use crate::eval::bm25::Bm25;
use crate::eval::{Measures, Topic, TopicOptions, topics};
use crate::rerank::{RerankRequest, rerank};
use crate::served::Models;
use crate::telemetry;
use crate::text::DocumentOptions;

/// Topics under way at a time: one is tokenised while another computes.
const AHEAD: usize = 4;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Topics: a .jsonl file, a folder in BEIR's form, or a .json file in SQuAD's form
    ///
    /// A line of JSONL is {"query", "documents", "relevance"} or {"query", "positive", "negative"}. A BEIR folder has
    /// corpus.jsonl, queries.jsonl and qrels/test.tsv. In SQuAD's form each question's own paragraph is relevant.
    topics: PathBuf,
    /// TREC run file whose documents are reranked, for a BEIR folder [default: BM25's best]
    #[arg(long, value_name = "FILE")]
    run: Option<PathBuf>,
    /// Candidates of a topic, for a BEIR folder
    #[arg(long, value_name = "N", default_value_t = 100)]
    candidates: usize,
    /// Other paragraphs beside a question's own, for SQuAD's form
    #[arg(long, value_name = "N", default_value_t = 9)]
    negatives: usize,
    /// Take the paragraphs that BM25 likes best, not random ones
    #[arg(long)]
    hard: bool,
    /// Seed of the random choices
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Topics at most, spread evenly
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Ranks at which recall is measured
    #[arg(long, value_name = "K", value_delimiter = ',', default_values_t = [1, 5, 10])]
    recall_at: Vec<usize>,
    /// Write one JSON object a topic and ranker to this file
    #[arg(long, value_name = "FILE")]
    per_query: Option<PathBuf>,
    #[command(flatten)]
    pub(super) models: ModelArgs,
}

/// One ranker's order of one topic's documents, best first, and its measures.
struct Outcome {
    order: Vec<usize>,
    measures: Measures,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let settings = args.models.resolve(&Machine::detect(), QueueSettings::UNBOUNDED).map_err(Failure::Config)?;
    let options = TopicOptions {
        run: args.run.clone(),
        candidates: args.candidates,
        negatives: args.negatives,
        hard: args.hard,
        seed: args.seed,
        limit: args.limit,
    };
    let topics = topics::read(&args.topics, &options).map_err(Failure::Other)?;
    let models = start(&settings, |name, about| tracing::info!(model = name, "{about}")).map_err(Failure::Config)?;
    let mut rankers = vec![("BM25".to_owned(), bm25(&topics, &args.recall_at))];
    for model in models.iter() {
        rankers.push((model.name.clone(), evaluate(&models, &model.name, &topics, args).map_err(Failure::Other)?));
    }
    if let Some(path) = &args.per_query {
        write_per_query(path, &topics, &rankers).map_err(Failure::Other)?;
    }
    print(&summary(&rankers, &args.recall_at, topics.len()))
}

/// BM25 over the documents of all topics, ranking each topic's own.
fn bm25(topics: &[Topic], recall_at: &[usize]) -> Vec<Outcome> {
    let mut texts: Vec<&str> = topics.iter().flat_map(|topic| topic.documents.iter().map(String::as_str)).collect();
    texts.sort_unstable();
    texts.dedup();
    let index = Bm25::new(&texts);
    let outcome = |topic: &Topic| {
        let places: Vec<usize> =
            topic.documents.iter().map(|text| texts.binary_search(&text.as_str()).expect("indexed above")).collect();
        let scores = index.scores(&topic.query, &places);
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        measured(topic, order, recall_at)
    };
    topics.iter().map(outcome).collect()
}

fn evaluate(models: &Models, name: &str, topics: &[Topic], args: &Args) -> Result<Vec<Outcome>> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    let bar = telemetry::progress_count(topics.len() as u64, name);
    let rank = async |topic: &Topic| -> Result<Outcome> {
        let request = RerankRequest {
            model: Some(name.to_owned()),
            query: topic.query.clone(),
            documents: topic.documents.clone().into(),
            top_n: None,
            options: DocumentOptions::default(),
            deadline: None,
        };
        let ranking = rerank(models, request).await.with_context(|| format!("topic {}", topic.id))?;
        bar.inc(1);
        Ok(measured(topic, ranking.results.iter().map(|ranked| ranked.index).collect(), &args.recall_at))
    };
    let outcomes: Vec<Result<Outcome>> = runtime.block_on(stream::iter(topics).map(rank).buffered(AHEAD).collect());
    bar.finish_and_clear();
    outcomes.into_iter().collect()
}

fn measured(topic: &Topic, order: Vec<usize>, recall_at: &[usize]) -> Outcome {
    let ranked: Vec<u32> = order.iter().map(|&i| topic.relevance[i]).collect();
    Outcome { measures: Measures::of(&ranked, &topic.relevant, recall_at), order }
}

fn summary(rankers: &[(String, Vec<Outcome>)], recall_at: &[usize], topics: usize) -> String {
    let mut head = vec![format!("{topics} topics"), "nDCG@10".to_owned(), "MRR@10".to_owned()];
    head.extend(recall_at.iter().map(|k| format!("recall@{k}")));
    let mut rows = vec![head];
    for (name, outcomes) in rankers {
        let all: Vec<Measures> = outcomes.iter().map(|outcome| outcome.measures.clone()).collect();
        let Some(mean) = Measures::mean(&all) else { continue };
        let values = [mean.ndcg_10, mean.mrr_10].into_iter().chain(mean.recall);
        rows.push(std::iter::once(name.clone()).chain(values.map(|value| format!("{value:.4}"))).collect());
    }
    table(&rows)
}

fn write_per_query(path: &PathBuf, topics: &[Topic], rankers: &[(String, Vec<Outcome>)]) -> Result<()> {
    let mut file = BufWriter::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?);
    for (i, topic) in topics.iter().enumerate() {
        for (ranker, outcomes) in rankers {
            let Outcome { order, measures } = &outcomes[i];
            let line = json!({
                "topic": topic.id, "ranker": ranker, "query": topic.query, "order": order,
                "ndcg@10": measures.ndcg_10, "mrr@10": measures.mrr_10, "recall": measures.recall,
            });
            writeln!(file, "{line}")?;
        }
    }
    file.flush().with_context(|| format!("cannot write {}", path.display()))
}
