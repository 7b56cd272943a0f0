// Merges the parts of MLA decode in ascending order. Bytes: rows * heads * parts * latent * 4 read.
#include "../common/kernel.h"

constexpr int MLA_COMBINE_THREADS = 128;

KERNEL(mla_combine_bf16, MlaCombineParams, MLA_COMBINE_THREADS) {
    const int row = block_x(), head = block_y();
    const int length = p.lengths[row], parts = length > 0 ? ceil_div(length, p.split_tokens) : 0;
    const int64_t first = ((int64_t)row * p.heads + head) * p.splits;
    float best = -__builtin_huge_valf(), total = 0.f;
    for (int i = 0; within(i, parts); i++) best = max_or_nan(best, p.lse[first + i]);
    for (int i = 0; within(i, parts); i++) total = add_rn(total, exp2_fast(p.lse[first + i] - best));
    for (int at = thread_index() * 2; within(at, p.latent); at += 2 * MLA_COMBINE_THREADS) {
        float low = 0.f, high = 0.f;
        for (int i = 0; within(i, parts); i++) {
            const float weight = div_rn(exp2_fast(p.lse[first + i] - best), total);
            const float* from = p.partial + (first + i) * p.latent + at;
            low = fma_rn(weight, from[0], low);
            high = fma_rn(weight, from[1], high);
        }
        bf16* to = p.out + (int64_t)row * p.out_row + (int64_t)head * p.out_head + at;
        *reinterpret_cast<uint32_t*>(to) = bf16_pair(low, high);
    }
}
