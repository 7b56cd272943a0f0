// Rows of the embedding table. Bytes: rows * width * 2 read and written; no arithmetic.
#include "../common/kernel.h"

// One block per row. A token outside the vocabulary gives NaN: loud in the logits, and no stray read. Where other ranks hold
// other rows of the table it gives zeros, which their rows are added to.
KERNEL(embed_bf16, EmbedParams, 128) {
    const int row = block_x();
    const uint32_t token = p.tokens[row];
    const bool known = within((int)token, p.vocabulary);
    const uint32_t absent = p.elsewhere ? 0u : 0x7fff7fffu; // two NaNs
    const bf16* from = p.table + (known ? (int64_t)token * p.width : 0);
    bf16* to = p.out + (int64_t)row * p.width;
    for (int at = thread_index() * 8; within(at, p.width); at += 128 * 8) {
        Vector v = {{absent, absent, absent, absent}};
        if (known) v = load_vector(from + at);
        store_vector(to + at, v);
    }
}
