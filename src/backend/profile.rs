//! A backend that wraps another, times its operations, and computes the minimum time of each from the device's roofline. Results
//! are unchanged. `rerankd bench --profile` prints the measurements.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{
    Activation, AttentionShape, Backend, BackendError, EmbeddingTables, Epilogue, Graph, HostTensor, LayerRole,
    NormWeights, Roofline, RotaryTable, Timed,
};
use crate::batch::Batch;

/// The measurements so far, shared by the profiled backends and their reader.
#[derive(Debug, Default)]
pub struct Profile(Mutex<ProfileState>);

#[derive(Debug, Default)]
struct ProfileState {
    roofline: Option<Roofline>,
    /// In the order of their first calls.
    operations: Vec<Operation>,
}

/// Totals over all calls of one operation.
#[derive(Debug, Clone, PartialEq)]
pub struct Operation {
    /// The operation, with inputs and outputs if it is a GEMM: `GEMM 384 -> 1536, GELU`. `CLS` means first tokens only.
    pub name: String,
    pub calls: usize,
    /// Measured time, in seconds of the whole device: 1 s on one of N threads counts as 1/N s.
    pub seconds: f64,
    /// The minimum time at the device's peak rates, in seconds; 0 if it is unknown or negligible.
    pub roofline_seconds: f64,
}

/// The minimum work of an operation: every value is read or written once.
#[derive(Debug, Clone, Copy, Default)]
struct Work {
    /// Multiplications and additions in GEMMs.
    gemm_operations: usize,
    /// Multiplications and additions in attention.
    attention_operations: usize,
    /// Activations read or written.
    activations: usize,
    /// Weights read.
    weights: usize,
}

impl Work {
    /// The minimum time, in seconds: the larger of compute time and memory time.
    fn roofline_seconds(self, roofline: &Roofline) -> f64 {
        let compute =
            self.gemm_operations as f64 / roofline.gemms + self.attention_operations as f64 / roofline.attention;
        let memory = roofline.memory.map_or(0.0, |memory| {
            let bytes = self.activations * memory.activation_bytes + self.weights * memory.weight_bytes;
            bytes as f64 / memory.bytes_per_second
        });
        compute.max(memory)
    }
}

impl Profile {
    /// The device's peak rates; `None` before the first run, or if the backend cannot measure them.
    pub fn roofline(&self) -> Option<Roofline> {
        self.lock().roofline
    }

    /// Returns the operations since the last call, and clears them.
    pub fn take(&self) -> Vec<Operation> {
        std::mem::take(&mut self.lock().operations)
    }

    fn add(&self, name: String, seconds: f64, work: Work) {
        let mut state = self.lock();
        let roofline_seconds = state.roofline.map_or(0.0, |roofline| work.roofline_seconds(&roofline));
        let known = state.operations.iter().position(|operation| operation.name == name);
        let i = known.unwrap_or_else(|| {
            state.operations.push(Operation { name, calls: 0, seconds: 0.0, roofline_seconds: 0.0 });
            state.operations.len() - 1
        });
        let operation = &mut state.operations[i];
        operation.calls += 1;
        operation.seconds += seconds;
        operation.roofline_seconds += roofline_seconds;
    }

    fn lock(&self) -> MutexGuard<'_, ProfileState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A backend whose operations are timed. Runs must not overlap: they would share the device, and the times of one would
/// include operations of the other.
pub struct Profiled<B: Timed> {
    inner: B,
    profile: Arc<Profile>,
    /// Operations of the current run.
    timed: Mutex<Vec<TimedOperation<B::Event>>>,
}

struct TimedOperation<E> {
    name: String,
    work: Work,
    start: E,
    end: E,
}

/// The inner backend's buffer, with its shape.
pub struct Buffer<B> {
    inner: B,
    rows: usize,
    columns: usize,
    /// Whether the rows are those of first tokens only.
    cls_only: bool,
}

/// The inner backend's embedding tables, with their width C.
pub struct Embeddings<E> {
    inner: E,
    columns: usize,
}

/// The inner backend's linear layer, with its number of inputs and its role.
pub struct Linear<L> {
    inner: L,
    inputs: usize,
    role: LayerRole,
}

impl<B: Timed> Profiled<B> {
    /// Wraps `inner` and adds the times of its operations to `profile`.
    pub fn new(inner: B, profile: Arc<Profile>) -> Self {
        Self { inner, profile, timed: Mutex::default() }
    }

    fn time<T>(
        &self,
        ctx: &B::ExecContext,
        name: impl Into<String>,
        work: Work,
        operation: impl FnOnce(&B) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        let start = self.inner.record_event(ctx)?;
        let result = operation(&self.inner)?;
        let end = self.inner.record_event(ctx)?;
        self.timed().push(TimedOperation { name: name.into(), work, start, end });
        Ok(result)
    }

    fn timed(&self) -> MutexGuard<'_, Vec<TimedOperation<B::Event>>> {
        self.timed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Timed> Backend for Profiled<B> {
    type ExecContext = B::ExecContext;
    type Buffer = Buffer<B::Buffer>;
    type Embeddings = Embeddings<B::Embeddings>;
    type Linear = Linear<B::Linear>;
    type Norm = B::Norm;
    type Rotary = B::Rotary;

    fn describe(&self) -> String {
        format!("{}, profiled", self.inner.describe())
    }

    fn max_concurrent_batches(&self) -> usize {
        1
    }

    fn embeddings(&self, tables: EmbeddingTables) -> Result<Self::Embeddings, BackendError> {
        let columns = tables.words.shape[1];
        Ok(Embeddings { inner: self.inner.embeddings(tables)?, columns })
    }

    fn linear(&self, weight: HostTensor, bias: HostTensor, role: LayerRole) -> Result<Self::Linear, BackendError> {
        let inputs = weight.shape[1];
        Ok(Linear { inner: self.inner.linear(weight, bias, role)?, inputs, role })
    }

    fn norm(&self, weights: NormWeights) -> Result<B::Norm, BackendError> {
        self.inner.norm(weights)
    }

    fn rotary(&self, table: RotaryTable) -> Result<B::Rotary, BackendError> {
        self.inner.rotary(table)
    }

    fn run(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        // The inner `run` may replay a CUDA graph, whose operations cannot be timed.
        self.run_observed(batch, graph)
    }

    fn run_observed(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        self.timed().clear(); // Left over if the last run failed.
        let logits = self.inner.run_observed(batch, graph)?;
        if self.profile.roofline().is_none() {
            self.profile.lock().roofline = self.inner.roofline()?;
        }
        for TimedOperation { name, work, start, end } in std::mem::take(&mut *self.timed()) {
            self.profile.add(name, self.inner.elapsed_seconds(&start, &end)?, work);
        }
        Ok(logits)
    }

    fn embed(
        &self,
        ctx: &B::ExecContext,
        weights: &Self::Embeddings,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError> {
        let (rows, columns) = (batch.tokens(), weights.columns);
        // Each row reads a word and a position and is written. The rows of token types are few and stay in cache.
        let work = Work { activations: 3 * rows * columns, ..Work::default() };
        let inner = self.time(ctx, "embeddings", work, |b| b.embed(ctx, &weights.inner, batch))?;
        Ok(Buffer { inner, rows, columns, cls_only: false })
    }

    fn apply(
        &self,
        ctx: &B::ExecContext,
        weights: &Self::Linear,
        outputs: Range<usize>,
        x: &Self::Buffer,
        epilogue: Epilogue<'_, Self::Buffer>,
    ) -> Result<Self::Buffer, BackendError> {
        let (rows, inputs) = (x.rows, weights.inputs);
        let (suffix, columns, residual_values) = match epilogue {
            Epilogue::Bias => (String::new(), outputs.len(), 0),
            Epilogue::Activation(activation) => (format!(", {}", name(activation)), outputs.len(), 0),
            Epilogue::Gated(activation) => (format!(", gated {}", name(activation)), outputs.len() / 2, 0),
            Epilogue::Residual(_) => (", residual".to_owned(), outputs.len(), rows * outputs.len()),
        };
        let name = match (weights.role, x.cls_only) {
            (LayerRole::Head, _) => "head".to_owned(),
            (LayerRole::Encoder | LayerRole::Gated, true) => format!("CLS: GEMM {inputs} -> {}{suffix}", outputs.len()),
            (LayerRole::Encoder | LayerRole::Gated, false) => format!("GEMM {inputs} -> {}{suffix}", outputs.len()),
        };
        let work = match weights.role {
            LayerRole::Head => Work::default(),
            LayerRole::Encoder | LayerRole::Gated => Work {
                gemm_operations: 2 * rows * inputs * outputs.len(),
                activations: rows * (inputs + columns) + residual_values,
                weights: inputs * outputs.len(),
                ..Work::default()
            },
        };
        let inner = self.time(ctx, name, work, |b| {
            let epilogue = match epilogue {
                Epilogue::Bias => Epilogue::Bias,
                Epilogue::Activation(activation) => Epilogue::Activation(activation),
                Epilogue::Gated(activation) => Epilogue::Gated(activation),
                Epilogue::Residual(residual) => Epilogue::Residual(&residual.inner),
            };
            b.apply(ctx, &weights.inner, outputs, &x.inner, epilogue)
        })?;
        Ok(Buffer { inner, rows, columns, cls_only: x.cls_only })
    }

    fn layer_norm(
        &self,
        ctx: &B::ExecContext,
        weights: &B::Norm,
        x: Self::Buffer,
    ) -> Result<Self::Buffer, BackendError> {
        let Buffer { inner, rows, columns, cls_only } = x;
        let name = if cls_only { "CLS: layer norm" } else { "layer norm" };
        let work = Work { activations: 2 * rows * columns, ..Work::default() };
        let inner = self.time(ctx, name, work, |b| b.layer_norm(ctx, weights, inner))?;
        Ok(Buffer { inner, rows, columns, cls_only })
    }

    fn pre_norm(
        &self,
        ctx: &B::ExecContext,
        weights: &B::Norm,
        x: &Self::Buffer,
    ) -> Result<Self::Buffer, BackendError> {
        let name = if x.cls_only { "CLS: layer norm" } else { "layer norm" };
        let work = Work { activations: 2 * x.rows * x.columns, ..Work::default() };
        let inner = self.time(ctx, name, work, |b| b.pre_norm(ctx, weights, &x.inner))?;
        Ok(Buffer { inner, ..*x })
    }

    fn rotate(
        &self,
        ctx: &B::ExecContext,
        rotary: &B::Rotary,
        heads: usize,
        x: Self::Buffer,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError> {
        let Buffer { inner, rows, columns, cls_only } = x;
        // At most all columns are read and written.
        let work = Work { activations: 2 * rows * columns, ..Work::default() };
        let inner = self.time(ctx, "rotary", work, |b| b.rotate(ctx, rotary, heads, inner, batch))?;
        Ok(Buffer { inner, rows, columns, cls_only })
    }

    fn attention(
        &self,
        ctx: &B::ExecContext,
        shape: AttentionShape,
        window: Option<usize>,
        qkv: &Self::Buffer,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError> {
        let c = shape.heads * shape.head_size;
        let (name, scores) = match window {
            None => ("attention", batch.ranges().map(|rows| rows.len() * rows.len()).sum::<usize>()),
            Some(window) => ("local attention", batch.ranges().map(|rows| visible_pairs(rows.len(), window)).sum()),
        };
        let work = Work { attention_operations: 4 * scores * c, activations: 4 * qkv.rows * c, ..Work::default() };
        let inner = self.time(ctx, name, work, |b| b.attention(ctx, shape, window, &qkv.inner, batch))?;
        Ok(Buffer { inner, rows: qkv.rows, columns: c, cls_only: false })
    }

    fn cls_attention(
        &self,
        ctx: &B::ExecContext,
        shape: AttentionShape,
        window: Option<usize>,
        q: &Self::Buffer,
        kv: &Self::Buffer,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError> {
        let c = shape.heads * shape.head_size;
        let work =
            Work { attention_operations: 4 * kv.rows * c, activations: 2 * (kv.rows + q.rows) * c, ..Work::default() };
        let inner = self
            .time(ctx, "CLS: attention", work, |b| b.cls_attention(ctx, shape, window, &q.inner, &kv.inner, batch))?;
        Ok(Buffer { inner, rows: q.rows, columns: c, cls_only: true })
    }

    fn gather_cls(&self, ctx: &B::ExecContext, x: &Self::Buffer, batch: &Batch) -> Result<Self::Buffer, BackendError> {
        let rows = batch.sequences();
        let work = Work { activations: 2 * rows * x.columns, ..Work::default() };
        let inner = self.time(ctx, "CLS: gather", work, |b| b.gather_cls(ctx, &x.inner, batch))?;
        Ok(Buffer { inner, rows, columns: x.columns, cls_only: true })
    }

    fn mean_rows(&self, ctx: &B::ExecContext, x: &Self::Buffer, batch: &Batch) -> Result<Self::Buffer, BackendError> {
        let rows = batch.sequences();
        let work = Work { activations: (x.rows + rows) * x.columns, ..Work::default() };
        let inner = self.time(ctx, "mean", work, |b| b.mean_rows(ctx, &x.inner, batch))?;
        Ok(Buffer { inner, rows, columns: x.columns, cls_only: true })
    }

    fn download(&self, ctx: &B::ExecContext, x: &Self::Buffer) -> Result<Vec<f32>, BackendError> {
        self.inner.download(ctx, &x.inner)
    }
}

fn name(activation: Activation) -> &'static str {
    match activation {
        Activation::Gelu => "GELU",
        Activation::GeluTanh => "tanh GELU",
        Activation::Relu => "ReLU",
        Activation::Silu => "SiLU",
        Activation::Tanh => "tanh",
    }
}

/// How many pairs of a query and a key are at a distance of at most `window`, in a sequence of n tokens.
fn visible_pairs(n: usize, window: usize) -> usize {
    let window = window.min(n - 1);
    n * (2 * window + 1) - window * (window + 1)
}

#[cfg(test)]
mod tests {
    use super::visible_pairs;

    #[test]
    fn visible_pairs_are_counted_at_both_ends_of_a_sequence() {
        for (n, window) in [(1, 0), (1, 5), (7, 0), (7, 2), (7, 6), (7, 9)] {
            let pairs = (0..n).flat_map(|i: usize| (0..n).filter(move |&j| i.abs_diff(j) <= window)).count();
            assert_eq!(visible_pairs(n, window), pairs, "{n} {window}");
        }
    }
}
