// The natural log-probability of each row's token and of its most probable ones, before penalties, temperature and
// truncation, and whether the row is sane. Bytes: rows * vocabulary * 4, then `top` + 1 times from the second cache.
#include "sample.h"

struct LogprobsShared {
    BestShared best;
    double sums[SAMPLE_WARPS];
    int broken[SAMPLE_WARPS];
    uint64_t rank[2][SAMPLE_WARPS];
};
static_assert(sizeof(LogprobsShared) == 576, "src/plan/sampling.rs asks for this much");

KERNEL(logprobs_f32, LogprobsParams, SAMPLE_THREADS) {
    LogprobsShared& s = *reinterpret_cast<LogprobsShared*>(shared_memory());
    const int row = block_x(), t = thread_index(), lane = lane_index(), warp = warp_index();
    const float* logits = p.logits + (int64_t)row * p.stride;
    const Best best = block_best(logits, p.vocabulary, s.best);
    constexpr int NONE = 0x7fffffff;
    double sum = 0.0;
    int broken = NONE; // the first logit that is not finite
    for (int i = t; within(i, p.vocabulary); i += SAMPLE_THREADS) {
        const float logit = logits[i];
        if (!(logit - logit == 0.f)) broken = i < broken ? i : broken;
        sum = sum + exp_double((double)logit - (double)best.logit);
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        const int other = shuffle_xor(broken, mask);
        broken = other < broken ? other : broken;
    }
    if (lane == 0) {
        s.sums[warp] = sum;
        s.broken[warp] = broken;
    }
    block_sync(); // every warp's sum is there
    double total = 0.0;
    for (int w = 0; w < SAMPLE_WARPS; w++) {
        total = total + s.sums[w];
        broken = s.broken[w] < broken ? s.broken[w] : broken;
    }
    const double norm = (double)best.logit + log_double(total);
    if (t == 0) {
        const int token = p.tokens[row];
        p.chosen[row] = within(token, p.vocabulary) ? (float)((double)logits[token] - norm) : float_of(0x7fc00000u);
        p.broken[row] = broken == NONE ? -1 : broken;
    }
    // The best below the last one, again and again.
    uint64_t last = ~0ull;
    for (int n = 0; n < p.top; n++) {
        uint64_t rank = 0;
        for (int i = t; within(i, p.vocabulary); i += SAMPLE_THREADS) {
            const uint64_t own = rank_of(logits[i], i);
            if (own < last && own > rank) rank = own;
        }
#pragma unroll
        for (int mask = 16; mask > 0; mask >>= 1) {
            const uint64_t other = shuffle_xor(rank, mask);
            rank = other > rank ? other : rank;
        }
        if (lane == 0) s.rank[n % 2][warp] = rank; // in turns: the last but one has been read by all
        block_sync(); // every warp's best is there
        for (int w = 0; w < SAMPLE_WARPS; w++) rank = s.rank[n % 2][w] > rank ? s.rank[n % 2][w] : rank;
        last = rank;
        if (t == 0) {
            const int token = token_of(rank);
            const bool there = within(n, p.vocabulary);
            p.top_tokens[row * p.top + n] = there ? token : -1;
            p.top_values[row * p.top + n] = there ? (float)((double)logits[token] - norm) : float_of(0xff800000u);
        }
    }
}
