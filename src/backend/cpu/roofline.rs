//! What this machine can do, and what single operations make of it: for `benches/kernels.rs`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use super::CpuDtype;
use super::epilogue::Output;
use super::gemm::{self, Dot, Gemm};
use super::packed::{Format, PackedWeights};
use super::quantize::{LowerFrom, input};
use super::simd::MAX_LANES;
use super::simd::{Isa, Op, SimdPath};
use super::thread_pool::ThreadPool;
use super::workspace::Matrix;
use super::{CpuBackend, ExecContext, Low};
use crate::backend::HostTensor;

/// Operations a second that the multipliers can do, a multiplication and an addition being two: products of registers alone,
/// on as many threads.
pub fn peak(dtype: CpuDtype, threads: usize) -> f64 {
    peak_of(CpuBackend::format_of(dtype), threads)
}

pub(super) fn peak_of(format: Format, threads: usize) -> f64 {
    /// K-steps a thread does: some tens of milliseconds.
    const STEPS: usize = 2_000_000;
    let pool = ThreadPool::new(threads, false).expect("threads");
    let path = SimdPath::best();
    let _turn = pool.turn();
    let run = |steps| {
        pool.broadcast(&|_| match format {
            Format::F32 => path.enter(Registers { format: gemm::F32, steps }),
            Format::Bf16 => path.enter(Registers { format: gemm::Bf16, steps }),
            Format::Int8 => path.enter(Registers { format: gemm::Int8, steps }),
        });
    };
    run(STEPS / 10);
    let begun = Instant::now();
    run(STEPS);
    let seconds = begun.elapsed().as_secs_f64();
    let values = format.values_per_step();
    let lanes = path.panel();
    (2 * values * STEPS * 6 * lanes * threads) as f64 / seconds
}

/// The microkernel's multiplications without its memory.
struct Registers<D> {
    format: D,
    steps: usize,
}

impl<D: Dot> Op for Registers<D> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        if I::PANEL_VECTORS == 4 { self.tile::<I, 4>(isa) } else { self.tile::<I, 2>(isa) }
    }
}

impl<D: Dot> Registers<D> {
    #[inline(always)]
    fn tile<I: Isa, const V: usize>(self, isa: I) {
        let mut acc = [[isa.splat_bits(0); V]; 6];
        let (a, b) = (isa.splat_bits(black_box(0)), isa.splat_bits(black_box(0)));
        for _ in 0..self.steps {
            for row in &mut acc {
                for sum in row {
                    *sum = self.format.dot(isa, *sum, a, b);
                }
            }
        }
        let mut lanes = [0; MAX_LANES];
        for sum in acc.into_iter().flatten() {
            // SAFETY: the array has room for the widest vector.
            unsafe { isa.store_bits(lanes.as_mut_ptr(), sum) };
            black_box(&lanes);
        }
    }
}

/// A product of random numbers, `[m, k]` times `[k, n]`.
#[derive(Debug)]
pub struct GemmSample {
    backend: CpuBackend,
    ctx: ExecContext,
    x: Matrix<f32>,
    low: Option<Low>,
    weights: PackedWeights,
    y: Matrix<f32>,
}

impl GemmSample {
    /// Makes one on some threads.
    pub fn new(dtype: CpuDtype, threads: usize, [m, k, n]: [usize; 3]) -> Self {
        let pool = Arc::new(ThreadPool::new(threads, false).expect("threads"));
        let backend = CpuBackend::new(dtype, Arc::clone(&pool));
        let ctx = ExecContext { team: (threads > 1).then(|| Arc::clone(&pool)) };
        let mut random = fastrand::Rng::with_seed(1);
        let mut values = |count: usize| (0..count).map(|_| random.f32() - 0.5).collect::<Vec<f32>>();
        let mut x = Matrix::take(m, k);
        (0..m).for_each(|row| x.row_mut(row).copy_from_slice(&values(k)));
        let weight = HostTensor { shape: vec![n, k], data: values(n * k) };
        let bias = HostTensor { shape: vec![n], data: values(n) };
        let weights = PackedWeights::pack(backend.format, backend.path.panel(), &weight, &bias, &pool);
        let mut low = Low::take(backend.format, m, k);
        if let Some(low) = &mut low {
            backend.lower(&ExecContext { team: None }, LowerFrom::F32(&x), k, low, m);
        }
        Self { backend, ctx, x, low, weights, y: Matrix::take(m, n) }
    }

    /// Computes it.
    pub fn multiply(&mut self) {
        let input = self.low.as_ref().map_or_else(|| input(&self.x, &[]), Low::input);
        let (start, end, output) = (0, self.y.columns(), Output::F32(self.y.shared()));
        let product = Gemm { input, weights: &self.weights, start, end, activation: None, residual: None, output };
        self.backend.multiply(&self.ctx, &product);
        black_box(&self.y);
    }
}
