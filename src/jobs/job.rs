//! A query with its documents, and its answer as text.

use std::sync::Arc;

use anyhow::Result;
use serde::Serialize;
use serde_json::value::RawValue;

use super::lines::LinePosition;

/// An id as it stands in the input: a JSON string or number.
pub(crate) type JobId = Box<RawValue>;

/// A query and the documents to rank.
#[derive(Debug)]
pub(crate) struct RankJob {
    pub(crate) id: Option<JobId>,
    /// Not empty.
    pub(crate) query: String,
    pub(crate) texts: Arc<[String]>,
    /// The id of each text.
    pub(crate) document_ids: Vec<Option<JobId>>,
}

/// A unit of the input: a line of JSON, or a query's lines of a run.
#[derive(Debug)]
pub(crate) struct JobRecord {
    /// The job, or why it cannot be ranked.
    pub(crate) job: Result<RankJob, String>,
    /// The query's id, if it could be read.
    pub(crate) id: Option<JobId>,
    /// Its first line, counted from 1 in the shard.
    pub(crate) line: u64,
    /// The input's position after it.
    pub(crate) end: LinePosition,
    /// Bytes of text that are kept until the answer is written.
    pub(crate) bytes: usize,
}

/// Where queries come from.
pub(crate) trait JobSource: Send {
    /// The next query; `None` at the end of the shard.
    ///
    /// # Errors
    /// The input cannot be read. A query that cannot be ranked is not an error here.
    fn next(&mut self) -> Result<Option<JobRecord>>;
}

/// The score of one document.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct JobScore {
    /// Position in the query's documents.
    pub(crate) index: usize,
    /// In JSON a score in [0, 1]; in a run the model's logit, which does not saturate.
    pub(crate) score: f64,
}

/// Why a query has no ranking.
#[derive(Debug)]
pub(crate) enum JobError {
    /// This query cannot be ranked; others may succeed.
    Query(String),
    /// No server can be reached or has room. A later run may succeed.
    Unavailable(anyhow::Error),
    /// No query can succeed.
    Fatal(anyhow::Error),
}

/// Format of the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ResultFormat {
    /// JSON Lines: {"id", "results": [{"index", "id", "relevance_score"}]}
    Jsonl,
    /// TREC run: `query Q0 document rank score tag`; the score is the model's logit
    Trec,
}

/// The last column of a run.
const TREC_TAG: &str = "rerankd";

#[derive(Serialize)]
struct ResultLine<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a RawValue>,
    results: Vec<ResultEntry<'a>>,
}

#[derive(Serialize)]
struct ResultEntry<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a RawValue>,
    relevance_score: f64,
}

#[derive(Serialize)]
struct ErrorLine<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a RawValue>,
    error: &'a str,
}

impl ResultFormat {
    /// Appends the lines of a query's ranking, best first.
    ///
    /// # Errors
    /// A run needs ids without spaces.
    pub(crate) fn write(self, job: &RankJob, ranking: &[JobScore], out: &mut Vec<u8>) -> Result<(), String> {
        match self {
            Self::Jsonl => {
                let entry = |scored: &JobScore| ResultEntry {
                    index: scored.index,
                    id: job.document_ids[scored.index].as_deref(),
                    relevance_score: scored.score,
                };
                let line = ResultLine { id: job.id.as_deref(), results: ranking.iter().map(entry).collect() };
                write_line(&line, out);
            }
            Self::Trec => {
                let query = column(job.id.as_deref(), "the query")?;
                let start = out.len();
                for (rank, scored) in (1..).zip(ranking) {
                    let document = column(job.document_ids[scored.index].as_deref(), "a document");
                    let document = document.inspect_err(|_| out.truncate(start))?;
                    let logit = scored.score as f32;
                    out.extend(format!("{query} Q0 {document} {rank} {logit} {TREC_TAG}\n").as_bytes());
                }
            }
        }
        Ok(())
    }

    /// Appends the line of a query that could not be ranked. A run has no place for it.
    pub(crate) fn write_error(self, id: Option<&RawValue>, error: &str, out: &mut Vec<u8>) {
        match self {
            Self::Jsonl => write_line(&ErrorLine { id, error }, out),
            Self::Trec => {}
        }
    }
}

fn write_line(line: &impl Serialize, out: &mut Vec<u8>) {
    serde_json::to_writer(&mut *out, line).expect("numbers are finite, and a vector takes every write");
    out.push(b'\n');
}

/// An id as a column of a run.
fn column(id: Option<&RawValue>, whose: &str) -> Result<String, String> {
    let raw = id.ok_or_else(|| format!("{whose} has no id; a TREC run needs one"))?.get();
    let text = serde_json::from_str::<String>(raw).unwrap_or_else(|_| raw.to_owned());
    if text.is_empty() || text.contains(char::is_whitespace) {
        return Err(format!("the id {text:?} of {whose} is empty or has spaces; a TREC run cannot hold it"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(text: &str) -> JobId {
        serde_json::from_str(text).unwrap()
    }

    fn written(format: ResultFormat, id: Option<&str>, document_ids: &[Option<&str>]) -> Result<String, String> {
        let job = RankJob {
            id: id.map(raw),
            query: "q".to_owned(),
            texts: document_ids.iter().map(|_| String::new()).collect(),
            document_ids: document_ids.iter().map(|id| id.map(raw)).collect(),
        };
        let ranking = [JobScore { index: 1, score: 0.75 }, JobScore { index: 0, score: f64::from(-0.1_f32) }];
        let mut out = b"before\n".to_vec();
        let result = format.write(&job, &ranking, &mut out);
        let text = String::from_utf8(out).unwrap();
        if result.is_err() {
            assert_eq!(text, "before\n", "nothing is written for a query that fails");
        }
        result.map(|()| text["before\n".len()..].to_owned())
    }

    #[test]
    fn ids_are_repeated_as_they_are() {
        let line = written(ResultFormat::Jsonl, Some("12345678901234567890123"), &[None, Some("\"d\\u00e9\"")]);
        let expected = r#"{"id":12345678901234567890123,"results":[{"index":1,"id":"d\u00e9","relevance_score":0.75},{"index":0,"relevance_score":-0.10000000149011612}]}"#;
        assert_eq!(line.unwrap(), format!("{expected}\n"));
        assert!(written(ResultFormat::Jsonl, None, &[None, None]).unwrap().starts_with("{\"results\""));
    }

    #[test]
    fn a_run_has_six_columns_and_the_shortest_decimals_of_the_logit() {
        let run = written(ResultFormat::Trec, Some("7"), &[Some("\"a\""), Some("\"b\"")]);
        assert_eq!(run.unwrap(), "7 Q0 b 1 0.75 rerankd\n7 Q0 a 2 -0.1 rerankd\n");
    }

    #[test]
    fn a_run_needs_ids_without_spaces() {
        for (id, documents) in
            [(None, [Some("1"), Some("2")]), (Some("1"), [None, Some("2")]), (Some("\"a b\""), [Some("1"), Some("2")])]
        {
            assert!(written(ResultFormat::Trec, id, &documents).is_err(), "{id:?} {documents:?}");
        }
    }
}
