//! A single GEMM, for `benches/kernels.rs`.

use std::hint::black_box;
use std::sync::Arc;

use super::dtype::CpuDtype;
use super::epilogue::OutputRows;
use super::gemm::Gemm;
use super::packed::PackedWeights;
use super::quantize::{QuantizeSource, QuantizedRows, gemm_input};
use super::thread_pool::ThreadPool;
use super::workspace::Matrix;
use super::{CpuBackend, ExecContext};
use crate::backend::HostTensor;

/// A GEMM of random numbers, `[m, k]` times `[k, n]`.
#[derive(Debug)]
pub struct GemmBenchmark {
    backend: CpuBackend,
    ctx: ExecContext,
    x: Matrix<f32>,
    quantized: Option<QuantizedRows>,
    weights: PackedWeights,
    y: Matrix<f32>,
}

impl GemmBenchmark {
    /// Creates the operands, and `threads` threads.
    ///
    /// # Panics
    /// The operating system cannot create the threads.
    pub fn new(dtype: CpuDtype, threads: usize, [m, k, n]: [usize; 3]) -> Self {
        let pool = Arc::new(ThreadPool::new(threads, false).expect("the operating system creates threads"));
        let backend = CpuBackend::new(dtype, Arc::clone(&pool));
        let ctx = ExecContext::all_threads(&pool);
        let mut random = fastrand::Rng::with_seed(1);
        let mut values = |count: usize| (0..count).map(|_| random.f32() - 0.5).collect::<Vec<f32>>();
        let mut x = Matrix::acquire(m, k);
        (0..m).for_each(|row| x.row_mut(row).copy_from_slice(&values(k)));
        let weight = HostTensor { shape: vec![n, k], data: values(n * k) };
        let bias = HostTensor { shape: vec![n], data: values(n) };
        let weights = PackedWeights::pack(backend.format, backend.layout(), &weight, &bias, &pool);
        let mut quantized = QuantizedRows::acquire(backend.format, backend.layout(), m, k);
        if let Some(quantized) = &mut quantized {
            backend.quantize(&ExecContext::single_thread(), QuantizeSource::F32(&x), k, quantized, m);
        }
        Self { backend, ctx, x, quantized, weights, y: Matrix::acquire(m, n) }
    }

    /// Computes the GEMM once.
    pub fn run(&mut self) {
        let input = self.quantized.as_ref().map_or_else(|| gemm_input(&self.x, &[]), QuantizedRows::gemm_input);
        let (start, end, output) = (0, self.y.columns(), OutputRows::F32(self.y.shared()));
        let gemm =
            Gemm { input, weights: &self.weights, start, end, activation: None, gated: None, residual: None, output };
        self.backend.gemm(&self.ctx, &gemm);
        black_box(&self.y);
    }
}
