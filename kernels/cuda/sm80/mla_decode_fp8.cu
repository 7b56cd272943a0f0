// MLA decode over a cache of fp8 rows: 656 bytes a token instead of 1152.
#include "mla_decode.h"

using Published = MlaDecode<512, 64, MlaFp8Tiles<512, 64>>;
KERNEL(mla_decode_fp8_512_64, MlaDecodeParams, MLA_DECODE_THREADS) { Published::run(p); }
static_assert(sizeof(Published::Shared) == 120832, "src/plan.rs asks for this much");
