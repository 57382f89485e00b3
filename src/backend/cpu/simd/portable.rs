//! Plain Rust over arrays of lanes, for machines without a supported instruction set.
//!
//! The compiler turns the loops into the target's baseline vectors (SSE2 on x86-64).

use super::isa::{Isa, SimdOp};

const LANES: usize = 8;

/// Uses only instructions of the compilation target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Portable;

#[inline(always)]
fn lanes<T: Copy + Default>(f: impl Fn(usize) -> T) -> [T; LANES] {
    let mut out = [T::default(); LANES];
    for (i, lane) in out.iter_mut().enumerate() {
        *lane = f(i);
    }
    out
}

// SAFETY: uses no instruction that a machine may lack. The callers of the pointer methods guarantee valid pointers.
#[allow(clippy::undocumented_unsafe_blocks, reason = "the comment above applies to every one-line method")]
unsafe impl Isa for Portable {
    type Floats = [f32; LANES];
    type Bits = [u32; LANES];
    const LANES: usize = LANES;
    const PANEL_VECTORS: usize = 2;

    // Not inlined: a copy of the kernel in every caller would be slow to compile.
    #[inline(never)]
    fn enter<O: SimdOp>(self, op: O) -> O::Output {
        op.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Floats {
        [x; LANES]
    }
    #[inline(always)]
    fn splat_bits(self, x: u32) -> Self::Bits {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::Floats {
        unsafe { from.cast::<Self::Floats>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bits(self, from: *const u32) -> Self::Bits {
        unsafe { from.cast::<Self::Bits>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: Self::Floats) {
        unsafe { to.cast::<Self::Floats>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn store_bits(self, to: *mut u32, x: Self::Bits) {
        unsafe { to.cast::<Self::Bits>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, x: Self::Floats) {
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(lanes(|i| half::bf16::from_f32(x[i]).to_bits())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::Floats {
        let x = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        lanes(|i| f32::from_bits(u32::from(x[i]) << 16))
    }
    #[inline(always)]
    unsafe fn store_u8(self, to: *mut u8, x: Self::Floats) {
        unsafe { to.cast::<[u8; LANES]>().write_unaligned(lanes(|i| x[i].round_ties_even() as u8)) }
    }

    #[inline(always)]
    fn bits_to_f32(self, x: Self::Bits) -> Self::Floats {
        lanes(|i| f32::from_bits(x[i]))
    }
    #[inline(always)]
    fn i32_to_f32(self, x: Self::Bits) -> Self::Floats {
        lanes(|i| x[i].cast_signed() as f32)
    }

    #[inline(always)]
    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        lanes(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        lanes(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        lanes(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    /// Rounded twice: a fused multiply-add is a library call on x86-64 without FMA.
    #[inline(always)]
    fn fma(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        lanes(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn round(self, x: Self::Floats) -> Self::Floats {
        lanes(|i| x[i].round_ties_even())
    }
    #[inline(always)]
    fn scale_by_power(self, x: Self::Floats, n: Self::Floats) -> Self::Floats {
        lanes(|i| x[i] * f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn reduce_sum(self, x: Self::Floats) -> f32 {
        x.iter().sum()
    }
    #[inline(always)]
    fn reduce_max(self, x: Self::Floats) -> f32 {
        x.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn reduce_min(self, x: Self::Floats) -> f32 {
        x.iter().copied().fold(f32::INFINITY, f32::min)
    }

    #[inline(always)]
    fn dot_f32(self, acc: Self::Bits, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        lanes(|i| (f32::from_bits(acc[i]) + f32::from_bits(a[i]) * f32::from_bits(b[i])).to_bits())
    }
    #[inline(always)]
    fn dot_bf16(self, acc: Self::Bits, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        let acc = self.dot_f32(acc, lanes(|i| a[i] << 16), lanes(|i| b[i] << 16));
        self.dot_f32(acc, lanes(|i| a[i] & 0xffff_0000), lanes(|i| b[i] & 0xffff_0000))
    }
    #[inline(always)]
    fn dot_int8(self, acc: Self::Bits, a: Self::Bits, b: Self::Bits) -> Self::Bits {
        let byte = |i: usize, shift: u32| i32::from((a[i] >> shift) as u8) * i32::from((b[i] >> shift) as u8 as i8);
        lanes(|i| (acc[i].cast_signed() + byte(i, 0) + byte(i, 8) + byte(i, 16) + byte(i, 24)).cast_unsigned())
    }
}
