// Grouped-query attention over the paged cache, split over the context: of a row, or of neighbouring rows of one sequence.
//
// A block has FRAGMENTS of 16 queries, each a head of a row, on the m side of its products: of one row in decode, of as many
// whole rows as fit in prefill. Each warp streams every fourth tile of 16 tokens through a ring of its own and keeps a softmax
// of its own, so nothing in the loop waits for another warp; the four results meet once, at the end, in order.
//
// Invariant: parts begin at multiples of split_tokens of the sequence and tiles at multiples of 16 of the part, whatever
// else is in the batch, and a row's bytes do not depend on the rows beside it: what it does not see has probability zero,
// which changes neither its sum nor its outputs.
#pragma once

#include "../common/kernel.h"

constexpr int GQA_HEADS = 16, GQA_TOKENS = 16, GQA_STAGES = 3, GQA_WARPS = 4, GQA_THREADS = 32 * GQA_WARPS;

template <int WIDTH, int FRAGMENTS> struct GroupedAttention {
    static constexpr int QUERIES = 16 * FRAGMENTS;
    static constexpr int STRIDE = WIDTH + 8; // 16 bytes more than a multiple of 128: rows of ldmatrix meet all banks
    static constexpr int CHUNKS = WIDTH / 8;
    static_assert(WIDTH % 16 == 0 && CHUNKS % 2 == 0, "whole products, and two lanes copy a token");
    struct Tile {
        alignas(16) bf16 key[GQA_TOKENS][STRIDE];
        alignas(16) bf16 value[GQA_TOKENS][STRIDE];
    };
    struct Shared {
        Tile tile[GQA_WARPS][GQA_STAGES];
        float best[GQA_WARPS][QUERIES];
        float sum[GQA_WARPS][QUERIES];
    };
    using Outputs = float[QUERIES][WIDTH];
    static_assert(sizeof(Outputs) <= sizeof(Tile[GQA_STAGES]), "a warp leaves its outputs where its tiles were");
    static_assert(sizeof(Shared) <= 163 * 1024, "fits an A100");

    // What a block computes: `heads` heads of each of `rows` rows.
    struct Work {
        int row, rows, kv_head, head, heads, split, begin;
        DEVICE int queries() const { return rows * heads; }
        // The tokens that a query sees end here, in this part; 0 for one that is not there.
        DEVICE int end(const GqaDecodeParams& p, int query) const {
            if (!within(query, queries())) return 0;
            const int length = p.lengths[row + query / heads], last = begin + p.split_tokens;
            return at_most(last, length);
        }
    };

    DEVICE static Outputs& outputs(Tile (&tiles)[GQA_STAGES]) { return *reinterpret_cast<Outputs*>(&tiles[0]); }

    // Tokens first ... first + 15 of the part into a tile of the warp.
    DEVICE static void load(const GqaDecodeParams& p, Tile& tile, const Work& w, int first, int end) {
        const int line = lane_index() / 2, token = first + line;
        const bool valid = within(token, end);
        const bf16 *key = p.cache, *value = p.cache;
        if (valid) {
            const int64_t block = p.blocks[(int64_t)w.row * p.blocks_stride + token / p.block_size];
            key += ((block * p.kv_heads + w.kv_head) * 2 * p.block_size + token % p.block_size) * WIDTH;
            value = key + (int64_t)p.block_size * WIDTH;
        }
#pragma unroll
        for (int i = 0; i < CHUNKS / 2; i++) {
            const int at = (2 * i + lane_index() % 2) * 8;
            copy_async(&tile.key[line][at], valid ? key + at : key, valid);
            copy_async(&tile.value[line][at], valid ? value + at : value, valid);
        }
    }

    // This lane's part of 16 queries from `first` on: g and g + 8 of them, as the first operand of the products.
    DEVICE static void load_queries(uint32_t (&q)[WIDTH / 16][4], const GqaDecodeParams& p, const Work& w, int first) {
        const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int query = first + g + 8 * h;
            const bool valid = within(query, w.queries());
            const bf16* from = p.q + (int64_t)(w.row + query / w.heads) * p.q_row + (int64_t)(w.head + query % w.heads) * WIDTH;
#pragma unroll
            for (int i = 0; i < WIDTH / 16; i++) {
                q[i][h] = valid ? *reinterpret_cast<const uint32_t*>(from + 16 * i + 2 * t) : 0;
                q[i][h + 2] = valid ? *reinterpret_cast<const uint32_t*>(from + 16 * i + 8 + 2 * t) : 0;
            }
        }
    }

    // A warp's results for 16 queries, this lane's part.
    struct Results {
        float best[2], sum[2], out[WIDTH / 8][4];
    };

    // Scores of 16 queries and 16 tokens from `first` on, and what they add to the results.
    DEVICE static void attend(Results& r, const uint32_t (&q)[WIDTH / 16][4], const Tile& tile, float scale, int first,
                              const int (&end)[2]) {
        const int lane = lane_index(), t = lane % 4;
        float score[2][4] = {};
#pragma unroll
        for (int i = 0; i < WIDTH / 16; i++) {
            uint32_t b[4];
            load_matrices(b, &tile.key[lane / 16 * 8 + lane % 8][16 * i + lane / 8 % 2 * 8]);
            const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
            mma_bf16(score[0], q[i], left);
            mma_bf16(score[1], q[i], right);
        }
        float all[2] = {r.best[0], r.best[1]};
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int token = first + 8 * j + 2 * t + (i & 1);
                score[j][i] = within(token, end[i >> 1]) ? score[j][i] * scale : -__builtin_huge_valf();
                all[i >> 1] = max_or_nan(all[i >> 1], score[j][i]);
            }
        uint32_t probability[4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            all[h] = max_or_nan(all[h], shuffle_xor(all[h], 1));
            all[h] = max_or_nan(all[h], shuffle_xor(all[h], 2));
            // A query that has seen nothing yet keeps its zeros.
            const float from = all[h] == -__builtin_huge_valf() ? 0.f : all[h];
            const float shrink = exp2_fast(r.best[h] - from);
            r.best[h] = all[h];
            r.sum[h] *= shrink;
#pragma unroll
            for (int j = 0; j < WIDTH / 8; j++) {
                r.out[j][2 * h] *= shrink;
                r.out[j][2 * h + 1] *= shrink;
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint32_t pair = bf16_pair(exp2_fast(score[j][2 * h] - from), exp2_fast(score[j][2 * h + 1] - from));
                // The sum is of the rounded probabilities, the ones that multiply the values.
                r.sum[h] += float_of(pair << 16) + float_of(pair & 0xffff0000u);
                probability[h + 2 * j] = pair; // scores lie as the first operand of the second product does
            }
        }
#pragma unroll
        for (int j = 0; j < WIDTH / 16; j++) {
            uint32_t b[4];
            load_matrices_transposed(b, &tile.value[lane % 16][16 * j + lane / 16 * 8]);
            const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
            mma_bf16(r.out[2 * j], probability, left);
            mma_bf16(r.out[2 * j + 1], probability, right);
        }
    }

    DEVICE static void run(const GqaDecodeParams& p) {
        Shared& s = *reinterpret_cast<Shared*>(shared_memory());
        const int group = p.heads / p.kv_heads, passes = ceil_div(group, GQA_HEADS);
        Work w;
        w.split = block_z();
        w.kv_head = block_y() / passes;
        const int pass = block_y() % passes;
        w.head = w.kv_head * group + pass * GQA_HEADS;
        w.heads = at_most(GQA_HEADS, group - pass * GQA_HEADS);
        // As many in every pass: the last one may have fewer heads.
        const int rows = FRAGMENTS == 1 ? 1 : QUERIES / at_most(group, GQA_HEADS);
        w.row = block_x() * rows;
        w.rows = at_most(rows, p.rows - w.row);
        w.begin = w.split * p.split_tokens;
        int length = 0;
        for (int i = 0; i < w.rows; i++) length = p.lengths[w.row + i] > length ? p.lengths[w.row + i] : length;
        if (!within(w.begin, length)) return; // the whole block
        const int end = at_most(w.begin + p.split_tokens, length);
        const int tiles = ceil_div(end - w.begin, GQA_TOKENS);
        const int lane = lane_index(), warp = warp_index(), g = lane / 4, t = lane % 4;

#pragma unroll
        for (int i = 0; i < GQA_STAGES - 1; i++) {
            const int tile = warp + i * GQA_WARPS;
            if (tile < tiles) load(p, s.tile[warp][i], w, w.begin + tile * GQA_TOKENS, end);
            copy_async_commit();
        }
        uint32_t q[FRAGMENTS][WIDTH / 16][4];
        int ends[FRAGMENTS][2];
        Results results[FRAGMENTS];
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            load_queries(q[f], p, w, 16 * f);
            results[f] = {};
#pragma unroll
            for (int h = 0; h < 2; h++) {
                ends[f][h] = w.end(p, 16 * f + g + 8 * h);
                results[f].best[h] = -__builtin_huge_valf();
            }
        }
        const float scale = p.scale * LOG2_E;
        for (int tile = warp, stage = 0; tile < tiles; tile += GQA_WARPS, stage = (stage + 1) % GQA_STAGES) {
            copy_async_wait<GQA_STAGES - 2>();
            warp_sync(); // the tile is whole, and the warp has left the stage refilled next
            const int ahead = tile + (GQA_STAGES - 1) * GQA_WARPS;
            if (ahead < tiles)
                load(p, s.tile[warp][(stage + GQA_STAGES - 1) % GQA_STAGES], w, w.begin + ahead * GQA_TOKENS, end);
            copy_async_commit();
#pragma unroll
            for (int f = 0; f < FRAGMENTS; f++)
                attend(results[f], q[f], s.tile[warp][stage], scale, w.begin + tile * GQA_TOKENS, ends[f]);
        }
        // Every lane has had its part of the last tile: the products needed all of them.
        Outputs& mine = outputs(s.tile[warp]);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                Results& r = results[f];
                const int query = 16 * f + g + 8 * h;
                r.sum[h] = add_rn(r.sum[h], shuffle_xor(r.sum[h], 1));
                r.sum[h] = add_rn(r.sum[h], shuffle_xor(r.sum[h], 2));
                if (t == 0) {
                    s.best[warp][query] = r.best[h];
                    s.sum[warp][query] = r.sum[h];
                }
#pragma unroll
                for (int j = 0; j < WIDTH / 8; j++) {
                    mine[query][8 * j + 2 * t] = r.out[j][2 * h];
                    mine[query][8 * j + 2 * t + 1] = r.out[j][2 * h + 1];
                }
            }
        block_sync(); // the four warps' results are there
        merge(p, s, w);
    }

    // A warp without a tile has the maximum minus infinity: its weight is zero.
    DEVICE static void merge(const GqaDecodeParams& p, Shared& s, const Work& w) {
        for (int i = thread_index(); within(i, w.queries() * WIDTH); i += GQA_THREADS) {
            const int query = i / WIDTH, at = i % WIDTH;
            if (!within(w.begin, w.end(p, query))) continue; // this row ends before the part begins
            float best = s.best[0][query];
#pragma unroll
            for (int warp = 1; warp < GQA_WARPS; warp++) best = max_or_nan(best, s.best[warp][query]);
            float total = 0.f, out = 0.f;
#pragma unroll
            for (int warp = 0; warp < GQA_WARPS; warp++) {
                const float weight = exp2_fast(s.best[warp][query] - best);
                total = fma_rn(weight, s.sum[warp][query], total);
                out = fma_rn(weight, outputs(s.tile[warp])[query][at], out);
            }
            const int64_t row = w.row + query / w.heads, head = w.head + query % w.heads;
            const int64_t part = (row * p.heads + head) * p.splits + w.split;
            p.partial[part * WIDTH + at] = div_rn(out, total);
            if (at == 0) p.lse[part] = best + log2_exact(total);
        }
    }
};
