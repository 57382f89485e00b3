//! Disk cache of compiled kernels and tuning results.

use std::io::Write;
use std::path::{Path, PathBuf};

/// A folder of small files. Without a folder nothing is cached.
#[derive(Debug, Clone)]
pub(super) struct Cache(Option<PathBuf>);

impl Cache {
    pub(super) fn new(folder: Option<PathBuf>) -> Self {
        Self(folder)
    }

    /// The content of a file; `None` if it cannot be read.
    pub(super) fn read(&self, name: &str) -> Option<Vec<u8>> {
        std::fs::read(self.0.as_ref()?.join(name)).ok()
    }

    /// Writes a file atomically. A cache that cannot be written only makes the next start slower, so a failure is logged and
    /// otherwise ignored.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) {
        let Some(folder) = &self.0 else { return };
        if let Err(error) = write_atomically(folder, name, bytes) {
            tracing::debug!("cannot write {} to the CUDA cache {}: {error}", name, folder.display());
        }
    }
}

fn write_atomically(folder: &Path, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    // The temporary name is random: containers that share the folder may have the same process id.
    let temporary = folder.join(format!("{name}.part-{}", uuid::Uuid::now_v7()));
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, folder.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_is_read_back_and_nothing_else_stays() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(folder.path().join("deeper")));
        assert_eq!(cache.read("a"), None);
        cache.write("a", b"one");
        cache.write("a", b"two");
        assert_eq!(cache.read("a").as_deref(), Some(&b"two"[..]));
        assert_eq!(std::fs::read_dir(folder.path().join("deeper")).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let cache = Cache::new(Some(file));
        cache.write("a", b"one");
        assert_eq!(cache.read("a"), None);
        Cache::new(None).write("a", b"one");
    }
}
