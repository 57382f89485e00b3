//! Settings of the hub: what the user chooses, and the limits of the network code.

use std::path::PathBuf;
use std::time::Duration;

use crate::secret::Secret;

/// Where the hub is, and where its files are cached.
#[derive(Debug, Clone)]
pub struct HubOptions {
    /// Folder of the cached repositories.
    pub cache: PathBuf,
    /// Base URL of the hub or of a mirror.
    pub endpoint: String,
    /// Access token for gated and private repositories. It is sent to the endpoint's own origin only.
    pub token: Option<Secret>,
    /// Use cached files only.
    pub offline: bool,
}

impl HubOptions {
    pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
}

/// Timeouts and retries of the network code. Tests shorten them.
#[derive(Debug, Clone)]
pub struct NetworkPolicy {
    /// Maximum time of name resolution, and also of connecting with TLS after it.
    pub connect_timeout: Duration,
    /// Longest wait for response headers, and for each read of a body.
    pub read_timeout: Duration,
    /// Lowest accepted rate of a body, averaged over windows of `read_timeout`.
    pub min_bytes_per_second: u64,
    /// Attempts without progress before giving up.
    pub attempts: u32,
    /// Delay before the first retry. It doubles with each retry.
    pub first_delay: Duration,
    /// Longest delay before a retry, a `Retry-After` of the server included.
    pub max_delay: Duration,
}

impl Default for NetworkPolicy {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(30),
            min_bytes_per_second: 1024,
            attempts: 5,
            first_delay: Duration::from_millis(500),
            max_delay: Duration::from_secs(60),
        }
    }
}
