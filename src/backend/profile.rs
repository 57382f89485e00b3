//! A backend that wraps another, times each operation and compares the time with the device's roofline. Results are
//! unchanged. `rerankd bench --profile` prints the measurements.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{
    Activation, AttentionShape, Backend, BackendError, EmbeddingTables, Epilogue, Graph, HostTensor, LayerRole,
    NormWeights, Roofline, Timed,
};
use crate::batch::Batch;

/// The measurements so far, shared by the profiled backends and their reader.
#[derive(Debug, Default)]
pub struct Profile(Mutex<ProfileState>);

#[derive(Debug, Default)]
struct ProfileState {
    roofline: Option<Roofline>,
    /// In the order of execution.
    operations: Vec<Operation>,
}

/// Totals over all calls of one operation.
#[derive(Debug, Clone, PartialEq)]
pub struct Operation {
    /// The operation, with inputs and outputs if it is a GEMM: `GEMM 384 -> 1536, GELU`. `CLS` means first tokens only.
    pub name: String,
    pub calls: usize,
    /// Measured time of the whole device, in seconds.
    pub seconds: f64,
    /// The minimum time at the device's peak rates, in seconds; 0 if unknown.
    pub roofline_seconds: f64,
}

/// The minimum work of an operation: every value is read or written once.
#[derive(Debug, Clone, Copy, Default)]
struct Work {
    /// Operations in GEMMs.
    gemm_operations: usize,
    /// Operations in attention.
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
        // Reads a row of words and a row of positions; writes a row. Token types are few and stay in cache.
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
        let (rows, columns, inputs) = (x.rows, outputs.len(), weights.inputs);
        let (suffix, residual_values) = match epilogue {
            Epilogue::Bias => ("", 0),
            Epilogue::Activation(Activation::Gelu) => (", GELU", 0),
            Epilogue::Activation(Activation::GeluTanh) => (", tanh GELU", 0),
            Epilogue::Activation(Activation::Relu) => (", ReLU", 0),
            Epilogue::Activation(Activation::Tanh) => (", tanh", 0),
            Epilogue::Residual(_) => (", residual", rows * columns),
        };
        let name = match (weights.role, x.cls_only) {
            (LayerRole::Head, _) => "head".to_owned(),
            (LayerRole::Encoder, true) => format!("CLS: GEMM {inputs} -> {columns}{suffix}"),
            (LayerRole::Encoder, false) => format!("GEMM {inputs} -> {columns}{suffix}"),
        };
        let work = match weights.role {
            LayerRole::Head => Work::default(),
            LayerRole::Encoder => Work {
                gemm_operations: 2 * rows * inputs * columns,
                activations: rows * (inputs + columns) + residual_values,
                weights: inputs * columns,
                ..Work::default()
            },
        };
        let inner = self.time(ctx, name, work, |b| {
            let epilogue = match epilogue {
                Epilogue::Bias => Epilogue::Bias,
                Epilogue::Activation(activation) => Epilogue::Activation(activation),
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

    fn attention(
        &self,
        ctx: &B::ExecContext,
        shape: AttentionShape,
        qkv: &Self::Buffer,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError> {
        let c = shape.heads * shape.head_size;
        let squares: usize = batch.ranges().map(|rows| rows.len() * rows.len()).sum();
        let work = Work { attention_operations: 4 * squares * c, activations: 4 * qkv.rows * c, ..Work::default() };
        let inner = self.time(ctx, "attention", work, |b| b.attention(ctx, shape, &qkv.inner, batch))?;
        Ok(Buffer { inner, rows: qkv.rows, columns: c, cls_only: false })
    }

    fn cls_attention(
        &self,
        ctx: &B::ExecContext,
        shape: AttentionShape,
        q: &Self::Buffer,
        kv: &Self::Buffer,
        batch: &Batch,
    ) -> Result<Self::Buffer, BackendError> {
        let c = shape.heads * shape.head_size;
        let work =
            Work { attention_operations: 4 * kv.rows * c, activations: 2 * (kv.rows + q.rows) * c, ..Work::default() };
        let inner =
            self.time(ctx, "CLS: attention", work, |b| b.cls_attention(ctx, shape, &q.inner, &kv.inner, batch))?;
        Ok(Buffer { inner, rows: q.rows, columns: c, cls_only: true })
    }

    fn gather_cls(&self, ctx: &B::ExecContext, x: &Self::Buffer, batch: &Batch) -> Result<Self::Buffer, BackendError> {
        let rows = batch.sequences();
        let work = Work { activations: 2 * rows * x.columns, ..Work::default() };
        let inner = self.time(ctx, "CLS: gather", work, |b| b.gather_cls(ctx, &x.inner, batch))?;
        Ok(Buffer { inner, rows, columns: x.columns, cls_only: true })
    }

    fn download(&self, ctx: &B::ExecContext, x: &Self::Buffer) -> Result<Vec<f32>, BackendError> {
        self.inner.download(ctx, &x.inner)
    }
}
