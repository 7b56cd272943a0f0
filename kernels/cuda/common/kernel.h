// What every kernel file includes: one language for nvcc and for the emulator.
//
// Invariant: no kernel file contains `asm`, a CUDA builtin or a __shared__ variable. Instructions come from ptx.h, which
// has an emulated twin for each; shared memory is always the launch's dynamic one, so that the emulator can poison and
// bound it. Every kernel takes one struct of params.h by value, which the host mirrors byte for byte.
#pragma once

#if defined(__CUDACC__)
#if defined(__CUDACC_RTC__)
typedef signed int int32_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef signed long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long uintptr_t;
#else
#include <stdint.h>
#endif
#define DEVICE __device__ __forceinline__
#define CONSTANT __host__ __device__ constexpr // also usable in static asserts
#define KERNEL(name, Params, threads)                                                                                  \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Params p)
#else
#include "../../emulation/machine.h"
#define DEVICE inline
#define CONSTANT constexpr
#define KERNEL(name, Params, threads)                                                                                  \
    static void name(const Params& p);                                                                                 \
    static const emu::Registration name##_registration(                                                                \
        {#name, threads, sizeof(Params), [](const void* params) { name(*static_cast<const Params*>(params)); }});      \
    static void name(const Params& p)
#endif

#include "numbers.h"
#include "params.h"

#if defined(__CUDACC__)
#include "ptx.h"
#else
#include "../../emulation/twins.h"
#endif

#include "reduce.h"
