// A libcuda.so.1 for machines without a GPU: device memory is host memory between guard pages, kernels run in the
// machine of machine.h, and errors arrive the way the driver's do: a faulting kernel poisons its context, so that the next
// call fails with the fault's code.
//
// Invariant: a stream's work runs as late as the program allows: when it is synchronised, when somebody asks whether it is
// done, when another stream waits for it, or when pageable memory is read back. A missing synchronisation therefore shows as poison.
//
// Environment: CACHALOT_EMULATION_SCHEDULE 0, 1 or 2 (default 0), CACHALOT_EMULATION_WORKERS (default 1),
// CACHALOT_EMULATION_MEMORY bytes of "device" memory (default 8 GiB), CACHALOT_EMULATION_CAPABILITY such as 80 or 90,
// CACHALOT_EMULATION_VERSION of the driver (default 13000), CACHALOT_EMULATION_DEVICES 0 to 8 (default 1), each with memory and a
// primary context of its own, CACHALOT_EMULATION_IMAGES 0 for a device that no image fits, CACHALOT_EMULATION_FAULT_AFTER kernels until one fails,
// CACHALOT_EMULATION_FAULT_CODE it fails with (default 700), CACHALOT_EMULATION_FAULT_DEVICE it fails on (default: each),
// CACHALOT_EMULATION_FAULT_IN and CACHALOT_EMULATION_HANG for kernels that fail or never end, by a part of their names.
#include "machine.h"
#include "sanitizer.h"

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

enum Error : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    ECC_UNCORRECTABLE = 214,
    NVLINK_UNCORRECTABLE = 220,
    NOT_FOUND = 500,
    NOT_READY = 600,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

constexpr int DEVICES_MAX = 8;
constexpr size_t PAGE = 4096;
constexpr unsigned char CANARY = 0xC5;
constexpr size_t SHARED_MAX = 227 * 1024, SHARED_DEFAULT = 48 * 1024;

size_t environment(const char* name, size_t fallback) {
    const char* text = getenv(name);
    return text && *text ? strtoull(text, nullptr, 10) : fallback;
}

struct Context {
    int device = 0;
    int error = SUCCESS; // sticky
    std::string report;
    long fault_after = long(environment("CACHALOT_EMULATION_FAULT_AFTER", size_t(-1))); // kernels until one fails; negative: never
    std::recursive_mutex lock; // over its streams, held while their work runs: streams that wait for each other cannot lock up
};
struct Allocation {
    int device;
    size_t bytes;
    char* region;
    size_t region_bytes;
};
struct Function {
    const emu::Kernel* kernel;
    size_t shared_max;
};
struct Module {
    std::map<std::string, Function> functions;
};
using Work = std::function<void()>;
// Work in order, none of it run before somebody needs it.
struct Stream {
    Context* context;
    bool waits_for_default;
    std::deque<Work> queue;
    uint64_t issued = 0, done = 0;
    std::unique_ptr<std::vector<Work>> capture;
    std::atomic<bool> running{false}; // on a thread of its own, since somebody asked whether it is done
    std::thread runner;

    ~Stream() {
        if (runner.joinable()) runner.join();
    }

    void run(uint64_t until) {
        std::lock_guard<std::recursive_mutex> guard(context->lock);
        while (done < until && !queue.empty()) {
            Work work = std::move(queue.front());
            queue.pop_front();
            done++;
            if (context->error == SUCCESS) work();
        }
    }
};
struct Event {
    std::shared_ptr<Stream> stream;
    uint64_t place = 0;
    std::shared_ptr<double> seconds;
};
struct Graph {
    std::vector<Work> work;
};

std::mutex lock; // over everything below
std::map<uintptr_t, Allocation> allocations;
std::map<uintptr_t, size_t> freed; // stays unreadable, so that a late use is a fault
std::map<uintptr_t, size_t> pinned;    // host memory that copies read and write when they run
size_t allocated[DEVICES_MAX]; // by device
Context primaries[DEVICES_MAX];
thread_local Context* current = nullptr;
thread_local unsigned captures_of_thread = 0;
// Streams by handle; a null handle is the default stream.
std::map<void*, std::shared_ptr<Stream>> streams;
thread_local int schedule_of_thread = -1;

int device_count() {
    const size_t asked = environment("CACHALOT_EMULATION_DEVICES", 1);
    return asked < DEVICES_MAX ? int(asked) : DEVICES_MAX;
}
bool is_device(int device) { return device >= 0 && device < device_count(); }

size_t memory_total() {
    static const size_t total = environment("CACHALOT_EMULATION_MEMORY", size_t(8) << 30);
    return total;
}

// The allocation that holds [at, at + bytes), or false.
bool inside_allocation(uintptr_t at, size_t bytes) {
    auto next = allocations.upper_bound(at);
    if (next == allocations.begin()) return false;
    auto& [start, allocation] = *std::prev(next);
    return at >= start && at + bytes <= start + allocation.bytes;
}

std::string describe(uintptr_t at) {
    std::unique_lock<std::mutex> guard(lock, std::try_to_lock);
    if (!guard.owns_lock()) return "";
    for (auto& [start, allocation] : allocations) {
        const uintptr_t region = reinterpret_cast<uintptr_t>(allocation.region);
        if (at >= region && at < region + allocation.region_bytes)
            return "access " + std::to_string(long(at) - long(start)) + " bytes into " +
                   std::to_string(allocation.bytes) + " bytes of device memory";
    }
    for (auto& [start, bytes] : freed)
        if (at >= start && at < start + bytes) return "access to freed device memory";
    return "";
}

// Writes between the end of the data and the guard page land in a canary. Returns a report or nothing.
std::string broken_canary() {
    if (emu::SANITIZED) return ""; // whoever writes there, or reads, is told at once
    for (auto& [start, allocation] : allocations) {
        const char* end = reinterpret_cast<const char*>(start) + allocation.bytes;
        const char* guard = allocation.region + allocation.region_bytes - PAGE;
        for (const char* at = end; at < guard; at++)
            if (static_cast<unsigned char>(*at) != CANARY)
                return "write " + std::to_string(at - end) + " bytes past the end of " +
                       std::to_string(allocation.bytes) + " bytes of device memory";
    }
    return "";
}

int sticky() {
    if (!current) return INVALID_CONTEXT;
    return current->error;
}

std::shared_ptr<Stream> stream_of(void* handle) {
    std::lock_guard<std::mutex> guard(lock);
    auto found = streams.find(handle);
    return found == streams.end() ? nullptr : found->second;
}

// Runs what is queued on all streams of the current context, or only on those that wait for the default stream.
void run_streams(bool all) {
    std::vector<std::shared_ptr<Stream>> mine;
    {
        std::lock_guard<std::mutex> guard(lock);
        for (auto& [handle, stream] : streams)
            if (stream->context == current && (all || stream->waits_for_default)) mine.push_back(stream);
    }
    for (auto& stream : mine) stream->run(stream->issued);
}

// Queues work, records it, or, on the default stream, runs it after everything that the default stream waits for.
int submit(void* handle, Work work) {
    if (int error = sticky()) return error;
    if (!handle) {
        run_streams(false);
        if (int error = sticky()) return error;
        work();
        return SUCCESS;
    }
    std::shared_ptr<Stream> stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    std::lock_guard<std::recursive_mutex> guard(stream->context->lock);
    if (stream->capture) {
        stream->capture->push_back(std::move(work));
        return SUCCESS;
    }
    stream->queue.push_back(std::move(work));
    stream->issued++;
    return SUCCESS;
}

int attribute(int which) {
    const int capability = int(environment("CACHALOT_EMULATION_CAPABILITY", 90));
    switch (which) {
    case 1: return 1024;               // threads per block
    case 2: case 3: return 1024;       // block x, y
    case 4: return 64;                 // block z
    case 5: return 0x7fffffff;         // grid x
    case 6: case 7: return 65535;      // grid y, z
    case 8: return int(SHARED_DEFAULT);
    case 10: return 32;                // warp
    case 12: return 65536;             // registers per block
    case 16: return 132;               // multiprocessors
    case 39: return 2048;              // threads per multiprocessor
    case 75: return capability / 10;
    case 76: return capability % 10;
    case 81: return 233472;            // shared memory per multiprocessor
    case 97: return int(SHARED_MAX);   // opt-in shared memory per block
    case 115: return 1;                // memory pools
    default: return 0;
    }
}

} // namespace

// What the tests ask beyond the driver's interface.
API cachalot_emulation_report(char* text, size_t size) {
    std::lock_guard<std::mutex> guard(lock);
    snprintf(text, size, "%s", current ? current->report.c_str() : "");
    return SUCCESS;
}
API cachalot_emulation_schedule(int schedule) {
    if (schedule < 0 || schedule > 2) return INVALID_VALUE;
    schedule_of_thread = schedule;
    return SUCCESS;
}
// The kernel after `launches` more fails in the current context; negative: none does.
API cachalot_emulation_fault(int launches) {
    if (!current) return INVALID_CONTEXT;
    std::lock_guard<std::mutex> guard(lock);
    current->fault_after = launches;
    return SUCCESS;
}
// Kernel i's name, block size and parameter bytes; NOT_FOUND past the last one.
API cachalot_emulation_kernel(unsigned i, const char** name, unsigned* threads, size_t* params_bytes) {
    if (i >= emu::kernels().size()) return NOT_FOUND;
    const emu::Kernel& kernel = emu::kernels()[i];
    *name = kernel.name;
    *threads = kernel.threads;
    *params_bytes = kernel.params_bytes;
    return SUCCESS;
}

API cuInit(unsigned) {
    emu::describe_address = describe;
    return device_count() ? SUCCESS : NO_DEVICE; // as a driver without a GPU says
}
API cuDriverGetVersion(int* version) {
    *version = int(environment("CACHALOT_EMULATION_VERSION", 13000));
    return SUCCESS;
}
API cuDeviceGetCount(int* count) {
    *count = device_count();
    return SUCCESS;
}
API cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return is_device(ordinal) ? SUCCESS : INVALID_DEVICE;
}
API cuDeviceGetName(char* name, int size, int) {
    snprintf(name, size, "CPU emulation of CUDA");
    return SUCCESS;
}
API cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
    memset(uuid, 0, 16);
    uuid[15] = (unsigned char)device;
    return SUCCESS;
}
API cuDeviceGetAttribute(int* value, int which, int) {
    *value = attribute(which);
    return SUCCESS;
}
API cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = memory_total();
    return SUCCESS;
}

API cuDevicePrimaryCtxRetain(Context** context, int device) {
    if (!is_device(device)) return INVALID_DEVICE;
    *context = &primaries[device];
    (*context)->device = device;
    return SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuDevicePrimaryCtxReset_v2(int device) {
    if (!is_device(device)) return INVALID_DEVICE;
    primaries[device].error = SUCCESS;
    primaries[device].report.clear();
    return SUCCESS;
}
API cuCtxCreate_v2(Context** context, unsigned, int device) {
    if (!is_device(device)) return INVALID_DEVICE;
    *context = current = new Context;
    current->device = device;
    return SUCCESS;
}
API cuCtxDestroy_v2(Context* context) {
    if (current == context) current = nullptr;
    {
        std::lock_guard<std::mutex> guard(lock);
        for (auto at = streams.begin(); at != streams.end();)
            at = at->second->context == context ? streams.erase(at) : std::next(at);
    }
    if (context < primaries || context >= primaries + DEVICES_MAX) delete context;
    return SUCCESS;
}
API cuCtxSetCurrent(Context* context) {
    current = context;
    return SUCCESS;
}
API cuCtxGetCurrent(Context** context) {
    *context = current;
    return SUCCESS;
}
API cuCtxSynchronize() {
    if (int error = sticky()) return error;
    if (captures_of_thread) return CAPTURE_UNSUPPORTED;
    run_streams(true);
    return sticky();
}

API cuMemGetInfo_v2(size_t* available, size_t* total) {
    if (int error = sticky()) return error;
    std::lock_guard<std::mutex> guard(lock);
    *total = memory_total();
    *available = *total - allocated[current->device];
    return SUCCESS;
}
API cuMemAlloc_v2(uint64_t* pointer, size_t bytes) {
    if (int error = sticky()) return error;
    if (bytes == 0) return INVALID_VALUE;
    if (captures_of_thread) return CAPTURE_UNSUPPORTED;
    std::lock_guard<std::mutex> guard(lock);
    if (allocated[current->device] + bytes > memory_total()) return OUT_OF_MEMORY;
    // The data ends at a guard page, up to the 16 bytes a vector load needs. The driver promises 256; kernels must not
    // count on more than 16, because buffers are also cut out of an arena.
    const size_t data = (bytes + PAGE - 1) / PAGE * PAGE, region_bytes = data + 2 * PAGE;
    char* region = static_cast<char*>(
        mmap(nullptr, region_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (region == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect(region, PAGE, PROT_NONE);
    mprotect(region + PAGE + data, PAGE, PROT_NONE);
    char* start = region + PAGE + data - (bytes + 15) / 16 * 16;
    memset(start, 0xFF, bytes); // NaN in every float format, -1 in every integer
    memset(start + bytes, CANARY, region + PAGE + data - (start + bytes));
    emu::forbid(region + PAGE, size_t(start - region - PAGE));
    emu::forbid(start + bytes, size_t(region + PAGE + data - (start + bytes)));
    const uintptr_t at = reinterpret_cast<uintptr_t>(start);
    freed.erase(reinterpret_cast<uintptr_t>(region));
    allocations[at] = {current->device, bytes, region, region_bytes};
    allocated[current->device] += bytes;
    *pointer = at;
    return SUCCESS;
}
API cuMemAllocAsync(uint64_t* pointer, size_t bytes, void*) { return cuMemAlloc_v2(pointer, bytes); }
API cuMemFree_v2(uint64_t pointer) {
    if (current) run_streams(true); // freeing waits for the device
    std::lock_guard<std::mutex> guard(lock);
    auto found = allocations.find(pointer);
    if (found == allocations.end()) return INVALID_VALUE;
    const Allocation allocation = found->second;
    allocations.erase(found);
    allocated[allocation.device] -= allocation.bytes;
    emu::permit(allocation.region, allocation.region_bytes); // the kernel gives the addresses to somebody else
    // Kept unreadable for a while instead of returned, so that a use after free faults.
    mmap(allocation.region, allocation.region_bytes, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    freed[reinterpret_cast<uintptr_t>(allocation.region)] = allocation.region_bytes;
    if (freed.size() > 4096) {
        munmap(reinterpret_cast<void*>(freed.begin()->first), freed.begin()->second);
        freed.erase(freed.begin());
    }
    return sticky();
}
API cuMemFreeAsync(uint64_t pointer, void*) { return cuMemFree_v2(pointer); }
API cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    *pointer = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
    if (!*pointer) return OUT_OF_MEMORY;
    std::lock_guard<std::mutex> guard(lock);
    pinned[reinterpret_cast<uintptr_t>(*pointer)] = bytes;
    return SUCCESS;
}
API cuMemAllocHost_v2(void** pointer, size_t bytes) { return cuMemHostAlloc(pointer, bytes, 0); }
API cuMemFreeHost(void* pointer) {
    if (current) run_streams(true);
    {
        std::lock_guard<std::mutex> guard(lock);
        pinned.erase(reinterpret_cast<uintptr_t>(pointer));
    }
    free(pointer);
    return SUCCESS;
}

namespace {
bool is_pinned(const void* at) {
    std::lock_guard<std::mutex> guard(lock);
    auto next = pinned.upper_bound(reinterpret_cast<uintptr_t>(at));
    if (next == pinned.begin()) return false;
    auto& [start, bytes] = *std::prev(next);
    return reinterpret_cast<uintptr_t>(at) < start + bytes;
}
bool is_device(uint64_t at, size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    return inside_allocation(at, bytes);
}
} // namespace
API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    if (!is_device(to, bytes)) return INVALID_VALUE;
    char* at = reinterpret_cast<char*>(to);
    if (is_pinned(from)) return submit(stream, [=] { memcpy(at, from, bytes); });
    // Pageable memory is staged before the call returns.
    auto staged = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
    return submit(stream, [=] { memcpy(at, staged->data(), bytes); });
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    if (!is_device(from, bytes)) return INVALID_VALUE;
    const char* at = reinterpret_cast<const char*>(from);
    const bool late = is_pinned(to);
    if (int error = submit(stream, [=] { memcpy(to, at, bytes); })) return error;
    // Into pageable memory the call returns when the copy is done.
    std::shared_ptr<Stream> queue = stream ? stream_of(stream) : nullptr;
    if (!late && queue) {
        if (queue->capture) return CAPTURE_UNSUPPORTED;
        queue->run(queue->issued);
    }
    return sticky();
}
API cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) { return cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr); }
API cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) { return cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr); }
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    if (!is_device(to, bytes) || !is_device(from, bytes)) return INVALID_VALUE;
    return submit(stream, [=] { memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
}
API cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) {
    if (!is_device(to, bytes)) return INVALID_VALUE;
    return submit(stream, [=] { memset(reinterpret_cast<void*>(to), value, bytes); });
}

API cuStreamCreate(void** handle, unsigned flags) {
    if (int error = sticky()) return error;
    auto stream = std::make_shared<Stream>();
    stream->context = current;
    stream->waits_for_default = !(flags & 1);
    *handle = stream.get();
    std::lock_guard<std::mutex> guard(lock);
    streams[*handle] = stream;
    return SUCCESS;
}
API cuStreamCreateWithPriority(void** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
API cuStreamDestroy_v2(void* handle) {
    std::shared_ptr<Stream> stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    stream->run(stream->issued); // its work still happens
    if (stream->runner.joinable()) stream->runner.join();
    std::lock_guard<std::mutex> guard(lock);
    streams.erase(handle);
    return SUCCESS;
}
API cuStreamSynchronize(void* handle) {
    if (int error = sticky()) return error;
    if (!handle) return cuCtxSynchronize();
    std::shared_ptr<Stream> stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) return CAPTURE_UNSUPPORTED;
    stream->run(stream->issued);
    return sticky();
}
// Work that waits for another device (a collective) must not hold up whoever asks: it runs on a thread of its own from here on.
API cuStreamQuery(void* handle) {
    if (int error = sticky()) return error;
    std::shared_ptr<Stream> stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->running) return NOT_READY;
    std::lock_guard<std::recursive_mutex> guard(stream->context->lock);
    if (stream->capture) return CAPTURE_UNSUPPORTED;
    if (stream->done == stream->issued) return sticky();
    if (stream->runner.joinable()) stream->runner.join(); // at its end already
    stream->running = true;
    stream->runner = std::thread([raw = stream.get(), until = stream->issued, context = current, schedule = schedule_of_thread] {
        current = context;
        schedule_of_thread = schedule;
        raw->run(until);
        raw->running = false;
    });
    return NOT_READY;
}
// What a library queues that works on the device's memory itself; a graph calls it at every replay.
API cuLaunchHostFunc(void* handle, void (*function)(void*), void* argument) {
    return submit(handle, [=] { function(argument); });
}
API cuEventCreate(Event** event, unsigned) {
    *event = new Event;
    return sticky();
}
API cuEventDestroy_v2(Event* event) {
    delete event;
    return SUCCESS;
}
API cuEventRecord(Event* event, void* handle) {
    event->seconds = std::make_shared<double>(-1);
    event->stream = handle ? stream_of(handle) : nullptr;
    auto seconds = event->seconds;
    const int error = submit(handle, [=] {
        *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    });
    if (event->stream) event->place = event->stream->issued;
    return error;
}
API cuStreamWaitEvent(void* handle, Event* event, unsigned) {
    if (!event->seconds) return SUCCESS; // never recorded: nothing to wait for
    auto stream = event->stream;
    const uint64_t place = event->place;
    if (!stream || stream.get() == handle) return sticky();
    return submit(handle, [=] { stream->run(place); });
}
API cuEventSynchronize(Event* event) {
    if (event->stream) event->stream->run(event->place);
    return sticky();
}
API cuEventQuery(Event* event) {
    if (int error = sticky()) return error;
    return event->seconds && *event->seconds < 0 ? NOT_READY : SUCCESS;
}
API cuEventElapsedTime_v2(float* milliseconds, Event* from, Event* to) {
    if (int error = sticky()) return error;
    if (!from->seconds || !to->seconds) return INVALID_HANDLE;
    if (*from->seconds < 0 || *to->seconds < 0) return NOT_READY;
    *milliseconds = float((*to->seconds - *from->seconds) * 1e3);
    return SUCCESS;
}
API cuEventElapsedTime(float* milliseconds, Event* from, Event* to) {
    return cuEventElapsedTime_v2(milliseconds, from, to);
}

// Graphs of one stream: what is queued while capturing, in order.
API cuStreamBeginCapture_v2(void* handle, int) {
    if (int error = sticky()) return error;
    std::shared_ptr<Stream> stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    std::lock_guard<std::recursive_mutex> guard(stream->context->lock);
    if (stream->capture) return CAPTURE_INVALIDATED;
    stream->capture = std::make_unique<std::vector<Work>>();
    captures_of_thread++;
    return SUCCESS;
}
API cuStreamEndCapture(void* handle, Graph** graph) {
    std::shared_ptr<Stream> stream = stream_of(handle);
    if (!stream || !stream->capture) return INVALID_HANDLE;
    std::lock_guard<std::recursive_mutex> guard(stream->context->lock);
    *graph = new Graph{std::move(*stream->capture)};
    stream->capture.reset();
    captures_of_thread--;
    return sticky();
}
API cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, uint64_t) {
    *executable = new Graph(*graph);
    return sticky();
}
API cuGraphLaunch(Graph* executable, void* handle) {
    auto work = std::make_shared<std::vector<Work>>(executable->work);
    Context* context = current;
    return submit(handle, [=] {
        for (const Work& part : *work)
            if (context->error == SUCCESS) part();
    });
}
API cuGraphDestroy(Graph* graph) {
    delete graph;
    return SUCCESS;
}
API cuGraphExecDestroy(Graph* executable) {
    delete executable;
    return SUCCESS;
}

// A fatbin's magic; the code in it is not looked at, kernels are found by name. CACHALOT_EMULATION_IMAGES may be the error that
// loading gives, and kernels with CACHALOT_EMULATION_MISSING in their names are in no image.
API cuModuleLoadData(Module** module, const void* image) {
    if (int error = sticky()) return error;
    if (captures_of_thread) return CAPTURE_UNSUPPORTED;
    const size_t images = environment("CACHALOT_EMULATION_IMAGES", 1);
    if (images != 1) return images ? int(images) : NO_BINARY_FOR_GPU;
    uint32_t magic;
    memcpy(&magic, image, 4);
    if (magic != 0xba55ed50 && magic != 0x464c457f) return INVALID_IMAGE;
    *module = new Module;
    return SUCCESS;
}
API cuModuleUnload(Module* module) {
    delete module;
    return SUCCESS;
}
API cuModuleGetFunction(Function** function, Module* module, const char* name) {
    const char* missing = getenv("CACHALOT_EMULATION_MISSING");
    if (missing && *missing && strstr(name, missing)) return NOT_FOUND;
    for (const emu::Kernel& kernel : emu::kernels())
        if (!strcmp(kernel.name, name)) {
            *function = &module->functions.emplace(name, Function{&kernel, SHARED_DEFAULT}).first->second;
            return SUCCESS;
        }
    return NOT_FOUND;
}
API cuFuncSetAttribute(Function* function, int which, int value) {
    if (which != 8) return SUCCESS; // maximal dynamic shared memory
    if (value < 0 || size_t(value) > SHARED_MAX) return INVALID_VALUE;
    function->shared_max = size_t(value);
    return SUCCESS;
}
API cuFuncGetAttribute(int* value, int, Function*) {
    *value = 0;
    return SUCCESS;
}

API cuGetErrorName(int error, const char** name) {
    switch (error) {
    case SUCCESS: *name = "CUDA_SUCCESS"; break;
    case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
    case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
    case NO_BINARY_FOR_GPU: *name = "CUDA_ERROR_NO_BINARY_FOR_GPU"; break;
    case INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
    case INVALID_IMAGE: *name = "CUDA_ERROR_INVALID_IMAGE"; break;
    case INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
    case INVALID_HANDLE: *name = "CUDA_ERROR_INVALID_HANDLE"; break;
    case ECC_UNCORRECTABLE: *name = "CUDA_ERROR_ECC_UNCORRECTABLE"; break;
    case NVLINK_UNCORRECTABLE: *name = "CUDA_ERROR_NVLINK_UNCORRECTABLE"; break;
    case NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
    case NOT_READY: *name = "CUDA_ERROR_NOT_READY"; break;
    case CAPTURE_UNSUPPORTED: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
    case CAPTURE_INVALIDATED: *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
    case emu::ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
    case emu::TIMEOUT: *name = "CUDA_ERROR_LAUNCH_TIMEOUT"; break;
    case emu::ASSERT: *name = "CUDA_ERROR_ASSERT"; break;
    case emu::MISALIGNED: *name = "CUDA_ERROR_MISALIGNED_ADDRESS"; break;
    case emu::FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; break;
    default: *name = "CUDA_ERROR_UNKNOWN"; return INVALID_VALUE;
    }
    return SUCCESS;
}
API cuGetErrorString(int error, const char** text) {
    if (current && current->error == error && !current->report.empty()) {
        *text = current->report.c_str();
        return SUCCESS;
    }
    return cuGetErrorName(error, text);
}

// Rank 2 or 3 with 128-byte swizzle, the only kinds the kernels use; the checks are the driver's. emulation/twins90.h reads
// it.
API cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* base, const uint64_t* dimensions,
                           const uint64_t* strides, const unsigned* box, const unsigned* element_strides, int interleave,
                           int swizzle, int, int) {
    const unsigned bytes = type == 0 ? 1 : type == 6 || type == 9 ? 2 : type == 7 ? 4 : 0; // u8, f16, bf16, f32
    if (rank < 2 || rank > 3 || !bytes || interleave || swizzle != 3 || reinterpret_cast<uintptr_t>(base) % 16 ||
        box[0] * bytes != 128)
        return INVALID_VALUE;
    for (unsigned i = 0; i < rank; i++)
        if (!dimensions[i] || dimensions[i] >> 32 || !box[i] || box[i] > 256 || element_strides[i] != 1)
            return INVALID_VALUE;
    for (unsigned i = 0; i + 1 < rank; i++)
        // The manual wants each stride a multiple of the one before.
        if (strides[i] % 16 || strides[i] >> 40 || !strides[i] || (i > 0 && strides[i] % strides[i - 1]))
            return INVALID_VALUE;
    struct Encoded {
        const void* base;
        uint64_t columns, rows, stride_bytes;
        uint32_t box_columns, box_rows, element_bytes, magic;
        uint64_t layers, layer_stride_bytes;
        uint32_t box_layers, rank;
        uint64_t reserved[7];
    } encoded{base,  dimensions[0], dimensions[1], strides[0],
              box[0], box[1],        bytes,         0x7e450a90,
              rank == 3 ? dimensions[2] : 1, rank == 3 ? strides[1] : 0, rank == 3 ? box[2] : 1, rank, {}};
    static_assert(sizeof encoded == 128, "a CUtensorMap");
    memcpy(map, &encoded, sizeof encoded);
    return SUCCESS;
}

API cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void** extra) {
    if (int error = sticky()) return error;
    const uint64_t threads = uint64_t(bx) * by * bz;
    if (extra || !params || threads == 0 || threads % 32 || threads > 1024 || !gx || !gy || !gz || gy > 65535 ||
        gz > 65535 || shared > function->shared_max)
        return INVALID_VALUE;
    if (threads != function->kernel->threads) return INVALID_VALUE; // as a launch beyond __launch_bounds__
    // The argument is copied now; the kernel runs when the stream does.
    const emu::Kernel* kernel = function->kernel;
    std::shared_ptr<char> argument(static_cast<char*>(aligned_alloc(64, (kernel->params_bytes + 63) / 64 * 64)), free);
    memcpy(argument.get(), params[0], kernel->params_bytes);
    static const unsigned workers = unsigned(environment("CACHALOT_EMULATION_WORKERS", 1));
    // Kernels with this in their names never end, or fail.
    static const char *hung = getenv("CACHALOT_EMULATION_HANG"), *failing = getenv("CACHALOT_EMULATION_FAULT_IN");
    static const int default_schedule = int(environment("CACHALOT_EMULATION_SCHEDULE", 0)) % 3;
    const int schedule = schedule_of_thread >= 0 ? schedule_of_thread : default_schedule;
    Context* context = current;
    return submit(stream, [=] {
        {
            std::lock_guard<std::mutex> guard(lock);
            const size_t device = size_t(context->device);
            const bool is_it = environment("CACHALOT_EMULATION_FAULT_DEVICE", device) == device;
            const bool fails = failing && *failing && strstr(kernel->name, failing);
            if (fails || (is_it && context->fault_after >= 0 && context->fault_after-- == 0)) {
                context->error = int(environment("CACHALOT_EMULATION_FAULT_CODE", emu::ILLEGAL_ADDRESS));
                context->report = std::string("injected fault in kernel ") + kernel->name;
                return;
            }
        }
        while (hung && *hung && strstr(kernel->name, hung)) std::this_thread::sleep_for(std::chrono::seconds(1));
        emu::Outcome outcome = emu::run({kernel, {gx, gy, gz}, {bx, by, bz}, shared, argument.get()},
                                        emu::SCHEDULES[schedule], workers);
        std::lock_guard<std::mutex> guard(lock);
        if (outcome.code == emu::OK) {
            std::string broken = broken_canary();
            if (!broken.empty()) outcome = {emu::ILLEGAL_ADDRESS, broken + " after kernel " + kernel->name};
        }
        if (outcome.code != emu::OK) {
            context->error = outcome.code;
            context->report = outcome.report;
            fprintf(stderr, "emulation: %s\n", outcome.report.c_str());
        }
    });
}
