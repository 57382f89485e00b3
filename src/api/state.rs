//! The state that all handlers share.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use super::body::{ApiLimits, MemoryBudget};
use super::hosts::HostList;
use super::keys::Keys;
use super::origins::Origins;
use crate::error::RerankError;
use crate::served::Models;

/// The state that all handlers share.
#[derive(Debug)]
pub struct App {
    /// Empty while models are loading.
    models: OnceLock<Models>,
    pub(super) keys: Keys,
    pub(super) limits: ApiLimits,
    /// Hosts allowed in the Host header, and in the Origin header in addition to `origins`. With `None` neither is checked.
    pub(super) hosts: Option<HostList>,
    /// Origins of web pages that may use the server.
    pub(super) origins: Origins,
    pub(super) memory: MemoryBudget,
    pub(super) draining: AtomicBool,
}

impl App {
    /// State without models: requests are refused until [`App::set_models`].
    pub fn new(keys: Keys, limits: ApiLimits, hosts: Option<HostList>, origins: Origins) -> Arc<Self> {
        let memory = MemoryBudget::new(limits.max_inflight_bytes);
        Arc::new(Self {
            models: OnceLock::new(),
            keys,
            limits,
            hosts,
            origins,
            memory,
            draining: AtomicBool::new(false),
        })
    }

    /// Sets the models, once. A second call has no effect.
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

    /// Refuses every request that waits for scores, and all later ones, with [`RerankError::ShuttingDown`].
    pub(super) fn refuse_all(&self) {
        self.models.get().into_iter().flat_map(Models::iter).for_each(|model| model.scheduler.refuse_all());
    }
}
