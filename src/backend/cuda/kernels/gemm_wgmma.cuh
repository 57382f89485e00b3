// GEMM with bias, residual and GELU on Hopper, for half precisions.
#pragma once

#include "elementwise.cuh"
#include "wgmma.cuh"

#ifdef HAS_GEMM_WGMMA

// The output tile of a block, the depth (K) of its tiles of x and W, and the stages of its pipeline.
constexpr u32 GEMM_TILE_ROWS = 2 * WARPGROUP_ROWS;
constexpr u32 GEMM_TILE_COLUMNS = 256;
constexpr u32 GEMM_TILE_DEPTH = WGMMA_ROW_BYTES / sizeof(element);
constexpr u32 GEMM_STAGES = 3;
constexpr u32 GEMM_THREADS = 3 * 128;

constexpr u32 X_TILE_BYTES = GEMM_TILE_ROWS * WGMMA_ROW_BYTES;
constexpr u32 GEMM_STAGE_BYTES = X_TILE_BYTES + GEMM_TILE_COLUMNS * WGMMA_ROW_BYTES;
constexpr u32 SUMS_ROW_BYTES = GEMM_TILE_COLUMNS * sizeof(element);
constexpr u32 WARPGROUP_SUMS_BYTES = WARPGROUP_ROWS * SUMS_ROW_BYTES;

// Layout of shared memory, as offsets: the tiles of x and W of each stage, the sums of each warpgroup, and the mbarriers.
constexpr u32 SUMS_START = GEMM_STAGES * GEMM_STAGE_BYTES;
constexpr u32 FULL_BARRIERS = SUMS_START + 2 * WARPGROUP_SUMS_BYTES;            // per stage: its tiles are complete
constexpr u32 EMPTY_BARRIERS = FULL_BARRIERS + 8 * GEMM_STAGES;                 // per stage: its tiles may be overwritten
constexpr u32 SUMS_READY_BARRIERS = EMPTY_BARRIERS + 8 * GEMM_STAGES;           // per warpgroup: its sums are complete
constexpr u32 SUMS_FREE_BARRIERS = SUMS_READY_BARRIERS + 8 * 2;                 // per warpgroup: its sums may be overwritten
// Dynamic shared memory of a launch.
constexpr u32 GEMM_SHARED_BYTES = SUMS_FREE_BARRIERS + 8 * 2;
static_assert(GEMM_SHARED_BYTES <= 227 * 1024, "");

// The first warpgroup has one producer warp, which issues the TMA copies, and three epilogue warps.
constexpr u32 EPILOGUE_WARPS = 3;
constexpr u32 EPILOGUE_UNROLL = 4;

// The next stage, and the phase parity of its mbarriers.
struct PipelineStage {
    u32 index = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++index == GEMM_STAGES) {
            index = 0;
            parity ^= 1;
        }
    }
};

// The byte offset of a chunk of 16 bytes in a warpgroup's sums. Chunks are swizzled by row, so that the same chunk of eight rows is
// in different banks.
__device__ __forceinline__ u32 sums_offset(u32 row, u32 chunk) { return row * SUMS_ROW_BYTES + (chunk ^ row % 8) * 16; }

// out = function(sums + bias (+ residual)) for ROWS rows of a warpgroup, every EPILOGUE_WARPS-th from `first` on. A lane processes
// the same eight columns of each. `residual` and `out` point to the warpgroup's first row at the lane's columns.
template <typename Function, bool RESIDUAL, u32 ROWS>
__device__ __forceinline__ void epilogue_unrolled(
    const unsigned char* sums, const Vec8& bias, const element* residual, element* out, u32 outputs, u32 first, u32 lane) {
    Vec8 vecs[ROWS], others[ROWS];
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i) {
        const u32 row = first + i * EPILOGUE_WARPS;
        vecs[i] = load_vec8(reinterpret_cast<const element*>(sums + sums_offset(row, lane)));
        if constexpr (RESIDUAL) others[i] = load_vec8(residual + (size_t)row * outputs);
    }
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i) {
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            float x = vecs[i].values[j] + bias.values[j];
            if constexpr (RESIDUAL) x += others[i].values[j];
            vecs[i].values[j] = Function::of(x);
        }
    }
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i) store_vec8(out + (size_t)(first + i * EPILOGUE_WARPS) * outputs, vecs[i]);
}

// The same for all rows of an epilogue warp, EPILOGUE_UNROLL at a time to overlap their latencies.
template <typename Function, bool RESIDUAL>
__device__ __forceinline__ void epilogue_rows(
    const unsigned char* sums, const Vec8& bias, const element* residual, element* out, u32 outputs, u32 row, u32 lane) {
    for (; row + (EPILOGUE_UNROLL - 1) * EPILOGUE_WARPS < WARPGROUP_ROWS; row += EPILOGUE_UNROLL * EPILOGUE_WARPS) {
        epilogue_unrolled<Function, RESIDUAL, EPILOGUE_UNROLL>(sums, bias, residual, out, outputs, row, lane);
    }
    for (; row < WARPGROUP_ROWS; row += EPILOGUE_WARPS) {
        epilogue_unrolled<Function, RESIDUAL, 1>(sums, bias, residual, out, outputs, row, lane);
    }
}

// out = function(x W^T + bias (+ residual)). The sums are rounded to the element type before the bias is added.
//
// x [rows, inputs] with TMA boxes of GEMM_TILE_ROWS x GEMM_TILE_DEPTH; W [outputs, inputs] with boxes of GEMM_TILE_COLUMNS x
// GEMM_TILE_DEPTH; bias [outputs]; out [rows, outputs]; residual [rows, outputs], null, or equal to `out`. `rows` is a multiple of
// GEMM_TILE_ROWS, `outputs` of GEMM_TILE_COLUMNS, `inputs` of GEMM_TILE_DEPTH. `function` is 0 (erf GELU, without residual) or 3
// (identity). Any grid size, blocks of GEMM_THREADS threads, GEMM_SHARED_BYTES.
//
// Persistent and warp-specialized, as CUTLASS's kernels for sm_90. Blocks take tiles in turn; consecutive blocks take tiles of the
// same rows. Two consumer warpgroups run wgmmas, 64 rows each. A producer warp issues TMA copies as stages become free, also for
// the next tile. Three epilogue warps (not in CUTLASS) turn finished sums into output while the tensor cores compute the next
// tile, which hides the cost of the epilogue.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) gemm_wgmma(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const element* __restrict__ bias,
    const element* residual, element* out, u32 rows, u32 outputs, u32 inputs, u32 function) {
    DYNAMIC_SHARED(shared);
    const u32 lane = lane_in_warp(), warp = threadIdx.x / 32 % 4;
    // A shuffle, so that the compiler knows it to be uniform across the warp: wgmma descriptors must be.
    const u32 warpgroup = __shfl_sync(WHOLE_WARP, threadIdx.x / 128, 0);
    const u32 place = shared_address(shared);
    const u32 tiles_across = outputs / GEMM_TILE_COLUMNS, tiles = rows / GEMM_TILE_ROWS * tiles_across;
    const u32 steps = inputs / GEMM_TILE_DEPTH;

    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < GEMM_STAGES; ++stage) {
            mbarrier_init(place + FULL_BARRIERS + 8 * stage, 1);
            mbarrier_init(place + EMPTY_BARRIERS + 8 * stage, 8); // one arrival per consumer warp
        }
        for (u32 half = 0; half < 2; ++half) {
            mbarrier_init(place + SUMS_READY_BARRIERS + 8 * half, 4);
            mbarrier_init(place + SUMS_FREE_BARRIERS + 8 * half, EPILOGUE_WARPS);
        }
        fence_mbarrier_init();
    }
    __syncthreads();

    if (warpgroup > 0) {
        setmaxnreg_inc<200>();
        const u32 half = warpgroup - 1;
        unsigned char* warpgroup_sums = shared + SUMS_START + half * WARPGROUP_SUMS_BYTES;
        PipelineStage stage;
        u32 free_parity = 1; // the buffer of the sums starts out free
        for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x, free_parity ^= 1) {
            float sums[GEMM_TILE_COLUMNS / 8][4];
            u32 last = 0;
            for (u32 step = 0; step < steps; ++step) {
                mbarrier_wait_parity(place + FULL_BARRIERS + 8 * stage.index, stage.parity);
                const u32 stage_start = place + stage.index * GEMM_STAGE_BYTES;
                const u32 x_rows = stage_start + half * WARPGROUP_ROWS * WGMMA_ROW_BYTES, w_rows = stage_start + X_TILE_BYTES;
                wgmma_fence();
#pragma unroll
                for (u32 depth = 0; depth < GEMM_TILE_DEPTH / 16; ++depth) {
                    const bool add = step > 0 || depth > 0;
                    wgmma_m64n256k16(sums, wgmma_descriptor(x_rows + depth * 32), wgmma_descriptor(w_rows + depth * 32), add);
                }
                wgmma_commit_group();
                if (step > 0) {
                    wgmma_wait_group<1>();
                    if (lane == 0) mbarrier_arrive(place + EMPTY_BARRIERS + 8 * last);
                }
                last = stage.index;
                stage.advance();
            }
            wgmma_wait_group<0>(sums);
            if (lane == 0) mbarrier_arrive(place + EMPTY_BARRIERS + 8 * last);

            mbarrier_wait_parity(place + SUMS_FREE_BARRIERS + 8 * half, free_parity);
            const u32 row = warp * 16 + lane / 4;
#pragma unroll
            for (u32 block = 0; block < GEMM_TILE_COLUMNS / 8; ++block) {
                const u32 pair = lane % 4 * 4;
                *reinterpret_cast<u32*>(warpgroup_sums + sums_offset(row, block) + pair) = pack_pair(sums[block][0], sums[block][1]);
                *reinterpret_cast<u32*>(warpgroup_sums + sums_offset(row + 8, block) + pair) = pack_pair(sums[block][2], sums[block][3]);
            }
            __syncwarp();
            if (lane == 0) mbarrier_arrive(place + SUMS_READY_BARRIERS + 8 * half);
        }
    } else {
        setmaxnreg_dec<104>();
        if (warp == 0) {
            if (lane > 0) return;
            PipelineStage stage;
            for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const u32 first_row = tile / tiles_across * GEMM_TILE_ROWS, first_column = tile % tiles_across * GEMM_TILE_COLUMNS;
                for (u32 step = 0; step < steps; ++step, stage.advance()) {
                    mbarrier_wait_parity(place + EMPTY_BARRIERS + 8 * stage.index, stage.parity ^ 1);
                    const u32 full = place + FULL_BARRIERS + 8 * stage.index, stage_start = place + stage.index * GEMM_STAGE_BYTES;
                    mbarrier_arrive_expect_tx(full, GEMM_STAGE_BYTES);
                    tma_load_2d(stage_start, x_map, first_row, step * GEMM_TILE_DEPTH, full);
                    tma_load_2d(stage_start + X_TILE_BYTES, w_map, first_column, step * GEMM_TILE_DEPTH, full);
                }
            }
            return;
        }
        u32 ready_parity = 0;
        for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x, ready_parity ^= 1) {
            const u32 first_row = tile / tiles_across * GEMM_TILE_ROWS;
            const u32 column = tile % tiles_across * GEMM_TILE_COLUMNS + lane * 8;
            const Vec8 biases = load_vec8(bias + column);
            for (u32 half = 0; half < 2; ++half) {
                mbarrier_wait_parity(place + SUMS_READY_BARRIERS + 8 * half, ready_parity);
                const unsigned char* sums = shared + SUMS_START + half * WARPGROUP_SUMS_BYTES;
                const size_t at = (size_t)(first_row + half * WARPGROUP_ROWS) * outputs + column;
                if (function == 0) {
                    epilogue_rows<GeluErf, false>(sums, biases, nullptr, out + at, outputs, warp - 1, lane);
                } else if (residual) {
                    epilogue_rows<Identity, true>(sums, biases, residual + at, out + at, outputs, warp - 1, lane);
                } else {
                    epilogue_rows<Identity, false>(sums, biases, nullptr, out + at, outputs, warp - 1, lane);
                }
                __syncwarp();
                if (lane == 0) mbarrier_arrive(place + SUMS_FREE_BARRIERS + 8 * half);
            }
        }
    }
}

#endif // HAS_GEMM_WGMMA
