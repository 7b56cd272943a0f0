// As rms_norm_bf16, but writes e4m3 codes and one float32 scale per 128 columns: half the bytes of the output.
#include "rms_norm.h"

KERNEL(rms_norm_fp8, RmsNormParams, RMS_NORM_THREADS) { rms_norm<true>(p); }
