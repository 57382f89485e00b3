// The CUDA backend's own kernels: all that is not a matrix product, and on Hopper some that are.
//
// The file includes nothing, so that NVRTC compiles it at start-up with no include path. The host gives these options:
//   one of -DELEMENT_F16, -DELEMENT_BF16, -DELEMENT_F32   the working type `element` of activations and tables
//   or -DELEMENT_FP8                                       f16, and what products multiply is e4m3; from sm_89 on
//   -DHIDDEN_SIZE=<C>                                      a multiple of 8
//   -DHEAD_SIZE=<D>                                        32 or 64
//
// Letters: T tokens of a batch, S its sequences, C hidden size, H heads, D head size. Buffers are row-major and start at
// a multiple of 16 bytes. How many rows there are is read from device memory, not passed by value: a captured graph is
// then replayed for a batch of another size (products take a buffer's rounded rows, which a graph is for). `counts` is {T, S, attention tiles}; `offsets` is [S + 1], the rows of
// sequence s being offsets[s] .. offsets[s + 1], at least one.
//
// Every sum is in f32 and in an order that depends on its own row or sequence alone: a pair scores the same bits whatever
// is beside it in the batch.
//
// tests/cuda/emulator.h runs this very text on a CPU. It replaces the section "The machine" and nothing else.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
// One sign, four bits of exponent, three of fraction: 448 at most, and steps of 2^-9 below 2^-6. No infinity.
typedef unsigned char e4m3;

#ifdef ELEMENT_FP8
#ifndef ELEMENT_F16
#define ELEMENT_F16
#endif
constexpr bool PRODUCTS_OF_E4M3 = true;
#else
constexpr bool PRODUCTS_OF_E4M3 = false;
#endif

#if defined(ELEMENT_F32)
typedef float element;
#elif defined(ELEMENT_F16) || defined(ELEMENT_BF16)
typedef u16 element;
#else
#error "define one of ELEMENT_F16, ELEMENT_BF16, ELEMENT_F32, ELEMENT_FP8"
#endif

constexpr u32 C = HIDDEN_SIZE;
constexpr u32 D = HEAD_SIZE;
static_assert(C % 8 == 0, "rows are read eight elements at a time");
static_assert(D == 32 || D == 64, "the attention kernels are laid out for these head sizes");

// Compiled for sm_90a itself, Hopper has products of a whole warpgroup; `attention_wgmma` is then there beside `attention`, and
// `gemm_wgmma`.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(ELEMENT_F32)
#if HEAD_SIZE == 64
#define HAS_ATTENTION_WGMMA
#endif
#ifndef ELEMENT_FP8
#define HAS_PRODUCT_WGMMA
#endif
#endif
#if defined(HAS_ATTENTION_WGMMA) || defined(HAS_PRODUCT_WGMMA)
#define HAS_WGMMA
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The machine: every instruction that C++ has no word for. An address in shared memory is a u32, as PTX has it.
// ---------------------------------------------------------------------------------------------------------------------
#ifndef EMULATED

// A matrix in the device's memory as the copy engine knows it, made by the driver (cuTensorMapEncodeTiled).
struct alignas(64) TensorMap {
    u64 words[16];
};

// At a multiple of 1024 bytes: eight rows of 128, over which the swizzle of wgmma's operands repeats.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

// 2^x, to 2 units in the last place; 0 far below zero.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, to 1 unit in the last place; 0 of infinity.
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two e4m3, each rounded to the nearest and to 448 at most: `low` in the lower byte, so first in memory. From sm_89 on.
__device__ __forceinline__ u32 packed_e4m3(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

#ifndef ELEMENT_F32

#ifdef ELEMENT_BF16
#define ELEMENT_PTX "bf16"
__device__ __forceinline__ float widened(u16 x) { return __uint_as_float((u32)x << 16); }
#else
#define ELEMENT_PTX "f16"
__device__ __forceinline__ float widened(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
#endif

// Two elements in a register, each rounded to the nearest: `low` in the lower half, so first in memory.
__device__ __forceinline__ u32 packed(float low, float high) {
    u32 pair;
    asm("cvt.rn." ELEMENT_PTX "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// Starts the copy of 16 bytes into shared memory: `bytes` of them (0 or 16) from `from`, the others zero.
__device__ __forceinline__ void copy_async(u32 to, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Closes the group of this thread's copies started since the last group.
__device__ __forceinline__ void close_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the NEWEST groups of this thread are still under way. Says nothing about other threads' copies.
template <u32 NEWEST>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
}

// Four 8x8 matrices, one a register. Lane i gives the address of row i % 8 of matrix i / 8; it receives, of each matrix,
// the elements 2 * (lane % 4) and the next of row lane / 4.
__device__ __forceinline__ void load_matrices(u32 (&matrices)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(row)
                 : "memory");
}

// The same, but each matrix transposed on the way.
__device__ __forceinline__ void load_matrices_transposed(u32 (&matrices)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(row)
                 : "memory");
}

// sums [16, 8] += a [16, 16] * b [16, 8], over the warp. A lane holds of `sums` the columns 2 * (lane % 4) and the next,
// in row lane / 4 (values 0, 1) and in the row 8 below (values 2, 3).
__device__ __forceinline__ void multiply_add(float (&sums)[4], const u32 (&a)[4], u32 b_upper, u32 b_lower) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT_PTX "." ELEMENT_PTX
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_upper), "r"(b_lower));
}

#ifdef HAS_WGMMA

// What this thread's finished copies wrote, wgmma may read: it goes through another proxy, which a barrier alone does not order.
__device__ __forceinline__ void show_copies_to_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before a wgmma whose registers anything but a wgmma has touched.
__device__ __forceinline__ void show_registers_to_wgmma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The registers of sums [64, 64] and [64, 256] as an instruction's operands, from 0 on.
#define SUMS_OF(i) "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])
#define SUMS_OF_4(i) SUMS_OF(i), SUMS_OF(i + 1), SUMS_OF(i + 2), SUMS_OF(i + 3)
#define SUMS_OPERANDS SUMS_OF_4(0), SUMS_OF_4(4)
#define WIDE_SUMS_OPERANDS \
    SUMS_OF_4(0), SUMS_OF_4(4), SUMS_OF_4(8), SUMS_OF_4(12), SUMS_OF_4(16), SUMS_OF_4(20), SUMS_OF_4(24), SUMS_OF_4(28)
#define SUMS_NAMES \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define WIDE_SUMS_NAMES \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

// Starts sums [64, 64] = a [64, 16] * b [16, 64], or += where `ADD`, over the warpgroup: four warps from a multiple of four on,
// 16 rows each, of which a lane holds what it does in multiply_add. `a` and `b` describe shared memory, whose rows are of M and of
// N. Until a wait, `sums` is the tensor cores', and nobody may write those rows.
template <bool ADD>
__device__ __forceinline__ void multiply_add_async(float (&sums)[8][4], u64 a, u64 b) {
    asm volatile("{\n"
                 ".reg .pred add;\n"
                 "setp.ne.b32 add, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT_PTX "." ELEMENT_PTX " " SUMS_NAMES
                 ", %32, %33, add, 1, 1, 0, 0;\n"
                 "}"
                 : SUMS_OPERANDS
                 : "l"(a), "l"(b), "n"(ADD)
                 : "memory");
}

// sums += a * b in the same way, but `a` is in registers, where a lane has it as in multiply_add, and the rows of `b` are of K.
// Until a wait, `a` may not be written either.
__device__ __forceinline__ void multiply_add_async(float (&sums)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT_PTX "." ELEMENT_PTX " " SUMS_NAMES
                 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : SUMS_OPERANDS
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}

// The same over 256 columns: sums [64, 256] = a [64, 16] * b [16, 256], or += where `add`.
__device__ __forceinline__ void multiply_add_async(float (&sums)[32][4], u64 a, u64 b, bool add) {
    asm volatile("{\n"
                 ".reg .pred add;\n"
                 "setp.ne.b32 add, %130, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32." ELEMENT_PTX "." ELEMENT_PTX " " WIDE_SUMS_NAMES
                 ", %128, %129, add, 1, 1, 0, 0;\n"
                 "}"
                 : WIDE_SUMS_OPERANDS
                 : "l"(a), "l"(b), "r"((u32)add)
                 : "memory");
}

// Closes the group of the wgmmas started since the last group; it may be empty.
__device__ __forceinline__ void close_wgmma_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the NEWEST groups are still under way; `sums`, of an older one, is then this thread's again.
template <u32 NEWEST>
__device__ __forceinline__ void wait_for_wgmma(float (&sums)[8][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %32;" : SUMS_OPERANDS : "n"(NEWEST) : "memory");
}

template <u32 NEWEST>
__device__ __forceinline__ void wait_for_wgmma(float (&sums)[32][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %128;" : WIDE_SUMS_OPERANDS : "n"(NEWEST) : "memory");
}

// Waits until at most the NEWEST groups are still under way, of sums that all of them add to: they stay the tensor cores'.
template <u32 NEWEST>
__device__ __forceinline__ void wait_for_wgmma() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(NEWEST) : "memory");
}

// A barrier in shared memory, 8 bytes. Its phases end one after another, each when `arrivals` have come, and all the bytes that
// arrivals announced.
__device__ __forceinline__ void start_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// What this thread has started, the copy engine may use, and after a __syncthreads every other thread.
__device__ __forceinline__ void show_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_announcing(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the barrier's current phase if its number is even and `parity` 0, or odd and 1; else that is long past.
__device__ __forceinline__ void wait_for_phase(u32 barrier, u32 parity) {
    asm volatile("{\n"
                 ".reg .pred ended;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
                 "@!ended bra again;\n"
                 "}" ::"r"(barrier), "r"(parity)
                 : "memory");
}

// Starts the copy of the map's box at `row` and `column` to shared memory, swizzled as operands of wgmma are, which need no fence
// to see it. Its bytes are what the barrier's arrivals announced.
__device__ __forceinline__ void copy_box_async(u32 to, const TensorMap& map, u32 row, u32 column, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(&map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

// Changes how many registers each thread of this warpgroup has; all its warps do it.
template <u32 REGISTERS>
__device__ __forceinline__ void give_registers_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <u32 REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// For the compiler: a wait that follows stays behind what `never`, which is false, is computed from. ptxas moves waits up as far as
// it may, to before the very work that is to be done meanwhile, but not over a branch.
__device__ __forceinline__ void hold_back_wait(bool never) {
    if (never) asm volatile("nanosleep.u32 1;");
}

// For the compiler, which takes the registers of an `a` for free as soon as its product has started: they are in use until here,
// as they were to be written to shared memory at `place` if `never` were true.
__device__ __forceinline__ void keep_registers(bool never, const u32 (&a)[4], u32 place) {
    if (never) {
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
    }
}

// For the compiler: these values are computed before this line.
__device__ __forceinline__ void pin(u32 (&values)[4]) {
    asm volatile("" : "+r"(values[0]), "+r"(values[1]), "+r"(values[2]), "+r"(values[3]));
}

#endif // HAS_WGMMA

#endif // not ELEMENT_F32
#endif // not EMULATED

// ---------------------------------------------------------------------------------------------------------------------
// Octets: eight neighbouring elements as floats, the grain in which rows are read and written.
// ---------------------------------------------------------------------------------------------------------------------

struct Octet {
    float values[8];
};

__device__ __forceinline__ Octet load_octet(const float* __restrict__ from) {
    const float4 a = reinterpret_cast<const float4*>(from)[0];
    const float4 b = reinterpret_cast<const float4*>(from)[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

__device__ __forceinline__ void store_octet(float* to, const Octet& x) {
    const float* v = x.values;
    reinterpret_cast<float4*>(to)[0] = {v[0], v[1], v[2], v[3]};
    reinterpret_cast<float4*>(to)[1] = {v[4], v[5], v[6], v[7]};
}

#ifdef ELEMENT_F32
__device__ __forceinline__ float widened(float x) { return x; }
#else
__device__ __forceinline__ Octet load_octet(const u16* __restrict__ from) {
    const uint4 pairs = *reinterpret_cast<const uint4*>(from);
    return {{widened((u16)pairs.x), widened((u16)(pairs.x >> 16)), widened((u16)pairs.y), widened((u16)(pairs.y >> 16)),
             widened((u16)pairs.z), widened((u16)(pairs.z >> 16)), widened((u16)pairs.w), widened((u16)(pairs.w >> 16))}};
}

__device__ __forceinline__ void store_octet(u16* to, const Octet& x) {
    const float* v = x.values;
    *reinterpret_cast<uint4*>(to) = {packed(v[0], v[1]), packed(v[2], v[3]), packed(v[4], v[5]), packed(v[6], v[7])};
}
#endif

// scale x, for a product.
__device__ __forceinline__ void store_octet(e4m3* to, const Octet& x, float scale) {
    float v[8];
#pragma unroll
    for (u32 j = 0; j < 8; ++j) v[j] = x.values[j] * scale;
    *reinterpret_cast<uint2*>(to) = {packed_e4m3(v[0], v[1]) | packed_e4m3(v[2], v[3]) << 16,
                                     packed_e4m3(v[4], v[5]) | packed_e4m3(v[6], v[7]) << 16};
}

// ---------------------------------------------------------------------------------------------------------------------
// Warps
// ---------------------------------------------------------------------------------------------------------------------

constexpr u32 WHOLE_WARP = 0xffffffff;

// The sum over the warp's lanes, the same bits in each.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, distance);
    return x;
}

__device__ __forceinline__ u32 warp_in_grid() { return (blockIdx.x * blockDim.x + threadIdx.x) / 32; }
__device__ __forceinline__ u32 warps_in_grid() { return gridDim.x * blockDim.x / 32; }
__device__ __forceinline__ u32 lane_in_warp() { return threadIdx.x % 32; }

// A row of C elements dealt to a warp: lane l holds the octets l, l + 32, l + 64, ..., and some lanes one fewer than others
// where C is no multiple of 256.
constexpr u32 ROW_OCTETS = C / 8;
constexpr u32 LANE_OCTETS = (ROW_OCTETS + 31) / 32;

struct Row {
    Octet octets[LANE_OCTETS];
};

__device__ __forceinline__ u32 octet_of(u32 index, u32 lane) { return index * 32 + lane; }
__device__ __forceinline__ bool lane_has(u32 index, u32 lane) {
    return ROW_OCTETS % 32 == 0 || octet_of(index, lane) < ROW_OCTETS;
}

// ---------------------------------------------------------------------------------------------------------------------
// Norms
// ---------------------------------------------------------------------------------------------------------------------

// Where normed rows go: to `out`, and where products are of e4m3 also to `operand`, times `scale`. Both are [rows, C].
struct Normed {
    element* out;
    e4m3* operand;
    float scale;
};

// (row - mean) / sqrt(variance + eps) * weight + bias into row `r` of `to`, by one warp. The variance is that of the
// differences from the mean, taken in registers: no cancellation. `weight` and `bias` are [C].
__device__ __forceinline__ void store_normed(
    const Row& row, const float* __restrict__ weight, const float* __restrict__ bias, float eps, const Normed& to, u32 r,
    u32 lane) {
    float sum = 0;
#pragma unroll
    for (u32 i = 0; i < LANE_OCTETS; ++i) {
        if (!lane_has(i, lane)) continue;
#pragma unroll
        for (u32 j = 0; j < 8; ++j) sum += row.octets[i].values[j];
    }
    const float mean = warp_sum(sum) / C;

    float squares = 0;
#pragma unroll
    for (u32 i = 0; i < LANE_OCTETS; ++i) {
        if (!lane_has(i, lane)) continue;
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            const float difference = row.octets[i].values[j] - mean;
            squares += difference * difference;
        }
    }
    const float scale = rsqrtf(warp_sum(squares) / C + eps);

#pragma unroll
    for (u32 i = 0; i < LANE_OCTETS; ++i) {
        if (!lane_has(i, lane)) continue;
        const u32 column = octet_of(i, lane) * 8;
        const Octet weights = load_octet(weight + column), biases = load_octet(bias + column);
        Octet normed;
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            normed.values[j] = (row.octets[i].values[j] - mean) * scale * weights.values[j] + biases.values[j];
        }
        store_octet(to.out + (size_t)r * C + column, normed);
        if constexpr (PRODUCTS_OF_E4M3) store_octet(to.operand + (size_t)r * C + column, normed, to.scale);
    }
}

// out[t] = norm(words[ids[t]] + type_table[types[t]] + position_table[positions[t]]) for each of T tokens.
//
// ids, types, positions [T], all within their tables; words [vocabulary, C], position_table [positions, C], type_table
// [types, C]; weight, bias [C]; out [T, C], and operand as in Normed. Blocks of 256, a warp a row, any grid.
extern "C" __global__ void __launch_bounds__(256, 2) embed_norm(
    const u32* __restrict__ counts, const u32* __restrict__ ids, const u32* __restrict__ types,
    const u32* __restrict__ positions, const element* __restrict__ words, const element* __restrict__ position_table,
    const element* __restrict__ type_table, const float* __restrict__ weight, const float* __restrict__ bias, float eps,
    element* __restrict__ out, e4m3* __restrict__ operand, float scale) {
    const u32 lane = lane_in_warp(), tokens = counts[0];
    for (u32 token = warp_in_grid(); token < tokens; token += warps_in_grid()) {
        const element* word = words + (size_t)ids[token] * C;
        const element* type = type_table + (size_t)types[token] * C;
        const element* position = position_table + (size_t)positions[token] * C;
        Row row;
#pragma unroll
        for (u32 i = 0; i < LANE_OCTETS; ++i) {
            if (!lane_has(i, lane)) continue;
            const u32 column = octet_of(i, lane) * 8;
            const Octet a = load_octet(word + column), b = load_octet(type + column), c = load_octet(position + column);
#pragma unroll
            for (u32 j = 0; j < 8; ++j) row.octets[i].values[j] = a.values[j] + b.values[j] + c.values[j];
        }
        store_normed(row, weight, bias, eps, {out, operand, scale}, token, lane);
    }
}

// out[r] = norm(x[r]) for each of `*rows` rows. x, out [rows, C], and out may be x; weight, bias [C]; operand as in Normed.
// Blocks of 256, a warp a row, any grid.
extern "C" __global__ void __launch_bounds__(256, 2) layer_norm(
    const u32* __restrict__ rows, const element* x, const float* __restrict__ weight, const float* __restrict__ bias,
    float eps, element* out, e4m3* __restrict__ operand, float scale) {
    const u32 lane = lane_in_warp(), end = *rows;
    for (u32 r = warp_in_grid(); r < end; r += warps_in_grid()) {
        Row row;
#pragma unroll
        for (u32 i = 0; i < LANE_OCTETS; ++i) {
            if (lane_has(i, lane)) row.octets[i] = load_octet(x + (size_t)r * C + octet_of(i, lane) * 8);
        }
        store_normed(row, weight, bias, eps, {out, operand, scale}, r, lane);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention of every token to its own sequence
// ---------------------------------------------------------------------------------------------------------------------

// A block takes one tile: QUERY_ROWS queries of one sequence and head, and goes over all of the sequence's keys, KEY_ROWS a
// step. Both are counted from the sequence's own start.
constexpr u32 QUERY_ROWS = 128;
constexpr u32 KEY_ROWS = 64;
constexpr u32 ATTENTION_THREADS = 128;

// What the host asks for at launch: Q, and two stages of K and V. 768 D bytes; at D = 64 just the 48 KiB that need no
// opt-in. The f32 kernel needs less and is launched with the same.
constexpr u32 ATTENTION_SHARED_BYTES = QUERY_ROWS * D * 2 + 2 * 2 * KEY_ROWS * D * 2;
static_assert(2 * KEY_ROWS * D * sizeof(float) <= ATTENTION_SHARED_BYTES && ATTENTION_SHARED_BYTES <= 48 * 1024, "");

// The score of a key that is not there. Finite, so that no difference of two scores is inf - inf.
constexpr float NO_KEY = -1e30f;
// exp(x) = 2^(LOG2_E x)
constexpr float LOG2_E = 1.4426950408889634f;

#ifndef ELEMENT_F32

// Rows of D elements in shared memory, in chunks of 16 bytes. A chunk's place within its row depends on the row, so that the
// eight rows that ldmatrix reads at once lie in different banks: at D = 64 a row has all 32 banks, at D = 32 two rows do.
constexpr u32 ROW_CHUNKS = D / 8;
constexpr u32 ROW_BYTES = D * 2;
__device__ __forceinline__ u32 chunk_address(u32 rows, u32 row, u32 chunk) {
    const u32 turn = D == 64 ? row % 8 : row / 2 % 4;
    return rows + row * ROW_BYTES + (chunk ^ turn) * 16;
}

// Starts copying rows first .. first + ROWS of `from`, rows of 3C elements of which D are wanted, to shared memory. Rows at
// `length` and beyond are not read and become zero. By a block of ATTENTION_THREADS, each with one chunk of every so many rows.
template <u32 ROWS>
__device__ __forceinline__ void copy_rows_async(u32 to, const element* __restrict__ from, u32 first, u32 length) {
    constexpr u32 ROWS_AT_ONCE = ATTENTION_THREADS / ROW_CHUNKS;
    static_assert(ROWS_AT_ONCE % 8 == 0, "a chunk's turn is the same in all rows of a thread");
    const u32 row = threadIdx.x / ROW_CHUNKS, chunk = threadIdx.x % ROW_CHUNKS;
    const u32 place = chunk_address(to, row, chunk);
    const element* rows = from + chunk * 8;
    if (first + ROWS <= length) { // all but the last step: constant distances from one address
        const element* source = rows + (size_t)(first + row) * (3 * C);
#pragma unroll
        for (u32 i = 0; i < ROWS / ROWS_AT_ONCE; ++i) {
            copy_async(place + i * ROWS_AT_ONCE * ROW_BYTES, source + (size_t)i * ROWS_AT_ONCE * (3 * C), 16);
        }
        return;
    }
#pragma unroll
    for (u32 i = 0; i < ROWS / ROWS_AT_ONCE; ++i) {
        const u32 wanted = first + i * ROWS_AT_ONCE + row;
        const u32 source = wanted < length ? wanted : length - 1;
        copy_async(place + i * ROWS_AT_ONCE * ROW_BYTES, rows + (size_t)source * (3 * C), wanted < length ? 16 : 0);
    }
}

// A warp's registers: tiles of 16 queries, two here and one in `attention_wgmma`, and for each tile blocks of 8 columns as
// multiply_add lays them out. A lane sees two rows of a tile: lane / 4, and 8 below.
constexpr u32 WARP_TILES = QUERY_ROWS / (ATTENTION_THREADS / 32) / 16;
constexpr u32 KEY_BLOCKS = KEY_ROWS / 8;
constexpr u32 HEAD_BLOCKS = D / 8;
constexpr u32 HEAD_DEPTH = D / 16; // multiply_add steps over D
template <u32 TILES>
using Queries = u32[TILES][HEAD_DEPTH][4];
template <u32 TILES>
using Scores = float[TILES][KEY_BLOCKS][4];
template <u32 TILES>
using Context = float[TILES][HEAD_BLOCKS][4];
template <u32 TILES>
using RowValues = float[TILES][2];

// This warp's rows of Q, from shared memory.
template <u32 TILES>
__device__ __forceinline__ void load_queries(Queries<TILES>& queries, u32 q_rows, u32 warp, u32 lane) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (u32 depth = 0; depth < HEAD_DEPTH; ++depth) {
            const u32 row = (warp * TILES + tile) * 16 + lane % 16;
            load_matrices(queries[tile][depth], chunk_address(q_rows, row, depth * 2 + lane / 16));
        }
}

// scores = queries k^T for one step's keys.
template <u32 TILES>
__device__ __forceinline__ void score_keys(Scores<TILES>& scores, const Queries<TILES>& queries, u32 k_rows, u32 lane) {
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
            u32 keys[4]; // two blocks of 8 keys, each 16 deep
            const u32 row = block * 8 + lane / 16 * 8 + lane % 8;
            load_matrices(keys, chunk_address(k_rows, row, depth * 2 + lane / 8 % 2));
#pragma unroll
            for (u32 tile = 0; tile < TILES; ++tile) {
                multiply_add(scores[tile][block], queries[tile][depth], keys[0], keys[1]);
                multiply_add(scores[tile][block + 1], queries[tile][depth], keys[2], keys[3]);
            }
        }
}

// Takes the keys from `present` on out of a step's scores.
template <u32 TILES>
__device__ __forceinline__ void mask_keys(Scores<TILES>& scores, u32 present, u32 lane) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (u32 block = 0; block < KEY_BLOCKS; ++block)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 key = block * 8 + lane % 4 * 2 + i % 2;
                if (key >= present) scores[tile][block][i] = NO_KEY;
            }
}

// One step of the online softmax. Scores become weights relative to the highest score so far; `sums`, this lane's share of a
// row until the end, is scaled down where it was relative to a lower maximum, by what goes to `rescales`.
template <u32 TILES>
__device__ __forceinline__ void soften(
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
            const float rescale = rescales[tile][half] = exp2_fast((maxima[tile][half] - highest) * scale);
            const float shift = highest * scale;
            maxima[tile][half] = highest;

            float sum = 0;
#pragma unroll
            for (u32 block = 0; block < KEY_BLOCKS; ++block) {
                float* pair = &scores[tile][block][half * 2];
                pair[0] = exp2_fast(pair[0] * scale - shift);
                pair[1] = exp2_fast(pair[1] * scale - shift);
                sum += pair[0] + pair[1];
            }
            sums[tile][half] = sums[tile][half] * rescale + sum;
        }
}

// No key yet.
template <u32 TILES>
__device__ __forceinline__ void begin_softmax(Context<TILES>& context, RowValues<TILES>& maxima, RowValues<TILES>& sums) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile) {
        maxima[tile][0] = maxima[tile][1] = NO_KEY;
        sums[tile][0] = sums[tile][1] = 0;
#pragma unroll
        for (u32 block = 0; block < HEAD_BLOCKS; ++block)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) context[tile][block][i] = 0;
    }
}

// Scales down a context that is relative to a lower maximum.
template <u32 TILES>
__device__ __forceinline__ void rescale_rows(Context<TILES>& context, const RowValues<TILES>& rescales) {
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (u32 block = 0; block < HEAD_BLOCKS; ++block)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) context[tile][block][i] *= rescales[tile][i / 2];
}

// The weights of 16 keys, two blocks as multiply_add left them. They are in just the lanes where it wants its first operand.
__device__ __forceinline__ void pack_weights(u32 (&operand)[4], const float (&left)[4], const float (&right)[4]) {
    operand[0] = packed(left[0], left[1]);
    operand[1] = packed(left[2], left[3]);
    operand[2] = packed(right[0], right[1]);
    operand[3] = packed(right[2], right[3]);
}

// context += weights v for one step's values.
template <u32 TILES>
__device__ __forceinline__ void add_values(Context<TILES>& context, const Scores<TILES>& weights, u32 v_rows, u32 lane) {
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
            load_matrices_transposed(values, chunk_address(v_rows, row, block + lane / 16));
#pragma unroll
            for (u32 tile = 0; tile < TILES; ++tile) {
                multiply_add(context[tile][block], operand[tile], values[0], values[1]);
                multiply_add(context[tile][block + 1], operand[tile], values[2], values[3]);
            }
        }
    }
}

// Divides by the sums and stores the rows that the sequence has. `out` is the tile's first row, at the head's columns.
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
                *reinterpret_cast<u32*>(columns + block * 8) = packed(pair[0] * inverse, pair[1] * inverse);
            }
        }
}

// out = softmax(scale Q K^T) V within each sequence and head.
//
// qkv [T, 3C]: Q, K and V, each head after head; out [T, C]. tiles[i] = {sequence, its first query row, a multiple of 128},
// counts[2] of them; `scale` is 1 / sqrt(D). Grid (at least the tiles, H), blocks of 128, ATTENTION_SHARED_BYTES.
//
//     copy Q, and K and V of step 0
//     for each step over the keys
//         wait for its copies, own and others'             - after which the other stage has no reader left
//         start the next step's copies, into the other stage
//         score, mask the last step, soften, add values    - a warp past the sequence's end only copies and waits
//     store
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, D == 32 ? 3 : 2) attention(
    const u32* __restrict__ counts, const u32* __restrict__ offsets, const uint2* __restrict__ tiles,
    const element* __restrict__ qkv, element* __restrict__ out, float scale) {
    if (blockIdx.x >= counts[2]) return;
    DYNAMIC_SHARED(shared);
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

    copy_rows_async<QUERY_ROWS>(q_rows, q, first_query, length);
    copy_rows_async<KEY_ROWS>(k_stages, k, 0, length);
    copy_rows_async<KEY_ROWS>(v_stages, v, 0, length);
    close_copy_group();

    Queries<WARP_TILES> queries;
    Context<WARP_TILES> context;
    RowValues<WARP_TILES> maxima, sums, rescales;
    begin_softmax<WARP_TILES>(context, maxima, sums);

    const bool has_rows = first_query + warp * WARP_TILES * 16 < length;
    for (u32 first_key = 0, stage = 0; first_key < length; first_key += KEY_ROWS, stage ^= 1) {
        wait_for_copies<0>();
        __syncthreads();
        const u32 next_key = first_key + KEY_ROWS;
        if (next_key < length) {
            copy_rows_async<KEY_ROWS>(k_stages + (stage ^ 1) * STAGE_BYTES, k, next_key, length);
            copy_rows_async<KEY_ROWS>(v_stages + (stage ^ 1) * STAGE_BYTES, v, next_key, length);
            close_copy_group();
        }
        if (!has_rows) continue;
        if (first_key == 0) load_queries<WARP_TILES>(queries, q_rows, warp, lane);
        Scores<WARP_TILES> scores;
        score_keys<WARP_TILES>(scores, queries, k_stages + stage * STAGE_BYTES, lane);
        if (next_key > length) mask_keys<WARP_TILES>(scores, length - first_key, lane);
        soften<WARP_TILES>(scores, maxima, sums, rescales, scale * LOG2_E);
        rescale_rows<WARP_TILES>(context, rescales);
        add_values<WARP_TILES>(context, scores, v_stages + stage * STAGE_BYTES, lane);
    }
    if (!has_rows) return;
    element* tile_out = out + (size_t)(start + first_query) * C + blockIdx.y * D;
    store_context<WARP_TILES>(context, sums, tile_out, length - first_query, warp, lane);
}

// ---------------------------------------------------------------------------------------------------------------------
// The same on Hopper's warpgroup products
// ---------------------------------------------------------------------------------------------------------------------

#ifdef HAS_WGMMA

// A wgmma operand of 128-byte rows from `rows` on, swizzled by 16 bytes as chunk_address does at D = 64: that swizzle is the
// hardware's own, a XOR of address bits 4 to 6 with bits 7 to 9. The fields, from PTX ISA 9.0, 9.7.15.5.1 (the same as cute's
// GmmaDescriptor):
//
//     bits  0 - 13   start address / 16. It may point into a row: K goes on at the next 32 bytes of each (as in DeepGEMM)
//     bits 16 - 29   leading dimension's offset / 16: unused, as one row of the swizzle has all 64 columns
//     bits 32 - 45   stride dimension's offset / 16: from eight rows to the next eight
//     bits 49 - 51   0, as the eight rows start at a multiple of 1024
//     bits 62 - 63   1: swizzled over 128 bytes
constexpr u32 WGMMA_ROW_BYTES = 128;
// Rows of a warpgroup's product.
constexpr u32 WARPGROUP_ROWS = 64;
__device__ __forceinline__ u64 swizzled_operand(u32 rows) {
    return (u64)((rows & 0x3ffff) >> 4) | (u64)(8 * WGMMA_ROW_BYTES >> 4) << 32 | (u64)1 << 62;
}

#endif // HAS_WGMMA

#ifdef HAS_ATTENTION_WGMMA

// A block is one warpgroup. What the host asks for at launch: its queries, and two stages of K and V.
constexpr u32 WGMMA_SHARED_BYTES = WARPGROUP_ROWS * ROW_BYTES + 2 * 2 * KEY_ROWS * ROW_BYTES;
static_assert(ATTENTION_THREADS == 128 && KEY_ROWS == 64 && ROW_BYTES == 128 && 4 * WGMMA_SHARED_BYTES <= 220 * 1024, "");

// Starts scores = queries k^T, as a group.
__device__ __forceinline__ void start_scores(Scores<1>& scores, u32 q_rows, u32 k_rows) {
    multiply_add_async<false>(scores[0], swizzled_operand(q_rows), swizzled_operand(k_rows));
#pragma unroll
    for (u32 depth = 1; depth < HEAD_DEPTH; ++depth) {
        multiply_add_async<true>(scores[0], swizzled_operand(q_rows + depth * 32), swizzled_operand(k_rows + depth * 32));
    }
    close_wgmma_group();
}

// The weights of one step, as the first operand over its keys.
typedef u32 PackedWeights[KEY_ROWS / 16][4];

// Starts context += weights v, as a group.
__device__ __forceinline__ void start_values(Context<1>& context, const PackedWeights& weights, u32 v_rows) {
#pragma unroll
    for (u32 depth = 0; depth < KEY_ROWS / 16; ++depth) {
        multiply_add_async(context[0], weights[depth], swizzled_operand(v_rows + depth * 16 * ROW_BYTES));
    }
    close_wgmma_group();
}

// `attention` by its contract, but two blocks a tile, 64 queries each: grid (at least twice the tiles, H), WGMMA_SHARED_BYTES.
//
// Departures from `attention`: products read Q, K and V from shared memory themselves; and they are asynchronous, so that the
// softmax of one step runs while the tensor cores add the values of the step before (FlashAttention-3, section 3.2). V is
// therefore copied a step later than K, and two steps' weights are in registers, those of even and those of odd steps: while the
// tensor cores read the one, the other is written. A block is a single warpgroup, of which a multiprocessor holds four: nothing
// keeps them in step, so that some have products under way while others are at their exponentials.
//
//     copy Q, and K of step 0
//     for each step over the keys
//         wait for its copies, own and others'             - after which the other stages have no reader left
//         start copying the next step's K, and this one's V
//         start scores, and from step 1 on adding the last step's values
//         wait for the scores; mask, soften, pack the weights
//         wait for the context; rescale it
//     wait for the last V, add it, store
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
    close_copy_group();

    Context<1> context;
    RowValues<1> maxima, sums, rescales;
    PackedWeights even, odd;
    begin_softmax<1>(context, maxima, sums);

    // What a step begins with.
    const auto turn = [&](u32 first_key, u32 stage) {
        wait_for_copies<0>();
        show_copies_to_wgmma();
        __syncthreads();
        const u32 next_key = first_key + KEY_ROWS;
        if (next_key < length) {
            copy_rows_async<KEY_ROWS>(k_stages + (stage ^ 1) * STAGE_BYTES, k, next_key, length);
        }
        copy_rows_async<KEY_ROWS>(v_stages + stage * STAGE_BYTES, v, first_key, length);
        close_copy_group();
    };
    // Scores to weights.
    const auto weigh = [&](Scores<1>& scores, u32 first_key, PackedWeights& weights) {
        if (first_key + KEY_ROWS > length) mask_keys<1>(scores, length - first_key, lane);
        soften<1>(scores, maxima, sums, rescales, scale * LOG2_E);
#pragma unroll
        for (u32 depth = 0; depth < KEY_ROWS / 16; ++depth) {
            pack_weights(weights[depth], scores[0][depth * 2], scores[0][depth * 2 + 1]);
            pin(weights[depth]); // before a wait that follows: there is time now
        }
    };
    const auto step = [&](u32 first_key, u32 stage, const PackedWeights& last, PackedWeights& weights) {
        turn(first_key, stage);
        Scores<1> scores;
        show_registers_to_wgmma();
        start_scores(scores, q_rows, k_stages + stage * STAGE_BYTES);
        start_values(context, last, v_stages + (stage ^ 1) * STAGE_BYTES);
        wait_for_wgmma<1>(scores[0]);
        weigh(scores, first_key, weights);
        const bool never = sums[0][0] + sums[0][1] < 0;
        hold_back_wait(never);
        wait_for_wgmma<0>(context[0]);
#pragma unroll
        for (u32 depth = 0; depth < KEY_ROWS / 16; ++depth) keep_registers(never, last[depth], q_rows);
        rescale_rows<1>(context, rescales);
    };

    turn(0, 0);
    {
        Scores<1> scores;
        show_registers_to_wgmma();
        start_scores(scores, q_rows, k_stages);
        wait_for_wgmma<0>(scores[0]);
        weigh(scores, 0, even);
    }
    u32 first_key = KEY_ROWS;
    for (; first_key + KEY_ROWS < length; first_key += 2 * KEY_ROWS) {
        step(first_key, 1, even, odd);
        step(first_key + KEY_ROWS, 0, odd, even);
    }
    const bool ends_odd = first_key < length;
    if (ends_odd) step(first_key, 1, even, odd);

    wait_for_copies<0>();
    show_copies_to_wgmma();
    __syncthreads();
    show_registers_to_wgmma();
    if (ends_odd) {
        start_values(context, odd, v_stages + STAGE_BYTES);
    } else {
        start_values(context, even, v_stages);
    }
    wait_for_wgmma<0>(context[0]);
#pragma unroll
    for (u32 depth = 0; depth < KEY_ROWS / 16; ++depth) {
        keep_registers(sums[0][0] < 0, even[depth], q_rows);
        keep_registers(sums[0][0] < 0, odd[depth], q_rows);
    }
    element* tile_out = out + (size_t)(start + first_query) * C + blockIdx.y * D;
    store_context<1>(context, sums, tile_out, length - first_query, warp, lane);
}

#endif // HAS_ATTENTION_WGMMA

#else // ELEMENT_F32

// Scores that are held at once; the maximum moves once for so many keys.
constexpr u32 SCORED_KEYS = 16;

// The same contract in f32, plainly: a thread has one query and its context in registers, and reads keys and values that the
// block has staged in shared memory, all threads the same one at a time. This is the exact mode, not the fast one.
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS) attention(
    const u32* __restrict__ counts, const u32* __restrict__ offsets, const uint2* __restrict__ tiles,
    const element* __restrict__ qkv, element* __restrict__ out, float scale) {
    if (blockIdx.x >= counts[2]) return;
    DYNAMIC_SHARED(shared);
    float* k_rows = reinterpret_cast<float*>(shared); // [KEY_ROWS, D]
    float* v_rows = k_rows + KEY_ROWS * D;            // [KEY_ROWS, D]
    const u32 sequence = tiles[blockIdx.x].x, query = tiles[blockIdx.x].y + threadIdx.x;
    const u32 start = offsets[sequence], length = offsets[sequence + 1] - start;
    const element* q = qkv + (size_t)start * (3 * C) + blockIdx.y * D;
    const element* k = q + C;
    const element* v = k + C;
    const bool has_row = query < length;
    const float scale_log2 = scale * LOG2_E;

    Octet queries[D / 8], context[D / 8];
#pragma unroll
    for (u32 i = 0; i < D / 8; ++i) {
        queries[i] = load_octet(q + (size_t)(has_row ? query : 0) * (3 * C) + i * 8);
        context[i] = {};
    }
    float maximum = NO_KEY, sum = 0;

    for (u32 first_key = 0; first_key < length; first_key += KEY_ROWS) {
        __syncthreads(); // the last step's rows have been read
        for (u32 i = threadIdx.x; i < KEY_ROWS * D / 8; i += ATTENTION_THREADS) {
            const u32 row = i / (D / 8), column = i % (D / 8) * 8;
            const u32 source = first_key + row < length ? first_key + row : length - 1;
            store_octet(k_rows + row * D + column, load_octet(k + (size_t)source * (3 * C) + column));
            store_octet(v_rows + row * D + column, load_octet(v + (size_t)source * (3 * C) + column));
        }
        __syncthreads(); // this step's rows are there

        for (u32 group = 0; group < KEY_ROWS && first_key + group < length; group += SCORED_KEYS) {
            float scores[SCORED_KEYS];
            float highest = maximum;
#pragma unroll
            for (u32 key = 0; key < SCORED_KEYS; ++key) {
                float product = 0;
#pragma unroll
                for (u32 i = 0; i < D / 8; ++i) {
                    const Octet keys = load_octet(k_rows + (group + key) * D + i * 8);
#pragma unroll
                    for (u32 j = 0; j < 8; ++j) product += queries[i].values[j] * keys.values[j];
                }
                scores[key] = first_key + group + key < length ? product : NO_KEY;
                highest = fmaxf(highest, scores[key]);
            }
            const float rescale = exp2_fast((maximum - highest) * scale_log2);
            maximum = highest;
            sum *= rescale;
#pragma unroll
            for (u32 i = 0; i < D / 8; ++i)
#pragma unroll
                for (u32 j = 0; j < 8; ++j) context[i].values[j] *= rescale;
#pragma unroll
            for (u32 key = 0; key < SCORED_KEYS; ++key) {
                const float weight = exp2_fast((scores[key] - highest) * scale_log2);
                sum += weight;
#pragma unroll
                for (u32 i = 0; i < D / 8; ++i) {
                    const Octet values = load_octet(v_rows + (group + key) * D + i * 8);
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
        store_octet(out + (size_t)(start + query) * C + blockIdx.y * D + i * 8, context[i]);
    }
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// The last layer, of which only each sequence's first token is wanted
// ---------------------------------------------------------------------------------------------------------------------

constexpr u32 FIRST_TOKEN_THREADS = 128;
// A key belongs to so many neighbouring lanes, an octet of its D columns each.
constexpr u32 LANES_A_KEY = D / 8;
constexpr u32 KEY_TEAMS = FIRST_TOKEN_THREADS / LANES_A_KEY;
// Keys that a team has under way at a time, so that their loads overlap.
constexpr u32 TEAM_KEYS = 4;

// A softmax on the way over some keys: their weights' sum and weighted values, relative to the highest score among them.
struct PartialContext {
    float maximum;
    float sum;
    Octet context;
};

// Adds `other`, over other keys, to `mine`.
__device__ __forceinline__ void merge(PartialContext& mine, const PartialContext& other, float scale) {
    const float highest = fmaxf(mine.maximum, other.maximum);
    const float my_part = exp2_fast((mine.maximum - highest) * scale);
    const float other_part = exp2_fast((other.maximum - highest) * scale);
    mine.maximum = highest;
    mine.sum = mine.sum * my_part + other.sum * other_part;
#pragma unroll
    for (u32 j = 0; j < 8; ++j) {
        mine.context.values[j] = mine.context.values[j] * my_part + other.context.values[j] * other_part;
    }
}

// out[s] = softmax(scale q[s] K^T) V within sequence s and each head: attention of one query a sequence.
//
// q [S, C]; kv [T, 2C]: K and V, each head after head; out [S, C]; `scale` is 1 / sqrt(D). Grid (at least S, H), blocks of
// 128. Any length in one pass: teams of lanes take the keys in turn, each with a softmax of its own, merged at the end.
extern "C" __global__ void __launch_bounds__(FIRST_TOKEN_THREADS) cls_attention(
    const u32* __restrict__ counts, const u32* __restrict__ offsets, const element* __restrict__ q,
    const element* __restrict__ kv, element* __restrict__ out, float scale) {
    if (blockIdx.x >= counts[1]) return;
    const u32 lane = lane_in_warp(), warp = threadIdx.x / 32;
    const u32 team = threadIdx.x / LANES_A_KEY, column = blockIdx.y * D + threadIdx.x % LANES_A_KEY * 8;
    const u32 start = offsets[blockIdx.x], length = offsets[blockIdx.x + 1] - start;
    const element* k = kv + (size_t)start * (2 * C) + column;
    const element* v = k + C;
    const Octet query = load_octet(q + (size_t)blockIdx.x * C + column);
    const float scale_log2 = scale * LOG2_E;

    // Every team goes round as often as the first, for the shuffles' sake; keys beyond the end are read as the last one, and
    // score NO_KEY. A team that never has a key gathers nonsense relative to NO_KEY, which merges with a weight of zero.
    PartialContext mine = {NO_KEY, 0, {}};
    for (u32 round = 0; round < length; round += KEY_TEAMS * TEAM_KEYS) {
        Octet keys[TEAM_KEYS], values[TEAM_KEYS];
        float scores[TEAM_KEYS];
        float highest = mine.maximum;
#pragma unroll
        for (u32 i = 0; i < TEAM_KEYS; ++i) {
            const u32 key = round + i * KEY_TEAMS + team;
            const u32 source = key < length ? key : length - 1;
            keys[i] = load_octet(k + (size_t)source * (2 * C));
            values[i] = load_octet(v + (size_t)source * (2 * C));
        }
#pragma unroll
        for (u32 i = 0; i < TEAM_KEYS; ++i) {
            float product = 0;
#pragma unroll
            for (u32 j = 0; j < 8; ++j) product += query.values[j] * keys[i].values[j];
#pragma unroll
            for (u32 distance = LANES_A_KEY / 2; distance > 0; distance /= 2) {
                product += __shfl_xor_sync(WHOLE_WARP, product, distance);
            }
            scores[i] = round + i * KEY_TEAMS + team < length ? product : NO_KEY;
            highest = fmaxf(highest, scores[i]);
        }
        const float rescale = exp2_fast((mine.maximum - highest) * scale_log2);
        mine.maximum = highest;
        mine.sum *= rescale;
#pragma unroll
        for (u32 j = 0; j < 8; ++j) mine.context.values[j] *= rescale;
#pragma unroll
        for (u32 i = 0; i < TEAM_KEYS; ++i) {
            const float weight = exp2_fast((scores[i] - highest) * scale_log2);
            mine.sum += weight;
#pragma unroll
            for (u32 j = 0; j < 8; ++j) mine.context.values[j] += weight * values[i].values[j];
        }
    }

    // Teams of a warp, then warps. Teams of lanes with the same columns are LANES_A_KEY apart.
#pragma unroll
    for (u32 distance = LANES_A_KEY; distance < 32; distance *= 2) {
        PartialContext other;
        other.maximum = __shfl_xor_sync(WHOLE_WARP, mine.maximum, distance);
        other.sum = __shfl_xor_sync(WHOLE_WARP, mine.sum, distance);
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            other.context.values[j] = __shfl_xor_sync(WHOLE_WARP, mine.context.values[j], distance);
        }
        merge(mine, other, scale_log2);
    }
    constexpr u32 WARPS = FIRST_TOKEN_THREADS / 32;
    __shared__ PartialContext of_warps[WARPS][LANES_A_KEY];
    if (lane < LANES_A_KEY) of_warps[warp][lane] = mine;
    __syncthreads();
    if (threadIdx.x >= LANES_A_KEY) return;
#pragma unroll
    for (u32 other = 1; other < WARPS; ++other) merge(mine, of_warps[other][lane], scale_log2);
#pragma unroll
    for (u32 j = 0; j < 8; ++j) mine.context.values[j] /= mine.sum;
    store_octet(out + (size_t)blockIdx.x * C + column, mine.context);
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

// ---------------------------------------------------------------------------------------------------------------------
// Element by element
// ---------------------------------------------------------------------------------------------------------------------

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
        return x * reciprocal_fast(1 + exp2_fast(-x * p));
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

struct Itself {
    static __device__ __forceinline__ float of(float x) { return x; }
};

// store(i, function(octet i of x)) for each.
template <typename Function, typename Store>
__device__ __forceinline__ void apply_to_octets(u32 octets, const element* x, Store store) {
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < octets; i += gridDim.x * blockDim.x) {
        Octet octet = load_octet(x + (size_t)i * 8);
#pragma unroll
        for (u32 j = 0; j < 8; ++j) octet.values[j] = Function::of(octet.values[j]);
        store(i, octet);
    }
}

// The same by number: 0 gelu by erf, 1 gelu by tanh, 2 relu, 3 x itself.
template <typename Store>
__device__ __forceinline__ void apply_numbered(u32 function, u32 octets, const element* x, Store store) {
    switch (function) {
        case 0: apply_to_octets<GeluErf>(octets, x, store); break;
        case 1: apply_to_octets<GeluTanh>(octets, x, store); break;
        case 2: apply_to_octets<Relu>(octets, x, store); break;
        case 3: apply_to_octets<Itself>(octets, x, store); break;
    }
}

// x = function(x) in place, by its number. x [rows, columns], columns a multiple of 8, and fewer than 2^34 values.
// Any grid of any blocks.
extern "C" __global__ void activate(const u32* __restrict__ rows, u32 columns, u32 function, element* x) {
    const auto store = [=](u32 i, const Octet& octet) { store_octet(x + (size_t)i * 8, octet); };
    apply_numbered(function, *rows * (columns / 8), x, store);
}

#ifdef ELEMENT_FP8

// out = scale * function(x) in e4m3: the operand of a product. out [rows, columns]; all else as above.
extern "C" __global__ void quantise(
    const u32* __restrict__ rows, u32 columns, u32 function, const element* __restrict__ x, e4m3* __restrict__ out,
    float scale) {
    const auto store = [=](u32 i, const Octet& octet) { store_octet(out + (size_t)i * 8, octet, scale); };
    apply_numbered(function, *rows * (columns / 8), x, store);
}

#endif

// out = x as floats, for the host. x, out [rows, columns], fewer than 2^31 values. Any grid of any blocks.
extern "C" __global__ void to_f32(
    const u32* __restrict__ rows, u32 columns, const element* __restrict__ x, float* __restrict__ out) {
    const u32 values = *rows * columns;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < values; i += gridDim.x * blockDim.x) out[i] = widened(x[i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Products with what follows them, on Hopper
// ---------------------------------------------------------------------------------------------------------------------

#ifdef HAS_PRODUCT_WGMMA

// A tile of the output, which a block makes at a time, from panels of x and of W that are so deep, of which it has a few.
constexpr u32 PRODUCT_ROWS = 2 * WARPGROUP_ROWS;
constexpr u32 PRODUCT_COLUMNS = 256;
constexpr u32 PRODUCT_DEPTH = WGMMA_ROW_BYTES / sizeof(element);
constexpr u32 PRODUCT_STAGES = 3;
constexpr u32 PRODUCT_THREADS = 3 * 128;

constexpr u32 X_PANEL_BYTES = PRODUCT_ROWS * WGMMA_ROW_BYTES;
constexpr u32 PANELS_BYTES = X_PANEL_BYTES + PRODUCT_COLUMNS * WGMMA_ROW_BYTES;
constexpr u32 SUMS_ROW_BYTES = PRODUCT_COLUMNS * sizeof(element);
constexpr u32 HALF_BYTES = WARPGROUP_ROWS * SUMS_ROW_BYTES;

// Where all lies in shared memory, from its start: the panels of each stage, the sums of each warpgroup, and the barriers.
constexpr u32 SUMS_PLACE = PRODUCT_STAGES * PANELS_BYTES;
constexpr u32 FULL_PLACE = SUMS_PLACE + 2 * HALF_BYTES;      // of each stage: its panels are there
constexpr u32 EMPTY_PLACE = FULL_PLACE + 8 * PRODUCT_STAGES; // of each stage: nobody reads them any more
constexpr u32 MADE_PLACE = EMPTY_PLACE + 8 * PRODUCT_STAGES; // of each warpgroup: its sums are there
constexpr u32 TAKEN_PLACE = MADE_PLACE + 8 * 2;              // of each warpgroup: nobody reads them any more
// What the host asks for at launch.
constexpr u32 PRODUCT_SHARED_BYTES = TAKEN_PLACE + 8 * 2;
static_assert(PRODUCT_SHARED_BYTES <= 227 * 1024, "");

// The warps of the first warpgroup: one has the panels copied, the others see to what follows the sums.
constexpr u32 FINISHING_WARPS = 3;
constexpr u32 ROWS_IN_HAND = 4;

// Which stage is next, and the parity of its barriers' phase.
struct ProductStage {
    u32 index = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++index == PRODUCT_STAGES) {
            index = 0;
            parity ^= 1;
        }
    }
};

// Of a warpgroup's sums, in shared memory as rows of chunks of 16 bytes. A chunk's place depends on its row, so that eight rows of
// one chunk lie in different banks.
__device__ __forceinline__ u32 sums_offset(u32 row, u32 chunk) { return row * SUMS_ROW_BYTES + (chunk ^ row % 8) * 16; }

// out = function(sums + bias (+ residual)) for ROWS of a warpgroup's rows, every FINISHING_WARPS-th from `first` on; a lane has the
// same chunk of each. `residual` and `out` are the warpgroup's first row's, at the lane's columns.
template <typename Function, bool RESIDUAL, u32 ROWS>
__device__ __forceinline__ void finish_some_rows(
    const unsigned char* sums, const Octet& bias, const element* residual, element* out, u32 outputs, u32 first, u32 lane) {
    Octet octets[ROWS], others[ROWS];
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i) {
        const u32 row = first + i * FINISHING_WARPS;
        octets[i] = load_octet(reinterpret_cast<const element*>(sums + sums_offset(row, lane)));
        if constexpr (RESIDUAL) others[i] = load_octet(residual + (size_t)row * outputs);
    }
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i) {
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            float x = octets[i].values[j] + bias.values[j];
            if constexpr (RESIDUAL) x += others[i].values[j];
            octets[i].values[j] = Function::of(x);
        }
    }
#pragma unroll
    for (u32 i = 0; i < ROWS; ++i) store_octet(out + (size_t)(first + i * FINISHING_WARPS) * outputs, octets[i]);
}

// The same for all of a warp's rows, several in hand at a time, so that one's latencies hide behind the others.
template <typename Function, bool RESIDUAL>
__device__ __forceinline__ void finish_rows(
    const unsigned char* sums, const Octet& bias, const element* residual, element* out, u32 outputs, u32 row, u32 lane) {
    for (; row + (ROWS_IN_HAND - 1) * FINISHING_WARPS < WARPGROUP_ROWS; row += ROWS_IN_HAND * FINISHING_WARPS) {
        finish_some_rows<Function, RESIDUAL, ROWS_IN_HAND>(sums, bias, residual, out, outputs, row, lane);
    }
    for (; row < WARPGROUP_ROWS; row += FINISHING_WARPS) {
        finish_some_rows<Function, RESIDUAL, 1>(sums, bias, residual, out, outputs, row, lane);
    }
}

// out = function(x W^T + bias (+ residual)), the sums being rounded to the element once before the bias.
//
// x [rows, inputs] in boxes of PRODUCT_ROWS by PRODUCT_DEPTH; W [outputs, inputs] in boxes of PRODUCT_COLUMNS by PRODUCT_DEPTH;
// bias [outputs]; residual [rows, outputs] or null, and it may be `out`, [rows, outputs]. The rows are multiples of PRODUCT_ROWS,
// the outputs of PRODUCT_COLUMNS, the inputs of PRODUCT_DEPTH; `function` is 0, gelu by erf and without a residual, or 3, x itself. Any grid of blocks of
// PRODUCT_THREADS, PRODUCT_SHARED_BYTES.
//
// A block takes tiles in turn, neighbours those of the same rows. Two warpgroups multiply, 64 rows each; a warp has the copy engine
// fill the stages as they become free, also those of the next tile; and three warps turn finished sums into the output, while
// the tensor cores are at the next tile. What a function costs is so hidden behind the products (persistent and
// specialised by warp as CUTLASS's kernels for sm_90 are; the warps for what follows are ours).
extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, 1) gemm_wgmma(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const element* __restrict__ bias,
    const element* residual, element* out, u32 rows, u32 outputs, u32 inputs, u32 function) {
    DYNAMIC_SHARED(shared);
    const u32 lane = lane_in_warp(), warp = threadIdx.x / 32 % 4;
    // The same in all lanes of a warp, as descriptors must be.
    const u32 warpgroup = __shfl_sync(WHOLE_WARP, threadIdx.x / 128, 0);
    const u32 place = shared_address(shared);
    const u32 tiles_across = outputs / PRODUCT_COLUMNS, tiles = rows / PRODUCT_ROWS * tiles_across;
    const u32 steps = inputs / PRODUCT_DEPTH;

    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < PRODUCT_STAGES; ++stage) {
            start_barrier(place + FULL_PLACE + 8 * stage, 1);
            start_barrier(place + EMPTY_PLACE + 8 * stage, 8); // the warps that multiply
        }
        for (u32 half = 0; half < 2; ++half) {
            start_barrier(place + MADE_PLACE + 8 * half, 4);
            start_barrier(place + TAKEN_PLACE + 8 * half, FINISHING_WARPS);
        }
        show_barriers();
    }
    __syncthreads();

    if (warpgroup > 0) {
        take_registers<200>();
        const u32 half = warpgroup - 1;
        unsigned char* own_sums = shared + SUMS_PLACE + half * HALF_BYTES;
        ProductStage stage;
        u32 taken_parity = 1; // nobody has to take what is not there
        for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x, taken_parity ^= 1) {
            float sums[PRODUCT_COLUMNS / 8][4];
            u32 last = 0;
            for (u32 step = 0; step < steps; ++step) {
                wait_for_phase(place + FULL_PLACE + 8 * stage.index, stage.parity);
                const u32 panels = place + stage.index * PANELS_BYTES;
                const u32 x_rows = panels + half * WARPGROUP_ROWS * WGMMA_ROW_BYTES, w_rows = panels + X_PANEL_BYTES;
                show_registers_to_wgmma();
#pragma unroll
                for (u32 depth = 0; depth < PRODUCT_DEPTH / 16; ++depth) {
                    const bool add = step > 0 || depth > 0;
                    multiply_add_async(sums, swizzled_operand(x_rows + depth * 32), swizzled_operand(w_rows + depth * 32), add);
                }
                close_wgmma_group();
                if (step > 0) {
                    wait_for_wgmma<1>();
                    if (lane == 0) arrive(place + EMPTY_PLACE + 8 * last);
                }
                last = stage.index;
                stage.advance();
            }
            wait_for_wgmma<0>(sums);
            if (lane == 0) arrive(place + EMPTY_PLACE + 8 * last);

            wait_for_phase(place + TAKEN_PLACE + 8 * half, taken_parity);
            const u32 row = warp * 16 + lane / 4;
#pragma unroll
            for (u32 block = 0; block < PRODUCT_COLUMNS / 8; ++block) {
                const u32 pair = lane % 4 * 4;
                *reinterpret_cast<u32*>(own_sums + sums_offset(row, block) + pair) = packed(sums[block][0], sums[block][1]);
                *reinterpret_cast<u32*>(own_sums + sums_offset(row + 8, block) + pair) = packed(sums[block][2], sums[block][3]);
            }
            __syncwarp();
            if (lane == 0) arrive(place + MADE_PLACE + 8 * half);
        }
    } else {
        give_registers_back<104>();
        if (warp == 0) {
            if (lane > 0) return;
            ProductStage stage;
            for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const u32 first_row = tile / tiles_across * PRODUCT_ROWS, first_column = tile % tiles_across * PRODUCT_COLUMNS;
                for (u32 step = 0; step < steps; ++step, stage.advance()) {
                    wait_for_phase(place + EMPTY_PLACE + 8 * stage.index, stage.parity ^ 1);
                    const u32 full = place + FULL_PLACE + 8 * stage.index, panels = place + stage.index * PANELS_BYTES;
                    arrive_announcing(full, PANELS_BYTES);
                    copy_box_async(panels, x_map, first_row, step * PRODUCT_DEPTH, full);
                    copy_box_async(panels + X_PANEL_BYTES, w_map, first_column, step * PRODUCT_DEPTH, full);
                }
            }
            return;
        }
        u32 made_parity = 0;
        for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x, made_parity ^= 1) {
            const u32 first_row = tile / tiles_across * PRODUCT_ROWS;
            const u32 column = tile % tiles_across * PRODUCT_COLUMNS + lane * 8;
            const Octet biases = load_octet(bias + column);
            for (u32 half = 0; half < 2; ++half) {
                wait_for_phase(place + MADE_PLACE + 8 * half, made_parity);
                const unsigned char* sums = shared + SUMS_PLACE + half * HALF_BYTES;
                const size_t at = (size_t)(first_row + half * WARPGROUP_ROWS) * outputs + column;
                if (function == 0) {
                    finish_rows<GeluErf, false>(sums, biases, nullptr, out + at, outputs, warp - 1, lane);
                } else if (residual) {
                    finish_rows<Itself, true>(sums, biases, residual + at, out + at, outputs, warp - 1, lane);
                } else {
                    finish_rows<Itself, false>(sums, biases, nullptr, out + at, outputs, warp - 1, lane);
                }
                __syncwarp();
                if (lane == 0) arrive(place + TAKEN_PLACE + 8 * half);
            }
        }
    }
}

#endif // HAS_PRODUCT_WGMMA

// ---------------------------------------------------------------------------------------------------------------------
// The classification head: S rows only, so in f32 weights and plain sums
// ---------------------------------------------------------------------------------------------------------------------

// Rows that share one reading of a weight row.
constexpr u32 HEAD_ROWS = 8;

// out[r] = tanh(weight x[r] + bias). x [rows, C]; weight [C, C], outputs by inputs; bias [C]; out [rows, C].
// A warp an output, for up to HEAD_ROWS rows in turn. Any grid of blocks of whole warps.
extern "C" __global__ void __launch_bounds__(256) head_dense(
    const u32* __restrict__ rows, const element* __restrict__ x, const float* __restrict__ weight,
    const float* __restrict__ bias, float* __restrict__ out) {
    const u32 lane = lane_in_warp(), end = *rows;
    const u32 tasks = (end + HEAD_ROWS - 1) / HEAD_ROWS * C;
    for (u32 task = warp_in_grid(); task < tasks; task += warps_in_grid()) {
        const u32 output = task % C, first = task / C * HEAD_ROWS;
        float sums[HEAD_ROWS] = {};
#pragma unroll
        for (u32 i = 0; i < LANE_OCTETS; ++i) {
            if (!lane_has(i, lane)) continue;
            const u32 column = octet_of(i, lane) * 8;
            const Octet weights = load_octet(weight + (size_t)output * C + column);
#pragma unroll
            for (u32 r = 0; r < HEAD_ROWS; ++r) {
                if (first + r >= end) continue;
                const Octet inputs = load_octet(x + (size_t)(first + r) * C + column);
#pragma unroll
                for (u32 j = 0; j < 8; ++j) sums[r] += weights.values[j] * inputs.values[j];
            }
        }
#pragma unroll
        for (u32 r = 0; r < HEAD_ROWS; ++r) {
            const float sum = warp_sum(sums[r]);
            if (lane == 0 && first + r < end) out[(size_t)(first + r) * C + output] = tanhf(sum + bias[output]);
        }
    }
}

// out[r] = weight . x[r] + bias. x [rows, C], weight [C], bias [1], out [rows]. A warp a row, any grid of whole warps.
extern "C" __global__ void __launch_bounds__(256) head_out(
    const u32* __restrict__ rows, const float* __restrict__ x, const float* __restrict__ weight,
    const float* __restrict__ bias, float* __restrict__ out) {
    const u32 lane = lane_in_warp(), end = *rows;
    for (u32 r = warp_in_grid(); r < end; r += warps_in_grid()) {
        float sum = 0;
#pragma unroll
        for (u32 i = 0; i < LANE_OCTETS; ++i) {
            if (!lane_has(i, lane)) continue;
            const u32 column = octet_of(i, lane) * 8;
            const Octet inputs = load_octet(x + (size_t)r * C + column), weights = load_octet(weight + column);
#pragma unroll
            for (u32 j = 0; j < 8; ++j) sum += weights.values[j] * inputs.values[j];
        }
        sum = warp_sum(sum);
        if (lane == 0) out[r] = sum + *bias;
    }
}
