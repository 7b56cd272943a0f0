#include "mla_cache_write.h"

KERNEL(mla_cache_write_bf16, CacheWriteParams, CACHE_WRITE_THREADS) { mla_cache_write<false>(p); }
