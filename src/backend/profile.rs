//! Where a batch's time goes: a backend around another, whatever the device, that times each operation and says how near it
//! came to what the device can do. It changes no value. `rerankd bench --profile` shows what it finds.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{
    Activation, AttentionShape, Backend, BackendError, EmbeddingTables, Epilogue, Graph, HostTensor, LayerRole,
    NormWeights, Roofline, Timed,
};
use crate::batch::Batch;

/// What was found so far: for the backends that add to it, and for whoever reads it.
#[derive(Debug, Default)]
pub struct Profile(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    roofline: Option<Roofline>,
    /// In the order in which a batch comes to them.
    operations: Vec<Operation>,
}

/// All calls of one operation.
#[derive(Debug, Clone, PartialEq)]
pub struct Operation {
    /// What it is, and the shape of a product's weight, inputs to outputs.
    pub name: String,
    /// Calls.
    pub calls: usize,
    /// Seconds of the whole device.
    pub seconds: f64,
    /// Seconds that it takes at least, at the device's roofline; 0 where they say nothing of it.
    pub least: f64,
}

/// What an operation cannot do without: every value is read or written once.
#[derive(Debug, Clone, Copy, Default)]
struct Work {
    /// In products.
    products: usize,
    /// In attention.
    attention: usize,
    /// Activations that are read or written.
    activations: usize,
    /// Weights that are read.
    weights: usize,
}

impl Work {
    /// Seconds of the whole device.
    fn least(self, roofline: &Roofline) -> f64 {
        let multiplied = self.products as f64 / roofline.gemms + self.attention as f64 / roofline.attention;
        let moved = roofline.memory.map_or(0.0, |memory| {
            (self.activations * memory.activation + self.weights * memory.weight) as f64 / memory.bytes
        });
        multiplied.max(moved)
    }
}

impl Profile {
    /// What a device was found to do at most.
    pub fn roofline(&self) -> Option<Roofline> {
        self.lock().roofline
    }

    /// What was added since the last call.
    pub fn take(&self) -> Vec<Operation> {
        std::mem::take(&mut self.lock().operations)
    }

    fn add(&self, name: String, seconds: f64, work: Work) {
        let mut state = self.lock();
        let least = state.roofline.map_or(0.0, |roofline| work.least(&roofline));
        let known = state.operations.iter().position(|operation| operation.name == name);
        let i = known.unwrap_or_else(|| {
            state.operations.push(Operation { name, calls: 0, seconds: 0.0, least: 0.0 });
            state.operations.len() - 1
        });
        let operation = &mut state.operations[i];
        operation.calls += 1;
        operation.seconds += seconds;
        operation.least += least;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A backend whose operations are timed. Runs are to come one after another: two at a time share a device, and the times of
/// each hold the other's.
pub struct Profiled<B: Timed> {
    inner: B,
    profile: Arc<Profile>,
    /// Of the run that is under way.
    timed: Mutex<Vec<TimedOperation<B::Event>>>,
}

struct TimedOperation<M> {
    name: String,
    work: Work,
    from: M,
    to: M,
}

/// Rows of activations, and how many of what.
pub struct Buffer<B> {
    inner: B,
    rows: usize,
    columns: usize,
    first_tokens: bool,
}

/// Embedding tables.
pub struct Embeddings<E> {
    inner: E,
    columns: usize,
}

/// A linear layer.
pub struct Linear<L> {
    inner: L,
    inputs: usize,
    role: LayerRole,
}

impl<B: Timed> Profiled<B> {
    /// Adds what the operations of `inner` take to `profile`.
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
        let from = self.inner.record_event(ctx)?;
        let result = operation(&self.inner)?;
        let to = self.inner.record_event(ctx)?;
        self.timed().push(TimedOperation { name: name.into(), work, from, to });
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
        format!("{}, each operation timed", self.inner.describe())
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
        // A recording has no operations to time.
        self.run_observed(batch, graph)
    }

    fn run_observed(&self, batch: &Batch, graph: Graph<'_, Self>) -> Result<Vec<f32>, BackendError> {
        self.timed().clear(); // of a run that failed
        let logits = self.inner.run_observed(batch, graph)?;
        if self.profile.roofline().is_none() {
            self.profile.lock().roofline = self.inner.roofline()?;
        }
        for TimedOperation { name, work, from, to } in std::mem::take(&mut *self.timed()) {
            self.profile.add(name, self.inner.elapsed_seconds(&from, &to)?, work);
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
        // A row of words, one of positions, and the sum's.
        let work = Work { activations: 3 * rows * columns, ..Work::default() };
        let inner = self.time(ctx, "embeddings", work, |b| b.embed(ctx, &weights.inner, batch))?;
        Ok(Buffer { inner, rows, columns, first_tokens: false })
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
        let (suffix, more) = match epilogue {
            Epilogue::Bias => ("", 0),
            Epilogue::Activation(Activation::Gelu) => (", gelu", 0),
            Epilogue::Activation(Activation::GeluTanh) => (", tanh gelu", 0),
            Epilogue::Activation(Activation::Relu) => (", relu", 0),
            Epilogue::Activation(Activation::Tanh) => (", tanh", 0),
            Epilogue::Residual(_) => (", residual", rows * columns),
        };
        let name = match (weights.role, x.first_tokens) {
            (LayerRole::Head, _) => "head".to_owned(),
            (LayerRole::Encoder, true) => format!("first tokens: product {inputs} to {columns}{suffix}"),
            (LayerRole::Encoder, false) => format!("product {inputs} to {columns}{suffix}"),
        };
        let work = match weights.role {
            LayerRole::Head => Work::default(),
            LayerRole::Encoder => Work {
                products: 2 * rows * inputs * columns,
                activations: rows * (inputs + columns) + more,
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
        Ok(Buffer { inner, rows, columns, first_tokens: x.first_tokens })
    }

    fn layer_norm(
        &self,
        ctx: &B::ExecContext,
        weights: &B::Norm,
        x: Self::Buffer,
    ) -> Result<Self::Buffer, BackendError> {
        let Buffer { inner, rows, columns, first_tokens } = x;
        let name = if first_tokens { "first tokens: layer norm" } else { "layer norm" };
        let work = Work { activations: 2 * rows * columns, ..Work::default() };
        let inner = self.time(ctx, name, work, |b| b.layer_norm(ctx, weights, inner))?;
        Ok(Buffer { inner, rows, columns, first_tokens })
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
        let work = Work { attention: 4 * squares * c, activations: 4 * qkv.rows * c, ..Work::default() };
        let inner = self.time(ctx, "attention", work, |b| b.attention(ctx, shape, &qkv.inner, batch))?;
        Ok(Buffer { inner, rows: qkv.rows, columns: c, first_tokens: false })
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
        let work = Work { attention: 4 * kv.rows * c, activations: 2 * (kv.rows + q.rows) * c, ..Work::default() };
        let inner = self
            .time(ctx, "first tokens: attention", work, |b| b.cls_attention(ctx, shape, &q.inner, &kv.inner, batch))?;
        Ok(Buffer { inner, rows: q.rows, columns: c, first_tokens: true })
    }

    fn gather_cls(&self, ctx: &B::ExecContext, x: &Self::Buffer, batch: &Batch) -> Result<Self::Buffer, BackendError> {
        let rows = batch.sequences();
        let work = Work { activations: 2 * rows * x.columns, ..Work::default() };
        let inner = self.time(ctx, "first tokens: gather", work, |b| b.gather_cls(ctx, &x.inner, batch))?;
        Ok(Buffer { inner, rows, columns: x.columns, first_tokens: true })
    }

    fn download(&self, ctx: &B::ExecContext, x: &Self::Buffer) -> Result<Vec<f32>, BackendError> {
        self.inner.download(ctx, &x.inner)
    }
}
