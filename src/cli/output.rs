//! Text on standard output.

use std::io::Write;

use anyhow::Context;

use super::failure::Failure;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_rows_may_be_short() {
        let rows = [vec!["a", "bb", "c"], vec!["长长", "b"]].map(|row| row.into_iter().map(str::to_owned).collect());
        assert_eq!(table(&rows), "a   bb  c\n长长  b\n");
    }
}
