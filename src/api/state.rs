//! The state that every handler sees.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use super::body::{ApiLimits, MemoryBudget};
use super::hosts::HostList;
use super::keys::Keys;
use crate::error::RerankError;
use crate::served::Models;

/// The state that every handler sees.
#[derive(Debug)]
pub struct App {
    /// Empty while models are loading.
    models: OnceLock<Models>,
    pub(super) keys: Keys,
    pub(super) limits: ApiLimits,
    /// Hosts that requests may name; `None` allows every host.
    pub(super) hosts: Option<HostList>,
    pub(super) memory: MemoryBudget,
    pub(super) draining: AtomicBool,
}

impl App {
    /// The state of a server whose models are still to be loaded: see [`App::set_models`].
    pub fn new(keys: Keys, limits: ApiLimits, hosts: Option<HostList>) -> Arc<Self> {
        let memory = MemoryBudget::new(limits.max_inflight_bytes);
        Arc::new(Self { models: OnceLock::new(), keys, limits, hosts, memory, draining: AtomicBool::new(false) })
    }

    /// Serves these models from now on. A second call changes nothing.
    pub fn set_models(&self, models: Models) {
        self.models.set(models).ok();
    }

    /// The served models.
    ///
    /// # Errors
    /// [`RerankError::Loading`]
    pub fn models(&self) -> Result<&Models, RerankError> {
        self.models.get().ok_or(RerankError::Loading)
    }

    /// Answers every request that waits for scores with an error, now and later.
    pub(super) fn refuse_all(&self) {
        self.models.get().into_iter().flat_map(Models::iter).for_each(|model| model.scheduler.refuse_all());
    }
}
