// c[m, n] = sum over k blocks of 128 of a_scale b_scale (a b^T), e4m3 operands, with TMA and wgmma, for up to 16, 32, 64 and
// 128 rows in a block. Bytes: n k (weights) + m k + 2 m n; FLOPs: 2 m n k, at twice the rate of bf16.
#include "hopper_gemm.h"

KERNEL(hopper_gemm_fp8_16, HopperGemmParams, HopperFp8::THREADS) { hopper_gemm<HopperFp8, 16>(p); }
KERNEL(hopper_gemm_fp8_32, HopperGemmParams, HopperFp8::THREADS) { hopper_gemm<HopperFp8, 32>(p); }
KERNEL(hopper_gemm_fp8_64, HopperGemmParams, HopperFp8::THREADS) { hopper_gemm<HopperFp8, 64>(p); }
KERNEL(hopper_gemm_fp8_128, HopperGemmParams, HopperFp8::THREADS) { hopper_gemm<HopperFp8, 128>(p); }
