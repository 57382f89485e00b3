//! The model hub: its cache on disk, and verified downloads into it, in the layout that other tools share.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::ProgressBar;
use sha2::{Digest, Sha256};

use crate::secret::Secret;
use crate::telemetry;

const RETRIES: usize = 4;

/// Where the hub is, and where its files are cached.
#[derive(Debug, Clone)]
pub struct HubOptions {
    /// Folder of the cached repositories.
    pub cache: PathBuf,
    /// Base URL of the hub or of a mirror.
    pub endpoint: String,
    /// Access token for gated and private repositories.
    pub token: Option<Secret>,
    /// Use cached files only.
    pub offline: bool,
}

impl HubOptions {
    pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
}

/// The hub and its cache.
#[derive(Debug, Clone)]
pub struct Hub {
    options: HubOptions,
    cache: Cache,
}

/// One revision of one repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revision {
    /// `organisation/name`
    pub repository: String,
    /// A commit, a tag or a branch.
    pub revision: String,
}

impl Hub {
    /// Nothing is contacted yet.
    pub fn new(options: HubOptions) -> Self {
        Self { cache: Cache::new(options.cache.clone()), options }
    }

    /// The folder that holds the cached repositories.
    pub fn cache_folder(&self) -> &Path {
        self.cache.path()
    }

    /// The file in the cache, if it is there.
    pub fn cached(&self, at: &Revision, file: &str) -> Option<PathBuf> {
        let repo = self.cache.repo(at.repo());
        // Other tools cache a commit without a reference of its own name, so look at the snapshot first.
        let snapshot = repo.pointer_path(&at.revision).join(file);
        if snapshot.exists() { Some(snapshot) } else { repo.get(file) }
    }

    /// The file, from the cache or else downloaded and verified.
    ///
    /// # Errors
    /// It does not exist, the hub cannot be reached, or what came is not what the hub announced.
    pub fn fetch(&self, at: &Revision, file: &str) -> Result<PathBuf> {
        self.fetch_if_there(at, file)?.ok_or_else(|| anyhow!("{at} has no file {file}"))
    }

    /// As [`Hub::fetch`], with `None` for a file that the repository does not have.
    ///
    /// # Errors
    /// The hub cannot be reached, or what came is not what the hub announced.
    pub fn fetch_if_there(&self, at: &Revision, file: &str) -> Result<Option<PathBuf>> {
        if let Some(path) = self.cached(at, file) {
            return Ok(Some(path));
        }
        if self.options.offline {
            return Ok(None);
        }
        let api = self.api()?;
        match download(&api, at, file) {
            Ok(path) => Ok(Some(path)),
            Err(error) if is_not_found(&error) => Ok(None),
            Err(error) => Err(error.context(format!(
                "cannot download {file} of {at}. If the hub is out of reach, name a mirror in HF_ENDPOINT, or copy the files into a folder and give its path"
            ))),
        }
    }

    /// Whether only cached files may be used.
    pub fn is_offline(&self) -> bool {
        self.options.offline
    }

    fn api(&self) -> Result<Api> {
        ApiBuilder::new()
            .with_cache_dir(self.options.cache.clone())
            .with_endpoint(self.options.endpoint.clone())
            .with_token(self.options.token.as_ref().map(|token| token.reveal().to_owned()))
            .with_retries(RETRIES)
            .build()
            .context("cannot set up the hub client")
    }
}

impl Revision {
    fn repo(&self) -> Repo {
        Repo::with_revision(self.repository.clone(), RepoType::Model, self.revision.clone())
    }
}

impl std::fmt::Display for Revision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {}", self.repository, self.revision)
    }
}

/// hf-hub resumes a broken download but checks nothing, so the result is held against the announced size and digest.
fn download(api: &Api, at: &Revision, file: &str) -> Result<PathBuf> {
    let repo = api.repo(at.repo());
    let expected = api.metadata(&repo.url(file))?;
    let path = repo.download_with_progress(file, DownloadBar(ProgressBar::hidden()))?;
    let blob = path.canonicalize()?;
    if let Err(error) = verify(&blob, expected.size() as u64, expected.etag()) {
        for damaged in [&path, &blob] {
            std::fs::remove_file(damaged).ok(); // the next attempt starts afresh
        }
        return Err(error.context(format!("{file} arrived damaged and was removed")));
    }
    Ok(path)
}

/// Large files carry their SHA-256 as the entity tag; small ones a git hash, for which the size must do.
fn verify(blob: &Path, size: u64, etag: &str) -> Result<()> {
    let mut file = File::open(blob)?;
    let found = file.metadata()?.len();
    ensure!(found == size, "it has {found} bytes, the hub announced {size}");
    if etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit()) {
        let mut digest = Sha256::new();
        std::io::copy(&mut file, &mut digest)?;
        let digest = format!("{:x}", digest.finalize());
        if !digest.eq_ignore_ascii_case(etag) {
            bail!("its SHA-256 is {digest}, the hub announced {etag}");
        }
    }
    Ok(())
}

fn is_not_found(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<ApiError>(), Some(ApiError::RequestError(e)) if e.to_string().contains("404"))
}

/// Our bar behind hf-hub's interface; it knows the size only when the download begins.
struct DownloadBar(ProgressBar);

impl hf_hub::api::Progress for DownloadBar {
    fn init(&mut self, size: usize, filename: &str) {
        self.0 = telemetry::progress_bytes(size as u64, &format!("downloading {filename}"));
    }

    fn update(&mut self, size: usize) {
        self.0.inc(size as u64);
    }

    fn finish(&mut self) {
        self.0.finish_and_clear();
    }
}
