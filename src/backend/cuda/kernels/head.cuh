// The classification head. It has only S rows, so it has f32 weights and uses no tensor cores.
#pragma once

#include "elementwise.cuh"
#include "rows.cuh"

// Rows computed per read of a weight row.
constexpr u32 HEAD_ROWS = 8;

// The function of a head's layer, by its number in elementwise.cuh; 5 is tanh. Exact, as a head has few values.
__device__ __forceinline__ float head_function(u32 function, float x) {
    switch (function) {
        case 0: return 0.5f * x * (1 + erff(x * 0.70710678118654752f));
        case 1: return GeluTanh::of(x);
        case 2: return Relu::of(x);
        case 4: return x / (1 + expf(-x));
        case 5: return tanhf(x);
        default: return x;
    }
}

// out[r] = function(weight x[r] + bias). x [rows, C]; weight [C, C], outputs by inputs; bias [C]; out [rows, C].
// A warp computes one output for up to HEAD_ROWS rows. Any grid of blocks of whole warps.
extern "C" __global__ void __launch_bounds__(256) head_dense(
    const u32* __restrict__ rows, const element* __restrict__ x, const float* __restrict__ weight,
    const float* __restrict__ bias, float* __restrict__ out, u32 function) {
    const u32 lane = lane_in_warp(), end = *rows;
    const u32 tasks = (end + HEAD_ROWS - 1) / HEAD_ROWS * C;
    for (u32 task = warp_in_grid(); task < tasks; task += warps_in_grid()) {
        const u32 output = task % C, first = task / C * HEAD_ROWS;
        float sums[HEAD_ROWS] = {};
#pragma unroll
        for (u32 i = 0; i < LANE_VECS; ++i) {
            if (!lane_has_vec8(i, lane)) continue;
            const u32 column = vec8_index(i, lane) * 8;
            const Vec8 weights = load_vec8(weight + (size_t)output * C + column);
#pragma unroll
            for (u32 r = 0; r < HEAD_ROWS; ++r) {
                if (first + r >= end) continue;
                const Vec8 inputs = load_vec8(x + (size_t)(first + r) * C + column);
#pragma unroll
                for (u32 j = 0; j < 8; ++j) sums[r] += weights.values[j] * inputs.values[j];
            }
        }
#pragma unroll
        for (u32 r = 0; r < HEAD_ROWS; ++r) {
            const float sum = warp_sum(sums[r]);
            if (lane == 0 && first + r < end) {
                out[(size_t)(first + r) * C + output] = head_function(function, sum + bias[output]);
            }
        }
    }
}

// x[r] = norm(x[r]) in place, in f32. x [rows, C]; weight, bias [C]. One row per warp, any grid of blocks of whole warps.
extern "C" __global__ void __launch_bounds__(256) head_norm(
    const u32* __restrict__ rows, float* x, const float* __restrict__ weight, const float* __restrict__ bias, float eps) {
    const u32 lane = lane_in_warp(), end = *rows;
    for (u32 r = warp_in_grid(); r < end; r += warps_in_grid()) {
        Row row;
#pragma unroll
        for (u32 i = 0; i < LANE_VECS; ++i) {
            if (lane_has_vec8(i, lane)) row.vecs[i] = load_vec8(x + (size_t)r * C + vec8_index(i, lane) * 8);
        }
        norm_row(row, weight, bias, eps, lane);
#pragma unroll
        for (u32 i = 0; i < LANE_VECS; ++i) {
            if (lane_has_vec8(i, lane)) store_vec8(x + (size_t)r * C + vec8_index(i, lane) * 8, row.vecs[i]);
        }
    }
}

// out[r] = weight . x[r] + bias. x [rows, C], weight [C], bias [1], out [rows]. One row per warp, any grid of blocks of whole warps.
extern "C" __global__ void __launch_bounds__(256) head_out(
    const u32* __restrict__ rows, const float* __restrict__ x, const float* __restrict__ weight,
    const float* __restrict__ bias, float* __restrict__ out) {
    const u32 lane = lane_in_warp(), end = *rows;
    for (u32 r = warp_in_grid(); r < end; r += warps_in_grid()) {
        float sum = 0;
#pragma unroll
        for (u32 i = 0; i < LANE_VECS; ++i) {
            if (!lane_has_vec8(i, lane)) continue;
            const u32 column = vec8_index(i, lane) * 8;
            const Vec8 inputs = load_vec8(x + (size_t)r * C + column), weights = load_vec8(weight + column);
#pragma unroll
            for (u32 j = 0; j < 8; ++j) sum += weights.values[j] * inputs.values[j];
        }
        sum = warp_sum(sum);
        if (lane == 0) out[r] = sum + *bias;
    }
}
