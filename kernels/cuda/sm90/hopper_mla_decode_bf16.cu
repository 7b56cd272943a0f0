// Absorbed MLA decode over the paged latent cache with wgmma: 64 lines of (row, head) against tiles of 64 tokens.
//
// FLOPs per line and token: 2 (latent + rotary) + 2 latent. A tile of 64 tokens does 139,264 of them for each on 73,728
// bytes: 121 FLOP per byte that enters shared memory, 242 per byte of the cache when 128 heads read it twice.
//
// One warpgroup scores a tile and makes probabilities of it; two multiply them with the values, half the columns each;
// a third fetches tokens, two warps for each of two stages. A tile is keys and values at once.
//
// Invariant: a line's result depends on its own query, context and part. Tiles begin at multiples of 64 tokens of a
// part, and one past a line's end changes none of its bits, so rows that share a block table may share a block.
//
// Surprise: `ready` would run two phases ahead of a warpgroup that is late, if the scoring one did not wait for the
// last tile to be read before it says anything new. The same wait keeps the probabilities from being overwritten.
#include "hopper_mla.h"

constexpr int DECODE_LINES = 64, DECODE_TOKENS = 64, DECODE_STAGES = 2;
constexpr int DECODE_WARPS = 8, DECODE_FETCHERS = 2; // of a stage
constexpr int DECODE_THREADS = 32 * (DECODE_WARPS + DECODE_FETCHERS * DECODE_STAGES);
constexpr int DECODE_FEW = 40, DECODE_MANY = 232; // registers: 168 for each of 384 threads, divided anew
constexpr int DECODE_CHUNK = DECODE_TOKENS * CHUNK_ROW_BYTES;
static_assert(DECODE_LINES == DECODE_TOKENS, "queries, keys and probabilities are chunks of one size");

// Which rows and heads a block's 64 lines are. Rows with one block table are taken together, as many as fit.
struct DecodeLines {
    int row0, head0, per_row, rows;

    DEVICE static DecodeLines of(const MlaDecodeParams& p) {
        DecodeLines lines;
        lines.per_row = at_most(p.heads, DECODE_LINES);
        lines.rows = p.blocks_stride == 0 ? DECODE_LINES / lines.per_row : 1;
        lines.row0 = block_x() * lines.rows;
        lines.head0 = block_y() * DECODE_LINES;
        lines.rows = at_most(lines.rows, p.rows - lines.row0);
        return lines;
    }
    DEVICE int row(int line) const { return row0 + line / per_row; }
    DEVICE int head(int line) const { return head0 + line % per_row; }
    DEVICE bool has(const MlaDecodeParams& p, int line) const {
        return within(line / per_row, rows) && within(head(line), p.heads);
    }
    // Tokens of the row that sees most.
    DEVICE int longest(const MlaDecodeParams& p) const {
        int longest = 0;
        for (int i = 0; i < rows; i++) longest = p.lengths[row0 + i] > longest ? p.lengths[row0 + i] : longest;
        return longest;
    }
};

struct alignas(8) FloatPair {
    float low, high;
};

template <int LATENT, int ROTARY> struct HopperMlaDecode {
    static constexpr int WIDTH = LATENT + ROTARY, PIECES = WIDTH / 8;
    static constexpr int CHUNKS = ceil_div(WIDTH, CHUNK_VALUES), STEPS = WIDTH / 16;
    // Warpgroups that multiply, and columns of the output for each.
    static constexpr int MULTIPLIERS = LATENT > CHUNK_VALUES ? 2 : 1, COLUMNS = LATENT / MULTIPLIERS;
    static_assert(WIDTH % 16 == 0 && COLUMNS % CHUNK_VALUES == 0, "whole products and whole chunks");
    using Output = float[COLUMNS / 2]; // of a thread
    struct Shared {
        alignas(1024) unsigned char q[CHUNKS * DECODE_CHUNK];
        alignas(1024) unsigned char k[DECODE_STAGES][CHUNKS * DECODE_CHUNK];
        alignas(1024) unsigned char probability[DECODE_CHUNK];
        float shrink[DECODE_LINES]; // of what was summed before this tile
        float total[DECODE_LINES];
        uint64_t full[DECODE_STAGES], empty[DECODE_STAGES], queries, ready;
    };
    static_assert(sizeof(Shared) <= 227 * 1024, "fits a Hopper multiprocessor");

    struct Part {
        DecodeLines lines;
        int begin, end, tiles;
    };

    DEVICE static void run(const MlaDecodeParams& p) {
        Shared& s = *reinterpret_cast<Shared*>(shared_memory());
        Part part;
        part.lines = DecodeLines::of(p);
        part.begin = block_z() * p.split_tokens;
        const int longest = part.lines.longest(p);
        if (!within(part.begin, longest)) return; // the whole block
        part.end = at_most(part.begin + p.split_tokens, longest);
        part.tiles = ceil_div(part.end - part.begin, DECODE_TOKENS);
        if (thread_index() == 0) {
#pragma unroll
            for (int i = 0; i < DECODE_STAGES; i++) {
                mbarrier_init(&s.full[i], DECODE_FETCHERS);
                mbarrier_init(&s.empty[i], 4 * MULTIPLIERS);
            }
            mbarrier_init(&s.queries, DECODE_WARPS);
            mbarrier_init(&s.ready, 4);
        }
        block_sync(); // nobody meets a barrier that is not there yet
        const int warp = warp_index();
        if (warp >= DECODE_WARPS) {
            registers_give_back<DECODE_FEW>();
            fetch(p, s, part, warp - DECODE_WARPS);
        } else if (warp < 4) {
            registers_take<DECODE_MANY>();
            fetch_queries(p, s, part.lines);
            score(p, s, part);
        } else {
            registers_take<DECODE_MANY>();
            fetch_queries(p, s, part.lines);
            if (MULTIPLIERS > 1) follow(p, s, part);
        }
    }

    // Two warps keep a stage filled, half of the tile's tokens each: every lane looks one up, eight lanes copy it.
    DEVICE static void fetch(const MlaDecodeParams& p, Shared& s, const Part& part, int fetcher) {
        const int lane = lane_index(), piece = lane % 8, stage = fetcher / DECODE_FETCHERS;
        const int half = fetcher % DECODE_FETCHERS * 32;
        for (int tile = stage; tile < part.tiles; tile += DECODE_STAGES) {
            const int token = part.begin + tile * DECODE_TOKENS + half + lane;
            int slot = -1; // a token past the end is zeros
            if (within(token, part.end)) {
                const int block = p.blocks[(int64_t)part.lines.row0 * p.blocks_stride + token / p.block_size];
                slot = block * p.block_size + token % p.block_size;
            }
            mbarrier_wait(&s.empty[stage], (tile / DECODE_STAGES & 1) ^ 1); // the first round does not wait
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int at = shuffle(slot, 4 * i + lane / 8), place = chunk_place(half + 4 * i + lane / 8, piece);
                const bool valid = at >= 0;
                const bf16* from = static_cast<const bf16*>(p.cache);
                if (valid) from += (int64_t)at * WIDTH + piece * 8;
#pragma unroll
                for (int c = 0; c < CHUNKS; c++)
                    if (within(c * CHUNK_VALUES + piece * 8, WIDTH))
                        copy_async(s.k[stage] + c * DECODE_CHUNK + place, from + c * CHUNK_VALUES, valid);
            }
            copy_async_commit();
            copy_async_wait<0>();
            async_proxy_fence();
            warp_sync();
            if (lane == 0) mbarrier_arrive(&s.full[stage]);
        }
    }

    DEVICE static void fetch_queries(const MlaDecodeParams& p, Shared& s, const DecodeLines& lines) {
        for (int i = thread_index(); i < DECODE_LINES * PIECES; i += 32 * DECODE_WARPS) {
            const int line = i / PIECES, piece = i % PIECES, at = piece * 8;
            const bool valid = lines.has(p, line);
            const int64_t row = lines.row(line), head = lines.head(line);
            const bf16* from = p.q_latent;
            if (valid)
                from = at < LATENT ? p.q_latent + row * p.ql_row + head * p.ql_head + at
                                   : p.q_rope + row * p.qr_row + head * p.qr_head + at - LATENT;
            copy_async(s.q + piece / 8 * DECODE_CHUNK + chunk_place(line, piece % 8), from, valid);
        }
        copy_async_commit();
        copy_async_wait<0>();
        async_proxy_fence();
        warp_sync();
        if (lane_index() == 0) mbarrier_arrive(&s.queries);
    }

    // The first warpgroup: scores, probabilities, its half of the output. A thread has lines g and g + 8 of 16.
    DEVICE static void score(const MlaDecodeParams& p, Shared& s, const Part& part) {
        Output out;
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; i++) out[i] = 0.f;
        const int lane = lane_index(), g = warp_index() * 16 + lane / 4, t = lane % 4;
        const float scale = p.scale * LOG2_E;
        float best[2] = {-__builtin_huge_valf(), -__builtin_huge_valf()}, sum[2] = {};
        int limit[2]; // tokens that the line sees; a line that is not written sees all, and so stays finite
#pragma unroll
        for (int h = 0; h < 2; h++) limit[h] = written(p, part, g + 8 * h) ? length(p, part, g + 8 * h) : part.end;
        mbarrier_wait(&s.queries, 0);
        for (int tile = 0; tile < part.tiles; tile++) {
            const int stage = tile % DECODE_STAGES;
            float score[DECODE_TOKENS / 2] = {};
            mbarrier_wait(&s.full[stage], tile / DECODE_STAGES & 1);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < STEPS; k++)
                wgmma_bf16_64x64(score, step_descriptor(s.q, k, DECODE_CHUNK),
                                 step_descriptor(s.k[stage], k, DECODE_CHUNK), k > 0);
            wgmma_commit();
            wgmma_wait<0>();
            float shrink[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float tile_best = best[h];
#pragma unroll
                for (int i = 2 * h; i < DECODE_TOKENS / 2; i += i & 1 ? 3 : 1) {
                    const int token = part.begin + tile * DECODE_TOKENS + i / 4 * 8 + 2 * t + (i & 1);
                    score[i] = within(token, limit[h]) ? score[i] * scale : -__builtin_huge_valf();
                    tile_best = max_or_nan(tile_best, score[i]);
                }
                tile_best = max_or_nan(tile_best, shuffle_xor(tile_best, 1));
                tile_best = max_or_nan(tile_best, shuffle_xor(tile_best, 2));
                shrink[h] = exp2_fast(best[h] - tile_best);
                best[h] = tile_best;
                sum[h] *= shrink[h];
            }
            uint32_t pairs[DECODE_TOKENS / 4];
#pragma unroll
            for (int i = 0; i < DECODE_TOKENS / 4; i++) {
                pairs[i] = bf16_pair(exp2_fast(score[2 * i] - best[i & 1]), exp2_fast(score[2 * i + 1] - best[i & 1]));
                // The sum is of the rounded probabilities, the ones that multiply the values.
                sum[i & 1] += float_of(pairs[i] << 16) + float_of(pairs[i] & 0xffff0000u);
            }
            if (tile > 0) all_read(s, tile - 1);
#pragma unroll
            for (int i = 0; i < DECODE_TOKENS / 4; i++)
                *reinterpret_cast<uint32_t*>(s.probability + chunk_place(g + 8 * (i & 1), i / 2) + 4 * t) = pairs[i];
#pragma unroll
            for (int h = 0; h < 2; h++)
                if (t == 0) s.shrink[g + 8 * h] = shrink[h];
            async_proxy_fence();
            warp_sync();
            if (lane == 0) mbarrier_arrive(&s.ready);
            mbarrier_wait(&s.ready, tile & 1); // a product may read the other warps' probabilities
            multiply(s, tile, 0, out);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int line = g + 8 * h;
            sum[h] = add_rn(sum[h], shuffle_xor(sum[h], 1));
            sum[h] = add_rn(sum[h], shuffle_xor(sum[h], 2));
            if (t != 0) continue;
            s.total[line] = sum[h];
            if (written(p, part, line)) p.lse[place(p, part, line)] = best[h] + log2_exact(sum[h]);
        }
        all_read(s, part.tiles - 1);
        warp_sync();
        if (lane == 0) mbarrier_arrive(&s.ready);
        store(p, s, part, 0, out); // with the sums of its own warp
    }

    // The second warpgroup: the other half of the output.
    DEVICE static void follow(const MlaDecodeParams& p, Shared& s, const Part& part) {
        Output out;
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; i++) out[i] = 0.f;
        for (int tile = 0; tile < part.tiles; tile++) {
            mbarrier_wait(&s.ready, tile & 1);
            multiply(s, tile, 1, out);
        }
        mbarrier_wait(&s.ready, part.tiles & 1); // the sums are there
        store(p, s, part, 1, out);
    }

    // Waits until both warpgroups have multiplied a tile.
    DEVICE static void all_read(Shared& s, int tile) {
        mbarrier_wait(&s.empty[tile % DECODE_STAGES], tile / DECODE_STAGES & 1);
    }

    // out = shrink * out + probabilities * values, the columns of one warpgroup.
    DEVICE static void multiply(Shared& s, int tile, int part, Output& out) {
        const int lane = lane_index(), g = warp_index() % 4 * 16 + lane / 4, stage = tile % DECODE_STAGES;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float shrink = s.shrink[g + 8 * h];
#pragma unroll
            for (int i = 2 * h; i < COLUMNS / 2; i += 4) {
                out[i] *= shrink;
                out[i + 1] *= shrink;
            }
        }
        const unsigned char* values = s.k[stage] + part * (COLUMNS / CHUNK_VALUES) * DECODE_CHUNK;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < DECODE_TOKENS / 16; k++)
            wgmma_bf16_values(out, step_descriptor(s.probability, k, DECODE_CHUNK),
                              transposed_descriptor(values + 16 * k * CHUNK_ROW_BYTES, DECODE_CHUNK), true);
        wgmma_commit();
        wgmma_wait<0>();
        if (lane == 0) mbarrier_arrive(&s.empty[stage]);
    }

    DEVICE static int length(const MlaDecodeParams& p, const Part& part, int line) {
        return p.lengths[part.lines.row(line)];
    }
    // Whether a line is a head of a row that has tokens in this part.
    DEVICE static bool written(const MlaDecodeParams& p, const Part& part, int line) {
        return part.lines.has(p, line) && within(part.begin, length(p, part, line));
    }
    DEVICE static int64_t place(const MlaDecodeParams& p, const Part& part, int line) {
        return ((int64_t)part.lines.row(line) * p.heads + part.lines.head(line)) * p.splits + block_z();
    }

    DEVICE static void store(const MlaDecodeParams& p, Shared& s, const Part& part, int half, const Output& out) {
        const int lane = lane_index(), g = warp_index() % 4 * 16 + lane / 4, t = lane % 4;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int line = g + 8 * h;
            if (!written(p, part, line)) continue;
            const float factor = div_rn(1.f, s.total[line]);
            float* to = p.partial + place(p, part, line) * LATENT + half * COLUMNS + 2 * t;
#pragma unroll
            for (int i = 2 * h; i < COLUMNS / 2; i += 4)
                *reinterpret_cast<FloatPair*>(to + i / 4 * 8) = {out[i] * factor, out[i + 1] * factor};
        }
    }
};

using Published = HopperMlaDecode<512, 64>;
using Small = HopperMlaDecode<64, 32>;
KERNEL_ALONE(hopper_mla_decode_bf16_512_64, MlaDecodeParams, DECODE_THREADS) { Published::run(p); }
KERNEL_ALONE(hopper_mla_decode_bf16_64_32, MlaDecodeParams, DECODE_THREADS) { Small::run(p); }
static_assert(sizeof(Published::Shared) == 230400, "src/plan/attention.rs asks for this much");
static_assert(sizeof(Small::Shared) == 58368, "src/plan/attention.rs asks for this much");
