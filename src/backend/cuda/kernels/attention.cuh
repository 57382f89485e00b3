// What the attention kernels share: tile sizes, copies to shared memory, and the online softmax of a warp's rows.
#pragma once

#include "ptx.cuh"
#include "rows.cuh"

// A block computes one tile, QUERY_ROWS queries of one sequence and head, and iterates over all keys of the sequence, KEY_ROWS
// per step. Rows are counted from the sequence's start.
constexpr u32 QUERY_ROWS = 128;
constexpr u32 KEY_ROWS = 64;
constexpr u32 ATTENTION_THREADS = 128;

// Dynamic shared memory of a launch: Q, and two stages of K and V. 768 D bytes, which is at D = 64 exactly the 48 KiB that need no
// opt-in. The f32 kernel needs one stage of K and V in f32, which is never more.
constexpr u32 ATTENTION_SHARED_BYTES = QUERY_ROWS * D * 2 + 2 * 2 * KEY_ROWS * D * 2;
static_assert(2 * KEY_ROWS * D * sizeof(float) <= ATTENTION_SHARED_BYTES && ATTENTION_SHARED_BYTES <= 48 * 1024, "");

// The score of a masked key. Finite, so that no difference of two scores is inf - inf.
constexpr float MASKED_SCORE = -1e30f;
// exp(x) = 2^(LOG2_E x)
constexpr float LOG2_E = 1.4426950408889634f;

// The keys that a tile's queries attend to, rounded to steps: all of them, or with LOCAL those at a distance of at most `window`
// from a query of the tile.
struct KeyRange {
    u32 first;
    u32 end;
};
template <bool LOCAL>
__device__ __forceinline__ KeyRange key_range(u32 first_query, u32 queries, u32 length, u32 window) {
    if (!LOCAL) return {0, length};
    const u32 first = first_query > window ? (first_query - window) / KEY_ROWS * KEY_ROWS : 0;
    const u32 last_query = (first_query + queries < length ? first_query + queries : length) - 1;
    return {first, length - 1 - last_query > window ? last_query + window + 1 : length};
}

#ifndef ELEMENT_F32

// Rows of D elements in shared memory, in chunks of 16 bytes. Chunks are swizzled by row, so that the eight rows that ldmatrix
// reads at once are in different banks: a row of D = 64 spans all 32 banks, at D = 32 two rows do.
constexpr u32 ROW_CHUNKS = D / 8;
constexpr u32 ROW_BYTES = D * 2;
__device__ __forceinline__ u32 chunk_address(u32 rows, u32 row, u32 chunk) {
    const u32 swizzle = D == 64 ? row % 8 : row / 2 % 4;
    return rows + row * ROW_BYTES + (chunk ^ swizzle) * 16;
}

// Starts copying rows first .. first + ROWS of `from` to shared memory: D elements of each row, with a row stride of 3C elements.
// Rows from `length` on are not read and become zero. Executed by all ATTENTION_THREADS threads; each copies one chunk of every
// ROWS_AT_ONCE-th row.
template <u32 ROWS>
__device__ __forceinline__ void copy_rows_async(u32 to, const element* __restrict__ from, u32 first, u32 length) {
    constexpr u32 ROWS_AT_ONCE = ATTENTION_THREADS / ROW_CHUNKS;
    static_assert(ROWS_AT_ONCE % 8 == 0, "all rows of a thread have the same swizzle");
    const u32 row = threadIdx.x / ROW_CHUNKS, chunk = threadIdx.x % ROW_CHUNKS;
    const u32 place = chunk_address(to, row, chunk);
    const element* rows = from + chunk * 8;
    if (first + ROWS <= length) { // all steps but the last: constant offsets from one address
        const element* source = rows + (size_t)(first + row) * (3 * C);
#pragma unroll
        for (u32 i = 0; i < ROWS / ROWS_AT_ONCE; ++i) {
            cp_async_16(place + i * ROWS_AT_ONCE * ROW_BYTES, source + (size_t)i * ROWS_AT_ONCE * (3 * C), 16);
        }
        return;
    }
#pragma unroll
    for (u32 i = 0; i < ROWS / ROWS_AT_ONCE; ++i) {
        const u32 wanted = first + i * ROWS_AT_ONCE + row;
        const u32 source = wanted < length ? wanted : length - 1;
        cp_async_16(place + i * ROWS_AT_ONCE * ROW_BYTES, rows + (size_t)source * (3 * C), wanted < length ? 16 : 0);
    }
}

// Register fragments of a warp: tiles of 16 queries (two in `attention`, one in `attention_wgmma`), each in blocks of 8 columns as
// in mma_m16n8k16. A lane holds two rows of a tile: lane / 4, and the row 8 below.
constexpr u32 WARP_TILES = QUERY_ROWS / (ATTENTION_THREADS / 32) / 16;
constexpr u32 KEY_BLOCKS = KEY_ROWS / 8;
constexpr u32 HEAD_BLOCKS = D / 8;
constexpr u32 HEAD_DEPTH = D / 16; // mma steps over D
template <u32 TILES>
using Queries = u32[TILES][HEAD_DEPTH][4];
template <u32 TILES>
using Scores = float[TILES][KEY_BLOCKS][4];
template <u32 TILES>
using Context = float[TILES][HEAD_BLOCKS][4];
template <u32 TILES>
using RowValues = float[TILES][2];

// Loads this warp's rows of Q from shared memory.
template <u32 TILES>
__device__ __forceinline__ void load_queries(Queries<TILES>& queries, u32 q_rows, u32 warp, u32 lane) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (u32 depth = 0; depth < HEAD_DEPTH; ++depth) {
            const u32 row = (warp * TILES + tile) * 16 + lane % 16;
            ldmatrix_x4(queries[tile][depth], chunk_address(q_rows, row, depth * 2 + lane / 16));
        }
}

// scores = queries k^T for the keys of one step.
template <u32 TILES>
__device__ __forceinline__ void compute_scores(Scores<TILES>& scores, const Queries<TILES>& queries, u32 k_rows, u32 lane) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (u32 block = 0; block < KEY_BLOCKS; ++block)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) scores[tile][block][i] = 0;
#pragma unroll
    for (u32 depth = 0; depth < HEAD_DEPTH; ++depth)
#pragma unroll
        for (u32 block = 0; block < KEY_BLOCKS; block += 2) {
            u32 keys[4]; // two blocks of 8 keys, 16 elements of D each
            const u32 row = block * 8 + lane / 16 * 8 + lane % 8;
            ldmatrix_x4(keys, chunk_address(k_rows, row, depth * 2 + lane / 8 % 2));
#pragma unroll
            for (u32 tile = 0; tile < TILES; ++tile) {
                mma_m16n8k16(scores[tile][block], queries[tile][depth], keys[0], keys[1]);
                mma_m16n8k16(scores[tile][block + 1], queries[tile][depth], keys[2], keys[3]);
            }
        }
}

// Masks the keys of a step from `present` on.
template <u32 TILES>
__device__ __forceinline__ void mask_keys(Scores<TILES>& scores, u32 present, u32 lane) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (u32 block = 0; block < KEY_BLOCKS; ++block)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 key = block * 8 + lane % 4 * 2 + i % 2;
                if (key >= present) scores[tile][block][i] = MASKED_SCORE;
            }
}

// Masks the keys of a step that are further than `window` from a query. Rows are relative: `query` is the warp's first query and
// `key` the step's first key. A step in which a query sees no key leaves it a maximum of MASKED_SCORE and weights that a later
// step multiplies by zero: every query sees itself.
template <u32 TILES>
__device__ __forceinline__ void mask_window(Scores<TILES>& scores, u32 query, u32 key, u32 window, u32 lane) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (u32 block = 0; block < KEY_BLOCKS; ++block)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 q = query + tile * 16 + i / 2 * 8 + lane / 4;
                const u32 k = key + block * 8 + lane % 4 * 2 + i % 2;
                if ((q > k ? q - k : k - q) > window) scores[tile][block][i] = MASKED_SCORE;
            }
}

// One step of the online softmax. Replaces scores by exp(score - maximum so far). `sums` is this lane's part of the row sums (they
// are added up across lanes at the end); it is rescaled to the new maximum by the factor that is returned in `rescales`.
template <u32 TILES>
__device__ __forceinline__ void softmax_block(
    Scores<TILES>& scores, RowValues<TILES>& maxima, RowValues<TILES>& sums, RowValues<TILES>& rescales, float scale) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            float highest = maxima[tile][half];
#pragma unroll
            for (u32 block = 0; block < KEY_BLOCKS; ++block) {
                const float* pair = &scores[tile][block][half * 2];
                highest = fmaxf(highest, fmaxf(pair[0], pair[1]));
            }
            highest = fmaxf(highest, __shfl_xor_sync(WHOLE_WARP, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(WHOLE_WARP, highest, 2));
            const float rescale = rescales[tile][half] = exp2_approx((maxima[tile][half] - highest) * scale);
            const float shift = highest * scale;
            maxima[tile][half] = highest;

            float sum = 0;
#pragma unroll
            for (u32 block = 0; block < KEY_BLOCKS; ++block) {
                float* pair = &scores[tile][block][half * 2];
                pair[0] = exp2_approx(pair[0] * scale - shift);
                pair[1] = exp2_approx(pair[1] * scale - shift);
                sum += pair[0] + pair[1];
            }
            sums[tile][half] = sums[tile][half] * rescale + sum;
        }
}

// The state before the first key.
template <u32 TILES>
__device__ __forceinline__ void init_softmax(Context<TILES>& context, RowValues<TILES>& maxima, RowValues<TILES>& sums) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile) {
        maxima[tile][0] = maxima[tile][1] = MASKED_SCORE;
        sums[tile][0] = sums[tile][1] = 0;
#pragma unroll
        for (u32 block = 0; block < HEAD_BLOCKS; ++block)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) context[tile][block][i] = 0;
    }
}

// Rescales the context to the new maximum.
template <u32 TILES>
__device__ __forceinline__ void rescale_context(Context<TILES>& context, const RowValues<TILES>& rescales) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (u32 block = 0; block < HEAD_BLOCKS; ++block)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) context[tile][block][i] *= rescales[tile][i / 2];
}

// Converts the weights of 16 keys, two accumulator blocks, to a first operand: the two fragment layouts use the same lanes.
__device__ __forceinline__ void pack_weights(u32 (&operand)[4], const float (&left)[4], const float (&right)[4]) {
    operand[0] = pack_pair(left[0], left[1]);
    operand[1] = pack_pair(left[2], left[3]);
    operand[2] = pack_pair(right[0], right[1]);
    operand[3] = pack_pair(right[2], right[3]);
}

// context += weights v for the values of one step.
template <u32 TILES>
__device__ __forceinline__ void accumulate_values(Context<TILES>& context, const Scores<TILES>& weights, u32 v_rows, u32 lane) {
#pragma unroll
    for (u32 depth = 0; depth < KEY_ROWS / 16; ++depth) {
        u32 operand[TILES][4];
#pragma unroll
        for (u32 tile = 0; tile < TILES; ++tile) {
            pack_weights(operand[tile], weights[tile][depth * 2], weights[tile][depth * 2 + 1]);
        }
#pragma unroll
        for (u32 block = 0; block < HEAD_BLOCKS; block += 2) {
            u32 values[4]; // 16 keys of two blocks of 8 columns
            const u32 row = depth * 16 + lane % 16;
            ldmatrix_x4_trans(values, chunk_address(v_rows, row, block + lane / 16));
#pragma unroll
            for (u32 tile = 0; tile < TILES; ++tile) {
                mma_m16n8k16(context[tile][block], operand[tile], values[0], values[1]);
                mma_m16n8k16(context[tile][block + 1], operand[tile], values[2], values[3]);
            }
        }
    }
}

// Divides by the row sums and stores `rows` rows. `out` is the tile's first row at the head's first column.
template <u32 TILES>
__device__ __forceinline__ void store_context(
    const Context<TILES>& context, const RowValues<TILES>& sums, element* __restrict__ out, u32 rows, u32 warp, u32 lane) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            float sum = sums[tile][half];
            sum += __shfl_xor_sync(WHOLE_WARP, sum, 1);
            sum += __shfl_xor_sync(WHOLE_WARP, sum, 2);
            const float inverse = 1 / sum;
            const u32 row = (warp * TILES + tile) * 16 + half * 8 + lane / 4;
            if (row >= rows) continue;
            element* columns = out + (size_t)row * C + lane % 4 * 2;
#pragma unroll
            for (u32 block = 0; block < HEAD_BLOCKS; ++block) {
                const float* pair = &context[tile][block][half * 2];
                *reinterpret_cast<u32*>(columns + block * 8) = pack_pair(pair[0] * inverse, pair[1] * inverse);
            }
        }
}

#endif // not ELEMENT_F32
