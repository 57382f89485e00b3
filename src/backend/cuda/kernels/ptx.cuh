// PTX wrappers: instructions that CUDA C++ has no built-in for. Addresses in shared memory are u32, as in PTX.
//
// tests/cuda/emulator.h defines the same functions for a CPU, in place of this file.
#pragma once

#include "config.cuh"

#ifndef EMULATED

// TMA descriptor of a matrix in global memory, encoded by the driver (cuTensorMapEncodeTiled).
struct alignas(64) TensorMap {
    u64 words[16];
};

// Aligned to 1024 bytes, the period of wgmma's 128-byte swizzle: eight rows of 128 bytes.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

// 2^x, within 2 ulp; subnormal results become 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, within 1 ulp; 0 for infinity.
__device__ __forceinline__ float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Converts two floats to e4m3, round to nearest, saturating at 448. `low` is the lower byte. sm_89 and later.
__device__ __forceinline__ u32 pack_e4m3_pair(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

#ifndef ELEMENT_F32

#ifdef ELEMENT_BF16
#define ELEMENT_PTX "bf16"
__device__ __forceinline__ float to_float(u16 x) { return __uint_as_float((u32)x << 16); }
#else
#define ELEMENT_PTX "f16"
__device__ __forceinline__ float to_float(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
#endif

// Converts two floats to elements, round to nearest. `low` is the lower half.
__device__ __forceinline__ u32 pack_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn." ELEMENT_PTX "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// Starts a copy of 16 bytes to shared memory. The first `bytes` (0 or 16) come from `from`; the rest are zero.
__device__ __forceinline__ void cp_async_16(u32 to, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Commits this thread's copies since the last commit as a group.
__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the NEWEST groups of this thread are pending. Does not wait for other threads' copies.
template <u32 NEWEST>
__device__ __forceinline__ void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
}

// Loads four 8x8 matrices, one per register. Lane i passes the address of row i % 8 of matrix i / 8. Each lane receives, from
// every matrix, elements 2 * (lane % 4) and the next one of row lane / 4.
__device__ __forceinline__ void ldmatrix_x4(u32 (&matrices)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(row)
                 : "memory");
}

// The same, with each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&matrices)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(row)
                 : "memory");
}

// sums [16, 8] += a [16, 16] * b [16, 8] by one warp. A lane holds columns 2 * (lane % 4) and the next one of `sums`, in row
// lane / 4 (values 0 and 1) and in the row 8 below (values 2 and 3).
__device__ __forceinline__ void mma_m16n8k16(float (&sums)[4], const u32 (&a)[4], u32 b_upper, u32 b_lower) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT_PTX "." ELEMENT_PTX
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_upper), "r"(b_lower));
}

#ifdef HAS_WGMMA

// Makes this thread's completed copies visible to wgmma, which reads through the async proxy. A barrier alone does not order
// the two proxies.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Required before a wgmma if other instructions have accessed its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The registers of sums [64, 64] and [64, 256] as assembler operands, numbered from 0.
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

// Starts sums [64, 64] = a [64, 16] * b [16, 64], or += if `ADD`, by one warpgroup (four consecutive warps, 16 rows each; lanes
// hold them as in mma_m16n8k16). `a` and `b` are descriptors of K-major operands in shared memory. Until a wait, `sums` and the
// operands must not be accessed.
template <bool ADD>
__device__ __forceinline__ void wgmma_m64n64k16(float (&sums)[8][4], u64 a, u64 b) {
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

// sums += a * b, with `a` in registers (laid out as in mma_m16n8k16) and an N-major `b`. Until a wait, `a` must not be written.
__device__ __forceinline__ void wgmma_m64n64k16(float (&sums)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT_PTX "." ELEMENT_PTX " " SUMS_NAMES
                 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : SUMS_OPERANDS
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}

// The same for 256 columns: sums [64, 256] = a [64, 16] * b [16, 256], or += if `add`.
__device__ __forceinline__ void wgmma_m64n256k16(float (&sums)[32][4], u64 a, u64 b, bool add) {
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

// Commits the wgmmas since the last commit as a group, which may be empty.
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the NEWEST groups are pending. `sums`, written by an older group, can then be read.
template <u32 NEWEST>
__device__ __forceinline__ void wgmma_wait_group(float (&sums)[8][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %32;" : SUMS_OPERANDS : "n"(NEWEST) : "memory");
}

template <u32 NEWEST>
__device__ __forceinline__ void wgmma_wait_group(float (&sums)[32][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %128;" : WIDE_SUMS_OPERANDS : "n"(NEWEST) : "memory");
}

// Waits until at most the NEWEST groups are pending, when all groups accumulate into the same sums: these cannot be read yet.
template <u32 NEWEST>
__device__ __forceinline__ void wgmma_wait_group() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(NEWEST) : "memory");
}

// Initializes an 8-byte mbarrier in shared memory. A phase completes after `arrivals` arrivals and all the bytes that arrivals
// announced with expect_tx.
__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes this thread's initialized mbarriers visible to TMA and, after a __syncthreads, to the other threads.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has completed. Phases are numbered from 0; the phase before the first counts as complete,
// so parity 1 returns at once on a new mbarrier.
__device__ __forceinline__ void mbarrier_wait_parity(u32 barrier, u32 parity) {
    asm volatile("{\n"
                 ".reg .pred ended;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
                 "@!ended bra again;\n"
                 "}" ::"r"(barrier), "r"(parity)
                 : "memory");
}

// Starts a TMA copy of the box at (`row`, `column`) to shared memory with the 128-byte swizzle of wgmma operands. wgmma needs no
// fence to read it. The bytes count towards the transaction count of `barrier`.
__device__ __forceinline__ void tma_load_2d(u32 to, const TensorMap& map, u32 row, u32 column, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(&map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

// Changes the number of registers per thread of this warpgroup. All its warps must execute it.
template <u32 REGISTERS>
__device__ __forceinline__ void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <u32 REGISTERS>
__device__ __forceinline__ void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Keeps a wait below the computation of `never`, which is always false. ptxas hoists waits above the work that should overlap with
// the wgmma, but not across a branch.
__device__ __forceinline__ void keep_wait_below(bool never) {
    if (never) asm volatile("nanosleep.u32 1;");
}

// Keeps the registers of `a` allocated until here. ptxas considers them free as soon as the wgmma that reads them has started. The
// store to shared address `place` is never executed, as `never` is always false.
__device__ __forceinline__ void keep_registers_alive(bool never, const u32 (&a)[4], u32 place) {
    if (never) {
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
    }
}

// Forces the compiler to compute these values before this point.
__device__ __forceinline__ void pin_registers(u32 (&values)[4]) {
    asm volatile("" : "+r"(values[0]), "+r"(values[1]), "+r"(values[2]), "+r"(values[3]));
}

#endif // HAS_WGMMA

#endif // not ELEMENT_F32
#endif // not EMULATED
