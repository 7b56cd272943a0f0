// Grouped-query attention of a chunk of a prompt: neighbouring rows over one block table, split over the context.
//
// Per block, key-value head and context token: 4 width FLOPs for each of 32 queries on 4 width bytes, so up to 32 FLOP/B
// from the second cache. The bytes are those of the decode kernel with a row per block.
#include "gqa.h"

KERNEL(gqa_prefill_bf16_128, GqaDecodeParams, GQA_THREADS) { GroupedAttention<128, 2>::run(p); }
KERNEL(gqa_prefill_bf16_64, GqaDecodeParams, GQA_THREADS) { GroupedAttention<64, 2>::run(p); }
static_assert(sizeof(GroupedAttention<128, 2>::Shared) == 105472, "src/plan.rs asks for this much");
static_assert(sizeof(GroupedAttention<64, 2>::Shared) == 56320, "src/plan.rs asks for this much");
