// Vectors of eight elements, sums over a warp, and norms of rows.
#pragma once

#include "config.cuh"
#include "ptx.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Vectors of eight consecutive elements, as floats: the unit in which rows are read and written
// ---------------------------------------------------------------------------------------------------------------------

struct Vec8 {
    float values[8];
};

__device__ __forceinline__ Vec8 load_vec8(const float* __restrict__ from) {
    const float4 a = reinterpret_cast<const float4*>(from)[0];
    const float4 b = reinterpret_cast<const float4*>(from)[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

__device__ __forceinline__ void store_vec8(float* to, const Vec8& x) {
    const float* v = x.values;
    reinterpret_cast<float4*>(to)[0] = {v[0], v[1], v[2], v[3]};
    reinterpret_cast<float4*>(to)[1] = {v[4], v[5], v[6], v[7]};
}

#ifdef ELEMENT_F32
__device__ __forceinline__ float to_float(float x) { return x; }
#else
__device__ __forceinline__ Vec8 load_vec8(const u16* __restrict__ from) {
    const uint4 pairs = *reinterpret_cast<const uint4*>(from);
    return {{to_float((u16)pairs.x), to_float((u16)(pairs.x >> 16)), to_float((u16)pairs.y), to_float((u16)(pairs.y >> 16)),
             to_float((u16)pairs.z), to_float((u16)(pairs.z >> 16)), to_float((u16)pairs.w), to_float((u16)(pairs.w >> 16))}};
}

__device__ __forceinline__ void store_vec8(u16* to, const Vec8& x) {
    const float* v = x.values;
    *reinterpret_cast<uint4*>(to) = {pack_pair(v[0], v[1]), pack_pair(v[2], v[3]), pack_pair(v[4], v[5]), pack_pair(v[6], v[7])};
}
#endif

// Stores scale * x as an operand of an fp8 GEMM.
__device__ __forceinline__ void store_vec8(e4m3* to, const Vec8& x, float scale) {
    float v[8];
#pragma unroll
    for (u32 j = 0; j < 8; ++j) v[j] = x.values[j] * scale;
    *reinterpret_cast<uint2*>(to) = {pack_e4m3_pair(v[0], v[1]) | pack_e4m3_pair(v[2], v[3]) << 16,
                                     pack_e4m3_pair(v[4], v[5]) | pack_e4m3_pair(v[6], v[7]) << 16};
}

// ---------------------------------------------------------------------------------------------------------------------
// Warps
// ---------------------------------------------------------------------------------------------------------------------

constexpr u32 WHOLE_WARP = 0xffffffff;

// The sum over the warp's lanes, bitwise identical in all of them.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, distance);
    return x;
}

__device__ __forceinline__ u32 warp_in_grid() { return (blockIdx.x * blockDim.x + threadIdx.x) / 32; }
__device__ __forceinline__ u32 warps_in_grid() { return gridDim.x * blockDim.x / 32; }
__device__ __forceinline__ u32 lane_in_warp() { return threadIdx.x % 32; }

// A row of C elements distributed over a warp: lane l holds vectors l, l + 32, l + 64, ... If C is not a multiple of 256, some lanes
// hold one vector fewer than others.
constexpr u32 ROW_VECS = C / 8;
constexpr u32 LANE_VECS = (ROW_VECS + 31) / 32;

struct Row {
    Vec8 vecs[LANE_VECS];
};

__device__ __forceinline__ u32 vec8_index(u32 index, u32 lane) { return index * 32 + lane; }
__device__ __forceinline__ bool lane_has_vec8(u32 index, u32 lane) {
    return ROW_VECS % 32 == 0 || vec8_index(index, lane) < ROW_VECS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Norms
// ---------------------------------------------------------------------------------------------------------------------

// Destination of normalized rows: `out`, and with fp8 GEMMs also `operand`, multiplied by `scale`. Both are [rows, C].
struct NormOutput {
    element* out;
    e4m3* operand;
    float scale;
};

// Replaces the row by (row - mean) / sqrt(variance + eps) * weight + bias, by one warp. Two passes in registers: the variance is
// computed from differences from the mean, which avoids cancellation. `weight` and `bias` are [C].
__device__ __forceinline__ void norm_row(
    Row& row, const float* __restrict__ weight, const float* __restrict__ bias, float eps, u32 lane) {
    float sum = 0;
#pragma unroll
    for (u32 i = 0; i < LANE_VECS; ++i) {
        if (!lane_has_vec8(i, lane)) continue;
#pragma unroll
        for (u32 j = 0; j < 8; ++j) sum += row.vecs[i].values[j];
    }
    const float mean = warp_sum(sum) / C;

    float squares = 0;
#pragma unroll
    for (u32 i = 0; i < LANE_VECS; ++i) {
        if (!lane_has_vec8(i, lane)) continue;
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            const float difference = row.vecs[i].values[j] - mean;
            squares += difference * difference;
        }
    }
    const float scale = rsqrtf(warp_sum(squares) / C + eps);

#pragma unroll
    for (u32 i = 0; i < LANE_VECS; ++i) {
        if (!lane_has_vec8(i, lane)) continue;
        const u32 column = vec8_index(i, lane) * 8;
        const Vec8 weights = load_vec8(weight + column), biases = load_vec8(bias + column);
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            row.vecs[i].values[j] = (row.vecs[i].values[j] - mean) * scale * weights.values[j] + biases.values[j];
        }
    }
}

// Stores the norm of the row to row `r` of `to`.
__device__ __forceinline__ void store_norm(
    Row& row, const float* __restrict__ weight, const float* __restrict__ bias, float eps, const NormOutput& to, u32 r, u32 lane) {
    norm_row(row, weight, bias, eps, lane);
#pragma unroll
    for (u32 i = 0; i < LANE_VECS; ++i) {
        if (!lane_has_vec8(i, lane)) continue;
        const size_t place = (size_t)r * C + vec8_index(i, lane) * 8;
        store_vec8(to.out + place, row.vecs[i]);
        if constexpr (FP8_GEMM) store_vec8(to.operand + place, row.vecs[i], to.scale);
    }
}

// out[t] = norm(words[ids[t]] + type_table[types[t]] + position_table[positions[t]]) for each of T tokens.
//
// ids, types, positions [T], all in range; words [vocabulary, C], position_table [positions, C] or null, type_table
// [types, C] or null; weight, bias [C]; out [T, C]; operand as in NormOutput. Blocks of 256 threads, one row per warp, any grid size.
extern "C" __global__ void __launch_bounds__(256, 2) embed_norm(
    const u32* __restrict__ counts, const u32* __restrict__ ids, const u32* __restrict__ types,
    const u32* __restrict__ positions, const element* __restrict__ words, const element* __restrict__ position_table,
    const element* __restrict__ type_table, const float* __restrict__ weight, const float* __restrict__ bias, float eps,
    element* __restrict__ out, e4m3* __restrict__ operand, float scale) {
    const u32 lane = lane_in_warp(), tokens = counts[0];
    for (u32 token = warp_in_grid(); token < tokens; token += warps_in_grid()) {
        const element* word = words + (size_t)ids[token] * C;
        const element* type = type_table ? type_table + (size_t)types[token] * C : nullptr;
        const element* position = position_table ? position_table + (size_t)positions[token] * C : nullptr;
        Row row;
#pragma unroll
        for (u32 i = 0; i < LANE_VECS; ++i) {
            if (!lane_has_vec8(i, lane)) continue;
            const u32 column = vec8_index(i, lane) * 8;
            const Vec8 none = {};
            const Vec8 a = load_vec8(word + column);
            const Vec8 b = type ? load_vec8(type + column) : none, c = position ? load_vec8(position + column) : none;
#pragma unroll
            for (u32 j = 0; j < 8; ++j) row.vecs[i].values[j] = a.values[j] + b.values[j] + c.values[j];
        }
        store_norm(row, weight, bias, eps, {out, operand, scale}, token, lane);
    }
}

// out[r] = norm(x[r]) for each of `*rows` rows. x, out [rows, C]; out may be x. weight, bias [C]; operand as in NormOutput.
// Blocks of 256 threads, one row per warp, any grid size.
extern "C" __global__ void __launch_bounds__(256, 2) layer_norm(
    const u32* __restrict__ rows, const element* x, const float* __restrict__ weight, const float* __restrict__ bias,
    float eps, element* out, e4m3* __restrict__ operand, float scale) {
    const u32 lane = lane_in_warp(), end = *rows;
    for (u32 r = warp_in_grid(); r < end; r += warps_in_grid()) {
        Row row;
#pragma unroll
        for (u32 i = 0; i < LANE_VECS; ++i) {
            if (lane_has_vec8(i, lane)) row.vecs[i] = load_vec8(x + (size_t)r * C + vec8_index(i, lane) * 8);
        }
        store_norm(row, weight, bias, eps, {out, operand, scale}, r, lane);
    }
}
