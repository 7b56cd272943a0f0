// c[m, n] = sum over k blocks of 128 of a_scale b_scale (a b^T), e4m3 operands, float32 sums, in block order.
// Bytes: n k (weights) + m k + 2 m n; FLOPs: 2 m n k.
#include "gemm.h"

KERNEL(gemm_fp8_stream16, GemmParams, STREAM_THREADS) { gemm_stream<Fp8, 1>(p, batched_problem<Fp8>(p, 16)); }
KERNEL(gemm_fp8_stream32, GemmParams, STREAM_THREADS) { gemm_stream<Fp8, 2>(p, batched_problem<Fp8>(p, 32)); }
KERNEL(gemm_fp8_tile, GemmParams, TILE_THREADS) { gemm_tile<Fp8>(p, batched_problem<Fp8>(p, TILE_ROWS)); }
