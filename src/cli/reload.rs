//! The thread that loads the models of `serve`: those of the start, and those of changed settings, which it reads again at SIGHUP.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::sync::oneshot;

use super::failure::Failure;
use super::output::bytes;
use crate::api::{App, Keys};
use crate::config::args::{FlagValues, ServeArgs};
use crate::config::hub::hub_options_from_env;
use crate::config::machine::{HostMemory, Machine};
use crate::config::resolve::{Notice, ServeSettings};
use crate::loading::Loader;
use crate::loading::download::Hub;
use crate::loading::source::{BUILTIN, ModelSource};
use crate::served::{Model, Models, check_names};

/// The flags that take effect at SIGHUP. All others need a restart.
const RELOADED_FLAGS: [&str; 7] = [
    "model",
    "alias",
    "accept-any-model",
    "api-key",
    "api-key-file",
    "key-requests-per-minute",
    "key-tokens-per-minute",
];

/// Time between two checks whether requests still use a model that is no longer served.
const RETIRED_INTERVAL: Duration = Duration::from_millis(50);

/// Reads the flags of `serve` from the same command line again.
pub(super) type ReadSettings = fn() -> Result<(ServeArgs, FlagValues), Failure>;

/// Asks the loading thread to read the settings again.
#[derive(Debug, Clone)]
pub(super) struct Reloads(SyncSender<()>);

impl Reloads {
    /// The receiver is for [`start`].
    pub(super) fn channel() -> (Self, Receiver<()>) {
        let (send, receive) = sync_channel(1);
        (Self(send), receive)
    }

    /// Asks for a reload after the one that is running, if there is one. Requests that come before it begins are one request.
    pub(super) fn request(&self) {
        self.0.try_send(()).ok();
    }
}

/// Starts the loading thread. It loads the models of `settings`, gives them to `app`, and sends the name of the first one, or why
/// they cannot be loaded. Then it waits for reloads. `flags` are the flags that `settings` come from, and how to read them again.
///
/// # Errors
/// The operating system refuses a thread.
pub(super) fn start(
    settings: Arc<ServeSettings>,
    flags: (FlagValues, ReadSettings),
    app: Arc<App>,
    reloads: Receiver<()>,
) -> std::io::Result<oneshot::Receiver<Result<String>>> {
    let (loaded, receive) = oneshot::channel();
    std::thread::Builder::new().name("loading".to_owned()).spawn(move || {
        let hub = hub_options_from_env().map(Hub::new);
        settings.models.notices.iter().for_each(Notice::log);
        let keeper = match &hub {
            Ok(hub) => ModelKeeper::start(&settings, flags, app, hub),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        };
        match keeper {
            Ok(mut keeper) => {
                let first = keeper.served.first().map(|(_, model)| model.name.clone()).unwrap_or_default();
                loaded.send(Ok(first)).ok();
                keeper.run(&reloads);
            }
            Err(error) => drop(loaded.send(Err(error))),
        }
    })?;
    Ok(receive)
}

/// The models of a server, and how they are loaded.
struct ModelKeeper<'a> {
    /// As at start.
    settings: &'a ServeSettings,
    /// As at start.
    values: FlagValues,
    read_again: ReadSettings,
    app: Arc<App>,
    loader: Loader<'a>,
    served: Vec<(ModelSource, Model)>,
    /// No longer served. They are kept here until no request uses them, because dropping the last handle waits for workers.
    retired: Vec<Model>,
}

impl<'a> ModelKeeper<'a> {
    fn start(
        settings: &'a ServeSettings,
        (values, read_again): (FlagValues, ReadSettings),
        app: Arc<App>,
        hub: &'a Hub,
    ) -> Result<Self> {
        let loader = Loader::new(hub, &settings.models.load)?;
        let mut keeper = Self { settings, values, read_again, app, loader, served: Vec::new(), retired: Vec::new() };
        keeper.serve(settings.models.sources.clone(), settings.accept_any_model, Self::load)?;
        Ok(keeper)
    }

    /// Reloads whenever a message comes, until all senders are gone.
    fn run(&mut self, reloads: &Receiver<()>) {
        loop {
            let wait = if self.retired.is_empty() { Duration::MAX } else { RETIRED_INTERVAL };
            match reloads.recv_timeout(wait) {
                Ok(()) => {
                    if catch_unwind(AssertUnwindSafe(|| self.reload())).is_err() {
                        tracing::error!("SIGHUP: loading panicked; the served models stay as they are");
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.unload_unused();
        }
    }

    /// Reads the settings again and applies those that can change. If they are not valid, nothing changes.
    fn reload(&mut self) {
        let settings = match self.read_settings() {
            Ok(settings) => settings,
            Err(reason) => return tracing::error!("SIGHUP: nothing is changed: {reason}"),
        };
        // Keys first: loading a model can take minutes, and removed keys must be refused before that.
        warn_of_short_keys(&settings.keys);
        if let Err(error) = self.app.set_keys(settings.keys) {
            tracing::warn!("SIGHUP: the API keys stay as they are: {error}");
        }
        match self.serve(settings.models.sources, settings.accept_any_model, Self::load_if_it_fits) {
            Ok(()) => {
                let names: Vec<&str> = self.served.iter().map(|(_, model)| model.name.as_str()).collect();
                tracing::info!(models = names.join(", "), "SIGHUP: the settings were read again");
            }
            Err(error) => tracing::error!("SIGHUP: the served models stay as they are: {error:#}"),
        }
    }

    /// The settings of now, from the same command line. Logs the changes that need a restart.
    fn read_settings(&self) -> Result<ServeSettings, String> {
        let (args, values) = (self.read_again)().map_err(|failure| failure.reason())?;
        // Perhaps an editor was writing the config file. So the built-in model replaces others only if it is named.
        if args.models.models.is_empty() && self.served.iter().any(|(source, _)| source.name != BUILTIN) {
            return Err(format!("there is no --model any more; to serve the built-in model, name it: {BUILTIN}"));
        }
        let settings = args.resolve(&Machine::detect()).map_err(|error| format!("{error:#}"))?;
        for (flag, value) in values {
            if self.values.get(&flag) != Some(&value) && !RELOADED_FLAGS.contains(&flag.as_str()) {
                tracing::warn!("SIGHUP: --{flag} has changed; that needs a restart");
            }
        }
        Ok(settings)
    }

    /// Serves the models of `sources`: those that are served already stay, the others are loaded with `load`. If that fails, the
    /// served models stay as they are.
    fn serve(
        &mut self,
        sources: Vec<ModelSource>,
        accept_any_name: bool,
        load: impl Fn(&Self, &ModelSource) -> Result<Model>,
    ) -> Result<()> {
        let aliases: Vec<Vec<String>> = sources.iter().map(ModelSource::all_aliases).collect();
        let names = |(source, aliases): (&'_ ModelSource, &'_ Vec<String>)| {
            std::iter::once(source.name.clone()).chain(aliases.iter().cloned()).collect::<Vec<_>>()
        };
        check_names(&sources.iter().zip(&aliases).map(names).collect::<Vec<_>>())?;
        let mut served = Vec::with_capacity(sources.len());
        for (source, aliases) in sources.into_iter().zip(aliases) {
            let model = match self.served.iter().find(|(own, _)| own.is_same_model(&source)) {
                Some((_, model)) => model.clone().with_aliases(aliases),
                None => load(self, &source)?,
            };
            served.push((source, model));
        }
        let models = Models::new(served.iter().map(|(_, model)| model.clone()).collect())?;
        self.app.set_models(if accept_any_name { models.accepting_any_name() } else { models });
        for (source, model) in std::mem::replace(&mut self.served, served) {
            if !self.served.iter().any(|(own, _)| own.is_same_model(&source)) {
                tracing::info!(
                    model = model.name,
                    "no longer served; its memory is freed when its requests are answered"
                );
                self.retired.push(model);
            }
        }
        Ok(())
    }

    fn load(&self, source: &ModelSource) -> Result<Model> {
        let loaded = self.loader.load(source)?;
        tracing::info!(model = loaded.name, "{}", loaded.description);
        let name = loaded.name.clone();
        let model = Model::start(loaded, self.settings.models.scheduler)
            .with_context(|| format!("cannot start the workers of {name}"))?;
        Ok(model.with_score_cache(self.settings.score_cache_bytes))
    }

    /// [`ModelKeeper::load`], but an error if the model needs more memory than the host has free: the kernel might end the process,
    /// and the served models with it.
    fn load_if_it_fits(&self, source: &ModelSource) -> Result<Model> {
        let (needed, _) = self.loader.memory(source)?;
        check_fits(&source.name, needed, HostMemory::detect().free)?;
        self.load(source)
    }

    /// Drops the retired models that no request uses.
    fn unload_unused(&mut self) {
        let is_unused = |model: &mut Model| Arc::strong_count(&model.scheduler) == 1;
        for model in self.retired.extract_if(.., is_unused) {
            let name = model.name.clone();
            drop(model);
            tracing::info!(model = name, "unloaded");
        }
    }
}

/// Logs the number of keys that are easy to guess.
pub(super) fn warn_of_short_keys(keys: &Keys) {
    if keys.short_keys() > 0 {
        tracing::warn!(
            "{} API keys have fewer than 16 characters and are easy to guess; `openssl rand -hex 32` makes a better one",
            keys.short_keys()
        );
    }
}

/// # Errors
/// The model needs more bytes than are free, as far as known.
fn check_fits(model: &str, needed: u64, free: Option<u64>) -> Result<()> {
    ensure!(
        free.is_none_or(|free| needed <= free),
        "{model} needs about {} of memory and {} are free; first remove another model from the settings, send SIGHUP, and wait until \
         the log says that it is unloaded",
        bytes(needed),
        bytes(free.unwrap_or_default())
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_needs_more_memory_than_is_free_is_refused_with_both_figures() {
        assert!(check_fits("m", 2_000_000, Some(2_000_000)).is_ok() && check_fits("m", 2_000_000, None).is_ok());
        let error = check_fits("m", 2_000_000_000, Some(1_000_000)).unwrap_err().to_string();
        assert!(error.contains("m needs about 2.0 GB of memory and 1 MB are free"), "{error}");
    }
}
