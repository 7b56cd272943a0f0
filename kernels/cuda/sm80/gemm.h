// c = a b^T for every dtype and layout of sm_80: bf16, block-scaled fp8, batched, grouped by expert.
//
// Invariant: a value of c is the same bits whatever m is and whichever of the two kernels below made it. Both cut k into
// the same SLICES and, inside one, feed the tensor cores the same values in the same order; slices are added in order.
//
// Surprise: fragments are loaded 16 bytes at a time along k, so a product sees k in the order 0 1 2 3 8 9 10 11 16 ...
// A dot product does not care as long as a and b agree, and ldmatrix is not needed.
#pragma once
#include "../common/kernel.h"

constexpr int SLICES = 8;
// Elements of k in a slice: whole blocks of 128, because fp8 scales change there.
DEVICE int slice_length(int k) { return ceil_div(ceil_div(k, QUANT_GROUP), SLICES) * QUANT_GROUP; }

struct Bf16 {
    static constexpr bool FP8 = false;
    static constexpr int BYTES = 2, STEPS = 2; // products of k 16 in 16 bytes of each lane
    DEVICE static void a_fragment(uint32_t (&a)[4], const Vector& top, const Vector& bottom, int step) {
        a[0] = top.word[2 * step];
        a[1] = bottom.word[2 * step];
        a[2] = top.word[2 * step + 1];
        a[3] = bottom.word[2 * step + 1];
    }
    DEVICE static void b_fragment(uint32_t (&b)[2], const Vector& row, int step) {
        b[0] = row.word[2 * step];
        b[1] = row.word[2 * step + 1];
    }
};

// e4m3 has no tensor core on sm_80; its values are exact in bf16, so products and float32 sums are what fp8 asks for.
struct Fp8 {
    static constexpr bool FP8 = true;
    static constexpr int BYTES = 1, STEPS = 4;
    DEVICE static void a_fragment(uint32_t (&a)[4], const Vector& top, const Vector& bottom, int step) {
        a[0] = bf16_pair_from_e4m3_low(top.word[step]);
        a[1] = bf16_pair_from_e4m3_low(bottom.word[step]);
        a[2] = bf16_pair_from_e4m3_high(top.word[step]);
        a[3] = bf16_pair_from_e4m3_high(bottom.word[step]);
    }
    DEVICE static void b_fragment(uint32_t (&b)[2], const Vector& row, int step) {
        b[0] = bf16_pair_from_e4m3_low(row.word[step]);
        b[1] = bf16_pair_from_e4m3_high(row.word[step]);
    }
};

// The part of the problem a block works on: rows [row, row_end) of c with one matrix b.
struct Problem {
    const unsigned char *a, *b;
    unsigned char* c;
    const float* b_scales;
    int row, row_end;
};

template <class E> DEVICE Problem batched_problem(const GemmParams& p, int tile_rows) {
    const int64_t z = block_z();
    return {static_cast<const unsigned char*>(p.a) + z * p.a_batch * E::BYTES,
            static_cast<const unsigned char*>(p.b) + z * p.b_batch * E::BYTES,
            static_cast<unsigned char*>(p.c) + z * p.c_batch * (p.c_is_float32 ? 4 : 2),
            p.b_scales + z * p.b_scales_batch, block_y() * tile_rows, p.m};
}

// row_end 0 when the tile is empty.
template <class E> DEVICE Problem grouped_problem(const GemmParams& p) {
    const int expert = p.tiles[2 * block_y()];
    if (expert < 0) return {nullptr, nullptr, nullptr, nullptr, 0, 0};
    return {static_cast<const unsigned char*>(p.a),
            static_cast<const unsigned char*>(p.b) + (int64_t)expert * p.b_batch * E::BYTES,
            static_cast<unsigned char*>(p.c), p.b_scales + (int64_t)expert * p.b_scales_batch,
            p.tiles[2 * block_y() + 1], p.offsets[expert + 1]};
}

DEVICE int row_of_a(const GemmParams& p, int row) { return p.a_rows ? p.a_rows[row] : row; }

DEVICE void store_pair(const GemmParams& p, const Problem& at, int row, int column, float low, float high) {
    if (!within(row, at.row_end)) return;
    const int64_t index = (int64_t)row * p.ldc + column;
    const bool both = within(column + 1, p.n);
    if (!within(column, p.n)) return;
    if (p.c_is_float32) {
        float* c = reinterpret_cast<float*>(at.c) + index;
        c[0] = low;
        if (both) c[1] = high;
    } else if (both && (p.ldc & 1) == 0) {
        *reinterpret_cast<uint32_t*>(reinterpret_cast<bf16*>(at.c) + index) = bf16_pair(low, high);
    } else {
        bf16* c = reinterpret_cast<bf16*>(at.c) + index;
        c[0] = bf16_from(low);
        if (both) c[1] = bf16_from(high);
    }
}

// ---- Few rows: the weights stream past once -------------------------------------------------------------------------
// A block owns 16 columns and 16 * MT rows; its eight warps take one slice of k each and read a and b straight into
// fragments. Slices meet in shared memory.

constexpr int STREAM_THREADS = 32 * SLICES;
constexpr int STREAM_COLUMNS = 16;
static_assert(QUANT_GROUP % STREAM_COLUMNS == 0, "a block of columns has one weight scale per k block");
template <int MT> constexpr int stream_shared_bytes() { return SLICES * MT * 16 * STREAM_COLUMNS * 4; }

template <class E, int MT> DEVICE void gemm_stream(const GemmParams& p, const Problem& at) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4, n0 = block_x() * STREAM_COLUMNS;
    constexpr int PIECE = 16 / E::BYTES, CHUNK = 4 * PIECE; // elements of k per lane and per warp and load
    const int slice = slice_length(p.k), begin = warp_index() * slice;
    const int end = at_most(begin + slice, p.k);
    const unsigned char* a_row[MT][2];
    const float* a_scale[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = at.row + 16 * i + 8 * h + g;
            const bool inside = within(row, at.row_end);
            const int from = inside ? row_of_a(p, row) : 0;
            a_row[i][h] = inside ? at.a + (int64_t)from * p.lda * E::BYTES : nullptr;
            a_scale[i][h] = E::FP8 && inside ? p.a_scales + (int64_t)from * p.a_scales_stride : nullptr;
        }
    const unsigned char* b_row[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int column = n0 + 8 * j + g;
        b_row[j] = within(column, p.n) ? at.b + (int64_t)column * p.ldb * E::BYTES : nullptr;
    }
    const float* b_scale = E::FP8 ? at.b_scales + (int64_t)(n0 / QUANT_GROUP) * p.b_scales_stride : nullptr;

    float sum[MT][2][4] = {}, part[MT][2][4] = {};
    // sum collects scaled blocks of 128 for fp8; for bf16 the products go there directly.
    auto& target = E::FP8 ? part : sum;
#pragma unroll 4
    for (int k0 = begin; k0 < end; k0 += CHUNK) {
        const int at_k = k0 + t * PIECE;
        const bool live = within(at_k, end);
        const Vector zero = {{0, 0, 0, 0}};
        Vector b[2];
#pragma unroll
        for (int j = 0; j < 2; j++) b[j] = live && b_row[j] ? load_stream(b_row[j] + (int64_t)at_k * E::BYTES) : zero;
        Vector a[MT][2];
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                a[i][h] = live && a_row[i][h] ? load_vector(a_row[i][h] + (int64_t)at_k * E::BYTES) : zero;
#pragma unroll
        for (int step = 0; step < E::STEPS; step++) {
            uint32_t fb[2][2];
#pragma unroll
            for (int j = 0; j < 2; j++) E::b_fragment(fb[j], b[j], step);
#pragma unroll
            for (int i = 0; i < MT; i++) {
                uint32_t fa[4];
                E::a_fragment(fa, a[i][0], a[i][1], step);
#pragma unroll
                for (int j = 0; j < 2; j++) mma_bf16(target[i][j], fa, fb[j]);
            }
        }
        if (E::FP8 && ((k0 + CHUNK) % QUANT_GROUP == 0 || k0 + CHUNK >= end)) {
            const int block = k0 / QUANT_GROUP;
            const float scale = b_scale[block];
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float both = a_scale[i][h] ? mul_rn(a_scale[i][h][block], scale) : 0.f;
#pragma unroll
                    for (int j = 0; j < 2; j++)
#pragma unroll
                        for (int c = 2 * h; c < 2 * h + 2; c++) {
                            sum[i][j][c] = fma_rn(part[i][j][c], both, sum[i][j][c]);
                            part[i][j][c] = 0.f;
                        }
                }
        }
    }

    float* partial = reinterpret_cast<float*>(shared_memory()); // [SLICES][16 MT][16]
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                partial[((warp_index() * MT + i) * 16 + g + 8 * (c >> 1)) * STREAM_COLUMNS + 8 * j + 2 * t + (c & 1)] =
                    sum[i][j][c];
    block_sync();
    for (int pair = thread_index(); pair < MT * 16 * STREAM_COLUMNS / 2; pair += STREAM_THREADS) {
        float low = 0.f, high = 0.f;
#pragma unroll
        for (int s = 0; s < SLICES; s++) {
            low = add_rn(low, partial[s * MT * 16 * STREAM_COLUMNS + 2 * pair]);
            high = add_rn(high, partial[s * MT * 16 * STREAM_COLUMNS + 2 * pair + 1]);
        }
        store_pair(p, at, at.row + pair / (STREAM_COLUMNS / 2), n0 + pair % (STREAM_COLUMNS / 2) * 2, low, high);
    }
}

// ---- Many rows: tiles in shared memory ------------------------------------------------------------------------------
// A block owns 64 x 64 of c; four warps of 32 x 32. Rows of a and b arrive as 128 bytes of k per stage.

constexpr int TILE_THREADS = 128;
constexpr int TILE_ROWS = 64, TILE_COLUMNS = 64, TILE_STAGES = 3, TILE_K_BYTES = 128;
constexpr int TILE_STAGE_BYTES = (TILE_ROWS + TILE_COLUMNS) * TILE_K_BYTES;
constexpr int TILE_SHARED_BYTES = TILE_STAGES * TILE_STAGE_BYTES;
static_assert(TILE_SHARED_BYTES <= 48 * 1024, "fits without asking the driver for more");
static_assert(QUANT_GROUP % TILE_COLUMNS == 0, "a tile has one weight scale per k block");
static_assert(TILE_K_BYTES == QUANT_GROUP * Fp8::BYTES, "an fp8 stage is one scale block");

// Where 16-byte chunk `chunk` of row `row` lies: odd rows swap halves, so that 8 lanes of a fragment load meet 32 banks.
DEVICE int tile_offset(int row, int chunk) { return row * TILE_K_BYTES + ((chunk ^ ((row & 1) << 2)) << 4); }

template <class E> DEVICE void tile_load(const GemmParams& p, const Problem& at, unsigned char* stage, int k_tile) {
    constexpr int PIECE = 16 / E::BYTES, TILE_K = TILE_K_BYTES / E::BYTES;
    const int n0 = block_x() * TILE_COLUMNS;
#pragma unroll
    for (int i = 0; i < (TILE_ROWS + TILE_COLUMNS) * 8 / TILE_THREADS; i++) {
        const int index = i * TILE_THREADS + thread_index(), line = index / 8, chunk = index % 8;
        const int k = k_tile * TILE_K + chunk * PIECE;
        const bool is_a = line < TILE_ROWS;
        const int row = is_a ? at.row + line : n0 + line - TILE_ROWS;
        const bool valid = within(row, is_a ? at.row_end : p.n) && within(k, p.k);
        const unsigned char* from = is_a ? at.a : at.b;
        if (valid) from += ((int64_t)(is_a ? row_of_a(p, row) : row) * (is_a ? p.lda : p.ldb) + k) * E::BYTES;
        copy_async(stage + tile_offset(line, chunk), from, valid);
    }
}

template <class E> DEVICE void gemm_tile(const GemmParams& p, const Problem& at) {
    constexpr int TILE_K = TILE_K_BYTES / E::BYTES;
    unsigned char* stages = shared_memory();
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    const int wm = warp_index() % 2 * 32, wn = warp_index() / 2 * 32, n0 = block_x() * TILE_COLUMNS;
    const int k_tiles = ceil_div(p.k, TILE_K), slice_tiles = slice_length(p.k) / TILE_K;
    const float* a_scale[2][2] = {};
    const float* b_scale = E::FP8 ? at.b_scales + (int64_t)(n0 / QUANT_GROUP) * p.b_scales_stride : nullptr;
    if (E::FP8)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = at.row + wm + 16 * i + 8 * h + g;
                if (within(row, at.row_end)) a_scale[i][h] = p.a_scales + (int64_t)row_of_a(p, row) * p.a_scales_stride;
            }

#pragma unroll
    for (int s = 0; s < TILE_STAGES - 1; s++) {
        if (s < k_tiles) tile_load<E>(p, at, stages + s * TILE_STAGE_BYTES, s);
        copy_async_commit();
    }
    float total[2][4][4] = {}, sum[2][4][4] = {}, part[2][4][4] = {};
    auto& target = E::FP8 ? part : sum;
    for (int k_tile = 0; k_tile < k_tiles; k_tile++) {
        copy_async_wait<TILE_STAGES - 2>();
        block_sync(); // the stage is whole, and everyone has left the one refilled next
        const int ahead = k_tile + TILE_STAGES - 1;
        if (ahead < k_tiles) tile_load<E>(p, at, stages + ahead % TILE_STAGES * TILE_STAGE_BYTES, ahead);
        copy_async_commit();
        const unsigned char* a = stages + k_tile % TILE_STAGES * TILE_STAGE_BYTES;
        const unsigned char* b = a + TILE_ROWS * TILE_K_BYTES;
#pragma unroll
        for (int part_of_stage = 0; part_of_stage < 2; part_of_stage++) {
            const int chunk = 4 * part_of_stage + t;
            Vector va[2][2], vb[4];
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) va[i][h] = load_vector(a + tile_offset(wm + 16 * i + 8 * h + g, chunk));
#pragma unroll
            for (int j = 0; j < 4; j++) vb[j] = load_vector(b + tile_offset(wn + 8 * j + g, chunk));
#pragma unroll
            for (int step = 0; step < E::STEPS; step++) {
                uint32_t fa[2][4], fb[4][2];
#pragma unroll
                for (int i = 0; i < 2; i++) E::a_fragment(fa[i], va[i][0], va[i][1], step);
#pragma unroll
                for (int j = 0; j < 4; j++) E::b_fragment(fb[j], vb[j], step);
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) mma_bf16(target[i][j], fa[i], fb[j]);
            }
        }
        if (E::FP8) {
            const float scale = b_scale[k_tile];
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float both = a_scale[i][h] ? mul_rn(a_scale[i][h][k_tile], scale) : 0.f;
#pragma unroll
                    for (int j = 0; j < 4; j++)
#pragma unroll
                        for (int c = 2 * h; c < 2 * h + 2; c++) {
                            sum[i][j][c] = fma_rn(part[i][j][c], both, sum[i][j][c]);
                            part[i][j][c] = 0.f;
                        }
                }
        }
        if ((k_tile + 1) % slice_tiles == 0 || k_tile + 1 == k_tiles) {
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        total[i][j][c] = add_rn(total[i][j][c], sum[i][j][c]);
                        sum[i][j][c] = 0.f;
                    }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                store_pair(p, at, at.row + wm + 16 * i + 8 * h + g, n0 + wn + 8 * j + 2 * t, total[i][j][2 * h],
                           total[i][j][2 * h + 1]);
}
