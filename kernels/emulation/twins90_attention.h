// The emulated twin of cuda/common/ptx90_attention.h.
//
// Surprise: these products read shared memory as it was at the block's last fence, by whichever warp. A missing fence
// shows as NaN or as what was there before, unless another warp's happens to come between; after cp.async it is a fault
// even then.
#pragma once
#include "twins90.h"

inline void async_proxy_fence() { emu::async_proxy_fence(); }

template <int COUNT> void registers_give_back() { emu::collective("setmaxnreg.dec", emu::nothing, nullptr); }
template <int COUNT> void registers_take() { emu::collective("setmaxnreg.inc", emu::nothing, nullptr); }

inline uint64_t transposed_descriptor(const void* at, int next) {
    const uint64_t offset = uint64_t(static_cast<const char*>(at) - emu::block->shared);
    return (offset & 0x3ffff) >> 4 | uint64_t(next >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

namespace emu {
// Value `k` of row `n` of the matrix that a descriptor points at; of a transposed one, row `k` of column `n`.
inline void fetch(float& to, uint64_t descriptor, unsigned k, unsigned n, bool transposed) {
    const uintptr_t start = (descriptor & 0x3fff) << 4, next = (descriptor >> 16 & 0x3fff) << 4,
                    eight_rows = (descriptor >> 32 & 0x3fff) << 4;
    const uintptr_t at = swizzle(transposed ? start + n / 64 * next + k / 8 * eight_rows + k % 8 * 128 + n % 64 * 2
                                            : start + n / 8 * eight_rows + n % 8 * 128 + k * 2);
    check_shared(block->shared + at, 2, "wgmma");
    check_fenced(at);
    widen(to, block->async_view.data() + at, bf16{});
}

// A warp's 16 rows of a from registers, as mma_bf16 has them.
inline void from_registers(float (&A)[16][16], const Product& product) {
    for (unsigned l = 0; l < 32; l++)
        for (unsigned i = 0; i < 4; i++) {
            float* a = &A[l / 4 + 8 * (i & 1)][2 * (l % 4) + 8 * (i >> 1)];
            a[0] = float_of(product.registers[l][i] << 16);
            a[1] = float_of(product.registers[l][i] & 0xffff0000u);
        }
}

// A warp's quarter of the warpgroup's product: 16 rows of a, all COLUMNS of b.
template <unsigned COLUMNS, bool TRANSPOSED> void attention_run(Product& product) {
    float A[16][16], B[16][COLUMNS], C[16][COLUMNS];
    const unsigned first = product.warp % 4 * 16;
    if (product.registers[0]) from_registers(A, product);
    for (unsigned k = 0; k < 16; k++) {
        for (unsigned i = 0; i < 16 && !product.registers[0]; i++) fetch(A[i][k], product.a, k, first + i, false);
        for (unsigned j = 0; j < COLUMNS; j++) fetch(B[k][j], product.b, k, j, TRANSPOSED);
    }
    constexpr unsigned EACH = COLUMNS / 2;
    for (unsigned l = 0; l < 32; l++) {
        const float* d = static_cast<const float*>(product.arguments[l]);
        for (unsigned i = 0; i < EACH; i++)
            C[l / 4 + 8 * (i >> 1 & 1)][i / 4 * 8 + l % 4 * 2 + (i & 1)] = product.accumulate ? d[i] : 0.f;
    }
    for (unsigned i = 0; i < 16; i++)
        for (unsigned k = 0; k < 16; k++)
            for (unsigned j = 0; j < COLUMNS; j++) C[i][j] += A[i][k] * B[k][j];
    for (unsigned l = 0; l < 32; l++) {
        float* d = static_cast<float*>(product.arguments[l]);
        for (unsigned i = 0; i < EACH; i++) d[i] = C[l / 4 + 8 * (i >> 1 & 1)][i / 4 * 8 + l % 4 * 2 + (i & 1)];
    }
}

struct AttentionWgmma {
    float* d;
    uint64_t a, b;
    bool accumulate;
    const uint32_t* registers; // null: a is a descriptor
};
template <unsigned COLUMNS, bool TRANSPOSED> void attention_of_warp(void* const arguments[32]) {
    const AttentionWgmma& first = *static_cast<AttentionWgmma*>(arguments[0]);
    Product product{};
    for (int l = 0; l < 32; l++) {
        const AttentionWgmma& mine = *static_cast<AttentionWgmma*>(arguments[l]);
        if (mine.a != first.a || mine.b != first.b || mine.accumulate != first.accumulate)
            fault(FAILED, "lanes of a warp give wgmma different descriptors");
        product.arguments[l] = mine.d;
        product.registers[l] = mine.registers;
    }
    product.run = attention_run<COLUMNS, TRANSPOSED>;
    product.accumulate = first.accumulate;
    product.a = first.a;
    product.b = first.b;
    product.warp = block->self->warp;
    product_issue(product);
}
template <unsigned COLUMNS, bool TRANSPOSED>
void attention_wgmma(const char* name, float* d, uint64_t a, uint64_t b, bool add, const uint32_t* registers) {
    AttentionWgmma w{d, a, b, add, registers};
    collective(name, attention_of_warp<COLUMNS, TRANSPOSED>, &w);
}
} // namespace emu

inline void wgmma_bf16_64x64(float (&d)[32], uint64_t a, uint64_t b, bool add) {
    emu::attention_wgmma<64, false>("wgmma.m64n64k16", d, a, b, add, nullptr);
}
inline void wgmma_bf16_64x128(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    emu::attention_wgmma<128, false>("wgmma.m64n128k16", d, a, b, add, nullptr);
}
inline void wgmma_bf16_values(float (&d)[32], uint64_t a, uint64_t b, bool add) {
    emu::attention_wgmma<64, true>("wgmma.m64n64k16, transposed", d, a, b, add, nullptr);
}
inline void wgmma_bf16_values(float (&d)[128], uint64_t a, uint64_t b, bool add) {
    emu::attention_wgmma<256, true>("wgmma.m64n256k16, transposed", d, a, b, add, nullptr);
}
inline void wgmma_bf16_values(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    emu::attention_wgmma<64, true>("wgmma.m64n64k16, registers", d, 0, b, true, a);
}
inline void wgmma_bf16_values(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
    emu::attention_wgmma<128, true>("wgmma.m64n128k16, registers", d, 0, b, true, a);
}
