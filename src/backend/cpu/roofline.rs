//! Measures the machine's peak rate of multiplications and additions.

use std::hint::black_box;
use std::io;
use std::time::Instant;

use super::dtype::CpuDtype;
use super::gemm::{self, Dot};
use super::packed::StorageFormat;
use super::simd::{Isa, MAX_LANES, SimdOp, SimdPath};
use super::thread_pool::ThreadPool;

/// Peak operations per second of the GEMM's multiply instructions on `threads` threads, measured on registers only. A
/// multiplication and an addition are two operations.
///
/// # Errors
/// The operating system cannot create the threads.
pub fn peak(dtype: CpuDtype, threads: usize) -> io::Result<f64> {
    peak_of(dtype.storage_format(), threads)
}

pub(super) fn peak_of(format: StorageFormat, threads: usize) -> io::Result<f64> {
    /// K-groups per thread: some milliseconds on a current processor.
    const K_GROUPS: usize = 2_000_000;
    let pool = ThreadPool::new(threads, false)?;
    let path = SimdPath::best();
    let _threads = pool.lock_threads();
    let run = |k_groups| {
        pool.broadcast(&|_| match format {
            StorageFormat::F32 => path.enter(RegisterTile { format: gemm::F32, k_groups }),
            StorageFormat::Bf16 => path.enter(RegisterTile { format: gemm::Bf16, k_groups }),
            StorageFormat::Int8 => path.enter(RegisterTile { format: gemm::Int8, k_groups }),
        });
    };
    run(K_GROUPS / 10);
    let begun = Instant::now();
    run(K_GROUPS);
    let seconds = begun.elapsed().as_secs_f64();
    let values = format.values_per_k_group();
    let columns = path.panel_columns();
    Ok((2 * values * K_GROUPS * 6 * columns * threads) as f64 / seconds)
}

/// The microkernel's dot products without its loads and stores.
struct RegisterTile<D> {
    format: D,
    k_groups: usize,
}

impl<D: Dot> SimdOp for RegisterTile<D> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        if I::PANEL_VECTORS == 4 { self.tile::<I, 4>(isa) } else { self.tile::<I, 2>(isa) }
    }
}

impl<D: Dot> RegisterTile<D> {
    #[inline(always)]
    fn tile<I: Isa, const V: usize>(self, isa: I) {
        let mut acc = [[isa.splat_bits(0); V]; 6];
        let (a, b) = (isa.splat_bits(black_box(0)), isa.splat_bits(black_box(0)));
        for _ in 0..self.k_groups {
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
