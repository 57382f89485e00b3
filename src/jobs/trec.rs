//! Queries from a TREC run (`query Q0 document rank score tag`), with the texts of its queries and documents from two more files.
//!
//! The run is streamed, and the lines of one query must follow each other. The queries' texts are kept in memory; of the
//! collection only an index, of 16 bytes per document.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::value::to_raw_value;

use super::job::{JobId, JobRecord, JobSource, RankJob};
use super::lines::{LinePosition, LineReader, Shard, is_regular_file};

/// Maximum bytes of a line of a run.
const MAX_RUN_LINE_BYTES: u64 = 64 << 10;

/// Reads a run, one query at a time.
pub(crate) struct TrecSource {
    lines: LineReader,
    /// The next line, if it was read already, and where it starts.
    ahead: Option<RunLine>,
    queries: HashMap<String, String>,
    collection: Collection,
    /// Hashes of the queries that were read, to find one that occurs in two places.
    seen: HashSet<u64>,
}

struct RunLine {
    query: String,
    document: String,
    start: LinePosition,
}

impl TrecSource {
    /// Reads the queries and indexes the collection. A shard has the queries whose first line starts in its range of the run.
    ///
    /// # Errors
    /// A file cannot be read or is not in the expected format. The message names the file and the line.
    pub(crate) fn open(
        mut lines: LineReader,
        shard: Shard,
        resume: Option<LinePosition>,
        queries: &Path,
        collection: &Path,
    ) -> Result<Self> {
        if let Some(position) = resume {
            lines.resume(position)?;
        }
        let before = if shard.is_whole() { None } else { lines.previous_line(MAX_RUN_LINE_BYTES)? };
        let mut source = Self {
            lines,
            ahead: None,
            queries: read_queries(queries)?,
            collection: Collection::open(collection)?,
            seen: HashSet::new(),
        };
        // The rest of the previous shard's last query.
        if let Some(previous) = before.as_deref().and_then(|line| std::str::from_utf8(line).ok()) {
            let previous = previous.split_whitespace().next().unwrap_or_default();
            source.ahead = source.read_line()?;
            while source.ahead.as_ref().is_some_and(|line| line.query == previous) {
                source.ahead = source.read_line()?;
            }
        }
        Ok(source)
    }

    fn read_line(&mut self) -> Result<Option<RunLine>> {
        let mut bytes = Vec::new();
        let start = self.lines.position();
        let Some(fits) = self.lines.next_line(&mut bytes)? else { return Ok(None) };
        let place = || self.lines.numbers().describe(self.lines.position().lines);
        ensure!(fits && bytes.len() as u64 <= MAX_RUN_LINE_BYTES, "{}: the line is too long", place());
        let text = std::str::from_utf8(&bytes).with_context(|| format!("{}: not UTF-8", place()))?;
        let columns: Vec<&str> = text.split_whitespace().collect();
        // A blank line is an error too: as the line before a shard, it would not tell whether the shard begins within a query.
        let [query, _, document, _, _, ..] = columns[..] else {
            bail!("{}: expected query Q0 document rank score tag", place());
        };
        Ok(Some(RunLine { query: query.to_owned(), document: document.to_owned(), start }))
    }

    /// The texts of a query and its documents.
    fn job(&mut self, query: &str, documents: Vec<String>) -> Result<Result<RankJob, String>> {
        let Some(text) = self.queries.get(query) else {
            return Ok(Err(format!("query {query:?} is not in the file of queries")));
        };
        let text = text.clone();
        let mut texts = Vec::with_capacity(documents.len());
        for id in &documents {
            match self.collection.text(id)? {
                Some(text) => texts.push(text),
                None => return Ok(Err(format!("query {query:?}: document {id:?} is not in the collection"))),
            }
        }
        let document_ids = documents.iter().map(|id| Some(json_id(id))).collect();
        Ok(Ok(RankJob { id: Some(json_id(query)), query: text, texts: texts.into(), document_ids }))
    }
}

impl JobSource for TrecSource {
    fn next(&mut self) -> Result<Option<JobRecord>> {
        let first = match self.ahead.take() {
            Some(line) => line,
            None => match self.read_line()? {
                Some(line) => line,
                None => return Ok(None),
            },
        };
        if self.lines.is_past(first.start.offset) {
            return Ok(None);
        }
        let line = first.start.lines + 1;
        if !self.seen.insert(hash(&first.query)) {
            bail!(
                "{}: query {:?} occurs in two places; sort the run by query",
                self.lines.numbers().describe(line),
                first.query
            );
        }
        let mut documents = vec![first.document];
        self.ahead = loop {
            match self.read_line()? {
                Some(next) if next.query == first.query => documents.push(next.document),
                next => break next,
            }
        };
        let end = self.ahead.as_ref().map_or(self.lines.position(), |next| next.start);
        let job = self.job(&first.query, documents)?;
        let bytes = job.as_ref().map_or(0, |job| job.texts.iter().map(String::len).sum());
        Ok(Some(JobRecord { job, id: Some(json_id(&first.query)), line, end, bytes }))
    }
}

fn json_id(id: &str) -> JobId {
    to_raw_value(id).expect("a string is valid JSON")
}

fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// A line of a file of texts in JSON: BEIR's `_id`, `title` and `text`, or Pyserini's `id` and `contents`.
#[derive(Deserialize)]
struct TextLine {
    #[serde(alias = "_id", alias = "docid", alias = "qid")]
    id: String,
    #[serde(default)]
    title: String,
    #[serde(alias = "contents", alias = "query")]
    text: String,
}

/// The id and the text of a line: JSON, or `id<TAB>text`.
fn parse_text(line: &str) -> Result<(String, String), String> {
    if line.starts_with('{') {
        let TextLine { id, title, text } = serde_json::from_str(line).map_err(|error| error.to_string())?;
        let text = if title.is_empty() { text } else { format!("{title} {text}") };
        return Ok((id, text));
    }
    match line.split_once('\t') {
        Some((id, text)) => Ok((id.trim().to_owned(), text.trim_end_matches('\r').to_owned())),
        None => Err("expected id<TAB>text, or a JSON object".to_owned()),
    }
}

/// Calls `each` with the offset, the id and the text of each line that is not blank.
fn for_each_text(path: &Path, mut each: impl FnMut(u64, String, String)) -> Result<()> {
    let file = File::open(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let mut input = BufReader::with_capacity(1 << 18, file);
    let (mut line, mut offset, mut number) = (String::new(), 0, 0);
    loop {
        line.clear();
        number += 1;
        let place = || format!("{}: line {number}", path.display());
        let read = input.read_line(&mut line).with_context(place)?;
        if read == 0 {
            return Ok(());
        }
        let text = line.trim_end_matches('\n');
        if !text.trim().is_empty() {
            let (id, text) = parse_text(text).map_err(|problem| anyhow::anyhow!("{}: {problem}", place()))?;
            each(offset, id, text);
        }
        offset += read as u64;
    }
}

fn read_queries(path: &Path) -> Result<HashMap<String, String>> {
    let mut queries = HashMap::new();
    for_each_text(path, |_, id, text| {
        queries.insert(id, text);
    })?;
    ensure!(!queries.is_empty(), "{}: there are no queries", path.display());
    Ok(queries)
}

/// Documents on disk, found by their ids.
struct Collection {
    path: PathBuf,
    file: BufReader<File>,
    /// Hash of the id and offset of the line, sorted.
    index: Vec<(u64, u64)>,
}

impl Collection {
    fn open(path: &Path) -> Result<Self> {
        ensure!(is_regular_file(path), "{}: the collection must be a regular file", path.display());
        let mut index = Vec::new();
        for_each_text(path, |offset, id, _| index.push((hash(&id), offset)))?;
        index.sort_unstable();
        index.shrink_to_fit();
        let file = File::open(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        Ok(Self { path: path.to_owned(), file: BufReader::new(file), index })
    }

    /// The text of a document; of the first one if its id occurs twice.
    fn text(&mut self, id: &str) -> Result<Option<String>> {
        let hash = hash(id);
        let start = self.index.partition_point(|&(other, _)| other < hash);
        let mut line = String::new();
        for &(_, offset) in self.index[start..].iter().take_while(|&&(other, _)| other == hash) {
            line.clear();
            let read = self.file.seek(SeekFrom::Start(offset)).and_then(|_| self.file.read_line(&mut line));
            read.with_context(|| format!("{}: cannot be read", self.path.display()))?;
            match parse_text(line.trim_end_matches('\n')) {
                Ok((found, text)) if found == id => return Ok(Some(text)),
                _ => {}
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(folder: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Each query's id and its documents' texts.
    fn read(run: &str, shard: &str) -> Result<Vec<(String, Vec<String>)>> {
        let folder = tempfile::tempdir().unwrap();
        let queries = written(&folder, "q.tsv", "1\tone\n2\ttwo\n3\tthree\n");
        let collection = written(
            &folder,
            "c.jsonl",
            "{\"_id\":\"a\",\"title\":\"T\",\"text\":\"A\"}\n\n{\"id\":\"b\",\"contents\":\"B\"}\nc\tC d\r\n",
        );
        let run = written(&folder, "run", run);
        let mut source = {
            let shard = shard.parse().unwrap();
            TrecSource::open(LineReader::open(&run, shard)?, shard, None, &queries, &collection)?
        };
        let mut all = Vec::new();
        while let Some(record) = source.next()? {
            let id: String = serde_json::from_str(record.id.unwrap().get())?;
            all.push((id, record.job.map_or_else(|error| vec![error], |job| job.texts.to_vec())));
        }
        Ok(all)
    }

    const RUN: &str = "1 Q0 a 1 9 x\n1 Q0 b 2 8 x\n2\tQ0\tc\t1\t9\tx\n3 Q0 b 1 9 x\n3 Q0 a 2 9 x\n3 Q0 c 3 1 x\n";

    #[test]
    fn lines_of_a_query_are_one_job_with_the_texts_of_its_documents() {
        let all = read(RUN, "0/1").unwrap();
        let expected = [("1", vec!["T A", "B"]), ("2", vec!["C d"]), ("3", vec!["B", "T A", "C d"])];
        assert_eq!(
            all,
            expected.map(|(id, texts)| (id.to_owned(), texts.into_iter().map(str::to_owned).collect::<Vec<_>>()))
        );
    }

    #[test]
    fn shards_have_whole_queries() {
        let whole = read(RUN, "0/1").unwrap();
        for count in 1..=RUN.len() + 1 {
            let joined: Vec<_> = (0..count).flat_map(|i| read(RUN, &format!("{i}/{count}")).unwrap()).collect();
            assert_eq!(joined, whole, "{count} shards");
        }
    }

    #[test]
    fn unknown_queries_and_documents_are_errors_of_their_query() {
        let all = read("9 Q0 a 1 9 x\n1 Q0 z 1 9 x\n2 Q0 a 1 9 x\n", "0/1").unwrap();
        assert!(all[0].1[0].contains("\"9\" is not in") && all[1].1[0].contains("\"z\" is not in"), "{all:?}");
        assert_eq!(all[2].1, ["T A"]);
    }

    #[test]
    fn a_run_that_is_not_sorted_by_query_is_refused_with_the_line() {
        let error = read("1 Q0 a 1 9 x\n2 Q0 a 1 9 x\n1 Q0 b 2 8 x\n", "0/1").unwrap_err().to_string();
        assert!(error.contains("line 3: query \"1\" occurs in two places"), "{error}");
        let error = read("1 Q0 a\n", "0/1").unwrap_err().to_string();
        assert!(error.contains("line 1: expected query Q0 document rank score tag"), "{error}");
    }
}
