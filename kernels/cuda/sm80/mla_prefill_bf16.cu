// MLA attention of whole prompts in its expanded form: keys are {nope of the head | shared rope}, values 128 wide.
//
// FLOPs per head, query and visible key: 2 (nope + rotary) + 2 value = 640 at 128 + 64, 128, against 16,384 bytes of
// output per query: compute-bound. One block is 64 queries of one head; scores, probabilities and output stay in
// registers, keys and values come through two stages.
#include "../common/kernel.h"

constexpr int PREFILL_QUERIES = 64, PREFILL_KEYS = 32, PREFILL_STAGES = 2, PREFILL_THREADS = 128;

template <int NOPE, int ROTARY, int VALUE> struct MlaPrefill {
    static constexpr int WIDTH = NOPE + ROTARY;
    static constexpr int K_STRIDE = WIDTH + 8, V_STRIDE = VALUE + 8;
    static_assert(WIDTH % 32 == 0 && NOPE % 8 == 0 && VALUE % 16 == 0, "whole ldmatrix.x4 in both products");
    struct Shared {
        alignas(16) bf16 q[PREFILL_QUERIES][K_STRIDE];
        alignas(16) bf16 k[PREFILL_STAGES][PREFILL_KEYS][K_STRIDE];
        alignas(16) bf16 v[PREFILL_STAGES][PREFILL_KEYS][V_STRIDE];
    };
    static_assert(sizeof(Shared) <= 163 * 1024, "fits an A100");

    DEVICE static void load(const MlaPrefillParams& p, Shared& s, int stage, int head, int k0, int first, int keys) {
        constexpr int PIECES = (WIDTH + VALUE) / 8;
        for (int i = thread_index(); i < PREFILL_KEYS * PIECES; i += PREFILL_THREADS) {
            const int line = i / PIECES, at = i % PIECES * 8;
            const bool valid = within(first + line, keys);
            const int64_t key = k0 + first + line;
            const bf16* from = p.kv;
            bf16* to = at < WIDTH ? &s.k[stage][line][at] : &s.v[stage][line][at - WIDTH];
            if (valid)
                from = at < NOPE    ? p.kv + key * p.kv_row + (int64_t)head * p.kv_head + at
                       : at < WIDTH ? p.k_rope + key * p.rope_row + at - NOPE
                                    : p.kv + key * p.kv_row + (int64_t)head * p.kv_head + NOPE + at - WIDTH;
            copy_async(to, from, valid);
        }
    }

    DEVICE static void run(const MlaPrefillParams& p) {
        Shared& s = *reinterpret_cast<Shared*>(shared_memory());
        const int sequence = block_z(), head = block_y();
        const int q0 = p.q_offsets[sequence], queries = p.q_offsets[sequence + 1] - q0;
        const int k0 = p.k_offsets[sequence], keys = p.k_offsets[sequence + 1] - k0;
        const int first = block_x() * PREFILL_QUERIES;
        if (!within(first, queries)) return; // the whole block
        const int lane = lane_index(), warp = warp_index(), g = lane / 4, t = lane % 4;
        const int shift = keys - queries; // query i sees keys up to i + shift
        const int last = at_most(first + PREFILL_QUERIES, queries);
        const int visible = last + shift; // keys that some query of the block sees
        const int tiles = ceil_div(visible, PREFILL_KEYS);

        for (int i = thread_index(); i < PREFILL_QUERIES * (WIDTH / 8); i += PREFILL_THREADS) {
            const int line = i / (WIDTH / 8), at = i % (WIDTH / 8) * 8;
            const bool valid = within(first + line, queries);
            const bf16* from = valid ? p.q + (int64_t)(q0 + first + line) * p.q_row + (int64_t)head * p.q_head + at : p.q;
            copy_async(&s.q[line][at], from, valid);
        }
        load(p, s, 0, head, k0, 0, keys);
        copy_async_commit();

        const float scale = p.scale * LOG2_E;
        float best[2] = {-__builtin_huge_valf(), -__builtin_huge_valf()}, sum[2] = {};
        float out[VALUE / 8][4] = {};
        for (int tile = 0; tile < tiles; tile++) {
            copy_async_wait<0>();
            block_sync(); // the tile is whole, and everyone has left the other stage
            if (tile + 1 < tiles) load(p, s, (tile + 1) % PREFILL_STAGES, head, k0, (tile + 1) * PREFILL_KEYS, keys);
            copy_async_commit();
            const int stage = tile % PREFILL_STAGES;

            float score[PREFILL_KEYS / 8][4] = {};
#pragma unroll
            for (int at = 0; at < WIDTH; at += 32) {
                uint32_t a[2][4];
#pragma unroll
                for (int h = 0; h < 2; h++)
                    load_matrices(a[h], &s.q[warp * 16 + lane % 16][at + 16 * h + lane / 16 * 8]);
#pragma unroll
                for (int j = 0; j < PREFILL_KEYS / 8; j++) {
                    uint32_t b[4];
                    load_matrices(b, &s.k[stage][8 * j + lane % 8][at + lane / 8 * 8]);
                    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                    mma_bf16(score[j], a[0], low);
                    mma_bf16(score[j], a[1], high);
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int query = first + warp * 16 + g + 8 * h;
                const int limit = query + shift + 1; // past the keys only for a line that is not stored
                float tile_best = best[h];
#pragma unroll
                for (int j = 0; j < PREFILL_KEYS / 8; j++)
#pragma unroll
                    for (int c = 2 * h; c < 2 * h + 2; c++) {
                        const int key = tile * PREFILL_KEYS + 8 * j + 2 * t + (c & 1);
                        score[j][c] = within(key, limit) ? score[j][c] * scale : -__builtin_huge_valf();
                        tile_best = max_or_nan(tile_best, score[j][c]);
                    }
                tile_best = max_or_nan(tile_best, shuffle_xor(tile_best, 1));
                tile_best = max_or_nan(tile_best, shuffle_xor(tile_best, 2));
                // Key 0 is visible to every query, so after the first tile the maximum is finite.
                const float shrink = exp2_fast(best[h] - tile_best);
                best[h] = tile_best;
                sum[h] *= shrink;
#pragma unroll
                for (int j = 0; j < VALUE / 8; j++) {
                    out[j][2 * h] *= shrink;
                    out[j][2 * h + 1] *= shrink;
                }
            }
            // Probabilities of two neighbouring key tiles are the first operand of the second product as they lie.
#pragma unroll
            for (int pair = 0; pair < PREFILL_KEYS / 16; pair++) {
                uint32_t a[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* from = &score[2 * pair + (i >> 1)][2 * (i & 1)];
                    a[i] = bf16_pair(exp2_fast(from[0] - best[i & 1]), exp2_fast(from[1] - best[i & 1]));
                    sum[i & 1] += float_of(a[i] << 16) + float_of(a[i] & 0xffff0000u);
                }
#pragma unroll
                for (int j = 0; j < VALUE / 16; j++) {
                    uint32_t b[4];
                    load_matrices_transposed(b, &s.v[stage][16 * pair + lane % 16][16 * j + lane / 16 * 8]);
                    const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
                    mma_bf16(out[2 * j], a, left);
                    mma_bf16(out[2 * j + 1], a, right);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float all = add_rn(sum[h], shuffle_xor(sum[h], 1));
            all = add_rn(all, shuffle_xor(all, 2));
            const int query = first + warp * 16 + g + 8 * h;
            if (!within(query, queries)) continue;
#pragma unroll
            for (int j = 0; j < VALUE / 8; j++) {
                bf16* to = p.out + (int64_t)(q0 + query) * p.out_row + (int64_t)head * p.out_head + 8 * j + 2 * t;
                *reinterpret_cast<uint32_t*>(to) = bf16_pair(div_rn(out[j][2 * h], all), div_rn(out[j][2 * h + 1], all));
            }
            if (p.lse && t == 0) p.lse[(int64_t)(q0 + query) * p.heads + head] = (best[h] + log2_exact(all)) / LOG2_E;
        }
    }
};

KERNEL(mla_prefill_bf16_128_64_128, MlaPrefillParams, PREFILL_THREADS) { MlaPrefill<128, 64, 128>::run(p); }
KERNEL(mla_prefill_bf16_32_32_32, MlaPrefillParams, PREFILL_THREADS) { MlaPrefill<32, 32, 32>::run(p); }
