// Activations, conversions and copies.
#pragma once

#include "ptx.cuh"
#include "rows.cuh"

// x Phi(x), with Phi the cumulative normal distribution. f32 uses erff. Half precisions use x / (1 + 2^-u), where u is x times a
// polynomial in x^2 fitted to log2(Phi / (1 - Phi)). It is within 1e-5 of the exact value and takes a third of the instructions;
// erff would make the memory-bound kernels compute-bound.
struct GeluErf {
    static __device__ __forceinline__ float of(float x) {
#ifdef ELEMENT_F32
        return 0.5f * x * (1 + erff(x * 0.70710678118654752f));
#else
        const float square = fminf(x * x, 20.25f); // clamped at |x| = 4.5, beyond which 1 - Phi is negligible
        float p = -1.2454883e-7f;
        p = p * square + 6.7599459e-6f;
        p = p * square - 1.2278936e-4f;
        p = p * square - 2.0695811e-4f;
        p = p * square + 0.10488634f;
        p = p * square + 2.3023347f;
        return x * rcp_approx(1 + exp2_approx(-x * p));
#endif
    }
};

// The tanh approximation of GELU.
struct GeluTanh {
    static __device__ __forceinline__ float of(float x) {
        return 0.5f * x * (1 + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    }
};

struct Relu {
    static __device__ __forceinline__ float of(float x) { return fmaxf(x, 0); }
};

struct Identity {
    static __device__ __forceinline__ float of(float x) { return x; }
};

// Calls store(i, function(vector i of x)) for each of `vecs` vectors.
template <typename Function, typename Store>
__device__ __forceinline__ void apply_function(u32 vecs, const element* x, Store store) {
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < vecs; i += gridDim.x * blockDim.x) {
        Vec8 vec = load_vec8(x + (size_t)i * 8);
#pragma unroll
        for (u32 j = 0; j < 8; ++j) vec.values[j] = Function::of(vec.values[j]);
        store(i, vec);
    }
}

// The same with a function number: 0 erf GELU, 1 tanh GELU, 2 ReLU, 3 identity.
template <typename Store>
__device__ __forceinline__ void apply_function_number(u32 function, u32 vecs, const element* x, Store store) {
    switch (function) {
        case 0: apply_function<GeluErf>(vecs, x, store); break;
        case 1: apply_function<GeluTanh>(vecs, x, store); break;
        case 2: apply_function<Relu>(vecs, x, store); break;
        case 3: apply_function<Identity>(vecs, x, store); break;
    }
}

// x = function(x) in place. x [rows, columns]; columns is a multiple of 8; fewer than 2^34 values. Any grid and block size.
extern "C" __global__ void activate(const u32* __restrict__ rows, u32 columns, u32 function, element* x) {
    const auto store = [=](u32 i, const Vec8& vec) { store_vec8(x + (size_t)i * 8, vec); };
    apply_function_number(function, *rows * (columns / 8), x, store);
}

#ifdef ELEMENT_FP8

// out = scale * function(x) in e4m3, an operand of a GEMM. out [rows, columns]; otherwise as `activate`.
extern "C" __global__ void quantize(
    const u32* __restrict__ rows, u32 columns, u32 function, const element* __restrict__ x, e4m3* __restrict__ out,
    float scale) {
    const auto store = [=](u32 i, const Vec8& vec) { store_vec8(out + (size_t)i * 8, vec, scale); };
    apply_function_number(function, *rows * (columns / 8), x, store);
}

#endif

// out = x as f32. x, out [rows, columns], fewer than 2^31 values. Any grid and block size.
extern "C" __global__ void to_f32(
    const u32* __restrict__ rows, u32 columns, const element* __restrict__ x, float* __restrict__ out) {
    const u32 values = *rows * columns;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < values; i += gridDim.x * blockDim.x) out[i] = to_float(x[i]);
}

// out[s] = x[offsets[s]]: the first row of each sequence. x [T, C], out [S, C]. Any grid and block size.
extern "C" __global__ void gather_cls(
    const u32* __restrict__ counts, const u32* __restrict__ offsets, const element* __restrict__ x,
    element* __restrict__ out) {
    constexpr u32 ROW_CHUNKS_16 = C * sizeof(element) / sizeof(uint4);
    const uint4* from = reinterpret_cast<const uint4*>(x);
    uint4* to = reinterpret_cast<uint4*>(out);
    const u32 chunks = counts[1] * ROW_CHUNKS_16;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < chunks; i += gridDim.x * blockDim.x) {
        to[i] = from[(size_t)offsets[i / ROW_CHUNKS_16] * ROW_CHUNKS_16 + i % ROW_CHUNKS_16];
    }
}
