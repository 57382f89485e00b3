// Attention of the last layer, where only each sequence's first token is a query.
#pragma once

#include "attention.cuh"

constexpr u32 CLS_THREADS = 128;
// A key is processed by LANES_PER_KEY adjacent lanes (a key group), eight of its D columns each.
constexpr u32 LANES_PER_KEY = D / 8;
constexpr u32 KEY_GROUPS = CLS_THREADS / LANES_PER_KEY;
// Keys that a key group loads at a time, so that their loads overlap.
constexpr u32 KEYS_IN_FLIGHT = 4;

// Partial softmax over some keys: the sum of weights and the weighted sum of values, relative to the maximum score.
struct PartialSoftmax {
    float maximum;
    float sum;
    Vec8 context;
};

// Merges `other`, computed from other keys, into `mine`.
__device__ __forceinline__ void merge(PartialSoftmax& mine, const PartialSoftmax& other, float scale) {
    const float highest = fmaxf(mine.maximum, other.maximum);
    const float my_part = exp2_approx((mine.maximum - highest) * scale);
    const float other_part = exp2_approx((other.maximum - highest) * scale);
    mine.maximum = highest;
    mine.sum = mine.sum * my_part + other.sum * other_part;
#pragma unroll
    for (u32 j = 0; j < 8; ++j) {
        mine.context.values[j] = mine.context.values[j] * my_part + other.context.values[j] * other_part;
    }
}

// out[s] = softmax(scale q[s] K^T) V within sequence s and each head: attention of one query a sequence, to its first `keys_seen` keys.
//
// q [S, C]; kv [T, 2C]: K and V, each with heads in order; out [S, C]; `scale` is 1 / sqrt(D). Grid (at least S, H), blocks of
// 128 threads. One pass for any length: key groups take keys in turn, each with its own online softmax, merged at the end.
extern "C" __global__ void __launch_bounds__(CLS_THREADS) cls_attention(
    const u32* __restrict__ counts, const u32* __restrict__ offsets, const element* __restrict__ q,
    const element* __restrict__ kv, element* __restrict__ out, float scale, u32 keys_seen) {
    if (blockIdx.x >= counts[1]) return;
    const u32 lane = lane_in_warp(), warp = threadIdx.x / 32;
    const u32 key_group = threadIdx.x / LANES_PER_KEY, column = blockIdx.y * D + threadIdx.x % LANES_PER_KEY * 8;
    const u32 start = offsets[blockIdx.x], whole = offsets[blockIdx.x + 1] - start;
    const u32 length = whole < keys_seen ? whole : keys_seen;
    const element* k = kv + (size_t)start * (2 * C) + column;
    const element* v = k + C;
    const Vec8 query = load_vec8(q + (size_t)blockIdx.x * C + column);
    const float scale_log2 = scale * LOG2_E;

    // All key groups run the same number of rounds, as shuffles need every lane. Keys past the end are read as the last key and
    // score MASKED_SCORE. The result of a key group without any key is meaningless, but merges with a weight of zero.
    PartialSoftmax mine = {MASKED_SCORE, 0, {}};
    for (u32 round = 0; round < length; round += KEY_GROUPS * KEYS_IN_FLIGHT) {
        Vec8 keys[KEYS_IN_FLIGHT], values[KEYS_IN_FLIGHT];
        float scores[KEYS_IN_FLIGHT];
        float highest = mine.maximum;
#pragma unroll
        for (u32 i = 0; i < KEYS_IN_FLIGHT; ++i) {
            const u32 key = round + i * KEY_GROUPS + key_group;
            const u32 source = key < length ? key : length - 1;
            keys[i] = load_vec8(k + (size_t)source * (2 * C));
            values[i] = load_vec8(v + (size_t)source * (2 * C));
        }
#pragma unroll
        for (u32 i = 0; i < KEYS_IN_FLIGHT; ++i) {
            float product = 0;
#pragma unroll
            for (u32 j = 0; j < 8; ++j) product += query.values[j] * keys[i].values[j];
#pragma unroll
            for (u32 distance = LANES_PER_KEY / 2; distance > 0; distance /= 2) {
                product += __shfl_xor_sync(WHOLE_WARP, product, distance);
            }
            scores[i] = round + i * KEY_GROUPS + key_group < length ? product : MASKED_SCORE;
            highest = fmaxf(highest, scores[i]);
        }
        const float rescale = exp2_approx((mine.maximum - highest) * scale_log2);
        mine.maximum = highest;
        mine.sum *= rescale;
#pragma unroll
        for (u32 j = 0; j < 8; ++j) mine.context.values[j] *= rescale;
#pragma unroll
        for (u32 i = 0; i < KEYS_IN_FLIGHT; ++i) {
            const float weight = exp2_approx((scores[i] - highest) * scale_log2);
            mine.sum += weight;
#pragma unroll
            for (u32 j = 0; j < 8; ++j) mine.context.values[j] += weight * values[i].values[j];
        }
    }

    // Merge the key groups of a warp, then the warps. Lanes with the same columns are LANES_PER_KEY apart.
#pragma unroll
    for (u32 distance = LANES_PER_KEY; distance < 32; distance *= 2) {
        PartialSoftmax other;
        other.maximum = __shfl_xor_sync(WHOLE_WARP, mine.maximum, distance);
        other.sum = __shfl_xor_sync(WHOLE_WARP, mine.sum, distance);
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            other.context.values[j] = __shfl_xor_sync(WHOLE_WARP, mine.context.values[j], distance);
        }
        merge(mine, other, scale_log2);
    }
    constexpr u32 WARPS = CLS_THREADS / 32;
    __shared__ PartialSoftmax warp_partials[WARPS][LANES_PER_KEY];
    if (lane < LANES_PER_KEY) warp_partials[warp][lane] = mine;
    __syncthreads();
    if (threadIdx.x >= LANES_PER_KEY) return;
#pragma unroll
    for (u32 other = 1; other < WARPS; ++other) merge(mine, warp_partials[other][lane], scale_log2);
#pragma unroll
    for (u32 j = 0; j < 8; ++j) mine.context.values[j] /= mine.sum;
    store_vec8(out + (size_t)blockIdx.x * C + column, mine.context);
}
