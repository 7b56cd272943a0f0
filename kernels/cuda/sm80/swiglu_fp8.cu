// Bytes: rows * width * (4 read + 1 written + 4 / 128 of scales).
#include "activation.h"

KERNEL(swiglu_fp8, ActivationParams, ACTIVATION_THREADS) { activation<true, true>(p); }
