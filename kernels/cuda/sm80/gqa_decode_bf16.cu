// Grouped-query decode over the paged cache, split over the context.
//
// Per query row, key-value head and context token: 4 width group FLOPs on 4 width bytes, so `group` FLOP/B: memory-bound
// for every published group.
#include "gqa.h"

KERNEL(gqa_decode_bf16_128, GqaDecodeParams, GQA_THREADS) { GroupedAttention<128, 1>::run(p); }
KERNEL(gqa_decode_bf16_64, GqaDecodeParams, GQA_THREADS) { GroupedAttention<64, 1>::run(p); }
static_assert(sizeof(GroupedAttention<128, 1>::Shared) == 104960, "src/plan.rs asks for this much");
static_assert(sizeof(GroupedAttention<64, 1>::Shared) == 55808, "src/plan.rs asks for this much");
