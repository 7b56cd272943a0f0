// c[m, n] = sum over k blocks of 128 of a_scale b_scale (a b^T), e4m3 operands, with TMA and wgmma.
// Bytes: n k + m k + 2 m n; FLOPs: 2 m n k, twice the rate of bf16.
//
// A stage is one block of 128 values of k, which is also where the scales change. The tensor cores sum a block; the
// block's sum is then scaled and added in float32, because their own sums keep only about 14 bits over many blocks
// (DeepSeek-V3 report, section 3.3.2).
#include "hopper.h"

static_assert(HOPPER_K_BYTES == QUANT_GROUP, "a stage is one scale block");
static_assert(HOPPER_COLUMNS == QUANT_GROUP, "a tile has one weight scale per k block");

KERNEL(hopper_gemm_fp8, HopperFp8GemmParams, HOPPER_THREADS) {
    HopperShared& s = *reinterpret_cast<HopperShared*>(shared_memory());
    const int k_tiles = ceil_div(p.k, QUANT_GROUP), warp = warp_index(), lane = lane_index();
    if (hopper_begin(p, s, k_tiles, QUANT_GROUP)) return;
    const int row = block_y() * HOPPER_ROWS + warp * 16 + lane / 4;
    const float* a_scale[2];
#pragma unroll
    for (int h = 0; h < 2; h++)
        a_scale[h] = within(row + 8 * h, p.m) ? p.a_scales + (int64_t)(row + 8 * h) * p.a_scales_stride : nullptr;
    const float* b_scale = p.b_scales + (int64_t)block_x() * p.b_scales_stride;
    float sum[64], part[64];
#pragma unroll
    for (int i = 0; i < 64; i++) sum[i] = part[i] = 0.f;
    for (int tile = 0; tile < k_tiles; tile++) {
        const int stage = tile % HOPPER_STAGES, round = tile / HOPPER_STAGES;
        mbarrier_wait(&s.full[stage], round & 1);
        const unsigned char* a = s.stage[stage][0] + warp / 4 * 64 * HOPPER_K_BYTES;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < HOPPER_K_BYTES / 32; k++)
            wgmma_e4m3_64x128(part, matrix_descriptor(a + 32 * k), matrix_descriptor(s.stage[stage][1] + 32 * k), k > 0);
        wgmma_commit();
        float both[2];
#pragma unroll
        for (int h = 0; h < 2; h++) both[h] = a_scale[h] ? mul_rn(a_scale[h][tile], b_scale[tile]) : 0.f;
        wgmma_wait<0>(); // the other warpgroup keeps the tensor cores busy meanwhile
        if (lane == 0) mbarrier_arrive(&s.empty[stage]);
#pragma unroll
        for (int i = 0; i < 64; i++) sum[i] = fma_rn(part[i], both[i >> 1 & 1], sum[i]);
    }
    const int column = block_x() * HOPPER_COLUMNS + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; i += 2)
        hopper_store(p, row + 8 * (i >> 1 & 1), column + i / 4 * 8, sum[i], sum[i + 1]);
}
