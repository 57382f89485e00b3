//! A device's contexts: made at the first batch, when the weights are there and their shapes known; lent to one batch at a time.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::result;

use super::batch_layout::rounded;
use super::context::ExecContext;
use super::device::Device;
use super::dtype::CudaDtype;
use super::fp8;
use super::gemm::cublaslt::{GemmEpilogue, GemmOperands, GemmShape};
use super::gemm::tuning_store::TuningStore;
use super::options::CudaOptions;
use super::workspace::ALIGNMENT;
use crate::backend::{BackendError, MemoryRoofline, Roofline};

/// Batches in flight on one device.
pub(super) const IN_FLIGHT: usize = 2;
/// How long contexts with less memory than they want wait before they ask the device again.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// Rows and columns of the matrices that show how fast a device multiplies.
const LARGEST_SIDE: usize = 8192;
/// Of half a ctx's memory, to show how fast a device copies.
const COPIES: usize = 10;

/// The contexts of one device.
#[derive(Debug)]
pub(super) struct ContextPool {
    device: Arc<Device>,
    options: CudaOptions,
    /// C
    hidden_size: usize,
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Outputs of the model's widest product: what contexts need memory for.
    widest: usize,
    made: bool,
    tuned: bool,
    /// ContextPool that no batch has.
    free: Vec<ExecContext>,
    asked: Option<Instant>,
}

/// A ctx of one batch's own, given back whatever becomes of the batch.
pub(super) struct BorrowedContext<'a> {
    contexts: &'a ContextPool,
    ctx: Option<ExecContext>,
}

impl ContextPool {
    pub(super) fn new(device: Arc<Device>, options: CudaOptions, hidden_size: usize) -> Self {
        Self { device, options, hidden_size, state: Mutex::default(), returned: Condvar::new() }
    }

    /// Says before the first batch that there will be a product of so many outputs.
    pub(super) fn expect(&self, outputs: usize) {
        let mut state = self.lock();
        state.widest = state.widest.max(outputs);
    }

    /// Tokens of the largest batch that every free ctx has memory for.
    pub(super) fn capacity(&self) -> Option<usize> {
        self.lock().free.iter().map(ExecContext::capacity).min()
    }

    /// A ctx, waiting for one to be free, with memory for a sequence of `longest` tokens. The first call makes them all.
    pub(super) fn take(&self, longest: usize) -> Result<BorrowedContext<'_>, BackendError> {
        self.device.context.bind_to_thread()?;
        let mut state = self.lock();
        if !state.made {
            state.free = self.make(&state)?;
            state.made = true;
        }
        let ctx = loop {
            // The roomiest divides a batch least.
            match (0..state.free.len()).max_by_key(|&i| state.free[i].capacity()) {
                Some(i) => break state.free.swap_remove(i),
                None => state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        };
        let ask =
            ctx.capacity() < self.options.max_batch_tokens && state.asked.is_none_or(|at| at.elapsed() > ASK_AGAIN);
        if ask {
            state.asked = Some(Instant::now());
        }
        let row_bytes = self.row_bytes(&state);
        drop(state);
        let mut lent = BorrowedContext { contexts: self, ctx: Some(ctx) };
        if ask {
            match lent.grow(self.options.max_batch_tokens, row_bytes) {
                Err(BackendError::OutOfMemory(_)) => {} // not yet
                outcome => outcome?,
            }
        }
        if longest > lent.capacity() {
            lent.grow(longest, row_bytes)?;
        }
        Ok(lent)
    }

    /// Bytes of a ctx's memory for each token. A layer holds rows of 7 C (its input, Q, K and V, context, the sum after attention
    /// and the output) and one of the widest product; where gemms are of E4M3, some of these a second time. The rest is for
    /// what rounding and gaps take, and for sequences' own rows.
    fn row_bytes(&self, state: &State) -> usize {
        let dtype = self.options.dtype;
        let copied = if dtype == CudaDtype::Fp8 { dtype.operand_bytes() } else { 0 };
        (10 * self.hidden_size + 2 * state.widest) * (dtype.bytes() + copied)
    }

    fn make(&self, state: &State) -> Result<Vec<ExecContext>, BackendError> {
        let CudaOptions { dtype, gemm, .. } = self.options;
        let tuning_store = Arc::new(TuningStore::open(&self.device, dtype, gemm));
        let new = || {
            let (device, tuning_store) = (Arc::clone(&self.device), Arc::clone(&tuning_store));
            ExecContext::new(device, &self.options, tuning_store, self.row_bytes(state))
        };
        let mut made = vec![new()?];
        while made.len() < IN_FLIGHT {
            match new() {
                // A device without room for two contexts of like size computes one batch at a time.
                Err(BackendError::OutOfMemory(_)) => break,
                Ok(ctx) if 2 * ctx.capacity() < made[0].capacity() => break,
                ctx => made.push(ctx?),
            }
        }
        Ok(made)
    }

    /// Times cuBLASLt's algorithms for what the first batch has launched, which is what every batch launches, on random numbers.
    /// Loading runs that batch, alone. Other calls do nothing.
    pub(super) fn tune_once(&self, ctx: &mut ExecContext) -> Result<(), BackendError> {
        if self.options.batch_invariant || std::mem::replace(&mut self.lock().tuned, true) {
            return Ok(());
        }
        self.tune(ctx)?;
        ctx.forget_plans();
        Ok(())
    }

    fn tune(&self, ctx: &ExecContext) -> Result<(), BackendError> {
        let dtype = self.options.dtype;
        let start = Instant::now();
        let (base, bytes) = ctx.activations();
        let random = Random::of(dtype);
        let mut news = false;
        for (outputs, inputs, epilogue) in ctx.gemms.launched() {
            // x, the output and the weight one after another; the output's own values serve as residual, the weight's as bias.
            let (size, output_size) = (dtype.operand_bytes(), dtype.bytes());
            let weight_bytes = (outputs * inputs * size).next_multiple_of(ALIGNMENT);
            let rows = bytes.saturating_sub(weight_bytes + 2 * ALIGNMENT) / (outputs * output_size + inputs * size);
            let rows = rows.min(rounded(ctx.capacity()));
            if rows < 64 {
                continue;
            }
            // Afresh for each shape: a residual that is its own output grows from run to run.
            random.fill(ctx)?;
            let x = base + weight_bytes as u64;
            let output = x + (rows * inputs * size).next_multiple_of(ALIGNMENT) as u64;
            let operands = GemmOperands { x, weight: base, bias: base, residual: output, output, alpha: random.alpha };
            news |= ctx.gemms.tune(GemmShape { rows, outputs, inputs, epilogue }, rows, operands)?;
        }
        if news {
            ctx.gemms.keep_tuning();
            tracing::info!(seconds = start.elapsed().as_secs_f64(), device = self.device.name, "tuned the gemms");
        }
        Ok(())
    }

    /// What the device does at most: a large square product in a ctx's memory, and a copy of half of it to the other half.
    pub(super) fn roofline(&self, ctx: &mut ExecContext) -> Result<Roofline, BackendError> {
        let dtype = self.options.dtype;
        // In attention as in gemms, but for the precision that only gemms have.
        let attention_element = if dtype == CudaDtype::Fp8 { CudaDtype::F16 } else { dtype };
        let gemms = Self::most_operations(ctx, dtype)?;
        let attention = if attention_element == dtype { gemms } else { Self::most_operations(ctx, attention_element)? };

        let (base, bytes) = ctx.activations();
        let half = bytes / 2 / ALIGNMENT * ALIGNMENT;
        let copy = || {
            // SAFETY: both halves are the ctx's, whose stream is idle.
            unsafe { result::memcpy_dtod_async(base + half as u64, base, half, ctx.stream.cu_stream()) }
        };
        copy()?;
        ctx.stream.synchronize()?;
        let begun = Instant::now();
        (0..COPIES).try_for_each(|_| copy())?;
        ctx.stream.synchronize()?;
        let memory = MemoryRoofline {
            bytes: (COPIES * 2 * half) as f64 / begun.elapsed().as_secs_f64(),
            activation: dtype.bytes(),
            weight: dtype.operand_bytes(),
        };
        Ok(Roofline { gemms, attention, memory: Some(memory) })
    }

    /// Operations a second of the largest square product that a ctx has memory for, up to one that keeps any device busy.
    fn most_operations(ctx: &ExecContext, dtype: CudaDtype) -> Result<f64, BackendError> {
        let (base, bytes) = ctx.activations();
        let side = (bytes / 3 / dtype.bytes()).isqrt().min(LARGEST_SIDE) / 128 * 128;
        let random = Random::of(dtype);
        random.fill(ctx)?;
        let part = (side * side * dtype.bytes()) as u64;
        let (x, output) = (base + part, base + 2 * part);
        let operands = GemmOperands { x, weight: base, bias: base, residual: output, output, alpha: random.alpha };
        let shape = GemmShape { rows: side, outputs: side, inputs: side, epilogue: GemmEpilogue::Bias };
        let seconds = ctx
            .gemms
            .fastest(dtype, shape, operands)?
            .ok_or_else(|| BackendError::Failed("the library has no product of large squares".into()))?;
        Ok(2.0 * (side as f64).powi(3) / seconds)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Numbers like activations: a device computes zeros faster, being cooler.
struct Random {
    block: Vec<u8>,
    /// What undoes their scale in a product.
    alpha: f32,
}

impl Random {
    fn of(dtype: CudaDtype) -> Self {
        let mut random = fastrand::Rng::with_seed(1);
        // A prime number of them: repeated at a distance of whole rows, a matrix would look alike from every tile.
        let values: Vec<f32> = (0..262_139).map(|_| random.f32() - 0.5).collect();
        match dtype {
            CudaDtype::Fp8 => Self { block: fp8::encode(&values, 16.0), alpha: 1.0 / 256.0 },
            _ => Self { block: dtype.encode(&values), alpha: 1.0 },
        }
    }

    /// Fills all of a ctx's memory for activations.
    fn fill(&self, ctx: &ExecContext) -> Result<(), BackendError> {
        let (base, bytes) = ctx.activations();
        for offset in (0..bytes).step_by(self.block.len()) {
            let part = &self.block[..self.block.len().min(bytes - offset)];
            // SAFETY: within the ctx's memory; the host's block lives until the stream has been waited for.
            unsafe { result::memcpy_htod_async(base + offset as u64, part, ctx.stream.cu_stream()) }?;
        }
        Ok(ctx.stream.synchronize()?)
    }
}

impl Deref for BorrowedContext<'_> {
    type Target = ExecContext;

    fn deref(&self) -> &ExecContext {
        self.ctx.as_ref().expect("given back by drop alone")
    }
}

impl DerefMut for BorrowedContext<'_> {
    fn deref_mut(&mut self) -> &mut ExecContext {
        self.ctx.as_mut().expect("given back by drop alone")
    }
}

impl Drop for BorrowedContext<'_> {
    fn drop(&mut self) {
        self.contexts.lock().free.extend(self.ctx.take());
        self.contexts.returned.notify_one();
    }
}
