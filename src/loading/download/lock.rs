//! One download of a blob at a time, among all processes that share the cache.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::error::HubError;

/// A held `flock`, the lock that `huggingface_hub` uses too. The kernel releases it when the process ends.
#[derive(Debug)]
pub(super) struct DownloadLock {
    /// `None` where the file system has no locks.
    _file: Option<File>,
}

impl DownloadLock {
    /// Waits until no other process holds the lock, and logs that it waits.
    ///
    /// # Errors
    /// The lock file cannot be created.
    pub(super) fn acquire(path: &Path, what: &str) -> Result<Self, HubError> {
        loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(path)
                .map_err(HubError::cache("open the lock", path))?;
            let locked = match file.try_lock() {
                Err(TryLockError::WouldBlock) => {
                    tracing::info!("another process is downloading {what}; waiting for it (lock: {})", path.display());
                    file.lock()
                }
                Err(TryLockError::Error(error)) => Err(error),
                Ok(()) => Ok(()),
            };
            match locked {
                Ok(()) if is_same_file(&file, path) => return Ok(Self { _file: Some(file) }),
                // Another tool deleted the lock file meanwhile, so this lock protects nothing: retry with the new file.
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!(
                        "{}: the file system does not support locks ({error}); do not download {what} from two processes at once",
                        path.display()
                    );
                    return Ok(Self { _file: None });
                }
            }
        }
    }
}

fn is_same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(locked), Ok(current)) => (locked.dev(), locked.ino()) == (current.dev(), current.ino()),
        _ => false,
    }
}
