//! CUDA graphs: small batches are captured once per layout and then replayed with a single launch.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaStream};

use super::batch_layout::Layout;
use crate::backend::BackendError;

/// Tokens of the largest batch that is captured. Launching the kernels of smaller ones takes as long as running them.
pub(super) const MAX_GRAPH_TOKENS: usize = 2048;
/// Layouts that are remembered; batches of further layouts are launched kernel by kernel.
const MAX_GRAPHS: usize = 256;

/// The captured graphs of an execution context, by batch layout.
#[derive(Debug, Default)]
pub(super) struct GraphCache(RefCell<HashMap<Layout, GraphState>>);

/// The state that capturing shares with the downloads of the batch.
#[derive(Debug, Default)]
pub(super) struct CaptureState {
    /// Downloads of the current batch. Only batches with a single one, the logits, are captured.
    pub(super) downloads: Cell<usize>,
    /// Launches are being captured, so nothing runs.
    pub(super) capturing: Cell<bool>,
}

enum GraphState {
    /// Batches ran kernel by kernel, the last with this number of downloads.
    Seen {
        downloads: usize,
    },
    /// Capturing failed: launch kernel by kernel.
    Uncapturable,
    Captured(CudaGraph),
}

impl std::fmt::Debug for GraphState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Seen { .. } => "Seen",
            Self::Uncapturable => "Uncapturable",
            Self::Captured(_) => "Captured",
        })
    }
}

impl GraphCache {
    /// Drops all graphs, for example because the buffers' addresses change.
    pub(super) fn clear(&self) {
        self.0.borrow_mut().clear();
    }

    /// Runs a batch of this layout. The first runs kernel by kernel; for the second, the launches are captured as a graph; it and
    /// all later ones run as that graph. Returns what `launch` returned, or `None` if a graph was launched.
    pub(super) fn run<T>(
        &self,
        stream: &Arc<CudaStream>,
        layout: Layout,
        state: &CaptureState,
        launch: impl Fn() -> Result<T, BackendError>,
    ) -> Result<Option<T>, BackendError> {
        let mut graphs = self.0.borrow_mut();
        let downloads = match graphs.get(&layout) {
            Some(GraphState::Captured(graph)) => {
                graph.launch()?;
                return Ok(None);
            }
            Some(GraphState::Uncapturable) => return launch().map(Some),
            Some(GraphState::Seen { downloads }) => Some(*downloads),
            None => None,
        };
        if downloads != Some(1) {
            let result = launch()?;
            if graphs.len() < MAX_GRAPHS {
                graphs.insert(layout, GraphState::Seen { downloads: state.downloads.get() });
            }
            return Ok(Some(result));
        }
        let graph = match capture(stream, state, &launch) {
            Ok(Some(graph)) => graph,
            failed => {
                // If the device is lost, the launch below fails too.
                let reason = failed.err().map_or_else(|| "nothing was captured".to_owned(), |error| error.to_string());
                tracing::warn!(
                    ?layout,
                    reason,
                    "cannot capture a CUDA graph; batches of this layout are launched kernel by kernel"
                );
                graphs.insert(layout, GraphState::Uncapturable);
                return launch().map(Some);
            }
        };
        graph.launch()?;
        graphs.insert(layout, GraphState::Captured(graph));
        Ok(None)
    }
}

fn capture<T>(
    stream: &Arc<CudaStream>,
    state: &CaptureState,
    launch: impl Fn() -> Result<T, BackendError>,
) -> Result<Option<CudaGraph>, BackendError> {
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    state.capturing.set(true);
    let launched = launch();
    state.capturing.set(false);
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags);
    launched?;
    Ok(graph?)
}
