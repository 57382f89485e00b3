//! What one batch in flight has to itself: a stream, memory for its activations, and the two pinned blocks through which the
//! host and the device talk, one upload and one download a batch.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaSlice, CudaStream, result};

use super::batch_layout::Layout;
use super::device::Device;
use super::dtype::CudaDtype;
use super::fp8::ValueBound;
use super::gemm::cublaslt::CublasLt;
use super::gemm::tuning_store::TuningStore;
use super::gemm::wgmma::WgmmaGemm;
use super::launch::device_address;
use super::options::CudaOptions;
use super::workspace::{Region, Workspace};
use crate::backend::BackendError;
use crate::batch::Batch;

/// Batches up to so many tokens are launched as one captured graph: their launches would take as long as they do.
const GRAPH_TOKENS: usize = 2048;
/// Bytes of a device's memory that contexts leave to the driver, or a twentieth of it where that is less.
const MOST_KEPT_FREE: usize = 256 << 20;
/// Layouts of small batches that a ctx remembers; a further one is launched kernel by kernel.
const MAX_GRAPHS: usize = 256;

/// A stream and everything that its batches need. What knows addresses goes before the memory, the device last.
#[derive(Debug)]
pub struct ExecContext {
    graphs: RefCell<HashMap<Layout, Replay>>,
    pub(super) gemms: CublasLt,
    memory: Memory,
    pub(super) stream: Arc<CudaStream>,
    pub(super) device: Arc<Device>,
    /// The batch that is being computed.
    staged: Cell<Option<Staged>>,
    /// Downloads of the batch so far. A graph has one: the logits.
    downloads: Cell<usize>,
    capturing: Cell<bool>,
}

/// A layout's way from its first batch to its graph.
enum Replay {
    /// It was launched once kernel by kernel, with so many downloads.
    Seen(usize),
    /// Recording it failed: it is launched kernel by kernel.
    Never,
    Graph(CudaGraph),
}

impl std::fmt::Debug for Replay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Seen(_) => "Seen",
            Self::Never => "Never",
            Self::Graph(_) => "Graph",
        })
    }
}

// SAFETY: a graph may be used by any thread, by one at a time; `ExecContext` is not Sync.
unsafe impl Send for ExecContext {}

/// Device and pinned memory for batches of up to `tokens` tokens.
#[derive(Debug)]
struct Memory {
    tokens: usize,
    activations: CudaSlice<u8>,
    base: u64,
    workspace: Workspace,
    upload: Pinned<u32>,
    _upload_device: CudaSlice<u8>,
    upload_at: u64,
    answers: Pinned<f32>,
}

/// A batch on its way: its layout and where its upload lies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Staged {
    pub(super) layout: Layout,
    pub(super) tokens: usize,
    pub(super) sequences: usize,
    upload_at: u64,
}

/// Rows of activations in a ctx's memory.
#[derive(Debug)]
pub struct Buffer {
    pub(super) at: u64,
    pub(super) rows: Rows,
    pub(super) columns: usize,
    pub(super) format: StorageFormat,
    /// What rows are at most, where gemms are of E4M3 and it is known.
    pub(super) bound: Option<ValueBound>,
    /// The same rows as gemms multiply them, where whoever made these made those along.
    pub(super) operand: Option<Box<Buffer>>,
    _region: Region,
}

/// How a buffer's values are stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum StorageFormat {
    /// As the backend's dtype.
    Native,
    /// As f32.
    F32,
    /// As E4M3, multiplied by `scale`: for gemms alone.
    E4m3 { scale: f32 },
}

/// How many rows a buffer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    /// One a token.
    Tokens,
    /// One a sequence.
    Sequences,
}

impl Staged {
    /// The address of a place in the upload.
    pub(super) fn address(&self, place: usize) -> u64 {
        self.upload_at + 4 * place as u64
    }

    /// The address of a buffer's true row count.
    pub(super) fn count(&self, rows: Rows) -> u64 {
        self.address(self.layout.counts() + usize::from(rows == Rows::Sequences))
    }

    /// A buffer's rows, rounded up.
    pub(super) fn rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.layout.token_rows,
            Rows::Sequences => self.layout.sequence_rows,
        }
    }
}

impl Buffer {
    /// The address of values of the dtype, which all but gemms and the head read.
    pub(super) fn elements(&self) -> Result<u64, BackendError> {
        if self.format == StorageFormat::Native {
            return Ok(self.at);
        }
        Err(BackendError::Failed(format!("values are wanted that are stored as {:?}", self.format).into()))
    }
}

impl ExecContext {
    /// A ctx with memory for batches of `tokens` tokens, or of as many as the device has memory for: half, a quarter and so on.
    /// `row_bytes` is what a token needs.
    pub(super) fn new(
        device: Arc<Device>,
        options: &CudaOptions,
        tuning_store: Arc<TuningStore>,
        row_bytes: usize,
    ) -> Result<Self, BackendError> {
        let stream = device.context.new_stream()?;
        let own = WgmmaGemm::of(&device, options);
        let gemms = CublasLt::new(Arc::clone(&stream), options.dtype, tuning_store, options.batch_invariant, own)?;
        let mut tokens = options.max_batch_tokens;
        let memory = loop {
            match Memory::new(&stream, tokens, row_bytes) {
                Err(BackendError::OutOfMemory(_)) if tokens > 64 => tokens /= 2,
                outcome => break outcome?,
            }
        };
        Ok(Self {
            device,
            stream,
            gemms,
            memory,
            staged: Cell::new(None),
            graphs: RefCell::default(),
            downloads: Cell::new(0),
            capturing: Cell::new(false),
        })
    }

    /// Tokens of the largest batch that fits.
    pub(super) fn capacity(&self) -> usize {
        self.memory.tokens
    }

    /// Exchanges the memory for one that `tokens` tokens fit in.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`]; the ctx is as it was.
    pub(super) fn grow(&mut self, tokens: usize, row_bytes: usize) -> Result<(), BackendError> {
        let memory = Memory::new(&self.stream, tokens, row_bytes)?;
        self.graphs.borrow_mut().clear(); // they know the old memory's addresses
        self.memory = memory;
        Ok(())
    }

    /// Has the next batch of each layout choose its gemms' algorithms again.
    pub(super) fn forget_plans(&mut self) {
        self.graphs.borrow_mut().clear();
        self.gemms.forget_plans();
    }

    /// The memory itself, and its bytes, for tuning_store.
    pub(super) fn activations(&self) -> (u64, usize) {
        (self.memory.base, self.memory.activations.len())
    }

    /// The batch being computed.
    pub(super) fn staged(&self) -> Staged {
        self.staged.get().expect("operations run inside Backend::run")
    }

    /// Room for a buffer of the staged batch.
    pub(super) fn buffer(
        &self,
        rows: Rows,
        columns: usize,
        dtype: CudaDtype,
        format: StorageFormat,
    ) -> Result<Buffer, BackendError> {
        let size = match format {
            StorageFormat::Native => dtype.bytes(),
            StorageFormat::F32 => 4,
            StorageFormat::E4m3 { .. } => 1,
        };
        let bytes = self.staged().rows(rows) * columns * size;
        let region = self.memory.workspace.take(bytes).ok_or_else(|| {
            BackendError::Failed(format!("a ctx's memory for {} tokens is too small", self.memory.tokens).into())
        })?;
        let at = self.memory.base + region.offset() as u64;
        Ok(Buffer { at, rows, columns, format, bound: None, operand: None, _region: region })
    }

    /// Uploads the batch and runs `graph` over it, as a captured graph where `replay` allows it and it is worth it, and waits
    /// for the logits.
    pub(super) fn run(
        &mut self,
        batch: &Batch,
        replay: bool,
        graph: impl Fn(&Self) -> Result<Vec<f32>, BackendError>,
    ) -> Result<Vec<f32>, BackendError> {
        self.device.context.bind_to_thread()?;
        let layout = Layout::of(batch);
        let upload = &mut self.memory.upload.values_mut()[..layout.len()];
        layout.write(batch, upload);
        // SAFETY: the pinned block is written again only after the stream has been waited for, at the end of this function.
        unsafe { result::memcpy_htod_async(self.memory.upload_at, upload, self.stream.cu_stream()) }?;
        self.staged.set(Some(Staged {
            layout,
            tokens: batch.tokens(),
            sequences: batch.sequences(),
            upload_at: self.memory.upload_at,
        }));
        self.downloads.set(0);
        let small = layout.token_rows <= GRAPH_TOKENS;
        let outcome = if replay && small { self.replay(batch, layout, &graph) } else { graph(self) };
        self.staged.set(None);
        // Whatever happened, nothing of this batch is in flight when the next one is written.
        self.stream.synchronize()?;
        outcome
    }

    /// A layout's first batch is launched kernel by kernel, its second is recorded, and the others are replayed.
    fn replay(
        &self,
        batch: &Batch,
        layout: Layout,
        graph: impl Fn(&Self) -> Result<Vec<f32>, BackendError>,
    ) -> Result<Vec<f32>, BackendError> {
        let mut graphs = self.graphs.borrow_mut();
        let seen = match graphs.get(&layout) {
            Some(Replay::Graph(captured)) => {
                captured.launch()?;
                return self.answers(batch.sequences());
            }
            Some(Replay::Never) => return graph(self),
            Some(Replay::Seen(downloads)) => Some(*downloads),
            None => None,
        };
        if seen != Some(1) {
            let logits = graph(self)?;
            if graphs.len() < MAX_GRAPHS {
                graphs.insert(layout, Replay::Seen(self.downloads.get()));
            }
            return Ok(logits);
        }
        let captured = match self.record(&graph) {
            Ok(Some(captured)) => captured,
            failed => {
                // A device that is lost says so again at once.
                let why = failed.err().map_or_else(|| "nothing was recorded".to_owned(), |error| error.to_string());
                tracing::warn!(?layout, why, "this batch cannot be a graph; it is launched kernel by kernel");
                graphs.insert(layout, Replay::Never);
                return graph(self);
            }
        };
        captured.launch()?;
        graphs.insert(layout, Replay::Graph(captured));
        self.answers(batch.sequences())
    }

    /// The launches of `graph`, as a graph.
    fn record(
        &self,
        graph: impl Fn(&Self) -> Result<Vec<f32>, BackendError>,
    ) -> Result<Option<CudaGraph>, BackendError> {
        self.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        self.capturing.set(true);
        let recorded = graph(self);
        self.capturing.set(false);
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let captured = self.stream.end_capture(flags);
        recorded?;
        Ok(captured?)
    }

    /// Waits for a download that is under way, of `length` values.
    fn answers(&self, length: usize) -> Result<Vec<f32>, BackendError> {
        self.stream.synchronize()?;
        Ok(self.memory.answers.values()[..length].to_vec())
    }

    /// The first `length` f32 values at `from`, on the host.
    pub(super) fn download(&self, from: u64, length: usize) -> Result<Vec<f32>, BackendError> {
        self.downloads.set(self.downloads.get() + 1);
        if self.capturing.get() {
            // As many as any batch of this layout has; the replay's caller reads its own number of them.
            self.copy_answers(from, self.staged().layout.sequence_rows)?;
            return Ok(vec![0.0; length]);
        }
        let mut values = Vec::with_capacity(length);
        for start in (0..length).step_by(self.memory.answers.length) {
            let part = (length - start).min(self.memory.answers.length);
            self.copy_answers(from + 4 * start as u64, part)?;
            values.extend(self.answers(part)?);
        }
        Ok(values)
    }

    fn copy_answers(&self, from: u64, length: usize) -> Result<(), BackendError> {
        // SAFETY: `from` is a buffer of at least so many values, and the pinned block has as many; nobody reads the block
        // before the stream has been waited for.
        unsafe {
            let to = std::slice::from_raw_parts_mut(self.memory.answers.at, length);
            result::memcpy_dtoh_async(to, from, self.stream.cu_stream())?;
        }
        Ok(())
    }
}

impl Drop for ExecContext {
    fn drop(&mut self) {
        // Whichever thread lets it go: pinned memory is freed in the thread's own context, and when nothing uses it any more.
        self.device.context.bind_to_thread().ok();
        self.stream.synchronize().ok();
    }
}

impl Memory {
    /// # Errors
    /// [`BackendError::OutOfMemory`] also where hardly anything would be left: the driver takes memory itself, for graphs and when
    /// a kernel first runs, and there it would mean the end.
    fn new(stream: &Arc<CudaStream>, tokens: usize, row_bytes: usize) -> Result<Self, BackendError> {
        let layout = Layout::largest(tokens);
        let activations = stream.alloc_zeros::<u8>(layout.token_rows * row_bytes)?;
        let upload_device = stream.alloc_zeros::<u8>(layout.len() * 4)?;
        let (free, all) = result::mem_get_info()?;
        let kept = MOST_KEPT_FREE.min(all / 20);
        if free < kept {
            // Given back to the driver when the stream is next waited for.
            drop((activations, upload_device));
            stream.synchronize()?;
            return Err(BackendError::OutOfMemory(
                format!("{} MiB of the device's memory would be left, {} are kept free", free >> 20, kept >> 20).into(),
            ));
        }
        Ok(Self {
            tokens,
            base: device_address(&activations, stream),
            workspace: Workspace::new(activations.len()),
            activations,
            upload: Pinned::new(layout.len())?,
            upload_at: device_address(&upload_device, stream),
            _upload_device: upload_device,
            answers: Pinned::new(layout.sequence_rows)?,
        })
    }
}

/// Host memory that the device reads and writes directly.
#[derive(Debug)]
struct Pinned<T> {
    at: *mut T,
    length: usize,
}

// SAFETY: plain memory of its owner's alone.
unsafe impl<T: Send> Send for Pinned<T> {}

impl<T: bytemuck::Pod> Pinned<T> {
    fn new(length: usize) -> Result<Self, BackendError> {
        let bytes = length * size_of::<T>();
        // SAFETY: the driver gives so many bytes, aligned to a page; zeros are values of a Pod type.
        unsafe {
            let at = result::malloc_host(bytes, 0)?;
            std::ptr::write_bytes(at.cast::<u8>(), 0, bytes);
            Ok(Self { at: at.cast(), length })
        }
    }

    fn values(&self) -> &[T] {
        // SAFETY: `length` initialised values; the device does not write them now, see `ExecContext::copy_answers`.
        unsafe { std::slice::from_raw_parts(self.at, self.length) }
    }

    fn values_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.length) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // SAFETY: from `malloc_host`; contexts wait for their stream before they let memory go.
        unsafe { result::free_host(self.at.cast()) }.ok();
    }
}
