#include "mla_cache_write.h"

KERNEL(mla_cache_write_fp8, CacheWriteParams, CACHE_WRITE_THREADS) { mla_cache_write<true>(p); }
