//! Execution contexts: the stream, memory, GEMM handles and graphs of one batch in flight. A batch has one upload and usually
//! one download, the logits, both through pinned memory.

use std::cell::Cell;
use std::sync::Arc;

use cudarc::driver::{CudaStream, result};

use super::batch_layout::Layout;
use super::device::Device;
use super::dtype::CudaDtype;
use super::fp8::ValueBound;
use super::gemm::autotune::Gemms;
use super::gemm::tuning_store::TuningStore;
use super::gemm::wgmma::WgmmaGemm;
use super::graphs::{CaptureState, GraphCache, MAX_GRAPH_TOKENS};
use super::options::CudaOptions;
use super::workspace::{ContextMemory, Region};
use crate::backend::BackendError;
use crate::batch::Batch;

/// A stream and the resources of its batches. Fields drop in order: graphs and GEMMs refer to the memory, all refer to the device.
#[derive(Debug)]
pub struct ExecContext {
    graphs: GraphCache,
    pub(super) gemms: Gemms,
    memory: ContextMemory,
    pub(super) stream: Arc<CudaStream>,
    pub(super) device: Arc<Device>,
    staged: Cell<Option<StagedBatch>>,
    capture: CaptureState,
}

// SAFETY: graphs may be used from any thread, one at a time; `ExecContext` is not Sync.
unsafe impl Send for ExecContext {}

/// The batch being computed: its layout and the device address of its upload block.
#[derive(Debug, Clone, Copy)]
pub(super) struct StagedBatch {
    pub(super) layout: Layout,
    pub(super) tokens: usize,
    pub(super) sequences: usize,
    upload_at: u64,
}

/// Activations in an execution context's memory, `[rows, columns]`.
#[derive(Debug)]
pub struct Buffer {
    pub(super) at: u64,
    pub(super) rows: Rows,
    pub(super) columns: usize,
    pub(super) format: BufferFormat,
    /// Bound of the values, if GEMMs are fp8 and it is known.
    pub(super) bound: Option<ValueBound>,
    /// The same rows as an fp8 GEMM operand, if the kernel that computed these also stored them.
    pub(super) operand: Option<Box<Buffer>>,
    _region: Region,
}

/// Storage format of a buffer's values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum BufferFormat {
    /// The dtype of activations.
    Native,
    /// f32.
    F32,
    /// E4M3, multiplied by `scale`; only for GEMM operands.
    E4m3 { scale: f32 },
}

/// Which row count a buffer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    /// One row per token.
    Tokens,
    /// One row per sequence.
    Sequences,
}

impl StagedBatch {
    /// The device address of u32 number `index` of the upload.
    pub(super) fn address(&self, index: usize) -> u64 {
        self.upload_at + 4 * index as u64
    }

    /// The device address of a buffer's actual row count.
    pub(super) fn count(&self, rows: Rows) -> u64 {
        self.address(self.layout.counts() + usize::from(rows == Rows::Sequences))
    }

    /// A buffer's allocated rows: the row count, rounded up.
    pub(super) fn rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.layout.token_rows,
            Rows::Sequences => self.layout.sequence_rows,
        }
    }
}

impl Buffer {
    /// The device address of a buffer in native format.
    ///
    /// # Errors
    /// The buffer has another format.
    pub(super) fn native_address(&self) -> Result<u64, BackendError> {
        if self.format == BufferFormat::Native {
            return Ok(self.at);
        }
        Err(BackendError::Failed(format!("a kernel expects native activations, not {:?}", self.format).into()))
    }
}

impl ExecContext {
    /// Creates a context with memory for batches of `options.max_batch_tokens` tokens, or a half, a quarter and so on if the device
    /// lacks memory. `token_bytes` is the memory per token.
    pub(super) fn new(
        device: Arc<Device>,
        options: &CudaOptions,
        tuning_store: Arc<TuningStore>,
        token_bytes: usize,
    ) -> Result<Self, BackendError> {
        let stream = device.context.new_stream()?;
        let custom = WgmmaGemm::of(&device, options);
        let gemms = Gemms::new(Arc::clone(&stream), options.dtype, tuning_store, options.batch_invariant, custom)?;
        let mut tokens = options.max_batch_tokens;
        let memory = loop {
            match ContextMemory::new(&stream, tokens, token_bytes) {
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
            graphs: GraphCache::default(),
            capture: CaptureState::default(),
        })
    }

    /// Tokens of the largest batch that fits in memory.
    pub(super) fn capacity(&self) -> usize {
        self.memory.tokens
    }

    /// Replaces the memory by memory for `tokens` tokens.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`]; the context then keeps its memory.
    pub(super) fn grow(&mut self, tokens: usize, token_bytes: usize) -> Result<(), BackendError> {
        let memory = ContextMemory::new(&self.stream, tokens, token_bytes)?;
        self.graphs.clear(); // they contain addresses of the old memory
        self.memory = memory;
        Ok(())
    }

    /// Makes the next batch of each layout select its GEMM kernels again.
    pub(super) fn forget_gemm_kernels(&mut self) {
        self.graphs.clear();
        self.gemms.forget_selected();
    }

    /// Device address and bytes of the activation memory, for autotuning and measurements.
    pub(super) fn activation_memory(&self) -> (u64, usize) {
        (self.memory.base, self.memory.activations.len())
    }

    /// The batch being computed.
    ///
    /// # Panics
    /// No batch is being computed.
    pub(super) fn staged(&self) -> StagedBatch {
        self.staged.get().expect("operations run inside Backend::run")
    }

    /// Allocates a buffer for the staged batch. `dtype` is that of native values.
    pub(super) fn buffer(
        &self,
        rows: Rows,
        columns: usize,
        dtype: CudaDtype,
        format: BufferFormat,
    ) -> Result<Buffer, BackendError> {
        let size = match format {
            BufferFormat::Native => dtype.bytes(),
            BufferFormat::F32 => 4,
            BufferFormat::E4m3 { .. } => 1,
        };
        let bytes = self.staged().rows(rows) * columns * size;
        let region = self.memory.workspace.allocate(bytes).ok_or_else(|| {
            BackendError::Failed(format!("the workspace for {} tokens is too small", self.memory.tokens).into())
        })?;
        let at = self.memory.base + region.offset() as u64;
        Ok(Buffer { at, rows, columns, format, bound: None, operand: None, _region: region })
    }

    /// Uploads the batch, runs `graph` on it and waits for the logits, `[S]`. With `replay`, small batches run as CUDA graphs.
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
        // SAFETY: the pinned block is written again only after the synchronization at the end of this function.
        unsafe { result::memcpy_htod_async(self.memory.upload_at, upload, self.stream.cu_stream()) }?;
        self.staged.set(Some(StagedBatch {
            layout,
            tokens: batch.tokens(),
            sequences: batch.sequences(),
            upload_at: self.memory.upload_at,
        }));
        self.capture.downloads.set(0);
        let outcome = if replay && layout.token_rows <= MAX_GRAPH_TOKENS {
            match self.graphs.run(&self.stream, layout, &self.capture, || graph(self)) {
                Ok(None) => self.downloaded(batch.sequences()),
                Ok(Some(logits)) => Ok(logits),
                Err(error) => Err(error),
            }
        } else {
            graph(self)
        };
        self.staged.set(None);
        // Also after an error: the next batch overwrites this one's memory.
        self.stream.synchronize()?;
        outcome
    }

    /// Waits for the pending download and returns its first `length` values.
    fn downloaded(&self, length: usize) -> Result<Vec<f32>, BackendError> {
        self.stream.synchronize()?;
        Ok(self.memory.download.values()[..length].to_vec())
    }

    /// Copies `length` f32 values at device address `from` to the host. While capturing, returns zeros.
    pub(super) fn download(&self, from: u64, length: usize) -> Result<Vec<f32>, BackendError> {
        self.capture.downloads.set(self.capture.downloads.get() + 1);
        if self.capture.capturing.get() {
            // The maximum of the layout: each replay reads as many values as its batch has sequences.
            self.start_download(from, self.staged().layout.sequence_rows)?;
            return Ok(vec![0.0; length]);
        }
        let mut values = Vec::with_capacity(length);
        for start in (0..length).step_by(self.memory.download.length) {
            let part = (length - start).min(self.memory.download.length);
            self.start_download(from + 4 * start as u64, part)?;
            values.extend(self.downloaded(part)?);
        }
        Ok(values)
    }

    fn start_download(&self, from: u64, length: usize) -> Result<(), BackendError> {
        // SAFETY: both the buffer at `from` and the pinned block have at least `length` values; the block is read only after a
        // synchronization.
        unsafe {
            let to = std::slice::from_raw_parts_mut(self.memory.download.at, length);
            result::memcpy_dtoh_async(to, from, self.stream.cu_stream())?;
        }
        Ok(())
    }
}

impl Drop for ExecContext {
    fn drop(&mut self) {
        // Any thread may drop it, and pinned memory is freed in the thread's current CUDA context, after all uses.
        self.device.context.bind_to_thread().ok();
        self.stream.synchronize().ok();
    }
}
