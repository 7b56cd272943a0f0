// kernel90.h's instructions and the argument of the Hopper products.
#pragma once
#include "kernel90.h"

#if defined(__CUDACC__)
#include "ptx90_gemm.h"
#else
#include "../../emulation/twins90_gemm.h"
#endif

// c[m, n] = a[m, k] b[n, k]^T: dense, batched over grid y, or grouped over experts. "fp8" has the scales of GemmParams.
struct HopperGemmParams {
    TensorMap b_map; // {k, n, matrix} in boxes of 128 bytes of k, 128 rows, 1
    TensorMap a_map; // {k, batch, m} in boxes of 128 bytes of k, 1, the tile's rows
    void* c;         // bf16 or float32 [m, ldc], a multiple of 16 bytes
    const float* a_scales; // fp8: [m, a_scales_stride]
    const float* b_scales; // fp8: [ceil(n / 128), b_scales_stride], one such matrix per expert
    const int32_t* a_rows; // grouped fp8: row of a_scales for each row of c; null is the identity
    const int32_t* tiles;  // grouped: {expert, first row} per tile of rows, expert -1 is no tile; null is not grouped
    const int32_t* offsets; // grouped: [experts + 1] first rows
    float* partial;         // [grid x, slices, rows of the tile / 2, 256]; null: a block sums all slices itself
    uint32_t* tickets;      // [grid x] zeros, and zeros again afterwards
    int64_t c_batch, b_scales_batch;
    int32_t m, n, k, ldc;
    int32_t a_scales_stride, b_scales_stride;
    int32_t c_is_float32, row_tiles;
    int32_t slices, slice_blocks; // k in slices of so many blocks of 128, the last one shorter
    int32_t reserved[2];
};
static_assert(sizeof(HopperGemmParams) == 384, "src/params/hopper.rs mirrors this");
