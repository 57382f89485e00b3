//! NEON: 32 registers of 4 lanes. The const parameters select the dot-product extensions.
//!
//! The dot products are inline assembly, because the standard library's intrinsics for them are not stable yet.

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use super::isa::{Isa, SimdOp};

/// NEON, with `sdot` if `DOT`, and with `bfdot` and `usdot` if `BF16_I8MM`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Neon<const BF16_I8MM: bool, const DOT: bool>(());

impl<const BF16_I8MM: bool, const DOT: bool> Neon<BF16_I8MM, DOT> {
    pub(super) fn detect() -> Option<Self> {
        let base = is_aarch64_feature_detected!("neon");
        let dot = !DOT || is_aarch64_feature_detected!("dotprod");
        let bf16_i8mm = !BF16_I8MM || (is_aarch64_feature_detected!("bf16") && is_aarch64_feature_detected!("i8mm"));
        (base && dot && bf16_i8mm).then_some(Self(()))
    }
}

#[target_feature(enable = "neon,dotprod,bf16,i8mm")]
fn enter_bf16_i8mm<O: SimdOp, I: Isa>(op: O, isa: I) -> O::Output {
    op.run(isa)
}

#[target_feature(enable = "neon,dotprod")]
fn enter_dot<O: SimdOp, I: Isa>(op: O, isa: I) -> O::Output {
    op.run(isa)
}

#[target_feature(enable = "neon")]
fn enter_base<O: SimdOp, I: Isa>(op: O, isa: I) -> O::Output {
    op.run(isa)
}

/// Emits a dot-product instruction: `acc` plus the products of `a` and `b`.
macro_rules! accumulate {
    ($instruction:literal, $acc:expr, $a:expr, $b:expr) => {{
        let mut acc: uint32x4_t = $acc;
        asm!($instruction, inout(vreg) acc, in(vreg) $a, in(vreg) $b, options(pure, nomem, nostack, preserves_flags));
        acc
    }};
}

// SAFETY, for every block below: only `detect` creates a value, after it has checked for the instructions. The callers
// of the pointer methods guarantee valid pointers. All loads and stores are unaligned. The assembly accesses only the
// registers that it names.
#[allow(clippy::undocumented_unsafe_blocks, reason = "the comment above applies to every block")]
unsafe impl<const BF16_I8MM: bool, const DOT: bool> Isa for Neon<BF16_I8MM, DOT> {
    type Floats = float32x4_t;
    type Bits = uint32x4_t;
    const LANES: usize = 4;
    const PANEL_VECTORS: usize = 4;
    const SIGNED_BYTES: bool = !BF16_I8MM;

    #[inline(always)]
    fn enter<O: SimdOp>(self, op: O) -> O::Output {
        unsafe {
            match (BF16_I8MM, DOT) {
                (true, _) => enter_bf16_i8mm(op, self),
                (false, true) => enter_dot(op, self),
                (false, false) => enter_base(op, self),
            }
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    fn splat_bits(self, x: u32) -> uint32x4_t {
        unsafe { vdupq_n_u32(x) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> float32x4_t {
        unsafe { vld1q_f32(from) }
    }
    #[inline(always)]
    unsafe fn load_bits(self, from: *const u32) -> uint32x4_t {
        unsafe { vld1q_u32(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: float32x4_t) {
        unsafe { vst1q_f32(to, x) }
    }
    #[inline(always)]
    unsafe fn store_bits(self, to: *mut u32, x: uint32x4_t) {
        unsafe { vst1q_u32(to, x) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, x: float32x4_t) {
        unsafe {
            let half: uint16x4_t;
            if BF16_I8MM {
                asm!(
                    "bfcvtn {:v}.4h, {:v}.4s", lateout(vreg) half, in(vreg) x,
                    options(pure, nomem, nostack, preserves_flags)
                );
            } else {
                let x = vreinterpretq_u32_f32(x);
                let odd = vandq_u32(vshrq_n_u32::<16>(x), vdupq_n_u32(1));
                half = vshrn_n_u32::<16>(vaddq_u32(vaddq_u32(x, vdupq_n_u32(0x7fff)), odd));
            }
            vst1_u16(to, half);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from))) }
    }
    #[inline(always)]
    unsafe fn store_u8(self, to: *mut u8, x: float32x4_t) {
        unsafe {
            let words = vmovn_u32(vcvtnq_u32_f32(x));
            let bytes = vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words)));
            to.cast::<u32>().write_unaligned(vget_lane_u32::<0>(bytes));
        }
    }

    #[inline(always)]
    fn bits_to_f32(self, x: uint32x4_t) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(x) }
    }
    #[inline(always)]
    fn i32_to_f32(self, x: uint32x4_t) -> float32x4_t {
        unsafe { vcvtq_f32_s32(vreinterpretq_s32_u32(x)) }
    }

    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmaxq_f32(a, b) }
    }
    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vminq_f32(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    fn round(self, x: float32x4_t) -> float32x4_t {
        unsafe { vrndnq_f32(x) }
    }
    #[inline(always)]
    fn scale_by_power(self, x: float32x4_t, n: float32x4_t) -> float32x4_t {
        unsafe {
            let exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
            vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent)))
        }
    }
    #[inline(always)]
    fn reduce_sum(self, x: float32x4_t) -> f32 {
        unsafe { vaddvq_f32(x) }
    }
    #[inline(always)]
    fn reduce_max(self, x: float32x4_t) -> f32 {
        unsafe { vmaxvq_f32(x) }
    }
    #[inline(always)]
    fn reduce_min(self, x: float32x4_t) -> f32 {
        unsafe { vminvq_f32(x) }
    }

    #[inline(always)]
    fn dot_f32(self, acc: uint32x4_t, a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
        unsafe {
            let (acc, a, b) = (vreinterpretq_f32_u32(acc), vreinterpretq_f32_u32(a), vreinterpretq_f32_u32(b));
            vreinterpretq_u32_f32(vfmaq_f32(acc, a, b))
        }
    }
    #[inline(always)]
    fn dot_bf16(self, acc: uint32x4_t, a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
        unsafe {
            if BF16_I8MM {
                return accumulate!("bfdot {:v}.4s, {:v}.8h, {:v}.8h", acc, a, b);
            }
            let high = vdupq_n_u32(0xffff_0000);
            let acc = self.dot_f32(acc, vshlq_n_u32::<16>(a), vshlq_n_u32::<16>(b));
            self.dot_f32(acc, vandq_u32(a, high), vandq_u32(b, high))
        }
    }
    #[inline(always)]
    fn dot_int8(self, acc: uint32x4_t, a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
        unsafe {
            if BF16_I8MM {
                return accumulate!("usdot {:v}.4s, {:v}.16b, {:v}.16b", acc, a, b);
            }
            // Flipping the high bit of an unsigned byte subtracts 128, if the result is read as signed.
            let a = veorq_u32(a, vdupq_n_u32(0x8080_8080));
            if DOT {
                return accumulate!("sdot {:v}.4s, {:v}.16b, {:v}.16b", acc, a, b);
            }
            let (a, b) = (vreinterpretq_s8_u32(a), vreinterpretq_s8_u32(b));
            // Weights are -127 to 127, so a sum of two products is at most 2 * 128 * 127, which fits into 16 bits.
            let pairs = vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
            vreinterpretq_u32_s32(vpadalq_s16(vreinterpretq_s32_u32(acc), pairs))
        }
    }
}
