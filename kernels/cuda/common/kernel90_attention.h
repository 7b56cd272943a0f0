// kernel90.h's instructions of attention.
#pragma once
#include "kernel90.h"

// A kernel that has a multiprocessor to itself, so that its warpgroups may divide the registers among them.
#if defined(__CUDACC__)
#define KERNEL_ALONE(name, Params, threads)                                                                            \
    extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Params p)
#include "ptx90_attention.h"
#else
#define KERNEL_ALONE(name, Params, threads) KERNEL(name, Params, threads)
#include "../../emulation/twins90_attention.h"
#endif
