// The experts' matrices: rows sorted by expert, each tile of rows with its own b. Tiles come from permute.cu.
// Bytes: n k per expert that has a row; FLOPs: 2 rows n k.
#include "gemm.h"

KERNEL(grouped_gemm_fp8_stream16, GemmParams, STREAM_THREADS) {
    const Problem at = grouped_problem<Fp8>(p);
    if (at.row_end) gemm_stream<Fp8, 1>(p, at);
}
KERNEL(grouped_gemm_fp8_tile, GemmParams, TILE_THREADS) {
    const Problem at = grouped_problem<Fp8>(p);
    if (at.row_end) gemm_tile<Fp8>(p, at);
}
