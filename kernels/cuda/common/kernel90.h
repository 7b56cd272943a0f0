// kernel.h's instructions of sm_90a, and the arguments that hold tensor maps.
#pragma once
#include "kernel.h"

#if defined(__CUDACC__)
#include "ptx90.h"
#else
#include "../../emulation/twins90.h"
#endif

// c[m, n] = a[m, k] b[n, k]^T; the maps hold a and b as boxes of 128 rows of 64 values, swizzled by 128 bytes.
struct HopperGemmParams {
    TensorMap a_map, b_map;
    void* c; // bf16 or float32 [m, ldc]
    int32_t m, n, k, ldc, c_is_float32;
    int32_t reserved[9];
};
static_assert(sizeof(HopperGemmParams) == 320, "src/params.rs mirrors this");

// The same with e4m3 operands: boxes of 128 rows of 128 values, a scale per 1x128 of a and per 128x128 of b.
struct HopperFp8GemmParams {
    TensorMap a_map, b_map;
    void* c;               // bf16 or float32 [m, ldc]
    const float* a_scales; // [m, a_scales_stride]
    const float* b_scales; // [ceil(n / 128), b_scales_stride]
    int32_t m, n, k, ldc, a_scales_stride, b_scales_stride, c_is_float32;
    int32_t reserved[3];
};
static_assert(sizeof(HopperFp8GemmParams) == 320, "src/params.rs mirrors this");
