// Columns that ranks share, between whole rows and the packed slots that a collective moves. Bytes: read and written once,
// count * unit_bytes * the rank's units to pack, of all other ranks to unpack; no arithmetic.
#include "../common/kernel.h"

constexpr int SHARE_COLUMNS_THREADS = 256;

// One block per row, and per rank when unpacking.
KERNEL(share_columns, ShareColumnsParams, SHARE_COLUMNS_THREADS) {
    const int row = block_x(), rank = p.unpack ? block_y() : p.rank;
    if (p.unpack && rank == p.rank) return; // no barrier below
    const int each = p.units / p.ranks, more = p.units % p.ranks;
    const int first = rank * each + at_most(rank, more), held = each + (rank < more ? 1 : 0);
    const int slot_bytes = (each + (more > 0 ? 1 : 0)) * p.unit_bytes, bytes = held * p.unit_bytes;
    unsigned char* whole = p.rows + ((int64_t)row * p.units + first) * p.unit_bytes;
    unsigned char* slot = p.slots + ((int64_t)rank * p.count + row) * slot_bytes;
    const unsigned char* from = p.unpack ? slot : whole;
    unsigned char* to = p.unpack ? whole : slot;
    if (p.unit_bytes % 16 == 0) {
        for (int at = thread_index() * 16; within(at, bytes); at += SHARE_COLUMNS_THREADS * 16)
            store_vector(to + at, load_vector(from + at));
    } else {
        for (int at = thread_index() * 2; within(at, bytes); at += SHARE_COLUMNS_THREADS * 2)
            *(uint16_t*)(to + at) = *(const uint16_t*)(from + at);
    }
}
