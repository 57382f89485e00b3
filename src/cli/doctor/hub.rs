//! The model hub: its cache on disk, the access token, and on request whether it can be reached.

use std::path::Path;
use std::time::Duration;

use rustix::fs::{Access, access, statvfs};

use super::report::Report;
use crate::cli::output::bytes;
use crate::loading::catalogue;
use crate::loading::download::{Hub, HubError, HubOptions, NetworkPolicy, Revision};
use crate::loading::source::{ModelLocation, ModelSource};

/// The cache folder of the hub, as far as a download depends on it.
pub(super) struct CacheState {
    pub(super) writable: bool,
    /// Free space in bytes, if it is known.
    pub(super) free: Option<u64>,
}

/// Looks at the cache folder, or at the nearest folder above it that exists.
pub(super) fn check(report: &mut Report, options: &HubOptions) -> CacheState {
    report.section("Model hub");
    let folder = &options.cache;
    let existing = folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
    let writable = existing.is_dir() && access(existing, Access::WRITE_OK | Access::EXEC_OK).is_ok();
    let free = statvfs(existing).ok().map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    let space = free.map_or(String::new(), |free| format!(", {} free", bytes(free)));
    if writable {
        report.ok(format!("cache folder {}{space}", folder.display()));
    } else {
        report.note(
            format!("cache folder {} cannot be written: no downloads", folder.display()),
            "set HF_HOME to a folder that this user can write",
        );
    }
    match &options.token {
        Some(_) => report.ok("an access token is set"),
        None => report.ok("no access token (HF_TOKEN); only gated and private models need one"),
    }
    if options.offline {
        report.note("HF_HUB_OFFLINE is set: models come from the cache only", "");
    }
    if options.endpoint != HubOptions::DEFAULT_ENDPOINT {
        report.ok(format!("models are downloaded from {} (HF_ENDPOINT)", options.endpoint));
    }
    CacheState { writable, free }
}

/// Asks the hub for the configuration of each model of `sources` that is on the hub, or else of a known model.
pub(super) fn check_online(report: &mut Report, options: &HubOptions, sources: &[ModelSource]) {
    let policy = NetworkPolicy {
        connect_timeout: Duration::from_secs(5),
        read_timeout: Duration::from_secs(10),
        attempts: 1,
        ..NetworkPolicy::default()
    };
    let hub = Hub::with_policy(options.clone(), policy);
    let mut revisions: Vec<Revision> = sources
        .iter()
        .filter_map(|source| match &source.location {
            ModelLocation::Hub(at, _) => Some(at.clone()),
            _ => None,
        })
        .collect();
    if revisions.is_empty() {
        let known = catalogue::entries().iter().find_map(|entry| entry.hub.as_ref());
        revisions
            .extend(known.map(|hub| Revision { repository: hub.repository.clone(), revision: hub.revision.clone() }));
    }
    for at in revisions {
        match hub.probe(&at, "config.json") {
            Ok(true) => report.ok(format!("{} can be reached and has {at}", options.endpoint)),
            Ok(false) => report.problem(
                format!("{} has no config.json of {at}", options.endpoint),
                "check the name and the revision after --model",
            ),
            Err(error @ HubError::Unavailable { .. }) => report.problem(
                format!("the hub cannot be reached: {error}"),
                "set HTTPS_PROXY to a proxy or HF_ENDPOINT to a mirror, or download elsewhere and pass --model ./folder",
            ),
            Err(error) => report.problem(error.to_string(), ""),
        }
    }
}
