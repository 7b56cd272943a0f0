// SwiGLU and quantisation. One block per row and 1024 columns; no shared memory.
#pragma once
#include "../common/kernel.h"

constexpr int ACTIVATION_THREADS = 128;

template <bool GATED, bool FP8> DEVICE void activation(const ActivationParams& p) {
    const int row = block_x(), at = (block_y() * ACTIVATION_THREADS + thread_index()) * 8;
    const bf16* x = p.x + (int64_t)row * p.x_stride;
    const bool inside = within(at, p.width);
    float v[8] = {};
    if (inside) {
        unpack(v, load_vector(x + at));
        if (GATED) {
            float up[8];
            unpack(up, load_vector(x + p.width + at));
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = mul_rn(div_rn(v[j], add_rn(1.f, exp_exact(-v[j]))), up[j]);
        }
    }
    if (FP8) {
        uint32_t codes[2];
        const float scale = quantise_group(codes, v, p.power_of_two_scales);
        if (inside) {
            uint8_t* out = static_cast<uint8_t*>(p.out) + (int64_t)row * p.out_stride + at;
            reinterpret_cast<uint32_t*>(out)[0] = codes[0];
            reinterpret_cast<uint32_t*>(out)[1] = codes[1];
            if (at % QUANT_GROUP == 0)
                p.scales[(int64_t)row * p.scales_stride + at / QUANT_GROUP] = scale;
        }
    } else if (inside) {
        store_vector(static_cast<bf16*>(p.out) + (int64_t)row * p.out_stride + at, pack(v));
    }
}
