//! Queries from JSON Lines: `{"id", "query", "documents": [text, or {"id", "text"}]}`.

use anyhow::Result;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::job::{JobId, JobRecord, JobSource, RankJob};
use super::lines::{LinePosition, LineReader};
use crate::bounded_list::BoundedList;

/// Maximum documents of one query.
const MAX_DOCUMENTS: usize = 100_000;

/// Reads one query per line. Blank lines are skipped.
pub(crate) struct JsonlSource {
    lines: LineReader,
    line: Vec<u8>,
}

impl JsonlSource {
    /// Begins at the start of the shard, or goes on at a later position.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(crate) fn open(mut lines: LineReader, resume: Option<LinePosition>) -> Result<Self> {
        if let Some(position) = resume {
            lines.resume(position)?;
        }
        Ok(Self { lines, line: Vec::new() })
    }
}

impl JobSource for JsonlSource {
    fn next(&mut self) -> Result<Option<JobRecord>> {
        while !self.lines.is_past_end() {
            let Some(fits) = self.lines.next_line(&mut self.line)? else { return Ok(None) };
            let blank = self.line.iter().all(u8::is_ascii_whitespace);
            if fits && blank {
                continue;
            }
            let job = if fits { parse(&self.line) } else { Err("the line has more than 64 MiB".to_owned()) };
            let id = match &job {
                Ok(job) => job.id.clone(),
                Err(_) => readable_id(&self.line),
            };
            let end = self.lines.position();
            return Ok(Some(JobRecord { job, id, line: end.lines, end, bytes: self.line.len() }));
        }
        Ok(None)
    }
}

#[derive(Deserialize)]
struct JobLine<'a> {
    #[serde(borrow, default)]
    id: Option<&'a RawValue>,
    query: String,
    #[serde(borrow)]
    documents: RawDocuments<'a>,
}

/// At most [`MAX_DOCUMENTS`] documents, not parsed yet. A longer list is refused while it is read: many short documents take more
/// memory than their JSON.
struct RawDocuments<'a>(Vec<&'a RawValue>);

impl<'de: 'a, 'a> Deserialize<'de> for RawDocuments<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(BoundedList::new(MAX_DOCUMENTS, "documents")).map(Self)
    }
}

#[derive(Deserialize)]
struct JobLineId {
    id: JobId,
}

#[derive(Deserialize)]
struct JobDocument<'a> {
    #[serde(borrow, default)]
    id: Option<&'a RawValue>,
    text: String,
}

/// The id of a line that is not valid otherwise.
fn readable_id(line: &[u8]) -> Option<JobId> {
    let JobLineId { id } = serde_json::from_slice(line).ok()?;
    checked_id("id", Some(&id)).ok().flatten()
}

fn parse(line: &[u8]) -> Result<RankJob, String> {
    let JobLine { id, query, documents: RawDocuments(documents) } =
        serde_json::from_slice(line).map_err(|error| without_line(&error))?;
    if query.trim().is_empty() {
        return Err("query: is empty".to_owned());
    }
    let (mut texts, mut document_ids) = (Vec::with_capacity(documents.len()), Vec::with_capacity(documents.len()));
    for (i, document) in documents.into_iter().enumerate() {
        let raw = document.get();
        let (id, text) = if raw.starts_with('{') {
            let document: JobDocument<'_> =
                serde_json::from_str(raw).map_err(|error| format!("documents[{i}]: {}", without_line(&error)))?;
            (checked_id(&format!("documents[{i}].id"), document.id)?, document.text)
        } else {
            let text = serde_json::from_str(raw)
                .map_err(|_| format!("documents[{i}]: expected a text, or an object with a text"))?;
            (None, text)
        };
        texts.push(text);
        document_ids.push(id);
    }
    Ok(RankJob { id: checked_id("id", id)?, query, texts: texts.into(), document_ids })
}

/// A JSON string or number; null counts as no id.
fn checked_id(field: &str, id: Option<&RawValue>) -> Result<Option<JobId>, String> {
    match id.map(RawValue::get) {
        None | Some("null") => Ok(None),
        Some(raw) if raw.starts_with(|first: char| first == '"' || first == '-' || first.is_ascii_digit()) => {
            Ok(id.map(ToOwned::to_owned))
        }
        Some(_) => Err(format!("{field}: expected a string or a number")),
    }
}

/// The message without "at line 1", because the line's number in its file is named beside it.
fn without_line(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", " at column ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_texts_or_objects_and_ids_are_strings_or_numbers() {
        let job =
            parse(br#" {"id":7,"query":"q","documents":["a",{"text":"b","id":"x","more":[]}],"more":1} "#).unwrap();
        assert_eq!((job.id.unwrap().get(), job.query.as_str()), ("7", "q"));
        assert_eq!(*job.texts, ["a", "b"]);
        assert_eq!(job.document_ids[1].as_ref().map(|id| id.get()), Some("\"x\""));
        assert!(job.document_ids[0].is_none());
        assert!(parse(br#"{"id":null,"query":"q","documents":[]}"#).unwrap().id.is_none());
    }

    #[test]
    fn an_error_names_the_field_and_not_the_line() {
        for (line, named) in [
            ("{}", "query"),
            (r#"{"query":"q"}"#, "documents"),
            (r#"{"query":" ","documents":["a"]}"#, "query"),
            (r#"{"query":"q","documents":["a",7]}"#, "documents[1]"),
            (r#"{"query":"q","documents":["a",{"id":1}]}"#, "documents[1]: missing field `text`"),
            (r#"{"query":"q","documents":[{"id":[],"text":"t"}]}"#, "documents[0].id"),
            (r#"{"id":{},"query":"q","documents":["a"]}"#, "id:"),
            (r#"{"query":"q","documents":["a"]"#, "column"),
            ("\u{fffd}", "column"),
        ] {
            let error = parse(line.as_bytes()).expect_err(line);
            assert!(error.contains(named) && !error.contains("line 1"), "{line}: {error}");
        }
        let many = format!(r#"{{"query":"q","documents":[{}""]}}"#, r#""","#.repeat(MAX_DOCUMENTS));
        assert!(parse(many.as_bytes()).unwrap_err().contains("more than 100000"));
        assert!(parse(b"{\"query\":\"\xff\",\"documents\":[]}").is_err());
    }

    #[test]
    fn the_id_of_a_bad_line_is_kept_if_it_can_be_read() {
        assert_eq!(readable_id(br#"{"id":"x","query":7}"#).unwrap().get(), "\"x\"");
        assert!(readable_id(b"{").is_none() && readable_id(br#"{"id":[]}"#).is_none());
    }
}
