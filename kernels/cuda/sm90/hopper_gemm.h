// c = a b^T with TMA and wgmma for every number of rows: the weights are the 64 rows of wgmma, the activations its columns.
//
// Invariant: a value of c is the same bits whatever m is. Every kernel below feeds the same products in the same order, cuts
// k where the plan says for (n, k), and adds slices in order, be they summed by one block or by one block each.
//
// Surprise: c comes out transposed, a thread holding neighbours along m. It is turned in shared memory, where a block that
// sums all slices also keeps their total, so that registers hold one slice alone.
#pragma once
#include "../common/kernel90_gemm.h"

// A block owns 128 columns of c: two warpgroups of 64. A row of a stage is 128 bytes of k, one swizzle span.
constexpr int HOPPER_COLUMNS = 128, HOPPER_K_BYTES = 128, HOPPER_STEPS = HOPPER_K_BYTES / 32;
constexpr int HOPPER_WARPS = 8, HOPPER_THREADS = 32 * HOPPER_WARPS; // that multiply
constexpr int HOPPER_WEIGHT_BYTES = HOPPER_COLUMNS * HOPPER_K_BYTES;
// Four more than the columns: four lanes that write two rows apart and eight that write side by side meet 32 banks.
constexpr int HOPPER_TILE_STRIDE = HOPPER_COLUMNS + 4;
// Tiles of rows that run together, so that the second cache serves their weights once.
constexpr int HOPPER_BAND = 8;
static_assert(HOPPER_COLUMNS == QUANT_GROUP, "a block has one weight scale per k block");

// Two blocks fit a multiprocessor up to 64 rows; 32 KB or more of weights are then in flight in each.
CONSTANT int hopper_stages(int rows) { return rows == 16 ? 5 : rows == 64 ? 3 : 4; }

template <int ROWS> struct HopperShared {
    static constexpr int STAGES = hopper_stages(ROWS);
    alignas(1024) unsigned char weights[STAGES][HOPPER_WEIGHT_BYTES];
    alignas(1024) unsigned char rows[STAGES][ROWS * HOPPER_K_BYTES];
    float tile[ROWS][HOPPER_TILE_STRIDE];
    float scales[STAGES][ROWS]; // fp8: of the row times that of the weights
    // `full`: a stage has landed. `empty`: all warps that multiply have read it.
    uint64_t full[STAGES], empty[STAGES];
    int last;
};
static_assert(sizeof(HopperShared<16>) == 101376, "src/plan/hopper.rs asks for this much");
static_assert(sizeof(HopperShared<32>) == 100352, "src/plan/hopper.rs asks for this much");
static_assert(sizeof(HopperShared<64>) == 108544, "src/plan/hopper.rs asks for this much");
static_assert(sizeof(HopperShared<128>) == 201728, "src/plan/hopper.rs asks for this much");

struct HopperBf16 {
    using Value = bf16;
    static constexpr bool FP8 = false;
    static constexpr int VALUES = 64;                 // of k in a stage
    static constexpr int THREADS = HOPPER_THREADS + 32; // one warp issues TMA
};
struct HopperFp8 {
    using Value = e4m3;
    static constexpr bool FP8 = true;
    static constexpr int VALUES = 128;
    static constexpr int THREADS = HOPPER_THREADS + 64; // and one fetches scales
};
static_assert(HopperFp8::VALUES == QUANT_GROUP, "an fp8 stage is one scale block");

// What a block works on: rows [row, row_end) and 128 columns of c, tiles [first, end) of k.
struct HopperPlace {
    int row, row_end, column, matrix, batch;
    int first, end, slice_tiles;
    const float* b_scales;
};

// row_end 0 when the tile is empty.
template <class E, int ROWS> DEVICE HopperPlace hopper_place(const HopperGemmParams& p) {
    const int columns = ceil_div(p.n, HOPPER_COLUMNS), band = block_x() / (HOPPER_BAND * columns);
    const int inside = block_x() % (HOPPER_BAND * columns), left = p.row_tiles - band * HOPPER_BAND;
    const int height = at_most(HOPPER_BAND, left), row_tile = band * HOPPER_BAND + inside % height;
    HopperPlace at;
    at.column = inside / height * HOPPER_COLUMNS;
    at.matrix = at.batch = block_y();
    at.row = row_tile * ROWS;
    at.row_end = p.m;
    if (p.tiles) {
        at.matrix = p.tiles[2 * row_tile];
        at.row = p.tiles[2 * row_tile + 1];
        at.row_end = at.matrix < 0 ? 0 : p.offsets[at.matrix + 1];
    }
    at.b_scales = p.b_scales + at.matrix * p.b_scales_batch + (int64_t)(at.column / QUANT_GROUP) * p.b_scales_stride;
    const int tiles = ceil_div(p.k, E::VALUES);
    at.slice_tiles = p.slice_blocks * (QUANT_GROUP / E::VALUES);
    at.first = p.partial ? block_z() * at.slice_tiles : 0;
    at.end = p.partial ? at_most(at.first + at.slice_tiles, tiles) : tiles;
    return at;
}

// The stage that comes next, and the parity of its turn.
template <int STAGES> struct HopperTurn {
    int stage = 0, parity = 0;
    DEVICE void next() {
        if (++stage < STAGES) return;
        stage = 0;
        parity ^= 1;
    }
};

// One lane: keeps every stage in flight.
template <class E, int ROWS>
DEVICE void hopper_produce(const HopperGemmParams& p, const HopperPlace& at, HopperShared<ROWS>& s) {
    HopperTurn<HopperShared<ROWS>::STAGES> turn;
    for (int tile = at.first; tile < at.end; tile++, turn.next()) {
        uint64_t* full = &s.full[turn.stage];
        mbarrier_wait(&s.empty[turn.stage], turn.parity ^ 1); // the first turn does not wait
        mbarrier_arrive_expect(full, HOPPER_WEIGHT_BYTES + ROWS * HOPPER_K_BYTES);
        tma_load_3d(s.weights[turn.stage], &p.b_map, tile * E::VALUES, at.column, at.matrix, full);
        tma_load_3d(s.rows[turn.stage], &p.a_map, tile * E::VALUES, at.batch, at.row, full);
    }
}

// One warp: the scales of every stage, fetched before there is room for them.
template <int ROWS> DEVICE void hopper_scale(const HopperGemmParams& p, const HopperPlace& at, HopperShared<ROWS>& s) {
    constexpr int EACH = ROWS < 32 ? 1 : ROWS / 32;
    const float* scales[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int row = at.row + 32 * i + lane_index();
        const bool inside = within(32 * i + lane_index(), ROWS) && within(row, at.row_end);
        scales[i] = inside ? p.a_scales + (int64_t)(p.a_rows ? p.a_rows[row] : row) * p.a_scales_stride : nullptr;
    }
    HopperTurn<HopperShared<ROWS>::STAGES> turn;
    for (int tile = at.first; tile < at.end; tile++, turn.next()) {
        const float weight = at.b_scales[tile];
        float both[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) both[i] = scales[i] ? mul_rn(scales[i][tile], weight) : 0.f;
        mbarrier_wait(&s.empty[turn.stage], turn.parity ^ 1);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (ROWS % 32 == 0 || within(lane_index(), ROWS)) s.scales[turn.stage][32 * i + lane_index()] = both[i];
        mbarrier_arrive(&s.full[turn.stage]); // every lane, for what it wrote
    }
}

// Sums `count` tiles of k from the turn's stage on.
template <class E, int ROWS>
DEVICE void hopper_sum(float (&sum)[ROWS / 2], HopperShared<ROWS>& s, HopperTurn<HopperShared<ROWS>::STAGES>& turn,
                       int count) {
    const int lane = lane_index(), half = warp_index() / 4 * (HOPPER_WEIGHT_BYTES / 2);
    if constexpr (E::FP8) {
        // Hopper keeps about 14 bits of an fp8 sum: a block of 128 is as far as it may go (DeepSeek-V3 report, 3.3.2).
        float part[ROWS / 2];
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) sum[i] = part[i] = 0.f;
        for (int tile = 0; tile < count; tile++, turn.next()) {
            mbarrier_wait(&s.full[turn.stage], turn.parity);
            wgmma_fence(part);
#pragma unroll
            for (int k = 0; k < HOPPER_STEPS; k++)
                wgmma_rows(part, matrix_descriptor(s.weights[turn.stage] + half + 32 * k),
                           matrix_descriptor(s.rows[turn.stage] + 32 * k), k > 0, e4m3{});
            wgmma_commit();
            wgmma_wait<0>(part); // the other warpgroup keeps the tensor cores busy meanwhile
            const float* scales = &s.scales[turn.stage][lane % 4 * 2];
#pragma unroll
            for (int i = 0; i < ROWS / 2; i++) sum[i] = fma_rn(part[i], scales[i / 4 * 8 + (i & 1)], sum[i]);
            warp_sync(); // every lane has read its scales
            if (lane == 0) mbarrier_arrive(&s.empty[turn.stage]);
        }
    } else {
        int before = turn.stage;
        for (int tile = 0; tile < count; tile++, turn.next()) {
            mbarrier_wait(&s.full[turn.stage], turn.parity);
            wgmma_fence(sum);
#pragma unroll
            for (int k = 0; k < HOPPER_STEPS; k++)
                wgmma_rows(sum, matrix_descriptor(s.weights[turn.stage] + half + 32 * k),
                           matrix_descriptor(s.rows[turn.stage] + 32 * k), tile > 0 || k > 0, bf16{});
            wgmma_commit();
            wgmma_wait<1>(); // the products of the tile before have been read
            if (tile > 0 && lane == 0) mbarrier_arrive(&s.empty[before]);
            before = turn.stage;
        }
        wgmma_wait<0>(sum);
        if (lane == 0) mbarrier_arrive(&s.empty[before]);
    }
}

// Where sum `i` of this thread lies in the tile.
template <int ROWS> DEVICE float& hopper_cell(HopperShared<ROWS>& s, int i) {
    const int lane = lane_index();
    return s.tile[i / 4 * 8 + lane % 4 * 2 + (i & 1)][warp_index() * 16 + lane / 4 + 8 * (i >> 1 & 1)];
}

template <class E, int ROWS>
DEVICE void hopper_multiply(const HopperGemmParams& p, const HopperPlace& at, HopperShared<ROWS>& s) {
    constexpr int SUMS = ROWS / 2;
    HopperTurn<HopperShared<ROWS>::STAGES> turn;
    float sum[SUMS];
    for (int tile = at.first; tile < at.end; tile += at.slice_tiles) {
        const int left = at.end - tile;
        hopper_sum<E, ROWS>(sum, s, turn, at_most(at.slice_tiles, left));
        if (p.partial) {
            float* partial = p.partial + ((int64_t)block_x() * p.slices + block_z()) * SUMS * HOPPER_THREADS;
#pragma unroll
            for (int i = 0; i < SUMS; i++) partial[i * HOPPER_THREADS + thread_index()] = sum[i];
        } else {
#pragma unroll
            for (int i = 0; i < SUMS; i++) {
                float& cell = hopper_cell(s, i); // this thread's alone until the store
                cell = tile == 0 ? sum[i] : add_rn(cell, sum[i]);
            }
        }
    }
}

// The block that comes last adds the slices of all. True when this is it.
template <int ROWS> DEVICE bool hopper_gather(const HopperGemmParams& p, HopperShared<ROWS>& s) {
    constexpr int SUMS = ROWS / 2;
    memory_fence();
    block_sync(); // this block's slice is visible to all
    if (thread_index() == 0) s.last = fetch_add(&p.tickets[block_x()], 1) == (uint32_t)p.slices - 1;
    block_sync();
    if (!s.last) return false;
    memory_fence();
    if (warp_index() < HOPPER_WARPS) {
        const float* partial = p.partial + (int64_t)block_x() * p.slices * SUMS * HOPPER_THREADS + thread_index();
#pragma unroll 4
        for (int i = 0; i < SUMS; i++) {
            float sum = load_shared_by_blocks(partial + i * HOPPER_THREADS);
            for (int slice = 1; slice < p.slices; slice++)
                sum = add_rn(sum, load_shared_by_blocks(partial + (slice * SUMS + i) * HOPPER_THREADS));
            hopper_cell(s, i) = sum;
        }
    } else if (lane_index() == 0) {
        p.tickets[block_x()] = 0; // for the next launch
    }
    return true;
}

struct alignas(8) Bf16Four {
    uint32_t low, high;
};

template <class E, int ROWS>
DEVICE void hopper_store(const HopperGemmParams& p, const HopperPlace& at, const HopperShared<ROWS>& s) {
    const int column = at.column + 4 * lane_index();
    const bool whole = within(column + 3, p.n) && (p.ldc & 3) == 0 && (p.c_batch & 3) == 0;
    for (int i = warp_index(); i < ROWS; i += E::THREADS / 32) {
        if (!within(at.row + i, at.row_end)) break;
        const int64_t index = at.batch * p.c_batch + (int64_t)(at.row + i) * p.ldc + column;
        const Vector v = load_vector(&s.tile[i][4 * lane_index()]);
        float* wide = static_cast<float*>(p.c) + index;
        bf16* narrow = static_cast<bf16*>(p.c) + index;
        if (whole && p.c_is_float32) {
            store_vector(wide, v);
        } else if (whole) {
            *reinterpret_cast<Bf16Four*>(narrow) = {bf16_pair(float_of(v.word[0]), float_of(v.word[1])),
                                                    bf16_pair(float_of(v.word[2]), float_of(v.word[3]))};
        } else {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                if (!within(column + c, p.n)) continue;
                if (p.c_is_float32)
                    wide[c] = float_of(v.word[c]);
                else
                    narrow[c] = bf16_from(float_of(v.word[c]));
            }
        }
    }
}

template <class E, int ROWS> DEVICE void hopper_gemm(const HopperGemmParams& p) {
    HopperShared<ROWS>& s = *reinterpret_cast<HopperShared<ROWS>*>(shared_memory());
    const HopperPlace at = hopper_place<E, ROWS>(p);
    if (at.row_end == 0) return; // no barrier has been met
    if (thread_index() == 0) {
#pragma unroll
        for (int i = 0; i < HopperShared<ROWS>::STAGES; i++) {
            mbarrier_init(&s.full[i], E::FP8 ? 1 + 32 : 1);
            mbarrier_init(&s.empty[i], HOPPER_WARPS);
        }
        mbarrier_init_fence();
    }
    block_sync(); // nobody meets a barrier that is not there yet
    const int warp = shuffle(warp_index(), 0); // known to be the warp's: the compiler serialises wgmma where warps may diverge
    if (warp < HOPPER_WARPS) {
        hopper_multiply<E, ROWS>(p, at, s);
    } else if (warp == HOPPER_WARPS) {
        if (lane_index() == 0) hopper_produce<E, ROWS>(p, at, s);
        warp_sync(); // one warp again, as a block's barrier wants it
    } else if (E::FP8) {
        hopper_scale<ROWS>(p, at, s);
    }
    if (p.partial && !hopper_gather<ROWS>(p, s)) return;
    block_sync(); // the tile is whole
    hopper_store<E, ROWS>(p, at, s);
}
