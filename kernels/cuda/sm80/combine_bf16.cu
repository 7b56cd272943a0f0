// Weighted sum of the experts' outputs of each token, in the order of its choices, plus the shared expert's.
// Bytes: tokens * width * 2 * (top_k + 2); 2 FLOPs per value read.
#include "../common/kernel.h"

constexpr int COMBINE_THREADS = 128;

KERNEL(combine_bf16, CombineParams, COMBINE_THREADS) {
    const int token = block_x(), at = (block_y() * COMBINE_THREADS + thread_index()) * 8;
    if (!within(at, p.width)) return; // no barrier below
    float sum[8] = {}, y[8];
    for (int c = 0; c < p.top_k; c++) {
        const int64_t slot = (int64_t)token * p.top_k + c;
        const float weight = p.weights[slot];
        unpack(y, load_vector(p.y + (int64_t)p.slot_row[slot] * p.y_stride + at));
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] = fma_rn(weight, y[j], sum[j]);
    }
    if (p.shared) {
        unpack(y, load_vector(p.shared + (int64_t)token * p.width + at));
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] = add_rn(sum[j], y[j]);
    }
    store_vector(p.out + (int64_t)token * p.width + at, pack(sum));
}
