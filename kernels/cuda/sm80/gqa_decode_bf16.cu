// Grouped-query decode over the paged cache, split over the context.
//
// Per query row, key-value head and context token: 4 width group FLOPs on 4 width bytes, so `group` FLOP/B: memory-bound
// for every published group. Each warp streams every fourth tile of 16 tokens through a ring of its own and keeps a softmax
// of its own, so nothing in the loop waits for another warp; the four results meet once, at the end, in order.
//
// Invariant: parts begin at multiples of split_tokens of the sequence and tiles at multiples of 16 of the part, whatever
// else is in the batch.
#include "../common/kernel.h"

constexpr int GQA_HEADS = 16, GQA_TOKENS = 16, GQA_STAGES = 3, GQA_WARPS = 4, GQA_DECODE_THREADS = 32 * GQA_WARPS;

template <int WIDTH> struct GqaDecode {
    static constexpr int STRIDE = WIDTH + 8; // 16 bytes more than a multiple of 128: rows of ldmatrix meet all banks
    static constexpr int CHUNKS = WIDTH / 8;
    static_assert(WIDTH % 16 == 0 && CHUNKS % 2 == 0, "whole products, and two lanes copy a token");
    struct Tile {
        alignas(16) bf16 key[GQA_TOKENS][STRIDE];
        alignas(16) bf16 value[GQA_TOKENS][STRIDE];
    };
    struct Shared {
        Tile tile[GQA_WARPS][GQA_STAGES];
        float best[GQA_WARPS][GQA_HEADS];
        float sum[GQA_WARPS][GQA_HEADS];
    };
    using Outputs = float[GQA_HEADS][WIDTH];
    static_assert(sizeof(Outputs) <= sizeof(Tile[GQA_STAGES]), "a warp leaves its outputs where its tiles were");
    static_assert(sizeof(Shared) <= 163 * 1024, "fits an A100");

    DEVICE static Outputs& outputs(Tile (&tiles)[GQA_STAGES]) { return *reinterpret_cast<Outputs*>(&tiles[0]); }

    // Tokens first ... first + 15 of the part into a tile of the warp.
    DEVICE static void load(const GqaDecodeParams& p, Tile& tile, int row, int kv_head, int first, int end) {
        const int line = lane_index() / 2, token = first + line;
        const bool valid = within(token, end);
        const bf16 *key = p.cache, *value = p.cache;
        if (valid) {
            const int64_t block = p.blocks[(int64_t)row * p.blocks_stride + token / p.block_size];
            key += ((block * p.kv_heads + kv_head) * 2 * p.block_size + token % p.block_size) * WIDTH;
            value = key + (int64_t)p.block_size * WIDTH;
        }
#pragma unroll
        for (int i = 0; i < CHUNKS / 2; i++) {
            const int at = (2 * i + lane_index() % 2) * 8;
            copy_async(&tile.key[line][at], valid ? key + at : key, valid);
            copy_async(&tile.value[line][at], valid ? value + at : value, valid);
        }
    }

    // This lane's part of the queries: heads g and g + 8 of the group, as the first operand of the products.
    DEVICE static void load_queries(uint32_t (&q)[WIDTH / 16][4], const GqaDecodeParams& p, int row, int head0, int heads) {
        const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const bool valid = within(g + 8 * h, heads);
            const bf16* from = p.q + (int64_t)row * p.q_row + (int64_t)(head0 + g + 8 * h) * WIDTH;
#pragma unroll
            for (int i = 0; i < WIDTH / 16; i++) {
                q[i][h] = valid ? *reinterpret_cast<const uint32_t*>(from + 16 * i + 2 * t) : 0;
                q[i][h + 2] = valid ? *reinterpret_cast<const uint32_t*>(from + 16 * i + 8 + 2 * t) : 0;
            }
        }
    }

    DEVICE static void run(const GqaDecodeParams& p) {
        Shared& s = *reinterpret_cast<Shared*>(shared_memory());
        const int row = block_x(), split = block_z();
        const int group = p.heads / p.kv_heads, passes = ceil_div(group, GQA_HEADS);
        const int kv_head = block_y() / passes, pass = block_y() % passes;
        const int head0 = kv_head * group + pass * GQA_HEADS;
        const int heads = group - pass * GQA_HEADS < GQA_HEADS ? group - pass * GQA_HEADS : GQA_HEADS;
        const int length = p.lengths[row], begin = split * p.split_tokens;
        if (!within(begin, length)) return; // the whole block
        const int end = begin + p.split_tokens < length ? begin + p.split_tokens : length;
        const int tiles = ceil_div(end - begin, GQA_TOKENS);
        const int lane = lane_index(), warp = warp_index(), g = lane / 4, t = lane % 4;

#pragma unroll
        for (int i = 0; i < GQA_STAGES - 1; i++) {
            const int tile = warp + i * GQA_WARPS;
            if (tile < tiles) load(p, s.tile[warp][i], row, kv_head, begin + tile * GQA_TOKENS, end);
            copy_async_commit();
        }
        uint32_t q[WIDTH / 16][4];
        load_queries(q, p, row, head0, heads);
        const float scale = p.scale * LOG2_E;
        float best[2] = {-__builtin_huge_valf(), -__builtin_huge_valf()}, sum[2] = {};
        float out[WIDTH / 8][4] = {};
        for (int tile = warp, stage = 0; tile < tiles; tile += GQA_WARPS, stage = (stage + 1) % GQA_STAGES) {
            copy_async_wait<GQA_STAGES - 2>();
            warp_sync(); // the tile is whole, and the warp has left the stage refilled next
            const int ahead = tile + (GQA_STAGES - 1) * GQA_WARPS;
            if (ahead < tiles)
                load(p, s.tile[warp][(stage + GQA_STAGES - 1) % GQA_STAGES], row, kv_head, begin + ahead * GQA_TOKENS,
                     end);
            copy_async_commit();
            const Tile& k = s.tile[warp][stage];

            // Scores of 16 heads and 16 tokens.
            float score[2][4] = {};
#pragma unroll
            for (int i = 0; i < WIDTH / 16; i++) {
                uint32_t b[4];
                load_matrices(b, &k.key[lane / 16 * 8 + lane % 8][16 * i + lane / 8 % 2 * 8]);
                const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
                mma_bf16(score[0], q[i], left);
                mma_bf16(score[1], q[i], right);
            }
            float all[2] = {best[0], best[1]};
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int token = begin + tile * GQA_TOKENS + 8 * j + 2 * t + (i & 1);
                    score[j][i] = within(token, end) ? score[j][i] * scale : -__builtin_huge_valf();
                    all[i >> 1] = max_or_nan(all[i >> 1], score[j][i]);
                }
            uint32_t probability[4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                all[h] = max_or_nan(all[h], shuffle_xor(all[h], 1));
                all[h] = max_or_nan(all[h], shuffle_xor(all[h], 2));
                const float shrink = exp2_fast(best[h] - all[h]);
                best[h] = all[h];
                sum[h] *= shrink;
#pragma unroll
                for (int j = 0; j < WIDTH / 8; j++) {
                    out[j][2 * h] *= shrink;
                    out[j][2 * h + 1] *= shrink;
                }
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const uint32_t pair =
                        bf16_pair(exp2_fast(score[j][2 * h] - all[h]), exp2_fast(score[j][2 * h + 1] - all[h]));
                    // The sum is of the rounded probabilities, the ones that multiply the values.
                    sum[h] += float_of(pair << 16) + float_of(pair & 0xffff0000u);
                    probability[h + 2 * j] = pair; // scores lie as the first operand of the second product does
                }
            }
#pragma unroll
            for (int j = 0; j < WIDTH / 16; j++) {
                uint32_t b[4];
                load_matrices_transposed(b, &k.value[lane % 16][16 * j + lane / 16 * 8]);
                const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
                mma_bf16(out[2 * j], probability, left);
                mma_bf16(out[2 * j + 1], probability, right);
            }
        }
        // Every lane has had its part of the last tile: the products needed all of them.
        Outputs& mine = outputs(s.tile[warp]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            sum[h] = add_rn(sum[h], shuffle_xor(sum[h], 1));
            sum[h] = add_rn(sum[h], shuffle_xor(sum[h], 2));
            if (t == 0) {
                s.best[warp][g + 8 * h] = best[h];
                s.sum[warp][g + 8 * h] = sum[h];
            }
#pragma unroll
            for (int j = 0; j < WIDTH / 8; j++) {
                mine[g + 8 * h][8 * j + 2 * t] = out[j][2 * h];
                mine[g + 8 * h][8 * j + 2 * t + 1] = out[j][2 * h + 1];
            }
        }
        block_sync(); // the four warps' results are there
        merge(p, s, row, head0, heads, split);
    }

    // A warp without a tile has the maximum minus infinity: its weight is zero.
    DEVICE static void merge(const GqaDecodeParams& p, Shared& s, int row, int head0, int heads, int split) {
        for (int i = thread_index(); within(i, heads * WIDTH); i += GQA_DECODE_THREADS) {
            const int head = i / WIDTH, at = i % WIDTH;
            float best = s.best[0][head];
#pragma unroll
            for (int w = 1; w < GQA_WARPS; w++) best = max_or_nan(best, s.best[w][head]);
            float total = 0.f, out = 0.f;
#pragma unroll
            for (int w = 0; w < GQA_WARPS; w++) {
                const float weight = exp2_fast(s.best[w][head] - best);
                total = fma_rn(weight, s.sum[w][head], total);
                out = fma_rn(weight, outputs(s.tile[w])[head][at], out);
            }
            const int64_t part = ((int64_t)row * p.heads + head0 + head) * p.splits + split;
            p.partial[part * WIDTH + at] = div_rn(out, total);
            if (at == 0) p.lse[part] = best + log2_exact(total);
        }
    }
};

KERNEL(gqa_decode_bf16_128, GqaDecodeParams, GQA_DECODE_THREADS) { GqaDecode<128>::run(p); }
KERNEL(gqa_decode_bf16_64, GqaDecodeParams, GQA_DECODE_THREADS) { GqaDecode<64>::run(p); }
static_assert(sizeof(GqaDecode<128>::Shared) == 104960, "src/plan.rs asks for this much");
static_assert(sizeof(GqaDecode<64>::Shared) == 55808, "src/plan.rs asks for this much");
