//! Starting the models of a command that scores text.

use crate::config::hub::hub_options_from_env;
use crate::config::resolve::{ModelSettings, Notice};
use crate::loading::download::Hub;
use crate::served::Models;

/// Logs the notices, loads the models and starts their workers. Each model's name and description go to `report`.
///
/// # Errors
/// An environment variable of the hub that is not valid; as [`Models::load`].
pub(super) fn start_models(settings: &ModelSettings, report: impl FnMut(&str, &str)) -> anyhow::Result<Models> {
    settings.notices.iter().for_each(Notice::log);
    let hub = Hub::new(hub_options_from_env()?);
    Models::load(&settings.sources, &hub, &settings.load, settings.scheduler, report)
}
