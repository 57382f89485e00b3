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

struct Silu {
    static __device__ __forceinline__ float of(float x) {
        // exp2 of more than 126 could overflow; the quotient is 0 by then.
        return x / (1 + exp2_approx(fminf(-x * 1.4426950408889634f, 126)));
    }
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

// The same with a function number: 0 erf GELU, 1 tanh GELU, 2 ReLU, 3 identity, 4 SiLU.
template <typename Store>
__device__ __forceinline__ void apply_function_number(u32 function, u32 vecs, const element* x, Store store) {
    switch (function) {
        case 0: apply_function<GeluErf>(vecs, x, store); break;
        case 1: apply_function<GeluTanh>(vecs, x, store); break;
        case 2: apply_function<Relu>(vecs, x, store); break;
        case 3: apply_function<Identity>(vecs, x, store); break;
        case 4: apply_function<Silu>(vecs, x, store); break;
    }
}

// x = function(x) in place. x [rows, columns]; columns is a multiple of 8; fewer than 2^34 values. Any grid and block size.
extern "C" __global__ void activate(const u32* __restrict__ rows, u32 columns, u32 function, element* x) {
    const auto store = [=](u32 i, const Vec8& vec) { store_vec8(x + (size_t)i * 8, vec); };
    apply_function_number(function, *rows * (columns / 8), x, store);
}

// out = Function(gate) * value, where a row of x is `columns` values of the gate and then as many of the value.
template <typename Function>
__device__ __forceinline__ void multiply_by_gate(u32 vecs, u32 columns, const element* x, element* out) {
    const u32 row_vecs = columns / 8;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < vecs; i += gridDim.x * blockDim.x) {
        const element* gate = x + (size_t)(i / row_vecs) * 2 * columns + i % row_vecs * 8;
        Vec8 vec = load_vec8(gate);
        const Vec8 value = load_vec8(gate + columns);
#pragma unroll
        for (u32 j = 0; j < 8; ++j) vec.values[j] = Function::of(vec.values[j]) * value.values[j];
        store_vec8(out + (size_t)i * 8, vec);
    }
}

// x [rows, 2 columns], out [rows, columns]; columns is a multiple of 8; `function` as in `activate`. Any grid and block size.
extern "C" __global__ void gate(
    const u32* __restrict__ rows, u32 columns, u32 function, const element* __restrict__ x, element* __restrict__ out) {
    const u32 vecs = *rows * (columns / 8);
    switch (function) {
        case 0: multiply_by_gate<GeluErf>(vecs, columns, x, out); break;
        case 1: multiply_by_gate<GeluTanh>(vecs, columns, x, out); break;
        case 2: multiply_by_gate<Relu>(vecs, columns, x, out); break;
        case 4: multiply_by_gate<Silu>(vecs, columns, x, out); break;
    }
}

// Rotates the first `heads` heads of each row by its position, in place (rotary position embedding): pair i of a head, columns i and
// i + D / 2, by the angle in row positions[row], column i, of the tables.
//
// counts {T, ...}; positions [T]; cos, sin [positions, D / 2]; x [T, columns]. Any grid and block size.
extern "C" __global__ void rotate(
    const u32* __restrict__ counts, const u32* __restrict__ positions, const float* __restrict__ cos, const float* __restrict__ sin,
    u32 heads, u32 columns, element* x) {
    constexpr u32 HALF = D / 2, HALF_VECS = HALF / 8;
    const u32 row_vecs = heads * HALF_VECS, vecs = counts[0] * row_vecs;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < vecs; i += gridDim.x * blockDim.x) {
        const u32 row = i / row_vecs, head = i % row_vecs / HALF_VECS, pair = i % HALF_VECS * 8;
        element* first = x + (size_t)row * columns + head * D + pair;
        const size_t angle = (size_t)positions[row] * HALF + pair;
        const Vec8 a = load_vec8(first), b = load_vec8(first + HALF);
        const Vec8 c = load_vec8(cos + angle), s = load_vec8(sin + angle);
        Vec8 to_a, to_b;
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            to_a.values[j] = a.values[j] * c.values[j] - b.values[j] * s.values[j];
            to_b.values[j] = b.values[j] * c.values[j] + a.values[j] * s.values[j];
        }
        store_vec8(first, to_a);
        store_vec8(first + HALF, to_b);
    }
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

// Threads of a block of `mean_rows`: MEAN_VECS columns of eight elements by MEAN_LANES rows at a time.
constexpr u32 MEAN_VECS = 8;
constexpr u32 MEAN_LANES = 32;

// out[s] = the mean of the rows of sequence s. x [T, C], out [S, C]. Grid (at least S, ceil(C / 64)), blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(MEAN_VECS * MEAN_LANES) mean_rows(
    const u32* __restrict__ counts, const u32* __restrict__ offsets, const element* __restrict__ x,
    element* __restrict__ out) {
    __shared__ Vec8 sums[MEAN_LANES][MEAN_VECS];
    if (blockIdx.x >= counts[1]) return;
    const u32 start = offsets[blockIdx.x], end = offsets[blockIdx.x + 1];
    const u32 row_lane = threadIdx.x / MEAN_VECS, column = (blockIdx.y * MEAN_VECS + threadIdx.x % MEAN_VECS) * 8;
    Vec8 sum = {};
    if (column < C) {
        for (u32 row = start + row_lane; row < end; row += MEAN_LANES) {
            const Vec8 vec = load_vec8(x + (size_t)row * C + column);
#pragma unroll
            for (u32 j = 0; j < 8; ++j) sum.values[j] += vec.values[j];
        }
    }
    sums[row_lane][threadIdx.x % MEAN_VECS] = sum;
    __syncthreads();
    if (row_lane != 0 || column >= C) return;
    for (u32 other = 1; other < MEAN_LANES; ++other) {
#pragma unroll
        for (u32 j = 0; j < 8; ++j) sum.values[j] += sums[other][threadIdx.x].values[j];
    }
    const float inverse = 1.0f / (end - start);
#pragma unroll
    for (u32 j = 0; j < 8; ++j) sum.values[j] *= inverse;
    store_vec8(out + (size_t)blockIdx.x * C + column, sum);
}
