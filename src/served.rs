//! The models that this process serves, by name.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::background;
use crate::batch::Pair;
use crate::client::{Client, ClientId};
use crate::error::RerankError;
use crate::loading::download::Hub;
use crate::loading::source::ModelSource;
use crate::loading::{LoadOptions, LoadedModel, Loader};
use crate::scheduler::{Deadline, Scheduler, SchedulerLimits, Scores};
use crate::score::ScoreMap;
use crate::score_cache::ScoreCache;
use crate::text::TextEncoder;

/// A batch that has run for longer does not count as a sign of health. Even a large model on a small CPU needs less time.
const MAX_BATCH_TIME: Duration = Duration::from_secs(120);

/// Maximum characters of a requested model name in an error message.
const MAX_NAME_CHARS: usize = 128;
/// Maximum leading parts of a requested model name that are ignored as a gateway's prefix.
const MAX_PREFIX_PARTS: usize = 8;

/// Requests with more tokens are looked up in the cache on background threads.
const LARGE_LOOKUP_TOKENS: usize = 65_536;

/// A served model: its names, its text encoder and its scheduler. Clones are the same model. Dropping the last of them waits for the
/// workers, see [`Scheduler`].
#[derive(Debug, Clone)]
pub struct Model {
    /// The name in responses.
    pub name: String,
    /// Precision of the GEMMs, or the name of the implementation.
    pub dtype: &'static str,
    /// Other names that requests may use.
    pub aliases: Vec<String>,
    /// From logits to scores.
    pub score_map: ScoreMap,
    /// Text to pairs.
    pub text: TextEncoder,
    /// Pairs to logits.
    pub scheduler: Arc<Scheduler>,
    /// Logits of earlier pairs, if they are kept.
    cache: Option<Arc<ScoreCache>>,
}

/// Every served model. The set does not change: to serve others, replace it.
#[derive(Debug)]
pub struct Models {
    /// In the order of the command line.
    models: Vec<Arc<Model>>,
    /// Whether requests for an unknown model go to the first one.
    accepts_any_name: bool,
}

impl Model {
    /// Starts the workers of a loaded model.
    ///
    /// # Errors
    /// The operating system refuses a thread.
    pub fn start(loaded: LoadedModel, limits: SchedulerLimits) -> std::io::Result<Self> {
        let LoadedModel { name, aliases, score_map, text, dtype, encoder, .. } = loaded;
        let scheduler = Arc::new(Scheduler::start(&name, encoder, limits)?);
        Ok(Self { name, dtype, aliases, score_map, text, scheduler, cache: None })
    }

    /// The same model under other aliases.
    #[must_use]
    pub fn with_aliases(self, aliases: Vec<String>) -> Self {
        Self { aliases, ..self }
    }

    /// Keeps logits in at most `bytes` bytes of memory; 0 keeps none.
    #[must_use]
    pub fn with_score_cache(self, bytes: usize) -> Self {
        let cache = ScoreCache::new(&self.name, bytes).map(Arc::new);
        Self { cache, ..self }
    }

    /// The logits of a client's pairs. Those that the cache does not have are admitted to the queue and scored.
    ///
    /// # Errors
    /// As [`Scheduler::admit`], [`Client::take_tokens`] and [`Scheduler::score`].
    pub async fn score(
        &self,
        client: &Client,
        pairs: Vec<Pair>,
        deadline: Option<Deadline>,
    ) -> Result<Scores, RerankError> {
        let Some(cache) = &self.cache else { return self.compute(client, pairs, deadline).await };
        let (id, is_large) = (client.id, pairs.iter().map(Pair::tokens).sum::<usize>() > LARGE_LOOKUP_TOKENS);
        let look_up = {
            let cache = Arc::clone(cache);
            move || cache.look_up(id, pairs)
        };
        let (lookup, missing) = background::run_if(is_large, look_up).await?;
        let mut scores = self.compute(client, missing, deadline).await?;
        let cache = Arc::clone(cache);
        let computed = std::mem::take(&mut scores.logits);
        scores.logits = background::run_if(is_large, move || cache.complete(lookup, &computed)).await?;
        Ok(scores)
    }

    async fn compute(
        &self,
        client: &Client,
        pairs: Vec<Pair>,
        deadline: Option<Deadline>,
    ) -> Result<Scores, RerankError> {
        let tokens = pairs.iter().map(Pair::tokens).sum();
        let permit = self.scheduler.admit(client.id, tokens, deadline)?;
        client.take_tokens(tokens)?;
        self.scheduler.score(pairs, permit, deadline).await
    }

    /// Checks that an inference has succeeded within `recent`, or succeeds now within `timeout_s` seconds. A model that has
    /// succeeded before and has run its batch for less than two minutes passes too.
    ///
    /// # Errors
    /// Why the inference did not succeed.
    pub async fn check(&self, recent: Duration, timeout_s: u64) -> Result<(), RerankError> {
        let last_success = self.scheduler.last_success();
        let busy = self.scheduler.running_since().is_some_and(|since| since.elapsed() < MAX_BATCH_TIME);
        if last_success.is_some_and(|at| busy || at.elapsed() < recent) {
            return Ok(());
        }
        let pair = self.text.probe().map_err(RerankError::Internal)?;
        let deadline = Deadline::after(timeout_s);
        let permit = self.scheduler.admit(ClientId::Only, pair.tokens(), None)?;
        let scored = self.scheduler.score(vec![pair], permit, Some(deadline));
        match tokio::time::timeout_at(deadline.at.into(), scored).await {
            Ok(result) => result.map(|_| ()),
            Err(_) => Err(RerankError::Deadline { seconds: timeout_s }),
        }
    }

    fn is_called(&self, name: &str) -> bool {
        self.names().any(|own| own.eq_ignore_ascii_case(name))
    }

    /// The name and its aliases.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.name.as_str()).chain(self.aliases.iter().map(String::as_str))
    }
}

impl Models {
    /// Loads every model and starts its workers. `report` gets each model's name and description.
    ///
    /// # Errors
    /// A model cannot be downloaded or read; two models have the same name.
    pub fn load(
        sources: &[ModelSource],
        hub: &Hub,
        options: &LoadOptions,
        limits: SchedulerLimits,
        mut report: impl FnMut(&str, &str),
    ) -> anyhow::Result<Self> {
        let loader = Loader::new(hub, options)?;
        let mut models = Vec::with_capacity(sources.len());
        for source in sources {
            let loaded = loader.load(source)?;
            report(&loaded.name, &loaded.description);
            models.push(Model::start(loaded, limits)?);
        }
        Self::new(models)
    }

    /// # Errors
    /// Two models have the same name or alias.
    pub fn new(models: Vec<Model>) -> anyhow::Result<Self> {
        check_names(&models.iter().map(|model| model.names().collect()).collect::<Vec<_>>())?;
        Ok(Self { models: models.into_iter().map(Arc::new).collect(), accepts_any_name: false })
    }

    /// The model with this name or alias, in upper or lower case. A gateway's prefix is ignored
    /// (`fireworks/BAAI/bge-reranker-v2-m3`).
    ///
    /// # Errors
    /// [`RerankError::UnknownModel`]
    pub fn find(&self, name: &str) -> Result<&Arc<Model>, RerankError> {
        let called = |name: &str| self.models.iter().find(|model| model.is_called(name));
        let suffixes = name.match_indices('/').take(MAX_PREFIX_PARTS).map(|(slash, _)| &name[slash + 1..]);
        std::iter::once(name).chain(suffixes).find_map(called).ok_or_else(|| RerankError::UnknownModel {
            model: name.chars().take(MAX_NAME_CHARS).collect(),
            served: self.served_names(),
        })
    }

    /// The model with this name or alias, as [`Models::find`]; without a name, or with an empty one, the first model.
    ///
    /// # Errors
    /// [`RerankError::UnknownModel`]
    pub fn choose(&self, name: Option<&str>) -> Result<&Arc<Model>, RerankError> {
        let name = name.map(str::trim).unwrap_or_default();
        match self.find(name) {
            Err(unknown) => self.models.first().filter(|_| name.is_empty() || self.accepts_any_name).ok_or(unknown),
            found => found,
        }
    }

    fn served_names(&self) -> String {
        self.iter().map(|model| model.name.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// From now on, requests for an unknown model go to the first one.
    #[must_use]
    pub fn accepting_any_name(self) -> Self {
        Self { accepts_any_name: true, ..self }
    }

    /// The models, in the order of the command line.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Model>> {
        self.models.iter()
    }

    /// Waits until nothing is queued or computed, or until `until`.
    pub async fn drained(&self, until: Instant) {
        while Instant::now() < until && self.iter().any(|model| model.scheduler.waiting_tokens() > 0) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Checks the names of several models, one list for each.
///
/// # Errors
/// Two models have a name in common, in upper or lower case.
pub fn check_names(models: &[Vec<impl AsRef<str>>]) -> anyhow::Result<()> {
    for (i, names) in models.iter().enumerate() {
        let is_taken =
            |name: &&str| models[..i].iter().flatten().any(|other| other.as_ref().eq_ignore_ascii_case(name));
        if let Some(name) = names.iter().map(AsRef::as_ref).find(is_taken) {
            anyhow::bail!("two models are called {name:?}; name one of them with --model NAME=MODEL");
        }
    }
    Ok(())
}
