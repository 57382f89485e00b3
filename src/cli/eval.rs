//! `rerankd eval`: measures how well models rank topics with relevance judgments, compared with BM25.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use futures_util::{StreamExt, stream};
use serde_json::json;

use super::failure::Failure;
use super::output::{PictureFile, print, table};
use super::plot::{Axis, Chart, Point, Scale, Series};
use super::start::start_models;
use crate::config::args::ModelArgs;
use crate::config::machine::Machine;
use crate::config::resolve::QueueSettings;
use crate::eval::bm25::Bm25;
use crate::eval::{Measures, Topic, TopicOptions, topics};
use crate::loading::source::{BUILTIN, ModelLocation, NEXT_STEP};
use crate::rerank::{RerankRequest, rerank};
use crate::served::Models;
use crate::telemetry;

/// Topics in flight, so that some are tokenized while others are computed.
const CONCURRENT_TOPICS: usize = 4;

#[derive(Debug, clap::Args)]
pub(super) struct EvalArgs {
    /// Data set: a .jsonl file, a folder in BEIR format, or a .json file in SQuAD format
    ///
    /// A topic is a query with candidate documents and their relevance. A line of a .jsonl file is one topic: {"query",
    /// "documents", "relevance"} or {"query", "positive", "negative"}. A BEIR folder has corpus.jsonl, queries.jsonl and
    /// qrels/test.tsv. In SQuAD format the paragraph that contains the answer is relevant.
    topics: PathBuf,
    /// BEIR: TREC run file with the candidates of each query [default: the top documents by BM25]
    #[arg(long, value_name = "FILE")]
    run: Option<PathBuf>,
    /// BEIR: maximum candidates per query
    #[arg(long, value_name = "N", default_value_t = 100)]
    candidates: usize,
    /// SQuAD: number of other paragraphs among the candidates of each question
    #[arg(long, value_name = "N", default_value_t = 9)]
    negatives: usize,
    /// SQuAD: take the paragraphs that BM25 ranks highest instead of random ones [default: false]
    #[arg(long)]
    hard: bool,
    /// SQuAD: seed of the random choices
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Maximum topics, evenly spaced over the data set [default: all]
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Ranks k at which recall@k is measured, separated by commas
    #[arg(long, value_name = "K", value_delimiter = ',', default_values_t = [1, 5, 10])]
    recall_at: Vec<usize>,
    /// File for the results of each topic, one JSON object per topic and ranker [default: none]
    #[arg(long, value_name = "FILE")]
    per_query: Option<PathBuf>,
    /// File for a picture (SVG) of quality against cost, nDCG@10 against the time of a query [default: none]
    ///
    /// With several --model, one picture compares them. Bars are 95% confidence intervals.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    pub(super) models: ModelArgs,
}

/// BM25 or a model, its result for each topic, and the mean time of a topic.
struct Ranker {
    name: String,
    results: Vec<TopicResult>,
    seconds: f64,
}

/// One ranker's result for one topic: indices of the documents, best first, and the measures of that order.
struct TopicResult {
    order: Vec<usize>,
    measures: Measures,
}

pub(super) fn run(args: &EvalArgs) -> Result<(), Failure> {
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
    let picture = args.svg.as_deref().map(PictureFile::create).transpose()?;
    let models =
        start_models(&settings, |name, about| tracing::info!(model = name, "{about}")).map_err(Failure::of_loading)?;
    let timed = |name: &str, rank: &mut dyn FnMut() -> Result<Vec<TopicResult>>| {
        let start = Instant::now();
        let results = rank().map_err(Failure::Other)?;
        let seconds = start.elapsed().as_secs_f64() / topics.len() as f64;
        Ok::<_, Failure>(Ranker { name: name.to_owned(), results, seconds })
    };
    let mut rankers = vec![timed("BM25", &mut || Ok(bm25(&topics, &args.recall_at)))?];
    for model in models.iter() {
        rankers.push(timed(&model.name, &mut || evaluate(&models, &model.name, &topics, args))?);
    }
    if let Some(path) = &args.per_query {
        write_per_query(path, &topics, &rankers).map_err(Failure::Other)?;
    }
    print(&summary(&rankers, &args.recall_at, topics.len()))?;
    if settings.sources.iter().all(|source| source.location == ModelLocation::Builtin) {
        tracing::info!("{BUILTIN} is the built-in demonstration model; {NEXT_STEP}");
    }
    match picture {
        Some(picture) => {
            let data = args.topics.file_name().unwrap_or(args.topics.as_os_str()).to_string_lossy();
            let device = &settings.load.device;
            let title = format!("{data}, {} queries; {}, {}", topics.len(), device.place(), device.name());
            picture.write(&[chart(title, &rankers)])
        }
        None => Ok(()),
    }
}

/// Ranks each topic's documents by BM25, with the word statistics of all topics' documents.
fn bm25(topics: &[Topic], recall_at: &[usize]) -> Vec<TopicResult> {
    let mut texts: Vec<&str> = topics.iter().flat_map(|topic| topic.documents.iter().map(String::as_str)).collect();
    texts.sort_unstable();
    texts.dedup();
    let index = Bm25::new(&texts);
    let rank = |topic: &Topic| {
        let indices: Vec<usize> = topic
            .documents
            .iter()
            .map(|text| texts.binary_search(&text.as_str()).expect("every document is in the index"))
            .collect();
        let scores = index.scores(&topic.query, &indices);
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        measure(topic, order, recall_at)
    };
    topics.iter().map(rank).collect()
}

/// Ranks each topic's documents with the served model `name`.
fn evaluate(models: &Models, name: &str, topics: &[Topic], args: &EvalArgs) -> Result<Vec<TopicResult>> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the async runtime")?;
    let bar = telemetry::progress_count(topics.len() as u64, name);
    let rank = async |topic: &Topic| -> Result<TopicResult> {
        let request = RerankRequest {
            model: Some(name.to_owned()),
            ..RerankRequest::new(topic.query.clone(), topic.documents.clone().into())
        };
        let ranking = rerank(models, request).await.with_context(|| format!("topic {}", topic.id))?;
        bar.inc(1);
        Ok(measure(topic, ranking.results.iter().map(|ranked| ranked.index).collect(), &args.recall_at))
    };
    let results: Vec<Result<TopicResult>> =
        runtime.block_on(stream::iter(topics).map(rank).buffered(CONCURRENT_TOPICS).collect());
    bar.finish_and_clear();
    results.into_iter().collect()
}

fn measure(topic: &Topic, order: Vec<usize>, recall_at: &[usize]) -> TopicResult {
    let ranked: Vec<u32> = order.iter().map(|&i| topic.relevance[i]).collect();
    TopicResult { measures: Measures::of(&ranked, &topic.relevant, recall_at), order }
}

fn summary(rankers: &[Ranker], recall_at: &[usize], topics: usize) -> String {
    let mut head = vec![format!("{topics} topics"), "nDCG@10".to_owned(), "MRR@10".to_owned()];
    head.extend(recall_at.iter().map(|k| format!("recall@{k}")));
    head.push("ms/query".to_owned());
    let mut rows = vec![head];
    for ranker in rankers {
        let all: Vec<Measures> = ranker.results.iter().map(|result| result.measures.clone()).collect();
        let Some(mean) = Measures::mean(&all) else { continue };
        let values = [mean.ndcg_10, mean.mrr_10].into_iter().chain(mean.recall).map(|value| format!("{value:.4}"));
        let milliseconds = format!("{:.2}", 1e3 * ranker.seconds);
        rows.push(std::iter::once(ranker.name.clone()).chain(values).chain([milliseconds]).collect());
    }
    table(&rows)
}

/// Each ranker's mean nDCG@10, with a 95% confidence interval (1.96 standard errors), against its time.
fn chart(title: String, rankers: &[Ranker]) -> Chart {
    let point = |ranker: &Ranker| {
        let values = || ranker.results.iter().map(|result| result.measures.ndcg_10);
        let n = values().count() as f64;
        let mean = values().sum::<f64>() / n;
        let variance = values().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        let half = 1.96 * (variance / n).sqrt();
        Point {
            x: 1e3 * ranker.seconds,
            y: mean,
            interval: Some((mean - half, (mean + half).min(1.0))),
            label: ranker.name.clone(),
        }
    };
    let series = |ranker| Series { name: String::new(), points: vec![point(ranker)], line: false };
    Chart {
        title,
        x: Axis { label: "mean time of a query, ms".to_owned(), scale: Scale::Log },
        y: Axis { label: "nDCG@10 (higher is better), with 95% confidence interval".to_owned(), scale: Scale::Linear },
        series: rankers.iter().map(series).collect(),
    }
}

fn write_per_query(path: &PathBuf, topics: &[Topic], rankers: &[Ranker]) -> Result<()> {
    let mut file = BufWriter::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?);
    for (i, topic) in topics.iter().enumerate() {
        for ranker in rankers {
            let TopicResult { order, measures } = &ranker.results[i];
            let line = json!({
                "topic": topic.id, "ranker": ranker.name, "query": topic.query, "order": order,
                "ndcg@10": measures.ndcg_10, "mrr@10": measures.mrr_10, "recall": measures.recall,
            });
            writeln!(file, "{line}").with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    file.flush().with_context(|| format!("cannot write {}", path.display()))
}
