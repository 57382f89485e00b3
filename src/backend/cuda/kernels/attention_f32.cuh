// Attention in f32, without tensor cores.
#pragma once

#include "attention.cuh"

#ifdef ELEMENT_F32

// Keys scored per online-softmax update.
constexpr u32 KEYS_PER_GROUP = 16;

// The same parameters as in half precisions (attention_mma.cuh). Each thread holds one query and its context in registers and
// reads keys and values from shared memory, all threads the same one at a time. Written for accuracy, not speed.
template <bool LOCAL>
__device__ __forceinline__ void attend_tile(
    const u32* __restrict__ counts, const u32* __restrict__ offsets, const uint2* __restrict__ tiles,
    const element* __restrict__ qkv, element* __restrict__ out, float scale, u32 window, unsigned char* shared) {
    if (blockIdx.x >= counts[2]) return;
    float* k_rows = reinterpret_cast<float*>(shared); // [KEY_ROWS, D]
    float* v_rows = k_rows + KEY_ROWS * D;            // [KEY_ROWS, D]
    const u32 sequence = tiles[blockIdx.x].x, query = tiles[blockIdx.x].y + threadIdx.x;
    const u32 start = offsets[sequence], length = offsets[sequence + 1] - start;
    const element* q = qkv + (size_t)start * (3 * C) + blockIdx.y * D;
    const element* k = q + C;
    const element* v = k + C;
    const bool has_row = query < length;
    const float scale_log2 = scale * LOG2_E;

    Vec8 queries[D / 8], context[D / 8];
#pragma unroll
    for (u32 i = 0; i < D / 8; ++i) {
        queries[i] = load_vec8(q + (size_t)(has_row ? query : 0) * (3 * C) + i * 8);
        context[i] = {};
    }
    float maximum = MASKED_SCORE, sum = 0;

    const KeyRange range = key_range<LOCAL>(tiles[blockIdx.x].y, QUERY_ROWS, length, window);
    for (u32 first_key = range.first; first_key < range.end; first_key += KEY_ROWS) {
        __syncthreads(); // the previous step's rows have been read
        for (u32 i = threadIdx.x; i < KEY_ROWS * D / 8; i += ATTENTION_THREADS) {
            const u32 row = i / (D / 8), column = i % (D / 8) * 8;
            const u32 source = first_key + row < length ? first_key + row : length - 1;
            store_vec8(k_rows + row * D + column, load_vec8(k + (size_t)source * (3 * C) + column));
            store_vec8(v_rows + row * D + column, load_vec8(v + (size_t)source * (3 * C) + column));
        }
        __syncthreads(); // this step's rows are complete

        for (u32 group = 0; group < KEY_ROWS && first_key + group < length; group += KEYS_PER_GROUP) {
            float scores[KEYS_PER_GROUP];
            float highest = maximum;
#pragma unroll
            for (u32 key = 0; key < KEYS_PER_GROUP; ++key) {
                float product = 0;
#pragma unroll
                for (u32 i = 0; i < D / 8; ++i) {
                    const Vec8 keys = load_vec8(k_rows + (group + key) * D + i * 8);
#pragma unroll
                    for (u32 j = 0; j < 8; ++j) product += queries[i].values[j] * keys.values[j];
                }
                const u32 place = first_key + group + key;
                const bool visible = !LOCAL || (query > place ? query - place : place - query) <= window;
                scores[key] = place < length && visible ? product : MASKED_SCORE;
                highest = fmaxf(highest, scores[key]);
            }
            const float rescale = exp2_approx((maximum - highest) * scale_log2);
            maximum = highest;
            sum *= rescale;
#pragma unroll
            for (u32 i = 0; i < D / 8; ++i)
#pragma unroll
                for (u32 j = 0; j < 8; ++j) context[i].values[j] *= rescale;
#pragma unroll
            for (u32 key = 0; key < KEYS_PER_GROUP; ++key) {
                const float weight = exp2_approx((scores[key] - highest) * scale_log2);
                sum += weight;
#pragma unroll
                for (u32 i = 0; i < D / 8; ++i) {
                    const Vec8 values = load_vec8(v_rows + (group + key) * D + i * 8);
#pragma unroll
                    for (u32 j = 0; j < 8; ++j) context[i].values[j] += weight * values.values[j];
                }
            }
        }
    }
    if (!has_row) return;
#pragma unroll
    for (u32 i = 0; i < D / 8; ++i) {
#pragma unroll
        for (u32 j = 0; j < 8; ++j) context[i].values[j] /= sum;
        store_vec8(out + (size_t)(start + query) * C + blockIdx.y * D + i * 8, context[i]);
    }
}

extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS) attention(
    const u32* __restrict__ counts, const u32* __restrict__ offsets, const uint2* __restrict__ tiles,
    const element* __restrict__ qkv, element* __restrict__ out, float scale) {
    DYNAMIC_SHARED(shared);
    attend_tile<false>(counts, offsets, tiles, qkv, out, scale, 0, shared);
}

extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS) attention_local(
    const u32* __restrict__ counts, const u32* __restrict__ offsets, const uint2* __restrict__ tiles,
    const element* __restrict__ qkv, element* __restrict__ out, float scale, u32 window) {
    DYNAMIC_SHARED(shared);
    attend_tile<true>(counts, offsets, tiles, qkv, out, scale, window, shared);
}

#endif // ELEMENT_F32
