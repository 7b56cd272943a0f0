// One rotation: (a, b) by the angle whose cosine and sine the table holds (YaRN is in the table, made by the host).
#pragma once
#include "../common/kernel.h"

struct Pair {
    float a, b;
};
// A position outside the table gives NaN: loud, and no stray read.
DEVICE Pair rotate(float a, float b, const float* table, int position, int positions_max, int half, int pair) {
    float c = float_of(0x7fc00000u), s = c;
    if (within(position, positions_max)) {
        const float* cos_sin = table + ((int64_t)position * half + pair) * 2;
        c = cos_sin[0];
        s = cos_sin[1];
    }
    return {fma_rn(a, c, -mul_rn(b, s)), fma_rn(a, s, mul_rn(b, c))};
}
