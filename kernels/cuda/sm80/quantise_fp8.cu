// bf16 to e4m3 with a scale per 1x128. Bytes: rows * width * (2 read + 1 written + 4 / 128 of scales).
#include "activation.h"

KERNEL(quantise_fp8, ActivationParams, ACTIVATION_THREADS) { activation<false, true>(p); }
