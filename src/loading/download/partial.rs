//! The incomplete file of a download: kept across processes, hashed as it grows, checked at the end.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::error::HubError;
use super::names::EntityTag;
use super::response::FileMetadata;
use crate::failpoint::failpoint;

/// The incomplete file and the hash of its bytes so far.
pub(super) struct Partial {
    path: PathBuf,
    file: File,
    pub(super) length: u64,
    sha256: Sha256,
    /// Strong entity tag of the response that the bytes are from. Unknown for bytes of an earlier process.
    pub(super) validator: Option<String>,
    /// Whether the bytes come from more than one request.
    pub(super) is_resumed: bool,
}

impl Partial {
    /// Opens or creates the file. Bytes of an earlier process are kept only if a digest can check them in the end.
    pub(super) fn open(path: &Path, etag: &EntityTag) -> Result<Self, HubError> {
        // Anything but a regular file is removed first: a symbolic link could point to another file.
        if fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
            fs::remove_file(path).map_err(HubError::cache("remove", path))?;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(matches!(etag, EntityTag::Opaque(_)))
            .open(path)
            .map_err(HubError::cache("open", path))?;
        let mut sha256 = Sha256::new();
        let length = io::copy(&mut &file, &mut sha256).map_err(HubError::cache("read", path))?;
        Ok(Self { path: path.to_owned(), file, length, sha256, validator: None, is_resumed: length > 0 })
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        if let Err(error) = self.write(bytes) {
            // Part of the bytes may have been written: keep only those that were hashed.
            self.file.set_len(self.length).ok();
            return Err(HubError::cache("write", &self.path)(error));
        }
        self.sha256.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    pub(super) fn clear(&mut self) -> Result<(), HubError> {
        self.file.set_len(0).map_err(HubError::cache("truncate", &self.path))?;
        self.file.seek(SeekFrom::Start(0)).map_err(HubError::cache("rewind", &self.path))?;
        self.length = 0;
        self.sha256 = Sha256::new();
        self.validator = None;
        self.is_resumed = false;
        Ok(())
    }

    /// Checks the content against the digest that the hub announced, if any, syncs it to disk and returns its SHA-256.
    pub(super) fn finish(&mut self, etag: &EntityTag) -> Result<String, HubError> {
        let sha256 = format!("{:x}", self.sha256.clone().finalize());
        match etag {
            EntityTag::Sha256(announced) => check_digest("SHA-256", &sha256, announced)?,
            EntityTag::GitBlob(announced) => {
                self.file.seek(SeekFrom::Start(0)).map_err(HubError::cache("rewind", &self.path))?;
                let found = git_blob_hash(&mut self.file, self.length).map_err(HubError::cache("read", &self.path))?;
                check_digest("git blob hash", &found, announced)?;
            }
            EntityTag::Opaque(_) => {}
        }
        self.sync().map_err(HubError::cache("sync", &self.path))?;
        Ok(sha256)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        failpoint!("download-write", {
            self.file.write_all(&bytes[..bytes.len() / 2])?;
            Err(io::ErrorKind::StorageFull.into())
        });
        self.file.write_all(bytes)
    }

    fn sync(&self) -> io::Result<()> {
        failpoint!("download-sync", Err(io::ErrorKind::StorageFull.into()));
        self.file.sync_all()
    }
}

/// Whether a blob that is in the cache already has the announced content.
///
/// # Errors
/// The file cannot be read.
pub(super) fn is_intact(blob: &Path, metadata: &FileMetadata) -> io::Result<bool> {
    let mut file = File::open(blob)?;
    let length = file.metadata()?.len();
    if metadata.size.is_some_and(|size| size != length) {
        return Ok(false);
    }
    Ok(match &metadata.etag {
        EntityTag::Sha256(announced) => {
            let mut sha256 = Sha256::new();
            io::copy(&mut file, &mut sha256)?;
            format!("{:x}", sha256.finalize()) == *announced
        }
        EntityTag::GitBlob(announced) => git_blob_hash(&mut file, length)? == *announced,
        EntityTag::Opaque(_) => true,
    })
}

fn check_digest(name: &str, found: &str, announced: &str) -> Result<(), HubError> {
    if found == announced {
        return Ok(());
    }
    Err(HubError::Damaged(format!("its {name} is {found}, the hub announced {announced}")))
}

/// SHA-1 of `blob <length>\0` and the content: the name that git gives to a file's content.
fn git_blob_hash(content: &mut impl Read, length: u64) -> io::Result<String> {
    let mut sha1 = Sha1::new();
    sha1.update(format!("blob {length}\0"));
    io::copy(content, &mut sha1)?;
    Ok(format!("{:x}", sha1.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    // `printf 'hello\n' | git hash-object --stdin`
    #[test]
    fn the_git_blob_hash_is_the_one_of_git() {
        let content = b"hello\n";
        assert_eq!(
            git_blob_hash(&mut content.as_slice(), content.len() as u64).unwrap(),
            "ce013625030ba8dba906f756967f9e9ca394464a"
        );
    }
}
