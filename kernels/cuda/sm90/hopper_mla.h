// What the Hopper attention kernels share: operands in chunks of 64 values, a row 128 swizzled bytes.
//
// A tile of r rows and w values is ceil(w / 64) chunks of r * 128 bytes. The scores read it along its rows, the values
// across them, from the same bytes.
#pragma once
#include "../common/kernel.h"
#include "../common/kernel90.h"
#include "../common/kernel90_attention.h"

constexpr int CHUNK_VALUES = 64, CHUNK_ROW_BYTES = 128;

// Where the 16 bytes number `piece` of a row lie in its chunk: the swizzle that the descriptors name.
DEVICE int chunk_place(int row, int piece) { return row * CHUNK_ROW_BYTES + ((piece ^ (row & 7)) << 4); }

// Describes 16 values of every row of a tile, from value 16 * step on; chunks are `chunk_bytes` apart.
DEVICE uint64_t step_descriptor(const unsigned char* tile, int step, int chunk_bytes) {
    return matrix_descriptor(tile + step / 4 * chunk_bytes + step % 4 * 32);
}
