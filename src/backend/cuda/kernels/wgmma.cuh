// Operands of wgmma in shared memory.
#pragma once

#include "config.cuh"

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
__device__ __forceinline__ u64 wgmma_descriptor(u32 rows) {
    return (u64)((rows & 0x3ffff) >> 4) | (u64)(8 * WGMMA_ROW_BYTES >> 4) << 32 | (u64)1 << 62;
}

#endif // HAS_WGMMA
