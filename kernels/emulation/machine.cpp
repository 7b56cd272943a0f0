#include "machine.h"
#include "sanitizer.h"

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>

namespace emu {

thread_local Block* block __attribute__((tls_model("initial-exec"))) = nullptr;
std::string (*describe_address)(uintptr_t) = nullptr;

std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t STACK_BYTES = 64 * 1024;
constexpr size_t SHARED_MAX = 256 * 1024;
constexpr unsigned char CANARY = 0xC5;

extern "C" void cachalot_switch(void** save, void* to);
asm(R"(
.text
.globl cachalot_switch
.type cachalot_switch,@function
cachalot_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

std::string where() {
    const Block& b = *block;
    char text[256];
    snprintf(text, sizeof text, "kernel %s, block (%u, %u, %u), thread %u", b.kernel->name, b.index.x, b.index.y,
             b.index.z, b.self ? b.self->linear : 0);
    return text;
}

[[noreturn]] void leave(int code, std::string report) {
    block->code = code;
    block->report = std::move(report);
    if (block->self) leave_stack(nullptr, block->main_stack, block->main_stack_bytes);
    siglongjmp(block->escape, 1);
}

// The next lane that can run: the own warp first, so that warps drift as far apart as barriers let them.
Lane* pick() {
    Block& b = *block;
    const unsigned n = b.threads, from = b.self->linear;
    const unsigned base = b.self->warp * 32, lane_stride = b.stride == 1 ? 1 : b.stride == n - 1 ? 31 : 5;
    for (unsigned k = 1, i = from - base; k <= 32; k++) {
        i = (i + lane_stride) % 32;
        Lane& lane = b.lanes[base + i];
        if (!lane.done && lane.waiting == Waiting::NO) return &lane;
    }
    for (unsigned k = 0, i = from; k < n; k++) {
        i = (i + b.stride) % n;
        Lane& lane = b.lanes[i];
        if (!lane.done && lane.waiting == Waiting::NO) return &lane;
    }
    return nullptr;
}

bool deliver_transfer() {
    Block& b = *block;
    if (b.transfers.empty()) return false;
    // The last one issued lands first: nothing orders two transfers but their barriers.
    Transfer transfer = b.transfers.back();
    b.transfers.pop_back();
    transfer.run(transfer);
    return true;
}

std::string deadlock() {
    const Block& b = *block;
    unsigned at_barrier = 0, at_mbarrier = 0, exited = 0;
    std::string collectives;
    for (const Lane& lane : b.lanes) {
        at_barrier += !lane.done && lane.waiting == Waiting::BLOCK;
        at_mbarrier += !lane.done && lane.waiting == Waiting::MBARRIER;
        exited += lane.done;
    }
    for (const Warp& warp : b.warps)
        if (warp.arrived)
            collectives += ", " + std::to_string(warp.arrived) + " lanes of a warp in " + std::string(warp.name);
    return "deadlock in " + where() + ": of " + std::to_string(b.threads) + " threads " + std::to_string(at_barrier) +
           " wait at a block barrier, " + std::to_string(at_mbarrier) + " at an mbarrier, " + std::to_string(exited) +
           " have exited" + collectives;
}

// To another lane's stack, and back when this one is picked again.
void go_on_with(Lane& next) {
    Lane* self = block->self;
    block->self = &next;
    leave_stack(&self->fake, next.stack, STACK_BYTES);
    cachalot_switch(&self->sp, next.sp);
    enter_stack(self->fake, nullptr, nullptr);
}

// Runs somebody else until this lane may go on.
void suspend() {
    Block& b = *block;
    Lane* self = b.self;
    Lane* next = pick();
    while (!next && deliver_transfer()) next = pick();
    if (!next) leave(TIMEOUT, deadlock());
    if (next != self) go_on_with(*next);
}

// Runs another lane now; this one may go on when it is picked again.
void hand_over(Lane& next) { go_on_with(next); }

void land(const Copy& copy) {
    if (copy.from)
        memcpy(copy.to, copy.from, copy.bytes);
    else
        memset(copy.to, 0, copy.bytes);
    const size_t first = size_t(static_cast<char*>(copy.to) - block->shared);
    for (size_t at = first / 16; at <= (first + copy.bytes - 1) / 16; at++)
        block->unfenced[at] = uint16_t(block->self->warp + 1);
    wrote(copy.to);
}

void trampoline() {
    Block& b = *block;
    // The first lane of a block comes from the stack that the block ends on.
    const bool is_first = !b.main_stack;
    enter_stack(nullptr, is_first ? &b.main_stack : nullptr, is_first ? &b.main_stack_bytes : nullptr);
    b.kernel->entry(b.params);
    Lane* self = b.self;
    for (const Copy& copy : self->copies) land(copy);
    self->copies.clear();
    self->done = true;
    b.alive--;
    void* dropped;
    if (b.alive == 0) {
        leave_stack(nullptr, b.main_stack, b.main_stack_bytes);
        cachalot_switch(&dropped, b.main_sp);
    } else {
        Lane* next = pick();
        while (!next && deliver_transfer()) next = pick();
        if (!next) leave(TIMEOUT, deadlock());
        b.self = next;
        leave_stack(nullptr, next->stack, STACK_BYTES);
        cachalot_switch(&dropped, next->sp);
    }
    abort();
}

struct Worker {
    Block block;
    char* arena;    // guard page, shared memory, guard page
    char* stacks = nullptr;
    unsigned stacks_count = 0;
    char* signal_stack;

    Worker() {
        arena = static_cast<char*>(
            mmap(nullptr, SHARED_MAX + 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        signal_stack = static_cast<char*>(malloc(STACK_BYTES));
        if (arena == MAP_FAILED || !signal_stack) {
            fprintf(stderr, "emulation: no memory for a worker\n");
            abort();
        }
        mprotect(arena, PAGE, PROT_NONE);
        mprotect(arena + PAGE + SHARED_MAX, PAGE, PROT_NONE);
    }
    ~Worker() {
        permit(arena, SHARED_MAX + 2 * PAGE);
        munmap(arena, SHARED_MAX + 2 * PAGE);
        drop_stacks();
        free(signal_stack);
    }
    void drop_stacks() {
        if (!stacks) return;
        permit(stacks, stacks_count * (STACK_BYTES + PAGE));
        munmap(stacks, stacks_count * (STACK_BYTES + PAGE));
    }
    void ensure_stacks(unsigned count) {
        if (count <= stacks_count) return;
        drop_stacks();
        stacks = static_cast<char*>(mmap(nullptr, count * (STACK_BYTES + PAGE), PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (stacks == MAP_FAILED) abort();
        for (unsigned i = 0; i < count; i++) mprotect(stacks + i * (STACK_BYTES + PAGE), PAGE, PROT_NONE);
        stacks_count = count;
    }
};

void run_block(Worker& worker, const Launch& launch, Dim3 index, const Schedule& schedule) {
    Block& b = worker.block;
    block = &b;
    b.index = index;
    b.size = launch.block;
    b.grid = launch.grid;
    b.threads = launch.block.x * launch.block.y * launch.block.z;
    b.kernel = launch.kernel;
    b.params = launch.params;
    b.schedule = schedule;
    b.arrived = 0;
    b.alive = b.threads;
    b.code = OK;
    b.mbarriers.clear();
    b.transfers.clear();
    b.inits_unfenced = false;
    const unsigned n = b.threads;
    b.stride = schedule.order == Schedule::FORWARD ? 1 : schedule.order == Schedule::BACKWARD ? n - 1 : 37 % n;
    if (b.stride == 0 || std::gcd(b.stride, n) != 1) b.stride = 1;
    worker.ensure_stacks(n);
    b.main_stack = nullptr;
    permit(worker.arena + PAGE, SHARED_MAX);
    b.lanes.resize(n);
    b.warps.assign(n / 32, Warp{});
    for (unsigned i = 0; i < n; i++) {
        Lane& lane = b.lanes[i];
        lane.stack = worker.stacks + i * (STACK_BYTES + PAGE) + PAGE;
        lane.linear = i;
        lane.lane = i % 32;
        lane.warp = i / 32;
        lane.x = i % b.size.x;
        lane.y = i / b.size.x % b.size.y;
        lane.z = i / (b.size.x * b.size.y);
        lane.waiting = Waiting::NO;
        lane.done = false;
        lane.group = 0;
        lane.ordered = false;
        lane.copies.clear();
        permit(lane.stack, STACK_BYTES); // frames that a fault left without returning
        void** sp = reinterpret_cast<void**>(lane.stack + STACK_BYTES);
        *--sp = nullptr;
        *--sp = reinterpret_cast<void*>(trampoline);
        for (int k = 0; k < 6; k++) *--sp = nullptr;
        lane.sp = sp;
    }
    // Shared memory ends at the guard page up to its 1024-byte alignment; the slack is a canary.
    const size_t rounded = (launch.shared_bytes + 1023) / 1024 * 1024;
    b.shared = worker.arena + PAGE + SHARED_MAX - rounded;
    b.shared_bytes = launch.shared_bytes;
    memset(b.shared, 0xFF, launch.shared_bytes);
    b.async_view.assign(launch.shared_bytes, char(0xFF));
    b.unfenced.assign((launch.shared_bytes + 15) / 16, 0);
    b.writers.assign((launch.shared_bytes + 15) / 16, Writer{});
    memset(b.shared + launch.shared_bytes, CANARY, rounded - launch.shared_bytes);
    forbid(worker.arena + PAGE, SHARED_MAX - rounded);
    forbid(b.shared + launch.shared_bytes, rounded - launch.shared_bytes);
    if (sigsetjmp(b.escape, 1) == 0) {
        b.self = schedule.order == Schedule::BACKWARD ? &b.lanes[n - 1] : &b.lanes[0];
        leave_stack(&b.main_fake, b.self->stack, STACK_BYTES);
        cachalot_switch(&b.main_sp, b.self->sp);
        enter_stack(b.main_fake, nullptr, nullptr);
        b.self = nullptr;
        permit(b.shared + launch.shared_bytes, rounded - launch.shared_bytes);
        for (size_t i = launch.shared_bytes; i < rounded; i++)
            if (static_cast<unsigned char>(b.shared[i]) != CANARY)
                leave(ILLEGAL_ADDRESS, "write " + std::to_string(i - launch.shared_bytes) + " bytes past the end of " +
                                           std::to_string(launch.shared_bytes) + " bytes of shared memory in " +
                                           where());
        while (!b.transfers.empty()) deliver_transfer();
    } else if (b.self) {
        enter_stack(b.main_fake, nullptr, nullptr);
    }
    block = nullptr;
}

struct sigaction previous_actions[NSIG];

void on_signal(int number, siginfo_t* info, void* context) {
    if (!block) {
        // Not ours: hand it to whoever was there before.
        struct sigaction& previous = previous_actions[number];
        if (previous.sa_flags & SA_SIGINFO)
            previous.sa_sigaction(number, info, context);
        else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN)
            previous.sa_handler(number);
        else
            sigaction(number, &previous, nullptr);
        return;
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
    if (number == SIGILL)
        leave(ILLEGAL_ADDRESS, "index outside an array of known size in " + where());
    if (number == SIGFPE) leave(FAILED, "division by zero in " + where());
    std::string text = "access to an address outside any allocation";
    const uintptr_t shared = reinterpret_cast<uintptr_t>(block->shared);
    const uintptr_t stack = block->self ? reinterpret_cast<uintptr_t>(block->self->stack) : 0;
    if (address + PAGE >= shared && address < shared + block->shared_bytes + 2 * PAGE) {
        text = "access " + std::to_string(long(address) - long(shared)) + " bytes into " +
               std::to_string(block->shared_bytes) + " bytes of shared memory";
    } else if (stack && address + PAGE >= stack && address < stack) {
        text = "stack overflow of an emulated thread";
    } else if (describe_address) {
        std::string described = describe_address(address);
        if (!described.empty()) text = described;
    }
    leave(ILLEGAL_ADDRESS, text + " in " + where());
}

void install_handlers() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(number, &action, &previous_actions[number]);
    });
}

} // namespace

void fault(int code, const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    leave(code, std::string(text) + " in " + where());
}

void barrier() {
    Block& b = *block;
    if (++b.arrived == b.threads) {
        b.arrived = 0;
        for (Lane& lane : b.lanes)
            if (lane.waiting == Waiting::BLOCK) lane.waiting = Waiting::NO;
        for (Warp& warp : b.warps) warp.meetings++;
        return;
    }
    b.self->waiting = Waiting::BLOCK;
    suspend();
}

void collective(const char* name, Collective what, void* arguments) {
    Block& b = *block;
    Lane& self = *b.self;
    Warp& warp = b.warps[self.warp];
    if (warp.arrived == 0) {
        warp.what = what;
        warp.name = name;
    } else if (warp.what != what) {
        fault(FAILED, "lanes of one warp meet in different instructions, %s and %s,", warp.name, name);
    }
    warp.arguments[self.lane] = arguments;
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        what(warp.arguments);
        for (unsigned i = 0; i < 32; i++) b.lanes[self.warp * 32 + i].waiting = Waiting::NO;
        return;
    }
    self.waiting = Waiting::WARP;
    suspend();
}

void meet() { block->warps[block->self->warp].meetings++; }

void wrote(const void* at) {
    const size_t offset = size_t(static_cast<const char*>(at) - block->shared);
    if (offset >= block->shared_bytes) return;
    block->writers[offset / 16] = {block->self->linear + 1, block->warps[block->self->warp].meetings};
}

void check_met(const void* at, unsigned lane) {
    const Writer& writer = block->writers[size_t(static_cast<const char*>(at) - block->shared) / 16];
    const unsigned warp = block->self->warp, reader = warp * 32 + lane;
    if (writer.thread == 0 || writer.thread - 1 == reader || (writer.thread - 1) / 32 != warp) return;
    if (writer.meetings == block->warps[warp].meetings)
        fault(FAILED, "ldmatrix reads for thread %u what thread %u wrote, without a warp's barrier between,", reader,
              writer.thread - 1);
}

void copy_issue(void* to, const void* from, unsigned bytes) {
    check_shared(to, bytes, "cp.async");
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes)
        fault(MISALIGNED, "cp.async of %u bytes at an address that is not a multiple of it", bytes);
    Lane& self = *block->self;
    Copy copy{to, from, bytes, self.group};
    if (!block->schedule.copies_late) {
        land(copy);
        return;
    }
    self.copies.push_back(copy);
}

void copy_commit() { block->self->group++; }

void copy_wait(unsigned left) {
    Lane& self = *block->self;
    size_t landed = 0;
    while (landed < self.copies.size() && self.copies[landed].group + left < self.group) land(self.copies[landed++]);
    self.copies.erase(self.copies.begin(), self.copies.begin() + landed);
}

void check_shared(const void* at, size_t bytes, const char* who) {
    const char* address = static_cast<const char*>(at);
    if (address < block->shared || address + bytes > block->shared + block->shared_bytes)
        fault(ILLEGAL_ADDRESS, "%s touches byte %ld of %zu bytes of shared memory", who,
              long(address - block->shared), block->shared_bytes);
}

namespace {

Mbarrier& find(uint64_t* object) {
    check_shared(object, 8, "mbarrier");
    for (Mbarrier& m : block->mbarriers)
        if (m.object == object) return m;
    fault(FAILED, "mbarrier used before it was initialised");
}

// The first lane that may go on because of it, or none.
Lane* advance(Mbarrier& m) {
    if (m.pending != 0 || m.bytes != 0) return nullptr;
    m.pending = m.expected;
    m.phase ^= 1;
    Lane* first = nullptr;
    for (Lane& lane : block->lanes) {
        if (lane.waiting != Waiting::MBARRIER || lane.awaited != m.object) continue;
        lane.waiting = Waiting::NO;
        if (!first) first = &lane;
    }
    return first;
}

} // namespace

void mbarrier_init(uint64_t* object, int expected) {
    check_shared(object, 8, "mbarrier.init");
    block->inits_unfenced = true;
    for (Mbarrier& m : block->mbarriers)
        if (m.object == object) {
            m = Mbarrier{object, expected, expected, 0, 0};
            return;
        }
    block->mbarriers.push_back({object, expected, expected, 0, 0});
}

void mbarrier_init_fence() { block->inits_unfenced = false; }

void mbarrier_arrive(uint64_t* object) {
    Mbarrier& m = find(object);
    if (m.pending <= 0) fault(FAILED, "mbarrier got more arrivals than its count %d", m.expected);
    m.pending--;
    Lane* next = advance(m);
    if (next && block->schedule.hands_over) hand_over(*next);
}

void mbarrier_expect(uint64_t* object, long bytes) {
    Mbarrier& m = find(object);
    m.bytes += bytes;
    mbarrier_arrive(object);
}

void mbarrier_complete(uint64_t* object, long bytes) {
    Mbarrier& m = find(object);
    m.bytes -= bytes;
    advance(m);
}

void mbarrier_wait(uint64_t* object, unsigned phase) {
    while (find(object).phase == phase) {
        block->self->waiting = Waiting::MBARRIER;
        block->self->awaited = object;
        suspend();
    }
    meet();
}

void transfer_issue(const Transfer& transfer) {
    if (block->inits_unfenced) fault(FAILED, "TMA with an mbarrier that was initialised without a fence after it");
    Transfer copy = transfer;
    if (block->schedule.copies_late)
        block->transfers.push_back(copy);
    else
        copy.run(copy);
}

void product_issue(const Product& product) {
    Warp& warp = block->warps[product.warp];
    if (!warp.registers_ordered) fault(FAILED, "wgmma without a wgmma fence since products were last waited for");
    Product copy = product;
    copy.group = warp.product_group;
    if (block->schedule.products_late)
        warp.products.push_back(copy);
    else
        copy.run(copy);
}

void product_fence() { block->warps[block->self->warp].registers_ordered = true; }

void product_commit() { block->warps[block->self->warp].product_group++; }

void product_wait(unsigned left) {
    Warp& warp = block->warps[block->self->warp];
    warp.registers_ordered = false; // the program may use the sums from here on
    size_t done = 0;
    while (done < warp.products.size() && warp.products[done].group + left < warp.product_group)
        warp.products[done].run(warp.products[done]), done++;
    warp.products.erase(warp.products.begin(), warp.products.begin() + done);
}

// Takes effect when the last lane of the warp has made it: one that goes ahead without the others has fenced nothing.
void async_proxy_fence() {
    const unsigned warp = block->self->warp;
    if (++block->warps[warp].fenced % 32 != 0) return;
    memcpy(block->async_view.data(), block->shared, block->shared_bytes);
    for (uint16_t& writer : block->unfenced)
        if (writer == warp + 1) writer = 0;
}

void check_fenced(size_t offset) {
    const uint16_t writer = block->unfenced[offset / 16];
    if (writer)
        fault(FAILED, "wgmma reads byte %zu of shared memory, which cp.async of warp %u wrote without a proxy fence after it,",
              offset, writer - 1u);
}

void memory_fence() { block->self->ordered = true; }

void check_announces() {
    for (Lane& lane : block->lanes) {
        if (!lane.ordered) fault(FAILED, "an atomic announces writes that thread %u did not fence", lane.linear);
        lane.ordered = false;
    }
}

void check_ordered() {
    if (!block->self->ordered) fault(FAILED, "a read of what other blocks wrote without a fence after the announcement");
}

Outcome run(const Launch& launch, const Schedule& schedule, unsigned workers) {
    install_handlers();
    const unsigned total = launch.grid.x * launch.grid.y * launch.grid.z;
    std::atomic<unsigned> next{0};
    std::atomic<bool> failed{false};
    std::mutex lock;
    Outcome outcome{OK, ""};
    unsigned stride = schedule.order == Schedule::FORWARD ? 1 : schedule.order == Schedule::BACKWARD ? total - 1 : 7;
    if (stride == 0 || std::gcd(stride, total) != 1) stride = 1;
    auto work = [&] {
        static thread_local std::unique_ptr<Worker> worker;
        if (!worker) worker = std::make_unique<Worker>();
        stack_t mine{}, before{};
        mine.ss_sp = worker->signal_stack;
        mine.ss_size = STACK_BYTES;
        sigaltstack(&mine, &before);
        for (unsigned i; (i = next++) < total && !failed;) {
            const unsigned at = unsigned((uint64_t(i) + 1) * stride % total);
            const Dim3& g = launch.grid;
            run_block(*worker, launch, {at % g.x, at / g.x % g.y, at / (g.x * g.y)}, schedule);
            if (worker->block.code != OK) {
                std::lock_guard<std::mutex> guard(lock);
                if (!failed.exchange(true)) outcome = {worker->block.code, worker->block.report};
            }
        }
        sigaltstack(&before, nullptr);
    };
    std::vector<std::thread> others;
    for (unsigned i = 1; i < std::min(workers, total); i++) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    return outcome;
}

} // namespace emu
