//! The trait [`Isa`] that every instruction set implements, and `exp2`, which is built from it.

/// Lanes of the widest vector.
pub(in crate::backend::cpu) const MAX_LANES: usize = 16;

/// A computation that is written once for all instruction sets.
pub(in crate::backend::cpu) trait SimdOp {
    type Output;
    /// Runs the computation. Implementations are `#[inline(always)]` and use no vectors in closures, because closures are
    /// not always inlined.
    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

/// The vector operations that the kernels use.
///
/// # Safety
/// A value of an implementing type exists only on a machine that has its instructions. Callers of the pointer methods
/// guarantee that the pointers are valid for `LANES` elements, at any alignment, if the method does not say otherwise.
pub(in crate::backend::cpu) unsafe trait Isa: Copy + Send + Sync + 'static {
    /// A vector of `LANES` f32.
    type Floats: Copy;
    /// A vector of `LANES` 32-bit words: f32, pairs of bf16, four int8 each, or i32.
    type Bits: Copy;
    /// 32-bit lanes of a vector.
    const LANES: usize;
    /// Vectors in a row of a panel of packed weights. A tile of six rows needs six times as many accumulator registers.
    const PANEL_VECTORS: usize;
    /// Columns per panel.
    const PANEL_COLUMNS: usize = Self::LANES * Self::PANEL_VECTORS;
    /// Whether `dot_int8` subtracts 128 from each byte of a, because the instruction multiplies only signed bytes.
    const SIGNED_BYTES: bool = false;

    /// Runs `op` compiled for this instruction set.
    fn enter<O: SimdOp>(self, op: O) -> O::Output;

    fn splat(self, x: f32) -> Self::Floats;
    fn splat_bits(self, x: u32) -> Self::Bits;
    /// Reads `LANES` values, at any alignment.
    unsafe fn load(self, from: *const f32) -> Self::Floats;
    unsafe fn load_bits(self, from: *const u32) -> Self::Bits;
    unsafe fn store(self, to: *mut f32, x: Self::Floats);
    unsafe fn store_bits(self, to: *mut u32, x: Self::Bits);
    /// Writes `LANES` values rounded to bf16, ties to even.
    unsafe fn store_bf16(self, to: *mut u16, x: Self::Floats);
    /// Reads `LANES` bf16 values.
    unsafe fn load_bf16(self, from: *const u16) -> Self::Floats;
    /// Rounds `LANES` values to integers, ties to even, and writes them as bytes. The caller guarantees that the
    /// rounded values are from 0 to 255; instruction sets treat others differently.
    unsafe fn store_u8(self, to: *mut u8, x: Self::Floats);
    /// Prefetches a cache line into L2; does nothing by default. Any address is allowed: prefetch never faults.
    #[inline(always)]
    fn prefetch(self, _line: *const u32) {}

    /// Reinterprets the bits as f32.
    fn bits_to_f32(self, x: Self::Bits) -> Self::Floats;
    /// i32 lanes as f32.
    fn i32_to_f32(self, x: Self::Bits) -> Self::Floats;

    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn sub(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn div(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn max(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    fn min(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// Rounds to the nearest integer, ties to even.
    fn round(self, x: Self::Floats) -> Self::Floats;
    /// 2^x with a relative error of at most 1e-4, for results that are rounded to bf16.
    #[inline(always)]
    fn exp2_for_bf16(self, x: Self::Floats) -> Self::Floats {
        exp2(self, x, Accuracy::Bf16)
    }
    /// `a / b` with a relative error of at most 1e-3, for results that are rounded to bf16.
    #[inline(always)]
    fn div_for_bf16(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        self.div(a, b)
    }
    /// `x * 2^n` for integers n from -126 to 127.
    fn scale_by_power(self, x: Self::Floats, n: Self::Floats) -> Self::Floats;
    /// The first n lanes of x; the others hold `fill`.
    #[inline(always)]
    fn first_lanes(self, x: Self::Floats, n: usize, fill: f32) -> Self::Floats {
        let mut lanes = [0f32; MAX_LANES];
        // SAFETY: the array has room for the widest vector.
        unsafe {
            self.store(lanes.as_mut_ptr(), x);
            lanes[n..].fill(fill);
            self.load(lanes.as_ptr())
        }
    }
    fn reduce_sum(self, x: Self::Floats) -> f32;
    fn reduce_max(self, x: Self::Floats) -> f32;
    fn reduce_min(self, x: Self::Floats) -> f32;

    /// `acc + a * b` in f32 lanes.
    fn dot_f32(self, acc: Self::Bits, a: Self::Bits, b: Self::Bits) -> Self::Bits;
    /// `acc + a0 * b0 + a1 * b1` in f32 lanes of two bf16 each.
    fn dot_bf16(self, acc: Self::Bits, a: Self::Bits, b: Self::Bits) -> Self::Bits;
    /// `acc + sum of a_i * b_i` in i32 lanes of four bytes each. a is unsigned (but see [`Self::SIGNED_BYTES`]), b is
    /// from -127 to 127.
    fn dot_int8(self, acc: Self::Bits, a: Self::Bits, b: Self::Bits) -> Self::Bits;

    /// Transposes `[LANES, words]` to `[words, LANES]`: `to[w * to_stride + i] = from[i * from_stride + w]` for i below
    /// `LANES` and w below `words`.
    unsafe fn transpose(self, from: *const u32, from_stride: usize, words: usize, to: *mut u32, to_stride: usize) {
        for w in 0..words {
            for i in 0..Self::LANES {
                // SAFETY: the caller guarantees that both indices are valid.
                unsafe { *to.add(w * to_stride + i) = *from.add(i * from_stride + w) };
            }
        }
    }
}

/// Accuracy of an approximation: full f32, or sufficient for a result that is then rounded to bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend::cpu) enum Accuracy {
    F32,
    Bf16,
}

/// `2^x` for x up to 127. x below -126 is clamped to -126.
///
/// x = n + f with f in [-1/2, 1/2]. 2^f is a minimax polynomial (Remez) with a relative error of 2e-9 (f32) or 7.5e-5
/// (bf16).
#[inline(always)]
pub(in crate::backend::cpu) fn exp2<I: Isa>(isa: I, x: I::Floats, accuracy: Accuracy) -> I::Floats {
    let x = isa.max(x, isa.splat(-126.0));
    let n = isa.round(x);
    let f = isa.sub(x, n);
    let power = match accuracy {
        Accuracy::F32 => {
            let p = isa.fma(f, isa.splat(0.000_153_458_12), isa.splat(0.001_339_993_1));
            let p = isa.fma(f, p, isa.splat(0.009_618_489));
            let p = isa.fma(f, p, isa.splat(0.055_503_286));
            let p = isa.fma(f, p, isa.splat(0.240_226_46));
            let p = isa.fma(f, p, isa.splat(std::f32::consts::LN_2));
            isa.fma(f, p, isa.splat(1.0))
        }
        Accuracy::Bf16 => {
            let p = isa.fma(f, isa.splat(0.055_171_67), isa.splat(0.242_611_13));
            let p = isa.fma(f, p, isa.splat(0.693_260_97));
            isa.fma(f, p, isa.splat(0.999_928_06))
        }
    };
    isa.scale_by_power(power, n)
}
