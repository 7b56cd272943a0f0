// Instructions of sm_90a: mbarriers, TMA and wgmma. Twins: emulation/twins90.h.
#pragma once

struct alignas(64) TensorMap {
    uint64_t opaque[16];
};
static_assert(sizeof(TensorMap) == 128, "a CUtensorMap");

DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to TMA.
DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives and says how many bytes must land before the phase ends.
DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Waits until the phase of this parity has ended. A phase that never ends becomes an error after a second or more. One asm
// statement: a loop of the compiler's costs a kernel with full registers the ones that wgmma in flight needs.
DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
    asm volatile("{\n.reg .pred done, over;\n.reg .u32 tries;\nmov.u32 tries, 0;\n"
                 "WAIT%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE%=;\n"
                 "add.u32 tries, tries, 1;\nsetp.gt.u32 over, tries, %2;\n@over trap;\nbra WAIT%=;\nDONE%=:\n}" ::"r"(
                     shared_address(barrier)),
                 "r"(parity), "n"(1 << 26)
                 : "memory");
}

// A box of a 2-dimensional tensor to shared memory; zeros outside the tensor. Column x, row y.
DEVICE void tma_load(void* to, const TensorMap* map, int x, int y, uint64_t* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
                     "r"(shared_address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
                 : "memory");
}

// Describes rows of 128 swizzled bytes, 8 of them every 1024 bytes (PTX ISA, matrix descriptor of wgmma).
DEVICE uint64_t matrix_descriptor(const void* at) {
    return (uint64_t)((shared_address(at) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
