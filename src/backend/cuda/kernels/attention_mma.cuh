// Attention on mma.sync, for half precisions.
#pragma once

#include "attention.cuh"

#ifndef ELEMENT_F32

// out = softmax(scale Q K^T) V within each sequence and head; with LOCAL, of keys at a distance of at most `window`.
//
// Flash attention. qkv [T, 3C]: Q, K and V, each with heads in order; out [T, C]. tiles[i] = {sequence, first query row, a multiple
// of 128}, counts[2] of them; `scale` is 1 / sqrt(D). Grid (at least the tiles, H), blocks of 128 threads,
// ATTENTION_SHARED_BYTES.
//
//     copy Q, and K and V of step 0
//     for each step over the keys
//         wait for its copies, then for all threads        - the other stage has no reader left
//         start the next step's copies to the other stage
//         scores, mask in the last step, softmax, context  - warps past the sequence's end only copy and wait
//     store
template <bool LOCAL>
__device__ __forceinline__ void attend_tile(
    const u32* __restrict__ counts, const u32* __restrict__ offsets, const uint2* __restrict__ tiles,
    const element* __restrict__ qkv, element* __restrict__ out, float scale, u32 window, unsigned char* shared) {
    if (blockIdx.x >= counts[2]) return;
    const u32 lane = lane_in_warp(), warp = threadIdx.x / 32;
    const u32 sequence = tiles[blockIdx.x].x, first_query = tiles[blockIdx.x].y;
    const u32 start = offsets[sequence], length = offsets[sequence + 1] - start;
    const element* q = qkv + (size_t)start * (3 * C) + blockIdx.y * D;
    const element* k = q + C;
    const element* v = k + C;

    constexpr u32 STAGE_BYTES = KEY_ROWS * ROW_BYTES;
    const u32 q_rows = shared_address(shared);
    const u32 k_stages = q_rows + QUERY_ROWS * ROW_BYTES;
    const u32 v_stages = k_stages + 2 * STAGE_BYTES;

    const KeyRange keys = key_range<LOCAL>(first_query, QUERY_ROWS, length, window);
    copy_rows_async<QUERY_ROWS>(q_rows, q, first_query, length);
    copy_rows_async<KEY_ROWS>(k_stages, k, keys.first, length);
    copy_rows_async<KEY_ROWS>(v_stages, v, keys.first, length);
    cp_async_commit_group();

    Queries<WARP_TILES> queries;
    Context<WARP_TILES> context;
    RowValues<WARP_TILES> maxima, sums, rescales;
    init_softmax<WARP_TILES>(context, maxima, sums);

    const bool has_rows = first_query + warp * WARP_TILES * 16 < length;
    for (u32 first_key = keys.first, stage = 0; first_key < keys.end; first_key += KEY_ROWS, stage ^= 1) {
        cp_async_wait_group<0>();
        __syncthreads();
        const u32 next_key = first_key + KEY_ROWS;
        if (next_key < keys.end) {
            copy_rows_async<KEY_ROWS>(k_stages + (stage ^ 1) * STAGE_BYTES, k, next_key, length);
            copy_rows_async<KEY_ROWS>(v_stages + (stage ^ 1) * STAGE_BYTES, v, next_key, length);
            cp_async_commit_group();
        }
        if (!has_rows) continue;
        if (first_key == keys.first) load_queries<WARP_TILES>(queries, q_rows, warp, lane);
        Scores<WARP_TILES> scores;
        compute_scores<WARP_TILES>(scores, queries, k_stages + stage * STAGE_BYTES, lane);
        if (next_key > length) mask_keys<WARP_TILES>(scores, length - first_key, lane);
        if (LOCAL) mask_window<WARP_TILES>(scores, first_query + warp * WARP_TILES * 16, first_key, window, lane);
        softmax_block<WARP_TILES>(scores, maxima, sums, rescales, scale * LOG2_E);
        rescale_context<WARP_TILES>(context, rescales);
        accumulate_values<WARP_TILES>(context, scores, v_stages + stage * STAGE_BYTES, lane);
    }
    if (!has_rows) return;
    element* tile_out = out + (size_t)(start + first_query) * C + blockIdx.y * D;
    store_context<WARP_TILES>(context, sums, tile_out, length - first_query, warp, lane);
}

extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, D == 32 ? 3 : 2) attention(
    const u32* __restrict__ counts, const u32* __restrict__ offsets, const uint2* __restrict__ tiles,
    const element* __restrict__ qkv, element* __restrict__ out, float scale) {
    DYNAMIC_SHARED(shared);
    attend_tile<false>(counts, offsets, tiles, qkv, out, scale, 0, shared);
}

// Fewer blocks than of `attention` at D = 32, whose registers would not suffice for the masks.
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, 2) attention_local(
    const u32* __restrict__ counts, const u32* __restrict__ offsets, const uint2* __restrict__ tiles,
    const element* __restrict__ qkv, element* __restrict__ out, float scale, u32 window) {
    DYNAMIC_SHARED(shared);
    attend_tile<true>(counts, offsets, tiles, qkv, out, scale, window, shared);
}

#endif // not ELEMENT_F32
