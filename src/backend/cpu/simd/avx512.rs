//! AVX-512 F, BW, DQ and VL, with BF16 and VNNI dot products as the const parameters say: 32 registers of 16 lanes.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::isa::{Isa, SimdOp};

/// AVX-512, with `vdpbf16ps` if `BF16` and `vpdpbusd` if `VNNI`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Avx512<const BF16: bool, const VNNI: bool>(());

impl<const BF16: bool, const VNNI: bool> Avx512<BF16, VNNI> {
    pub(super) fn detect() -> Option<Self> {
        let base = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma");
        let bf16 = !BF16 || is_x86_feature_detected!("avx512bf16");
        let vnni = !VNNI || is_x86_feature_detected!("avx512vnni");
        (base && bf16 && vnni).then_some(Self(()))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16,avx512vnni")]
fn enter_bf16<O: SimdOp, I: Isa>(op: O, isa: I) -> O::Output {
    op.run(isa)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512vnni")]
fn enter_vnni<O: SimdOp, I: Isa>(op: O, isa: I) -> O::Output {
    op.run(isa)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn enter_base<O: SimdOp, I: Isa>(op: O, isa: I) -> O::Output {
    op.run(isa)
}

// SAFETY, for every block below: only `detect` creates a value, after it has checked for the instructions. The callers
// of the pointer methods guarantee valid pointers. All loads and stores are unaligned.
#[allow(clippy::undocumented_unsafe_blocks, reason = "the comment above applies to every method")]
unsafe impl<const BF16: bool, const VNNI: bool> Isa for Avx512<BF16, VNNI> {
    type Floats = __m512;
    type Bits = __m512i;
    const LANES: usize = 16;
    const PANEL_VECTORS: usize = 4;

    #[inline(always)]
    fn enter<O: SimdOp>(self, op: O) -> O::Output {
        unsafe {
            match (BF16, VNNI) {
                (true, _) => enter_bf16(op, self),
                (false, true) => enter_vnni(op, self),
                (false, false) => enter_base(op, self),
            }
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn splat_bits(self, x: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(x.cast_signed()) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bits(self, from: *const u32) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: __m512) {
        unsafe { _mm512_storeu_ps(to, x) }
    }
    #[inline(always)]
    unsafe fn store_bits(self, to: *mut u32, x: __m512i) {
        unsafe { _mm512_storeu_si512(to.cast(), x) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, x: __m512) {
        unsafe {
            let half: __m256i = if BF16 {
                transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x))
            } else {
                let x = _mm512_castps_si512(x);
                let odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
                let rounded = _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7fff)), odd);
                _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16))
            };
            _mm256_storeu_si256(to.cast(), half);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> __m512 {
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32(words, 16))
        }
    }
    #[inline(always)]
    unsafe fn store_u8(self, to: *mut u8, x: __m512) {
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x))) }
    }
    #[inline(always)]
    fn prefetch(self, line: *const u32) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
    }

    #[inline(always)]
    fn bits_to_f32(self, x: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(x) }
    }
    #[inline(always)]
    fn i32_to_f32(self, x: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(x) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn round(self, x: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }
    /// `vreduceps` computes x - floor(x), and `vscalefps` multiplies by 2^floor(x), with underflow to zero. So x is neither
    /// clamped nor rounded.
    #[inline(always)]
    fn exp2_for_bf16(self, x: __m512) -> __m512 {
        unsafe {
            let f = _mm512_reduce_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(x);
            // The bf16 polynomial of `exp2`, refitted to [0, 1).
            let p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.078_024_52), _mm512_set1_ps(0.226_067_15));
            let p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.695_833_54));
            let p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.999_925_2));
            _mm512_scalef_ps(p, x)
        }
    }
    /// The relative error of `vrcp14ps` is at most 2^-14.
    #[inline(always)]
    fn div_for_bf16(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, _mm512_rcp14_ps(b)) }
    }
    #[inline(always)]
    fn scale_by_power(self, x: __m512, n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(x, n) }
    }
    #[inline(always)]
    fn first_lanes(self, x: __m512, n: usize, fill: f32) -> __m512 {
        unsafe { _mm512_mask_mov_ps(_mm512_set1_ps(fill), ((1u32 << n) - 1) as __mmask16, x) }
    }
    #[inline(always)]
    fn reduce_sum(self, x: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(x) }
    }
    #[inline(always)]
    fn reduce_max(self, x: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(x) }
    }
    #[inline(always)]
    fn reduce_min(self, x: __m512) -> f32 {
        unsafe { _mm512_reduce_min_ps(x) }
    }

    #[inline(always)]
    fn dot_f32(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        unsafe {
            let (acc, a, b) = (_mm512_castsi512_ps(acc), _mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
            _mm512_castps_si512(_mm512_fmadd_ps(a, b, acc))
        }
    }
    #[inline(always)]
    fn dot_bf16(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        unsafe {
            if BF16 {
                let (a, b) = (transmute::<__m512i, __m512bh>(a), transmute::<__m512i, __m512bh>(b));
                return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(acc), a, b));
            }
            let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            let acc = self.dot_f32(acc, _mm512_slli_epi32(a, 16), _mm512_slli_epi32(b, 16));
            self.dot_f32(acc, _mm512_and_si512(a, high), _mm512_and_si512(b, high))
        }
    }
    #[inline(always)]
    fn dot_int8(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        unsafe {
            if VNNI {
                return _mm512_dpbusd_epi32(acc, a, b);
            }
            // Multiplied as 16-bit values: `vpmaddubsw`, which multiplies bytes, saturates.
            let even = _mm512_madd_epi16(
                _mm512_and_si512(a, _mm512_set1_epi16(0xff)),
                _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8),
            );
            let odd = _mm512_madd_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(b, 8));
            _mm512_add_epi32(acc, _mm512_add_epi32(even, odd))
        }
    }

    /// Transposes blocks of 16 x 16 words: interleaves pairs of rows, then groups of four, then 128-bit quarters.
    #[inline(always)]
    unsafe fn transpose(self, from: *const u32, from_stride: usize, words: usize, to: *mut u32, to_stride: usize) {
        unsafe {
            let whole = words / 16 * 16;
            for word in (0..whole).step_by(16) {
                let mut rows = [_mm512_setzero_si512(); 16];
                for (i, row) in rows.iter_mut().enumerate() {
                    *row = _mm512_loadu_si512(from.add(i * from_stride + word).cast());
                }
                let mut pairs = rows;
                for i in (0..16).step_by(2) {
                    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
                    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
                }
                // fours[i + j] holds, in each quarter q, word 4 q + j of rows i to i + 3 (i = 0, 4, 8, 12).
                let mut fours = pairs;
                for i in (0..16).step_by(4) {
                    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
                    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
                    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
                    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
                }
                for j in 0..4 {
                    let (a, b, c, d) = (fours[j], fours[4 + j], fours[8 + j], fours[12 + j]);
                    let even_ab = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
                    let odd_ab = _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
                    let even_cd = _mm512_shuffle_i32x4::<0b10_00_10_00>(c, d);
                    let odd_cd = _mm512_shuffle_i32x4::<0b11_01_11_01>(c, d);
                    let columns = [
                        (j, _mm512_shuffle_i32x4::<0b10_00_10_00>(even_ab, even_cd)),
                        (4 + j, _mm512_shuffle_i32x4::<0b10_00_10_00>(odd_ab, odd_cd)),
                        (8 + j, _mm512_shuffle_i32x4::<0b11_01_11_01>(even_ab, even_cd)),
                        (12 + j, _mm512_shuffle_i32x4::<0b11_01_11_01>(odd_ab, odd_cd)),
                    ];
                    for (column, values) in columns {
                        _mm512_storeu_si512(to.add((word + column) * to_stride).cast(), values);
                    }
                }
            }
            for word in whole..words {
                for i in 0..16 {
                    *to.add(word * to_stride + i) = *from.add(i * from_stride + word);
                }
            }
        }
    }
}
