// Sorts (token, choice) pairs by expert, stably, and lists the tiles of the grouped GEMM. One block per expert; each
// scans all pairs, so no block waits for another and the order never depends on timing.
// Bytes: experts * pairs * 4 from the second cache, twice.
#include "../common/kernel.h"

constexpr int PERMUTE_THREADS = 256, PERMUTE_WARPS = PERMUTE_THREADS / 32;

KERNEL(permute, PermuteParams, PERMUTE_THREADS) {
    int* counts = reinterpret_cast<int*>(shared_memory()); // [2][PERMUTE_WARPS]
    const int expert = block_x(), t = thread_index(), pairs = p.tokens * p.top_k;
    // How many rows lie before this expert's, and how many it has.
    int before = 0, own = 0;
    for (int i = t; within(i, pairs); i += PERMUTE_THREADS) {
        const int chosen = p.chosen[i];
        before += chosen < expert;
        own += chosen == expert;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        before += shuffle_xor(before, mask);
        own += shuffle_xor(own, mask);
    }
    if (lane_index() == 0) {
        counts[warp_index()] = before;
        counts[PERMUTE_WARPS + warp_index()] = own;
    }
    block_sync();
    before = own = 0;
#pragma unroll
    for (int w = 0; w < PERMUTE_WARPS; w++) {
        before += counts[w];
        own += counts[PERMUTE_WARPS + w];
    }
    if (t == 0) {
        p.offsets[expert] = before;
        if (expert == p.experts - 1) p.offsets[p.experts] = before + own;
    }
    // floor(before / tile) + expert never collides with the neighbours and needs no prefix sum over tiles.
    const int first = before / p.tile_rows + expert, next = (before + own) / p.tile_rows + expert + 1;
    for (int i = t; within(first + i, next); i += PERMUTE_THREADS) {
        const bool used = within(i * p.tile_rows, own) && within(expert - p.first_expert, p.experts_held);
        p.tiles[2 * (first + i)] = used ? expert - p.first_expert : -1;
        p.tiles[2 * (first + i) + 1] = before + i * p.tile_rows;
    }
    int row = before;
    for (int base = 0; base < pairs; base += PERMUTE_THREADS) {
        const int i = base + t;
        const bool mine = within(i, pairs) && p.chosen[i] == expert;
        const uint32_t votes = vote(mine);
        block_sync(); // everyone has read the counts of the step before
        if (lane_index() == 0) counts[warp_index()] = popcount(votes);
        block_sync();
        int ahead = popcount(votes & ((1u << lane_index()) - 1)), all = 0;
#pragma unroll
        for (int w = 0; w < PERMUTE_WARPS; w++) {
            if (w < warp_index()) ahead += counts[w];
            all += counts[w];
        }
        if (mine) {
            p.row_token[row + ahead] = i / p.top_k;
            p.slot_row[i] = row + ahead;
        }
        row += all;
    }
}
