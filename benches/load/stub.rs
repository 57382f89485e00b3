//! A model of known speed behind the real HTTP server: 5 ms for each chunk, one after another. It takes no processor time, so
//! that generator and server do not compete for processors.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use rerankd::api::{App, Server, serve};
use rerankd::backend::BackendError;
use rerankd::batch::Batch;
use rerankd::config::args::ServeArgs;
use rerankd::config::machine::Machine;
use rerankd::encoder::CrossEncoder;
use rerankd::loading::LoadedModel;
use rerankd::score::ScoreMap;
use rerankd::served::{Model, Models};
use rerankd::telemetry;
use rerankd::text::{EmbeddingRows, TextEncoder};

/// Time of one chunk.
const CHUNK_TIME: Duration = Duration::from_millis(5);
/// If a batch begins within this time of the last one's end, the model counts as busy throughout.
const CONTINUATION: Duration = Duration::from_millis(1);
const WINDOW: usize = 512;

/// The flags of `rerankd serve`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    serve: ServeArgs,
}

/// The stub model. Holds the time at which the last batch ends.
struct FixedSpeed(Mutex<Instant>);

impl CrossEncoder for FixedSpeed {
    fn score(&self, batch: &Batch) -> Result<Vec<f32>, BackendError> {
        let mut due = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let start = if *due + CONTINUATION > now { *due } else { now };
        *due = start + CHUNK_TIME * batch.sequences() as u32;
        std::thread::sleep(due.saturating_duration_since(now));
        // The score depends on the text, so that rankings can be compared.
        Ok(batch.ranges().map(|rows| (batch.ids()[rows].iter().sum::<u32>() % 1000) as f32 / 100.0 - 5.0).collect())
    }

    fn describe(&self) -> String {
        "stub of fixed speed".to_owned()
    }
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let settings = args.serve.resolve(&Machine::detect())?;
    let _log = telemetry::init_logs(telemetry::LogFormat::Text, "info");
    telemetry::metrics::prometheus();
    let server = Server::bind(settings.address)?;
    let address = server.address();
    let listener = server.listen()?;
    let rows = EmbeddingRows { vocabulary: 16_000, token_types: 1 };
    let tokenizer = include_bytes!("../../models/mini/tokenizer.json");
    let loaded = LoadedModel {
        score_map: ScoreMap::default(),
        name: "rerankd-mini".to_owned(),
        aliases: Vec::new(),
        text: TextEncoder::new(tokenizer, rows, WINDOW, settings.models.load.limits)?,
        encoder: Arc::new(FixedSpeed(Mutex::new(Instant::now()))),
        dtype: "stub",
        vocabulary: 16_000,
        description: String::new(),
    };
    let app = App::new(settings.keys, settings.limits, settings.hosts, settings.origins);
    app.set_models(Models::new(vec![Model::start(loaded, settings.models.scheduler)?])?);
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tracing::info!("listening on http://{address}");
    serve(listener, app, settings.timeouts, async move {
        terminate.recv().await;
    })
    .await;
    Ok(())
}
