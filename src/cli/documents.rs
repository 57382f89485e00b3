//! The documents of `rerankd rank`: files, folders, patterns, and lines of standard input.

use std::fs::File;
use std::io::{BufRead, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use glob::MatchOptions;
use walkdir::{DirEntry, WalkDir};

/// Documents and their names: paths or line numbers.
#[derive(Debug, Default)]
pub(super) struct NamedDocuments {
    pub(super) names: Vec<String>,
    pub(super) texts: Vec<String>,
}

/// Reads the documents that `arguments` name, in their order. Without arguments each line of standard input is a document. The rest
/// of a file after `max_chars` characters may be left out.
///
/// # Errors
/// A path does not exist, a pattern matches no file, or a file that is named or matched cannot be read as text; there is no
/// document. The message says what to type instead.
pub(super) fn read_documents(arguments: &[PathBuf], max_chars: usize) -> Result<NamedDocuments> {
    let mut documents = NamedDocuments::default();
    let lines_only = [PathBuf::from("-")];
    for argument in if arguments.is_empty() { &lines_only } else { arguments } {
        if argument.as_os_str() == "-" {
            documents.add_lines()?;
        } else if argument.is_dir() {
            documents.add_folder(argument, max_chars)?;
        } else if argument.exists() {
            documents.add_file(argument, max_chars)?;
        } else {
            for path in matches(argument)? {
                documents.add_file(&path, max_chars)?;
            }
        }
    }
    ensure!(
        !documents.texts.is_empty(),
        "there is nothing to rank: name files, or write one document per line to standard input"
    );
    let html = documents.texts.iter().filter(|text| is_html(text)).count();
    if html > 0 {
        tracing::warn!(
            "{html} of {} documents are HTML, whose tags are ranked as text; to rank the text only, convert each first: \
             w3m -dump page.html > page.txt",
            documents.texts.len()
        );
    }
    Ok(documents)
}

impl NamedDocuments {
    fn add(&mut self, name: String, text: String) {
        self.names.push(name);
        self.texts.push(text);
    }

    fn add_lines(&mut self) -> Result<()> {
        let input = std::io::stdin();
        if input.is_terminal() {
            writeln!(std::io::stderr(), "reading documents from the terminal, one per line; end with Ctrl-D").ok();
        }
        for (i, line) in input.lock().lines().enumerate() {
            self.add(format!("line {}", i + 1), line.context("standard input cannot be read as UTF-8 text")?);
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path, max_chars: usize) -> Result<()> {
        let text = read_text(path, max_chars)?;
        self.add(path.display().to_string(), text);
        Ok(())
    }

    /// Adds the text files of a folder and its subfolders, in the order of their names.
    fn add_folder(&mut self, folder: &Path, max_chars: usize) -> Result<()> {
        let is_hidden = |entry: &DirEntry| entry.depth() > 0 && entry.file_name().as_encoded_bytes().starts_with(b".");
        let mut skipped = Vec::new();
        for entry in WalkDir::new(folder).sort_by_file_name().into_iter().filter_entry(|entry| !is_hidden(entry)) {
            let entry = entry.with_context(|| format!("{}: cannot be read", folder.display()))?;
            if entry.file_type().is_file() {
                match read_text(entry.path(), max_chars) {
                    Ok(text) => self.add(entry.path().display().to_string(), text),
                    Err(reason) => skipped.push(reason),
                }
            }
        }
        if let Some(first) = skipped.first() {
            tracing::warn!(
                "{}: left out {} files that are not text, the first: {first:#}",
                folder.display(),
                skipped.len()
            );
        }
        Ok(())
    }
}

/// The files that match a pattern, sorted.
fn matches(pattern: &Path) -> Result<Vec<PathBuf>> {
    let text = pattern.to_str().filter(|text| text.contains(['*', '?', '[']));
    let text = text.with_context(|| format!("{}: no such file or folder", pattern.display()))?;
    // As in a shell, `*` does not match hidden files.
    let options = MatchOptions { require_literal_leading_dot: true, ..MatchOptions::default() };
    let paths = glob::glob_with(text, options).with_context(|| format!("{text}: not a valid pattern"))?;
    let paths = paths.collect::<Result<Vec<_>, _>>().with_context(|| format!("{text}: a folder cannot be read"))?;
    let files: Vec<PathBuf> = paths.into_iter().filter(|path| path.is_file()).collect();
    ensure!(!files.is_empty(), "{text}: no file matches this pattern");
    Ok(files)
}

/// Reads a file up to about `max_chars` characters; the rest of a longer document would not be ranked.
fn read_text(path: &Path, max_chars: usize) -> Result<String> {
    let file = path.display();
    let mut bytes = Vec::new();
    // A character takes up to 4 bytes.
    let limit = (max_chars as u64).saturating_mul(4).saturating_add(4);
    let read = File::open(path).and_then(|open| open.take(limit).read_to_end(&mut bytes));
    read.with_context(|| format!("{file}: cannot be read"))?;
    if bytes.starts_with(b"%PDF-") {
        bail!("{file} is a PDF; convert it to text first: pdftotext {file} - > document.txt");
    }
    String::from_utf8(bytes).or_else(|error| {
        let (valid, reason) = (error.utf8_error().valid_up_to(), error.utf8_error());
        let mut bytes = error.into_bytes();
        // The limit may have split the last character.
        if bytes.len() as u64 == limit && reason.error_len().is_none() {
            bytes.truncate(valid);
            return String::from_utf8(bytes).map_err(|error| anyhow!(error));
        }
        bail!(
            "{file} is not UTF-8 text; convert it first, for example: iconv -f latin1 -t utf-8 {file} > document.txt, or for \
             an office document: pandoc -t plain {file} > document.txt"
        )
    })
}

fn is_html(text: &str) -> bool {
    let start = text.trim_start_matches('\u{feff}').trim_start().as_bytes();
    [&b"<!doctype html"[..], b"<html"]
        .iter()
        .any(|tag| start.get(..tag.len()).is_some_and(|s| s.eq_ignore_ascii_case(tag)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_files_are_read_in_part_and_between_characters() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("long.txt");
        std::fs::write(&path, "é".repeat(1000)).unwrap();
        assert_eq!(read_text(&path, 1000).unwrap(), "é".repeat(1000));
        // The limit is 4 * 10 + 4 bytes: 22 times "é". With an "a" first, it splits the last "é", which is then left out.
        assert_eq!(read_text(&path, 10).unwrap(), "é".repeat(22));
        std::fs::write(&path, format!("a{}", "é".repeat(1000))).unwrap();
        assert_eq!(read_text(&path, 10).unwrap(), format!("a{}", "é".repeat(21)));
        std::fs::write(&path, b"caf\xe9").unwrap();
        assert!(read_text(&path, 10).unwrap_err().to_string().contains("iconv"));
    }

    #[test]
    fn html_is_recognized_by_its_start() {
        for (text, expected) in [
            ("<!DOCTYPE html><p>", true),
            ("\u{feff}\n <HTML lang=en>", true),
            ("<p>a", false),
            ("", false),
            ("use <html> tags", false),
        ] {
            assert_eq!(is_html(text), expected, "{text}");
        }
    }
}
