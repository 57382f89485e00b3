// Activations, conversions and copies.
#pragma once

#include "ptx.cuh"
#include "rows.cuh"

// x Phi(x), Phi the normal distribution's: in f32 by the error function. In half precisions as x / (1 + 2^-u), u being x times
// a polynomial of x^2 that was fitted to log2(Phi / (1 - Phi)): within 1e-5 of the exact value, at a third of the instructions,
// of which erff has more than the memory leaves time for.
struct GeluErf {
    static __device__ __forceinline__ float of(float x) {
#ifdef ELEMENT_F32
        return 0.5f * x * (1 + erff(x * 0.70710678118654752f));
#else
        const float square = fminf(x * x, 20.25f); // as beyond 4.5, where nothing is left of 1 - Phi
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

// The tanh approximation of it.
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

// store(i, function(octet i of x)) for each.
template <typename Function, typename Store>
__device__ __forceinline__ void apply_function(u32 octets, const element* x, Store store) {
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < octets; i += gridDim.x * blockDim.x) {
        Vec8 octet = load_vec8(x + (size_t)i * 8);
#pragma unroll
        for (u32 j = 0; j < 8; ++j) octet.values[j] = Function::of(octet.values[j]);
        store(i, octet);
    }
}

// The same by number: 0 gelu by erf, 1 gelu by tanh, 2 relu, 3 x itself.
template <typename Store>
__device__ __forceinline__ void apply_function_number(u32 function, u32 octets, const element* x, Store store) {
    switch (function) {
        case 0: apply_function<GeluErf>(octets, x, store); break;
        case 1: apply_function<GeluTanh>(octets, x, store); break;
        case 2: apply_function<Relu>(octets, x, store); break;
        case 3: apply_function<Identity>(octets, x, store); break;
    }
}

// x = function(x) in place, by its number. x [rows, columns], columns a multiple of 8, and fewer than 2^34 values.
// Any grid of any blocks.
extern "C" __global__ void activate(const u32* __restrict__ rows, u32 columns, u32 function, element* x) {
    const auto store = [=](u32 i, const Vec8& octet) { store_vec8(x + (size_t)i * 8, octet); };
    apply_function_number(function, *rows * (columns / 8), x, store);
}

#ifdef ELEMENT_FP8

// out = scale * function(x) in e4m3: the operand of a product. out [rows, columns]; all else as above.
extern "C" __global__ void quantize(
    const u32* __restrict__ rows, u32 columns, u32 function, const element* __restrict__ x, e4m3* __restrict__ out,
    float scale) {
    const auto store = [=](u32 i, const Vec8& octet) { store_vec8(out + (size_t)i * 8, octet, scale); };
    apply_function_number(function, *rows * (columns / 8), x, store);
}

#endif

// out = x as floats, for the host. x, out [rows, columns], fewer than 2^31 values. Any grid of any blocks.
extern "C" __global__ void to_f32(
    const u32* __restrict__ rows, u32 columns, const element* __restrict__ x, float* __restrict__ out) {
    const u32 values = *rows * columns;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < values; i += gridDim.x * blockDim.x) out[i] = to_float(x[i]);
}

// out[s] = x[offsets[s]]: each sequence's first row. x [T, C], out [S, C]. Any grid of any blocks.
extern "C" __global__ void gather_cls(
    const u32* __restrict__ counts, const u32* __restrict__ offsets, const element* __restrict__ x,
    element* __restrict__ out) {
    constexpr u32 ROW_PIECES = C * sizeof(element) / sizeof(uint4);
    const uint4* from = reinterpret_cast<const uint4*>(x);
    uint4* to = reinterpret_cast<uint4*>(out);
    const u32 pieces = counts[1] * ROW_PIECES;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < pieces; i += gridDim.x * blockDim.x) {
        to[i] = from[(size_t)offsets[i / ROW_PIECES] * ROW_PIECES + i % ROW_PIECES];
    }
}
