//! Lines of a file or a pipe. A shard of a file is a range of its bytes whose ends are moved to the starts of lines. So a shard is
//! read without the others, and all shards, in order, are the whole file.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

/// Maximum bytes of a line. A longer line is an error of its query, and its rest is skipped.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// Bytes at each end of a file that identify its content, together with its size.
const FINGERPRINT_BYTES: u64 = 1 << 20;

/// One of `count` parts of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shard {
    /// From 0.
    index: u32,
    count: u32,
}

impl Shard {
    pub(crate) fn is_whole(self) -> bool {
        self.count == 1
    }

    /// This shard's bytes of a file of `size` bytes, before its ends are moved to starts of lines.
    fn range(self, size: u64) -> Range<u64> {
        let boundary = |i: u32| (u128::from(size) * u128::from(i) / u128::from(self.count)) as u64;
        boundary(self.index)..boundary(self.index + 1)
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match parsed {
            Some((index, count)) if index < count => Ok(Self { index, count }),
            _ => Err("expected I/N with I from 0 to N - 1, for example 0/4".to_owned()),
        }
    }
}

impl std::fmt::Display for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

/// Turns line numbers of a shard into line numbers of its file.
#[derive(Debug)]
pub(crate) struct LineNumbers {
    path: PathBuf,
    /// First byte of the shard.
    start: u64,
    /// Lines before the shard; counted when it is first needed.
    before: OnceLock<u64>,
}

impl LineNumbers {
    /// The number in the file, from 1, of the line `number` of the shard, from 1.
    pub(crate) fn in_file(&self, number: u64) -> u64 {
        number + self.before.get_or_init(|| count_lines(&self.path, self.start).unwrap_or(0))
    }

    /// The file's name and a line of the shard, for messages.
    pub(crate) fn describe(&self, number: u64) -> String {
        format!("{}: line {}", self.path.display(), self.in_file(number))
    }
}

fn count_lines(path: &Path, bytes: u64) -> io::Result<u64> {
    let mut input = BufReader::new(File::open(path)?.take(bytes));
    let mut lines = 0;
    loop {
        let read = input.fill_buf()?;
        if read.is_empty() {
            return Ok(lines);
        }
        lines += read.iter().filter(|&&byte| byte == b'\n').count() as u64;
        let length = read.len();
        input.consume(length);
    }
}

/// Reads the lines of one shard.
pub(crate) struct LineReader {
    input: Box<dyn BufRead + Send>,
    /// Offset of the next line.
    offset: u64,
    /// Lines that start at or after this offset belong to the next shard.
    end: u64,
    /// Lines read, counted from the shard's start.
    lines: u64,
    numbers: Arc<LineNumbers>,
}

/// Where a reader is in its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LinePosition {
    /// Offset in the file.
    pub(crate) offset: u64,
    /// Lines of the shard before it.
    pub(crate) lines: u64,
}

impl LineReader {
    /// Opens a file at the start of a shard, or a pipe; `-` is standard input.
    ///
    /// # Errors
    /// The file cannot be read, or a part of a pipe is asked for.
    pub(crate) fn open(path: &Path, shard: Shard) -> Result<Self> {
        let unreadable = || format!("{}: cannot be read", path.display());
        let numbers = |start| Arc::new(LineNumbers { path: path.to_owned(), start, before: OnceLock::new() });
        if !is_regular_file(path) {
            ensure!(shard.is_whole(), "{}: --shard needs a regular file", path.display());
            let input: Box<dyn BufRead + Send> = match path.to_str() {
                Some("-") => Box::new(BufReader::new(io::stdin())),
                _ => Box::new(BufReader::new(File::open(path).with_context(unreadable)?)),
            };
            return Ok(Self { input, offset: 0, end: u64::MAX, lines: 0, numbers: numbers(0) });
        }
        let mut file = File::open(path).with_context(unreadable)?;
        let range = shard.range(file.metadata().with_context(unreadable)?.len());
        let start = start_of_line(&mut file, range.start).with_context(unreadable)?;
        file.seek(SeekFrom::Start(start)).with_context(unreadable)?;
        let input = Box::new(BufReader::with_capacity(1 << 18, file));
        Ok(Self { input, offset: start, end: range.end, lines: 0, numbers: numbers(start) })
    }

    /// Goes to a position that [`Self::position`] gave for the same shard.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(crate) fn resume(&mut self, at: LinePosition) -> Result<()> {
        let path = &self.numbers.path;
        ensure!(self.end().is_some(), "{}: what comes through a pipe cannot be read again", path.display());
        let mut file = File::open(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        file.seek(SeekFrom::Start(at.offset)).with_context(|| format!("{}: cannot be read", path.display()))?;
        self.input = Box::new(BufReader::with_capacity(1 << 18, file));
        (self.offset, self.lines) = (at.offset, at.lines);
        Ok(())
    }

    pub(crate) fn position(&self) -> LinePosition {
        LinePosition { offset: self.offset, lines: self.lines }
    }

    /// Offset of the shard's end. `None` for a pipe.
    pub(crate) fn end(&self) -> Option<u64> {
        (self.end != u64::MAX).then_some(self.end)
    }

    /// The line before the next one, which must have at most `limit` bytes. `None` at the file's start.
    ///
    /// # Errors
    /// The file cannot be read, or the line is longer.
    pub(crate) fn previous_line(&self, limit: u64) -> Result<Option<Vec<u8>>> {
        line_before(&self.numbers.path, self.offset, limit)
    }

    pub(crate) fn numbers(&self) -> Arc<LineNumbers> {
        Arc::clone(&self.numbers)
    }

    /// Whether the next line belongs to another shard.
    pub(crate) fn is_past_end(&self) -> bool {
        self.is_past(self.offset)
    }

    /// Whether a line that starts at `offset` belongs to a later shard.
    pub(crate) fn is_past(&self, offset: u64) -> bool {
        offset >= self.end
    }

    /// Reads the next line into `line`, without its line break, whether it belongs to the shard or not. `None` at the end of the
    /// file. `Some(false)` if the line is too long; then `line` is empty.
    ///
    /// # Errors
    /// The file cannot be read. The message names it.
    pub(crate) fn next_line(&mut self, line: &mut Vec<u8>) -> Result<Option<bool>> {
        line.clear();
        let mut read = self.read_until_newline(line, MAX_LINE_BYTES)?;
        if read == 0 {
            return Ok(None);
        }
        let fits = line.last() == Some(&b'\n') || read < MAX_LINE_BYTES;
        while !fits && line.last() != Some(&b'\n') {
            line.clear();
            match self.read_until_newline(line, 1 << 20)? {
                0 => break,
                more => read += more,
            }
        }
        self.offset += read;
        self.lines += 1;
        if !fits {
            line.clear();
        } else if line.last() == Some(&b'\n') {
            line.pop();
        }
        Ok(Some(fits))
    }

    fn read_until_newline(&mut self, line: &mut Vec<u8>, limit: u64) -> Result<u64> {
        let read = (&mut self.input).take(limit).read_until(b'\n', line);
        Ok(read.with_context(|| format!("{}: cannot be read", self.numbers.path.display()))? as u64)
    }
}

/// Whether this is a file that can be read from any offset.
pub(crate) fn is_regular_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file())
}

/// The first offset at or after `offset` at which a line starts.
fn start_of_line(file: &mut File, offset: u64) -> io::Result<u64> {
    if offset == 0 {
        return Ok(0);
    }
    file.seek(SeekFrom::Start(offset - 1))?;
    let mut input = BufReader::new(file);
    Ok(offset - 1 + input.skip_until(b'\n')? as u64)
}

/// The last line that ends at `offset`, which is the start of a line, if it has at most `limit` bytes. `None` at the file's start.
///
/// # Errors
/// The file cannot be read, or the line is longer.
fn line_before(path: &Path, offset: u64, limit: u64) -> Result<Option<Vec<u8>>> {
    if offset == 0 {
        return Ok(None);
    }
    // The line, and the line breaks before and after it.
    let start = offset.saturating_sub(limit + 2);
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.take(offset - start).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let mut bytes = read().with_context(|| format!("{}: cannot be read", path.display()))?;
    bytes.pop_if(|byte| *byte == b'\n');
    let newline = bytes.iter().rposition(|&byte| byte == b'\n');
    ensure!(newline.is_some() || start == 0, "{}: a line has more than {limit} bytes", path.display());
    Ok(Some(bytes.split_off(newline.map_or(0, |newline| newline + 1))))
}

/// A file's size, and a digest of its first and last MiB: tells whether an interrupted run had the same input.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn fingerprint(path: &Path) -> Result<String> {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut digest = Sha256::new();
        let mut bytes = Vec::new();
        (&mut file).take(FINGERPRINT_BYTES).read_to_end(&mut bytes)?;
        file.seek(SeekFrom::Start(size.saturating_sub(FINGERPRINT_BYTES)))?;
        file.take(FINGERPRINT_BYTES).read_to_end(&mut bytes)?;
        digest.update(&bytes);
        let hex: String = digest.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Ok(format!("{size} bytes, sha256 of both ends {hex}"))
    };
    read().with_context(|| format!("{}: cannot be read", path.display()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn whole() -> Shard {
        Shard { index: 0, count: 1 }
    }

    fn written(text: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    /// The lines of a shard, with their numbers in the file and the offset after each.
    fn lines(path: &Path, shard: Shard) -> Vec<(u64, Vec<u8>, LinePosition)> {
        let mut reader = LineReader::open(path, shard).unwrap();
        let (mut all, mut line) = (Vec::new(), Vec::new());
        while !reader.is_past_end() && reader.next_line(&mut line).unwrap().is_some() {
            all.push((reader.numbers().in_file(reader.lines), line.clone(), reader.position()));
        }
        all
    }

    proptest! {
        #[test]
        fn shards_in_order_are_the_whole_file(text in "[ab\n]{0,60}", count in 1_u32..9) {
            let file = written(text.as_bytes());
            let joined: Vec<_> = (0..count)
                .flat_map(|index| lines(file.path(), Shard { index, count }))
                .map(|(number, line, at)| (number, line, at.offset))
                .collect();
            let expected: Vec<_> =
                lines(file.path(), whole()).into_iter().map(|(number, line, at)| (number, line, at.offset)).collect();
            prop_assert_eq!(&joined, &expected);
            let read: Vec<&[u8]> = joined.iter().map(|(_, line, _)| line.as_slice()).collect();
            let text_lines: Vec<&[u8]> = text.lines().map(str::as_bytes).collect();
            prop_assert_eq!(read, text_lines);
        }

        #[test]
        fn a_reader_resumes_after_any_line(text in "[ab\n]{1,60}", stop in 0_usize..20) {
            let file = written(text.as_bytes());
            let all = lines(file.path(), whole());
            let Some((_, _, position)) = all.get(stop) else { return Ok(()) };
            let mut reader = LineReader::open(file.path(), whole()).unwrap();
            reader.resume(*position).unwrap();
            let mut line = Vec::new();
            for (number, expected, _) in &all[stop + 1..] {
                prop_assert_eq!(reader.next_line(&mut line).unwrap(), Some(true));
                prop_assert_eq!((reader.numbers().in_file(reader.lines), &line), (*number, expected));
            }
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_skipped() {
        let mut text = vec![b'x'; MAX_LINE_BYTES as usize + 1];
        text.extend(b"\nshort");
        let file = written(&text);
        let mut reader = LineReader::open(file.path(), whole()).unwrap();
        let mut line = Vec::new();
        assert_eq!((reader.next_line(&mut line).unwrap(), line.len()), (Some(false), 0));
        assert_eq!((reader.next_line(&mut line).unwrap(), &*line), (Some(true), &b"short"[..]));
        assert_eq!(reader.next_line(&mut line).unwrap(), None);
    }

    #[test]
    fn the_line_before_an_offset_is_found() {
        let file = written(b"one\ntwo\n");
        let before = |offset| line_before(file.path(), offset, 3).unwrap();
        assert_eq!(before(0), None);
        assert_eq!(before(4).as_deref(), Some(&b"one"[..]));
        assert_eq!(before(8).as_deref(), Some(&b"two"[..]));
        assert!(line_before(file.path(), 8, 2).is_err());
    }

    #[test]
    fn shards_are_numbered_from_0() {
        let parsed = |text: &str| text.parse::<Shard>();
        assert_eq!(parsed("3/4"), Ok(Shard { index: 3, count: 4 }));
        for wrong in ["4/4", "0/0", "1", "-1/4", "a/b", ""] {
            assert!(parsed(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_fingerprint_changes_with_size_and_content() {
        let fingerprints: BTreeSet<String> =
            [&b"a"[..], b"b", b"aa"].iter().map(|text| fingerprint(written(text).path()).unwrap()).collect();
        assert_eq!(fingerprints.len(), 3);
    }
}
