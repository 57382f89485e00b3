//! The model hub: its cache on disk, in the layout that other tools share, and verified downloads into it.
//!
//! A download is two requests. `HEAD` gives the commit, the size and the digest of a file; `GET` gives the content at that
//! commit. The content is written to `<blob>.incomplete`, which a later request or process continues, and gets its final
//! name only after size and digest (if the hub announced them) were checked and the file was synced. Text from the hub
//! becomes a path only after a check (`names`), and the access token is sent to the endpoint's own origin only (`url`).

mod cache;
mod error;
mod http;
mod lock;
mod names;
mod options;
mod partial;
mod response;
mod retry;
mod transfer;
mod url;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

pub use self::error::HubError;
pub use self::names::Revision;
pub use self::options::{HubOptions, NetworkPolicy};

use self::cache::RepoCache;
use self::http::HttpClient;
use self::lock::DownloadLock;
use self::names::{EntityTag, check_file_name};
use self::partial::is_intact;
use self::retry::Retries;
use self::transfer::Transfer;

/// The hub and its cache.
#[derive(Debug, Clone)]
pub struct Hub {
    options: HubOptions,
    policy: NetworkPolicy,
}

impl Hub {
    /// Opens no connection.
    pub fn new(options: HubOptions) -> Self {
        Self::with_policy(options, NetworkPolicy::default())
    }

    /// As [`Hub::new`], with other timeouts and retries.
    pub fn with_policy(options: HubOptions, policy: NetworkPolicy) -> Self {
        Self { options, policy }
    }

    /// The folder that holds the cached repositories.
    pub fn cache_folder(&self) -> &Path {
        &self.options.cache
    }

    /// Whether only cached files may be used.
    pub fn is_offline(&self) -> bool {
        self.options.offline
    }

    /// The file in the cache, if it is there.
    pub fn cached(&self, at: &Revision, file: &str) -> Option<PathBuf> {
        check_file_name(file).ok()?;
        RepoCache::new(&self.options.cache, at).ok()?.cached(file)
    }

    /// The path of the file in the cache; it is downloaded and verified if it is not there.
    ///
    /// # Errors
    /// The file does not exist, or is not cached when offline; the hub cannot be reached; the content is not what the hub
    /// announced; or the cache cannot be written. In the last three cases the chain of causes has a [`HubError`].
    pub fn fetch(&self, at: &Revision, file: &str) -> Result<PathBuf> {
        self.fetch_optional(at, file)?.ok_or_else(|| match self.options.offline {
            true => anyhow!("{file} of {at} is not cached"),
            false => anyhow!("{at} has no file {file}"),
        })
    }

    /// As [`Hub::fetch`], with `None` for a file that the repository does not have, or that is not cached when offline.
    ///
    /// # Errors
    /// The hub cannot be reached, the content is not what the hub announced, or the cache cannot be written. The chain of causes
    /// has a [`HubError`].
    pub fn fetch_optional(&self, at: &Revision, file: &str) -> Result<Option<PathBuf>> {
        if let Some(path) = self.cached(at, file) {
            return Ok(Some(path));
        }
        if self.options.offline {
            return Ok(None);
        }
        self.download(at, file).with_context(|| {
            format!(
                "cannot download {file} of {at}. If the hub is out of reach, set HF_ENDPOINT to a mirror, or copy the files into a folder and pass its path"
            )
        })
    }

    /// Asks the hub whether it has the file, and downloads nothing.
    ///
    /// # Errors
    /// The hub cannot be reached, or refuses access.
    pub fn probe(&self, at: &Revision, file: &str) -> Result<bool, HubError> {
        check_file_name(file)?;
        let client = HttpClient::new(&self.options, &self.policy)?;
        Ok(Retries::run(&self.policy, || client.metadata(at, &at.revision, file))?.is_some())
    }

    fn download(&self, at: &Revision, file: &str) -> Result<Option<PathBuf>, HubError> {
        check_file_name(file)?;
        let cache = RepoCache::new(&self.options.cache, at)?;
        let client = HttpClient::new(&self.options, &self.policy)?;
        // All files of a branch come from the commit of the first one, even if the branch moves in between.
        let known = cache.commit();
        let revision = known.as_ref().map_or(at.revision.as_str(), |commit| commit.as_str());
        let Some(metadata) = Retries::run(&self.policy, || client.metadata(at, revision, file))? else {
            return Ok(None);
        };

        cache.create_folders()?;
        let work_name = metadata.etag.work_name(&at.repository, file);
        let _lock = DownloadLock::acquire(&cache.lock_path(&work_name), &format!("{file} of {at}"))?;
        // Another process may have finished while this one waited for the lock.
        if let Some(blob_name) = metadata.etag.blob_name() {
            let blob = cache.blob(blob_name);
            if is_intact(&blob, &metadata).unwrap_or(false) {
                return cache.link(&metadata.commit, file, blob_name).map(Some);
            }
        } else if let Some(path) = Some(cache.snapshot(&metadata.commit, file)).filter(|path| path.is_file()) {
            return Ok(Some(path));
        }
        let incomplete = cache.incomplete(&work_name);
        let transfer = Transfer { client: &client, policy: &self.policy, at, file, metadata: &metadata };
        let sha256 = transfer.run(&incomplete)?;
        if matches!(metadata.etag, EntityTag::Opaque(_)) {
            tracing::warn!("{file} of {at}: the hub announced no digest, so its content was not checked");
        }
        let blob_name = metadata.etag.blob_name().unwrap_or(&sha256);
        cache.publish(&incomplete, blob_name)?;
        cache.link(&metadata.commit, file, blob_name).map(Some)
    }
}
