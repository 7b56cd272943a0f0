// Sums and maxima over lanes, in an order that never depends on the data or the batch.
#pragma once

DEVICE float warp_sum(float v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v = add_rn(v, shuffle_xor(v, mask));
    return v;
}

// The larger one; NaN beats everything, unlike fmaxf, so that a broken value stays visible.
DEVICE float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }
DEVICE float warp_max(float v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v = max_or_nan(v, shuffle_xor(v, mask));
    return v;
}

// Sum over the block; `partial` is one float per warp of shared memory, used once between barriers.
template <int WARPS> DEVICE float block_sum(float v, float* partial) {
    v = warp_sum(v);
    if (lane_index() == 0) partial[warp_index()] = v;
    block_sync();
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum = add_rn(sum, partial[w]);
    return sum;
}

// The scale of a quantised group, and values in it. Formula: DeepSeek-V3 inference/kernel.py, act_quant.
DEVICE float quant_scale(float amax, bool power_of_two) {
    float scale = div_rn(max_or_nan(amax, QUANT_AMAX_MIN), E4M3_MAX);
    if (power_of_two && scale == scale) {
        uint32_t bits = bits_of(scale);
        scale = float_of((bits + 0x7fffffu) & 0xff800000u);
    }
    return scale;
}

// Nearest e4m3, ties to even, saturating; NaN stays NaN. Same bits as cvt.rn.satfinite.e4m3x2.f32.
DEVICE e4m3 e4m3_from(float value) {
    uint32_t bits = bits_of(value), sign = (bits >> 24) & 0x80, magnitude = bits & 0x7fffffff;
    uint32_t code;
    if (magnitude > 0x7f800000u) {
        code = 0x7f;
    } else if (magnitude >= 0x43e00000u) { // 448 and up
        code = 0x7e;
    } else if (magnitude < 0x3c800000u) { // below 2^-6: multiples of 2^-9
        code = (uint32_t)round_even(mul_rn(float_of(magnitude), 512.f));
    } else {
        magnitude += 0x7ffff + ((magnitude >> 20) & 1);
        code = (magnitude >> 20) - (120 << 3);
        code = code > 0x7e ? 0x7e : code;
    }
    e4m3 r;
    r.bits = (uint8_t)(code | sign);
    return r;
}

// Two of four e4m3 codes as bf16, exactly: the code's bits sit 120 too low in the exponent. The NaN code reads as 480;
// quantised activations carry NaN in their scale instead, and the loader refuses it in weights.
DEVICE uint32_t bf16_pair_from_e4m3(uint32_t spread) {
    uint32_t shifted = (spread & 0x80008000u) | ((spread & 0x7f007f00u) >> 4);
    return bf16_pair_fma(shifted, 0x7b807b80u, 0x80008000u); // times 2^120, plus -0
}
DEVICE uint32_t bf16_pair_from_e4m3_low(uint32_t codes) { return bf16_pair_from_e4m3(permute_bytes(codes, 0, 0x1404)); }
DEVICE uint32_t bf16_pair_from_e4m3_high(uint32_t codes) { return bf16_pair_from_e4m3(permute_bytes(codes, 0, 0x3424)); }

// Eight bf16 of a vector as floats and back.
DEVICE void unpack(float (&to)[8], const Vector& v) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = float_of(v.word[i] << 16);
        to[2 * i + 1] = float_of(v.word[i] & 0xffff0000u);
    }
}
DEVICE Vector pack(const float (&from)[8]) {
    Vector v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.word[i] = bf16_pair(from[2 * i], from[2 * i + 1]);
    return v;
}

// Quantises eight values per lane; the 16 lanes of a half warp are one group of 128 and share its scale.
// Lanes outside the row pass zeros. The scale is NaN when any value is.
DEVICE float quantise_group(uint32_t (&codes)[2], const float (&v)[8], bool power_of_two) {
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) amax = max_or_nan(v[i] < 0.f ? -v[i] : v[i], amax);
#pragma unroll
    for (int mask = 8; mask > 0; mask >>= 1) amax = max_or_nan(amax, shuffle_xor(amax, mask));
    const float scale = quant_scale(amax, power_of_two);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        codes[half] = 0;
#pragma unroll
        for (int i = 0; i < 4; i++)
            codes[half] |= (uint32_t)e4m3_from(div_rn(v[4 * half + i], scale)).bits << (8 * i);
    }
    return scale;
}
