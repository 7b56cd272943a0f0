// MLA decode over a cache of bf16 rows.
#include "mla_decode.h"

using Published = MlaDecode<512, 64, MlaTiles<512, 64>>;
using Small = MlaDecode<64, 32, MlaTiles<64, 32>>;
KERNEL(mla_decode_bf16_512_64, MlaDecodeParams, MLA_DECODE_THREADS) { Published::run(p); }
KERNEL(mla_decode_bf16_64_32, MlaDecodeParams, MLA_DECODE_THREADS) { Small::run(p); }
static_assert(sizeof(Published::Shared) == 132608, "src/plan.rs asks for this much");
static_assert(sizeof(Small::Shared) == 25088, "src/plan.rs asks for this much");
