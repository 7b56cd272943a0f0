// Copies cache blocks within every layer. Bytes: 2 * pairs * layers * block_bytes.
//
// Pairs run at the same time: the destination of one must not be the source or the destination of another.
#include "../common/kernel.h"

constexpr int COPY_BLOCKS_THREADS = 256;

// A pair outside the cache copies nothing.
KERNEL(copy_blocks, CopyBlocksParams, COPY_BLOCKS_THREADS) {
    const int from = p.pairs[2 * block_x()], to = p.pairs[2 * block_x() + 1];
    if (!within(from, p.blocks) || !within(to, p.blocks)) return; // no barrier below
    unsigned char* layer = p.cache + block_y() * p.layer_bytes;
    for (int at = thread_index() * 16; within(at, p.block_bytes); at += COPY_BLOCKS_THREADS * 16)
        store_vector(layer + (int64_t)to * p.block_bytes + at,
                     load_vector(layer + (int64_t)from * p.block_bytes + at));
}
