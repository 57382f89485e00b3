//! The storage formats of attention: f32 and bf16.

use super::gemm::{self, Dot};
use super::simd::{Accuracy, Isa, store_partial, store_partial_bf16};

/// A storage format for attention: adds to [`Dot`] what packing and softmax need.
pub(super) trait AttentionFormat: Dot {
    /// The type of a stored number of Q, K or V, or of a weight.
    type Value: bytemuck::Pod;
    /// Numbers in a k-group (see `packed.rs`).
    const VALUES_PER_K_GROUP: usize;
    /// Accuracy of the softmax's exponentials.
    const ACCURACY: Accuracy;
    const INSTANCE: Self;

    /// The value's bits, in the low bits of a word.
    fn bits(value: Self::Value) -> u32;

    /// # Safety
    /// `to` is valid for writes of `min(n, LANES)` values.
    unsafe fn store<I: Isa>(isa: I, to: *mut Self::Value, n: usize, x: I::Floats);
}

impl AttentionFormat for gemm::F32 {
    type Value = f32;
    const VALUES_PER_K_GROUP: usize = 1;
    const ACCURACY: Accuracy = Accuracy::F32;
    const INSTANCE: Self = Self;

    #[inline(always)]
    fn bits(value: f32) -> u32 {
        value.to_bits()
    }
    #[inline(always)]
    unsafe fn store<I: Isa>(isa: I, to: *mut f32, n: usize, x: I::Floats) {
        // SAFETY: guaranteed by the caller.
        unsafe { store_partial(isa, to, n, x) }
    }
}

impl AttentionFormat for gemm::Bf16 {
    type Value = u16;
    const VALUES_PER_K_GROUP: usize = 2;
    const ACCURACY: Accuracy = Accuracy::Bf16;
    const INSTANCE: Self = Self;

    #[inline(always)]
    fn bits(value: u16) -> u32 {
        value.into()
    }
    #[inline(always)]
    unsafe fn store<I: Isa>(isa: I, to: *mut u16, n: usize, x: I::Floats) {
        // SAFETY: guaranteed by the caller.
        unsafe { store_partial_bf16(isa, to, n, x) }
    }
}
