// Attention on Hopper's wgmma, for half precisions and D = 64.
#pragma once

#include "attention.cuh"
#include "wgmma.cuh"

#ifdef HAS_ATTENTION_WGMMA

// Dynamic shared memory of a launch. A block is one warpgroup; it has its queries and two stages of K and V.
constexpr u32 ATTENTION_WGMMA_SHARED_BYTES = WARPGROUP_ROWS * ROW_BYTES + 2 * 2 * KEY_ROWS * ROW_BYTES;
static_assert(ATTENTION_THREADS == 128 && KEY_ROWS == 64 && ROW_BYTES == 128 && 4 * ATTENTION_WGMMA_SHARED_BYTES <= 220 * 1024, "");

// Starts scores = queries k^T as one wgmma group.
__device__ __forceinline__ void start_scores(Scores<1>& scores, u32 q_rows, u32 k_rows) {
    wgmma_m64n64k16<false>(scores[0], wgmma_descriptor(q_rows), wgmma_descriptor(k_rows));
#pragma unroll
    for (u32 depth = 1; depth < HEAD_DEPTH; ++depth) {
        wgmma_m64n64k16<true>(scores[0], wgmma_descriptor(q_rows + depth * 32), wgmma_descriptor(k_rows + depth * 32));
    }
    wgmma_commit_group();
}

// The softmax weights of one step as first operands, 16 keys each.
typedef u32 WeightOperands[KEY_ROWS / 16][4];

// Starts context += weights v as one wgmma group.
__device__ __forceinline__ void start_values(Context<1>& context, const WeightOperands& weights, u32 v_rows) {
#pragma unroll
    for (u32 depth = 0; depth < KEY_ROWS / 16; ++depth) {
        wgmma_m64n64k16(context[0], weights[depth], wgmma_descriptor(v_rows + depth * 16 * ROW_BYTES));
    }
    wgmma_commit_group();
}

// The same parameters as `attention`, but two blocks per tile, 64 queries each: grid (at least twice the tiles, H),
// ATTENTION_WGMMA_SHARED_BYTES.
//
// Differences from `attention`: wgmma reads Q, K and V from shared memory and runs asynchronously, so the softmax of a step overlaps
// with accumulating the values of the step before (FlashAttention-3, section 3.2). V is therefore copied one step later than K.
// The weights of even and odd steps have separate registers: one set is written while the tensor cores read the other. A block
// is one warpgroup and a multiprocessor holds four blocks. They are not synchronized, so some run wgmmas while others compute
// exponentials.
//
//     copy Q, and K of step 0
//     for each step over the keys
//         wait for its copies, then for all threads        - the other stages have no reader left
//         start copying the next step's K and this step's V
//         start the scores and, from step 1 on, accumulating the previous step's values
//         wait for the scores; mask, softmax, pack the weights
//         wait for the context; rescale it
//     wait for the last V, accumulate it, store
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, 4) attention_wgmma(
    const u32* __restrict__ counts, const u32* __restrict__ offsets, const uint2* __restrict__ tiles,
    const element* __restrict__ qkv, element* __restrict__ out, float scale) {
    if (blockIdx.x / 2 >= counts[2]) return;
    DYNAMIC_SHARED(shared);
    const u32 lane = lane_in_warp(), warp = threadIdx.x / 32;
    const uint2 tile = tiles[blockIdx.x / 2];
    const u32 sequence = tile.x, first_query = tile.y + blockIdx.x % 2 * WARPGROUP_ROWS;
    const u32 start = offsets[sequence], length = offsets[sequence + 1] - start;
    if (first_query >= length) return;
    const element* q = qkv + (size_t)start * (3 * C) + blockIdx.y * D;
    const element* k = q + C;
    const element* v = k + C;

    constexpr u32 STAGE_BYTES = KEY_ROWS * ROW_BYTES;
    const u32 q_rows = shared_address(shared);
    const u32 k_stages = q_rows + WARPGROUP_ROWS * ROW_BYTES;
    const u32 v_stages = k_stages + 2 * STAGE_BYTES;

    copy_rows_async<WARPGROUP_ROWS>(q_rows, q, first_query, length);
    copy_rows_async<KEY_ROWS>(k_stages, k, 0, length);
    cp_async_commit_group();

    Context<1> context;
    RowValues<1> maxima, sums, rescales;
    WeightOperands even, odd;
    init_softmax<1>(context, maxima, sums);

    // Waits for the step's copies and starts the next ones.
    const auto begin_step = [&](u32 first_key, u32 stage) {
        cp_async_wait_group<0>();
        fence_proxy_async();
        __syncthreads();
        const u32 next_key = first_key + KEY_ROWS;
        if (next_key < length) {
            copy_rows_async<KEY_ROWS>(k_stages + (stage ^ 1) * STAGE_BYTES, k, next_key, length);
        }
        copy_rows_async<KEY_ROWS>(v_stages + stage * STAGE_BYTES, v, first_key, length);
        cp_async_commit_group();
    };
    // Masks the scores and turns them into packed weights.
    const auto scores_to_weights = [&](Scores<1>& scores, u32 first_key, WeightOperands& weights) {
        if (first_key + KEY_ROWS > length) mask_keys<1>(scores, length - first_key, lane);
        softmax_block<1>(scores, maxima, sums, rescales, scale * LOG2_E);
#pragma unroll
        for (u32 depth = 0; depth < KEY_ROWS / 16; ++depth) {
            pack_weights(weights[depth], scores[0][depth * 2], scores[0][depth * 2 + 1]);
            pin_registers(weights[depth]); // before the wait that follows, to overlap with the wgmmas
        }
    };
    const auto step = [&](u32 first_key, u32 stage, const WeightOperands& last, WeightOperands& weights) {
        begin_step(first_key, stage);
        Scores<1> scores;
        wgmma_fence();
        start_scores(scores, q_rows, k_stages + stage * STAGE_BYTES);
        start_values(context, last, v_stages + (stage ^ 1) * STAGE_BYTES);
        wgmma_wait_group<1>(scores[0]);
        scores_to_weights(scores, first_key, weights);
        const bool never = sums[0][0] + sums[0][1] < 0;
        keep_wait_below(never);
        wgmma_wait_group<0>(context[0]);
#pragma unroll
        for (u32 depth = 0; depth < KEY_ROWS / 16; ++depth) keep_registers_alive(never, last[depth], q_rows);
        rescale_context<1>(context, rescales);
    };

    begin_step(0, 0);
    {
        Scores<1> scores;
        wgmma_fence();
        start_scores(scores, q_rows, k_stages);
        wgmma_wait_group<0>(scores[0]);
        scores_to_weights(scores, 0, even);
    }
    u32 first_key = KEY_ROWS;
    for (; first_key + KEY_ROWS < length; first_key += 2 * KEY_ROWS) {
        step(first_key, 1, even, odd);
        step(first_key + KEY_ROWS, 0, odd, even);
    }
    const bool ends_odd = first_key < length;
    if (ends_odd) step(first_key, 1, even, odd);

    cp_async_wait_group<0>();
    fence_proxy_async();
    __syncthreads();
    wgmma_fence();
    if (ends_odd) {
        start_values(context, odd, v_stages + STAGE_BYTES);
    } else {
        start_values(context, even, v_stages);
    }
    wgmma_wait_group<0>(context[0]);
#pragma unroll
    for (u32 depth = 0; depth < KEY_ROWS / 16; ++depth) {
        keep_registers_alive(sums[0][0] < 0, even[depth], q_rows);
        keep_registers_alive(sums[0][0] < 0, odd[depth], q_rows);
    }
    element* tile_out = out + (size_t)(start + first_query) * C + blockIdx.y * D;
    store_context<1>(context, sums, tile_out, length - first_query, warp, lane);
}

#endif // HAS_ATTENTION_WGMMA
