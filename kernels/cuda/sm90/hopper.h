// What the Hopper GEMMs share: a ring of stages that one warp fills by TMA and two warpgroups empty.
//
// `full` says that a stage has landed: one arrival, and the bytes it announced. `empty` says that all eight warps have read
// it. A row of a stage is 128 bytes of k, one swizzle span.
#pragma once
#include "../common/kernel.h"
#include "../common/kernel90.h"

constexpr int HOPPER_ROWS = 128, HOPPER_COLUMNS = 128, HOPPER_K_BYTES = 128, HOPPER_STAGES = 4;
constexpr int HOPPER_WARPS = 8, HOPPER_THREADS = 32 * (HOPPER_WARPS + 1);
constexpr int HOPPER_OPERAND_BYTES = HOPPER_ROWS * HOPPER_K_BYTES;
static_assert(HOPPER_ROWS == HOPPER_COLUMNS, "both operands of a stage are the same size");

struct HopperShared {
    alignas(1024) unsigned char stage[HOPPER_STAGES][2][HOPPER_OPERAND_BYTES];
    uint64_t full[HOPPER_STAGES], empty[HOPPER_STAGES];
};
static_assert(sizeof(HopperShared) == 132096, "src/plan.rs asks for this much");

// One lane: keeps every stage in flight. `k` is the values of a row of a box.
template <class Params> DEVICE void hopper_produce(const Params& p, HopperShared& s, int k_tiles, int k) {
    for (int tile = 0; tile < k_tiles; tile++) {
        const int stage = tile % HOPPER_STAGES, round = tile / HOPPER_STAGES;
        mbarrier_wait(&s.empty[stage], (round & 1) ^ 1); // the first round does not wait
        mbarrier_arrive_expect(&s.full[stage], 2 * HOPPER_OPERAND_BYTES);
        tma_load(s.stage[stage][0], &p.a_map, tile * k, block_y() * HOPPER_ROWS, &s.full[stage]);
        tma_load(s.stage[stage][1], &p.b_map, tile * k, block_x() * HOPPER_COLUMNS, &s.full[stage]);
    }
}

template <class Params> DEVICE void hopper_store(const Params& p, int row, int column, float low, float high) {
    if (!within(row, p.m) || !within(column, p.n)) return;
    const bool both = within(column + 1, p.n);
    const int64_t index = (int64_t)row * p.ldc + column;
    if (p.c_is_float32) {
        float* c = static_cast<float*>(p.c) + index;
        c[0] = low;
        if (both) c[1] = high;
    } else if (both && (p.ldc & 1) == 0) {
        *reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.c) + index) = bf16_pair(low, high);
    } else {
        bf16* c = static_cast<bf16*>(p.c) + index;
        c[0] = bf16_from(low);
        if (both) c[1] = bf16_from(high);
    }
}

// Prepares the barriers and leaves with them visible to all. True for the producer's warp, whose work is then done.
template <class Params> DEVICE bool hopper_begin(const Params& p, HopperShared& s, int k_tiles, int k) {
    if (thread_index() == 0) {
#pragma unroll
        for (int i = 0; i < HOPPER_STAGES; i++) {
            mbarrier_init(&s.full[i], 1);
            mbarrier_init(&s.empty[i], HOPPER_WARPS);
        }
        mbarrier_init_fence();
    }
    block_sync(); // nobody meets a barrier that is not there yet
    if (warp_index() != HOPPER_WARPS) return false;
    if (lane_index() == 0) hopper_produce(p, s, k_tiles, k);
    return true; // no block barrier follows
}
