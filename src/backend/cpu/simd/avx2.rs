//! AVX2 and FMA, with AVX-VNNI's dot product if the const parameter says so: 16 registers of 8 lanes.

use std::arch::x86_64::*;

use super::isa::{Isa, SimdOp};

/// AVX2 and FMA, with `vpdpbusd` if `VNNI`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Avx2<const VNNI: bool>(());

impl<const VNNI: bool> Avx2<VNNI> {
    pub(super) fn detect() -> Option<Self> {
        let base = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let vnni = !VNNI || is_x86_feature_detected!("avxvnni");
        (base && vnni).then_some(Self(()))
    }
}

#[target_feature(enable = "avx2,fma,avxvnni")]
fn enter_vnni<O: SimdOp, I: Isa>(op: O, isa: I) -> O::Output {
    op.run(isa)
}

#[target_feature(enable = "avx2,fma")]
fn enter_base<O: SimdOp, I: Isa>(op: O, isa: I) -> O::Output {
    op.run(isa)
}

// SAFETY, for every block below: only `detect` creates a value, after it has checked for the instructions. The callers
// of the pointer methods guarantee valid pointers. All loads and stores are unaligned.
#[allow(clippy::undocumented_unsafe_blocks, reason = "the comment above applies to every one-line method")]
unsafe impl<const VNNI: bool> Isa for Avx2<VNNI> {
    type Floats = __m256;
    type Bits = __m256i;
    const LANES: usize = 8;
    const PANEL_VECTORS: usize = 2;

    #[inline(always)]
    fn enter<O: SimdOp>(self, op: O) -> O::Output {
        unsafe { if VNNI { enter_vnni(op, self) } else { enter_base(op, self) } }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    fn splat_bits(self, x: u32) -> __m256i {
        unsafe { _mm256_set1_epi32(x.cast_signed()) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bits(self, from: *const u32) -> __m256i {
        unsafe { _mm256_loadu_si256(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: __m256) {
        unsafe { _mm256_storeu_ps(to, x) }
    }
    #[inline(always)]
    unsafe fn store_bits(self, to: *mut u32, x: __m256i) {
        unsafe { _mm256_storeu_si256(to.cast(), x) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, x: __m256) {
        unsafe {
            let x = _mm256_castps_si256(x);
            let odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(0x7fff)), odd);
            _mm_storeu_si128(to.cast(), narrow(_mm256_srli_epi32(rounded, 16)));
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> __m256 {
        unsafe {
            let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32(words, 16))
        }
    }
    #[inline(always)]
    unsafe fn store_u8(self, to: *mut u8, x: __m256) {
        unsafe {
            let words = narrow(_mm256_cvtps_epi32(x));
            _mm_storel_epi64(to.cast(), _mm_packus_epi16(words, words));
        }
    }
    #[inline(always)]
    fn prefetch(self, line: *const u32) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
    }

    #[inline(always)]
    fn bits_to_f32(self, x: __m256i) -> __m256 {
        unsafe { _mm256_castsi256_ps(x) }
    }
    #[inline(always)]
    fn i32_to_f32(self, x: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(x) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn round(self, x: __m256) -> __m256 {
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }
    #[inline(always)]
    fn scale_by_power(self, x: __m256, n: __m256) -> __m256 {
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))
        }
    }
    #[inline(always)]
    fn reduce_sum(self, x: __m256) -> f32 {
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)))
        }
    }
    #[inline(always)]
    fn reduce_max(self, x: __m256) -> f32 {
        unsafe {
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)))
        }
    }
    #[inline(always)]
    fn reduce_min(self, x: __m256) -> f32 {
        unsafe {
            let x = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
            let x = _mm_min_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_min_ss(x, _mm_shuffle_ps(x, x, 1)))
        }
    }

    #[inline(always)]
    fn dot_f32(self, acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
        unsafe {
            let (acc, a, b) = (_mm256_castsi256_ps(acc), _mm256_castsi256_ps(a), _mm256_castsi256_ps(b));
            _mm256_castps_si256(_mm256_fmadd_ps(a, b, acc))
        }
    }
    #[inline(always)]
    fn dot_bf16(self, acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
        unsafe {
            let high = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            let acc = self.dot_f32(acc, _mm256_slli_epi32(a, 16), _mm256_slli_epi32(b, 16));
            self.dot_f32(acc, _mm256_and_si256(a, high), _mm256_and_si256(b, high))
        }
    }
    #[inline(always)]
    fn dot_int8(self, acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
        unsafe {
            if VNNI {
                return _mm256_dpbusd_avx_epi32(acc, a, b);
            }
            // Multiplied as 16-bit values: `vpmaddubsw`, which multiplies bytes, saturates.
            let even = _mm256_madd_epi16(
                _mm256_and_si256(a, _mm256_set1_epi16(0xff)),
                _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8),
            );
            let odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
            _mm256_add_epi32(acc, _mm256_add_epi32(even, odd))
        }
    }
}

/// The low 16 bits of each lane. Lanes are below 65,536.
#[inline(always)]
unsafe fn narrow(x: __m256i) -> __m128i {
    // SAFETY: the caller has AVX2.
    unsafe { _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)) }
}
