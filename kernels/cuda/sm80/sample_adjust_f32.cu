// Logits as the request wants them: bias, then repetition, presence and frequency penalties, then the mask.
// Bytes: rows * vocabulary * 4, three times (logits, out, counts), and the tokens so far.
#include "sample.h"

// The history's tokens are counted first: bit 31 for any, the rest is how often one was generated.
constexpr uint32_t SEEN = 0x80000000u;

KERNEL(sample_adjust_f32, SampleAdjustParams, SAMPLE_THREADS) {
    const int row = block_x(), t = thread_index();
    const float* logits = p.logits + (int64_t)row * p.stride;
    float* out = p.out + (int64_t)row * p.stride;
    uint32_t* counts = p.counts + (int64_t)row * p.stride;
    const float* numbers = p.numbers + row * SAMPLE_NUMBERS;
    for (int i = t; within(i, p.vocabulary); i += SAMPLE_THREADS) {
        counts[i] = 0;
        out[i] = logits[i];
    }
    block_sync(); // counts are zero, logits are there
    const int output = p.offsets[2 * row + 1], end = p.offsets[2 * row + 2];
    for (int i = p.offsets[2 * row] + t; i < end; i += SAMPLE_THREADS) {
        const int token = p.tokens[i];
        if (!within(token, p.vocabulary)) continue;
        atomic_or(counts + token, SEEN);
        if (i >= output) atomic_add(counts + token, 1u);
    }
    if (p.bias_offsets) {
        for (int i = p.bias_offsets[row] + t; i < p.bias_offsets[row + 1]; i += SAMPLE_THREADS) {
            const int token = p.bias_tokens[i]; // each once
            if (within(token, p.vocabulary)) out[token] = add_rn(out[token], p.bias[i]);
        }
    }
    block_sync(); // all are counted and biased
    const float repetition = numbers[REPETITION];
    for (int i = t; within(i, p.vocabulary); i += SAMPLE_THREADS) {
        float logit = out[i];
        const uint32_t count = counts[i], generated = count & ~SEEN;
        if (count && repetition != 1.f) logit = logit > 0.f ? div_rn(logit, repetition) : mul_rn(logit, repetition);
        if (generated)
            logit = add_rn(logit, -add_rn(numbers[PRESENCE], mul_rn(numbers[FREQUENCY], (float)generated)));
        if (p.mask && !(p.mask[(int64_t)row * p.mask_stride + i / 32] >> (i % 32) & 1)) logit = -__builtin_huge_valf();
        out[i] = logit;
    }
}
