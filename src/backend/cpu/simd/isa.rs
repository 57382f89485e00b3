//! The trait [`Isa`] that every instruction set implements, and the operations built from it.

/// Lanes of the widest vector.
pub(in crate::backend::cpu) const MAX_LANES: usize = 16;

/// A computation that is written once for all instruction sets.
pub(in crate::backend::cpu) trait Op {
    /// What it returns.
    type Output;
    /// Does it. Implementations are `#[inline(always)]`, and keep vectors out of closures, which are not.
    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

/// The vector operations that the kernels use.
///
/// # Safety
/// An implementation's values exist only where the machine has its instructions. The pointer methods' contracts are each
/// that of the slice of the given number of elements.
pub(in crate::backend::cpu) unsafe trait Isa: Copy + Send + Sync + 'static {
    /// `LANES` f32.
    type F: Copy;
    /// `LANES` times four bytes.
    type I: Copy;
    /// Lanes of a vector.
    const LANES: usize;
    /// Vectors across a panel of packed weights: with six rows, as many accumulators as registers allow.
    const PANEL_VECTORS: usize;
    /// Columns of a panel.
    const PANEL: usize = Self::LANES * Self::PANEL_VECTORS;
    /// Whether `dot_int8` takes 128 from each byte of a, for instructions that multiply signed bytes alone.
    const SIGNED_BYTES: bool = false;

    /// Runs `op` compiled for this instruction set.
    fn enter<O: Op>(self, op: O) -> O::Output;

    fn splat(self, x: f32) -> Self::F;
    fn splat_bits(self, x: u32) -> Self::I;
    /// Reads `LANES` values, at any alignment.
    unsafe fn load(self, from: *const f32) -> Self::F;
    unsafe fn load_bits(self, from: *const u32) -> Self::I;
    unsafe fn store(self, to: *mut f32, x: Self::F);
    unsafe fn store_bits(self, to: *mut u32, x: Self::I);
    /// Writes `LANES` values rounded to bf16, ties to even.
    unsafe fn store_bf16(self, to: *mut u16, x: Self::F);
    /// Reads `LANES` bf16 values.
    unsafe fn load_bf16(self, from: *const u16) -> Self::F;
    /// Writes the low byte of each ctx, of whole numbers from 0 to 255 in x.
    unsafe fn store_u8(self, to: *mut u8, x: Self::F);
    /// Fetches the line into the second-level cache, where there is an instruction for it. Any address will do.
    #[inline(always)]
    fn prefetch(self, _line: *const u32) {}

    fn floats(self, x: Self::I) -> Self::F;
    /// i32 lanes as f32.
    fn i32_to_f32(self, x: Self::I) -> Self::F;

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// To the nearest whole number.
    fn round(self, x: Self::F) -> Self::F;
    /// 2^x within 1e-4 of itself, for what is rounded to bf16 next: the general form, or the instruction set's own.
    #[inline(always)]
    fn exp2_for_bf16(self, x: Self::F) -> Self::F {
        exp2(self, x, Accuracy::Bf16)
    }
    /// `a / b` within 1e-3 of itself or better, for what is rounded to bf16 next.
    #[inline(always)]
    fn div_for_bf16(self, a: Self::F, b: Self::F) -> Self::F {
        self.div(a, b)
    }
    /// `x * 2^n` for whole n from -126 to 127.
    fn scale_by_power(self, x: Self::F, n: Self::F) -> Self::F;
    /// The first n lanes of x, and `fill` in the others.
    #[inline(always)]
    fn first_lanes(self, x: Self::F, n: usize, fill: f32) -> Self::F {
        let mut lanes = [0f32; MAX_LANES];
        // SAFETY: the array has room for the widest vector.
        unsafe {
            self.store(lanes.as_mut_ptr(), x);
            lanes[n..].fill(fill);
            self.load(lanes.as_ptr())
        }
    }
    fn sum(self, x: Self::F) -> f32;
    fn max_of(self, x: Self::F) -> f32;
    fn min_of(self, x: Self::F) -> f32;

    /// `acc + a * b` in f32 lanes.
    fn dot_f32(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// `acc + a0 * b0 + a1 * b1` in f32 lanes of two bf16 each.
    fn dot_bf16(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// `acc + sum of a_i * b_i` in i32 lanes of four bytes each, a unsigned ([`Self::SIGNED_BYTES`]), b from -127 to 127.
    fn dot_int8(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I;

    /// The 16 x 16 transposition of words, or its plain form: `to[w * to_stride + i] = from[i * from_stride + w]`
    /// for i below `LANES` and w below `words`.
    unsafe fn transpose(self, from: *const u32, from_stride: usize, words: usize, to: *mut u32, to_stride: usize) {
        for w in 0..words {
            for i in 0..Self::LANES {
                // SAFETY: the caller's: both indices are within what it owns.
                unsafe { *to.add(w * to_stride + i) = *from.add(i * from_stride + w) };
            }
        }
    }
}

/// How exactly a power is computed: as f32 can, or as bf16 can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend::cpu) enum Accuracy {
    F32,
    Bf16,
}

/// `2^x` for x up to 127; below -126 it is `2^-126`.
///
/// x = n + f with f in [-1/2, 1/2]; 2^f by a minimax polynomial (Remez, relative error 2e-9 and 7.5e-5).
#[inline(always)]
pub(in crate::backend::cpu) fn exp2<I: Isa>(isa: I, x: I::F, accuracy: Accuracy) -> I::F {
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
