// Absorbed MLA decode over the paged latent cache, split over the context.
//
// Per query row, head and context token: 2 (latent + rotary) + 2 latent FLOPs on (latent + rotary) * 2 bytes that 16
// heads share: 30 FLOP/B per 16 heads at 512 + 64, so memory-bound by far. Each block streams its part of the cache once
// through a ring of three stages; 128 heads read it eight times, from the second cache.
//
// Invariant: parts begin at multiples of split_tokens of the sequence, whatever else is in the batch.
#pragma once
#include "../common/kernel.h"

constexpr int MLA_HEADS = 16, MLA_TOKENS = 32, MLA_STAGES = 3, MLA_DECODE_THREADS = 128;
constexpr int MLA_PROBABILITY_STRIDE = MLA_TOKENS + 8; // padded against bank conflicts

// Where a token of the sequence lies in the cache, in tokens.
DEVICE int64_t mla_slot(const MlaDecodeParams& p, int row, int token) {
    const int64_t block = p.blocks[(int64_t)row * p.blocks_stride + token / p.block_size];
    return block * p.block_size + token % p.block_size;
}

// The ring of tiles over a cache of bf16 rows [latent | rotary].
template <int LATENT, int ROTARY> struct MlaTiles {
    static constexpr int STRIDE = LATENT + ROTARY + 8; // 16 bytes more than a multiple of 128: ldmatrix meets all banks
    using Tile = bf16[MLA_TOKENS][STRIDE];
    static constexpr int CHUNKS = (LATENT + ROTARY) / 8;
    static_assert(CHUNKS % 4 == 0, "four threads copy a token");
    alignas(16) Tile k[MLA_STAGES];

    DEVICE void load(const MlaDecodeParams& p, int stage, int row, int first, int end) {
        const int line = thread_index() / 4, token = first + line;
        const bool valid = within(token, end);
        const bf16* from = static_cast<const bf16*>(p.cache);
        if (valid) from += mla_slot(p, row, token) * (LATENT + ROTARY);
#pragma unroll
        for (int i = 0; i < CHUNKS / 4; i++) {
            const int chunk = 4 * i + thread_index() % 4;
            copy_async(&k[stage][line][chunk * 8], valid ? from + chunk * 8 : from, valid);
        }
    }
    // The tile of a stage that has landed.
    DEVICE const Tile& ready(int stage) { return k[stage]; }
};

// The same over fp8 rows: latent codes, a float32 scale for each 128 of them, rotary bf16 values. The ring holds rows as
// they are stored; the tile that is multiplied is widened to bf16 when its turn comes, once for all heads of the block.
template <int LATENT, int ROTARY> struct MlaFp8Tiles {
    static constexpr int STRIDE = LATENT + ROTARY + 8;
    using Tile = bf16[MLA_TOKENS][STRIDE];
    static constexpr int ROW_BYTES = mla_fp8_row_bytes(LATENT, ROTARY);
    static_assert(LATENT == 4 * QUANT_GROUP && ROW_BYTES % 16 == 0 && ROTARY % 32 == 0, "a group for each of four threads");
    alignas(16) unsigned char raw[MLA_STAGES][MLA_TOKENS][ROW_BYTES];
    alignas(16) Tile k;

    DEVICE void load(const MlaDecodeParams& p, int stage, int row, int first, int end) {
        const int line = thread_index() / 4, token = first + line;
        const bool valid = within(token, end);
        const unsigned char* from = static_cast<const unsigned char*>(p.cache);
        if (valid) from += mla_slot(p, row, token) * ROW_BYTES;
        for (int at = thread_index() % 4 * 16; within(at, ROW_BYTES); at += 64)
            copy_async(&raw[stage][line][at], valid ? from + at : from, valid);
    }
    // A token past the end is zeros, its scales too.
    DEVICE const Tile& ready(int stage) {
        const int line = thread_index() / 4, group = thread_index() % 4;
        const unsigned char* from = raw[stage][line];
        const float scale = reinterpret_cast<const float*>(from + LATENT)[group];
#pragma unroll
        for (int at = group * QUANT_GROUP; at < (group + 1) * QUANT_GROUP; at += 16) {
            const Vector codes = load_vector(from + at);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                Vector wide;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const uint32_t word = codes.word[2 * half + i / 2];
                    const uint32_t pair = i % 2 ? bf16_pair_from_e4m3_high(word) : bf16_pair_from_e4m3_low(word);
                    wide.word[i] =
                        bf16_pair(mul_rn(float_of(pair << 16), scale), mul_rn(float_of(pair & 0xffff0000u), scale));
                }
                store_vector(&k[line][at + 8 * half], wide);
            }
        }
#pragma unroll
        for (int i = 0; i < ROTARY / 32; i++) {
            const int at = (4 * i + group) * 8;
            store_vector(&k[line][LATENT + at], load_vector(from + LATENT + LATENT / QUANT_GROUP * 4 + at * 2));
        }
        warp_sync(); // a warp scores the tokens that it widened; the others read them after the maxima have met
        return k;
    }
};

template <int LATENT, int ROTARY, class Tiles> struct MlaDecode {
    static constexpr int WIDTH = LATENT + ROTARY;
    static constexpr int STRIDE = Tiles::STRIDE;
    static constexpr int CHUNKS = WIDTH / 8;
    static constexpr int COLUMNS = LATENT / 4; // of the output, per warp
    static_assert(WIDTH % 32 == 0 && COLUMNS % 16 == 0, "whole ldmatrix.x4 in both products");
    struct Shared {
        alignas(16) bf16 q[MLA_HEADS][STRIDE];
        Tiles tiles;
        alignas(16) bf16 probability[MLA_HEADS][MLA_PROBABILITY_STRIDE];
        float best[4][MLA_HEADS];
        float sum[4][MLA_HEADS];
    };
    static_assert(sizeof(Shared) <= 163 * 1024, "fits an A100");

    DEVICE static void run(const MlaDecodeParams& p) {
        Shared& s = *reinterpret_cast<Shared*>(shared_memory());
        const int row = block_x(), head0 = block_y() * MLA_HEADS, split = block_z();
        const int length = p.lengths[row], begin = split * p.split_tokens;
        if (!within(begin, length)) return; // the whole block
        const int end = at_most(begin + p.split_tokens, length);
        const int tiles = ceil_div(end - begin, MLA_TOKENS);
        const int lane = lane_index(), warp = warp_index(), g = lane / 4, t = lane % 4;

        for (int i = thread_index(); i < MLA_HEADS * CHUNKS; i += MLA_DECODE_THREADS) {
            const int h = i / CHUNKS, at = i % CHUNKS * 8, head = head0 + h;
            const bf16* from = p.q_latent;
            const bool valid = within(head, p.heads);
            if (valid)
                from = at < LATENT ? p.q_latent + (int64_t)row * p.ql_row + (int64_t)head * p.ql_head + at
                                   : p.q_rope + (int64_t)row * p.qr_row + (int64_t)head * p.qr_head + at - LATENT;
            copy_async(&s.q[h][at], from, valid);
        }
#pragma unroll
        for (int i = 0; i < MLA_STAGES - 1; i++) {
            if (i < tiles) s.tiles.load(p, i, row, begin + i * MLA_TOKENS, end);
            copy_async_commit();
        }
        const float scale = p.scale * LOG2_E;
        float best[2] = {-__builtin_huge_valf(), -__builtin_huge_valf()}, sum[2] = {};
        float out[COLUMNS / 8][4] = {};
        for (int tile = 0; tile < tiles; tile++) {
            copy_async_wait<MLA_STAGES - 2>();
            block_sync(); // the tile is whole, and everyone has left the stage refilled next
            const int ahead = tile + MLA_STAGES - 1;
            if (ahead < tiles) s.tiles.load(p, ahead % MLA_STAGES, row, begin + ahead * MLA_TOKENS, end);
            copy_async_commit();
            const typename Tiles::Tile& k = s.tiles.ready(tile % MLA_STAGES);

            // Scores of 16 heads and this warp's 8 tokens.
            float score[4] = {};
#pragma unroll 4
            for (int at = 0; at < WIDTH; at += 32) {
                uint32_t a[2][4], b[4];
                load_matrices(b, &k[warp * 8 + lane % 8][at + lane / 8 * 8]);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    load_matrices(a[h], &s.q[lane % 16][at + 16 * h + lane / 16 * 8]);
                    const uint32_t half[2] = {b[2 * h], b[2 * h + 1]};
                    mma_bf16(score, a[h], half);
                }
            }
            float tile_best[2] = {best[0], best[1]};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int token = begin + tile * MLA_TOKENS + warp * 8 + 2 * t + (i & 1);
                score[i] = within(token, end) ? score[i] * scale : -__builtin_huge_valf();
                tile_best[i >> 1] = max_or_nan(tile_best[i >> 1], score[i]);
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                tile_best[h] = max_or_nan(tile_best[h], shuffle_xor(tile_best[h], 1));
                tile_best[h] = max_or_nan(tile_best[h], shuffle_xor(tile_best[h], 2));
                if (t == 0) s.best[warp][g + 8 * h] = tile_best[h];
            }
            block_sync(); // the four warps' maxima are there
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float all = s.best[0][g + 8 * h];
#pragma unroll
                for (int w = 1; w < 4; w++) all = max_or_nan(all, s.best[w][g + 8 * h]);
                const float shrink = exp2_fast(best[h] - all);
                best[h] = all;
                sum[h] *= shrink;
#pragma unroll
                for (int j = 0; j < COLUMNS / 8; j++) {
                    out[j][2 * h] *= shrink;
                    out[j][2 * h + 1] *= shrink;
                }
                const uint32_t pair = bf16_pair(exp2_fast(score[2 * h] - all), exp2_fast(score[2 * h + 1] - all));
                // The sum is of the rounded probabilities, the ones that multiply the values.
                sum[h] += float_of(pair << 16) + float_of(pair & 0xffff0000u);
                *reinterpret_cast<uint32_t*>(&s.probability[g + 8 * h][warp * 8 + 2 * t]) = pair;
            }
            block_sync(); // all probabilities are there
#pragma unroll
            for (int at = 0; at < MLA_TOKENS; at += 16) {
                uint32_t a[4];
                load_matrices(a, &s.probability[lane % 16][at + lane / 16 * 8]);
#pragma unroll
                for (int j = 0; j < COLUMNS / 16; j++) {
                    uint32_t b[4];
                    load_matrices_transposed(b, &k[at + lane % 16][warp * COLUMNS + 16 * j + lane / 16 * 8]);
                    const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
                    mma_bf16(out[2 * j], a, left);
                    mma_bf16(out[2 * j + 1], a, right);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            sum[h] = add_rn(sum[h], shuffle_xor(sum[h], 1));
            sum[h] = add_rn(sum[h], shuffle_xor(sum[h], 2));
            if (t == 0) s.sum[warp][g + 8 * h] = sum[h];
        }
        block_sync(); // the four warps' sums are there
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int head = head0 + g + 8 * h;
            float all = s.sum[0][g + 8 * h];
#pragma unroll
            for (int w = 1; w < 4; w++) all = add_rn(all, s.sum[w][g + 8 * h]);
            if (!within(head, p.heads)) continue;
            const int64_t part = ((int64_t)row * p.heads + head) * p.splits + split;
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j++) {
                float* to = p.partial + part * LATENT + warp * COLUMNS + 8 * j + 2 * t;
                to[0] = div_rn(out[j][2 * h], all);
                to[1] = div_rn(out[j][2 * h + 1], all);
            }
            if (warp == 0 && t == 0) p.lse[part] = best[h] + log2_exact(all);
        }
    }
};
