// The emulated twin of every function of cuda/common/ptx.h. Alignment and shared-memory bounds are checked here, because
// the hardware traps on them and a CPU does not.
#pragma once
#include <cmath>
#include <cstring>

using emu::Collective;

inline int thread_index() { return emu::block->self->linear; }
inline int lane_index() { return emu::block->self->lane; }
inline int warp_index() { return emu::block->self->warp; }
inline int block_x() { return emu::block->index.x; }
inline int block_y() { return emu::block->index.y; }
inline int block_z() { return emu::block->index.z; }
inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(emu::block->shared); }

inline void block_sync() { emu::barrier(); }

namespace emu {
template <class T> struct Exchange {
    T value, result;
    int other;
};
template <class T> void exchange(void* const arguments[32]) {
    for (int i = 0; i < 32; i++) {
        auto* to = static_cast<Exchange<T>*>(arguments[i]);
        to->result = static_cast<Exchange<T>*>(arguments[to->other & 31])->value;
    }
}
inline void nothing(void* const[32]) {}
} // namespace emu

inline void warp_sync() {
    emu::collective("warp_sync", [](void* const[32]) { emu::meet(); }, nullptr);
}
template <class T> T shuffle(T value, int source) {
    emu::Exchange<T> e{value, value, source};
    emu::collective("shuffle", emu::exchange<T>, &e);
    return e.result;
}
template <class T> T shuffle_xor(T value, int mask) { return shuffle(value, lane_index() ^ mask); }
inline uint32_t vote(bool predicate) {
    struct Ballot {
        bool predicate;
        uint32_t result;
    } own{predicate, 0};
    emu::collective(
        "ballot",
        [](void* const arguments[32]) {
            uint32_t bits = 0;
            for (int i = 0; i < 32; i++) bits |= uint32_t(static_cast<Ballot*>(arguments[i])->predicate) << i;
            for (int i = 0; i < 32; i++) static_cast<Ballot*>(arguments[i])->result = bits;
        },
        &own);
    return own.result;
}
inline int popcount(uint32_t bits) { return __builtin_popcount(bits); }

inline float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline uint32_t bits_of(float value) {
    uint32_t u;
    memcpy(&u, &value, 4);
    return u;
}
inline float fma_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float mul_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
inline float div_rn(float a, float b) { return a / b; }
inline float sqrt_rn(float a) { return std::sqrt(a); }
inline int round_even(float a) { return int(std::nearbyint(a)); }
inline float exp_exact(float a) { return std::exp(a); }
inline float exp2_fast(float a) { return std::exp2(a); }
inline float log2_exact(float a) { return std::log2(a); }
inline float log_exact(float a) { return std::log(a); }
inline double exp_double(double a) { return std::exp(a); }
inline double log_double(double a) { return std::log(a); }
inline void atomic_add(uint32_t* to, uint32_t value) { __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline void atomic_or(uint32_t* to, uint32_t value) { __atomic_fetch_or(to, value, __ATOMIC_RELAXED); }

inline float float_from(bf16 value) { return float_of(uint32_t(value.bits) << 16); }
inline bf16 bf16_from(float value) {
    uint32_t u = bits_of(value);
    if ((u & 0x7fffffff) > 0x7f800000) return bf16{0x7fff};
    u += 0x7fff + ((u >> 16) & 1);
    return bf16{uint16_t(u >> 16)};
}
inline uint32_t bf16_pair(float low, float high) {
    return bf16_from(low).bits | uint32_t(bf16_from(high).bits) << 16;
}
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) r |= uint32_t(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return r;
}
inline uint32_t bf16_pair_fma(uint32_t a, uint32_t b, uint32_t c) {
    auto one = [](uint16_t x, uint16_t y, uint16_t z) {
        return bf16_from(fma_rn(float_from(bf16{x}), float_from(bf16{y}), float_from(bf16{z})));
    };
    return one(uint16_t(a), uint16_t(b), uint16_t(c)).bits |
           uint32_t(one(uint16_t(a >> 16), uint16_t(b >> 16), uint16_t(c >> 16)).bits) << 16;
}

inline void check_aligned(const void* p, const char* who) {
    if (reinterpret_cast<uintptr_t>(p) % 16)
        emu::fault(emu::MISALIGNED, "%s of 16 bytes at an address that is not a multiple of 16", who);
}
inline Vector load_vector(const void* p) {
    check_aligned(p, "load");
    Vector v;
    memcpy(&v, p, 16);
    return v;
}
inline void store_vector(void* p, const Vector& v) {
    check_aligned(p, "store");
    memcpy(p, &v, 16);
    emu::wrote(p);
}
inline Vector load_stream(const void* p) { return load_vector(p); }

inline void copy_async(void* to, const void* from, bool valid) { emu::copy_issue(to, valid ? from : nullptr, 16); }
inline void copy_async_commit() { emu::copy_commit(); }
template <int LEFT> void copy_async_wait() { emu::copy_wait(LEFT); }

namespace emu {
struct Matrices {
    const unsigned char* row;
    uint32_t* r;
};
template <bool TRANSPOSED> void load_matrices_of_warp(void* const arguments[32]) {
    for (int m = 0; m < 4; m++) {
        uint16_t values[8][8];
        for (int i = 0; i < 8; i++) {
            const unsigned char* row = static_cast<Matrices*>(arguments[8 * m + i])->row;
            check_shared(row, 16, "ldmatrix");
            check_aligned(row, "ldmatrix");
            check_met(row, unsigned(8 * m + i));
            memcpy(values[i], row, 16);
        }
        for (int l = 0; l < 32; l++) {
            const int i = l / 4, j = 2 * (l % 4);
            const uint16_t low = TRANSPOSED ? values[j][i] : values[i][j];
            const uint16_t high = TRANSPOSED ? values[j + 1][i] : values[i][j + 1];
            static_cast<Matrices*>(arguments[l])->r[m] = low | uint32_t(high) << 16;
        }
    }
}
struct Mma {
    float* d;
    const uint32_t *a, *b;
};
inline void mma_of_warp(void* const arguments[32]) {
    float A[16][16], B[16][8], C[16][8];
    for (int l = 0; l < 32; l++) {
        const Mma& m = *static_cast<Mma*>(arguments[l]);
        const int g = l / 4, t = 2 * (l % 4);
        for (int i = 0; i < 4; i++) {
            float* a = &A[g + 8 * (i & 1)][t + 8 * (i >> 1)];
            a[0] = float_of(m.a[i] << 16);
            a[1] = float_of(m.a[i] & 0xffff0000u);
            C[g + 8 * (i >> 1)][t + (i & 1)] = m.d[i];
        }
        for (int i = 0; i < 2; i++) {
            B[t + 8 * i][g] = float_of(m.b[i] << 16);
            B[t + 8 * i + 1][g] = float_of(m.b[i] & 0xffff0000u);
        }
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
    for (int l = 0; l < 32; l++) {
        const Mma& m = *static_cast<Mma*>(arguments[l]);
        for (int i = 0; i < 4; i++) m.d[i] = C[l / 4 + 8 * (i >> 1)][2 * (l % 4) + (i & 1)];
    }
}
} // namespace emu

inline void load_matrices(uint32_t (&r)[4], const void* row) {
    emu::Matrices m{static_cast<const unsigned char*>(row), r};
    emu::collective("ldmatrix", emu::load_matrices_of_warp<false>, &m);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    emu::Matrices m{static_cast<const unsigned char*>(row), r};
    emu::collective("ldmatrix.trans", emu::load_matrices_of_warp<true>, &m);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emu::Mma m{d, a, b};
    emu::collective("mma.m16n8k16", emu::mma_of_warp, &m);
}
