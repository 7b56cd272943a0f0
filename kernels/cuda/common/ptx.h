// One function per instruction. emulation/twins.h has the same functions for the CPU; a name that exists here and not
// there does not compile in the emulator.
#pragma once

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int lane_index() { return threadIdx.x % 32; }
DEVICE int warp_index() { return threadIdx.x / 32; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }

// The launch's shared memory, aligned to 1024 bytes.
DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char arena[];
    return arena;
}
DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

DEVICE void block_sync() { __syncthreads(); }
DEVICE void warp_sync() { __syncwarp(); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE float shuffle(float value, int source) { return __shfl_sync(0xffffffffu, value, source); }
DEVICE int shuffle(int value, int source) { return __shfl_sync(0xffffffffu, value, source); }
DEVICE double shuffle(double value, int source) { return __shfl_sync(0xffffffffu, value, source); }
DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE uint64_t shuffle_xor(uint64_t value, int mask) {
    return __shfl_xor_sync(0xffffffffu, (unsigned long long)value, mask);
}
DEVICE uint32_t vote(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
DEVICE int popcount(uint32_t bits) { return __popc(bits); }

DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }
DEVICE int round_even(float a) { return __float2int_rn(a); }
DEVICE float exp_exact(float a) { return expf(a); }
DEVICE float exp2_fast(float a) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
    return r;
}
DEVICE float log2_exact(float a) { return log2f(a); }
DEVICE float log_exact(float a) { return logf(a); }
DEVICE double exp_double(double a) { return exp(a); }
DEVICE double log_double(double a) { return log(a); }
// Of whole numbers only: their sum does not depend on the order.
DEVICE void atomic_add(uint32_t* to, uint32_t value) { atomicAdd(to, value); }
DEVICE void atomic_or(uint32_t* to, uint32_t value) { atomicOr(to, value); }

DEVICE float float_from(bf16 value) { return __uint_as_float((uint32_t)value.bits << 16); }
DEVICE bf16 bf16_from(float value) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(value));
    return r;
}
// Two values in one register, the first in the low half.
DEVICE uint32_t bf16_pair(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
DEVICE uint32_t bf16_pair_fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

DEVICE Vector load_vector(const void* p) {
    Vector v;
    *(uint4*)&v = *(const uint4*)p;
    return v;
}
DEVICE void store_vector(void* p, const Vector& v) { *(uint4*)p = *(const uint4*)&v; }
// Read once by this block: do not keep it in the first cache.
DEVICE Vector load_stream(const void* p) {
    Vector v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(p));
    return v;
}

// 16 bytes to shared memory without registers; zeros when not valid, and then `from` is not read.
DEVICE void copy_async(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// Four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8], bf16 operands, float32 sums.
DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
