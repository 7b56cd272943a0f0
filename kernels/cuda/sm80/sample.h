// What the sampling kernels share: the weight of a logit, the rank of a token, sums over the block in a fixed order.
//
// Arithmetic is float64, as in the engine's sampler on the CPU, so that both choose the same token; only the order of sums
// differs, which is a matter of 1e-16.
#pragma once
#include "../common/kernel.h"

constexpr int SAMPLE_THREADS = 512, SAMPLE_WARPS = SAMPLE_THREADS / 32;
// Of a row's numbers, in this order.
enum SampleNumber { TEMPERATURE, TOP_P, MIN_P, PRESENCE, FREQUENCY, REPETITION, SAMPLE_NUMBERS };
// Temperatures below this are greedy (the CPU's bound).
constexpr float GREEDY_TEMPERATURE = 1e-5f;

DEVICE double warp_sum(double v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v = v + shuffle_xor(v, mask);
    return v;
}
DEVICE int warp_sum(int v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v = v + shuffle_xor(v, mask);
    return v;
}

// Higher logits first, the lower token among equals: every token has its own rank.
DEVICE uint64_t rank_of(float logit, int token) {
    const uint32_t bits = bits_of(logit), ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)ordered << 32 | (0xffffffffu - (uint32_t)token);
}
DEVICE int token_of(uint64_t rank) { return (int)(0xffffffffu - (uint32_t)rank); }

struct Best {
    float logit;
    int token;
};
struct BestShared {
    float logit[SAMPLE_WARPS];
    int token[SAMPLE_WARPS];
};

// The highest logit of the row, the lower token among equals, for every thread.
DEVICE Best block_best(const float* logits, int vocabulary, BestShared& s) {
    Best best = {-__builtin_huge_valf(), 0x7fffffff};
    for (int i = thread_index(); within(i, vocabulary); i += SAMPLE_THREADS) {
        if (logits[i] > best.logit) best = {logits[i], i};
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        const Best other = {shuffle_xor(best.logit, mask), shuffle_xor(best.token, mask)};
        if (other.logit > best.logit || (other.logit == best.logit && other.token < best.token)) best = other;
    }
    if (lane_index() == 0) {
        s.logit[warp_index()] = best.logit;
        s.token[warp_index()] = best.token;
    }
    block_sync(); // every warp's best is there
#pragma unroll
    for (int w = 0; w < SAMPLE_WARPS; w++)
        if (s.logit[w] > best.logit || (s.logit[w] == best.logit && s.token[w] < best.token))
            best = {s.logit[w], s.token[w]};
    return best;
}
