// Rotates part of every head in place. Bytes: rows * heads * rotary * 4; 3 FLOPs per value.
#include "rope.h"

constexpr int ROPE_THREADS = 128;

KERNEL(rope_bf16, RopeParams, ROPE_THREADS) {
    const int row = block_x(), half = p.rotary / 2, position = p.positions[row];
    const int i = block_y() * ROPE_THREADS + thread_index();
    if (!within(i, p.heads * half)) return; // no barrier below
    const int head = i / half, pair = i % half;
    bf16* x = p.x + (int64_t)row * p.row_stride + (int64_t)head * p.head_stride + p.offset;
    bf16* first = x + (p.half_split ? pair : 2 * pair);
    bf16* second = x + (p.half_split ? pair + half : 2 * pair + 1);
    const Pair r = 
        rotate(float_from(*first), float_from(*second), p.table, position, p.positions_max, half, pair);
    *first = bf16_from(r.a);
    *second = bf16_from(r.b);
}
