//! Why a download failed, sorted by what the caller can do about it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The reason why a file could not be downloaded.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The repository, revision or file does not exist (404).
    #[error("{0}")]
    NotFound(String),
    /// The hub refuses access (401 or 403).
    #[error("{0}")]
    AccessDenied(String),
    /// Network failure, 408, 429 or 5xx. A later attempt may succeed.
    #[error("{reason}")]
    Unavailable { reason: String, retry_after: Option<Duration> },
    /// The hub answered with something that the protocol does not allow, or that is not safe to use.
    #[error("{0}")]
    InvalidResponse(String),
    /// A repository, revision or file name that must not become part of a path or URL.
    #[error("{0}")]
    UnsafeName(String),
    /// The content is not what the hub announced.
    #[error("{0}")]
    Damaged(String),
    /// The cache cannot be read or written.
    #[error("cannot {action} {path}: {source}{advice}", path = path.display(), advice = cache_advice(source))]
    Cache { action: &'static str, path: PathBuf, source: io::Error },
}

impl HubError {
    /// A network failure without a hint when to retry.
    pub(super) fn unavailable(reason: impl Into<String>) -> Self {
        Self::Unavailable { reason: reason.into(), retry_after: None }
    }

    /// For `map_err`: a failed file operation on `path`.
    pub(super) fn cache(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Cache { action, path, source }
    }

    /// Whether the same request may succeed later without a change of settings.
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

fn cache_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space and start again, the download continues where it stopped"
        }
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
            "; set HF_HOME to a folder that this user can write"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_errors_name_the_path_and_a_way_out() {
        for (kind, advice) in [
            (io::ErrorKind::StorageFull, "free some space"),
            (io::ErrorKind::ReadOnlyFilesystem, "HF_HOME"),
            (io::ErrorKind::PermissionDenied, "HF_HOME"),
        ] {
            let message = HubError::cache("write", Path::new("/cache/blob"))(kind.into()).to_string();
            assert!(message.contains("/cache/blob") && message.contains(advice), "{message}");
        }
    }
}
