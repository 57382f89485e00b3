//! The output of a run, written so that a killed run can go on.
//!
//! Results are appended to `OUT.partial`. Every few seconds the file is synced. Then `OUT.state.json`, which says how far input
//! and output are, is replaced by an atomic rename. A run that finds both files removes the results after the last state and
//! continues from there. At the end `OUT.partial` becomes `OUT`.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lines::LinePosition;

/// Counts of a run since its first start, interruptions included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JobCounts {
    /// Queries that were ranked.
    pub(crate) queries: u64,
    /// Documents of these queries.
    pub(crate) pairs: u64,
    /// Queries with an error instead of a ranking.
    pub(crate) failed: u64,
}

/// How far a run is. `OUT.state.json` has it as one JSON object.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct JobState {
    /// What the run ranks and how; a later run goes on only if it is the same.
    pub(crate) job: Value,
    /// Where the next query starts in the input; `None` before the first.
    pub(crate) input_offset: Option<u64>,
    /// Lines of the shard before it.
    pub(crate) input_lines: u64,
    /// Bytes of complete results.
    pub(crate) output_bytes: u64,
    #[serde(flatten)]
    pub(crate) counts: JobCounts,
    pub(crate) complete: bool,
}

/// Where results are written.
pub(crate) enum JobOutput {
    /// A pipe or a terminal. Each query's results are written at once, so that a program can wait for them.
    Stream(Box<dyn Write + Send>),
    /// A file whose writing can be resumed.
    File(Box<ResumableFile>),
}

/// `OUT.partial` and its state.
pub(crate) struct ResumableFile {
    path: PathBuf,
    /// Locked, so that two runs do not write the same output.
    file: BufWriter<File>,
    state: JobState,
    every: Duration,
    saved: Instant,
}

/// Another process is writing the output. A later run may succeed.
#[derive(Debug, thiserror::Error)]
#[error("{}: another process is writing it", .0.display())]
pub(crate) struct OutputBusy(PathBuf);

/// What an earlier run has left.
pub(crate) enum OpenedOutput {
    /// Everything is done already.
    Complete(JobCounts),
    /// To be continued from this position; `None` is the beginning.
    Open(JobOutput, Option<LinePosition>, JobCounts),
}

impl JobOutput {
    /// Opens a new output, or continues that of an interrupted run of the same `job`. `-` is standard output.
    ///
    /// # Errors
    /// There is a file that was not written by the same job, another process is writing it ([`OutputBusy`]), or it cannot be
    /// written.
    pub(crate) fn open(path: &Path, job: Value, every: Duration) -> Result<OpenedOutput> {
        if path.to_str() == Some("-") {
            let stream = Self::Stream(Box::new(io::stdout()));
            return Ok(OpenedOutput::Open(stream, None, JobCounts::default()));
        }
        if path.metadata().is_ok_and(|metadata| !metadata.is_file()) {
            let stream = OpenOptions::new().write(true).open(path).with_context(|| cannot_write(path))?;
            return Ok(OpenedOutput::Open(Self::Stream(Box::new(stream)), None, JobCounts::default()));
        }
        ResumableFile::open(path, job, every)
    }

    /// Appends a query's results. `end` is the input's position after the query.
    ///
    /// # Errors
    /// The output cannot be written.
    pub(crate) fn write(&mut self, results: &[u8], end: LinePosition, counts: JobCounts) -> Result<()> {
        match self {
            Self::Stream(stream) => {
                stream.write_all(results).and_then(|()| stream.flush()).context("cannot write the output")
            }
            Self::File(file) => file.write(results, end, counts),
        }
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// The output cannot be written.
    pub(crate) fn save(&mut self) -> Result<()> {
        match self {
            Self::Stream(_) => Ok(()),
            Self::File(file) => file.save(),
        }
    }

    /// Ends the output after the last query.
    ///
    /// # Errors
    /// The output cannot be written.
    pub(crate) fn finish(self) -> Result<()> {
        match self {
            Self::Stream(_) => Ok(()),
            Self::File(mut file) => {
                file.state.complete = true;
                file.save()?;
                publish(&file.path)
            }
        }
    }
}

impl ResumableFile {
    fn open(path: &Path, job: Value, every: Duration) -> Result<OpenedOutput> {
        let (partial, state_path) = (partial(path), state_path(path));
        let finished = path.exists();
        if finished {
            let state = read_state(&state_path)?
                .filter(|state| state.complete)
                .with_context(|| format!("{} exists; remove it, or choose another --output", path.display()))?;
            check_same_job(&state.job, &job, path)?;
            return Ok(OpenedOutput::Complete(state.counts));
        }
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&partial);
        let file = file.with_context(|| cannot_write(&partial))?;
        lock(&file, &partial)?;
        let length = file.metadata().with_context(|| cannot_write(&partial))?.len();
        let state = match read_state(&state_path)? {
            // A run that has written nothing loses nothing if it begins again as another job.
            Some(state) if state.input_offset.is_none() && !state.complete => JobState { job, ..state },
            Some(state) => {
                check_same_job(&state.job, &job, path)?;
                ensure!(
                    length >= state.output_bytes,
                    "{} has {length} bytes, but {} says {}; remove both to begin again",
                    partial.display(),
                    state_path.display(),
                    state.output_bytes
                );
                state
            }
            None => {
                ensure!(length == 0, "{} exists without {}; remove it", partial.display(), state_path.display());
                let counts = JobCounts::default();
                JobState { job, input_offset: None, input_lines: 0, output_bytes: 0, counts, complete: false }
            }
        };
        if state.complete {
            publish(path)?;
            return Ok(OpenedOutput::Complete(state.counts));
        }
        file.set_len(state.output_bytes).with_context(|| cannot_write(&partial))?;
        let mut file = BufWriter::with_capacity(1 << 18, file);
        file.seek(SeekFrom::End(0)).with_context(|| cannot_write(&partial))?;
        let position = state.input_offset.map(|offset| LinePosition { offset, lines: state.input_lines });
        let counts = state.counts;
        let mut file = Self { path: path.to_owned(), file, state, every, saved: Instant::now() };
        file.save()?;
        Ok(OpenedOutput::Open(JobOutput::File(Box::new(file)), position, counts))
    }

    fn write(&mut self, results: &[u8], end: LinePosition, counts: JobCounts) -> Result<()> {
        self.file.write_all(results).with_context(|| cannot_write(&partial(&self.path)))?;
        self.state.output_bytes += results.len() as u64;
        (self.state.input_offset, self.state.input_lines) = (Some(end.offset), end.lines);
        self.state.counts = counts;
        if self.saved.elapsed() >= self.every { self.save() } else { Ok(()) }
    }

    fn save(&mut self) -> Result<()> {
        let synced = self.file.flush().and_then(|()| self.file.get_ref().sync_data());
        synced.with_context(|| cannot_write(&partial(&self.path)))?;
        let path = state_path(&self.path);
        let new = with_suffix(&self.path, ".state.json.new");
        let text = serde_json::to_string_pretty(&self.state).context("the state cannot be written as JSON")?;
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            writeln!(file, "{text}")?;
            file.sync_data()?;
            fs::rename(&new, &path)
        };
        write().with_context(|| cannot_write(&path))?;
        self.saved = Instant::now();
        Ok(())
    }
}

/// Gives a complete output its name.
fn publish(path: &Path) -> Result<()> {
    fs::rename(partial(path), path).with_context(|| cannot_write(path))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Not every file system can sync a folder; then the rename is as durable as it gets.
    File::open(folder).and_then(|folder| folder.sync_all()).ok();
    Ok(())
}

fn partial(path: &Path) -> PathBuf {
    with_suffix(path, ".partial")
}

fn state_path(path: &Path) -> PathBuf {
    with_suffix(path, ".state.json")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

fn cannot_write(path: &Path) -> String {
    format!("{}: cannot be written", path.display())
}

fn read_state(path: &Path) -> Result<Option<JobState>> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{}: cannot be read", path.display())),
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .with_context(|| format!("{}: not the state of a run; remove it to begin again", path.display())),
    }
}

fn lock(file: &File, path: &Path) -> Result<()> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(OutputBusy(path.to_owned()).into()),
        Err(TryLockError::Error(error)) => {
            tracing::warn!("{}: cannot be locked ({error}); do not write it from two processes", path.display());
            Ok(())
        }
    }
}

/// Refuses to continue another job, and names what differs.
fn check_same_job(old: &Value, new: &Value, path: &Path) -> Result<()> {
    let keys = old.as_object().into_iter().chain(new.as_object()).flat_map(|job| job.keys());
    let Some(key) = keys.into_iter().find(|key| old.get(key.as_str()) != new.get(key.as_str())) else { return Ok(()) };
    let show = |job: &Value| job.get(key.as_str()).map_or("nothing".to_owned(), Value::to_string);
    bail!(
        "{}: an earlier run wrote this output with other input or settings: {key} was {} and is now {}. Choose another --output, or \
         remove it, its .partial and its .state.json",
        path.display(),
        show(old),
        show(new)
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ALWAYS: Duration = Duration::ZERO;
    const NEVER: Duration = Duration::MAX;

    fn opened(path: &Path, every: Duration) -> (JobOutput, Option<LinePosition>, JobCounts) {
        match JobOutput::open(path, json!({"input": 1}), every).unwrap() {
            OpenedOutput::Open(output, position, counts) => (output, position, counts),
            OpenedOutput::Complete(_) => panic!("nothing is complete"),
        }
    }

    fn at(offset: u64) -> LinePosition {
        LinePosition { offset, lines: offset / 10 }
    }

    fn counts(queries: u64) -> JobCounts {
        JobCounts { queries, pairs: 2 * queries, failed: 0 }
    }

    #[test]
    fn what_was_written_after_the_last_state_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let (mut output, position, _) = opened(&path, ALWAYS);
        assert_eq!(position, None);
        output.write(b"one\n", at(10), counts(1)).unwrap();
        let JobOutput::File(file) = &mut output else { panic!("a file") };
        file.every = NEVER;
        output.write(b"two\n", at(20), counts(2)).unwrap();
        let JobOutput::File(file) = &mut output else { panic!("a file") };
        file.file.flush().unwrap();
        drop(output);
        assert_eq!(fs::read(partial(&path)).unwrap(), b"one\ntwo\n");

        let (mut output, position, so_far) = opened(&path, NEVER);
        assert_eq!((position, so_far), (Some(at(10)), counts(1)));
        output.write(b"2\n", at(20), counts(2)).unwrap();
        assert!(!path.exists());
        output.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one\n2\n");
        assert!(!partial(&path).exists());
        let again = JobOutput::open(&path, json!({"input": 1}), NEVER).unwrap();
        assert!(matches!(again, OpenedOutput::Complete(done) if done == counts(2)));
    }

    #[test]
    fn a_run_that_was_killed_before_its_last_rename_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let (mut output, ..) = opened(&path, NEVER);
        output.write(b"one\n", at(10), counts(1)).unwrap();
        let JobOutput::File(file) = &mut output else { panic!("a file") };
        file.state.complete = true;
        output.save().unwrap();
        drop(output);
        let again = JobOutput::open(&path, json!({"input": 1}), NEVER).unwrap();
        assert!(matches!(again, OpenedOutput::Complete(done) if done == counts(1)));
        assert_eq!(fs::read(&path).unwrap(), b"one\n");
    }

    #[test]
    fn a_run_that_has_written_nothing_may_begin_again_with_other_settings() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        drop(opened(&path, ALWAYS));
        let opened = JobOutput::open(&path, json!({"input": 2}), NEVER).unwrap();
        assert!(matches!(opened, OpenedOutput::Open(_, None, _)));
    }

    #[test]
    fn files_of_others_are_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |name: &str, named: &str| {
            let error = JobOutput::open(&folder.path().join(name), json!({"input": 2}), NEVER).err().expect(name);
            assert!(format!("{error:#}").contains(named), "{name}: {error:#}");
        };
        fs::write(folder.path().join("out"), "mine").unwrap();
        refused("out", "exists");
        fs::write(folder.path().join("a.partial"), "mine").unwrap();
        refused("a", "a.partial exists without");
        let (mut output, ..) = opened(&folder.path().join("b"), ALWAYS);
        output.write(b"one\n", at(10), counts(1)).unwrap();
        refused("b", "another process");
        drop(output);
        refused("b", "input was 1 and is now 2");
        fs::write(folder.path().join("b.partial"), "").unwrap();
        let error = JobOutput::open(&folder.path().join("b"), json!({"input": 1}), NEVER).err().unwrap();
        assert!(error.to_string().contains("0 bytes"), "{error}");
        fs::write(folder.path().join("b.state.json"), "{}").unwrap();
        refused("b", "b.state.json");
        assert_eq!(fs::read(folder.path().join("out")).unwrap(), b"mine");
        assert_eq!(fs::read(folder.path().join("a.partial")).unwrap(), b"mine");
    }
}
