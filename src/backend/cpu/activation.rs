//! The activation functions that run in GEMM epilogues.

use super::simd::{Accuracy, Isa, exp2};
use crate::backend::Activation;

/// Applies an activation to a vector. `Tanh` returns `x` unchanged: only heads use it, on a few rows, and the caller
/// applies the standard library's `tanh` to the stored result.
#[inline(always)]
pub(super) fn activate<I: Isa>(isa: I, activation: Activation, x: I::Floats, accuracy: Accuracy) -> I::Floats {
    match activation {
        Activation::Gelu => match accuracy {
            Accuracy::F32 => gelu(isa, x),
            Accuracy::Bf16 => gelu_for_bf16(isa, x),
        },
        Activation::GeluTanh => gelu_tanh(isa, x),
        Activation::Relu => isa.max(x, isa.splat(0.0)),
        Activation::Silu => silu(isa, x),
        Activation::Tanh => x,
    }
}

/// `x / 2 * (1 + erf(x / sqrt 2))`.
///
/// erf is a ratio of polynomials with the coefficients of Eigen's `generic_fast_erf_float` (MPL-2.0). Its error is a
/// few units in the last place of f32.
#[inline(always)]
fn gelu<I: Isa>(isa: I, x: I::Floats) -> I::Floats {
    let z = isa.mul(x, isa.splat(std::f32::consts::FRAC_1_SQRT_2));
    let z = isa.max(isa.min(z, isa.splat(4.0)), isa.splat(-4.0));
    let z2 = isa.mul(z, z);
    let mut p = isa.splat(-2.726_142_3e-10);
    for c in [2.770_681_4e-8, -2.101_024e-6, -5.692_506e-5, -7.349_906e-4, -2.954_6e-3, -1.609_603_3e-2] {
        p = isa.fma(p, z2, isa.splat(c));
    }
    let mut q = isa.splat(-1.456_607_2e-5);
    for c in [-2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2] {
        q = isa.fma(q, z2, isa.splat(c));
    }
    let erf = isa.div(isa.mul(z, p), q);
    let half = isa.mul(x, isa.splat(0.5));
    isa.fma(half, erf, half)
}

/// [`gelu`] for results that are rounded to bf16: `x / (1 + 2^-u)`, where u is x times a polynomial of x^2, fitted to
/// the log odds of the normal distribution. For x of at least -20 the absolute error is at most 7.5e-5, or the relative error
/// at most 6.5e-4. Below, where GELU is 0, the result is `4e-6 x`.
#[inline(always)]
fn gelu_for_bf16<I: Isa>(isa: I, x: I::Floats) -> I::Floats {
    let y = isa.max(isa.min(x, isa.splat(4.5)), isa.splat(-4.5));
    let y2 = isa.mul(y, y);
    let p = isa.fma(y2, isa.splat(1.120_783_7e-3), isa.splat(-0.107_483_2));
    let p = isa.fma(y2, p, isa.splat(-2.300_526));
    let power = isa.exp2_for_bf16(isa.mul(y, p));
    isa.div_for_bf16(x, isa.add(power, isa.splat(1.0)))
}

/// `x / 2 * (1 + tanh(u))` with `u = sqrt(2/pi) (x + 0.044715 x^3)`, as `x / (1 + e^-2u)`.
#[inline(always)]
fn gelu_tanh<I: Isa>(isa: I, x: I::Floats) -> I::Floats {
    /// -2 sqrt(2/pi) log2(e)
    const FACTOR: f32 = -2.302_208_2;
    let exponent = isa.mul(x, isa.fma(isa.mul(x, x), isa.splat(0.044_715 * FACTOR), isa.splat(FACTOR)));
    let power = exp2(isa, isa.min(exponent, isa.splat(126.0)), Accuracy::F32);
    isa.div(x, isa.add(isa.splat(1.0), power))
}

/// `x / (1 + e^-x)`.
#[inline(always)]
fn silu<I: Isa>(isa: I, x: I::Floats) -> I::Floats {
    let exponent = isa.min(isa.mul(x, isa.splat(-std::f32::consts::LOG2_E)), isa.splat(126.0));
    isa.div(x, isa.add(isa.splat(1.0), exp2(isa, exponent, Accuracy::F32)))
}
