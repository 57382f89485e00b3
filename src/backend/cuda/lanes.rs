//! A card's lanes: made at the first batch, when the weights are there and their shapes known; lent to one batch at a time.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::result;

use super::arena::ALIGNMENT;
use super::card::Card;
use super::e4m3;
use super::lane::Lane;
use super::layout::rounded;
use super::products::{Finish, Operands, Shape};
use super::tuning::Tuning;
use super::{CudaOptions, Element};
use crate::backend::{BackendError, Limits, MemoryLimits};

/// Batches in flight on one card.
pub(super) const IN_FLIGHT: usize = 2;
/// How long lanes with less memory than they want wait before they ask the card again.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// Rows and columns of the matrices that show how fast a card multiplies.
const LARGEST_SIDE: usize = 8192;
/// Of half a lane's memory, to show how fast a card copies.
const COPIES: usize = 10;

/// The lanes of one card.
#[derive(Debug)]
pub(super) struct Lanes {
    card: Arc<Card>,
    options: CudaOptions,
    /// C
    hidden_size: usize,
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Outputs of the model's widest product: what lanes need memory for.
    widest: usize,
    made: bool,
    tuned: bool,
    /// Lanes that no batch has.
    free: Vec<Lane>,
    asked: Option<Instant>,
}

/// A lane of one batch's own, given back whatever becomes of the batch.
pub(super) struct Lent<'a> {
    lanes: &'a Lanes,
    lane: Option<Lane>,
}

impl Lanes {
    pub(super) fn new(card: Arc<Card>, options: CudaOptions, hidden_size: usize) -> Self {
        Self { card, options, hidden_size, state: Mutex::default(), returned: Condvar::new() }
    }

    /// Says before the first batch that there will be a product of so many outputs.
    pub(super) fn expect(&self, outputs: usize) {
        let mut state = self.lock();
        state.widest = state.widest.max(outputs);
    }

    /// Tokens of the largest batch that every free lane has memory for.
    pub(super) fn capacity(&self) -> Option<usize> {
        self.lock().free.iter().map(Lane::capacity).min()
    }

    /// A lane, waiting for one to be free, with memory for a sequence of `longest` tokens. The first call makes them all.
    pub(super) fn take(&self, longest: usize) -> Result<Lent<'_>, BackendError> {
        self.card.context.bind_to_thread()?;
        let mut state = self.lock();
        if !state.made {
            state.free = self.make(&state)?;
            state.made = true;
        }
        let lane = loop {
            // The roomiest divides a batch least.
            match (0..state.free.len()).max_by_key(|&i| state.free[i].capacity()) {
                Some(i) => break state.free.swap_remove(i),
                None => state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        };
        let ask =
            lane.capacity() < self.options.max_batch_tokens && state.asked.is_none_or(|at| at.elapsed() > ASK_AGAIN);
        if ask {
            state.asked = Some(Instant::now());
        }
        let row_bytes = self.row_bytes(&state);
        drop(state);
        let mut lent = Lent { lanes: self, lane: Some(lane) };
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

    /// Bytes of a lane's memory for each token. A layer holds rows of 7 C (its input, Q, K and V, context, the sum after attention
    /// and the output) and one of the widest product; where products are of E4M3, some of these a second time. The rest is for
    /// what rounding and gaps take, and for sequences' own rows.
    fn row_bytes(&self, state: &State) -> usize {
        let element = self.options.element;
        let copied = if element == Element::Fp8 { element.operand_bytes() } else { 0 };
        (10 * self.hidden_size + 2 * state.widest) * (element.bytes() + copied)
    }

    fn make(&self, state: &State) -> Result<Vec<Lane>, BackendError> {
        let CudaOptions { element, max_batch_tokens, invariant } = self.options;
        let tuning = Arc::new(Tuning::open(&self.card, element));
        let new = || {
            let (card, tuning) = (Arc::clone(&self.card), Arc::clone(&tuning));
            Lane::new(card, element, tuning, invariant, max_batch_tokens, self.row_bytes(state))
        };
        let mut made = vec![new()?];
        while made.len() < IN_FLIGHT {
            match new() {
                // A card without room for two lanes of like size computes one batch at a time.
                Err(BackendError::OutOfMemory(_)) => break,
                Ok(lane) if 2 * lane.capacity() < made[0].capacity() => break,
                lane => made.push(lane?),
            }
        }
        Ok(made)
    }

    /// Times cuBLASLt's algorithms for what the first batch has launched, which is what every batch launches, on random numbers.
    /// Loading runs that batch, alone. Other calls do nothing.
    pub(super) fn tune_once(&self, lane: &mut Lane) -> Result<(), BackendError> {
        if self.options.invariant || std::mem::replace(&mut self.lock().tuned, true) {
            return Ok(());
        }
        self.tune(lane)?;
        lane.forget_plans();
        Ok(())
    }

    fn tune(&self, lane: &Lane) -> Result<(), BackendError> {
        let element = self.options.element;
        let start = Instant::now();
        let (base, bytes) = lane.activations();
        let random = Random::of(element);
        let mut news = false;
        for (outputs, inputs, finish) in lane.products.launched() {
            // x, the output and the weight one after another; the output's own values serve as residual, the weight's as bias.
            let (size, output_size) = (element.operand_bytes(), element.bytes());
            let weight_bytes = (outputs * inputs * size).next_multiple_of(ALIGNMENT);
            let rows = bytes.saturating_sub(weight_bytes + 2 * ALIGNMENT) / (outputs * output_size + inputs * size);
            let rows = rows.min(rounded(lane.capacity()));
            if rows < 64 {
                continue;
            }
            // Afresh for each shape: a residual that is its own output grows from run to run.
            random.fill(lane)?;
            let x = base + weight_bytes as u64;
            let output = x + (rows * inputs * size).next_multiple_of(ALIGNMENT) as u64;
            let operands = Operands { x, weight: base, bias: base, residual: output, output, alpha: random.alpha };
            news |= lane.products.tune(Shape { rows, outputs, inputs, finish }, rows, operands)?;
        }
        if news {
            lane.products.keep_tuning();
            tracing::info!(seconds = start.elapsed().as_secs_f64(), card = self.card.name, "tuned the products");
        }
        Ok(())
    }

    /// What the card does at most: a large square product in a lane's memory, and a copy of half of it to the other half.
    pub(super) fn limits(&self, lane: &mut Lane) -> Result<Limits, BackendError> {
        let element = self.options.element;
        // In attention as in products, but for the precision that only products have.
        let attention_element = if element == Element::Fp8 { Element::F16 } else { element };
        let products = Self::most_operations(lane, element)?;
        let attention =
            if attention_element == element { products } else { Self::most_operations(lane, attention_element)? };

        let (base, bytes) = lane.activations();
        let half = bytes / 2 / ALIGNMENT * ALIGNMENT;
        let copy = || {
            // SAFETY: both halves are the lane's, whose stream is idle.
            unsafe { result::memcpy_dtod_async(base + half as u64, base, half, lane.stream.cu_stream()) }
        };
        copy()?;
        lane.stream.synchronize()?;
        let begun = Instant::now();
        (0..COPIES).try_for_each(|_| copy())?;
        lane.stream.synchronize()?;
        let memory = MemoryLimits {
            bytes: (COPIES * 2 * half) as f64 / begun.elapsed().as_secs_f64(),
            activation: element.bytes(),
            weight: element.operand_bytes(),
        };
        Ok(Limits { products, attention, memory: Some(memory) })
    }

    /// Operations a second of the largest square product that a lane has memory for, up to one that keeps any card busy.
    fn most_operations(lane: &Lane, element: Element) -> Result<f64, BackendError> {
        let (base, bytes) = lane.activations();
        let side = (bytes / 3 / element.bytes()).isqrt().min(LARGEST_SIDE) / 128 * 128;
        let random = Random::of(element);
        random.fill(lane)?;
        let part = (side * side * element.bytes()) as u64;
        let (x, output) = (base + part, base + 2 * part);
        let operands = Operands { x, weight: base, bias: base, residual: output, output, alpha: random.alpha };
        let shape = Shape { rows: side, outputs: side, inputs: side, finish: Finish::Bias };
        let seconds = lane
            .products
            .fastest(element, shape, operands)?
            .ok_or_else(|| BackendError::Failed("the library has no product of large squares".into()))?;
        Ok(2.0 * (side as f64).powi(3) / seconds)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Numbers like activations: a card computes zeros faster, being cooler.
struct Random {
    block: Vec<u8>,
    /// What undoes their scale in a product.
    alpha: f32,
}

impl Random {
    fn of(element: Element) -> Self {
        let mut random = fastrand::Rng::with_seed(1);
        // A prime number of them: repeated at a distance of whole rows, a matrix would look alike from every tile.
        let values: Vec<f32> = (0..262_139).map(|_| random.f32() - 0.5).collect();
        match element {
            Element::Fp8 => Self { block: e4m3::encode(&values, 16.0), alpha: 1.0 / 256.0 },
            _ => Self { block: element.encode(&values), alpha: 1.0 },
        }
    }

    /// Fills all of a lane's memory for activations.
    fn fill(&self, lane: &Lane) -> Result<(), BackendError> {
        let (base, bytes) = lane.activations();
        for offset in (0..bytes).step_by(self.block.len()) {
            let part = &self.block[..self.block.len().min(bytes - offset)];
            // SAFETY: within the lane's memory; the host's block lives until the stream has been waited for.
            unsafe { result::memcpy_htod_async(base + offset as u64, part, lane.stream.cu_stream()) }?;
        }
        Ok(lane.stream.synchronize()?)
    }
}

impl Deref for Lent<'_> {
    type Target = Lane;

    fn deref(&self) -> &Lane {
        self.lane.as_ref().expect("given back by drop alone")
    }
}

impl DerefMut for Lent<'_> {
    fn deref_mut(&mut self) -> &mut Lane {
        self.lane.as_mut().expect("given back by drop alone")
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.lanes.lock().free.extend(self.lane.take());
        self.lanes.returned.notify_one();
    }
}
