// Operands of wgmma in shared memory.
#pragma once

#include "config.cuh"

#ifdef HAS_WGMMA

// The descriptor of an operand at shared address `rows`, with rows of 128 bytes and the 128-byte swizzle: address bits 4 to 6 are
// XORed with bits 7 to 9, as chunk_address does at D = 64. Fields by PTX ISA 9.0, section 9.7.15.5.1 (CuTe's GmmaDescriptor):
//
//     bits  0 - 13   start address / 16. It may point into a row: the next 16 values along K start 32 bytes later (as in DeepGEMM)
//     bits 16 - 29   leading dimension byte offset / 16: unused, as a swizzle row has all 64 columns
//     bits 32 - 45   stride dimension byte offset / 16: from eight rows to the next eight
//     bits 49 - 51   base offset: 0, as groups of eight rows start at multiples of 1024
//     bits 62 - 63   swizzle mode: 1, 128 bytes
constexpr u32 WGMMA_ROW_BYTES = 128;
// Rows (M) of a wgmma.
constexpr u32 WARPGROUP_ROWS = 64;
__device__ __forceinline__ u64 wgmma_descriptor(u32 rows) {
    return (u64)((rows & 0x3ffff) >> 4) | (u64)(8 * WGMMA_ROW_BYTES >> 4) << 32 | (u64)1 << 62;
}

#endif // HAS_WGMMA
