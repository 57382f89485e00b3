//! Text on standard output, and pictures.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::failure::Failure;
use super::plot::{Chart, svg};

/// Writes to standard output. A closed pipe (`rerankd models | head -1`) is not an error.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output").map_err(Failure::Other)
        }
        _ => Ok(()),
    }
}

/// Formats rows of cells as lines. Each column is as wide as its widest cell; trailing spaces are removed.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// A file for a picture. It is created before the measurements, so that they are not lost if it cannot be written.
pub(super) struct PictureFile {
    path: PathBuf,
    file: File,
}

impl PictureFile {
    pub(super) fn create(path: &Path) -> Result<Self, Failure> {
        let file = File::create(path).with_context(|| format!("--svg {}: cannot be written", path.display()));
        Ok(Self { path: path.to_owned(), file: file.map_err(Failure::Config)? })
    }

    pub(super) fn write(mut self, charts: &[Chart]) -> Result<(), Failure> {
        let written = self.file.write_all(svg(charts).as_bytes());
        written.with_context(|| format!("--svg {}: cannot be written", self.path.display())).map_err(Failure::Other)
    }
}

/// A size in decimal units: `67 MB`, `2.3 GB`.
pub(super) fn bytes(bytes: u64) -> String {
    match bytes as f64 / 1e6 {
        megabytes if megabytes >= 999.5 => format!("{:.1} GB", megabytes / 1e3),
        megabytes => format!("{megabytes:.0} MB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_rows_may_be_short() {
        let rows = [vec!["a", "bb", "c"], vec!["长长", "b"]].map(|row| row.into_iter().map(str::to_owned).collect());
        assert_eq!(table(&rows), "a   bb  c\n长长  b\n");
    }

    #[test]
    fn sizes_have_decimal_units() {
        assert_eq!([67_400_000, 999_400_000, 2_271_000_000].map(bytes), ["67 MB", "999 MB", "2.3 GB"]);
    }
}
