// c[m, n] = a[m, k] b[n, k]^T in bf16 with float32 sums.
// Bytes: 2 n k (weights) + 2 m k + 2 m n; FLOPs: 2 m n k. Up to 16 or 32 rows the weights are the cost.
#include "gemm.h"

KERNEL(gemm_bf16_stream16, GemmParams, STREAM_THREADS) { gemm_stream<Bf16, 1>(p, batched_problem<Bf16>(p, 16)); }
KERNEL(gemm_bf16_stream32, GemmParams, STREAM_THREADS) { gemm_stream<Bf16, 2>(p, batched_problem<Bf16>(p, 32)); }
KERNEL(gemm_bf16_tile, GemmParams, TILE_THREADS) { gemm_tile<Bf16>(p, batched_problem<Bf16>(p, TILE_ROWS)); }
