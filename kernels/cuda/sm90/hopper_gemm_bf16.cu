// c[m, n] = a[m, k] b[n, k]^T in bf16 with TMA and wgmma, for up to 16, 32, 64 and 128 rows in a block.
// Bytes: 2 n k (weights) + 2 m k + 2 m n; FLOPs: 2 m n k.
#include "hopper_gemm.h"

KERNEL(hopper_gemm_bf16_16, HopperGemmParams, HopperBf16::THREADS) { hopper_gemm<HopperBf16, 16>(p); }
KERNEL(hopper_gemm_bf16_32, HopperGemmParams, HopperBf16::THREADS) { hopper_gemm<HopperBf16, 32>(p); }
KERNEL(hopper_gemm_bf16_64, HopperGemmParams, HopperBf16::THREADS) { hopper_gemm<HopperBf16, 64>(p); }
KERNEL(hopper_gemm_bf16_128, HopperGemmParams, HopperBf16::THREADS) { hopper_gemm<HopperBf16, 128>(p); }
