// Instructions of the Hopper products: TMA of three dimensions, wgmma of 64 rows of weights by 16 to 128 rows of
// activations, and what blocks need to add up slices. Twins: emulation/twins90_gemm.h.
#pragma once

// A box of a 3-dimensional tensor to shared memory; zeros outside the tensor.
DEVICE void tma_load_3d(void* to, const TensorMap* map, int x, int y, int z, uint64_t* barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
                 "[%5];" ::"r"(shared_address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
                 : "memory");
}

// Orders what this thread wrote for all blocks before what it writes next, and what it read before what it reads next.
DEVICE void memory_fence() { __threadfence(); }
// The value before.
DEVICE uint32_t fetch_add(uint32_t* to, uint32_t value) { return atomicAdd(to, value); }
// Written by another block of this launch: the first cache does not know.
DEVICE float load_shared_by_blocks(const float* p) { return __ldcg(p); }

// Keeps the compiler from moving uses of sums across what only the tensor cores know of.
template <int COUNT> DEVICE void wgmma_pin(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int COUNT> DEVICE void wgmma_fence(float (&d)[COUNT]) {
    wgmma_pin(d);
    wgmma_fence();
}
template <int LEFT, int COUNT> DEVICE void wgmma_wait(float (&d)[COUNT]) {
    wgmma_wait<LEFT>();
    wgmma_pin(d);
}

#define SUMS_8(i)                                                                                                      \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define NAMES_8 \
    "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_16 \
    NAMES_8 ", " \
    "%8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 \
    NAMES_16 ", " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 \
    NAMES_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
    "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d[64, rows] (+)= a[64, k] b[rows, k]^T by a warpgroup, 32 bytes of k, operands in shared memory, float32 sums; `add` false
// begins a new sum. The last argument says what the operands are.
#define WGMMA(rows, sums, type, k, kind, transposed, a_name, b_name, add_name)                                         \
    DEVICE void wgmma_rows(float (&d)[sums], uint64_t a, uint64_t b, bool add, type) {                                 \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_name ", 0;\nwgmma.mma_async.sync.aligned.m64n" #rows   \
                     "k" #k ".f32." kind "." kind " {" NAMES_##sums "}, " a_name ", " b_name ", add, 1, 1" transposed   \
                     ";\n}"                                                                                            \
                     : SUMS_##sums(0)                                                                                  \
                     : "l"(a), "l"(b), "r"((int)add));                                                                 \
    }
WGMMA(16, 8, bf16, 16, "bf16", ", 0, 0", "%8", "%9", "%10")
WGMMA(32, 16, bf16, 16, "bf16", ", 0, 0", "%16", "%17", "%18")
WGMMA(64, 32, bf16, 16, "bf16", ", 0, 0", "%32", "%33", "%34")
WGMMA(128, 64, bf16, 16, "bf16", ", 0, 0", "%64", "%65", "%66")
WGMMA(16, 8, e4m3, 32, "e4m3", "", "%8", "%9", "%10")
WGMMA(32, 16, e4m3, 32, "e4m3", "", "%16", "%17", "%18")
WGMMA(64, 32, e4m3, 32, "e4m3", "", "%32", "%33", "%34")
WGMMA(128, 64, e4m3, 32, "e4m3", "", "%64", "%65", "%66")
