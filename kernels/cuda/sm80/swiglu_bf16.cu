// Bytes: rows * width * 2 * (2 read + 1 written).
#include "activation.h"

KERNEL(swiglu_bf16, ActivationParams, ACTIVATION_THREADS) { activation<true, false>(p); }
