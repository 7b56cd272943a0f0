// Residual add, RMSNorm and, for fp8, the 1x128 quantisation, in one pass: each value is read once and kept in registers.
#pragma once
#include "../common/kernel.h"

constexpr int RMS_NORM_THREADS = 256;
constexpr int RMS_NORM_VECTORS = 8; // per thread, so width <= 256 * 8 * 8 = 16384
static_assert(RMS_NORM_THREADS * 8 % QUANT_GROUP == 0, "a group never straddles two steps");

template <bool FP8> DEVICE void rms_norm(const RmsNormParams& p) {
    float* partial = reinterpret_cast<float*>(shared_memory());
    const int row = block_x(), t = thread_index();
    const bf16* x = p.x + (int64_t)row * p.x_stride;
    float v[RMS_NORM_VECTORS][8];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < RMS_NORM_VECTORS; i++) {
        const int at = (i * RMS_NORM_THREADS + t) * 8;
#pragma unroll
        for (int j = 0; j < 8; j++) v[i][j] = 0.f;
        if (within(at, p.width)) {
            unpack(v[i], load_vector(x + at));
            if (p.residual) {
                bf16* residual = p.residual + (int64_t)row * p.width + at;
                float r[8];
                unpack(r, load_vector(residual));
#pragma unroll
                for (int j = 0; j < 8; j++) r[j] = add_rn(r[j], v[i][j]);
                const Vector sum = pack(r);
                store_vector(residual, sum);
                unpack(v[i], sum); // normed as it was stored
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j++) squares = fma_rn(v[i][j], v[i][j], squares);
    }
    const float sum = block_sum<RMS_NORM_THREADS / 32>(squares, partial);
    const float factor = div_rn(1.f, sqrt_rn(add_rn(div_rn(sum, (float)p.width), p.eps)));
#pragma unroll
    for (int i = 0; i < RMS_NORM_VECTORS; i++) {
        const int at = (i * RMS_NORM_THREADS + t) * 8;
        if (i * RMS_NORM_THREADS * 8 >= p.width) break; // the whole block leaves together
        const bool inside = within(at, p.width);
        if (inside) {
            float w[8];
            unpack(w, load_vector(p.weight + at));
#pragma unroll
            for (int j = 0; j < 8; j++) v[i][j] = mul_rn(mul_rn(v[i][j], factor), w[j]);
        }
        if (FP8) {
            uint32_t codes[2];
            const float scale = quantise_group(codes, v[i], p.power_of_two_scales);
            if (inside) {
                uint8_t* out = static_cast<uint8_t*>(p.out) + (int64_t)row * p.out_stride + at;
                reinterpret_cast<uint32_t*>(out)[0] = codes[0];
                reinterpret_cast<uint32_t*>(out)[1] = codes[1];
                if (at % QUANT_GROUP == 0)
                    p.scales[(int64_t)row * ceil_div(p.width, QUANT_GROUP) + at / QUANT_GROUP] = scale;
            }
        } else if (inside) {
            store_vector(static_cast<bf16*>(p.out) + (int64_t)row * p.out_stride + at, pack(v[i]));
        }
    }
}
