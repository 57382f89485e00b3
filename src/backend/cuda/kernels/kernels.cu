// The CUDA backend's kernels: everything but GEMMs, which are cuBLASLt's, and on Hopper a custom GEMM.
//
// NVRTC compiles this file when the server starts. The host passes the headers from memory (compile.rs) and defines
//   one of -DELEMENT_F16, -DELEMENT_BF16, -DELEMENT_F32   `element`, the dtype of activations and embedding tables
//   or -DELEMENT_FP8                                       `element` is f16 and GEMM operands are e4m3; sm_89 and later
//   -DHIDDEN_SIZE=<C>                                      a multiple of 8
//   -DHEAD_SIZE=<D>                                        32 or 64
//
// Shapes: T tokens in a batch, S sequences, C hidden size, H heads, D head size. Buffers are row-major and 16-byte aligned.
// `counts` is {T, S, attention tiles}. `offsets` is [S + 1]: sequence s has rows offsets[s] .. offsets[s + 1], at least one.
// Kernels read row counts from device memory, so that a captured graph can be replayed for a batch of another size. GEMMs
// compute all rows of the rounded buffer instead.
//
// Sums are f32, in an order that depends only on the row or sequence: results are batch-invariant.
//
// tests/cuda/emulator.h runs these files on a CPU; it replaces ptx.cuh and nothing else.

#include "attention_cls.cuh"
#include "attention_f32.cuh"
#include "attention_mma.cuh"
#include "attention_wgmma.cuh"
#include "elementwise.cuh"
#include "gemm_wgmma.cuh"
#include "head.cuh"
#include "rows.cuh"
