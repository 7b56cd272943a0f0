// The experts' matrices: rows sorted by expert, each tile of rows with its own b. Tiles come from permute.cu.
// Bytes: 2 n k per expert that has a row; FLOPs: 2 rows n k.
#include "gemm.h"

KERNEL(grouped_gemm_bf16_stream16, GemmParams, STREAM_THREADS) {
    const Problem at = grouped_problem<Bf16>(p);
    if (at.row_end) gemm_stream<Bf16, 1>(p, at);
}
KERNEL(grouped_gemm_bf16_tile, GemmParams, TILE_THREADS) {
    const Problem at = grouped_problem<Bf16>(p);
    if (at.row_end) gemm_tile<Bf16>(p, at);
}
