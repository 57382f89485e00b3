//! Loads and stores of fewer values than a vector has lanes.

use super::isa::{Isa, MAX_LANES};

/// Loads `min(n, LANES)` values; the other lanes hold `fill`.
///
/// # Safety
/// `from` is valid for reads of that many values.
#[inline(always)]
pub(in crate::backend::cpu) unsafe fn load_partial<I: Isa>(isa: I, from: *const f32, n: usize, fill: f32) -> I::Floats {
    // SAFETY: reads a whole vector from `from` only if n is at least `LANES`. Otherwise it copies n values to `values`,
    // which has room for the widest vector.
    unsafe {
        if n >= I::LANES {
            return isa.load(from);
        }
        let mut values = [fill; MAX_LANES];
        for (i, value) in values.iter_mut().enumerate().take(n) {
            *value = *from.add(i);
        }
        isa.load(values.as_ptr())
    }
}

/// Loads `min(n, LANES)` bf16 values; the other lanes hold 0.
///
/// # Safety
/// `from` is valid for reads of that many values.
#[inline(always)]
pub(in crate::backend::cpu) unsafe fn load_partial_bf16<I: Isa>(isa: I, from: *const u16, n: usize) -> I::Floats {
    // SAFETY: as in `load_partial`.
    unsafe {
        if n >= I::LANES {
            return isa.load_bf16(from);
        }
        let mut values = [0u16; MAX_LANES];
        for (i, value) in values.iter_mut().enumerate().take(n) {
            *value = *from.add(i);
        }
        isa.load_bf16(values.as_ptr())
    }
}

/// Stores the first `min(n, LANES)` lanes of x.
///
/// # Safety
/// `to` is valid for writes of that many values.
#[inline(always)]
pub(in crate::backend::cpu) unsafe fn store_partial<I: Isa>(isa: I, to: *mut f32, n: usize, x: I::Floats) {
    // SAFETY: as in `load_partial`.
    unsafe {
        if n >= I::LANES {
            return isa.store(to, x);
        }
        let mut values = [0f32; MAX_LANES];
        isa.store(values.as_mut_ptr(), x);
        for (i, &value) in values.iter().enumerate().take(n) {
            *to.add(i) = value;
        }
    }
}

/// [`store_partial`] rounded to bf16.
///
/// # Safety
/// `to` is valid for writes of that many values.
#[inline(always)]
pub(in crate::backend::cpu) unsafe fn store_partial_bf16<I: Isa>(isa: I, to: *mut u16, n: usize, x: I::Floats) {
    // SAFETY: as in `load_partial`.
    unsafe {
        if n >= I::LANES {
            return isa.store_bf16(to, x);
        }
        let mut values = [0u16; MAX_LANES];
        isa.store_bf16(values.as_mut_ptr(), x);
        for (i, &value) in values.iter().enumerate().take(n) {
            *to.add(i) = value;
        }
    }
}
