// What the kernels are compiled for: dtype, sizes and optional features, from the macros that the host defines (see kernels.cu).
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
// fp8 E4M3: 1 sign bit, 4 exponent bits, 3 fraction bits. The largest value is 448; below 2^-6 the step is 2^-9. No infinity.
typedef unsigned char e4m3;

#ifdef ELEMENT_FP8
#ifndef ELEMENT_F16
#define ELEMENT_F16
#endif
constexpr bool FP8_GEMM = true;
#else
constexpr bool FP8_GEMM = false;
#endif

#if defined(ELEMENT_F32)
typedef float element;
#elif defined(ELEMENT_F16) || defined(ELEMENT_BF16)
typedef u16 element;
#else
#error "define one of ELEMENT_F16, ELEMENT_BF16, ELEMENT_F32, ELEMENT_FP8"
#endif

constexpr u32 C = HIDDEN_SIZE;
constexpr u32 D = HEAD_SIZE;
static_assert(C % 8 == 0, "rows are read in vectors of eight elements");
static_assert(D == 32 || D == 64, "the attention kernels support head sizes of 32 and 64");

// Only sm_90a has wgmma. `attention_wgmma` is then compiled in addition to `attention`, and `gemm_wgmma` is available.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(ELEMENT_F32)
#if HEAD_SIZE == 64
#define HAS_ATTENTION_WGMMA
#endif
#ifndef ELEMENT_FP8
#define HAS_GEMM_WGMMA
#endif
#endif
#if defined(HAS_ATTENTION_WGMMA) || defined(HAS_GEMM_WGMMA)
#define HAS_WGMMA
#endif
