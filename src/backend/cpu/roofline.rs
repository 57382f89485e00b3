//! Measures the machine's peak rates of multiplications and additions, and chooses the instruction set by them: CPUID tells which
//! instructions a processor has, not how fast they are. On Sapphire Rapids `vdpbf16ps` has a quarter of the rate of f32 FMA. Where a
//! GEMM multiplies in tiles, the rate is that of tile products.

use std::fmt;
use std::hint::black_box;
use std::io;
use std::sync::OnceLock;
use std::time::Instant;

use super::dtype::CpuDtype;
use super::gemm::{self, Dot};
use super::packed::{OperandLayout, StorageFormat};
use super::simd::{Isa, MAX_LANES, SimdOp, SimdPath, TILE_SIZE, TileOp, Tiles};
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
    const K_GROUPS: usize = 2_048_000;
    let pool = ThreadPool::new(threads, false)?;
    let path = best_path();
    let _threads = pool.lock_threads();
    let run = |k_groups| pool.broadcast(&|_| run_register_tile(path, format, k_groups));
    run(K_GROUPS / 10);
    let begun = Instant::now();
    run(K_GROUPS);
    let seconds = begun.elapsed().as_secs_f64();
    Ok((2 * threads * multiplications(path, format, K_GROUPS)) as f64 / seconds)
}

/// The rate of multiplications in bf16 and int8, as a multiple of the rate in f32. Measured on registers of one thread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MultiplyRates {
    /// `None` if the processor has no instruction for bf16 dot products.
    pub bf16: Option<f64>,
    /// With the best instructions that there are.
    pub int8: f64,
}

impl MultiplyRates {
    /// The rates of this processor, measured at the first call in less than 2 ms.
    pub fn measured() -> Self {
        static RATES: OnceLock<MultiplyRates> = OnceLock::new();
        *RATES.get_or_init(|| {
            let path = SimdPath::supported()[0];
            let [f32, bf16, int8] = multiplications_per_second(path);
            Self { bf16: path.has_bf16().then_some(bf16 / f32), int8: int8 / f32 }
        })
    }

    /// Whether bf16 is at least as fast as f32. An instruction for bf16 has two (AMD Zen 4) or half (Sapphire Rapids) of the rate
    /// of f32, so the comparison does not depend on noise.
    pub fn bf16_is_fast(self) -> bool {
        self.bf16.is_some_and(|rate| rate >= 1.0)
    }
}

impl fmt::Display for MultiplyRates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bf16 {
            Some(bf16) => {
                write!(f, "multiplications in bf16 {bf16:.1}, in int8 {:.1} times as fast as in f32", self.int8)
            }
            None => write!(f, "no bf16 instructions; multiplications in int8 {:.1} times as fast as in f32", self.int8),
        }
    }
}

/// The best instruction set of this machine. bf16 dot products count only if they are fast; else they are computed in f32.
pub(super) fn best_path() -> SimdPath {
    let best = SimdPath::supported()[0];
    if MultiplyRates::measured().bf16_is_fast() { best } else { best.without_bf16().unwrap_or(best) }
}

/// Multiplications per second of one thread in f32, bf16 and int8: the best of several short runs that take turns.
fn multiplications_per_second(path: SimdPath) -> [f64; 3] {
    const RUNS: usize = 7;
    const K_GROUPS: usize = 2_048;
    let formats = [StorageFormat::F32, StorageFormat::Bf16, StorageFormat::Int8];
    let mut best = [0f64; 3];
    for _ in 0..RUNS {
        for (best, format) in best.iter_mut().zip(formats) {
            let begun = Instant::now();
            run_register_tile(path, format, K_GROUPS);
            *best = best.max(multiplications(path, format, K_GROUPS) as f64 / begun.elapsed().as_secs_f64());
        }
    }
    best
}

/// The multiplications of [`run_register_tile`].
fn multiplications(path: SimdPath, format: StorageFormat, k_groups: usize) -> usize {
    let per_k_group = match OperandLayout::of(path, format) {
        OperandLayout::Vectors { width } => MICROKERNEL_ROWS * width,
        OperandLayout::Tiles => TILE_REPEATS * TILE_SIZE * TILE_SIZE,
    };
    k_groups * per_k_group * format.values_per_k_group()
}

/// Multiplies `k_groups` k-groups without loads and stores, as the GEMM does in this format: in vectors or in tiles.
fn run_register_tile(path: SimdPath, format: StorageFormat, k_groups: usize) {
    if OperandLayout::of(path, format) == OperandLayout::Tiles {
        return path
            .enter_tiles(TileProducts { int8: format == StorageFormat::Int8, k_groups: TILE_REPEATS * k_groups });
    }
    match format {
        StorageFormat::F32 => path.enter(RegisterTile { format: gemm::F32, k_groups }),
        StorageFormat::Bf16 => path.enter(RegisterTile { format: gemm::Bf16, k_groups }),
        StorageFormat::Int8 => path.enter(RegisterTile { format: gemm::Int8, k_groups }),
    }
}

/// Tile products of `k_groups` k-groups, in four independent sums.
struct TileProducts {
    int8: bool,
    k_groups: usize,
}

impl TileOp for TileProducts {
    #[inline(always)]
    fn run<I: Isa, T: Tiles>(self, _: I, tiles: &mut T) {
        for _ in 0..self.k_groups / (4 * TILE_SIZE) {
            if self.int8 {
                tiles.dot_int8::<0, 4, 6>();
                tiles.dot_int8::<1, 4, 7>();
                tiles.dot_int8::<2, 5, 6>();
                tiles.dot_int8::<3, 5, 7>();
            } else {
                tiles.dot_bf16::<0, 4, 6>();
                tiles.dot_bf16::<1, 4, 7>();
                tiles.dot_bf16::<2, 5, 6>();
                tiles.dot_bf16::<3, 5, 7>();
            }
        }
    }
}

/// Tile products for each k-group that is asked for. A product has about as many sums as the microkernel, and the tile unit computes
/// this many in the microkernel's time: so measuring takes a similar time in tiles and in vectors.
const TILE_REPEATS: usize = 8;

/// Rows of the microkernel.
const MICROKERNEL_ROWS: usize = 6;

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
        let mut acc = [[isa.splat_bits(0); V]; MICROKERNEL_ROWS];
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_used_only_if_it_is_as_fast_as_f32() {
        let rates = |bf16| MultiplyRates { bf16, int8: 4.0 };
        assert!(rates(Some(2.0)).bf16_is_fast()); // Zen 4
        assert!(!rates(Some(0.5)).bf16_is_fast()); // Sapphire Rapids
        assert!(!rates(None).bf16_is_fast());
    }

    #[test]
    fn rates_are_positive_and_finite_and_measured_once() {
        let rates = MultiplyRates::measured();
        assert!(rates.int8.is_normal() && rates.int8 > 0.0, "{rates:?}");
        assert!(rates.bf16.is_none_or(|rate| rate.is_normal() && rate > 0.0), "{rates:?}");
        assert_eq!(rates.bf16.is_some(), SimdPath::supported()[0].has_bf16());
        assert_eq!(MultiplyRates::measured(), rates);
    }

    #[test]
    fn without_bf16_instructions_everything_else_stays() {
        for path in SimdPath::supported() {
            let Some(other) = path.without_bf16() else { continue };
            assert!(path.has_bf16() && !other.has_bf16());
            assert_eq!(path.panel_columns(), other.panel_columns());
            assert!(SimdPath::supported().contains(&other));
        }
    }
}
