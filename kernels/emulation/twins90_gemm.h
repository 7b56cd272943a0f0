// The emulated twin of cuda/common/ptx90_gemm.h.
#pragma once
#include "twins90.h"

inline void tma_load_3d(void* to, const TensorMap* map, int x, int y, int z, uint64_t* barrier) {
    emu::tma_issue(to, map, 3, x, y, z, barrier);
}
inline void memory_fence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    emu::memory_fence();
}
inline uint32_t fetch_add(uint32_t* to, uint32_t value) {
    emu::check_announces();
    return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}
inline float load_shared_by_blocks(const float* p) {
    emu::check_ordered();
    return *p;
}
template <int COUNT> void wgmma_fence(float (&)[COUNT]) { wgmma_fence(); }
template <int LEFT, int COUNT> void wgmma_wait(float (&)[COUNT]) { wgmma_wait<LEFT>(); }

namespace emu {
struct E4m3Values {
    float of[256];
    E4m3Values() {
        for (int code = 0; code < 256; code++) {
            const char byte = char(code);
            widen(of[code], &byte, e4m3{});
        }
    }
};
inline const E4m3Values e4m3_values;

inline void widen_piece(float* to, const char* at, bf16) {
    for (int i = 0; i < 8; i++) widen(to[i], at + 2 * i, bf16{});
}
inline void widen_piece(float* to, const char* at, e4m3) {
    for (int i = 0; i < 16; i++) to[i] = e4m3_values.of[static_cast<unsigned char>(at[i])];
}
// 32 bytes of k of a row of what a descriptor describes.
template <class E> void widen_row(float* to, uint64_t descriptor, unsigned row) {
    for (unsigned byte = 0; byte < 32; byte += 16)
        widen_piece(to + byte / sizeof(E), described(descriptor, row, byte, 16), E{});
}

// A warp's quarter of the warpgroup's product: 16 rows of a, all ROWS of b.
template <class E, unsigned ROWS> void rows_run(Product& product) {
    constexpr unsigned K = 32 / sizeof(E), SUMS = ROWS / 2;
    float A[16][K], row[K], B[K][ROWS], C[16][ROWS];
    for (unsigned i = 0; i < 16; i++) widen_row<E>(A[i], product.a, product.warp % 4 * 16 + i);
    for (unsigned j = 0; j < ROWS; j++) {
        widen_row<E>(row, product.b, j);
        for (unsigned k = 0; k < K; k++) B[k][j] = row[k];
    }
    for (unsigned l = 0; l < 32; l++) {
        const float* d = static_cast<const float*>(product.arguments[l]);
        for (unsigned i = 0; i < SUMS; i++)
            C[l / 4 + 8 * (i >> 1 & 1)][i / 4 * 8 + l % 4 * 2 + (i & 1)] = product.accumulate ? d[i] : 0.f;
    }
    for (unsigned i = 0; i < 16; i++)
        for (unsigned k = 0; k < K; k++)
            for (unsigned j = 0; j < ROWS; j++) C[i][j] += A[i][k] * B[k][j];
    for (unsigned l = 0; l < 32; l++) {
        float* d = static_cast<float*>(product.arguments[l]);
        for (unsigned i = 0; i < SUMS; i++) d[i] = C[l / 4 + 8 * (i >> 1 & 1)][i / 4 * 8 + l % 4 * 2 + (i & 1)];
    }
}

template <class E, unsigned ROWS> void rows_of_warp(void* const arguments[32]) {
    const Wgmma& first = *static_cast<Wgmma*>(arguments[0]);
    Product product{};
    for (int l = 0; l < 32; l++) {
        const Wgmma& mine = *static_cast<Wgmma*>(arguments[l]);
        if (mine.a != first.a || mine.b != first.b || mine.accumulate != first.accumulate)
            fault(FAILED, "lanes of a warp give wgmma different descriptors");
        product.arguments[l] = mine.d;
    }
    product.run = rows_run<E, ROWS>;
    product.accumulate = first.accumulate;
    product.a = first.a;
    product.b = first.b;
    product.warp = block->self->warp;
    product_issue(product);
}
} // namespace emu

template <int SUMS, class E> void wgmma_rows(float (&d)[SUMS], uint64_t a, uint64_t b, bool add, E) {
    emu::Wgmma w{d, a, b, add};
    emu::collective("wgmma.m64", emu::rows_of_warp<E, 2 * SUMS>, &w);
}
