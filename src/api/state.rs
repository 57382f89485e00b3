//! The state that all handlers share.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use super::body::{ApiLimits, MemoryBudget};
use super::hosts::HostList;
use super::keys::Keys;
use super::origins::Origins;
use crate::error::RerankError;
use crate::served::{Model, Models};

/// The state that all handlers share.
#[derive(Debug)]
pub struct App {
    /// `None` while the first models are loading.
    models: RwLock<Option<Arc<Models>>>,
    /// Models of earlier sets, as long as something uses them.
    replaced: Mutex<Vec<Weak<Model>>>,
    keys: RwLock<Arc<Keys>>,
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
            models: RwLock::default(),
            replaced: Mutex::default(),
            keys: RwLock::new(Arc::new(keys)),
            limits,
            hosts,
            origins,
            memory,
            draining: AtomicBool::new(false),
        })
    }

    /// Serves these models from now on, and no others. Requests that have chosen a model keep it until they are answered. Dropping
    /// the last handle of a model waits for its workers, so a server keeps one outside its async threads until no request does.
    pub fn set_models(&self, models: Models) {
        let old = self.models.write().unwrap_or_else(PoisonError::into_inner).replace(Arc::new(models));
        let mut replaced = self.replaced.lock().unwrap_or_else(PoisonError::into_inner);
        replaced.retain(|model| model.strong_count() > 0);
        replaced.extend(old.iter().flat_map(|models| models.iter()).map(Arc::downgrade));
    }

    /// The served models.
    ///
    /// # Errors
    /// [`RerankError::Loading`]
    pub fn models(&self) -> Result<Arc<Models>, RerankError> {
        self.models.read().unwrap_or_else(PoisonError::into_inner).clone().ok_or(RerankError::Loading)
    }

    /// Accepts these keys from now on, and no others.
    ///
    /// # Errors
    /// The server would begin or cease to require keys. That changes which hosts it accepts, so it needs a restart.
    pub fn set_keys(&self, keys: Keys) -> anyhow::Result<()> {
        let mut current = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        anyhow::ensure!(
            keys.is_open() == current.is_open(),
            "a server that runs {} needs a restart for that to change",
            if current.is_open() { "without API keys" } else { "with API keys" }
        );
        *current = Arc::new(keys.replacing(&current));
        Ok(())
    }

    /// The accepted keys.
    pub(super) fn keys(&self) -> Arc<Keys> {
        Arc::clone(&self.keys.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Refuses every request that waits for scores, and all later ones, with [`RerankError::ShuttingDown`].
    pub(super) fn refuse_all(&self) {
        let replaced = self.replaced.lock().unwrap_or_else(PoisonError::into_inner);
        replaced.iter().filter_map(Weak::upgrade).for_each(|model| model.scheduler.refuse_all());
        self.models().iter().flat_map(|models| models.iter()).for_each(|model| model.scheduler.refuse_all());
    }
}
