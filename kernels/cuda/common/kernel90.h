// kernel.h's instructions of sm_90a.
#pragma once
#include "kernel.h"

#if defined(__CUDACC__)
#include "ptx90.h"
#else
#include "../../emulation/twins90.h"
#endif
