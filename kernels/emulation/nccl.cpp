// A libnccl.so.2 for machines without a GPU, beside the stand-in libcuda.so.1: collectives over sockets of the loopback
// device, between threads or processes.
//
// A call queues its operation on the stream, or records it where the stream is captured, by cuLaunchHostFunc; it runs when
// the stream does. Each message says which operation of the communicator it belongs to, its kind and its size, so that
// ranks that are not at the same call find out instead of mixing up bytes; so does a rank whose peer is gone. Waits end when
// the communicator is aborted.
//
// Invariant: an operation that failed leaves an error that ncclCommGetAsyncError gives, and none runs after it.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

extern "C" int cuLaunchHostFunc(void* stream, void (*function)(void*), void* argument);

namespace {

enum Result : int {
    SUCCESS = 0,
    UNHANDLED_CUDA = 1,
    SYSTEM = 2,
    INTERNAL = 3,
    INVALID_ARGUMENT = 4,
    INVALID_USAGE = 5,
    REMOTE = 6,
};
enum Kind : uint32_t { ALL_GATHER = 1, ALL_REDUCE = 2, POINT_TO_POINT = 3 };

constexpr int VERSION = 22707;
constexpr int INT8 = 0, UINT8 = 1, INT32 = 2, SUM = 0;
constexpr int PATIENCE_SECONDS = 60, TICK_MILLISECONDS = 20, RANKS_MAX = 64;

// Where rank 0 waits, and a number that only who was told it knows.
struct Identity {
    uint16_t port;
    uint16_t zero;
    uint32_t secret[4];
};
struct UniqueId {
    char bytes[128];
};
static_assert(sizeof(Identity) <= sizeof(UniqueId), "it travels in NCCL's identifier");

struct Hello {
    uint32_t secret[4];
    uint32_t rank, port;
};
struct Head {
    uint64_t operation;
    uint32_t kind, zero;
    uint64_t bytes;
};

struct Communicator {
    int rank = 0, ranks = 0;
    std::vector<int> links; // by rank; -1 to itself
    std::atomic<bool> aborted{false};
    std::atomic<int> error{SUCCESS};
    std::atomic<int> at_work{0};
    bool errs = false; // changes a bit of what it gets
    std::mutex lock; // over operations while they run, and over the list of them
    uint64_t operation = 0;
    std::vector<std::unique_ptr<std::function<void()>>> recorded;

    ~Communicator() {
        for (int link : links)
            if (link >= 0) close(link);
    }
};

// One direction to one rank.
struct Flow {
    int peer;
    bool sends;
    char* at;
    uint64_t bytes;
    Head head;
    uint64_t moved = 0; // head included
    bool done() const { return moved == sizeof(Head) + bytes; }
};

std::mutex listeners_lock;
std::map<uint16_t, int> listeners; // of rank 0s that are to come, by port

int listen_on_loopback(uint16_t* port) {
    const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    if (listener < 0 || bind(listener, reinterpret_cast<sockaddr*>(&address), size) || listen(listener, RANKS_MAX) ||
        getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size)) {
        if (listener >= 0) close(listener);
        return -1;
    }
    *port = ntohs(address.sin_port);
    return listener;
}

int connect_to_loopback(uint16_t port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(port);
    const int link = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (link >= 0 && connect(link, reinterpret_cast<sockaddr*>(&address), sizeof address)) {
        close(link);
        return -1;
    }
    return link;
}

// Accepts within the time that ranks have to come.
int accept_soon(int listener) {
    pollfd waiting{listener, POLLIN, 0};
    if (poll(&waiting, 1, PATIENCE_SECONDS * 1000) != 1) return -1;
    return accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
}

bool move_all(int link, void* data, size_t bytes, bool sends) {
    char* at = static_cast<char*>(data);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(PATIENCE_SECONDS);
    while (bytes > 0) {
        pollfd waiting{link, short(sends ? POLLOUT : POLLIN), 0};
        if (poll(&waiting, 1, TICK_MILLISECONDS) < 0 || std::chrono::steady_clock::now() > deadline) return false;
        if (!waiting.revents) continue;
        const ssize_t moved = sends ? send(link, at, bytes, MSG_NOSIGNAL) : recv(link, at, bytes, 0);
        if (moved <= 0) return false;
        at += moved;
        bytes -= size_t(moved);
    }
    return true;
}

// Every rank tells rank 0 where it waits; each then calls those before it.
bool meet(Communicator& group, const Identity& identity) {
    group.links.assign(size_t(group.ranks), -1);
    std::vector<uint32_t> ports(size_t(group.ranks), 0);
    uint16_t port = 0;
    int listener = -1;
    bool met = true;
    if (group.rank == 0) {
        {
            std::lock_guard<std::mutex> guard(listeners_lock);
            auto found = listeners.find(identity.port);
            if (found == listeners.end()) return false; // rank 0 is who made the identifier
            listener = found->second;
            listeners.erase(found);
        }
        for (int waiting = group.ranks - 1; met && waiting > 0;) {
            const int link = accept_soon(listener);
            Hello hello{};
            met = link >= 0 && move_all(link, &hello, sizeof hello, false);
            const bool expected = met && !memcmp(hello.secret, identity.secret, sizeof hello.secret) &&
                                  hello.rank > 0 && hello.rank < uint32_t(group.ranks) && group.links[hello.rank] < 0;
            if (!expected) {
                if (link >= 0) close(link);
                continue;
            }
            group.links[hello.rank] = link;
            ports[hello.rank] = hello.port;
            waiting--;
        }
        for (int rank = 1; met && rank < group.ranks; rank++)
            met = move_all(group.links[size_t(rank)], ports.data(), ports.size() * sizeof(uint32_t), true);
    } else {
        listener = listen_on_loopback(&port);
        const int link = connect_to_loopback(identity.port);
        group.links[0] = link;
        Hello hello{{}, uint32_t(group.rank), port};
        memcpy(hello.secret, identity.secret, sizeof hello.secret);
        met = listener >= 0 && link >= 0 && move_all(link, &hello, sizeof hello, true) &&
              move_all(link, ports.data(), ports.size() * sizeof(uint32_t), false);
        for (int rank = 1; met && rank < group.rank; rank++) {
            group.links[size_t(rank)] = connect_to_loopback(uint16_t(ports[size_t(rank)]));
            met = group.links[size_t(rank)] >= 0 && move_all(group.links[size_t(rank)], &hello, sizeof hello, true);
        }
        for (int waiting = group.ranks - 1 - group.rank; met && waiting > 0; waiting--) {
            const int other = accept_soon(listener);
            Hello from{};
            met = other >= 0 && move_all(other, &from, sizeof from, false) && from.rank < uint32_t(group.ranks) &&
                  group.links[from.rank] < 0;
            if (met) group.links[from.rank] = other;
            else if (other >= 0) close(other);
        }
    }
    if (listener >= 0) close(listener);
    for (int link : group.links) {
        if (link < 0) continue;
        const int one = 1;
        setsockopt(link, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        fcntl(link, F_SETFL, fcntl(link, F_GETFL) | O_NONBLOCK);
    }
    return met;
}

// Moves what a flow's socket takes or has.
int advance(Flow& flow, int link) {
    while (!flow.done()) {
        const bool in_head = flow.moved < sizeof(Head);
        Head arriving = flow.head;
        char* at = in_head ? reinterpret_cast<char*>(&arriving) + flow.moved : flow.at + (flow.moved - sizeof(Head));
        const uint64_t left = in_head ? sizeof(Head) - flow.moved : sizeof(Head) + flow.bytes - flow.moved;
        const ssize_t moved = flow.sends ? send(link, at, left, MSG_NOSIGNAL) : recv(link, at, left, 0);
        if (moved < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return SUCCESS;
        if (moved <= 0) return REMOTE;
        // The bytes of the head that came must be those that are expected here.
        if (in_head && !flow.sends && memcmp(&arriving, &flow.head, sizeof arriving)) return INVALID_USAGE;
        flow.moved += uint64_t(moved);
    }
    return SUCCESS;
}

// One operation: all its directions at once.
int move(Communicator& group, std::vector<Flow>& flows) {
    for (;;) {
        if (group.aborted) return INTERNAL;
        std::vector<pollfd> waiting;
        for (Flow& flow : flows) {
            if (flow.done()) continue;
            if (int error = advance(flow, group.links[size_t(flow.peer)])) return error;
            if (!flow.done()) waiting.push_back({group.links[size_t(flow.peer)], short(flow.sends ? POLLOUT : POLLIN), 0});
        }
        if (waiting.empty()) return SUCCESS;
        if (poll(waiting.data(), waiting.size(), TICK_MILLISECONDS) < 0 && errno != EINTR) return SYSTEM;
    }
}

Flow flow(int peer, bool sends, void* at, uint64_t bytes, uint64_t operation, Kind kind) {
    return {peer, sends, static_cast<char*>(at), bytes, {operation, kind, 0, bytes}};
}

void all_gather(Communicator& group, uint64_t operation, char* slots, uint64_t bytes, Kind kind, int* error) {
    std::vector<Flow> flows;
    for (int peer = 0; peer < group.ranks; peer++) {
        if (peer == group.rank) continue;
        flows.push_back(flow(peer, true, slots + uint64_t(group.rank) * bytes, bytes, operation, kind));
        flows.push_back(flow(peer, false, slots + uint64_t(peer) * bytes, bytes, operation, kind));
    }
    *error = move(group, flows);
    if (group.errs) slots[uint64_t((group.rank + 1) % group.ranks) * bytes] ^= 1;
}

// Queues or records an operation. The communicator keeps it: a graph may call it again.
int queue(Communicator* group, void* stream, std::function<int(uint64_t)> operation) {
    if (group->error) return group->error;
    auto run = [group, operation = std::move(operation)] {
        group->at_work++;
        {
            std::lock_guard<std::mutex> guard(group->lock);
            if (!group->error && !group->aborted) {
                if (int error = operation(group->operation)) group->error = error;
                group->operation++;
            }
        }
        group->at_work--;
    };
    auto kept = std::make_unique<std::function<void()>>(std::move(run));
    std::function<void()>* raw = kept.get();
    {
        std::lock_guard<std::mutex> guard(group->lock);
        group->recorded.push_back(std::move(kept));
    }
    const auto call = [](void* argument) { (*static_cast<std::function<void()>*>(argument))(); };
    return cuLaunchHostFunc(stream, call, raw) ? UNHANDLED_CUDA : SUCCESS;
}

// Sends and receives between ncclGroupStart and ncclGroupEnd are one operation.
struct Message {
    Communicator* group;
    void* stream;
    int peer;
    bool sends;
    void* at;
    uint64_t bytes;
};
thread_local int group_depth = 0;
thread_local std::vector<Message> messages;

int queue_messages() {
    std::vector<Message> all = std::move(messages);
    messages.clear();
    while (!all.empty()) {
        Communicator* group = all.front().group;
        void* stream = all.front().stream;
        std::vector<Message> mine, others;
        for (Message& message : all) (message.group == group ? mine : others).push_back(message);
        all = std::move(others);
        const int error = queue(group, stream, [group, mine](uint64_t operation) {
            std::vector<Flow> flows;
            for (const Message& message : mine)
                flows.push_back(flow(message.peer, message.sends, message.at, message.bytes, operation, POINT_TO_POINT));
            return move(*group, flows);
        });
        if (error) return error;
    }
    return SUCCESS;
}

int message(Communicator* group, void* stream, int peer, bool sends, void* at, size_t count, int type) {
    if (!group || peer < 0 || peer >= group->ranks || peer == group->rank || (type != INT8 && type != UINT8))
        return INVALID_ARGUMENT;
    messages.push_back({group, stream, peer, sends, at, count});
    return group_depth > 0 ? SUCCESS : queue_messages();
}

void end(Communicator* group, bool aborts) {
    if (aborts) group->aborted = true;
    while (group->at_work > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    for (int& link : group->links) {
        if (link >= 0) close(link);
        link = -1;
    }
    // What was recorded may still be in a queue or a graph: it stays, and finds the communicator aborted.
    group->aborted = true;
}

} // namespace

API int ncclGetVersion(int* version) {
    *version = VERSION;
    return SUCCESS;
}
API int ncclGetUniqueId(UniqueId* id) {
    Identity identity{};
    const int listener = listen_on_loopback(&identity.port);
    if (listener < 0) return SYSTEM;
    std::random_device random;
    for (uint32_t& part : identity.secret) part = random();
    memset(id->bytes, 0, sizeof id->bytes);
    memcpy(id->bytes, &identity, sizeof identity);
    std::lock_guard<std::mutex> guard(listeners_lock);
    listeners[identity.port] = listener;
    return SUCCESS;
}
API int ncclCommInitRank(Communicator** made, int ranks, UniqueId id, int rank) {
    if (!made || ranks < 1 || ranks > RANKS_MAX || rank < 0 || rank >= ranks) return INVALID_ARGUMENT;
    Identity identity;
    memcpy(&identity, id.bytes, sizeof identity);
    auto group = std::make_unique<Communicator>();
    group->rank = rank;
    group->ranks = ranks;
    const char* wrong = getenv("CACHALOT_EMULATION_NCCL_WRONG"); // a rank
    group->errs = wrong && *wrong && atoi(wrong) == rank;
    if (!meet(*group, identity)) return SYSTEM;
    *made = group.release();
    return SUCCESS;
}
API int ncclCommGetAsyncError(Communicator* group, int* error) {
    if (!group) return INVALID_ARGUMENT;
    *error = group->error;
    return SUCCESS;
}
// A communicator is small and its recorded operations may be in a graph: it is emptied, not freed.
API int ncclCommAbort(Communicator* group) {
    if (!group) return INVALID_ARGUMENT;
    end(group, true);
    return SUCCESS;
}
API int ncclCommDestroy(Communicator* group) {
    if (!group) return INVALID_ARGUMENT;
    end(group, false);
    return SUCCESS;
}
API int ncclAllGather(const void* from, void* to, size_t count, int type, Communicator* group, void* stream) {
    if (!group || (type != INT8 && type != UINT8)) return INVALID_ARGUMENT;
    char* slots = static_cast<char*>(to);
    return queue(group, stream, [=](uint64_t operation) {
        char* own = slots + uint64_t(group->rank) * count;
        if (own != from) memmove(own, from, count);
        int error;
        all_gather(*group, operation, slots, count, ALL_GATHER, &error);
        return error;
    });
}
API int ncclAllReduce(const void* from, void* to, size_t count, int type, int what, Communicator* group, void* stream) {
    if (!group || type != INT32 || what != SUM) return INVALID_ARGUMENT;
    return queue(group, stream, [=](uint64_t operation) {
        const uint64_t bytes = count * sizeof(uint32_t);
        std::vector<uint32_t> slots(count * size_t(group->ranks));
        char* raw = reinterpret_cast<char*>(slots.data());
        memcpy(raw + uint64_t(group->rank) * bytes, from, bytes);
        int error;
        all_gather(*group, operation, raw, bytes, ALL_REDUCE, &error);
        if (error) return error;
        uint32_t* sums = static_cast<uint32_t*>(to);
        for (size_t i = 0; i < count; i++) {
            uint32_t sum = 0; // wraps, as the real one's does
            for (int rank = 0; rank < group->ranks; rank++) sum += slots[size_t(rank) * count + i];
            sums[i] = sum;
        }
        return int(SUCCESS);
    });
}
API int ncclSend(const void* from, size_t count, int type, int peer, Communicator* group, void* stream) {
    return message(group, stream, peer, true, const_cast<void*>(from), count, type);
}
API int ncclRecv(void* to, size_t count, int type, int peer, Communicator* group, void* stream) {
    return message(group, stream, peer, false, to, count, type);
}
API int ncclGroupStart() {
    group_depth++;
    return SUCCESS;
}
API int ncclGroupEnd() {
    if (group_depth == 0) return INVALID_USAGE;
    return --group_depth > 0 ? SUCCESS : queue_messages();
}
API const char* ncclGetErrorString(int error) {
    switch (error) {
    case SUCCESS: return "no error";
    case UNHANDLED_CUDA: return "unhandled cuda error";
    case SYSTEM: return "unhandled system error";
    case INTERNAL: return "internal error";
    case INVALID_ARGUMENT: return "invalid argument";
    case INVALID_USAGE: return "invalid usage";
    case REMOTE: return "remote process exited or there was a network error";
    default: return "unknown result code";
    }
}
