// Bytes: rows * width * 2 * (read x, read and write residual, write out); about 4 FLOPs per value.
#include "rms_norm.h"

KERNEL(rms_norm_bf16, RmsNormParams, RMS_NORM_THREADS) { rms_norm<false>(p); }
