// Norm of the latent, rotation of the shared key part and the paged write, in one pass.
// Bytes: rows * (latent + rotary) * 4. The norm never touches the rotary part.
//
// The fp8 form of a row is latent codes, a float32 scale for each 128 of them, then the rotary values in bf16: 656 bytes for
// 512 and 64.
#pragma once
#include "rope.h"

constexpr int CACHE_WRITE_THREADS = 128;

template <bool FP8> DEVICE void mla_cache_write(const CacheWriteParams& p) {
    float* partial = reinterpret_cast<float*>(shared_memory());
    const int row = block_x(), t = thread_index();
    const int64_t slot = p.slots[row];
    if (!within(slot, p.slots_count)) return; // the whole block: a padding row
    const bf16* kv = p.kv + (int64_t)row * p.kv_stride;
    const int row_bytes = FP8 ? mla_fp8_row_bytes(p.latent, p.rotary) : 2 * (p.latent + p.rotary);
    unsigned char* to = static_cast<unsigned char*>(p.cache) + slot * row_bytes;
    float v[8] = {}, squares = 0.f; // latent <= 1024
    const bool inside = within(t * 8, p.latent);
    if (inside) unpack(v, load_vector(kv + t * 8));
#pragma unroll
    for (int j = 0; j < 8; j++) squares = fma_rn(v[j], v[j], squares);
    const float sum = block_sum<CACHE_WRITE_THREADS / 32>(squares, partial);
    const float factor = div_rn(1.f, sqrt_rn(add_rn(div_rn(sum, (float)p.latent), p.eps)));
    if (inside) {
        float w[8];
        unpack(w, load_vector(p.weight + t * 8));
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = mul_rn(mul_rn(v[j], factor), w[j]);
    }
    if (FP8) {
        uint32_t codes[2];
        const float scale = quantise_group(codes, v, false); // all lanes: those outside hold zeros
        if (inside) {
            reinterpret_cast<uint32_t*>(to)[2 * t] = codes[0];
            reinterpret_cast<uint32_t*>(to)[2 * t + 1] = codes[1];
            if (t * 8 % QUANT_GROUP == 0) reinterpret_cast<float*>(to + p.latent)[t * 8 / QUANT_GROUP] = scale;
        }
    } else if (inside) {
        store_vector(to + t * 16, pack(v));
    }
    uint32_t* rotated = reinterpret_cast<uint32_t*>(to + row_bytes - 2 * p.rotary);
    const int position = p.positions[row], half = p.rotary / 2;
    for (int pair = t; within(pair, half); pair += CACHE_WRITE_THREADS) {
        const bf16* from = kv + p.latent + 2 * pair;
        const Pair r = 
            rotate(float_from(from[0]), float_from(from[1]), p.table, position, p.positions_max, half, pair);
        rotated[pair] = bf16_pair(r.a, r.b);
    }
}
