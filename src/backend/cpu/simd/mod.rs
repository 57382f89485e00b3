//! Instruction sets, detected at run time, behind one small trait: every kernel is written once over [`Isa`], and an
//! instruction set is a short file of one-liners.
//!
//! A kernel is an [`Op`] whose `run` is `inline(always)` and is entered through [`Isa::enter`], a function that carries the
//! `target_feature`s; what is inlined there compiles to those instructions (the design of memchr's `Vector` and of the
//! crate pulp). A value of an instruction set's type is the proof that this machine has it: only `detect` makes one.
//!
//! Vectors are of 32-bit lanes: [`Isa::F`] holds f32, [`Isa::I`] any four bytes: an f32, two bf16, four int8, or an i32 sum.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

pub(super) use portable::Portable;

use super::math::{Exactness, MAX_LANES, exp2};

/// A computation that is written once for all instruction sets.
pub(super) trait Op {
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
pub(super) unsafe trait Isa: Copy + Send + Sync + 'static {
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
    /// Writes the low byte of each lane, of whole numbers from 0 to 255 in x.
    unsafe fn store_u8(self, to: *mut u8, x: Self::F);
    /// Fetches the line into the second-level cache, where there is an instruction for it. Any address will do.
    #[inline(always)]
    fn fetch(self, _line: *const u32) {}

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
        exp2(self, x, Exactness::Bf16)
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

/// Which instruction sets a machine may have. The best is chosen at start and named in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// AVX-512 with dot products of bf16 and int8 (Zen 4 and later, Sapphire Rapids and later).
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(avx512::Avx512<true, true>),
    /// AVX-512 with dot products of int8 (Cascade Lake, Ice Lake).
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(avx512::Avx512<false, true>),
    /// AVX-512 (Skylake-X).
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512<false, false>),
    /// AVX2 and FMA with 256-bit dot products of int8 (Alder Lake and later without AVX-512).
    #[cfg(target_arch = "x86_64")]
    Avx2Vnni(avx2::Avx2<true>),
    /// AVX2 and FMA (Haswell to Zen 3).
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2<false>),
    /// NEON with dot products of bf16, and of unsigned by signed int8 (Neoverse V1 and N2, Apple M2, and later).
    #[cfg(target_arch = "aarch64")]
    NeonBf16I8mm(neon::Neon<true, true>),
    /// NEON with dot products of signed int8 (Neoverse N1, Apple M1).
    #[cfg(target_arch = "aarch64")]
    NeonDot(neon::Neon<false, true>),
    /// NEON (every AArch64).
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon<false, false>),
    /// Plain Rust, which the compiler vectorises for the target's baseline: SSE2 on x86-64.
    Portable(Portable),
}

impl Path {
    /// Every path that this machine can run, best first.
    pub(super) fn every_one_here() -> Vec<Self> {
        let mut paths = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            paths.extend(avx512::Avx512::<true, true>::detect().map(Self::Avx512Bf16));
            paths.extend(avx512::Avx512::<false, true>::detect().map(Self::Avx512Vnni));
            paths.extend(avx512::Avx512::<false, false>::detect().map(Self::Avx512));
            paths.extend(avx2::Avx2::<true>::detect().map(Self::Avx2Vnni));
            paths.extend(avx2::Avx2::<false>::detect().map(Self::Avx2));
        }
        #[cfg(target_arch = "aarch64")]
        {
            paths.extend(neon::Neon::<true, true>::detect().map(Self::NeonBf16I8mm));
            paths.extend(neon::Neon::<false, true>::detect().map(Self::NeonDot));
            paths.extend(neon::Neon::<false, false>::detect().map(Self::Neon));
        }
        paths.push(Self::Portable(Portable));
        paths
    }

    /// The best that this machine can run.
    pub(super) fn best() -> Self {
        Self::every_one_here()[0]
    }

    /// As logs name it.
    pub(super) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => "AVX-512 BF16 VNNI",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(_) => "AVX-512 VNNI",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2Vnni(_) => "AVX2 VNNI",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "AVX2",
            #[cfg(target_arch = "aarch64")]
            Self::NeonBf16I8mm(_) => "NEON BF16 I8MM",
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot(_) => "NEON DotProd",
            #[cfg(target_arch = "aarch64")]
            Self::Neon(_) => "NEON",
            Self::Portable(_) => "portable",
        }
    }

    /// Whether products of bf16 are an instruction here, and not made of f32 ones.
    pub(super) fn has_bf16(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => true,
            #[cfg(target_arch = "aarch64")]
            Self::NeonBf16I8mm(_) => true,
            _ => false,
        }
    }

    /// Columns of a panel of packed weights.
    pub(super) fn panel(self) -> usize {
        struct Panel;
        impl Op for Panel {
            type Output = usize;
            fn run<I: Isa>(self, _: I) -> usize {
                I::PANEL
            }
        }
        self.enter(Panel)
    }

    /// Runs `op` compiled for this path.
    pub(super) fn enter<O: Op>(self, op: O) -> O::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(isa) => isa.enter(op),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(isa) => isa.enter(op),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(isa) => isa.enter(op),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2Vnni(isa) => isa.enter(op),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(isa) => isa.enter(op),
            #[cfg(target_arch = "aarch64")]
            Self::NeonBf16I8mm(isa) => isa.enter(op),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot(isa) => isa.enter(op),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(isa) => isa.enter(op),
            Self::Portable(isa) => isa.enter(op),
        }
    }
}
