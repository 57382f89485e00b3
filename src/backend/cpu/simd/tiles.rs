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
        let mut b_values = [[[0f32; 2]; TILE_SIZE]; TILE_SIZE];
        for (values, words) in b_values.iter_mut().zip(&b) {
            for (values, &word) in values.iter_mut().zip(words) {
                *values = bf16_pair(word);
            }
        }
        for (sums, a) in self.0[SUMS].iter_mut().zip(&a) {
            let mut chains = [[0f32; 2]; TILE_SIZE];
            for (&a, b) in a.iter().zip(&b_values) {
                let a = bf16_pair(a);
                for (chain, b) in chains.iter_mut().zip(b) {
                    chain[0] = flush(a[0].mul_add(b[0], chain[0]));
                    chain[1] = flush(a[1].mul_add(b[1], chain[1]));
                }
            }
            for (sum, [even, odd]) in sums.iter_mut().zip(chains) {
                *sum = flush(flush(f32::from_bits(*sum)) + flush(even + odd)).to_bits();
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

/// Both bf16 values of a word, subnormals as zeros.
#[inline(always)]
fn bf16_pair(word: u32) -> [f32; 2] {
    [word << 16, word & 0xffff_0000].map(|bits| flush(f32::from_bits(bits)))
}

/// x, or a zero of its sign if x is subnormal.
#[inline(always)]
fn flush(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One product of tiles whose words are all equal.
    fn product(int8: bool, sum: u32, a: u32, b: u32) -> u32 {
        let mut tiles = TileTwin([[[0; TILE_SIZE]; TILE_SIZE]; 8]);
        (tiles.0[0], tiles.0[1], tiles.0[2]) =
            ([[sum; TILE_SIZE]; TILE_SIZE], [[a; TILE_SIZE]; TILE_SIZE], [[b; TILE_SIZE]; TILE_SIZE]);
        if int8 {
            tiles.dot_int8::<0, 1, 2>()
        } else {
            tiles.dot_bf16::<0, 1, 2>()
        }
        assert!(tiles.0[0].iter().flatten().all(|&word| word == tiles.0[0][0][0]));
        tiles.0[0][0][0]
    }

    /// A pair of equal bf16 values. `x` is exact in bf16.
    fn pair(x: f32) -> u32 {
        x.to_bits() | x.to_bits() >> 16
    }

    #[test]
    fn the_twin_computes_the_instructions_documented_arithmetic() {
        let bf16 = |sum: f32, a: f32, b: f32| f32::from_bits(product(false, sum.to_bits(), pair(a), pair(b)));
        // 32 products. Those of a chain are summed before they meet the sum: 16 times 2^-24 one by one would leave 1 as it is.
        let small = 2f32.powi(-12);
        assert_eq!(bf16(1.0, small, small), 1.0 + 2f32.powi(-19));
        assert_eq!(bf16(1.5, 2.0, -3.0), 1.5 - 192.0);
        // Subnormal inputs, sums and results are zero.
        let (subnormal, smallest) = (f32::from_bits(0x0040_0000), f32::MIN_POSITIVE);
        assert_eq!(bf16(0.0, subnormal, 2f32.powi(100)), 0.0);
        assert_eq!(bf16(subnormal, 0.0, 0.0), 0.0);
        assert_eq!(bf16(-smallest, 2f32.powi(-66), 2f32.powi(-66)), -smallest);
        assert!(bf16(0.0, f32::INFINITY, 0.0).is_nan());
        // A product is not rounded before it is added: the subnormal 2^-127 counts beside 2^-126.
        let (mut tiles, small) = (TileTwin::new(), |n: i32| pair(2f32.powi(n)) & 0xffff);
        (tiles.0[1][0][0], tiles.0[1][0][1]) = (small(-63), small(-63));
        (tiles.0[2][0][0], tiles.0[2][1][0]) = (small(-63), small(-64));
        tiles.dot_bf16::<0, 1, 2>();
        assert_eq!(f32::from_bits(tiles.0[0][0][0]), 1.5 * smallest);
    }

    #[test]
    fn the_twins_int8_sums_are_unsigned_times_signed_and_wrap() {
        assert_eq!(product(true, 5, 0xffff_ffff, 0x8080_8080).cast_signed(), 5 - 64 * 255 * 128);
        assert_eq!(product(true, 0, 0x0403_0201, 0x0102_0304), 16 * 20);
        assert_eq!(product(true, i32::MAX.cast_unsigned(), 0x0000_0001, 0x0000_0001), 0x8000_000f);
    }
}
