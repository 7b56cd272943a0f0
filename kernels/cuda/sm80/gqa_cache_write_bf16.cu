// What happens to the heads of a row between the projections and attention, in one pass: bias, norm of each head (Qwen3),
// half-split rotation; queries stay where they are, keys and values go to the paged cache.
// Bytes: rows * (heads + 2 kv_heads) * width * 4. One warp a head; two neighbouring pairs a lane.
#include "rope.h"

constexpr int GQA_WRITE_THREADS = 128, GQA_WRITE_WARPS = GQA_WRITE_THREADS / 32;

// Two neighbouring values.
DEVICE void load_two(float (&to)[2], const bf16* from) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
    to[0] = float_of(word << 16);
    to[1] = float_of(word & 0xffff0000u);
}
DEVICE void store_two(bf16* to, const float (&from)[2]) {
    *reinterpret_cast<uint32_t*>(to) = bf16_pair(from[0], from[1]);
}

KERNEL(gqa_cache_write_bf16, GqaCacheWriteParams, GQA_WRITE_THREADS) {
    const int row = block_x(), head = block_y() * GQA_WRITE_WARPS + warp_index();
    if (!within(head, p.heads + 2 * p.kv_heads)) return; // a whole warp, and no barrier below
    const bool query = head < p.heads, key = !query && head < p.heads + p.kv_heads;
    const int of_kind = query ? head : key ? head - p.heads : head - p.heads - p.kv_heads;
    const int64_t slot = p.slots[row];
    if (!query && !within(slot, p.slots_count)) return; // a padding row
    const bf16* from = query ? p.q + (int64_t)row * p.q_stride
                             : (key ? p.k : p.v) + (int64_t)row * p.kv_stride;
    const bf16* bias = query ? p.q_bias : key ? p.k_bias : p.v_bias;
    const bf16* weight = query ? p.q_norm : key ? p.k_norm : nullptr;
    const int half = p.width / 2, pair = 2 * lane_index(); // width <= 128, a multiple of 4
    const bool inside = within(pair, half);
    float v[2][2] = {};
    if (inside) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int at = of_kind * p.width + h * half + pair;
            load_two(v[h], from + at);
            if (bias) {
                float b[2];
                load_two(b, bias + at);
#pragma unroll
                for (int i = 0; i < 2; i++) v[h][i] = add_rn(v[h][i], b[i]);
            }
        }
    }
    if (weight) {
        float squares = 0.f;
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 2; i++) squares = fma_rn(v[h][i], v[h][i], squares);
        const float eps = query ? p.q_eps : p.k_eps;
        const float factor = div_rn(1.f, sqrt_rn(add_rn(div_rn(warp_sum(squares), (float)p.width), eps)));
        if (inside) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float w[2];
                load_two(w, weight + h * half + pair);
#pragma unroll
                for (int i = 0; i < 2; i++) v[h][i] = mul_rn(mul_rn(v[h][i], factor), w[i]);
            }
        }
    }
    if (!inside) return;
    if (query || key) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const Pair r = rotate(v[0][i], v[1][i], p.table, p.positions[row], p.positions_max, half, pair + i);
            v[0][i] = r.a;
            v[1][i] = r.b;
        }
    }
    bf16* to = p.q + (int64_t)row * p.q_stride + (int64_t)of_kind * p.width;
    if (!query) {
        const int64_t block = slot / p.block_size, offset = slot % p.block_size;
        to = p.cache + (((block * p.kv_heads + of_kind) * 2 + (key ? 0 : 1)) * p.block_size + offset) * p.width;
    }
    store_two(to + pair, v[0]);
    store_two(to + half + pair, v[1]);
}
