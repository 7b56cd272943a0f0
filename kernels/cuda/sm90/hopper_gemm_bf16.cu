// c[m, n] = a[m, k] b[n, k]^T in bf16 with TMA and wgmma.
// Bytes: 2 n k + 2 m k + 2 m n; FLOPs: 2 m n k. A tile of 128 x 128 does 64 FLOP per byte that enters shared memory.
//
// Two warpgroups multiply 64 rows each; a warp of its own keeps four stages of TMA in flight. `full` says that a stage
// has landed, `empty` that all eight warps have read it.
//
// Surprise: one sum over the whole of k, so the bits differ from the sm_80 kernels, which sum in slices. A caller that
// wants batch invariance uses one of the two for all of its rows.
#include "hopper.h"

constexpr int HOPPER_K = HOPPER_K_BYTES / 2;

KERNEL(hopper_gemm_bf16, HopperGemmParams, HOPPER_THREADS) {
    HopperShared& s = *reinterpret_cast<HopperShared*>(shared_memory());
    const int k_tiles = ceil_div(p.k, HOPPER_K), warp = warp_index(), lane = lane_index();
    if (hopper_begin(p, s, k_tiles, HOPPER_K)) return;
    float sum[64];
#pragma unroll
    for (int i = 0; i < 64; i++) sum[i] = 0.f;
    for (int tile = 0; tile < k_tiles; tile++) {
        const int stage = tile % HOPPER_STAGES, round = tile / HOPPER_STAGES;
        mbarrier_wait(&s.full[stage], round & 1);
        const unsigned char* a = s.stage[stage][0] + warp / 4 * 64 * 128;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < HOPPER_K / 16; k++)
            wgmma_bf16_64x128(sum, matrix_descriptor(a + 32 * k), matrix_descriptor(s.stage[stage][1] + 32 * k));
        wgmma_commit();
        wgmma_wait<1>(); // the products of the tile before have been read
        if (tile > 0 && lane == 0) mbarrier_arrive(&s.empty[(tile - 1) % HOPPER_STAGES]);
    }
    wgmma_wait<0>();
    const int row = block_y() * HOPPER_ROWS + warp * 16 + lane / 4, column = block_x() * HOPPER_COLUMNS + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; i += 2)
        hopper_store(p, row + 8 * (i >> 1 & 1), column + i / 4 * 8, sum[i], sum[i + 1]);
}
