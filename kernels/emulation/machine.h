// Runs CUDA kernels as plain C++: one fiber per CUDA thread, one block at a time per worker.
//
// Invariant: a kernel sees only what the CUDA model promises. Threads advance one at a time in the most hostile order the
// schedule allows, asynchronous work lands as late (or as early) as it may, and all memory starts as NaN.
//
// Surprise: nothing here is a simulator of a GPU. There is no timing, no memory ordering and no bank conflict; what the
// machine cannot see is listed in docs/kernels/README.md. Fences order nothing here: it only marks that they were made.
#pragma once
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emu {

struct Dim3 {
    unsigned x, y, z;
};

// CUDA error codes of faults, as the driver reports them.
enum Code : int {
    OK = 0,
    ILLEGAL_ADDRESS = 700,
    TIMEOUT = 702,
    ASSERT = 710,
    MISALIGNED = 716,
    FAILED = 719,
};

// One of the three ways to run: thread order and when asynchronous copies and products land.
struct Schedule {
    enum Order { FORWARD, BACKWARD, STRIDED } order;
    bool copies_late;   // cp.async and TMA land when waited for, not when issued
    bool products_late; // wgmma reads its operands when waited for, not when issued
    bool hands_over;    // whoever waits for an mbarrier goes on before the thread whose arrival completed it
};
constexpr Schedule SCHEDULES[3] = {
    {Schedule::FORWARD, true, true, false},
    {Schedule::BACKWARD, false, true, false},
    {Schedule::STRIDED, true, false, true},
};

// A kernel as its source file registers it.
struct Kernel {
    const char* name;
    unsigned threads;      // the block size it is written for
    size_t params_bytes;   // every kernel takes one struct by value
    void (*entry)(const void* params);
};
std::vector<Kernel>& kernels();
struct Registration {
    Registration(Kernel kernel) { kernels().push_back(kernel); }
};

struct Copy {
    void* to;
    const void* from; // null writes zeros
    unsigned bytes;
    unsigned group;
};

enum class Waiting : uint8_t { NO, BLOCK, WARP, MBARRIER };

struct Lane {
    void* sp;
    char* stack;
    void* fake; // see sanitizer.h
    unsigned linear, lane, warp;
    unsigned x, y, z;
    Waiting waiting;
    const uint64_t* awaited; // the mbarrier, where it waits at one
    bool done;
    unsigned group; // cp.async group being filled
    bool ordered;   // a memory fence since the block last announced its writes
    std::vector<Copy> copies;
};

// What the lanes of a warp do together; the last one to arrive does it for all.
using Collective = void (*)(void* const arguments[32]);

// A wgmma that was issued and has not been waited for.
struct Product {
    void* arguments[32]; // per lane, owned by the wrapper's frame owner (accumulators outlive it)
    const uint32_t* registers[32]; // per lane: operand a, where that is in registers; read as late as shared memory
    void (*run)(Product& product);
    uint64_t a, b;
    unsigned warp;
    unsigned group;
    bool accumulate;
};

struct Warp {
    unsigned arrived;
    Collective what;
    const char* name;
    void* arguments[32];
    unsigned product_group;
    unsigned fenced; // lanes that made a proxy fence, in all
    bool registers_ordered; // a wgmma fence since products were last waited for
    unsigned meetings; // how often its lanes were ordered: at a warp's or a block's barrier, behind an mbarrier
    std::vector<Product> products;
};

struct Mbarrier {
    uint64_t* object;
    int expected, pending;
    long bytes;
    unsigned phase;
};

// Who wrote 16 bytes of shared memory last, with cp.async or a whole vector, and how often its warp had met by then.
struct Writer {
    unsigned thread; // 1 + its number, or 0
    unsigned meetings;
};

// A TMA transfer in flight.
struct Transfer {
    void (*run)(Transfer& transfer);
    void* to;
    const void* map;
    int x, y;
    uint64_t* barrier;
    long bytes;
    int z;
};

struct Block {
    Dim3 index, size, grid;
    unsigned threads;
    Schedule schedule;
    const Kernel* kernel;
    const void* params;
    char* shared;
    size_t shared_bytes;
    // Shared memory as the asynchronous proxy saw it at the last fence: what threads wrote later is not in it.
    std::vector<char> async_view;
    // By 16 bytes of shared memory: 1 + the warp whose cp.async wrote there and has not fenced since, or 0.
    std::vector<uint16_t> unfenced;
    std::vector<Writer> writers; // by 16 bytes of shared memory
    bool inits_unfenced; // an mbarrier was initialised, and TMA does not know
    std::vector<Lane> lanes;
    std::vector<Warp> warps;
    std::vector<Mbarrier> mbarriers;
    std::vector<Transfer> transfers;
    unsigned arrived, alive, stride;
    Lane* self;
    void* main_sp;
    void* main_fake = nullptr; // the address sanitizer's, as below
    const void* main_stack = nullptr;
    size_t main_stack_bytes = 0;
    sigjmp_buf escape;
    int code;
    std::string report;
};

// Found without a call, so all thread-local data of the library must stay within the loader's small reserve.
extern thread_local Block* block __attribute__((tls_model("initial-exec")));

// Ends the block: the launch fails with `code` and the report names kernel, block and thread.
[[noreturn]] void fault(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));

void barrier();
void collective(const char* name, Collective what, void* arguments);
// Orders what the lanes of the calling warp did before and do after.
void meet();
// This thread has written 16 bytes, of shared memory or of another.
void wrote(const void* at);
// Faults where another lane of the warp wrote these 16 bytes and the two have not met since.
void check_met(const void* at, unsigned lane);
void copy_issue(void* to, const void* from, unsigned bytes);
void copy_commit();
void copy_wait(unsigned left);
void mbarrier_init(uint64_t* object, int expected);
void mbarrier_init_fence();
void mbarrier_arrive(uint64_t* object);
void mbarrier_expect(uint64_t* object, long bytes);
void mbarrier_complete(uint64_t* object, long bytes);
void mbarrier_wait(uint64_t* object, unsigned phase);
void transfer_issue(const Transfer& transfer);
void product_issue(const Product& product);
void product_fence();
void product_commit();
void product_wait(unsigned left);
void async_proxy_fence();
// Faults where a warp's cp.async wrote what wgmma reads, and no fence of that warp came after.
void check_fenced(size_t offset);
// Orders this thread's accesses to memory that blocks share.
void memory_fence();
// Faults unless all threads of the block have fenced since the last announcement.
void check_announces();
// Faults unless this thread has fenced since the last announcement.
void check_ordered();
// Faults unless [at, at + bytes) is inside the block's shared memory.
void check_shared(const void* at, size_t bytes, const char* who);

struct Launch {
    const Kernel* kernel;
    Dim3 grid, block;
    size_t shared_bytes;
    const void* params;
};
struct Outcome {
    int code;
    std::string report;
};
Outcome run(const Launch& launch, const Schedule& schedule, unsigned workers);

// Names the device allocation near an address; the driver installs it.
extern std::string (*describe_address)(uintptr_t address);

} // namespace emu
