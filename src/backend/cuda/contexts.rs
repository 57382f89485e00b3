//! The pool of a device's execution contexts. They are created at the first batch, when the shapes of all weights are known.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::batch_layout::rounded;
use super::context::ExecContext;
use super::device::Device;
use super::dtype::CudaDtype;
use super::gemm::tuning_store::TuningStore;
use super::gemm::{GemmOperands, GemmShape};
use super::options::CudaOptions;
use super::roofline::RandomBlock;
use super::workspace::ALIGNMENT;
use crate::backend::BackendError;

/// Maximum batches in flight per device: while one computes, the host prepares and launches the next.
pub(super) const MAX_IN_FLIGHT: usize = 2;
/// Time between attempts to enlarge a context that has memory for fewer than `max_batch_tokens` tokens.
const GROW_INTERVAL: Duration = Duration::from_secs(10);

/// The execution contexts of one device; each is borrowed by one batch at a time.
#[derive(Debug)]
pub(super) struct ContextPool {
    device: Arc<Device>,
    options: CudaOptions,
    /// C
    hidden_size: usize,
    state: Mutex<ContextPoolState>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct ContextPoolState {
    /// Outputs of the model's widest linear layer, which determines the memory per token.
    max_outputs: usize,
    created: bool,
    tuned: bool,
    /// Contexts that no batch has borrowed.
    free: Vec<ExecContext>,
    /// Time of the last attempt to enlarge a context.
    last_grow: Option<Instant>,
}

/// A borrowed context; returned to the pool on drop.
pub(super) struct BorrowedContext<'a> {
    pool: &'a ContextPool,
    ctx: Option<ExecContext>,
}

impl ContextPool {
    pub(super) fn new(device: Arc<Device>, options: CudaOptions, hidden_size: usize) -> Self {
        Self { device, options, hidden_size, state: Mutex::default(), returned: Condvar::new() }
    }

    /// Registers a linear layer of `outputs` outputs, before the first batch.
    pub(super) fn register_layer(&self, outputs: usize) {
        let mut state = self.lock();
        state.max_outputs = state.max_outputs.max(outputs);
    }

    /// Tokens of the largest batch that fits in every free context; `None` if no context is free.
    pub(super) fn capacity(&self) -> Option<usize> {
        self.lock().free.iter().map(ExecContext::capacity).min()
    }

    /// Borrows a context with memory for a sequence of `longest` tokens; waits until one is free. The first call creates all contexts.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] if the device lacks memory for the sequence, and driver errors.
    pub(super) fn acquire(&self, longest: usize) -> Result<BorrowedContext<'_>, BackendError> {
        self.device.context.bind_to_thread()?;
        let mut state = self.lock();
        if !state.created {
            state.free = self.create(&state)?;
            state.created = true;
        }
        let ctx = loop {
            // The context with the most memory splits the batch into the fewest partitions.
            match (0..state.free.len()).max_by_key(|&i| state.free[i].capacity()) {
                Some(i) => break state.free.swap_remove(i),
                None => state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        };
        let try_to_grow = ctx.capacity() < self.options.max_batch_tokens
            && state.last_grow.is_none_or(|at| at.elapsed() > GROW_INTERVAL);
        if try_to_grow {
            state.last_grow = Some(Instant::now());
        }
        let token_bytes = self.token_bytes(&state);
        drop(state);
        let mut borrowed = BorrowedContext { pool: self, ctx: Some(ctx) };
        if try_to_grow {
            match borrowed.grow(self.options.max_batch_tokens, token_bytes) {
                Err(BackendError::OutOfMemory(_)) => {} // keep the current memory
                outcome => outcome?,
            }
        }
        if longest > borrowed.capacity() {
            borrowed.grow(longest, token_bytes)?;
        }
        Ok(borrowed)
    }

    /// Bytes of activation memory per token. A transformer layer needs 7 C values: its input, Q, K and V, the attention context, the
    /// sum after attention, and its output. A pre-norm layer needs 2 C more, for its norms. Added to these are the outputs of the
    /// widest linear layer and, if it is gated, its result, half as many. With fp8, some of them are also stored as E4M3 operands.
    /// The rest covers rounding, fragmentation and buffers with a row per sequence.
    fn token_bytes(&self, state: &ContextPoolState) -> usize {
        let dtype = self.options.dtype;
        let operand_bytes = if dtype == CudaDtype::Fp8 { dtype.operand_bytes() } else { 0 };
        (10 * self.hidden_size + 2 * state.max_outputs) * (dtype.bytes() + operand_bytes)
    }

    fn create(&self, state: &ContextPoolState) -> Result<Vec<ExecContext>, BackendError> {
        let CudaOptions { dtype, gemm, .. } = self.options;
        let tuning_store = Arc::new(TuningStore::open(&self.device, dtype, gemm));
        let new = || {
            let (device, tuning_store) = (Arc::clone(&self.device), Arc::clone(&tuning_store));
            ExecContext::new(device, &self.options, tuning_store, self.token_bytes(state))
        };
        let mut contexts = vec![new()?];
        while contexts.len() < MAX_IN_FLIGHT {
            match new() {
                // Without memory for a second context of at least half the size, the device runs one batch at a time.
                Err(BackendError::OutOfMemory(_)) => break,
                Ok(ctx) if 2 * ctx.capacity() < contexts[0].capacity() => break,
                ctx => contexts.push(ctx?),
            }
        }
        Ok(contexts)
    }

    /// Autotunes, on random values, the GEMMs that the first batch launched; every batch uses the same GEMMs. The first batch
    /// runs alone, during loading. Does nothing on later calls and in batch-invariant mode.
    pub(super) fn tune_once(&self, ctx: &mut ExecContext) -> Result<(), BackendError> {
        if self.options.batch_invariant || std::mem::replace(&mut self.lock().tuned, true) {
            return Ok(());
        }
        self.tune(ctx)?;
        ctx.forget_gemm_kernels();
        Ok(())
    }

    fn tune(&self, ctx: &ExecContext) -> Result<(), BackendError> {
        let dtype = self.options.dtype;
        let start = Instant::now();
        let (base, bytes) = ctx.activation_memory();
        let random = RandomBlock::new(dtype);
        let mut measured = false;
        for (outputs, inputs, epilogue) in ctx.gemms.launched() {
            // Memory layout: weight, x, output. The output also serves as residual, the weight as bias.
            let (size, output_size) = (dtype.operand_bytes(), dtype.bytes());
            let weight_bytes = (outputs * inputs * size).next_multiple_of(ALIGNMENT);
            let rows = bytes.saturating_sub(weight_bytes + 2 * ALIGNMENT) / (outputs * output_size + inputs * size);
            let rows = rows.min(rounded(ctx.capacity()));
            if rows < 64 {
                continue;
            }
            // Refilled for each shape: where the output is also the residual, values grow with every run.
            random.fill(ctx)?;
            let x = base + weight_bytes as u64;
            let output = x + (rows * inputs * size).next_multiple_of(ALIGNMENT) as u64;
            let operands = GemmOperands { x, weight: base, bias: base, residual: output, output, alpha: random.alpha };
            measured |= ctx.gemms.tune(GemmShape { rows, outputs, inputs, epilogue }, rows, operands)?;
        }
        if measured {
            ctx.gemms.save_tuning();
            tracing::info!(seconds = start.elapsed().as_secs_f64(), device = self.device.name, "autotuned the GEMMs");
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, ContextPoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Deref for BorrowedContext<'_> {
    type Target = ExecContext;

    fn deref(&self) -> &ExecContext {
        self.ctx.as_ref().expect("taken only by drop")
    }
}

impl DerefMut for BorrowedContext<'_> {
    fn deref_mut(&mut self) -> &mut ExecContext {
        self.ctx.as_mut().expect("taken only by drop")
    }
}

impl Drop for BorrowedContext<'_> {
    fn drop(&mut self) {
        self.pool.lock().free.extend(self.ctx.take());
        self.pool.returned.notify_one();
    }
}
