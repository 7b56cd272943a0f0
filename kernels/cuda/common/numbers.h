// The two storage formats, as bits. bf16 is the upper half of a float32; e4m3 is the finite-only 8-bit float whose
// largest value is 448.
#pragma once

struct bf16 {
    uint16_t bits;
};
static_assert(sizeof(bf16) == 2, "bf16 is two bytes");

struct e4m3 {
    uint8_t bits;
};
static_assert(sizeof(e4m3) == 1, "e4m3 is one byte");

// Sixteen bytes, the widest load of a thread.
struct alignas(16) Vector {
    uint32_t word[4];
};

constexpr float E4M3_MAX = 448.f;
// Smallest absolute maximum a group of 128 is scaled by (DeepSeek-V3 inference/kernel.py, act_quant).
constexpr float QUANT_AMAX_MIN = 1e-4f;
constexpr int QUANT_GROUP = 128;
constexpr float LOG2_E = 1.4426950408889634f;

// Every bounds check goes through here, so that the mutation test finds them all.
DEVICE bool within(int index, int count) { return (unsigned)index < (unsigned)count; }
DEVICE bool within(int64_t index, int64_t count) { return (uint64_t)index < (uint64_t)count; }
// Every clamp to what is there goes through here, for the same test: it gives the first number back as it is.
DEVICE int at_most(int wanted, int there) { return wanted < there ? wanted : there; }
CONSTANT int ceil_div(int a, int b) { return (a + b - 1) / b; }
