//! Reads topics: queries with candidate documents and relevance judgments. Three formats are known:
//!
//! - `.jsonl`, one topic per line: `{"query", "documents": [...], "relevance": [...]}`, or `{"query", "positive": [...],
//!   "negative": [...]}`.
//! - A folder in BEIR format (Thakur et al. 2021): `corpus.jsonl`, `queries.jsonl`, `qrels/test.tsv`. The candidates are the top
//!   documents by BM25, or come from a TREC run file.
//! - `.json` in SQuAD format (Rajpurkar et al. 2016): the relevant document of a question is its paragraph; the other candidates
//!   are other paragraphs of the file.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::bm25::Bm25;

/// A query, its candidate documents and their relevance.
#[derive(Debug, Clone)]
pub struct Topic {
    /// The query's id in the file, or its line number.
    pub id: String,
    /// The query's text.
    pub query: String,
    /// The candidates' texts: in the order of the file, of BM25 or of the run file; shuffled for SQuAD.
    pub documents: Vec<String>,
    /// Relevance of each candidate; 0 is not relevant.
    pub relevance: Vec<u32>,
    /// Relevance of each document that is judged relevant, whether a candidate or not, in any order. For recall and ideal DCG.
    pub relevant: Vec<u32>,
}

/// How to choose topics, and candidates where the file does not list them.
#[derive(Debug, Clone, Default)]
pub struct TopicOptions {
    /// BEIR: a TREC run file (`topic Q0 document rank score tag`) to take the candidates from, instead of BM25.
    pub run: Option<PathBuf>,
    /// BEIR: maximum candidates per topic.
    pub candidates: usize,
    /// SQuAD: other paragraphs among a question's candidates.
    pub negatives: usize,
    /// SQuAD: choose the other paragraphs by BM25 score (hard negatives) instead of at random.
    pub hard: bool,
    /// SQuAD: seed of the random choices.
    pub seed: u64,
    /// Maximum topics, evenly spaced over the file; `None` is all.
    pub limit: Option<usize>,
}

/// Reads the topics of a file or folder.
///
/// # Errors
/// A file is missing or does not have the expected format, or there are no topics. The message names the file and the line.
pub fn read(path: &Path, options: &TopicOptions) -> Result<Vec<Topic>> {
    let mut topics = if path.is_dir() {
        beir(path, options)
    } else if path.extension().is_some_and(|extension| extension == "json") {
        squad(path, options)
    } else {
        jsonl(path)
    }?;
    ensure!(!topics.is_empty(), "{}: no topics found", path.display());
    if let Some(limit) = options.limit.filter(|&limit| limit < topics.len()) {
        let all = topics.len();
        let kept: HashSet<usize> = (0..limit).map(|i| i * all / limit).collect();
        let mut indices = 0..all;
        topics.retain(|_| indices.next().is_some_and(|i| kept.contains(&i)));
    }
    Ok(topics)
}

/// One line of a `.jsonl` file.
#[derive(Deserialize)]
struct JsonlTopic {
    #[serde(default, alias = "_id")]
    id: Option<String>,
    query: String,
    #[serde(default)]
    documents: Vec<String>,
    #[serde(default)]
    relevance: Vec<u32>,
    #[serde(default)]
    positive: Vec<String>,
    #[serde(default)]
    negative: Vec<String>,
}

fn jsonl(path: &Path) -> Result<Vec<Topic>> {
    let topic = |(number, line): (usize, JsonlTopic)| {
        let JsonlTopic { id, query, mut documents, mut relevance, positive, negative } = line;
        ensure!(
            documents.len() == relevance.len(),
            "{}: line {}: {} documents but {} relevance values",
            path.display(),
            number,
            documents.len(),
            relevance.len()
        );
        relevance.extend(positive.iter().map(|_| 1).chain(negative.iter().map(|_| 0)));
        documents.extend(positive.into_iter().chain(negative));
        ensure!(!documents.is_empty(), "{}: line {number}: the topic has no documents", path.display());
        let relevant = relevance.iter().copied().filter(|&relevance| relevance > 0).collect();
        Ok(Topic { id: id.unwrap_or_else(|| number.to_string()), query, documents, relevance, relevant })
    };
    json_lines(path)?.into_iter().map(topic).collect()
}

#[derive(Deserialize)]
struct BeirText {
    #[serde(rename = "_id")]
    id: String,
    #[serde(default)]
    title: String,
    text: String,
}

fn beir(folder: &Path, options: &TopicOptions) -> Result<Vec<Topic>> {
    let texts_of = |file: &str| -> Result<Vec<BeirText>> {
        Ok(json_lines(&folder.join(file))?.into_iter().map(|(_, text)| text).collect())
    };
    let (corpus, queries) = (texts_of("corpus.jsonl")?, texts_of("queries.jsonl")?);
    let qrels = qrels(&folder.join("qrels/test.tsv"))?;
    let texts: Vec<String> =
        corpus.iter().map(|text| format!("{} {}", text.title, text.text).trim().to_owned()).collect();
    let index_of: HashMap<&str, usize> = corpus.iter().enumerate().map(|(i, text)| (text.id.as_str(), i)).collect();
    let run = options.run.as_deref().map(read_run).transpose()?;
    let index = run.is_none().then(|| Bm25::new(&texts.iter().map(String::as_str).collect::<Vec<_>>()));
    let mut topics = Vec::new();
    for query in queries {
        let Some(judged) = qrels.get(&query.id) else { continue };
        let candidates: Vec<usize> = match (&run, &index) {
            (Some(run), _) => {
                run.get(&query.id).into_iter().flatten().filter_map(|id| index_of.get(id.as_str()).copied()).collect()
            }
            (None, Some(index)) => index.best(&query.text, options.candidates),
            (None, None) => Vec::new(),
        };
        let relevance = candidates
            .iter()
            .take(options.candidates)
            .map(|&i| judged.get(&corpus[i].id).copied().unwrap_or(0))
            .collect();
        topics.push(Topic {
            id: query.id,
            query: query.text,
            documents: candidates.iter().take(options.candidates).map(|&i| texts[i].clone()).collect(),
            relevance,
            relevant: judged.values().copied().filter(|&relevance| relevance > 0).collect(),
        });
    }
    Ok(topics)
}

/// Reads relevance judgments by query and document: `query-id corpus-id score` with a header line (BEIR), or `query-id iteration
/// document-id relevance` (TREC). Negative relevance counts as 0.
fn qrels(path: &Path) -> Result<HashMap<String, BTreeMap<String, u32>>> {
    let mut all: HashMap<String, BTreeMap<String, u32>> = HashMap::new();
    for (number, line) in lines(path)?.into_iter().enumerate() {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let (topic, document, relevance) = match columns[..] {
            [topic, document, relevance] | [topic, _, document, relevance] => (topic, document, relevance),
            [] => continue,
            _ => bail!("{}: line {}: expected query-id, corpus-id and score", path.display(), number + 1),
        };
        match relevance.parse::<i64>() {
            Ok(relevance) => {
                all.entry(topic.to_owned())
                    .or_default()
                    .insert(document.to_owned(), u32::try_from(relevance).unwrap_or(0));
            }
            Err(_) if number == 0 => {} // the header
            Err(_) => bail!("{}: line {}: {relevance:?} is not an integer relevance", path.display(), number + 1),
        }
    }
    Ok(all)
}

/// Reads a TREC run file: the documents of each topic, highest score first.
fn read_run(path: &Path) -> Result<HashMap<String, Vec<String>>> {
    let mut all: HashMap<String, Vec<(f64, String)>> = HashMap::new();
    for (number, line) in lines(path)?.into_iter().enumerate() {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let [topic, _, document, _, score, ..] = columns[..] else {
            bail!("{}: line {}: expected topic Q0 document rank score tag", path.display(), number + 1)
        };
        let score = score
            .parse()
            .with_context(|| format!("{}: line {}: {score:?} is not a number", path.display(), number + 1))?;
        all.entry(topic.to_owned()).or_default().push((score, document.to_owned()));
    }
    let sorted = |mut found: Vec<(f64, String)>| {
        found.sort_by(|a, b| b.0.total_cmp(&a.0));
        found.into_iter().map(|(_, document)| document).collect()
    };
    Ok(all.into_iter().map(|(topic, found)| (topic, sorted(found))).collect())
}

#[derive(Deserialize)]
struct Squad {
    data: Vec<SquadArticle>,
}

#[derive(Deserialize)]
struct SquadArticle {
    paragraphs: Vec<SquadParagraph>,
}

#[derive(Deserialize)]
struct SquadParagraph {
    context: String,
    qas: Vec<SquadQuestion>,
}

#[derive(Deserialize)]
struct SquadQuestion {
    id: String,
    question: String,
}

fn squad(path: &Path, options: &TopicOptions) -> Result<Vec<Topic>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file: Squad =
        serde_json::from_str(&text).with_context(|| format!("{}: not in SQuAD format", path.display()))?;
    let paragraphs: Vec<SquadParagraph> = file.data.into_iter().flat_map(|article| article.paragraphs).collect();
    let texts: Vec<&str> = paragraphs.iter().map(|paragraph| paragraph.context.as_str()).collect();
    ensure!(
        texts.len() > options.negatives,
        "{}: {} paragraphs are too few for --negatives {}",
        path.display(),
        texts.len(),
        options.negatives
    );
    let index = options.hard.then(|| Bm25::new(&texts));
    let mut random = fastrand::Rng::with_seed(options.seed);
    let mut topics = Vec::new();
    for (gold, paragraph) in paragraphs.iter().enumerate() {
        for question in &paragraph.qas {
            let mut others: Vec<usize> = match &index {
                Some(index) => index.best(&question.question, options.negatives + 1),
                None => Vec::new(),
            };
            others.retain(|&other| other != gold);
            while others.len() < options.negatives {
                let other = random.usize(..texts.len());
                if other != gold && !others.contains(&other) {
                    others.push(other);
                }
            }
            let mut candidates = others;
            candidates.truncate(options.negatives);
            candidates.push(gold);
            random.shuffle(&mut candidates);
            topics.push(Topic {
                id: question.id.clone(),
                query: question.question.clone(),
                documents: candidates.iter().map(|&i| texts[i].to_owned()).collect(),
                relevance: candidates.iter().map(|&i| u32::from(i == gold)).collect(),
                relevant: vec![1],
            });
        }
    }
    Ok(topics)
}

fn lines(path: &Path) -> Result<Vec<String>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    BufReader::new(file)
        .lines()
        .collect::<std::io::Result<_>>()
        .with_context(|| format!("{}: cannot be read as UTF-8 text", path.display()))
}

/// Parses each line that is not blank. Each value comes with its line number, from 1.
fn json_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<(usize, T)>> {
    let parse = |(number, line): (usize, String)| {
        let value = serde_json::from_str(&line).with_context(|| format!("{}: line {number}", path.display()))?;
        Ok((number, value))
    };
    (1..).zip(lines(path)?).filter(|(_, line)| !line.trim().is_empty()).map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    fn options() -> TopicOptions {
        TopicOptions { candidates: 2, negatives: 1, seed: 7, ..TopicOptions::default() }
    }

    #[test]
    fn jsonl_topics_in_both_forms() {
        let text = "{\"query\":\"q\",\"documents\":[\"a\",\"b\"],\"relevance\":[0,2]}\n\n{\"id\":\"x\",\"query\":\"r\",\"positive\":[\"c\"],\"negative\":[\"d\",\"e\"]}\n";
        let folder = written(&[("t.jsonl", text), ("bad.jsonl", "\n\n{\"query\":\"q\",\"documents\":[\"a\"]}\n")]);
        let topics = read(&folder.path().join("t.jsonl"), &options()).unwrap();
        assert_eq!((topics[0].relevance.clone(), topics[0].relevant.clone()), (vec![0, 2], vec![2]));
        assert_eq!(
            (topics[1].id.as_str(), topics[1].documents.len(), topics[1].relevance.clone()),
            ("x", 3, vec![1, 0, 0])
        );
        let error = read(&folder.path().join("bad.jsonl"), &options()).unwrap_err().to_string();
        assert!(error.contains("line 3: 1 documents but 0 relevance values"), "{error}");
    }

    #[test]
    fn beir_candidates_come_from_bm25_or_a_run_file() {
        let corpus = "{\"_id\":\"d1\",\"title\":\"Apples\",\"text\":\"red fruit\"}\n{\"_id\":\"d2\",\"title\":\"\",\"text\":\"a green pear\"}\n{\"_id\":\"d3\",\"text\":\"stone\"}\n";
        let queries = "{\"_id\":\"q1\",\"text\":\"green apples\"}\n{\"_id\":\"q2\",\"text\":\"unjudged\"}\n";
        let qrels = "query-id\tcorpus-id\tscore\nq1\td2\t1\nq1\td3\t2\n";
        let folder = written(&[
            ("corpus.jsonl", corpus),
            ("queries.jsonl", queries),
            ("qrels/test.tsv", qrels),
            ("run", "q1 Q0 d3 2 0.5 x\nq1 Q0 d1 1 0.9 x\n"),
        ]);
        let topics = read(folder.path(), &options()).unwrap();
        assert_eq!(topics.len(), 1);
        assert_eq!((topics[0].documents.len(), topics[0].relevant.clone()), (2, vec![1, 2]));
        let run = TopicOptions { run: Some(folder.path().join("run")), ..options() };
        let topics = read(folder.path(), &run).unwrap();
        assert_eq!(
            (topics[0].documents.clone(), topics[0].relevance.clone()),
            (vec!["Apples red fruit".to_owned(), "stone".to_owned()], vec![0, 2])
        );
    }

    #[test]
    fn squad_candidates_are_the_paragraph_and_others() {
        let paragraph = |i: usize| {
            format!(
                "{{\"context\":\"word{i} text\",\"qas\":[{{\"id\":\"{i}\",\"question\":\"what is word{i} text\"}}]}}"
            )
        };
        let text =
            format!("{{\"data\":[{{\"paragraphs\":[{}]}}]}}", (0..20).map(paragraph).collect::<Vec<_>>().join(","));
        let folder = written(&[("s.json", &text)]);
        for hard in [false, true] {
            let options = TopicOptions { negatives: 9, hard, ..options() };
            let topics = read(&folder.path().join("s.json"), &options).unwrap();
            assert_eq!(topics.len(), 20);
            for (i, topic) in topics.iter().enumerate() {
                assert_eq!(topic.documents.iter().collect::<HashSet<_>>().len(), 10);
                let gold = topic.relevance.iter().position(|&r| r == 1).unwrap();
                assert_eq!(topic.documents[gold], format!("word{i} text"));
            }
            assert!(topics.iter().any(|topic| topic.relevance[0] == 0), "the gold paragraph is not always first");
        }
        let few = TopicOptions { limit: Some(5), negatives: 9, ..options() };
        let ids: Vec<String> = read(&folder.path().join("s.json"), &few).unwrap().into_iter().map(|t| t.id).collect();
        assert_eq!(ids, ["0", "4", "8", "12", "16"]);
    }
}
