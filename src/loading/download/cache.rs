//! The cache folder of one repository, in the layout that `huggingface_hub` and other tools share:
//!
//! ```text
//! models--org--name/blobs/<entity tag>            content
//! models--org--name/blobs/<entity tag>.incomplete unfinished download
//! models--org--name/snapshots/<commit>/<file>     symbolic link to ../../blobs/<entity tag>
//! models--org--name/refs/<revision>               text file with the commit
//! .locks/models--org--name/<entity tag>.lock      held while the blob is downloaded
//! ```
//!
//! The hub's entity tags are digests of the content. Any other tag is replaced by a digest, see `EntityTag`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::error::HubError;
use super::names::{Commit, Revision};
use crate::failpoint::failpoint;

/// Paths and atomic updates of one repository's cache folder.
#[derive(Debug)]
pub(super) struct RepoCache {
    root: PathBuf,
    locks: PathBuf,
    revision: Revision,
}

impl RepoCache {
    /// # Errors
    /// The repository or the revision is not safe in a path.
    pub(super) fn new(cache: &Path, revision: &Revision) -> Result<Self, HubError> {
        revision.check()?;
        let folder = format!("models--{}", revision.repository.replace('/', "--"));
        Ok(Self { root: cache.join(&folder), locks: cache.join(".locks").join(&folder), revision: revision.clone() })
    }

    /// The commit that the revision stands for: itself, or what the last download recorded.
    pub(super) fn commit(&self) -> Option<Commit> {
        self.revision.commit().or_else(|| Commit::parse(fs::read_to_string(self.ref_path()).ok()?.trim()))
    }

    /// A cached file of the revision. `file` must have passed `check_file_name`.
    pub(super) fn cached(&self, file: &str) -> Option<PathBuf> {
        Some(self.snapshot(&self.commit()?, file)).filter(|path| path.is_file())
    }

    pub(super) fn snapshot(&self, commit: &Commit, file: &str) -> PathBuf {
        self.root.join("snapshots").join(commit.as_str()).join(file)
    }

    pub(super) fn blob(&self, name: &str) -> PathBuf {
        self.root.join("blobs").join(name)
    }

    /// `work_name` is from `EntityTag::work_name`: hexadecimal digits.
    pub(super) fn incomplete(&self, work_name: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{work_name}.incomplete"))
    }

    pub(super) fn lock_path(&self, work_name: &str) -> PathBuf {
        self.locks.join(format!("{work_name}.lock"))
    }

    /// Makes the folders for blobs and locks.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub(super) fn create_folders(&self) -> Result<(), HubError> {
        for folder in [&self.root.join("blobs"), &self.locks] {
            create_folder(folder)?;
        }
        Ok(())
    }

    /// Gives a complete, synced file its final name, so that it survives a crash.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub(super) fn publish(&self, incomplete: &Path, blob_name: &str) -> Result<(), HubError> {
        let blob = self.blob(blob_name);
        rename(incomplete, &blob).map_err(HubError::cache("create", &blob))?;
        sync_folder_of(&blob)
    }

    /// Links a file of the snapshot to the blob and records the commit of the revision. Returns the path of the link.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub(super) fn link(&self, commit: &Commit, file: &str, blob_name: &str) -> Result<PathBuf, HubError> {
        let link = self.snapshot(commit, file);
        if let Some(folder) = link.parent() {
            create_folder(folder)?;
        }
        let up = "../".repeat(file.matches('/').count());
        let target = PathBuf::from(format!("{up}../../blobs")).join(blob_name);
        replace_with_symlink(&target, &link).map_err(HubError::cache("create the symbolic link", &link))?;
        sync_folder_of(&link)?;
        if self.revision.commit().is_none() && self.commit().as_ref() != Some(commit) {
            self.write_ref(commit)?;
        }
        Ok(link)
    }

    fn write_ref(&self, commit: &Commit) -> Result<(), HubError> {
        let path = self.ref_path();
        if let Some(folder) = path.parent() {
            create_folder(folder)?;
        }
        let temporary = temporary_beside(&path);
        let write = || -> io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(commit.as_str().as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, &path)
        };
        write().map_err(HubError::cache("write", &path))?;
        sync_folder_of(&path)
    }

    fn ref_path(&self) -> PathBuf {
        self.root.join("refs").join(&self.revision.revision)
    }
}

fn rename(from: &Path, to: &Path) -> io::Result<()> {
    failpoint!("download-rename", Err(io::ErrorKind::StorageFull.into()));
    fs::rename(from, to)
}

/// Creates the link, or replaces a file or link of that name; fails if it is a folder. Never writes through an existing link.
fn replace_with_symlink(target: &Path, link: &Path) -> io::Result<()> {
    match std::os::unix::fs::symlink(target, link) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if fs::read_link(link).is_ok_and(|existing| existing == target) {
                return Ok(());
            }
            let temporary = temporary_beside(link);
            std::os::unix::fs::symlink(target, &temporary)?;
            fs::rename(&temporary, link)
        }
        result => result,
    }
}

/// A name that no other process uses, and no revision or file of a repository, as theirs never start with a dot.
fn temporary_beside(path: &Path) -> PathBuf {
    path.with_file_name(format!(".{}-{:016x}.tmp", std::process::id(), fastrand::u64(..)))
}

fn create_folder(folder: &Path) -> Result<(), HubError> {
    fs::create_dir_all(folder).map_err(HubError::cache("create the folder", folder))
}

fn sync_folder_of(path: &Path) -> Result<(), HubError> {
    let Some(folder) = path.parent() else { return Ok(()) };
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        // Some network and FUSE file systems cannot sync folders.
        Err(error) if !matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput) => {
            Err(HubError::cache("sync the folder", folder)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn repo(cache: &Path, revision: &str) -> RepoCache {
        RepoCache::new(cache, &Revision { repository: "org/name".to_owned(), revision: revision.to_owned() }).unwrap()
    }

    #[test]
    fn a_linked_blob_is_found_by_revision_and_by_commit() {
        let folder = tempfile::tempdir().unwrap();
        let cache = repo(folder.path(), "refs/pr/1");
        cache.create_folders().unwrap();
        fs::write(cache.incomplete("abc"), "content").unwrap();
        cache.publish(&cache.incomplete("abc"), "abc").unwrap();
        let path = cache.link(&Commit::parse(COMMIT).unwrap(), "config.json", "abc").unwrap();
        assert_eq!(cache.cached("config.json"), Some(path.clone()));
        assert_eq!(repo(folder.path(), COMMIT).cached("config.json"), Some(path.clone()));
        assert_eq!(repo(folder.path(), "main").cached("config.json"), None);
        assert_eq!(fs::read_to_string(path).unwrap(), "content");
        let reference = folder.path().join("models--org--name/refs/refs/pr/1");
        assert_eq!(fs::read_to_string(reference).unwrap(), COMMIT);
        let in_a_folder = cache.link(&Commit::parse(COMMIT).unwrap(), "1_Pooling/config.json", "abc").unwrap();
        assert_eq!(fs::read_to_string(in_a_folder).unwrap(), "content");
    }

    #[test]
    fn a_link_to_a_foreign_file_is_replaced_and_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let victim = folder.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        let cache = repo(folder.path(), "main");
        cache.create_folders().unwrap();
        let commit = Commit::parse(COMMIT).unwrap();
        let link = cache.snapshot(&commit, "config.json");
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(&victim, &link).unwrap();
        fs::write(cache.blob("abc"), "content").unwrap();
        cache.link(&commit, "config.json", "abc").unwrap();
        assert_eq!(fs::read_to_string(link).unwrap(), "content");
        assert_eq!(fs::read_to_string(victim).unwrap(), "precious");
    }

    #[test]
    fn a_reference_that_is_no_commit_is_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let cache = repo(folder.path(), "main");
        let reference = folder.path().join("models--org--name/refs/main");
        fs::create_dir_all(reference.parent().unwrap()).unwrap();
        fs::write(reference, "../../../../etc").unwrap();
        assert_eq!(cache.commit(), None);
    }
}
