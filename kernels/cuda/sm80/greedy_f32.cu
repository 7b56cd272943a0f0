// The most probable token of each row, its log-probability, and whether the row is sane.
// Bytes: rows * vocabulary * 4, twice (the second time from the second cache).
#include "../common/kernel.h"

constexpr int GREEDY_THREADS = 512, GREEDY_WARPS = GREEDY_THREADS / 32;

struct GreedyShared {
    float best[GREEDY_WARPS], sum[GREEDY_WARPS];
    int token[GREEDY_WARPS], broken[GREEDY_WARPS];
};
static_assert(sizeof(GreedyShared) == 256, "src/plan.rs asks for this much");

// The lower token wins ties.
KERNEL(greedy_f32, GreedyParams, GREEDY_THREADS) {
    GreedyShared& s = *reinterpret_cast<GreedyShared*>(shared_memory());
    const int row = block_x(), t = thread_index(), warp = warp_index();
    const float* logits = p.logits + (int64_t)row * p.stride;
    constexpr int NONE = 0x7fffffff;
    float best = -__builtin_huge_valf();
    int token = NONE, broken = NONE; // broken: the first logit that is not finite
    for (int i = t; within(i, p.vocabulary); i += GREEDY_THREADS) {
        const float logit = logits[i];
        if (!(logit - logit == 0.f)) broken = i < broken ? i : broken;
        if (logit > best) {
            best = logit;
            token = i;
        }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        const float other = shuffle_xor(best, mask);
        const int other_token = shuffle_xor(token, mask), other_broken = shuffle_xor(broken, mask);
        if (other > best || (other == best && other_token < token)) {
            best = other;
            token = other_token;
        }
        broken = other_broken < broken ? other_broken : broken;
    }
    if (lane_index() == 0) {
        s.best[warp] = best;
        s.token[warp] = token;
        s.broken[warp] = broken;
    }
    block_sync(); // every warp's best is there
#pragma unroll
    for (int w = 0; w < GREEDY_WARPS; w++) {
        if (s.best[w] > best || (s.best[w] == best && s.token[w] < token)) {
            best = s.best[w];
            token = s.token[w];
        }
        broken = s.broken[w] < broken ? s.broken[w] : broken;
    }
    float sum = 0.f;
    for (int i = t; within(i, p.vocabulary); i += GREEDY_THREADS) sum = add_rn(sum, exp_exact(add_rn(logits[i], -best)));
    const float total = block_sum<GREEDY_WARPS>(sum, s.sum);
    if (t == 0) {
        p.tokens[row] = token;
        p.log_probabilities[row] = -log_exact(total);
        p.broken[row] = broken == NONE ? -1 : broken;
    }
}
