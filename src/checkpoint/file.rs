//! Opens and reads files that come with a model: regular files only, and texts up to a size limit.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Opens a regular file and rejects others: opening a FIFO would block forever, and a device such as `/dev/zero` has no end.
///
/// # Errors
/// The file is missing, not readable, or not a regular file. The error names the path.
pub fn open_regular(path: &Path) -> Result<File> {
    let cannot_open = || format!("cannot open {}", path.display());
    let metadata = std::fs::metadata(path).with_context(cannot_open)?;
    ensure!(metadata.is_file(), "{} is not a regular file", path.display());
    File::open(path).with_context(cannot_open)
}

/// Reads a UTF-8 file of at most `max_bytes` bytes.
///
/// # Errors
/// The errors of [`open_regular`]; the file is longer than `max_bytes` or not UTF-8. The error names the file.
pub fn read_text(path: &Path, max_bytes: u64) -> Result<String> {
    let mut bytes = Vec::new();
    open_regular(path)?
        .take(max_bytes.saturating_add(1))
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(bytes.len() as u64 <= max_bytes, "{} is longer than {max_bytes} bytes", path.display());
    String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_up_to_the_limit_is_read_and_longer_text_is_rejected_with_the_file_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, "1234\u{e9}").unwrap();
        let error = read_text(&path, 4).unwrap_err().to_string();
        assert!(error.contains("longer than 4 bytes"), "{error}"); // and not "not UTF-8", although byte 5 is half a character
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read_text(&path, 5).unwrap(), "12345");
        let error = read_text(&path, 4).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("longer than 4 bytes"), "{error}");
    }

    #[test]
    fn directories_and_devices_are_rejected_before_they_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path(), Path::new("/dev/zero")] {
            let error = read_text(path, 10).unwrap_err().to_string();
            assert!(error.contains("not a regular file"), "{error}");
        }
    }
}
