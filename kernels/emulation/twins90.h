// The emulated twin of cuda/common/ptx90.h.
#pragma once
#include "twins.h"

// What emulation/driver.cpp writes into a CUtensorMap: rank 2 or 3 (one layer when it is 2), rows of 128 swizzled bytes.
struct alignas(64) TensorMap {
    const char* base;
    uint64_t columns, rows, stride_bytes;
    uint32_t box_columns, box_rows, element_bytes, magic;
    uint64_t layers, layer_stride_bytes;
    uint32_t box_layers, rank;
    uint64_t reserved[7];
    static constexpr uint32_t MAGIC = 0x7e450a90;
};
static_assert(sizeof(TensorMap) == 128, "a CUtensorMap");

inline void mbarrier_init(uint64_t* barrier, int arrivals) { emu::mbarrier_init(barrier, arrivals); }
inline void mbarrier_init_fence() { emu::mbarrier_init_fence(); }
inline void mbarrier_arrive(uint64_t* barrier) { emu::mbarrier_arrive(barrier); }
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) { emu::mbarrier_expect(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, int parity) { emu::mbarrier_wait(barrier, unsigned(parity)); }

namespace emu {
// Bits 4 to 6 of an offset from a multiple of 1024, exclusive-or bits 7 to 9.
inline uintptr_t swizzle(uintptr_t offset) { return offset ^ (offset >> 3 & 0x70); }

inline void transfer_run(Transfer& t) {
    const TensorMap& map = *static_cast<const TensorMap*>(t.map);
    char* to = static_cast<char*>(t.to);
    for (unsigned r = 0; r < map.box_rows * map.box_layers; r++)
        for (unsigned c = 0; c < map.box_columns * map.element_bytes; c += 16) {
            char piece[16] = {};
            const int64_t row = int64_t(t.y) + r % map.box_rows, layer = int64_t(t.z) + r / map.box_rows;
            const int64_t column = int64_t(t.x) + c / map.element_bytes;
            if (row >= 0 && uint64_t(row) < map.rows && layer >= 0 && uint64_t(layer) < map.layers && column >= 0 &&
                uint64_t(column) < map.columns) {
                const uint64_t left = (map.columns - column) * map.element_bytes;
                memcpy(piece,
                       map.base + layer * map.layer_stride_bytes + row * map.stride_bytes + column * map.element_bytes,
                       left < 16 ? left : 16);
            }
            memcpy(to + swizzle(r * 128 + c), piece, 16);
        }
    mbarrier_complete(t.barrier, t.bytes);
}

// Where a byte of a matrix that a descriptor points at lies.
inline const char* described(uint64_t descriptor, unsigned row, unsigned byte, unsigned bytes) {
    const uintptr_t start = (descriptor & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
    const char* at = block->shared + swizzle(start + row / 8 * eight_rows + row % 8 * 128 + byte);
    check_shared(at, bytes, "wgmma");
    return at;
}
inline void widen(float& to, const char* at, bf16) {
    uint16_t bits;
    memcpy(&bits, at, 2);
    to = float_of(uint32_t(bits) << 16);
}
inline void widen(float& to, const char* at, e4m3) {
    const uint32_t code = static_cast<unsigned char>(*at);
    const int exponent = int(code >> 3 & 15), mantissa = int(code & 7);
    const float magnitude = exponent == 15 && mantissa == 7 ? NAN
                            : exponent == 0                 ? std::ldexp(float(mantissa), -9)
                                                            : std::ldexp(float(8 + mantissa), exponent - 10);
    to = code & 0x80 ? -magnitude : magnitude;
}

struct Wgmma {
    float* d;
    uint64_t a, b;
    bool accumulate;
};
} // namespace emu

namespace emu {
inline void tma_issue(void* to, const TensorMap* map, unsigned rank, int x, int y, int z, uint64_t* barrier) {
    if (map->magic != TensorMap::MAGIC || map->rank != rank)
        fault(FAILED, "TMA with something that is not a tensor map of rank %u", rank);
    const long bytes = long(map->box_layers) * map->box_rows * map->box_columns * map->element_bytes;
    check_shared(to, size_t(bytes), "TMA");
    if ((static_cast<char*>(to) - block->shared) % 1024)
        fault(MISALIGNED, "TMA with 128-byte swizzle to an address that is not a multiple of 1024");
    transfer_issue({transfer_run, to, map, x, y, barrier, bytes, z});
}
} // namespace emu
inline void tma_load(void* to, const TensorMap* map, int x, int y, uint64_t* barrier) {
    emu::tma_issue(to, map, 2, x, y, 0, barrier);
}
// Addresses in a descriptor count from the beginning of shared memory.
inline uint64_t matrix_descriptor(const void* at) {
    const uint64_t offset = uint64_t(static_cast<const char*>(at) - emu::block->shared);
    return (offset & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
inline void wgmma_fence() {
    emu::collective("wgmma.fence", [](void* const[32]) { emu::product_fence(); }, nullptr);
}
inline void wgmma_commit() {
    emu::collective("wgmma.commit", [](void* const[32]) { emu::product_commit(); }, nullptr);
}
template <int LEFT> void wgmma_wait() {
    emu::collective("wgmma.wait", [](void* const[32]) { emu::product_wait(LEFT); }, nullptr);
}
