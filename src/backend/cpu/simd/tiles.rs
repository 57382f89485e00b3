//! Matrix tiles: the trait [`Tiles`], and [`TileTwin`], which computes the same bits without a tile unit.
//!
//! A tile is 16 rows of 16 words. There are eight tile registers, numbered from 0. Operand A of a product has a row of x in each
//! row; operand B has 16 columns of W, with the k-group of row k in row k. So a product adds 16 k-groups to 16 x 16 sums.

use super::isa::{Isa, SimdOp};

/// Rows of a tile, and words of each row.
pub(in crate::backend::cpu) const TILE_SIZE: usize = 16;

/// Words of a tile.
pub(in crate::backend::cpu) const TILE_WORDS: usize = TILE_SIZE * TILE_SIZE;

/// The operations on tile registers. The const parameters are numbers of registers, from 0 to 7; `stride` is the number of words
/// from the start of a row to the start of the next.
///
/// # Safety
/// The callers of `load`, `load_streaming` and `store` guarantee that the pointer is valid for 16 rows of 16 words.
pub(in crate::backend::cpu) trait Tiles {
    /// Sets all words of a tile to zero.
    fn zero<const T: usize>(&mut self);
    unsafe fn load<const T: usize>(&mut self, from: *const u32, stride: usize);
    /// [`Self::load`] for data that should not displace other data from the L1 cache.
    unsafe fn load_streaming<const T: usize>(&mut self, from: *const u32, stride: usize);
    unsafe fn store<const T: usize>(&mut self, to: *mut u32, stride: usize);
    /// `sums += a * b` for tiles of bf16 pairs, in f32.
    ///
    /// The order of the operations is that of `tdpbf16ps`: the even and the odd values of a row of A are two chains of fused
    /// multiply-adds from +0, and `sums + (even + odd)` is the result. Each operation rounds to nearest, ties to even. Subnormal
    /// inputs and results are zero.
    fn dot_bf16<const SUMS: usize, const A: usize, const B: usize>(&mut self);
    /// `sums += a * b` for tiles of unsigned (a) and signed (b) bytes, in i32 that wraps around.
    fn dot_int8<const SUMS: usize, const A: usize, const B: usize>(&mut self);
}

/// A computation with tiles and vectors.
pub(in crate::backend::cpu) trait TileOp {
    /// Runs the computation. Implementations are `#[inline(always)]`.
    fn run<I: Isa, T: Tiles>(self, isa: I, tiles: &mut T);
}

/// A [`TileOp`] as a [`SimdOp`]: `configure` returns the tile registers, which are released when they are dropped.
pub(super) struct WithTiles<O, F> {
    pub(super) op: O,
    pub(super) configure: F,
}

impl<O: TileOp, T: Tiles, F: FnOnce() -> T> SimdOp for WithTiles<O, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let mut tiles = (self.configure)();
        self.op.run(isa, &mut tiles);
    }
}

/// Portable tiles with the exact results of Intel AMX, NaN payloads excepted.
#[derive(Debug, Clone, PartialEq)]
#[repr(align(64))]
pub(super) struct TileTwin([[[u32; TILE_SIZE]; TILE_SIZE]; 8]);

impl TileTwin {
    /// Eight tiles of zeros.
    pub(super) fn new() -> Self {
        Self([[[0; TILE_SIZE]; TILE_SIZE]; 8])
    }
}

impl Tiles for TileTwin {
    #[inline(always)]
    fn zero<const T: usize>(&mut self) {
        self.0[T] = [[0; TILE_SIZE]; TILE_SIZE];
    }

    #[inline(always)]
    unsafe fn load<const T: usize>(&mut self, from: *const u32, stride: usize) {
        for (i, row) in self.0[T].iter_mut().enumerate() {
            // SAFETY: the caller guarantees 16 rows of 16 words. The array has no alignment of its own.
            unsafe { *row = from.add(i * stride).cast::<[u32; TILE_SIZE]>().read_unaligned() };
        }
    }

    #[inline(always)]
    unsafe fn load_streaming<const T: usize>(&mut self, from: *const u32, stride: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe { self.load::<T>(from, stride) }
    }

    #[inline(always)]
    unsafe fn store<const T: usize>(&mut self, to: *mut u32, stride: usize) {
        for (i, row) in self.0[T].iter().enumerate() {
            // SAFETY: as in `load`.
            unsafe { to.add(i * stride).cast::<[u32; TILE_SIZE]>().write_unaligned(*row) };
        }
    }

    #[inline(always)]
    fn dot_bf16<const SUMS: usize, const A: usize, const B: usize>(&mut self) {
        let (a, b) = (self.0[A], self.0[B]);
        for (sums, a) in self.0[SUMS].iter_mut().zip(&a) {
            let (mut even, mut odd) = ([0f32; TILE_SIZE], [0f32; TILE_SIZE]);
            for (&a, b) in a.iter().zip(&b) {
                for n in 0..TILE_SIZE {
                    even[n] = flushed_fma(low(a), low(b[n]), even[n]);
                    odd[n] = flushed_fma(high(a), high(b[n]), odd[n]);
                }
            }
            for n in 0..TILE_SIZE {
                sums[n] = flushed_add(f32::from_bits(sums[n]), flushed_add(even[n], odd[n])).to_bits();
            }
        }
    }

    #[inline(always)]
    fn dot_int8<const SUMS: usize, const A: usize, const B: usize>(&mut self) {
        let (a, b) = (self.0[A], self.0[B]);
        for (sums, a) in self.0[SUMS].iter_mut().zip(&a) {
            for (&a, b) in a.iter().zip(&b) {
                for n in 0..TILE_SIZE {
                    let product = |shift: u32| i32::from((a >> shift) as u8) * i32::from((b[n] >> shift) as i8);
                    let four = product(0) + product(8) + product(16) + product(24);
                    sums[n] = sums[n].wrapping_add_signed(four);
                }
            }
        }
    }
}

/// The first of two bf16 values.
#[inline(always)]
fn low(word: u32) -> f32 {
    f32::from_bits(word << 16)
}

/// The second of two bf16 values.
#[inline(always)]
fn high(word: u32) -> f32 {
    f32::from_bits(word & 0xffff_0000)
}

/// x, or a zero of its sign if x is subnormal.
#[inline(always)]
fn flush(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits })
}

#[inline(always)]
fn flushed_add(a: f32, b: f32) -> f32 {
    flush(flush(a) + flush(b))
}

#[inline(always)]
fn flushed_fma(a: f32, b: f32, c: f32) -> f32 {
    flush(flush(a).mul_add(flush(b), flush(c)))
}
