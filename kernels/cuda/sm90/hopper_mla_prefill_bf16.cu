// MLA attention of whole prompts with wgmma: 128 queries of one head against tiles of 128 keys.
//
// FLOPs per head, query and visible key: 2 (nope + rotary) + 2 value = 640 at 128 + 64, 128. A tile of keys and values
// is 81,920 bytes for 10,485,760 of them: 128 FLOP per byte that enters shared memory; compute-bound.
//
// Two warpgroups have 64 queries each; of four more warps, two fetch keys and two values, every other tile each.
// Queries stay in shared memory, scores, probabilities and the output in registers. A tile's scores are issued together
// with the values of the tile before, so that its exponentials run beside a product.
//
// Invariant: query i of a sequence sees keys up to i + keys - queries, whatever else is in the launch.
#include "hopper_mla.h"

constexpr int PREFILL_QUERIES = 64, PREFILL_KEYS = 128, PREFILL_STAGES = 2; // queries of a warpgroup
constexpr int PREFILL_WARPS = 8, PREFILL_THREADS = 32 * (PREFILL_WARPS + 2 * PREFILL_STAGES);
constexpr int PREFILL_FEW = 40, PREFILL_MANY = 232; // registers: 168 for each of 384 threads, divided anew
constexpr int QUERY_CHUNK = PREFILL_QUERIES * CHUNK_ROW_BYTES, KEY_CHUNK = PREFILL_KEYS * CHUNK_ROW_BYTES;

template <int NOPE, int ROTARY, int VALUE> struct HopperMlaPrefill {
    static constexpr int WIDTH = NOPE + ROTARY, PIECES = WIDTH / 8;
    static constexpr int CHUNKS = ceil_div(WIDTH, CHUNK_VALUES), VALUE_CHUNKS = ceil_div(VALUE, CHUNK_VALUES);
    // Of the output that a product makes; those past VALUE are of no row and are not stored.
    static constexpr int COLUMNS = VALUE_CHUNKS * CHUNK_VALUES;
    static_assert(WIDTH % CHUNK_VALUES == 0 && NOPE % 8 == 0 && VALUE % 8 == 0, "whole chunks and whole pieces");
    struct Shared {
        alignas(1024) unsigned char q[2][CHUNKS * QUERY_CHUNK];
        alignas(1024) unsigned char k[PREFILL_STAGES][CHUNKS * KEY_CHUNK];
        alignas(1024) unsigned char v[PREFILL_STAGES][VALUE_CHUNKS * KEY_CHUNK];
        uint64_t queries[2];
        uint64_t keys_full[PREFILL_STAGES], keys_empty[PREFILL_STAGES];
        uint64_t values_full[PREFILL_STAGES], values_empty[PREFILL_STAGES];
    };
    static_assert(sizeof(Shared) <= 227 * 1024, "fits a Hopper multiprocessor");

    // A block's queries, of one head of one sequence.
    struct Work {
        int head, q0, queries, k0, keys, first, shift, tiles;
    };

    DEVICE static void run(const MlaPrefillParams& p) {
        Shared& s = *reinterpret_cast<Shared*>(shared_memory());
        Work w;
        w.head = block_y();
        w.q0 = p.q_offsets[block_z()];
        w.queries = p.q_offsets[block_z() + 1] - w.q0;
        w.k0 = p.k_offsets[block_z()];
        w.keys = p.k_offsets[block_z() + 1] - w.k0;
        // The last queries see most: their blocks begin first.
        w.first = (ceil_div(w.queries, 2 * PREFILL_QUERIES) - 1 - block_x()) * 2 * PREFILL_QUERIES;
        if (!within(w.first, w.queries)) return; // the whole block
        w.shift = w.keys - w.queries;
        const int last = at_most(w.first + 2 * PREFILL_QUERIES, w.queries);
        w.tiles = ceil_div(last + w.shift, PREFILL_KEYS);
        if (thread_index() == 0) {
#pragma unroll
            for (int i = 0; i < PREFILL_STAGES; i++) {
                mbarrier_init(&s.queries[i], 4);
                mbarrier_init(&s.keys_full[i], 1);
                mbarrier_init(&s.values_full[i], 1);
                mbarrier_init(&s.keys_empty[i], PREFILL_WARPS);
                mbarrier_init(&s.values_empty[i], PREFILL_WARPS);
            }
        }
        block_sync(); // nobody meets a barrier that is not there yet
        const int warp = warp_index();
        if (warp >= PREFILL_WARPS) {
            registers_give_back<PREFILL_FEW>();
            if (warp < PREFILL_WARPS + PREFILL_STAGES)
                fetch_keys(p, s, w, warp % PREFILL_STAGES);
            else
                fetch_values(p, s, w, warp % PREFILL_STAGES);
        } else {
            registers_take<PREFILL_MANY>();
            fetch_queries(p, s, w);
            attend(p, s, w);
        }
    }

    // This lane's copies of a tile have landed and wgmma may read them; the warp says so.
    DEVICE static void landed(uint64_t* full) {
        copy_async_commit();
        copy_async_wait<0>();
        async_proxy_fence();
        warp_sync();
        if (lane_index() == 0) mbarrier_arrive(full);
    }

    DEVICE static void fetch_keys(const MlaPrefillParams& p, Shared& s, const Work& w, int stage) {
        const int lane = lane_index(), piece = lane % 8;
        for (int tile = stage; tile < w.tiles; tile += PREFILL_STAGES) {
            mbarrier_wait(&s.keys_empty[stage], (tile / PREFILL_STAGES & 1) ^ 1); // the first round does not wait
            for (int line = lane / 8; line < PREFILL_KEYS; line += 4) {
                const int key = tile * PREFILL_KEYS + line, place = chunk_place(line, piece);
                const bool valid = within(key, w.keys); // a key past the end is zeros
                const bf16* nope = p.kv + (valid ? (int64_t)(w.k0 + key) * p.kv_row + (int64_t)w.head * p.kv_head : 0);
                const bf16* rope = p.k_rope + (valid ? (int64_t)(w.k0 + key) * p.rope_row : 0);
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
                    const int at = c * CHUNK_VALUES + piece * 8;
                    copy_async(s.k[stage] + c * KEY_CHUNK + place, at < NOPE ? nope + at : rope + at - NOPE, valid);
                }
            }
            landed(&s.keys_full[stage]);
        }
    }

    DEVICE static void fetch_values(const MlaPrefillParams& p, Shared& s, const Work& w, int stage) {
        const int lane = lane_index(), piece = lane % 8;
        for (int tile = stage; tile < w.tiles; tile += PREFILL_STAGES) {
            mbarrier_wait(&s.values_empty[stage], (tile / PREFILL_STAGES & 1) ^ 1);
            for (int line = lane / 8; line < PREFILL_KEYS; line += 4) {
                const int key = tile * PREFILL_KEYS + line;
                const bool valid = within(key, w.keys);
                const bf16* from = p.kv;
                if (valid) from += (int64_t)(w.k0 + key) * p.kv_row + (int64_t)w.head * p.kv_head + NOPE + piece * 8;
                unsigned char* to = s.v[stage] + chunk_place(line, piece);
#pragma unroll
                for (int c = 0; c < VALUE_CHUNKS; c++)
                    if (within(c * CHUNK_VALUES + piece * 8, VALUE))
                        copy_async(to + c * KEY_CHUNK, from + c * CHUNK_VALUES, valid);
            }
            landed(&s.values_full[stage]);
        }
    }

    DEVICE static void fetch_queries(const MlaPrefillParams& p, Shared& s, const Work& w) {
        const int group = warp_index() / 4;
        for (int i = thread_index() % 128; i < PREFILL_QUERIES * PIECES; i += 128) {
            const int line = i / PIECES, piece = i % PIECES, query = w.first + group * PREFILL_QUERIES + line;
            const bool valid = within(query, w.queries);
            const bf16* from = p.q;
            if (valid) from += (int64_t)(w.q0 + query) * p.q_row + (int64_t)w.head * p.q_head + piece * 8;
            copy_async(s.q[group] + piece / 8 * QUERY_CHUNK + chunk_place(line, piece % 8), from, valid);
        }
        landed(&s.queries[group]);
    }

    // A thread's rows: g and g + 8 of its warp's 16 queries.
    struct Softmax {
        float best[2], sum[2], shrink[2];
    };

    DEVICE static void attend(const MlaPrefillParams& p, Shared& s, const Work& w) {
        const int lane = lane_index(), group = warp_index() / 4;
        const int query0 = w.first + warp_index() * 16 + lane / 4;
        Softmax softmax = {{-__builtin_huge_valf(), -__builtin_huge_valf()}, {}, {}};
        float out[COLUMNS / 2] = {};
        float score[PREFILL_KEYS / 2] = {};
        uint32_t probability[PREFILL_KEYS / 16][4];
        mbarrier_wait(&s.queries[group], 0);
        for (int tile = 0; tile < w.tiles; tile++) {
            const int stage = tile % PREFILL_STAGES, round = tile / PREFILL_STAGES & 1;
            mbarrier_wait(&s.keys_full[stage], round);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < WIDTH / 16; k++)
                wgmma_bf16_64x128(score, step_descriptor(s.q[group], k, QUERY_CHUNK),
                                  step_descriptor(s.k[stage], k, KEY_CHUNK), k > 0);
            wgmma_commit();
            if (tile > 0) {
                multiply(s, tile - 1, probability, out);
                wgmma_wait<1>(); // the scores are there; the values' product goes on
            } else {
                wgmma_wait<0>();
            }
            if (lane == 0) mbarrier_arrive(&s.keys_empty[stage]);
            // The warpgroup's first query sees the fewest keys.
            const bool all = (tile + 1) * PREFILL_KEYS <= w.first + group * PREFILL_QUERIES + w.shift + 1;
            if (!all) mask(w, query0, tile * PREFILL_KEYS, score);
            exponentials(p.scale * LOG2_E, score, softmax);
            wgmma_wait<0>();
            if (tile > 0 && lane == 0) mbarrier_arrive(&s.values_empty[(tile - 1) % PREFILL_STAGES]);
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; i++) out[i] *= softmax.shrink[i >> 1 & 1];
            round_probabilities(score, probability, softmax);
        }
        multiply(s, w.tiles - 1, probability, out);
        wgmma_wait<0>();
        store(p, w, query0, out, softmax);
    }

    // out += probabilities * values of a tile, issued; two neighbouring tiles of scores are, as they lie, an operand.
    DEVICE static void multiply(Shared& s, int tile, const uint32_t (&probability)[PREFILL_KEYS / 16][4],
                                float (&out)[COLUMNS / 2]) {
        const int stage = tile % PREFILL_STAGES;
        mbarrier_wait(&s.values_full[stage], tile / PREFILL_STAGES & 1);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < PREFILL_KEYS / 16; k++)
            wgmma_bf16_values(out, probability[k],
                              transposed_descriptor(s.v[stage] + 16 * k * CHUNK_ROW_BYTES, KEY_CHUNK));
        wgmma_commit();
    }

    // Takes out the keys that a query does not see.
    DEVICE static void mask(const Work& w, int query0, int first, float (&score)[PREFILL_KEYS / 2]) {
        const int t = lane_index() % 4;
#pragma unroll
        for (int i = 0; i < PREFILL_KEYS / 2; i++) {
            // Past the keys only for a line that is not stored.
            const int limit = query0 + 8 * (i >> 1 & 1) + w.shift + 1;
            if (!within(first + i / 4 * 8 + 2 * t + (i & 1), limit)) score[i] = -__builtin_huge_valf();
        }
    }

    // Scores become probabilities under the maxima so far, not yet rounded. Key 0 is visible to every query, so a
    // maximum is finite after the first tile.
    DEVICE static void exponentials(float scale, float (&score)[PREFILL_KEYS / 2], Softmax& softmax) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float best = softmax.best[h];
#pragma unroll
            for (int j = 0; j < PREFILL_KEYS / 8; j++)
#pragma unroll
                for (int i = 4 * j + 2 * h; i < 4 * j + 2 * h + 2; i++) {
                    score[i] *= scale;
                    best = max_or_nan(best, score[i]);
                }
            best = max_or_nan(best, shuffle_xor(best, 1));
            best = max_or_nan(best, shuffle_xor(best, 2));
            softmax.shrink[h] = exp2_fast(softmax.best[h] - best);
            softmax.best[h] = best;
            softmax.sum[h] *= softmax.shrink[h];
        }
#pragma unroll
        for (int i = 0; i < PREFILL_KEYS / 2; i++) score[i] = exp2_fast(score[i] - softmax.best[i >> 1 & 1]);
    }

    // The sum is of the rounded probabilities, the ones that multiply the values.
    DEVICE static void round_probabilities(const float (&score)[PREFILL_KEYS / 2],
                                           uint32_t (&probability)[PREFILL_KEYS / 16][4], Softmax& softmax) {
#pragma unroll
        for (int i = 0; i < PREFILL_KEYS / 4; i++) {
            const uint32_t pair = bf16_pair(score[2 * i], score[2 * i + 1]);
            softmax.sum[i & 1] += float_of(pair << 16) + float_of(pair & 0xffff0000u);
            probability[i / 4][i % 4] = pair;
        }
    }

    DEVICE static void store(const MlaPrefillParams& p, const Work& w, int query0, const float (&out)[COLUMNS / 2],
                             const Softmax& softmax) {
        const int t = lane_index() % 4;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float all = add_rn(softmax.sum[h], shuffle_xor(softmax.sum[h], 1));
            all = add_rn(all, shuffle_xor(all, 2));
            const int query = query0 + 8 * h;
            if (!within(query, w.queries)) continue;
            const float factor = div_rn(1.f, all);
            bf16* to = p.out + (int64_t)(w.q0 + query) * p.out_row + (int64_t)w.head * p.out_head + 2 * t;
#pragma unroll
            for (int j = 0; j < VALUE / 8; j++)
                *reinterpret_cast<uint32_t*>(to + 8 * j) =
                    bf16_pair(out[4 * j + 2 * h] * factor, out[4 * j + 2 * h + 1] * factor);
            if (p.lse && t == 0)
                p.lse[(int64_t)(w.q0 + query) * p.heads + w.head] = (softmax.best[h] + log2_exact(all)) / LOG2_E;
        }
    }
};

KERNEL_ALONE(hopper_mla_prefill_bf16_128_64_128, MlaPrefillParams, PREFILL_THREADS) {
    HopperMlaPrefill<128, 64, 128>::run(p);
}
KERNEL_ALONE(hopper_mla_prefill_bf16_32_32_32, MlaPrefillParams, PREFILL_THREADS) {
    HopperMlaPrefill<32, 32, 32>::run(p);
}
static_assert(sizeof(HopperMlaPrefill<128, 64, 128>::Shared) == 214016, "src/plan/attention.rs asks for this much");
static_assert(sizeof(HopperMlaPrefill<32, 32, 32>::Shared) == 82944, "src/plan/attention.rs asks for this much");
